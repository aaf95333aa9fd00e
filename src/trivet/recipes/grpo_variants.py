"""The functions that GRPO's options choose from: the baseline, the surrogate, the KL term, the
mean. Each choice is one line, resolved before the loop.

The defaults are group_advantages, clipped_surrogate_loss, k2 and token_mean. `config` is a
grpo.Config.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from trivet.errors import InputError
from trivet.optimization.advantages import (
    group_advantages,
    leave_one_out_advantages,
    scale_by_batch,
)
from trivet.optimization.kl import k1, k2, k3
from trivet.optimization.policy import clipped_surrogate_loss, is_clipped
from trivet.optimization.ratio import cispo_loss, gspo_loss, weighted_kl
from trivet.optimization.reduce import sequence_mean, sequence_sum, token_mean
from trivet.recipes.objective import Objective
from trivet.rewards.overlong import overlong_penalty
from trivet.step.metrics import mean
from trivet.step.trace import Trace

OFF_POLICY = {"beta": 0.0, "scale_rewards": "group", "epochs_per_batch": 4}
VARIANTS: dict[str, dict[str, Any]] = {  # presets: what each published variant changes
    "deepseekmath": {"scale_rewards": "group", "loss_mean": "sequence", "kl_estimator": "k3"},
    "rloo": {"baseline": "leave-one-out", "kl_in": "reward", "loss_mean": "constant"},
    "reinforce++": {"baseline": "batch", "scale_rewards": "batch", "kl_in": "reward"},
    "dr-grpo": {"beta": 0.0, "loss_mean": "constant"},
    "dapo": OFF_POLICY | {"clip_high": 0.28, "dynamic_sampling": 3},
    "gspo": OFF_POLICY
    | {"loss": "gspo", "loss_mean": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": OFF_POLICY | {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.28},
}


def check(config: Any) -> None:
    """Raise an InputError if another option leaves one without effect."""
    if config.epochs_per_batch == 1 and (config.loss != "clip" or config.clip_dual):
        raise InputError(
            "--loss and --clip-dual need --epochs-per-batch of 2 or more: with one epoch the ratio "
            "is always 1"
        )
    if config.clip_dual and (config.loss != "clip" or config.clip_dual <= 1 + config.clip_high):
        raise InputError("--clip-dual needs --loss clip and a value above 1 + --clip-high")
    if config.scale_rewards == "group" and config.baseline != "group":
        raise InputError(
            "--scale-rewards group needs --baseline group; choose --scale-rewards none or batch"
        )
    if config.kl_in == "reward" and config.kl_estimator != "k2":
        raise InputError(
            "--kl-estimator chooses the KL term of the loss, but --kl-in reward subtracts k1 from "
            "the reward; drop one of the two"
        )


def objective_of(config: Any) -> Objective:
    """Return the functions that --baseline, --loss, --kl-estimator and --loss-mean name."""
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    dual = partial(clipped_surrogate_loss, **clip, clip_dual=config.clip_dual or torch.inf)
    losses = {
        "clip": lambda new, old, advantages, mask: dual(new, old, advantages),
        "gspo": partial(gspo_loss, **clip),
        "cispo": lambda new, old, advantages, mask: cispo_loss(new, old, advantages, **clip),
    }
    kl_terms = {
        "k2": lambda new, old, ref: k2(new, ref),
        "k3": lambda new, old, ref: k3(new, ref),
        "weighted-k3": lambda new, old, ref: weighted_kl(k3(new, ref), new, old),
    }
    longest = config.max_completion_tokens
    means = {
        "token": lambda loss, mask, step: token_mean(loss, mask, total=step.sum()),
        "sequence": lambda loss, mask, step: sequence_mean(loss, mask).sum() / len(step),
        "constant": lambda loss, mask, step: token_mean(loss, mask, total=len(step) * longest),
    }
    charged = config.kl_in == "reward"
    return Objective(
        advantages=partial(_advantages, config),
        policy_loss=losses[config.loss],
        kl=kl_terms[config.kl_estimator],
        mean=means[config.loss_mean],
        beta=0.0 if charged else config.beta,
        charges_kl=charged and config.beta > 0,
    )


def _advantages(
    config: Any, rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """Rewards, less what --kl-in reward and --overlong-buffer subtract, minus the --baseline, and
    divided as --scale-rewards says. (B,)
    """
    if config.kl_in == "reward":
        rewards = rewards - config.beta * sequence_sum(k1(old_logprobs, ref_logprobs), mask)
    if config.overlong_buffer:
        limits = {"longest": config.max_completion_tokens, "buffer": config.overlong_buffer}
        rewards = rewards + overlong_penalty(mask.sum(1), **limits)
    baselines = {
        "group": lambda: group_advantages(
            rewards, config.group_size, normalize=config.scale_rewards == "group"
        ),
        "leave-one-out": lambda: leave_one_out_advantages(rewards, config.group_size),
        "batch": lambda: group_advantages(rewards, len(rewards)),
    }
    advantages = baselines[config.baseline]()
    return scale_by_batch(advantages, rewards) if config.scale_rewards == "batch" else advantages


def step_metrics(config: Any, trace: Trace, advantages: Tensor, mask: Tensor) -> dict[str, Any]:
    """What GRPO adds to a result: the advantage and the parts of the ratio for the record, and
    clip_ratio where the ratio can differ from 1.
    """
    limits = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    clipped = is_clipped(trace.latest, trace.first, advantages, **limits)  # (B, T)
    metrics = {"clip_ratio": mean(clipped, mask)} if config.epochs_per_batch > 1 else {}
    numbers = {"advantage": advantages, "old_logprob": trace.first, "clipped": clipped}
    return {"metrics": metrics, **numbers}
