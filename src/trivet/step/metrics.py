"""Metrics of a step: a mean stays a (sum, count) pair until the step ends, so that parts of a step
can be added before the division.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trivet.step import Metrics

Pair = tuple[Tensor, Tensor]  # (sum, count) of a mean
Tally = dict[str, Any]  # metrics before the division: numbers, scalar tensors, pairs


def mean(x: Tensor, mask: Tensor | None = None) -> Pair:
    """Return the (sum, count) pair of the mean over entries that the mask keeps and that are not
    NaN.
    """
    counted = ~x.isnan() if mask is None else mask & ~x.isnan()
    return torch.where(counted, x, 0).sum(), counted.sum()


def reduced(metrics: Mapping[str, Any]) -> Metrics:
    """Convert numbers, scalar tensors and pairs to numbers; a pair without entries becomes NaN.
    Reads from the device once.
    """
    parts = {
        name: value if isinstance(value, tuple) else (value,) for name, value in metrics.items()
    }
    tensors = [
        x.detach().reshape(1) for part in parts.values() for x in part if isinstance(x, Tensor)
    ]
    numbers: Iterator[float] = iter(torch.cat(tensors).tolist() if tensors else ())
    values = {
        name: [next(numbers) if isinstance(x, Tensor) else x for x in part]
        for name, part in parts.items()
    }
    return {
        name: part[0] / (part[1] or math.nan) if part[1:] else part[0]
        for name, part in values.items()
    }
