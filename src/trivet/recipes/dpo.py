"""DPO: direct preference optimization (Rafailov et al. 2023), and the losses that later papers
propose instead.

reward signal   preference pairs
generation      none
optimization    Bradley-Terry on the implicit reward beta log pi/pi_ref

    h(y) = log pi(y|x) - log pi_ref(y|x)        y_w chosen, y_l rejected
    L = mean over pairs of  -log sigmoid(beta (h(y_w) - h(y_l)))

The reference is the policy before training. Its log-probabilities are computed before the first
step, once for each pair in the run, so no second model is kept in memory. --loss chooses another
comparison (dpo_variants.py, docs/methods.md); --loss kto is a separate method (kto.py).

    trivet dpo --model Qwen/Qwen3-0.6B --data preferences.jsonl
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trivet.batch import Example, Groups
from trivet.errors import InputError
from trivet.optimization.reduce import sequence_sum
from trivet.recipes import kto
from trivet.recipes.dpo_variants import (
    REFERENCE_FREE,
    VARIANTS,
    check,
    comparison_of,
    implied_rewards,
)
from trivet.recipes.offline import (
    ReferenceTable,
    all_examples,
    completion_logprob,
    rows_of,
    to_groups,
    zero_ref_logprob,
)
from trivet.step.metrics import Tally, mean
from trivet.step.options import Options
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.timing import timed
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "feedback", "policy"  # the kind of rows, and the kind of model that is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Direct preference optimization: Bradley-Terry on log-ratios to the reference."""

    beta: float = 0.1
    """Strength of the tie to the reference, per nat (ipo: the paper's tau; simpo: the scale of the
    reward; orpo: its lambda).
    """
    loss: Literal["sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo", "kto"] = (
        "sigmoid"
    )
    """How the two sides are compared: sigmoid is DPO; simpo and orpo use no reference; kto treats
    each side separately.
    """
    label_smoothing: float = 0.0
    """For conservative and robust: the share of labels believed to be wrong, below 0.5."""
    length_normalize: bool = False
    """Compare log-probabilities per token instead of sums (not with kto; simpo and orpo always
    do).
    """
    gamma: float = 0.0
    """For simpo: by how much the winner's reward should lead."""
    sft_weight: float = 0.0
    """Weight of a supervised loss on the chosen side, added to the comparison (not with kto)."""
    desirable_weight: float = 1.0
    """For kto: the weight of good completions."""
    undesirable_weight: float = 1.0
    """For kto: the weight of bad completions."""

    def __post_init__(self) -> None:
        check(self)


def train(config: Config, run: Run) -> Iterator[Result]:
    """Train run.model, one step at a time."""
    return kto.train(config, run) if config.loss == "kto" else compare(config, run)


def compare(config: Config, run: Run) -> Iterator[Result]:
    """The training loop of every loss that compares the two sides of a pair."""
    policy, reference = run.model, run.holds(reference=reference_of(config, run))
    optimizer, comparison = run.optimizer(policy), comparison_of(config)

    for _, pairs in run.batches():
        groups = to_groups(pairs, run.device)  # rows 2p, 2p + 1: chosen, rejected
        ref_logprob = reference(pairs)  # (B,) log pi_ref(y|x), computed before the first step
        chosen = is_chosen(groups)  # (B,)
        sft_mask = groups.mask & chosen[:, None]  # (B, T) tokens of the supervised term

        trace = run.trace(groups)
        for rows, part in trace.microbatches(whole=True):  # a pair is never split
            logprobs, _ = trace.logprobs(policy, rows, part)  # (b, T)
            logprob = sequence_sum(logprobs, part.mask)  # (b,)
            loss = comparison(logprob, ref_logprob[rows], part.mask.sum(1))  # (p,)
            supervised = -sequence_sum(logprobs, sft_mask[rows]).sum() / sft_mask.sum()
            (loss.sum() / len(pairs) + config.sft_weight * supervised).backward()
        optimizer.step()

        logprob = sequence_sum(trace.latest, groups.mask)  # (B,)
        metrics = pair_metrics(config, logprob, ref_logprob, groups) | {
            "tokens/trained": trace.tokens
        }
        numbers = {"logprob": trace.latest, "gradient": -trace.slope, "chosen": chosen}
        numbers["reward"] = implied_rewards(config, logprob, ref_logprob, groups.mask.sum(1))
        yield Result(metrics=metrics, completions=groups, rows=rows_of(pairs), numbers=numbers)


def reference_of(config: Config, run: Run) -> Callable[[Sequence[Example]], Tensor]:
    """Return a function from examples to log pi_ref of their completions, (B,); 0 where the loss
    uses no reference.
    """
    if config.loss not in REFERENCE_FREE:
        return ReferenceTable(run, partial(all_pairs, config, run))
    for _ in all_pairs(config, run):
        pass
    return partial(zero_ref_logprob, run)


def all_pairs(config: Config, run: Run) -> Iterator[Example]:
    """Every pair that the run will see. Errors: InputError at a row that is not a pair."""
    for example in all_examples(run):
        if len(example.completions) != 2:
            mixed = any(len(other.completions) == 2 for other in all_examples(run))
            kinds = "both pairs and labeled rows" if mixed else "labeled rows, not pairs"
            raise InputError(f"{config.data} has {kinds}; {kto.ROWS_OF_EACH_LOSS}")
        yield example


def is_chosen(groups: Groups) -> Tensor:
    """Mark the rows of a step of pairs that are the chosen sides. (B,) bool"""
    return torch.arange(len(groups.completions), device=groups.mask.device) % 2 == 0


def pair_metrics(config: Config, logprob: Tensor, ref_logprob: Tensor, groups: Groups) -> Tally:
    """Loss and implicit rewards of the two sides, under the field's usual names. logprob,
    ref_logprob: (B,)
    """
    tokens = groups.mask.sum(1)  # (B,)
    rewards = implied_rewards(config, logprob, ref_logprob, tokens)  # (B,)
    loss, metrics = comparison_of(config)(logprob, ref_logprob, tokens), Tally()  # (P,)
    is_first = is_chosen(groups)  # (B,)
    for name, side in (("chosen", is_first), ("rejected", ~is_first)):
        metrics |= {f"rewards/{name}": mean(rewards, side), f"logps/{name}": mean(logprob, side)}
    chosen, rejected = rewards.view(-1, 2).unbind(1)
    metrics |= {
        "rewards/margins": mean(chosen - rejected),
        "rewards/accuracies": mean(chosen > rejected),
    }
    if config.sft_weight:
        metrics["nll_loss"] = total, count = -logprob[is_first].sum(), tokens[is_first].sum()
        loss = loss + config.sft_weight * total / count
    return {"loss": mean(loss)} | metrics


@timed("evaluation")
def evaluate(run: Run) -> Result:
    """The same metrics on the held-out pairs."""
    config: Config = run.config  # type: ignore[assignment]
    if config.loss == "kto":
        return kto.evaluate(run)
    logprob = completion_logprob(run, run.heldout)  # (B,)
    ref_logprob = run.parts["reference"](run.heldout)  # (B,)
    return Result(
        metrics=pair_metrics(config, logprob, ref_logprob, to_groups(run.heldout, run.device))
    )


PRESETS = {
    "toy": STORIES | {"prompts_per_step": 32, "epochs": 1.0, "lr": 3e-4, "lr_decay": True},
    "arithmetic": ARITHMETIC | {"steps": 100, "lr": 1e-3},
    **VARIANTS,
}
