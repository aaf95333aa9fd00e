"""DPO: direct preference optimization (Rafailov et al. 2023), and the losses that later papers put in its place.

reward signal   preference pairs
generation      none
optimization    Bradley-Terry on the implicit reward beta log pi/pi_ref

    L = mean over pairs of  -log sigmoid(beta [(log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))])

The reference is the policy as it starts, so its log-probabilities are taken before the first step, once for each pair that will
be seen, and no second model is kept in memory. --loss chooses another comparison (dpo_variants.py, docs/methods.md); --loss kto
takes each completion by itself, and reads rows of prompt, completion and label as well as pairs.

    trivet dpo --model Qwen/Qwen3-0.6B --data preferences.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trivet.batch import Example, Groups, microbatches
from trivet.errors import InputError
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.optimization.reduce import sequence_sum
from trivet.recipes.dpo_variants import (
    REFERENCE_FREE,
    VARIANTS,
    check,
    desirable,
    exchanged,
    group_loss,
    implied_rewards,
    show,
)
from trivet.recipes.offline import to_groups
from trivet.run.loop import Metrics, Optimizer, Run, Tally, mean, reduced
from trivet.run.options import Options
from trivet.run.remembered import remembered
from trivet.timing import timed
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "feedback", "policy"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Direct preference optimization: Bradley-Terry on log-ratios to the reference."""

    beta: float = 0.1
    """Strength of the tie to the reference, per nat (ipo: the paper's tau; simpo: scale of the reward; orpo: its lambda)."""
    loss: Literal["sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = "sigmoid"
    """How the sides are compared: sigmoid is DPO; simpo and orpo take no reference; kto takes each side by itself."""
    label_smoothing: float = 0.0
    """Of conservative and robust: the share of labels believed to be wrong, below 0.5."""
    length_normalize: bool = False
    """Compare log-probabilities per token in place of sums (not in kto; simpo and orpo always do)."""
    gamma: float = 0.0
    """Of simpo: by how much the winner's reward should lead."""
    sft_weight: float = 0.0
    """Weight of the supervised loss of the chosen side, beside the comparison (not in kto)."""
    desirable_weight: float = 1.0
    """Of kto: weight of good completions."""
    undesirable_weight: float = 1.0
    """Of kto: weight of bad completions."""

    def __post_init__(self) -> None:
        check(self)


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the policy is run.model."""
    policy = run.model
    sizes = {len(row.completions) for seen in (*(rows for _, rows in run.batches()), run.heldout) for row in seen}
    if len(sizes) > 1 or (1 in sizes and config.loss != "kto"):
        mixed = "rows of both kinds, pairs and labels" if len(sizes) > 1 else "rows with a label, not pairs"
        raise InputError(
            f"{config.data} has {mixed}: --loss kto learns from either kind by itself, the others from pairs"
        )
    reference = reference_logprobs(policy, config, run)
    shown, ref_logprobs = (run.heldout or run.train)[:4], torch.empty(0)
    if run.keeps(1):
        ref_logprobs = completion_logprobs(policy, shown, config, run.device)  # (b, T)
    optimizer = Optimizer(policy, config, run.steps)
    run.holds(optimizer=optimizer)

    for step, examples in run.batches():
        groups, good = to_groups(examples, run.device), desirable(examples, run.device)  # (B,)
        ref_logprob = look_up(reference, examples)  # (B,)
        kl = exchanged_kl(policy, examples, reference, config, run.device)  # scalar, 0 but in kto
        written = groups.mask & good[:, None]  # (B, T) tokens of the supervised term
        result = torch.zeros_like(ref_logprob)  # (B,)
        run.shares(result)
        for rows, part in microbatches(groups, config.microbatch_tokens, whole=True):
            logprobs = token_logprobs(policy, part)  # (b, T)
            logprob, tokens = sequence_sum(logprobs, part.mask), part.mask.sum(1)  # (b,) each
            loss = group_loss(config, logprob, ref_logprob[rows], tokens, good[rows], kl, part.group_size)  # (p,)
            supervised = -sequence_sum(logprobs, written[rows]).sum() / written.sum().clamp(min=1)
            (loss.sum() / len(examples) + config.sft_weight * supervised).backward()
            result[rows] = logprob.detach()
        metrics = feedback_metrics(config, result, ref_logprob, groups, good, kl) | optimizer.step()
        metrics["tokens/trained"] = groups.lengths.sum()
        if run.keeps(step):
            logprobs = completion_logprobs(policy, shown, config, run.device)  # (b, T)
            show(run, config, step, shown, logprobs, ref_logprobs, kl)
        if run.evaluates(step):
            metrics |= evaluate(policy, run.heldout, reference, config, run.device)
        yield reduced(metrics)


Table = dict[tuple[int, int], Tensor]  # (prompt, completions), by identity -> log pi_ref of each completion


def reference_logprobs(policy: Any, config: Config, run: Run) -> Table:
    """log pi_ref of all completions that will be seen: in kto also after the prompt of their neighbor."""
    seen: list[Example] = []
    for examples in (*(examples for _, examples in run.batches()), run.heldout):
        seen += examples + (exchanged(examples) if config.loss == "kto" and examples else [])
    unique = {(id(example.prompt), id(example.completions)): example for example in seen}
    if config.loss in REFERENCE_FREE:
        return {key: torch.zeros(len(example.completions), device=run.device) for key, example in unique.items()}
    rows = list(unique.values())

    def take() -> Tensor:
        run.note(f"reference log-probabilities of {len(rows):,} rows")
        parts = (rows[start : start + 64] for start in range(0, len(rows), 64))
        return torch.cat([completion_logprob(policy, part, config, run.device) for part in parts])

    logprob = remembered(policy, rows, take, run.note)  # (B,)
    return dict(zip(unique, logprob.split([len(row.completions) for row in rows]), strict=True))


def look_up(reference: Table, examples: Sequence[Example]) -> Tensor:
    """log pi_ref of the examples' completions. (B,)"""
    return torch.cat([reference[id(example.prompt), id(example.completions)] for example in examples])


def completion_logprob(policy: Any, examples: Sequence[Example], config: Config, device: str) -> Tensor:
    """log pi(y|x) of all completions of the examples, without gradients. (B,)"""
    return completion_logprobs(policy, examples, config, device).sum(1)


def completion_logprobs(policy: Any, examples: Sequence[Example], config: Config, device: str) -> Tensor:
    """The same by token. (B, T)"""
    return in_microbatches(token_logprobs, policy, to_groups(examples, device), config.microbatch_tokens)


def exchanged_kl(policy: Any, examples: Sequence[Example], reference: Table, config: Config, device: str) -> Tensor:
    """The reference point of kto: log pi/pi_ref of exchanged completions, their mean, not below 0. A scalar; else 0."""
    if config.loss != "kto":
        return torch.zeros((), device=device)
    pairs = exchanged(examples)
    return (completion_logprob(policy, pairs, config, device) - look_up(reference, pairs)).mean().clamp(min=0)


def feedback_metrics(
    config: Config, logprob: Tensor, ref_logprob: Tensor, groups: Groups, good: Tensor, kl: Tensor
) -> dict[str, Any]:
    """Loss and implicit rewards of the good and the bad side, in the field's names."""
    tokens, size = groups.mask.sum(1), groups.group_size
    rewards = implied_rewards(config, logprob, ref_logprob, tokens)  # (B,)
    loss, metrics = group_loss(config, logprob, ref_logprob, tokens, good, kl, size), dict[str, Any]()  # (p,)
    for side, rows in (("chosen", good), ("rejected", ~good)):
        if rows.any():
            metrics |= {f"rewards/{side}": mean(rewards, rows), f"logps/{side}": mean(logprob, rows)}
    if config.loss == "kto":
        metrics["kl"] = kl
    if size == 2:
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        metrics["rewards/margins"] = mean(chosen - rejected)
        metrics["rewards/accuracies"] = mean(chosen > rejected)
    if config.sft_weight:
        metrics["nll_loss"] = total, count = -logprob[good].sum(), tokens[good].sum()
        loss = loss + config.sft_weight * total / count
    return {"loss": mean(loss)} | metrics


@timed("evaluation")
def evaluate(policy: Any, examples: Sequence[Example], reference: Table, config: Config, device: str) -> Tally:
    """The same on the held-out rows."""
    logprob = completion_logprob(policy, examples, config, device)  # (B,)
    kl, groups = exchanged_kl(policy, examples, reference, config, device), to_groups(examples, device)
    metrics = feedback_metrics(config, logprob, look_up(reference, examples), groups, desirable(examples, device), kl)
    return {f"eval/{key}": value for key, value in metrics.items()}


PRESETS = {
    "toy": STORIES | {"prompts_per_step": 32, "epochs": 1.0, "lr": 3e-4, "lr_decay": True},
    "arithmetic": ARITHMETIC | {"steps": 100, "lr": 1e-3},
    **VARIANTS,
}
