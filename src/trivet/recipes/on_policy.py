"""Metrics, records and the held-out evaluation shared by PPO, GRPO and pairwise GRPO."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.optimization.kl import k1
from trivet.optimization.reduce import sequence_sum
from trivet.step.metrics import Tally, mean
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.step.trace import Trace
from trivet.timing import timed


def sampled_result(
    rollouts: Rollouts,
    rewards: Tensor,
    reward: Any,
    ref_logprobs: Tensor,
    trace: Trace,
    *,
    metrics: Mapping[str, Any] | None = None,
    **numbers: Tensor,
) -> Result:
    """Build the result of a step on sampled completions: the metrics of all such steps, the
    recipe's own, and the numbers for the record.

    rewards: (B,). reward: what computed them. ref_logprobs: (B, T). numbers: (B,) or (B, T) each,
    under the names that the record uses.
    """
    tally = rollout_metrics(rollouts, rewards, reward) | policy_metrics(
        rollouts, trace.first, ref_logprobs, trace.seen
    )
    common = {
        "reward": rewards,
        "gradient": -trace.slope,
        "logprob": trace.latest,
        "ref_logprob": ref_logprobs,
    }
    tally |= {"tokens/trained": trace.tokens, **(metrics or {})}
    return Result(metrics=tally, completions=rollouts, numbers=common | numbers)


def rollout_metrics(rollouts: Rollouts, rewards: Tensor, reward: Any) -> Tally:
    """Metrics of rollouts under the field's usual names: reward, lengths, the share cut off, groups
    that teach nothing.
    """
    groups, grouped = rollouts.groups, rewards.view(len(rollouts.rows), -1)  # (P, G)
    return {
        "reward": mean(rewards),
        "reward_std": (rewards - rewards.nanmean()).square().nanmean().sqrt(),
        "frac_reward_zero_std": mean((grouped == grouped[:, :1]).all(1))
        if grouped.shape[1] > 1
        else 0.0,
        "completions/mean_length": mean(groups.present.sum(1)),
        "completions/clipped_ratio": mean(~rollouts.finished),
        "entropy": mean(-rollouts.logprobs, groups.mask),
        "tokens/generated": groups.present.sum(),
    } | reward.metrics()


@torch.no_grad()
def policy_metrics(
    rollouts: Rollouts, logprobs: Tensor, ref_logprobs: Tensor, seen: Tensor
) -> Tally:
    """How far the learner is from the reference (`kl`, nats per completion), and, in the groups
    that it has seen, (P,), from the sampler.
    """
    mask, difference = rollouts.groups.mask, (logprobs - rollouts.logprobs).abs()
    compared = mask & seen.repeat_interleave(rollouts.groups.group_size)[:, None]  # (B, T)
    return {
        "kl": mean(sequence_sum(k1(logprobs, ref_logprobs), mask)),
        "sampling/logprob_difference/mean": mean(difference, compared),
        "sampling/logprob_difference/max": torch.where(compared, difference, 0.0).max()
        / compared.any(),
    }


@timed("evaluation")
def evaluate(run: Run) -> Result:
    """Sample one completion for each held-out prompt: reward, KL to the reference (nats per
    completion), length.
    """
    engine, reference = run.parts["engine"], run.parts.get("reference")
    rollouts = engine.generate(run.model, run.heldout, 1)
    rewards = run.reward(rollouts)  # (B,)
    metrics = rollout_metrics(rollouts, rewards, run.reward)
    if reference is not None:
        kl = k1(rollouts.logprobs, run.logprobs(reference, rollouts))  # (B, T)
        metrics["kl"] = mean(sequence_sum(kl, rollouts.groups.mask))
    metrics = {
        key: value for key, value in metrics.items() if not key.startswith(("tokens/", "frac_"))
    }
    return Result(metrics=metrics, completions=rollouts, numbers={"reward": rewards})
