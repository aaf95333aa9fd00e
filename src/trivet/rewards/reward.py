"""The Reward protocol, and weighted sums that keep their parts."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.timing import timed


class Reward(Protocol):
    """Anything that scores rollouts: (B,) float32 on the rollouts' device, NaN where it returns no
    score.
    """

    def __call__(self, rollouts: Rollouts) -> Tensor: ...


class WeightedSum:
    """sum_k w_k r_k over the rewards that scored a completion; NaN where none did. Keeps its parts
    for the log.
    """

    def __init__(self, rewards: dict[str, Reward], weights: Sequence[float]):
        self.rewards, self.weights = rewards, weights
        self.parts: dict[str, Tensor] = {}  # name -> (B,) of the last call

    @timed("reward")
    def __call__(self, rollouts: Rollouts) -> Tensor:
        self.parts = {name: reward(rollouts) for name, reward in self.rewards.items()}
        stacked = torch.stack(list(self.parts.values()))  # (K, B)
        weights, scored = (
            torch.tensor(self.weights, device=stacked.device)[:, None],
            ~stacked.isnan(),
        )
        counts = scored & (weights != 0)
        return torch.where(
            counts.any(0), torch.where(scored, weights * stacked, 0.0).sum(0), torch.nan
        )  # (B,)

    def metrics(self) -> dict[str, Any]:
        """Return rewards/<name>/mean of the last call as (sum, count), and the numbers that rewards
        logged themselves.
        """
        means = {
            f"rewards/{name}/mean": (part.nansum(), (~part.isnan()).sum())
            for name, part in self.parts.items()
        }
        unscored = sum(int(part.isnan().sum()) for part in self.parts.values())
        logged = {
            key: value
            for reward in self.rewards.values()
            for key, value in getattr(reward, "logged", {}).items()
        }
        return means | ({"rewards/unscored": float(unscored)} if unscored else {}) | logged
