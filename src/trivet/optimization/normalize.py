"""Normalize the values of a batch by their own spread. x and mask are (B, T); mask is bool, True
where a token counts.
"""

import torch
from torch import Tensor

from trivet.optimization.reduce import token_mean


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and (unbiased) variance 1 over the real tokens.

        (x - mean) / sqrt(var + 1e-8) where mask, 0 elsewhere

    With fewer than two real tokens the variance is undefined and only the mean is subtracted; equal
    values give exactly 0. Returns (B, T). Source: Ziegler et al. 2019, lm-human-preferences.
    """
    centered, scale = _centered(x, mask)
    return centered * scale


def scale_to_unit_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Divide by the (unbiased) standard deviation over the real tokens; signs and zeros are kept.

        x / sqrt(var + 1e-8) where mask, 0 elsewhere

    For rewards, which may be rescaled but not shifted. Returns (B, T). The result does not depend
    on the unit of x; that of lm-human-preferences and the libraries that follow it, (x - mean) /
    sqrt(var + 1e-8) + mean, does.
    """
    return torch.where(mask, x, 0.0) * _centered(x, mask)[1]


def _centered(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return x minus its mean over the real tokens, 0 elsewhere; and 1 / standard deviation, 1 for
    fewer than two tokens.
    """
    count = mask.sum()
    # Shifted by the largest value first, so that equal values give exact zeros.
    anchored = torch.where(mask, x - torch.where(mask, x, -torch.inf).amax(), 0.0)
    centered = torch.where(mask, anchored - token_mean(anchored, mask), 0.0)
    variance = centered.square().sum() / (count - 1).clamp(min=1)
    return centered, torch.where(count > 1, (variance + 1e-8).rsqrt(), torch.ones_like(variance))
