"""Parts of PPO that are chosen before its loop: the critic, the weight of the KL, the rewards per token."""

import math
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.model.scalar import with_scalar_head
from trivet.optimization.control import adapted_beta
from trivet.optimization.normalize import scale_to_unit_variance, whiten
from trivet.optimization.value import gae
from trivet.rewards.reward import WeightedSum
from trivet.rewards.shaping import kl_charged_rewards
from trivet.step.run import Run


class Critic:
    """A model with a scalar head that learns the returns. `trained` is what its optimizer moves.

    A second model, made from the reward model or the policy; or, with --shared-critic, a head on the policy's own trunk.
    """

    def __init__(self, config: Any, run: Run):
        shared = config.shared_critic
        self.model = with_scalar_head(run.model, share=True) if shared else critic_from(run.reward, run.model)
        self.trained = self.model.score if shared else self.model
        self.loss_weight = config.value_coef if shared else 1.0  # a separate one has a learning rate of its own
        self.clip = config.value_clip or math.inf
        run.holds(critic=self.model)


def critic_from(reward: WeightedSum, policy: Any) -> Any:
    """A copy of the first reward model that reads the policy's tokens, else the policy's trunk with a zero head."""
    for part in reward.rewards.values():
        if getattr(part, "same_tokens", False):
            return part.critic()  # type: ignore[attr-defined]
    return with_scalar_head(policy)


class AdaptiveKL:
    """The weight of the KL: --beta, or with --kl-target led from step to step to so many nats per completion."""

    def __init__(self, config: Any):
        self.beta = torch.tensor(config.beta, dtype=torch.float64)
        self.target, self.charged = config.kl_target, config.kl_in == "reward"

    @property
    def charge(self) -> Tensor | float:
        """Reward per nat."""
        return self.beta if self.charged else 0.0

    @property
    def in_loss(self) -> Tensor | float:
        """The weight of the KL as a term of the loss."""
        return 0.0 if self.charged else self.beta

    def update(self, kl: Tensor) -> dict[str, float]:
        """Take the KL of a step, nats per completion; returns the weight that this step had, as a metric."""
        if not self.target:
            return {}
        now, self.beta = float(self.beta), adapted_beta(self.beta, kl, target=self.target).to(self.beta)
        return {"objective/kl_coef": now}

    def state(self) -> Tensor:
        """What a checkpoint keeps."""
        return self.beta

    def set_state(self, state: Tensor) -> None:
        """Take back what `state` returned."""
        self.beta = state


def token_rewards_of(config: Any, rollouts: Rollouts, rewards: Tensor, kl: Tensor, charge: Tensor | float) -> Tensor:
    """One reward per token: the completion's on its last token, minus the charge for the KL (B, T) on every token. (B, T)"""
    scores = rewards - config.missing_eos_penalty * ~rollouts.finished  # (B,)
    token_rewards = kl_charged_rewards(scores, kl, rollouts.groups.mask, beta=charge)
    return scale_to_unit_variance(token_rewards, rollouts.groups.mask) if config.whiten_rewards else token_rewards


def advantages_and_returns(
    config: Any, token_rewards: Tensor, old_values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """GAE, its advantages whitened with --whiten-advantages. (B, T) each"""
    advantages, returns = gae(token_rewards, old_values, mask, gamma=config.gamma, lam=config.lam)
    return (whiten(advantages, mask) if config.whiten_advantages else advantages), returns
