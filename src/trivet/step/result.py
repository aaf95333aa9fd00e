"""What a recipe yields after each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trivet.batch import Groups, Rollouts
from trivet.step.metrics import Tally


@dataclass(frozen=True, kw_only=True)
class Result:
    """A step or an evaluation: its metrics, and its completions with the numbers that belong to
    them.

    A recipe emits tensors; it does not know how they are shown. launch reduces the metrics, adds
    the gradient norm and the learning rate of run.optimizer, and keeps a few completions
    (store/record.py).
    """

    metrics: Tally
    completions: Rollouts | Groups | None = None
    rows: Sequence[Mapping[str, Any]] = ()  # (P,) source rows of Groups; Rollouts have their own
    # by name: (B,) one per completion, or (B, T) one per token
    numbers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
