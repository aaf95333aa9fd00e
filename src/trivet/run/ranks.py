"""Many processes that take each step together: torchrun --nproc-per-node N -m trivet METHOD ...

Every rank knows the whole step: its tokens, and the few numbers that go with each. What costs is shared: the passes through the
models, by groups; generation, by prompts; and the weights (FSDP2: a block is gathered when its turn comes). So a recipe stays as
it is, and whatever spans a step, a total, a mean, a whitening, an order drawn at random, is the same on all ranks because it is
computed from the same numbers. The functions by whose names recipes call the stages are replaced from outside while a run goes
on. A process that torchrun has not started never comes here.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from trivet.batch import Example, Groups, Rollouts, collate, group_rows, microbatches
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.generation.server import Servers
from trivet.model.adapters import trainable_copy
from trivet.model.copies import frozen_copy
from trivet.model.forward import shares_prefix
from trivet.model.weights import holder_of, with_weights
from trivet.rewards import learned
from trivet.run.loop import Run
from trivet.run.options import Options
from trivet.run.remembered import digest
from trivet.run.sharded import NO_QUANTIZED, ShardedModels, broadcast, gathered, local
from trivet.timing import timed

TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells each process
PATIENCE = timedelta(hours=1)  # for the slowest rank: rewards are asked for by one


class Ranks:
    """This process among those of the run, and the models that they hold together."""

    def __init__(self, config: Options):
        self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        local, name = int(os.environ["LOCAL_RANK"]), config.device
        if config.quantize != "none":
            raise InputError(f"--quantize {config.quantize}: {NO_QUANTIZED}")
        kind = "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
        if name not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {name}: under torchrun each process takes its own; give cpu, cuda or auto")
        if kind == "cuda":
            if local >= torch.cuda.device_count():
                raise InputError(
                    f"{local + 1} processes on this node and {torch.cuda.device_count()} GPUs; start one a GPU"
                )
            torch.cuda.set_device(local)
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        self.models = ShardedModels(config, self.device, init_device_mesh(kind, (self.size,)))
        self.filled: Sequence[Tensor] = ()  # what the recipe's loop writes by row
        self.rows, self.total_rows = torch.empty(0, dtype=torch.int64), 0  # of the whole generation, those sampled here

    # what all ranks know

    def first(self, call: Callable[[], Any], join: Callable[[Any], Any] = lambda asked: None) -> Any:
        """What this call gives on rank 0, or the error in what it was given, on all; join: what rank 0 asks of the others meanwhile.

        It asks by `broadcast`, of anything but a tuple.
        """
        if self.rank == 0:
            try:
                told = call(), None
            except (InputError, OSError) as error:
                told = None, error
            broadcast(told)
        else:
            while not isinstance(told := broadcast(), tuple):
                join(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def most(self, x: int) -> int:
        """The largest of the ranks' numbers."""
        told = torch.tensor(x)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        dist.all_reduce(x)
        return x

    def merge(self, x: Tensor, owner: Tensor) -> None:
        """Into each row of x goes that of the rank that owns it; rows without an owner (-1) stay. x: (B, ...), owner: (B,)"""
        seen = (owner >= 0).nonzero()[:, 0]
        rows, mine = x[seen], (owner[seen] == self.rank).view(-1, *[1] * (x.dim() - 1))
        x[seen] = self.total(torch.where(mine, rows, 0))

    # each rank's share of a step

    def microbatches(
        self, groups: Groups, budget: int, *, whole: bool = False, only: Tensor | None = None, into: Any = None
    ) -> Iterator[tuple[Tensor, Groups]]:
        """trivet.batch.microbatches of this rank's groups; then what the loop has filled by row is made whole on all ranks.

        All ranks make the same number of passes, since weights are gathered in each: one with fewer goes through its last one
        again, and its gradient is taken as zero.
        """
        lengths = groups.lengths.tolist()  # type: ignore[no-untyped-call]
        visited = range(len(lengths)) if only is None else only.nonzero()[:, 0].tolist()
        owner = torch.full((len(lengths),), -1)  # (P,)
        owner[list(visited)] = torch.tensor(balanced([lengths[p] for p in visited], self.size), dtype=torch.int64)
        owner = owner.to(groups.prompts.device)
        parts = list(microbatches(groups, budget, whole=whole, only=owner == self.rank))
        most = self.most(len(parts))
        yield from parts
        if most > len(parts):
            borrowed = torch.arange(len(lengths), device=owner.device) == visited[0]
            idle = parts[-1] if parts else next(microbatches(groups, budget, whole=whole, only=borrowed))
            self.models.idle = True
            try:
                yield from [idle] * (most - len(parts))
            finally:
                self.models.idle = False
        for x in self.filled if into is None else into:
            self.merge(x, owner.repeat_interleave(groups.group_size))

    @torch.no_grad()
    def in_microbatches(
        self, function: Callable[..., Tensor], model: Any, groups: Groups, budget: int, **options: Any
    ) -> Tensor:
        """trivet.model.forward.in_microbatches, each rank its share, the result on all."""
        results = list[Tensor]()  # one, made by the first pass, when its shape is known
        for rows, part in self.microbatches(groups, budget, into=results):
            result = function(model, part, **options)
            if not results:
                results.append(result.new_zeros(len(groups.completions), *result.shape[1:]))
            results[0][rows] = result
        return results[0]

    def shares(self, *filled: Tensor) -> None:
        """Run.shares."""
        self.filled = filled

    def generate(
        self,
        original: Callable[..., Rollouts],
        engine: Engine,
        policy: Any,
        prompts: Sequence[Example],
        group_size: int,
    ) -> Rollouts:
        """Engine.generate, each rank its share of the prompts, the rollouts on all. The weights are gathered once for it."""
        mine = range(self.rank, len(prompts), self.size)
        own, start, size = [prompts[p] for p in mine], engine.generator.get_state(), len(prompts) * group_size
        self.rows = group_rows(torch.tensor(mine, dtype=torch.int64, device=self.device), group_size)  # (R,)
        self.total_rows, known = size, torch.get_rng_state()
        root, plain = holder_of(policy), not shares_prefix(policy)
        if plain:  # transformers draws; so each rank has noise of its own
            seed = int(torch.randint(2**31, (), generator=engine.generator, device=engine.generator.device))
            start = engine.generator.get_state()
            engine.generator.manual_seed(seed + self.rank)
        with torch.no_grad(), gathered(root):
            part = root(lambda: original(engine, policy, own, group_size)) if own else None
        longest = self.most(0 if part is None else part.groups.completions.shape[1])
        engine.generator.set_state(start)
        torch.set_rng_state(known)
        for _ in range(0 if plain else longest):  # as many draws as the rank of the longest completion has made
            self._drawn(engine)
        return self._joined(part, longest, prompts, group_size)

    def served(
        self,
        original: Callable[..., Rollouts],
        servers: Any,
        policy: Any,
        prompts: Sequence[Example],
        group_size: int,
    ) -> Rollouts:
        """Servers.generate, which rank 0 alone does, the rollouts on all. The others take part where it publishes the weights."""
        part: Rollouts | None = None

        def generate() -> list[int]:
            nonlocal part
            part = original(servers, policy, prompts, group_size)
            return list(part.versions)

        versions = self.first(generate, lambda asked: asked and self.published(policy, asked))
        self.total_rows = len(prompts) * group_size
        self.rows = torch.arange(0 if part is None else self.total_rows, device=self.device)
        longest = self.most(0 if part is None else part.groups.completions.shape[1])
        return replace(self._joined(part, longest, prompts, group_size), versions=versions)

    def published(self, policy: Any, expects: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        """The policy in the CPU memory of rank 0, None elsewhere, and what it expects after probes, by all ranks' weights."""
        if self.rank == 0:
            broadcast(expects)
        with torch.no_grad():
            expected = with_weights(expects)(policy)
        if (twin := self.models.whole(policy)) is not None:
            twin.compute_dtype = policy.compute_dtype
        return twin, expected

    def _joined(self, part: Rollouts | None, longest: int, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Rollouts on all ranks, where each has written self.rows, part."""
        size = self.total_rows

        def whole(kind: torch.dtype, *shape: int, own: Tensor | None) -> Tensor:
            x = torch.zeros(size, *shape, dtype=kind, device=self.device)
            if own is not None:
                x[self.rows] = (
                    torch.nn.functional.pad(own.to(kind), (0, longest - own.shape[1])) if shape else own.to(kind)
                )
            return self.total(x)

        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, {} if part is None else dict(zip(self.rows.tolist(), part.texts, strict=True)))
        texts = {b: text for some in told for b, text in some.items()}
        given = None if part is None else part.groups
        present = whole(torch.uint8, longest, own=None if given is None else given.present).bool()
        bare = collate([prompt.prompt for prompt in prompts], [[]] * len(prompts)).to(self.device)
        written = whole(torch.int64, longest, own=None if given is None else given.completions)
        return Rollouts(
            groups=replace(bare, completions=written, mask=present, present=present, group_size=group_size),
            logprobs=whole(torch.float32, longest, own=None if part is None else part.logprobs),
            finished=whole(torch.uint8, own=None if part is None else part.finished).bool(),
            texts=[texts[b] for b in range(size)],
            rows=[prompt.row for prompt in prompts],
        )

    def noise(self, engine: Engine, rows: Tensor) -> Tensor:
        """Engine.noise: drawn for all rows of the step, so that a row's does not depend on who else is written here. (R, 1)"""
        return self._drawn(engine)[self.rows[rows]]

    def _drawn(self, engine: Engine) -> Tensor:
        return torch.rand((self.total_rows, 1), generator=engine.generator, device=engine.generator.device)

    def clip(self, parameters: Sequence[Any], limit: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ where gradients are in shards, or (of a head on a shared trunk) not yet added up."""
        grads = [p.grad for p in parameters if p.grad is not None]
        for grad in grads:
            if not isinstance(grad, DTensor):
                self.total(grad)
        squares = [torch.zeros((), device=self.device), torch.zeros((), device=self.device)]  # in shards, whole
        for grad in grads:
            squares[not isinstance(grad, DTensor)] += local(grad).square().sum().to(self.device)
        norm = (self.total(squares[0]) + squares[1]).sqrt()
        for grad in grads:
            local(grad).mul_((limit / (norm + 1e-6)).clamp(max=1).to(local(grad).device))
        return norm

    @contextmanager
    def at_work(self, recipe: ModuleType, run: Run) -> Iterator[None]:
        """Within it the stages that this recipe calls are shared among the ranks."""
        modules = [module for name, module in sys.modules.items() if name.startswith("trivet.recipes.")]
        run.shares = self.shares
        rewards = {} if run.reward is None else run.reward.rewards
        for name, reward in rewards.items():
            if not isinstance(reward, learned.LearnedReward):  # a model's passes are shared, as all passes
                rewards[name] = FromFirst(self, reward)
        generate, serve = Engine.generate, Servers.generate
        models = self.models
        shared = {
            "microbatches": self.microbatches,
            "in_microbatches": timed("forward")(self.in_microbatches),
            "with_scalar_head": models.with_scalar_head,
            "frozen_copy": models.making(frozen_copy),
            "trainable_copy": models.making(trainable_copy),
            "remembered": lambda model, rows, take, note: take(),
        }
        with ExitStack() as stack:
            for module in (*modules, learned):
                own = vars(module)
                for name, put in shared.items():
                    if name in own:
                        stack.enter_context(patch.object(module, name, put))
            away = vars(run.config).get("generate_with") or vars(run.config).get("vllm")
            share = self.served if away else self.generate
            stack.enter_context(
                patch.object(Engine, "generate", timed("generation")(lambda *args: share(generate, *args)))
            )
            stack.enter_context(
                patch.object(Servers, "generate", timed("generation")(lambda *args: self.served(serve, *args)))
            )
            stack.enter_context(patch.object(Engine, "noise", lambda engine, rows: self.noise(engine, rows)))
            stack.enter_context(patch.object(torch.nn.utils, "clip_grad_norm_", self.clip))
            yield


class FromFirst:
    """A reward that rank 0 asks, for all: one judge, one program with one state, whatever the number of processes."""

    def __init__(self, ranks: Ranks, reward: Any):
        self.ranks, self.reward, self.logged = ranks, reward, dict[str, float]()

    def __call__(self, rollouts: Rollouts) -> Tensor:
        own = self.reward
        scores, self.logged = self.ranks.first(lambda: (own(rollouts).cpu(), getattr(own, "logged", {})))
        return scores.to(rollouts.logprobs.device)


def balanced(lengths: Sequence[int], size: int) -> list[int]:
    """The rank of each group, so that their sums of lengths are close: the longest first, each to whom has least."""
    loads, ranks = [0] * size, [0] * len(lengths)
    for group in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        ranks[group] = rank = loads.index(min(loads))
        loads[rank] += lengths[group]
    return ranks


US: Ranks | None = None  # set while a run goes on that torchrun has started


def started() -> bool:
    """Whether torchrun has started this process, and it has not joined the others yet."""
    return US is None and all(name in os.environ for name in TOLD)


def leads() -> bool:
    """Whether this process speaks and writes for the run."""
    return US is None or US.rank == 0


@contextmanager
def together(config: Options) -> Iterator[None]:
    """Within it this process takes part in the run."""
    global US
    US = Ranks(config)
    models = US.models
    making = {
        "load_scorer": partial(models.load, learned.load_scorer),
        "scorer_over": models.making(learned.scorer_over),
    }
    with patch.multiple(learned, **making):  # type: ignore[call-overload]
        yield  # who fails stays a member until it has said so
    dist.barrier()
    dist.destroy_process_group()
    US = None


def first_to_fail() -> bool:
    """Whether no other process has failed before this one: the one whose sentence is said."""
    if US is None:
        return os.environ.get("RANK", "0") == "0"
    with suppress(Exception):  # whoever kept the count may have ended
        return US.store.add("failed", 1) == 1
    return False


def same(x: Any) -> Any:
    """What rank 0 has."""
    return x if US is None else broadcast(x)


def total(x: Tensor) -> Tensor:
    """The sum over the ranks."""
    return x if US is None else US.total(x)


def first(call: Callable[[], Any]) -> Any:
    """What this call gives on rank 0, or the error in what it was given, on all."""
    return call() if US is None else US.first(call)


def publishing() -> dict[str, Any]:
    """Of Servers: how they come by the policy of this run, and whom they keep waiting."""
    return {} if US is None else {"whole": US.published, "waits": broadcast}


def agreed(*numbers: int) -> list[int]:
    """The largest of each on any rank."""
    return [int(x) if US is None else US.most(int(x)) for x in numbers]


def loading(load: Callable[..., Any]) -> Callable[..., Any]:
    """A function that loads a model, for this run."""
    return load if US is None else partial(US.models.load, load)


def start_of(model: Any) -> str:
    """The digest of the weights that it began with."""
    return digest(model, []) if US is None else US.models.starts[id(model)]


def at_work(recipe: ModuleType, run: Run) -> Any:
    """Within it a recipe's stages are shared among the ranks."""
    return nullcontext() if US is None else US.at_work(recipe, run)


def whole(model: Any) -> Any:
    """The model on one device, to be saved; None on ranks that save nothing."""
    return model if US is None else US.models.whole(model)


class Silent:
    """The record of a rank that writes nothing."""

    def __init__(self, record: Any):
        self.keeps, self.locked = record.keeps, nullcontext
        self.keep = self.begin = self.undo = self.step = self.end = lambda *args, **kwargs: None


def recorder(record: Any) -> Any:
    """The record, or one that writes nothing."""
    return record if leads() else Silent(record)


def keeper(alone: Any) -> Any:
    """The class of checkpoints for this run."""
    if US is None:
        return alone
    from trivet.run import shards

    return partial(shards.Checkpoints, US)
