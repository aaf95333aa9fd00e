"""What to watch while training. Never part of a loss; every function returns a tensor, so nothing waits for a device."""

import torch
from torch import Tensor


def is_clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Where clipped_surrogate_loss has no gradient: rho > 1 + clip_high with A > 0, or rho < 1 - clip_low with A < 0.

    (B, T) each; returns (B, T) bool. The mean over real tokens is the metric clip_ratio.
    """
    ratio = (logprobs - old_logprobs).exp()  # (B, T)
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over real tokens: 1 is a perfect critic, 0 a constant one, below 0 worse than none.

    (B, T) each; returns a scalar, 0 where the returns do not vary.
    """
    anchor = torch.where(mask, returns, -torch.inf).amax()  # equal returns then have a variance of exactly 0
    spread, error = _variance(returns - anchor, mask), _variance(returns - values, mask)
    return torch.where(spread > 0, 1 - error / spread, 0.0)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum().clamp(min=1)
    x = torch.where(mask, x, 0.0)
    return torch.where(mask, x - x.sum() / count, 0.0).square().sum() / count
