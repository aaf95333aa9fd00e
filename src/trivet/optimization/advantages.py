"""How much better than expected: baselines from the group or the batch (from a learned value: value.py)."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, *, normalize: bool = False) -> Tensor:
    """Reward minus the mean of its group.

        A_i = R_i - mean_j R_j

    normalize: divide by (std + 1e-4), the unbiased standard deviation of the group.

    rewards: (B,), NaN where no reward is known: such a completion gets 0 and does not enter the mean. group_size: G.
    Returns (B,). A group of equal rewards gives exactly 0, rounding included.
    Source: DeepSeekMath (Shao et al. 2024), section 4.1.2; without the division: Dr. GRPO (Liu et al. 2025).
    """
    grouped = rewards.view(-1, group_size)  # (P, G)
    known = ~grouped.isnan()  # (P, G)
    anchor = grouped.nan_to_num(-torch.inf).amax(1, keepdim=True)  # (P, 1) equal rewards become exact zeros
    shifted = torch.where(known, grouped - anchor, 0.0)  # (P, G)
    count = known.sum(1, keepdim=True)  # (P, 1)
    advantages = torch.where(known, shifted - shifted.sum(1, keepdim=True) / count.clamp(min=1), 0.0)  # (P, G)
    if normalize:
        variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)  # (P, 1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    return advantages.flatten()


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Reward minus the mean of the *other* rewards of its group.

        A_i = R_i - 1/(G-1) sum_{j != i} R_j  =  G/(G-1) (R_i - mean_j R_j)

    rewards: (B,), NaN where no reward is known: such a completion gets 0, and G counts the known ones; one that is alone
    gets 0. group_size: G. Returns (B,). Unbiased for any G. Source: RLOO (Kool et al. 2019; Ahmadian et al. 2024).
    """
    count = (~rewards.view(-1, group_size).isnan()).sum(1).repeat_interleave(group_size)  # (B,)
    return group_advantages(rewards, group_size) * (count / (count - 1).clamp(min=1))


def scale_by_batch(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Advantages in units of the spread of all rewards of the step.

        A_i / (std(R) + 1e-4), the unbiased standard deviation over the whole batch

    advantages, rewards: (B,); NaN rewards do not count. Returns (B,). One scale for all groups, where
    group_advantages(normalize=True) has one for each. With the mean of the batch as the baseline, which is
    group_advantages(rewards, len(rewards)), it is the normalization of REINFORCE++ (Hu 2025).
    """
    centered = group_advantages(rewards, len(rewards))  # (B,) exact zeros where the rewards are equal
    variance = centered.square().sum() / ((~rewards.isnan()).sum() - 1).clamp(min=1)
    return advantages / (variance.sqrt() + 1e-4)
