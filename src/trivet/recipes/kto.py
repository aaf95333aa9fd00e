"""KTO: Kahneman-Tversky optimization (Ethayarajh et al. 2024), from single completions labeled
good or bad.

reward signal   a label for each completion, or pairs taken as one good and one bad
generation      none
optimization    each implicit reward against a reference point, the KL to the reference

    L = mean over rows of  w [1 - sigmoid(s beta (log pi/pi_ref(y|x) - z0))]
    s = 1 for good completions, -1 for bad ones; w is the weight of the row's label
    z0 = max(0, mean over rows of  log pi/pi_ref(y'|x)),  y' the completion of the row before

The mismatched completions y' stand in for samples in the estimate of the KL, so a step needs at
least two rows. The options are those of dpo.

    trivet dpo --loss kto --model Qwen/Qwen3-0.6B --data labels.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example
from trivet.errors import InputError
from trivet.optimization.preference import implicit_reward
from trivet.optimization.preference_variants import kto_loss
from trivet.optimization.reduce import sequence_sum
from trivet.recipes.offline import ReferenceTable, completion_logprob, rows_of, to_groups
from trivet.step.metrics import Tally, mean
from trivet.step.result import Result
from trivet.step.run import Run

ROWS_OF_EACH_LOSS = "--loss kto takes either kind, but not both; every other --loss takes pairs"


def train(config: Any, run: Run) -> Iterator[Result]:
    """Train run.model, one step at a time. config: a dpo.Config."""
    policy = run.model
    seen = partial(matched_and_mismatched, config, run)
    reference = run.holds(reference=ReferenceTable(run, seen))
    optimizer = run.optimizer(policy)

    for _, examples in run.batches():
        groups, good = to_groups(examples, run.device), is_desirable(examples, run.device)  # (B,)
        ref_logprob = reference(examples)  # (B,)
        kl = reference_point(run, reference, examples)  # scalar
        size = groups.group_size

        trace = run.trace(groups)
        for rows, part in trace.microbatches(whole=True):
            logprobs, _ = trace.logprobs(policy, rows, part)  # (b, T)
            loss = weighted_loss(
                config, sequence_sum(logprobs, part.mask), ref_logprob[rows], good[rows], kl
            )  # (b,)
            (loss.view(-1, size).mean(1).sum() / len(examples)).backward()
        optimizer.step()

        logprob = sequence_sum(trace.latest, groups.mask)  # (B,)
        metrics = label_metrics(config, logprob, ref_logprob, good, kl, size) | {
            "tokens/trained": trace.tokens
        }
        numbers = {"logprob": trace.latest, "gradient": -trace.slope, "chosen": good}
        numbers["reward"] = implicit_reward(logprob, ref_logprob, beta=config.beta)
        yield Result(metrics=metrics, completions=groups, rows=rows_of(examples), numbers=numbers)


def weighted_loss(
    config: Any, logprob: Tensor, ref_logprob: Tensor, good: Tensor, kl: Tensor
) -> Tensor:
    """kto_loss of each completion, weighted by its label. (b,)"""
    weight = torch.where(good, config.desirable_weight, config.undesirable_weight)  # (b,)
    return weight * kto_loss(logprob, ref_logprob, good, kl, beta=config.beta)


def matched_and_mismatched(config: Any, run: Run) -> Iterator[Example]:
    """Every example of the run, each step's followed by the same prompts with mismatched
    completions. Errors: InputError where rows of both kinds are mixed.
    """
    sizes = set[int]()
    for examples in chain((examples for _, examples in run.order()), [run.heldout]):
        sizes |= {len(example.completions) for example in examples}
        if len(sizes) > 1:
            raise InputError(f"{config.data} has both pairs and labeled rows; {ROWS_OF_EACH_LOSS}")
        yield from examples
        yield from mismatched_examples(examples) if examples else []


def mismatched_examples(examples: Sequence[Example]) -> list[Example]:
    """Each prompt with the completions of the row before it, which do not answer it: samples for
    the KL.
    """
    before = zip(examples, [examples[-1], *examples[:-1]], strict=True)
    return [
        replace(a, completions=b.completions, learned=b.learned, index=(a.index, b.index))
        for a, b in before
    ]


def reference_point(run: Run, reference: ReferenceTable, examples: Sequence[Example]) -> Tensor:
    """The mean of log pi/pi_ref over mismatched completions, at least 0; kto_loss multiplies it by
    beta. A scalar.
    """
    pairs = mismatched_examples(examples)
    return (completion_logprob(run, pairs) - reference(pairs)).mean().clamp(min=0)


def is_desirable(examples: Sequence[Example], device: str) -> Tensor:
    """Mark the good completions: the chosen sides of pairs, and the single ones labeled good. (B,)
    bool
    """
    labels = [
        (True, False) if len(example.completions) == 2 else (example.row["label"],)
        for example in examples
    ]
    return torch.tensor([label for row in labels for label in row], dtype=torch.bool, device=device)


def label_metrics(
    config: Any, logprob: Tensor, ref_logprob: Tensor, good: Tensor, kl: Tensor, group_size: int
) -> Tally:
    """Loss and implicit rewards of the good and the bad completions, under the field's usual names.
    (B,) each
    """
    loss = weighted_loss(config, logprob, ref_logprob, good, kl)  # (B,)
    loss = loss.view(-1, group_size).mean(1)  # (P,)
    rewards, metrics = implicit_reward(logprob, ref_logprob, beta=config.beta), Tally()  # (B,)
    for name, side in (("chosen", good), ("rejected", ~good)):
        if side.any():
            metrics |= {
                f"rewards/{name}": mean(rewards, side),
                f"logps/{name}": mean(logprob, side),
            }
    metrics["kl"] = kl
    if group_size == 2:
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        metrics |= {
            "rewards/margins": mean(chosen - rejected),
            "rewards/accuracies": mean(chosen > rejected),
        }
    return {"loss": mean(loss)} | metrics


def evaluate(run: Run) -> Result:
    """The same metrics on the held-out rows."""
    reference, heldout = run.parts["reference"], run.heldout
    logprob = completion_logprob(run, heldout)  # (B,)
    kl, good = reference_point(run, reference, heldout), is_desirable(heldout, run.device)
    size = len(heldout[0].completions)
    return Result(metrics=label_metrics(run.config, logprob, reference(heldout), good, kl, size))
