"""A policy-gradient objective as a few functions: which completions did better, how far the policy
may move, what ties it to the reference, and how tokens are averaged.

Published variants of GRPO differ only in these (grpo_variants.py). To write your own, replace one
of the functions:

    mine = objective_of(config).but(advantages=lambda rewards, old, ref, mask: rewards.sign())
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """L = mean(policy_loss(advantages) + beta kl), chosen once, before the loop."""

    advantages: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(rewards (B,), old_logprobs (B, T), ref_logprobs (B, T), mask (B, T)) -> (B,) or (B, T)"""
    policy_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(logprobs (b, T), old_logprobs (b, T), advantages (b,) or (b, T), mask (b, T)) -> (b, T)"""
    kl: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(logprobs, old_logprobs, ref_logprobs), (b, T) each -> (b, T), an estimate of KL(pi ||
    pi_ref)
    """
    mean: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(loss (b, T), mask (b, T), mask of the whole step (B, T)) -> this microbatch's share of the
    mean over the step
    """
    beta: float = 0.0
    """Weight of kl in the loss."""
    charges_kl: bool = False
    """Whether `advantages` reads old_logprobs, which must then come from the learner's own forward
    pass.
    """

    def but(self, **changes: Any) -> Self:
        """Return the same objective with some functions replaced."""
        return replace(self, **changes)

    def teaches(self, advantages: Tensor, group_size: int) -> Tensor:
        """Mark the groups that have a gradient: an advantage is not 0, or the KL is in the loss.
        (P,) bool
        """
        return advantages.reshape(len(advantages) // group_size, -1).any(1) | (self.beta > 0)
