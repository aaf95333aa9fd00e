"""Functions shared by the recipes that learn from completions in the data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
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


def all_examples(run: Run) -> Iterator[Example]:
    """Every example that the run will see, step by step, then the held-out ones."""
    for _, examples in run.order():
        yield from examples
    yield from run.heldout


class ReferenceTable:
    """log pi_ref(y|x) of every completion in a run, under the model before training, so that no
    second model is needed.

    It is computed once, before the first step, and cached on disk for the next run from the same
    weights on the same tokens. examples: called for each pass over them, so that rows that are read
    lazily are never all in memory; each has the same number of completions.
    """

    def __init__(self, run: Run, examples: Callable[[], Iterator[Example]]):
        self.row = dict[Any, int]()  # Example.index -> row of the table

        def rows() -> Iterator[Example]:
            seen = set[Any]()
            for example in examples():
                if example.index not in seen:
                    seen.add(example.index)
                    self.row.setdefault(example.index, len(self.row))
                    yield example

        def compute() -> Tensor:
            run.note("computing reference log-probabilities")
            rest = rows()
            chunks = iter(lambda: list(islice(rest, 64)), [])
            return torch.cat([completion_logprob(run, chunk) for chunk in chunks])

        logprob = load_or_compute(run.model, rows(), compute, run.note)  # (B,)
        self.logprob = logprob.view(len(self.row), -1)  # (N, G)

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """log pi_ref(y|x) of all completions of the examples. (B,)"""
        return self.logprob[[self.row[example.index] for example in examples]].flatten()


def zero_ref_logprob(run: Run, examples: Sequence[Example]) -> Tensor:
    """0 for every completion, for losses that use no reference. (B,)"""
    return torch.zeros(sum(len(example.completions) for example in examples), device=run.device)
