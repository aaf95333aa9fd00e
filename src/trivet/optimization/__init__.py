"""Leg 3 · how does the policy change? Pure functions on tensors that import torch and nothing else
of Trivet.
"""

from trivet.optimization.advantages import (
    group_advantages,
    leave_one_out_advantages,
    scale_by_batch,
)
from trivet.optimization.control import adapted_beta
from trivet.optimization.kl import k1, k2, k3
from trivet.optimization.normalize import scale_to_unit_variance, whiten
from trivet.optimization.policy import (
    clipped_surrogate_loss,
    is_clipped,
    policy_gradient_loss,
    truncated_importance_weights,
)
from trivet.optimization.preference import (
    bradley_terry_loss,
    centering_loss,
    dpo_loss,
    implicit_reward,
    pairwise_group_loss,
    ranked_pairs,
)
from trivet.optimization.preference_variants import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    robust_loss,
    simpo_loss,
)
from trivet.optimization.ratio import cispo_loss, gspo_loss, weighted_kl
from trivet.optimization.reduce import sequence_mean, sequence_sum, token_mean
from trivet.optimization.supervised import nll_loss
from trivet.optimization.value import clipped_value_loss, explained_variance, gae

__all__ = [
    "adapted_beta",
    "bradley_terry_loss",
    "centering_loss",
    "cispo_loss",
    "clipped_surrogate_loss",
    "clipped_value_loss",
    "conservative_loss",
    "dpo_loss",
    "explained_variance",
    "gae",
    "group_advantages",
    "gspo_loss",
    "hinge_loss",
    "implicit_reward",
    "ipo_loss",
    "is_clipped",
    "k1",
    "k2",
    "k3",
    "kto_loss",
    "leave_one_out_advantages",
    "nll_loss",
    "odds_ratio_loss",
    "pairwise_group_loss",
    "policy_gradient_loss",
    "ranked_pairs",
    "robust_loss",
    "scale_by_batch",
    "scale_to_unit_variance",
    "sequence_mean",
    "sequence_sum",
    "simpo_loss",
    "token_mean",
    "truncated_importance_weights",
    "weighted_kl",
    "whiten",
]
