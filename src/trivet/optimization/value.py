"""PPO's learned baseline: its advantages, its loss and its quality."""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over the real tokens of each completion.

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        A_t = sum_l (gamma lam)^l delta_{t+l},  return_t = A_t + V(s_t)

    rewards: (B, T) paid for token t. values: (B, T), V of the state before token t. mask: (B, T);
    the state after a completion's last real token is worth 0, and tokens outside the mask are
    skipped. Returns advantages and returns, (B, T) each, 0 outside the mask. lam = 0 is the
    one-step advantage, lam = 1 the Monte-Carlo return minus V. Source: Schulman et al. 2016, eq.
    16.
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


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float
) -> Tensor:
    """Squared error to the return, with the change from the old value limited.

        1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    values, old_values, returns: (B, T), in units of the reward. clip: the largest change that still
    lowers the loss; infinity gives the plain squared error. Returns (B, T). Source: Schulman et
    al., baselines ppo2; Stiennon et al. 2020.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (B, T)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over real tokens: 1 for a perfect critic, 0 for a constant one, below
    0 for one worse than none.

    (B, T) each; returns a scalar, 0 where the returns do not vary.
    """
    # Shifted by the largest return, so that equal returns have a variance of exactly 0.
    anchor = torch.where(mask, returns, -torch.inf).amax()
    spread, error = _variance(returns - anchor, mask), _variance(returns - values, mask)
    return torch.where(spread > 0, 1 - error / spread, 0.0)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum().clamp(min=1)
    x = torch.where(mask, x, 0.0)
    return torch.where(mask, x - x.sum() / count, 0.0).square().sum() / count
