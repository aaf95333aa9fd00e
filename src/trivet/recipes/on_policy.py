"""What PPO, GRPO and pairwise GRPO say of themselves: metrics of a step's rollouts, and the evaluation on held-out prompts."""

from typing import Any

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.generation.engine import Engine
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.optimization.kl import k1
from trivet.optimization.reduce import sequence_sum
from trivet.rewards.reward import WeightedSum
from trivet.run.loop import Run, Tally, mean
from trivet.timing import timed


def rollout_metrics(rollouts: Rollouts, rewards: Tensor, reward: WeightedSum) -> Tally:
    """The step's rollouts in the field's names: reward, lengths, how many were cut, groups that teach nothing."""
    groups, grouped = rollouts.groups, rewards.view(len(rollouts.rows), -1)  # (P, G)
    return {
        "reward": mean(rewards),
        "reward_std": (rewards - rewards.nanmean()).square().nanmean().sqrt(),
        "frac_reward_zero_std": mean((grouped == grouped[:, :1]).all(1)) if grouped.shape[1] > 1 else 0.0,
        "completions/mean_length": mean(groups.present.sum(1)),
        "completions/clipped_ratio": mean(~rollouts.finished),
        "entropy": mean(-rollouts.logprobs, groups.mask),
        "tokens/generated": groups.present.sum(),
    } | reward.metrics()


@torch.no_grad()
def policy_metrics(rollouts: Rollouts, logprobs: Tensor, ref_logprobs: Tensor, seen: Tensor) -> Tally:
    """How far the learner is from the reference (`kl`, nats per completion), and in the groups it has seen, (P,), from the sampler."""
    mask, difference = rollouts.groups.mask, (logprobs - rollouts.logprobs).abs()
    compared = mask & seen.repeat_interleave(rollouts.groups.group_size)[:, None]  # (B, T)
    return {
        "kl": mean(sequence_sum(k1(logprobs, ref_logprobs), mask)),
        "sampling/logprob_difference/mean": mean(difference, compared),
        "sampling/logprob_difference/max": torch.where(compared, difference, 0.0).max() / compared.any(),
    }


@timed("evaluation")
def evaluate(run: Run, policy: Any, reference: Any, reward: WeightedSum, engine: Engine, step: int) -> Tally:
    """One completion for each held-out prompt: reward, KL to the reference (nats per completion), length."""
    rollouts = engine.generate(policy, run.heldout, 1)
    rewards = reward(rollouts)  # (B,)
    metrics = rollout_metrics(rollouts, rewards, reward)
    run.keep(step, rollouts, heldout=True, reward=rewards)
    if reference is not None:
        groups, budget = rollouts.groups, run.config.microbatch_tokens
        ref_logprobs = in_microbatches(token_logprobs, reference, groups, budget, temperature=engine.temperature)
        metrics["kl"] = mean(sequence_sum(k1(rollouts.logprobs, ref_logprobs), groups.mask))
    return {f"eval/{key}": value for key, value in metrics.items() if not key.startswith(("tokens/", "frac_"))}
