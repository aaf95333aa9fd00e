"""Where the work of a run is done: in this process, or shared among many (distributed/ranks.py). The seam between the two."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trivet import batch
from trivet.batch import Groups
from trivet.generation.engine import Engine
from trivet.step.reference_cache import digest

T = TypeVar("T")
MicroBatches = Iterator[tuple[Tensor, Groups]]


class Devices(Protocol):
    """What one process and many do differently. Every rank knows the whole step; passes, generation and weights are shared."""

    rank: int
    size: int

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Return the model that load(name, **options) reads, where this run holds its models."""
        ...

    def microbatches(
        self, groups: Groups, budget: int, *, whole: bool = False, only: Tensor | None = None, filled: Sequence[Tensor]
    ) -> MicroBatches:
        """batch.microbatches of this process's share; afterwards `filled`, (B, ...) each, written by row, is whole everywhere."""
        ...

    def engine(self, engine: Engine) -> Any:
        """Return what generates in this engine's way, each process its share of the prompts."""
        ...

    def servers(self, make: Callable[..., Any], engine: Engine) -> Any:
        """Return what generates by the servers that make(**options) sets up, once for all processes."""
        ...

    def reward(self, reward: Any) -> Any:
        """Return a reward that is asked once for all processes; one that is a model shares its passes as any model."""
        ...

    def clip_grad_norm(self, parameters: Sequence[Any], limit: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ over all shards."""
        ...

    def count_not_finite(self, tensors: Sequence[Any]) -> list[int]:
        """How many entries of each tensor are NaN or infinite, over all shards."""
        ...

    def first(self, call: Callable[[], T]) -> T:
        """Return what the call returns on rank 0; an InputError or OSError of it is raised everywhere."""
        ...

    def most(self, *numbers: int) -> list[int]:
        """The largest of each number on any rank."""
        ...

    def whole(self, model: Any) -> Any:
        """The model in one piece, to be saved; None on ranks that save nothing."""
        ...

    def digest(self, model: Any) -> str:
        """The digest of the weights that a loaded model began with (reference_cache.digest)."""
        ...


class OneProcess:
    """All of it here."""

    rank, size = 0, 1

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Return load(name)."""
        return load(name, **options)

    def microbatches(
        self, groups: Groups, budget: int, *, whole: bool = False, only: Tensor | None = None, filled: Sequence[Tensor]
    ) -> MicroBatches:
        """batch.microbatches of all of it."""
        return batch.microbatches(groups, budget, whole=whole, only=only)

    def engine(self, engine: Engine) -> Any:
        """The engine itself."""
        return engine

    def servers(self, make: Callable[..., Any], engine: Engine) -> Any:
        """The servers themselves."""
        return make()

    def reward(self, reward: Any) -> Any:
        """The reward itself."""
        return reward

    def clip_grad_norm(self, parameters: Sequence[Any], limit: float) -> Tensor:
        """torch's own."""
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def count_not_finite(self, tensors: Sequence[Any]) -> list[int]:
        """How many entries of each tensor are NaN or infinite."""
        return [int((~x.isfinite()).sum()) for x in tensors]

    def first(self, call: Callable[[], T]) -> T:
        """Return what the call returns."""
        return call()

    def most(self, *numbers: int) -> list[int]:
        """The numbers themselves."""
        return list(numbers)

    def whole(self, model: Any) -> Any:
        """The model itself."""
        return model

    def digest(self, model: Any) -> str:
        """Read from its weights."""
        return digest(model, [])
