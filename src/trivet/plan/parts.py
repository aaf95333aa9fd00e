"""Compute how a step is split into microbatches and how attention is padded: the sizes that
batch.microbatches and model.attention produce.
"""

from typing import NamedTuple

from trivet.model.attention import ROUND


class Rows(NamedTuple):
    """Padded rows of attention: the number of queries, of keys, and of pairs of them."""

    queries: int
    keys: int
    pairs: int


def attention_rows(groups: int, size: int, prompt: int, completion: int) -> Rows:
    """The rows of model.attention.Layout: a prompt attends to itself, a completion to its prompt
    and itself; a single completion shares a row with its prompt. Lengths of 32 and more are rounded
    up to multiples of 32.
    """
    whole = _round_up(prompt + completion)
    if size == 1:
        kinds = [(groups, whole, whole)]
    else:
        kinds = [(groups, _round_up(prompt), _round_up(prompt))]
        kinds += [(groups * size * (completion > 0), _round_up(completion), whole)]
    return Rows(
        *(sum(x) for x in zip(*((n * q, n * k, n * q * k) for n, q, k in kinds), strict=True))
    )


def _round_up(length: int) -> int:
    return length if length < ROUND else -(-length // ROUND) * ROUND


class Part(NamedTuple):
    """The size of one microbatch, and how many of them there are."""

    number: float
    tokens: int
    sequences: int
    learned: int
    rows: Rows
    longest_row: int  # pairs


def split(groups: int, size: int, prompt: int, completion: int, budget: int, whole: bool) -> Part:
    """The result of batch.microbatches for equal groups: as many per part as the budget holds, at
    least one. A group over the budget is split by rows, unless it must stay whole or its prompt
    would be the larger half of a part.
    """
    while not whole and size > 1 and prompt + size * completion > max(budget, 2 * prompt):
        smaller = next(n for n in range(size - 1, 0, -1) if size % n == 0)
        groups, size = groups * size // smaller, smaller
    each = prompt + size * completion
    fitting = min(groups, max(1, budget // each))
    longest = max(prompt * prompt, completion * (prompt + completion)) if size > 1 else each * each
    rows = attention_rows(fitting, size, prompt, completion)
    sequences = fitting * size
    return Part(groups / fitting, fitting * each, sequences, sequences * completion, rows, longest)
