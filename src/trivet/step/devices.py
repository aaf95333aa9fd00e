"""The interface between a run and where its work is done: in this process, or shared among many
(distributed/ranks.py).
"""

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
    """What one process and many processes do differently. Every rank knows the whole step; passes,
    generation and weights are shared.
    """

    rank: int
    size: int

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Load a model by load(name, **options) and place it where this run holds its models."""
        ...

    def microbatches(
        self,
        groups: Groups,
        budget: int,
        *,
        whole: bool = False,
        only: Tensor | None = None,
        filled: Sequence[Tensor],
    ) -> MicroBatches:
        """Yield batch.microbatches of this process's share. Afterwards the tensors `filled`, (B,
        ...) each, which the loop has written by row, are complete on every process.
        """
        ...

    def engine(self, engine: Engine) -> Any:
        """Return an engine like this one, in which each process generates for its share of the
        prompts.
        """
        ...

    def servers(self, make: Callable[..., Any], engine: Engine) -> Any:
        """Return an engine that generates with the servers that make(**options) sets up, once for
        all processes.
        """
        ...

    def reward(self, reward: Any) -> Any:
        """Return a reward that is computed once for all processes; if it is a model, its passes are
        shared like those of any model.
        """
        ...

    def clip_grad_norm(self, parameters: Sequence[Any], limit: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_ over all shards."""
        ...

    def count_not_finite(self, tensors: Sequence[Any]) -> list[int]:
        """Count the entries of each tensor that are NaN or infinite, over all shards."""
        ...

    def first(self, call: Callable[[], T]) -> T:
        """Return what the call returns on rank 0; if it raises an InputError or OSError there,
        raise that on every rank.
        """
        ...

    def most(self, *numbers: int) -> list[int]:
        """Return the maximum of each number over the ranks."""
        ...

    def whole(self, model: Any) -> Any:
        """Return the unsharded model, for saving; None on ranks that save nothing."""
        ...

    def digest(self, model: Any) -> str:
        """Return the digest of the weights that the model had when it was loaded
        (reference_cache.digest).
        """
        ...


class OneProcess:
    """Do everything in this process."""

    rank, size = 0, 1

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Return load(name)."""
        return load(name, **options)

    def microbatches(
        self,
        groups: Groups,
        budget: int,
        *,
        whole: bool = False,
        only: Tensor | None = None,
        filled: Sequence[Tensor],
    ) -> MicroBatches:
        """Return batch.microbatches of the whole step."""
        return batch.microbatches(groups, budget, whole=whole, only=only)

    def engine(self, engine: Engine) -> Any:
        """Return the engine itself."""
        return engine

    def servers(self, make: Callable[..., Any], engine: Engine) -> Any:
        """Return the servers themselves."""
        return make()

    def reward(self, reward: Any) -> Any:
        """Return the reward itself."""
        return reward

    def clip_grad_norm(self, parameters: Sequence[Any], limit: float) -> Tensor:
        """torch.nn.utils.clip_grad_norm_"""
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def count_not_finite(self, tensors: Sequence[Any]) -> list[int]:
        """Count the entries of each tensor that are NaN or infinite."""
        return [int((~x.isfinite()).sum()) for x in tensors]

    def first(self, call: Callable[[], T]) -> T:
        """Return what the call returns."""
        return call()

    def most(self, *numbers: int) -> list[int]:
        """Return the numbers themselves."""
        return list(numbers)

    def whole(self, model: Any) -> Any:
        """Return the model itself."""
        return model

    def digest(self, model: Any) -> str:
        """Compute the digest of its weights."""
        return digest(model, [])
