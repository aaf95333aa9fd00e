"""How much better than expected: baselines from the group, or from a learned value."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, *, normalize: bool = False) -> Tensor:
    """Reward minus the mean of its group.

        A_i = R_i - mean_j R_j;  normalize divides by (std + 1e-4), the unbiased standard deviation of the group

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

    rewards: (B,), all known. group_size: G >= 2. Returns (B,). Unbiased for any G. Source: RLOO (Kool et al. 2019;
    Ahmadian et al. 2024).
    """
    return group_advantages(rewards, group_size) * (group_size / (group_size - 1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the real tokens of each completion.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t);  A_t = sum_l (gamma lam)^l delta_{t+l};  return_t = A_t + V(s_t)

    rewards: (B, T) paid for token t. values: (B, T), V of the state before token t. mask: (B, T); the state after a
    completion's last real token is worth 0, and tokens outside the mask are stepped over. Returns advantages and
    returns, (B, T) each, 0 outside the mask. lam = 0 is the one-step advantage, lam = 1 the Monte-Carlo return minus V.
    Source: Schulman et al. 2016, eq. 16.
    """
    advantages = torch.zeros_like(values)  # (B, T)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        real = mask[:, t]  # (B,)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(real, advantage, 0.0)
        next_advantage = torch.where(real, advantage, next_advantage)
        next_value = torch.where(real, values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0.0)
