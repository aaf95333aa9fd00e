"""Parts of PPO: the critic, the weight of the KL, the rewards per token, the advantages."""

import math
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Groups, Rollouts
from trivet.model.scalar import values, with_scalar_head
from trivet.optimization.control import adapted_beta
from trivet.optimization.normalize import scale_to_unit_variance, whiten
from trivet.optimization.value import clipped_value_loss, explained_variance, gae
from trivet.rewards.reward import WeightedSum
from trivet.rewards.shaping import kl_charged_rewards
from trivet.step.metrics import Tally, mean
from trivet.step.run import Run


class Critic:
    """A model with a scalar head that learns the returns. Its optimizer updates only `trained`.

    It is a second model, made from the reward model or the policy; or, with --shared-critic, a head
    on the policy's own trunk.
    """

    def __init__(self, config: Any, run: Run):
        shared = config.shared_critic
        self.model = (
            with_scalar_head(run.model, share=True)
            if shared
            else critic_from(run.reward, run.model)
        )
        self.trained = self.model.score if shared else self.model
        # a separate critic has its own learning rate, so its loss needs no weight
        self.loss_weight = config.value_coef if shared else 1.0
        self.clip = config.value_clip or math.inf
        run.holds(critic=self.model)

    def loss(self, part: Groups, old_values: Tensor, returns: Tensor) -> Tensor:
        """clipped_value_loss of a microbatch's tokens, with its gradient. (b, T)"""
        return clipped_value_loss(values(self.model, part), old_values, returns, clip=self.clip)


def critic_from(reward: WeightedSum, policy: Any) -> Any:
    """Copy the first reward model that reads the policy's tokens, else the policy's trunk with a
    zero head.
    """
    for part in reward.rewards.values():
        if getattr(part, "same_tokens", False):
            return part.critic()  # type: ignore[attr-defined]
    return with_scalar_head(policy)


class AdaptiveKL:
    """The weight of the KL: --beta; with --kl-target it is adapted after each step, so that the KL
    approaches the target, in nats per completion.
    """

    def __init__(self, config: Any):
        self.beta = torch.tensor(config.beta, dtype=torch.float64)
        self.target, self.charged = config.kl_target, config.kl_in == "reward"

    @property
    def charge(self) -> Tensor | float:
        """The charge in the reward, per nat."""
        return self.beta if self.charged else 0.0

    @property
    def in_loss(self) -> Tensor | float:
        """The weight of the KL as a term of the loss."""
        return 0.0 if self.charged else self.beta

    def update(self, kl: Tensor) -> dict[str, float]:
        """Adapt the weight to the KL of a step, in nats per completion; return the weight that this
        step used, as a metric.
        """
        if not self.target:
            return {}
        used = float(self.beta)
        self.beta = adapted_beta(self.beta, kl, target=self.target).to(self.beta)
        return {"objective/kl_coef": used}

    def state(self) -> Tensor:
        """What a checkpoint saves."""
        return self.beta

    def set_state(self, state: Tensor) -> None:
        """Restore what `state` returned."""
        self.beta = state


def average_where_unscored(rewards: Tensor) -> Tensor:
    """The rewards, with the average of the step for completions that no reward scored. (B,)"""
    return rewards.where(~rewards.isnan(), rewards.nanmean().nan_to_num())


def token_rewards_of(
    config: Any, rollouts: Rollouts, rewards: Tensor, kl: Tensor, charge: Tensor | float
) -> Tensor:
    """The reward of each token: the completion's reward on its last token, minus the charge for the
    KL (B, T) on every token. (B, T)
    """
    scores = rewards - config.missing_eos_penalty * ~rollouts.finished  # (B,)
    token_rewards = kl_charged_rewards(scores, kl, rollouts.groups.mask, beta=charge)
    return (
        scale_to_unit_variance(token_rewards, rollouts.groups.mask)
        if config.whiten_rewards
        else token_rewards
    )


def advantages_of(
    config: Any, token_rewards: Tensor, old_values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """GAE, with whitened advantages if --whiten-advantages is set. (B, T) each"""
    advantages, returns = gae(token_rewards, old_values, mask, gamma=config.gamma, lam=config.lam)
    return (whiten(advantages, mask) if config.whiten_advantages else advantages), returns


def step_metrics(
    clipped: Tensor, token_rewards: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor
) -> Tally:
    """What PPO reports beyond the metrics that all sampling recipes have. (B, T) each"""
    return {
        "clip_ratio": mean(clipped, mask),
        "objective/rlhf_reward": mean(token_rewards.sum(1)),
        "value/explained_variance": explained_variance(old_values, returns, mask),
    }
