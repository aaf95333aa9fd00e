"""The log-probabilities, gradients and scores of a step, recorded by row while a recipe's loop
runs.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Groups
from trivet.model.forward import token_logprobs
from trivet.model.scalar import scores
from trivet.optimization.policy import truncated_importance_weights
from trivet.step.devices import Devices


class Trace:
    """The microbatches of one step, and the model's numbers on them, complete on every process
    after each pass.

        trace = run.trace(rollouts)
        for rows, part in trace.microbatches():  # rows: (b,) row numbers of part in the step
            logprobs, old = trace.logprobs(policy, rows, part)  # (b, T) each
    """

    # (B, T) log pi before the first pass: the sampler's, or from the learner's own pass; 0 for data
    start: Tensor
    # (B, T) log pi in the first pass, so before the first update; `start` in rows not visited
    first: Tensor
    latest: Tensor  # (B, T) log pi in the last pass
    slope: Tensor  # (B, T) d loss / d log pi in the last pass, from autograd
    score: Tensor  # (B,) of a reward model
    seen: Tensor  # (P,) bool: the groups of the first pass
    tokens: Tensor  # () how many went through the trunk with a gradient

    def __init__(
        self,
        groups: Groups,
        start: Tensor,
        *,
        devices: Devices,
        budget: int,
        temperature: float = 1.0,
        sampler: Tensor | None = None,
        importance_cap: float = 0.0,
    ):
        self.groups, self.devices = groups, devices
        self.budget, self.temperature = budget, temperature
        self.sampler, self.importance_cap = sampler, importance_cap
        self.start, self.first, self.latest = start, start, start.clone()
        self.slope = torch.zeros_like(start)
        self.score = torch.zeros(len(start), device=start.device)
        self.seen = torch.ones(len(groups.prompts), dtype=torch.bool, device=start.device)
        self.tokens, self.passes = torch.zeros((), dtype=torch.int64, device=start.device), 0
        self.filled = list[Tensor]()  # what the current passes write by row

    def microbatches(
        self, *, only: Tensor | None = None, whole: bool = False
    ) -> Iterator[tuple[Tensor, Groups]]:
        """Make one pass over the step in microbatches (batch.microbatches), or, with many
        processes, over this one's share.

        only: (P,) bool, the groups to visit; the others cannot change the gradient. whole: never
        split a group.
        """
        yield from self.devices.microbatches(
            self.groups, self.budget, whole=whole, only=only, filled=self.filled
        )
        if self.passes == 0:
            self.first = self.latest.clone()
            self.seen = self.seen if only is None else only
        self.tokens += (
            self.groups.lengths.sum() if only is None else self.groups.lengths[only].sum()
        )
        self.passes += 1

    def logprobs(self, policy: Any, rows: Tensor, part: Groups) -> tuple[Tensor, Tensor]:
        """log pi of a microbatch's tokens now, with a gradient, and before the first update. (b, T)
        each

        In the first pass the two are the same numbers, so the ratio is exactly 1.
        """
        logprobs = token_logprobs(policy, part, temperature=self.temperature)
        self.latest[rows] = logprobs.detach()
        self.filled[:] = [self.latest, self.slope]
        if logprobs.requires_grad:
            logprobs.register_hook(partial(self._keep_slope, rows))
        return logprobs, self.first[rows] if self.passes else logprobs.detach()

    def scores(self, model: Any, rows: Tensor, part: Groups) -> Tensor:
        """A reward model's score of each completion of a microbatch, with a gradient. (b,)"""
        score = scores(model, part)
        self.score[rows] = score.detach()
        self.filled[:] = [self.score]
        return score

    def weights(self, rows: Tensor, old_logprobs: Tensor) -> Tensor | float:
        """min(pi_old / pi_sampler, cap) for tokens sampled by other weights or another engine, else
        1. (b, T)
        """
        if self.sampler is None:
            return 1.0
        return truncated_importance_weights(
            old_logprobs, self.sampler[rows], cap=self.importance_cap
        )

    def _keep_slope(self, rows: Tensor, slope: Tensor) -> None:
        self.slope[rows] = slope
