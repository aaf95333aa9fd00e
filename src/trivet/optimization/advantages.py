"""Advantages: how much better a completion is than expected, with a baseline from the group or the
batch (for a learned value, see value.py).
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, *, normalize: bool = False) -> Tensor:
    """Reward minus the mean of its group.

        A_i = R_i - mean_j R_j

    normalize: divide by (std + 1e-4), the unbiased standard deviation of the group.

    rewards: (B,), NaN where a completion has no reward: it gets 0 and does not enter the mean.
    group_size: G. Returns (B,). A group of equal rewards gives exactly 0, rounding included.
    Source: DeepSeekMath (Shao et al. 2024), section 4.1.2; without the division: Dr. GRPO (Liu et
    al. 2025).
    """
    grouped = rewards.view(-1, group_size)  # (P, G)
    scored = ~grouped.isnan()  # (P, G)
    # Centered at the largest reward first, so that equal rewards give exact zeros.
    anchor = grouped.nan_to_num(-torch.inf).amax(1, keepdim=True)  # (P, 1)
    shifted = torch.where(scored, grouped - anchor, 0.0)  # (P, G)
    count = scored.sum(1, keepdim=True)  # (P, 1)
    advantages = torch.where(
        scored, shifted - shifted.sum(1, keepdim=True) / count.clamp(min=1), 0.0
    )  # (P, G)
    if normalize:
        variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)  # (P, 1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    return advantages.flatten()


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean of the *other* rewards of its group.

        A_i = R_i - 1/(G-1) sum_{j != i} R_j  =  G/(G-1) (R_i - mean_j R_j)

    rewards: (B,), NaN where a completion has no reward: it gets 0, and G counts only those with
    one; a lone reward gives 0. group_size: G. Returns (B,). Unbiased for any G. Source: RLOO (Kool
    et al. 2019; Ahmadian et al. 2024).
    """
    count = (~rewards.view(-1, group_size).isnan()).sum(1).repeat_interleave(group_size)  # (B,)
    return group_advantages(rewards, group_size) * (count / (count - 1).clamp(min=1))


def scale_by_batch(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Divide advantages by the spread of all rewards of the step.

        A_i / (std(R) + 1e-4), the unbiased standard deviation over the whole batch

    advantages, rewards: (B,); NaN rewards do not count. Returns (B,). All groups share one scale,
    where group_advantages(normalize=True) gives each its own. With the batch mean as the baseline,
    that is group_advantages(rewards, len(rewards)), this is the normalization of REINFORCE++ (Hu
    2025).
    """
    # Exact zeros where all rewards are equal.
    centered = group_advantages(rewards, len(rewards))  # (B,)
    variance = centered.square().sum() / ((~rewards.isnan()).sum() - 1).clamp(min=1)
    return advantages / (variance.sqrt() + 1e-4)
