"""Functions shared by the recipes that learn from completions in the data."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example, Groups, collate
from trivet.model.forward import token_logprobs
from trivet.step.reference_cache import load_or_compute
from trivet.step.run import Run


def to_groups(examples: Sequence[Example], device: torch.device | str) -> Groups:
    """Collate the examples and their completions into one Groups on the device."""
    completions = [ids for example in examples for ids in example.completions]
    learned = [flags for example in examples for flags in example.learned]
    return collate([example.prompt for example in examples], completions, learned).to(device)


def rows_of(examples: Sequence[Example]) -> list[Mapping[str, Any]]:
    """The source rows of the examples, for the record."""
    return [example.row for example in examples]


def completion_logprob(run: Run, examples: Sequence[Example]) -> Tensor:
    """log pi(y|x) of all completions of the examples under run.model, without gradients. (B,)"""
    return run.passes(token_logprobs, run.model, to_groups(examples, run.device)).sum(1)


class ReferenceTable:
    """log pi_ref(y|x) of every completion in a run, under the model before training, so that no
    second model is needed.

    It is computed once, before the first step, and cached on disk for the next run from the same
    weights on the same tokens.
    """

    def __init__(self, run: Run, examples: Iterable[Example]):
        unique = {example.index: example for example in examples}
        rows = list(unique.values())

        def compute() -> Tensor:
            run.note(f"computing reference log-probabilities of {len(rows):,} rows")
            return torch.cat(
                [completion_logprob(run, rows[i : i + 64]) for i in range(0, len(rows), 64)]
            )

        logprob = load_or_compute(run.model, rows, compute, run.note)  # (B,)
        sizes = [len(row.completions) for row in rows]
        self.logprob = dict(zip(unique, logprob.split(sizes), strict=True))

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """log pi_ref(y|x) of all completions of the examples. (B,)"""
        return torch.cat([self.logprob[example.index] for example in examples])


def zero_ref_logprob(run: Run, examples: Sequence[Example]) -> Tensor:
    """0 for every completion, for losses that use no reference. (B,)"""
    return torch.zeros(sum(len(example.completions) for example in examples), device=run.device)
