"""Means over real tokens. The choice of mean *is* the difference between published variants, so
losses come unreduced.

x and mask are (B, T); mask is bool, True where a token counts.
"""

import torch
from torch import Tensor


def token_mean(x: Tensor, mask: Tensor, *, total: Tensor | float | None = None) -> Tensor:
    """Average in which every token weighs the same.

        sum_{b,t} mask x / total

    total: number of real tokens in the whole step, if x is one of its microbatches; None means
    mask.sum(). With a common total, the sum over microbatches does not depend on how the step was
    split. An empty mask gives 0. Returns a scalar. Source: DAPO (Yu et al. 2025), eq. 8.
    """
    total = mask.sum() if total is None else torch.as_tensor(total, device=x.device)
    return sequence_sum(x, mask).sum() / total.clamp(min=1)


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the real tokens of each completion: sum_t mask x. Turns log pi per token into log
    pi(y|x). Returns (B,).
    """
    return torch.where(mask, x, 0.0).sum(-1)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each completion: sum_t mask x / sum_t mask; 0 where a completion
    has none. Returns (B,).

    Averaged over B it weighs every completion the same, so a token of a long completion weighs
    less: the reduction of the GRPO paper (Shao et al. 2024, eq. 3), whose length bias Dr. GRPO (Liu
    et al. 2025) points out.
    """
    return sequence_sum(x, mask) / mask.sum(-1).clamp(min=1)
