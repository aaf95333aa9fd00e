"""Losses for learning from rewards: the score-function gradient, plain or with PPO's clipped ratio,
and weights for samples from another engine.
"""

import torch
from torch import Tensor


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss whose gradient is the policy gradient.

        -A log pi(a_t | s_t)

    logprobs: (B, T). advantages: (B, T) or (B,); they carry no gradient. Returns (B, T). The value
    itself means nothing; only the gradient does. Source: Williams 1992 (REINFORCE); Sutton et al.
    2000.
    """
    return -_per_token(advantages, logprobs).detach() * logprobs


def clipped_surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float = torch.inf,
) -> Tensor:
    """PPO's clipped surrogate: no gradient for moving the ratio further from 1 than the clip
    allows.

        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),  rho = pi / pi_old

    logprobs: (B, T) under the policy being trained; old_logprobs: (B, T) under the policy that
    sampled; advantages: (B, T) or (B,). clip_dual: rho is capped there first, so that a huge ratio
    has no gradient for a bad token either; must exceed 1 + clip_high. Returns (B, T). At rho = 1
    value and gradient are -A and -A grad log pi, those of policy_gradient_loss; the gradient is
    zero where rho > 1 + clip_high with A > 0, or rho < 1 - clip_low with A < 0. Source: Schulman et
    al. 2017, eq. 7 (clip_low = clip_high = 0.2 there); unequal limits: DAPO (Yu et al. 2025), eq.
    8; clip_dual: dual-clip PPO (Ye et al. 2020), c = 3 there.
    """
    advantages = _per_token(advantages, logprobs).detach()
    ratio = (logprobs - old_logprobs.detach()).exp().clamp(max=clip_dual)  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """True where clipped_surrogate_loss has no gradient: rho > 1 + clip_high with A > 0, or rho < 1
    - clip_low with A < 0.

    (B, T) each, advantages also (B,); returns (B, T) bool. Its mean over real tokens is the metric
    clip_ratio.
    """
    ratio, advantages = (logprobs - old_logprobs).exp(), _per_token(advantages, logprobs)  # (B, T)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | (
        (ratio < 1 - clip_low) & (advantages < 0)
    )


def truncated_importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float
) -> Tensor:
    """Importance weights that make tokens sampled by another engine, or by earlier weights, count
    as if the learner had sampled them.

        w = min(pi / pi_sampler, cap), not differentiated

    logprobs: (B, T) under the learner before its first update on the batch. sampler_logprobs: (B,
    T) as sampled. Returns (B, T), to multiply each token's loss with. cap bounds the variance at
    the price of some bias; without it the weighted gradient is, token by token, that of sampling
    from pi. Source: Yao et al. 2025 (truncated importance sampling between engines); Espeholt et
    al. 2018 (IMPALA), the clipped rho of eq. 1.
    """
    return (logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def _per_token(advantages: Tensor, like: Tensor) -> Tensor:
    return advantages[:, None] if advantages.dim() < like.dim() else advantages
