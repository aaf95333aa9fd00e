"""What a recipe yields after each step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trivet.batch import Groups, Rollouts
from trivet.step.metrics import Tally


@dataclass(frozen=True, kw_only=True)
class Result:
    """A step, or an evaluation: its metrics, and the completions that it was about with the numbers that belong to them.

    A recipe hands over the tensors that it has and does not know who reads them: launch reduces the metrics and keeps a few completions
    (store/record.py). The gradient norm and the learning rate are added from run.optimizer.
    """

    metrics: Tally
    completions: Rollouts | Groups | None = None
    rows: Sequence[Mapping[str, Any]] = ()  # (P,) source rows of Groups; Rollouts bring their own
    numbers: Mapping[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # by name: (B,) one a completion, (B, T) a token
