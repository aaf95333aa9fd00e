"""Run: the examples, the model, and everything else that a recipe's loop uses or creates."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example, Groups, Rollouts
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.model.copies import frozen_copy
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.model.load import load_policy
from trivet.model.text import load_tokenizer
from trivet.model.weights import load_beside
from trivet.places import model_folder, require_model
from trivet.step.devices import Devices, OneProcess
from trivet.step.optimizer import Optimizer
from trivet.step.options import Options
from trivet.step.trace import Trace

Batches = Iterator[tuple[int, list[Example]]]


@dataclass(kw_only=True)
class Run:
    """One run in memory. Launch builds it from a Config, and writes its record to disk.

    What a recipe creates through it (reference, engine, optimizer) or passes to `holds` is saved in
    checkpoints under its name, and is restored when a resumed run begins its loop.
    """

    config: Options
    model: Any  # what is trained, and saved at the end: a policy or a reward model
    tokenizer: Any = None  # of the model
    # (prompt ids, completion ids) -> the completion's text
    decode: Callable[[Sequence[int], Sequence[int]], str]
    stops: Sequence[int]  # ids that end a completion
    train: Sequence[Example]
    heldout: list[Example]
    reward: Any = None  # rewards.reward.WeightedSum, if the recipe samples
    steps: int
    device: str
    generator: torch.Generator
    devices: Devices = field(default_factory=OneProcess)
    servers: Any = (
        None  # runner.servers.ServerGeneration: servers that generate instead of the engine
    )
    # called when the loop begins: launch restores the checkpoint here
    begins: Callable[[], None] = lambda: None
    note: Callable[[str], None] = lambda text: None  # shows a line to the user
    # what the recipe has created for its loop, by name
    parts: dict[str, Any] = field(default_factory=dict[str, Any])
    done: int = 0  # the number of steps that earlier processes have taken
    step: int = 0  # the current step

    def __post_init__(self) -> None:
        self.heldout = [replace(x, index=len(self.train) + i) for i, x in enumerate(self.heldout)]

    # for a recipe's loop

    def reference(self) -> Any:
        """Return a frozen copy of the model as it is now: pi_ref."""
        return self.holds(reference=frozen_copy(self.model))

    def load(self, name: str) -> Any:
        """Load a frozen model, such as a teacher, from a run directory, folder or hub name, on this
        run's device and in its precision.

        Errors: InputError if its tokenizer differs from that of run.model, so that it would score
        other tokens.
        """
        folder = model_folder(name)
        options = {"device": self.device, "precision": self.config.precision}
        if not folder:
            raise InputError(
                "the recipe loads a second model, but no model was named; see the recipe's --help"
            )
        require_model(folder)
        if load_tokenizer(folder).get_vocab() != self.tokenizer.get_vocab():
            raise InputError(
                f"the tokenizer of {name} differs from that of {self.config.model}; choose a model "
                "with the same tokenizer"
            )
        return load_beside(self.model, load_policy, folder, **options).requires_grad_(False)

    def engine(self) -> Any:
        """Return what samples completions: the in-process engine, or the servers of --vllm and
        --generate-with.
        """
        config = vars(self.config)
        engine = Engine(
            self.decode,
            self.stops,
            config["max_completion_tokens"],
            config["temperature"],
            self.generator,
        )
        return self.holds(
            engine=self.servers.engine(engine) if self.servers else self.devices.engine(engine)
        )

    def optimizer(
        self, model: Any, *, updates: int = 1, lr: float | None = None, name: str = "optimizer"
    ) -> Optimizer:
        """Return AdamW over a model's trainable parameters. updates: how many each step makes; lr:
        replaces --lr.
        """
        optimizer = Optimizer(model, self.config, self.steps * updates, lr, self.devices)
        return self.holds(**{name: optimizer})

    def holds(self, **parts: Any) -> Any:
        """Register what a checkpoint must save, by name: models, optimizers, tensors. Return the
        last one.
        """
        self.parts |= parts
        return list(parts.values())[-1]

    def batches(self) -> Batches:
        """Yield (step, examples) for every remaining step. The loop begins here, so everything in
        `parts` must exist already.
        """
        self.begins()
        order = self.order(self.done)
        for step, examples in self.servers.ahead(order) if self.servers else order:
            self.step = step
            yield step, examples

    def order(self, done: int = 0) -> Batches:
        """Yield (step, examples) for every step after `done`, reshuffled each epoch; every call
        yields the same order.
        """
        rows = shuffled(len(self.train), random.Random(self.config.seed).randrange)
        for step in range(1, self.steps + 1):
            numbers = [next(rows) for _ in range(self.config.prompts_per_step)]
            if step > done:
                yield step, [replace(self.train[number], index=number) for number in numbers]

    def draw(self) -> random.Random:
        """Return a random number generator that depends only on the seed and the step."""
        return random.Random(f"{self.config.seed} {self.step}")

    def trace(self, given: Rollouts | Groups, *, by: Any = None) -> Trace:
        """Return a Trace of this step. by: the policy, if log pi before the first update is to come
        from its own pass instead of from the sampler.
        """
        options: dict[str, Any] = {"devices": self.devices, "budget": self.config.microbatch_tokens}
        options["temperature"] = self.temperature
        if isinstance(given, Groups):
            return Trace(given, torch.zeros(given.mask.shape, device=self.device), **options)
        if given.versions and (cap := vars(self.config)["importance_cap"]):
            options |= {"sampler": given.logprobs, "importance_cap": cap}
        return Trace(
            given.groups, given.logprobs if by is None else self.logprobs(by, given), **options
        )

    def logprobs(self, model: Any, given: Rollouts | Groups) -> Tensor:
        """log pi of all tokens of the step, without gradients; with model None, the sampler's, so
        that the KL is 0. (B, T)
        """
        if model is None and isinstance(given, Rollouts):
            return given.logprobs
        return self.passes(token_logprobs, model, given, temperature=self.temperature)

    def passes(
        self, function: Callable[..., Tensor], model: Any, given: Rollouts | Groups, **options: Any
    ) -> Tensor:
        """Compute token_logprobs, values or scores of a whole step in microbatches, without
        gradients.
        """
        groups = given.groups if isinstance(given, Rollouts) else given
        return in_microbatches(function, model, groups, self.config.microbatch_tokens, **options)

    @property
    def temperature(self) -> float:
        """The sampling temperature, by which the logits are divided in training too; 1 for
        completions from the data.
        """
        return vars(self.config).get("temperature", 1.0)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows this step: the last one, and every eval_every-th one."""
        return bool(self.heldout) and (
            step == self.steps or step % (self.config.eval_every or self.steps) == 0
        )


def shuffled(n: int, draw: Callable[[int], int]) -> Iterator[int]:
    """Yield every number below n once, in random order (an incremental Fisher-Yates that stores
    only what was moved), then start over.
    """
    for moved in iter(dict[int, int], None):  # an epoch
        for last in range(n - 1, -1, -1):
            yield moved.get(i := draw(last + 1), i)
            moved[i] = moved.pop(last, last)
