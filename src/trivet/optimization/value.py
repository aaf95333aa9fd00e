"""Learning the baseline: a value function for PPO."""

import torch
from torch import Tensor


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Squared error to the return, with the step away from the old value limited.

        1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)

    values, old_values, returns: (B, T), in units of the reward. clip: the widest step that still pays; infinity gives
    the plain squared error. Returns (B, T). Source: Schulman et al., baselines ppo2; Stiennon et al. 2020.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (B, T)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2
