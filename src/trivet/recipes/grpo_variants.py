"""What the options of GRPO choose from: the baseline, the surrogate, the KL term, the mean. One function a choice.

At their defaults they are group_advantages, clipped_surrogate_loss, k2 and token_mean. `config` is a grpo.Config.
"""

from typing import Any

import torch
from torch import Tensor

from trivet.errors import InputError
from trivet.optimization.advantages import group_advantages, leave_one_out_advantages, scale_by_batch
from trivet.optimization.kl import k1, k2, k3
from trivet.optimization.policy import clipped_surrogate_loss
from trivet.optimization.ratio import cispo_loss, gspo_loss, weighted_kl
from trivet.optimization.reduce import sequence_mean, sequence_sum, token_mean
from trivet.rewards.overlong import overlong_penalty

OFF_POLICY = {"beta": 0.0, "scale_rewards": "group", "epochs_per_batch": 4}
VARIANTS: dict[str, dict[str, Any]] = {  # published ones: what each changes, as presets
    "deepseekmath": {"scale_rewards": "group", "loss_mean": "sequence", "kl_estimator": "k3"},
    "rloo": {"baseline": "leave-one-out", "kl_in": "reward", "loss_mean": "constant"},
    "reinforce++": {"baseline": "batch", "scale_rewards": "batch", "kl_in": "reward"},
    "dr-grpo": {"beta": 0.0, "loss_mean": "constant"},
    "dapo": OFF_POLICY | {"clip_high": 0.28, "dynamic_sampling": 3},
    "gspo": OFF_POLICY | {"loss": "gspo", "loss_mean": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": OFF_POLICY | {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.28},
}


def check(config: Any) -> None:
    """InputError for an option that another one would make idle."""
    if config.epochs_per_batch == 1 and (config.loss != "clip" or config.clip_dual):
        raise InputError("--loss and --clip-dual need --epochs-per-batch of 2 or more: at one epoch the ratio is 1")
    if config.clip_dual and (config.loss != "clip" or config.clip_dual <= 1 + config.clip_high):
        raise InputError("--clip-dual belongs to --loss clip, and must lie above 1 + --clip-high")
    if config.scale_rewards == "group" and config.baseline != "group":
        raise InputError("--scale-rewards group goes with --baseline group; take none or batch")
    if config.kl_in == "reward" and config.kl_estimator != "k2":
        raise InputError("--kl-estimator chooses the term in the loss; --kl-in reward charges k1")


def shaped(rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, config: Any) -> Tensor:
    """The reward of each completion after what --kl-in reward and --overlong-buffer take off. (B,)"""
    if config.kl_in == "reward":
        rewards = rewards - config.beta * sequence_sum(k1(old_logprobs, ref_logprobs), mask)
    if buffer := config.overlong_buffer:
        rewards = rewards + overlong_penalty(mask.sum(1), longest=config.max_completion_tokens, buffer=buffer)
    return rewards


def centered(rewards: Tensor, config: Any) -> Tensor:
    """Rewards minus --baseline, in the units of --scale-rewards. (B,)"""
    size = len(rewards) if config.baseline == "batch" else config.group_size
    advantages = group_advantages(rewards, size, normalize=config.scale_rewards == "group")
    if config.baseline == "leave-one-out":
        advantages = leave_one_out_advantages(rewards, size)
    return scale_by_batch(advantages, rewards) if config.scale_rewards == "batch" else advantages


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, config: Any) -> Tensor:
    """What --loss says, (b, T); at rho = 1 all have the gradient of policy_gradient_loss."""
    limits = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    if config.loss == "cispo":
        return cispo_loss(logprobs, old_logprobs, advantages, **limits)
    if config.loss == "gspo":
        return gspo_loss(logprobs, old_logprobs, advantages, mask, **limits)
    return clipped_surrogate_loss(logprobs, old_logprobs, advantages, **limits, clip_dual=config.clip_dual or torch.inf)


def kl_term(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, config: Any) -> Tensor:
    """The estimate of KL(pi || pi_ref) that stands in the loss. (b, T)"""
    estimate = (k2 if config.kl_estimator == "k2" else k3)(logprobs, ref_logprobs)
    return weighted_kl(estimate, logprobs, old_logprobs) if config.kl_estimator == "weighted-k3" else estimate


def step_mean(loss: Tensor, mask: Tensor, all_tokens: Tensor, config: Any) -> Tensor:
    """This microbatch's share of the --loss-mean over the step. loss, mask: (b, T); all_tokens: (B, T), the step's mask."""
    completions, longest = len(all_tokens), config.max_completion_tokens
    if config.loss_mean == "sequence":
        return sequence_mean(loss, mask).sum() / completions
    return token_mean(loss, mask, total=all_tokens.sum() if config.loss_mean == "token" else completions * longest)
