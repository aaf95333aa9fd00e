"""Leg 3 · how does the policy change? Pure functions on tensors: imports torch and nothing of ours."""

from trivet.optimization.advantages import gae, group_advantages, leave_one_out_advantages
from trivet.optimization.diagnostics import explained_variance, is_clipped
from trivet.optimization.kl import k1, k2, k3
from trivet.optimization.policy import clipped_surrogate_loss, policy_gradient_loss
from trivet.optimization.preference import (
    bradley_terry_loss,
    dpo_loss,
    implicit_reward,
    pairwise_group_loss,
    ranked_pairs,
)
from trivet.optimization.reduce import sequence_mean, sequence_sum, token_mean, whiten
from trivet.optimization.supervised import nll_loss
from trivet.optimization.value import clipped_value_loss

__all__ = [
    "bradley_terry_loss",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "dpo_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "implicit_reward",
    "is_clipped",
    "k1",
    "k2",
    "k3",
    "leave_one_out_advantages",
    "nll_loss",
    "pairwise_group_loss",
    "policy_gradient_loss",
    "ranked_pairs",
    "sequence_mean",
    "sequence_sum",
    "token_mean",
    "whiten",
]
