"""Many processes that take each step together: torchrun --nproc-per-node N -m trivet METHOD ...

Every rank knows the whole step: its tokens, and the few numbers that belong to each. The expensive
parts are shared: passes through the models, by groups; generation, by prompts; and the weights
(FSDP2: a block is gathered when it runs). So a recipe needs no changes, and whatever spans a step,
such as a total, a mean, whitening or a random order, is the same on all ranks because it is
computed from the same numbers. Ranks implements step.devices.Devices for many processes; code that
needs gathered weights uses the model's holder (fsdp.py).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from trivet.batch import Example, Groups, Rollouts, collate, group_rows, microbatches
from trivet.distributed.fsdp import NO_QUANTIZED, ShardedModels, broadcast, gathered, local
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.model.forward import shares_prefix
from trivet.model.weights import holder_of, with_weights
from trivet.rewards.learned import LearnedReward
from trivet.step.devices import MicroBatches
from trivet.step.options import Options
from trivet.timing import timed

T = TypeVar("T")
# environment variables that torchrun sets in each process
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(hours=1)  # for the slowest rank: one rank computes the rewards


class Ranks:
    """This process's rank in the run, and the models that all ranks hold together. Implements
    step.devices.Devices.
    """

    def __init__(self, config: Options):
        self.store, self.rank, self.size = next(dist.rendezvous("env://"))
        local, name = int(os.environ["LOCAL_RANK"]), config.device
        if config.quantize != "none":
            raise InputError(f"--quantize {config.quantize}: {NO_QUANTIZED}")
        kind = "cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu"
        if name not in ("auto", "cpu", "cuda"):
            raise InputError(
                f"--device {name}: under torchrun each process has its own device; choose cpu, "
                "cuda or auto"
            )
        if kind == "cuda":
            if local >= torch.cuda.device_count():
                raise InputError(
                    f"{local + 1} processes on this node, but {torch.cuda.device_count()} GPUs; "
                    "start one process per GPU"
                )
            torch.cuda.set_device(local)
        self.device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.size, timeout=PATIENCE
        )
        mesh = init_device_mesh(kind, (self.size,))
        self.models = ShardedModels(config, self.device, mesh, self.in_microbatches)

    # what all ranks know

    def first(self, call: Callable[[], T], join: Callable[[Any], Any] = lambda asked: None) -> T:
        """Run `call` on rank 0; return its result, or raise its InputError or OSError, on every
        rank.

        Until then the other ranks serve rank 0's broadcasts, of anything but a tuple, with `join`.
        """
        if self.rank == 0:
            try:
                outcome = call(), None
            except (InputError, OSError) as error:
                outcome = None, error
            broadcast(outcome)
        else:
            while not isinstance(outcome := broadcast(), tuple):
                join(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def most(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over the ranks."""
        largest = torch.tensor([int(x) for x in numbers])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()  # type: ignore[no-any-return,no-untyped-call]

    def total(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place."""
        dist.all_reduce(x)
        return x

    def merge(self, x: Tensor, owner: Tensor) -> None:
        """Fill each row of x from the rank that owns it; rows without an owner (-1) stay as they
        are. x: (B, ...), owner: (B,)
        """
        seen = (owner >= 0).nonzero()[:, 0]
        rows, mine = x[seen], (owner[seen] == self.rank).view(-1, *[1] * (x.dim() - 1))
        x[seen] = self.total(torch.where(mine, rows, 0))

    # each rank's share of a step

    def microbatches(
        self,
        groups: Groups,
        budget: int,
        *,
        whole: bool = False,
        only: Tensor | None = None,
        filled: Sequence[Tensor],
    ) -> MicroBatches:
        """Yield trivet.batch.microbatches of this rank's groups; then complete on all ranks what
        the loop has filled by row.

        All ranks make the same number of passes, because each pass gathers weights: a rank with
        fewer repeats its last one as a dummy pass, whose gradient is zero.
        """
        lengths = groups.lengths.tolist()  # type: ignore[no-untyped-call]
        visited = range(len(lengths)) if only is None else only.nonzero()[:, 0].tolist()
        owner = torch.full((len(lengths),), -1)  # (P,)
        owner[list(visited)] = torch.tensor(
            balance([lengths[p] for p in visited], self.size), dtype=torch.int64
        )
        owner = owner.to(groups.prompts.device)
        parts = list(microbatches(groups, budget, whole=whole, only=owner == self.rank))
        (most,) = self.most(len(parts))
        yield from parts
        if most > len(parts):
            borrowed = torch.arange(len(lengths), device=owner.device) == visited[0]
            idle = (
                parts[-1]
                if parts
                else next(microbatches(groups, budget, whole=whole, only=borrowed))
            )
            self.models.idle = True
            try:
                yield from [idle] * (most - len(parts))
            finally:
                self.models.idle = False
        for x in filled:
            self.merge(x, owner.repeat_interleave(groups.group_size))

    @timed("forward")
    @torch.no_grad()
    def in_microbatches(
        self,
        function: Callable[..., Tensor],
        model: Any,
        groups: Groups,
        budget: int,
        **options: Any,
    ) -> Tensor:
        """trivet.model.forward.in_microbatches; each rank computes its share, and all get the
        result.
        """
        results = list[Tensor]()  # one tensor, made by the first pass, when its shape is known
        for rows, part in self.microbatches(groups, budget, filled=results):
            result = function(model, part, **options)
            if not results:
                results.append(result.new_zeros(len(groups.completions), *result.shape[1:]))
            results[0][rows] = result
        return results[0]

    # the rest of Devices

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Load a model: rank 0 reads the files; each rank keeps its shards."""
        return self.models.load(load, name, **options)

    def engine(self, engine: Engine) -> "SharedEngine":
        """Return an engine in which each rank samples its share of the prompts."""
        return SharedEngine(**vars(engine), ranks=self)

    def servers(self, make: Callable[..., Any], engine: Engine) -> "SharedServers":
        """Return the servers, which rank 0 has, for all ranks."""
        return SharedServers(self, make, engine)

    def reward(self, reward: Any) -> Any:
        """Return a reward that rank 0 computes for all, unless it is a model."""
        return reward if isinstance(reward, LearnedReward) else SharedReward(self, reward)

    def whole(self, model: Any) -> Any:
        """Return the unsharded model in the CPU memory of rank 0; None on the other ranks."""
        return self.models.whole(model)

    def digest(self, model: Any) -> str:
        """Return the digest taken when the model was loaded."""
        return self.models.starts[id(model)]

    def count_not_finite(self, tensors: Sequence[Any]) -> list[int]:
        """Count the entries of each tensor that are NaN or infinite, over all shards."""
        counts = torch.tensor([int((~local(x).isfinite()).sum()) for x in tensors])
        return self.total(counts).tolist()  # type: ignore[no-any-return,no-untyped-call]

    def publish(self, policy: Any, expects: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        """Return the policy in the CPU memory of rank 0, None on the other ranks, and
        expects(policy) with all ranks' weights: the numbers that the probes must reproduce.
        """
        if self.rank == 0:
            broadcast(expects)
        with torch.no_grad():
            expected = with_weights(expects)(policy)
        if (twin := self.models.whole(policy)) is not None:
            twin.compute_dtype = policy.compute_dtype
        return twin, expected

    def join(
        self, part: Rollouts | None, rows: Tensor, prompts: Sequence[Example], group_size: int
    ) -> Rollouts:
        """Combine the rollouts of all ranks, on every rank. rows: (R,) the row numbers of `part`,
        this rank's rollouts, in the whole.
        """
        size = len(prompts) * group_size
        (longest,) = self.most(0 if part is None else part.groups.completions.shape[1])

        def whole(kind: torch.dtype, *shape: int, own: Tensor | None) -> Tensor:
            x = torch.zeros(size, *shape, dtype=kind, device=self.device)
            if own is not None:
                x[rows] = (
                    torch.nn.functional.pad(own.to(kind), (0, longest - own.shape[1]))
                    if shape
                    else own.to(kind)
                )
            return self.total(x)

        by_rank: list[Any] = [None] * self.size
        dist.all_gather_object(
            by_rank, {} if part is None else dict(zip(rows.tolist(), part.texts, strict=True))
        )
        texts = {b: text for some in by_rank for b, text in some.items()}
        given = None if part is None else part.groups
        present = whole(torch.uint8, longest, own=None if given is None else given.present).bool()
        bare = collate([prompt.prompt for prompt in prompts], [[]] * len(prompts)).to(self.device)
        written = whole(torch.int64, longest, own=None if given is None else given.completions)
        return Rollouts(
            groups=replace(
                bare, completions=written, mask=present, present=present, group_size=group_size
            ),
            logprobs=whole(torch.float32, longest, own=None if part is None else part.logprobs),
            finished=whole(torch.uint8, own=None if part is None else part.finished).bool(),
            texts=[texts[b] for b in range(size)],
            rows=[prompt.row for prompt in prompts],
        )

    def clip_grad_norm(self, parameters: Sequence[Any], limit: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ for gradients that are sharded, or (of a head on a shared
        trunk) not yet summed over the ranks.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        for grad in grads:
            if not isinstance(grad, DTensor):
                self.total(grad)
        # of gradients in shards, of whole ones
        squares = [torch.zeros((), device=self.device), torch.zeros((), device=self.device)]
        for grad in grads:
            squares[not isinstance(grad, DTensor)] += local(grad).square().sum().to(self.device)
        norm = (self.total(squares[0]) + squares[1]).sqrt()
        for grad in grads:
            local(grad).mul_((limit / (norm + 1e-6)).clamp(max=1).to(local(grad).device))
        return norm


class SharedEngine(Engine):
    """The engine of many processes: each samples its share of the prompts, and all get all
    rollouts.

    Random numbers are drawn for all rows of the step, so that those of a row do not depend on which
    rank samples it.
    """

    def __init__(self, *, ranks: Ranks, **options: Any):
        super().__init__(**options)
        self.ranks = ranks
        # the rows that this rank samples, and the number of all rows
        self.rows, self.total_rows = torch.empty(0, dtype=torch.int64), 0

    @timed("generation")
    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Engine.generate; the weights are gathered once for it."""
        ranks, start, before = self.ranks, self.generator.get_state(), torch.get_rng_state()
        mine = range(ranks.rank, len(prompts), ranks.size)
        own = [prompts[p] for p in mine]
        self.rows = group_rows(
            torch.tensor(mine, dtype=torch.int64, device=ranks.device), group_size
        )  # (R,)
        self.total_rows = len(prompts) * group_size
        root, plain = holder_of(policy), not shares_prefix(policy)
        if plain:  # transformers samples, so each rank has its own noise
            seed = int(
                torch.randint(2**31, (), generator=self.generator, device=self.generator.device)
            )
            start = self.generator.get_state()
            self.generator.manual_seed(seed + ranks.rank)
        with torch.no_grad(), gathered(root):
            part = root(partial(super().generate, policy, own, group_size)) if own else None
        rollouts = ranks.join(part, self.rows, prompts, group_size)
        self.generator.set_state(start)
        torch.set_rng_state(before)
        # as many draws as the rank with the longest completion made
        for _ in range(0 if plain else rollouts.logprobs.shape[1]):
            self._draw()
        return rollouts

    def noise(self, rows: Tensor) -> Tensor:
        """Engine.noise. (R, 1)"""
        return self._draw()[self.rows[rows]]

    def _draw(self) -> Tensor:
        return torch.rand(
            (self.total_rows, 1), generator=self.generator, device=self.generator.device
        )


class SharedServers:
    """Rank 0's servers, for all ranks: every rank helps to publish the weights, and gets the
    rollouts.
    """

    def __init__(self, ranks: Ranks, make: Callable[..., Any], engine: Engine):
        self.ranks, self.temperature = ranks, engine.temperature
        made = list[Any]()
        ranks.first(lambda: made.append(make(whole=ranks.publish, waits=broadcast)))
        self.servers: Any = made[0] if made else None

    @timed("generation")
    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Servers.generate on rank 0."""
        ranks, part = self.ranks, list[Rollouts]()

        def generate() -> list[int]:
            part.append(self.servers.generate(policy, prompts, group_size))
            return list(part[0].versions)

        versions = ranks.first(generate, lambda asked: asked and ranks.publish(policy, asked))
        rows = torch.arange(len(prompts) * group_size if part else 0, device=ranks.device)
        return replace(
            ranks.join(part[0] if part else None, rows, prompts, group_size), versions=versions
        )

    def state(self) -> Any:
        """What has been requested from the servers ahead of time, on rank 0."""
        return None if self.servers is None else self.servers.state()

    def set_state(self, state: Any) -> None:
        """Restore what `state` returned, on rank 0."""
        if self.servers is not None:
            self.servers.set_state(state)


class SharedReward:
    """A reward that rank 0 computes for all: one judge, one program with one state, whatever the
    number of processes.
    """

    def __init__(self, ranks: Ranks, reward: Any):
        self.ranks, self.reward, self.logged = ranks, reward, dict[str, float]()

    def __call__(self, rollouts: Rollouts) -> Tensor:
        own = self.reward
        scores, self.logged = self.ranks.first(
            lambda: (own(rollouts).cpu(), getattr(own, "logged", {}))
        )
        return scores.to(rollouts.logprobs.device)


def balance(lengths: Sequence[int], size: int) -> list[int]:
    """Assign each group to a rank by greedy balancing: the longest group first, to the least loaded
    rank.
    """
    loads, ranks = [0] * size, [0] * len(lengths)
    for group in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        ranks[group] = rank = loads.index(min(loads))
        loads[rank] += lengths[group]
    return ranks


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in VARIABLES)


@contextmanager
def join_group(config: Options) -> Iterator[Ranks]:
    """Join the group of processes that take the run's steps together, until the context ends.

    A process that fails stays a member of the group until it has ended, and its error records
    whether it was the first to fail (errors.first_to_fail): only that one is worth reading.
    """
    ranks = Ranks(config)
    try:
        yield ranks
    except BaseException as error:
        with suppress(Exception):  # the process that keeps the count may have ended
            error.first_to_fail = ranks.store.add("failed", 1) == 1  # type: ignore[attr-defined]
        raise
    dist.barrier()
    dist.destroy_process_group()
