"""DPO: direct preference optimization (Rafailov et al. 2023).

reward signal   preference pairs
generation      none
optimization    Bradley-Terry on the implicit reward beta log pi/pi_ref

    L = mean over pairs of  -log sigmoid(beta [(log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))])

The reference is the policy as it starts, so its log-probabilities are taken before the first step, once for each pair that will
be seen, and no second model is kept in memory.

    trivet dpo --model Qwen/Qwen3-0.6B --data preferences.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example, microbatches, to_groups
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.optimization.preference import dpo_loss, implicit_reward
from trivet.optimization.reduce import sequence_sum
from trivet.run.loop import Metrics, Optimizer, Run
from trivet.run.options import Options
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "preference", "policy"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Direct preference optimization: Bradley-Terry on log-ratios to the reference."""

    beta: float = 0.1
    """Strength of the tie to the reference, per nat."""


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the policy is run.model."""
    policy = run.model
    seen = [example for _, examples in run.batches() for example in examples] + run.heldout
    reference = reference_logprobs(policy, seen, config, run)
    optimizer = Optimizer(policy, config, run.steps)

    for step, examples in run.batches():
        groups = to_groups(examples, run.device)
        ref_logprob = torch.stack([reference[id(example)] for example in examples]).flatten()  # (B,)
        result = torch.zeros_like(ref_logprob)  # (B,)
        for rows, part in microbatches(groups, config.microbatch_tokens, whole=True):
            logprob = sequence_sum(token_logprobs(policy, part), part.mask)  # (b,)
            chosen, rejected = logprob.view(-1, 2).unbind(1)
            ref_chosen, ref_rejected = ref_logprob[rows].view(-1, 2).unbind(1)
            loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=config.beta)  # (b / 2,)
            (loss.sum() / len(examples)).backward()
            result[rows] = logprob.detach()
        metrics = pair_metrics(result, ref_logprob, config.beta) | optimizer.step()
        metrics["tokens/trained"] = float(groups.lengths.sum())
        if run.evaluates(step):
            metrics |= evaluate(policy, run.heldout, reference, config, run.device)
        yield metrics


def reference_logprobs(policy: Any, examples: Sequence[Example], config: Config, run: Run) -> dict[int, Tensor]:
    """log pi_ref of the (chosen, rejected) completions of every example, by the example's identity."""
    unique = list({id(example): example for example in examples}.values())
    run.note(f"reference log-probabilities of {len(unique):,} pairs")
    result: dict[int, Tensor] = {}
    for start in range(0, len(unique), 64):
        some = unique[start : start + 64]
        logprob = completion_logprob(policy, some, config, run.device)  # (B,)
        result |= dict(zip(map(id, some), logprob.view(-1, 2), strict=True))
    return result


def completion_logprob(policy: Any, examples: Sequence[Example], config: Config, device: str) -> Tensor:
    """log pi(y|x) of both completions of each example, without gradients. (B,)"""
    groups = to_groups(examples, device)
    return sequence_sum(in_microbatches(token_logprobs, policy, groups, config.microbatch_tokens), groups.mask)


def pair_metrics(logprob: Tensor, ref_logprob: Tensor, beta: float) -> Metrics:
    """Loss and implicit rewards of the two sides, in the field's names."""
    (chosen, rejected), (ref_chosen, ref_rejected) = logprob.view(-1, 2).unbind(1), ref_logprob.view(-1, 2).unbind(1)
    reward_chosen, reward_rejected = implicit_reward(logprob, ref_logprob, beta=beta).view(-1, 2).unbind(1)
    return {
        "loss": float(dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta).mean()),
        "rewards/chosen": float(reward_chosen.mean()),
        "rewards/rejected": float(reward_rejected.mean()),
        "rewards/margins": float((reward_chosen - reward_rejected).mean()),
        "rewards/accuracies": float((reward_chosen > reward_rejected).float().mean()),
        "logps/chosen": float(chosen.mean()),
        "logps/rejected": float(rejected.mean()),
    }


def evaluate(
    policy: Any, examples: Sequence[Example], reference: dict[int, Tensor], config: Config, device: str
) -> Metrics:
    """The same on the held-out pairs."""
    ref_logprob = torch.stack([reference[id(example)] for example in examples]).flatten()  # (B,)
    metrics = pair_metrics(completion_logprob(policy, examples, config, device), ref_logprob, config.beta)
    return {f"eval/{key}": value for key, value in metrics.items()}


PRESETS = {
    "toy": {
        **STORIES,
        "prompts_per_step": 32,
        "epochs": 1.0,
        "lr": 3e-4,
        "lr_decay": True,
    },
    "arithmetic": {**ARITHMETIC, "steps": 100, "lr": 1e-3},
}
