"""What a recipe's loop finds around it: the examples, the model, and what it makes for itself through `run`."""

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
    """One run in memory. Launch makes it from a Config, and keeps its record on disk.

    What a recipe makes through it (reference, engine, optimizer) or hands to `holds` is saved in checkpoints under its name, and takes
    back its state when a resumed run begins its loop.
    """

    config: Options
    model: Any  # what is trained, and saved at the end: a policy, or a reward model
    tokenizer: Any = None  # of the model
    decode: Callable[[Sequence[int], Sequence[int]], str]  # (prompt ids, completion ids) -> the completion's text
    stops: Sequence[int]  # ids that end a completion
    train: Sequence[Example]
    heldout: list[Example]
    reward: Any = None  # rewards.reward.WeightedSum, where the recipe samples
    steps: int
    device: str
    generator: torch.Generator
    devices: Devices = field(default_factory=OneProcess)
    servers: Any = None  # runner.servers.Elsewhere: servers that generate in place of the engine
    begins: Callable[[], None] = lambda: None  # called when the loop begins: launch restores the checkpoint here
    note: Callable[[str], None] = lambda text: None  # a line for whoever watches
    parts: dict[str, Any] = field(default_factory=dict[str, Any])  # what the recipe has made for its loop, by name
    done: int = 0  # steps that an earlier process has taken
    step: int = 0  # the one that is being taken

    def __post_init__(self) -> None:
        self.heldout = [replace(x, index=len(self.train) + i) for i, x in enumerate(self.heldout)]

    # for a recipe's loop

    def reference(self) -> Any:
        """A frozen copy of the model as it stands in memory: pi_ref."""
        return self.holds(reference=frozen_copy(self.model))

    def load(self, name: str) -> Any:
        """A frozen model from a run directory, folder or hub name, on the device and in the precision of this run: a teacher, say.

        Errors: InputError where its tokenizer is not that of run.model, so that it would score other tokens.
        """
        folder, how = model_folder(name), {"device": self.device, "precision": self.config.precision}
        if not folder:
            raise InputError("the recipe loads a second model and none was named; see --help of the recipe")
        require_model(folder)
        if load_tokenizer(folder).get_vocab() != self.tokenizer.get_vocab():
            raise InputError(f"{name}: its tokenizer is not that of {self.config.model}; take a model that shares it")
        return load_beside(self.model, load_policy, folder, **how).requires_grad_(False)

    def engine(self) -> Any:
        """What samples completions: the in-process engine, or the servers of --vllm and --generate-with."""
        config = vars(self.config)
        engine = Engine(self.decode, self.stops, config["max_completion_tokens"], config["temperature"], self.generator)
        return self.holds(engine=self.servers.engine(engine) if self.servers else self.devices.engine(engine))

    def optimizer(self, model: Any, *, updates: int = 1, lr: float | None = None, name: str = "optimizer") -> Optimizer:
        """AdamW over what is trainable in a model. updates: in each step; lr: in place of --lr."""
        optimizer = Optimizer(model, self.config, self.steps * updates, lr, self.devices)
        return self.holds(**{name: optimizer})

    def holds(self, **parts: Any) -> Any:
        """Name what a checkpoint must keep: models, optimizers, tensors. Returns the last one given."""
        self.parts |= parts
        return list(parts.values())[-1]

    def batches(self) -> Batches:
        """(step, examples) for every step that is left. The loop begins here, so everything in `parts` must have been made."""
        self.begins()
        order = self.order(self.done)
        for step, examples in self.servers.ahead(order) if self.servers else order:
            self.step = step
            yield step, examples

    def order(self, done: int = 0) -> Batches:
        """(step, examples) for every step after `done`, in an order shuffled anew each epoch; the same at every call."""
        rows = shuffled(len(self.train), random.Random(self.config.seed).randrange)
        for step in range(1, self.steps + 1):
            numbers = [next(rows) for _ in range(self.config.prompts_per_step)]
            if step > done:
                yield step, [replace(self.train[number], index=number) for number in numbers]

    def draw(self) -> random.Random:
        """Random numbers that depend on the seed and the step alone."""
        return random.Random(f"{self.config.seed} {self.step}")

    def trace(self, given: Rollouts | Groups, *, by: Any = None) -> Trace:
        """A Trace of this step. by: the policy, to take log pi before the first update by a pass of its own, not from the sampler."""
        options: dict[str, Any] = {"devices": self.devices, "budget": self.config.microbatch_tokens}
        options["temperature"] = self.temperature
        if isinstance(given, Groups):
            return Trace(given, torch.zeros(given.mask.shape, device=self.device), **options)
        if given.versions and (cap := vars(self.config)["importance_cap"]):
            options |= {"sampler": given.logprobs, "importance_cap": cap}
        return Trace(given.groups, given.logprobs if by is None else self.logprobs(by, given), **options)

    def logprobs(self, model: Any, given: Rollouts | Groups) -> Tensor:
        """log pi of all tokens of the step without gradients; of no model, those of the sampler, so that the KL is 0. (B, T)"""
        if model is None and isinstance(given, Rollouts):
            return given.logprobs
        return self.passes(token_logprobs, model, given, temperature=self.temperature)

    def passes(self, function: Callable[..., Tensor], model: Any, given: Rollouts | Groups, **options: Any) -> Tensor:
        """token_logprobs, or values or scores, of a whole step without gradients, in microbatches."""
        groups = given.groups if isinstance(given, Rollouts) else given
        return in_microbatches(function, model, groups, self.config.microbatch_tokens, **options)

    @property
    def temperature(self) -> float:
        """At which completions are sampled, and by which the logits that train are divided; 1 for completions in the data."""
        return vars(self.config).get("temperature", 1.0)

    def evaluates(self, step: int) -> bool:
        """Whether this step ends with an evaluation: the last one does, and every eval_every-th."""
        return bool(self.heldout) and (step == self.steps or step % (self.config.eval_every or self.steps) == 0)


def shuffled(n: int, draw: Callable[[int], int]) -> Iterator[int]:
    """Every number below n once, in an order drawn as it goes (Fisher-Yates, holding only what was moved); then anew."""
    for moved in iter(dict[int, int], None):  # an epoch
        for last in range(n - 1, -1, -1):
            yield moved.get(i := draw(last + 1), i)
            moved[i] = moved.pop(last, last)
