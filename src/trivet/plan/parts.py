"""How a step is split into microbatches, and what attention pads: the sizes that model.attention and batch.microbatches come to."""

from typing import NamedTuple

from trivet.model.attention import ROUND


class Rows(NamedTuple):
    """Padded rows of attention: how many tokens ask, how many are seen, pairs of them."""

    queries: int
    keys: int
    pairs: int


def attention_rows(groups: int, size: int, prompt: int, completion: int) -> Rows:
    """The rows of model.attention.Layout: a prompt with itself, a completion with its prompt and itself; one row of both for a
    single completion. Lengths of 32 and more are rounded up to multiples of it."""
    whole = _rounded(prompt + completion)
    if size == 1:
        kinds = [(groups, whole, whole)]
    else:
        kinds = [(groups, _rounded(prompt), _rounded(prompt))]
        kinds += [(groups * size * (completion > 0), _rounded(completion), whole)]
    return Rows(*(sum(x) for x in zip(*((n * q, n * k, n * q * k) for n, q, k in kinds), strict=True)))


def _rounded(length: int) -> int:
    return length if length < ROUND else -(-length // ROUND) * ROUND


class Part(NamedTuple):
    """One kind of microbatch, and how many there are of it."""

    number: float
    tokens: int
    sequences: int
    learned: int
    rows: Rows
    longest_row: int  # pairs


def split(groups: int, size: int, prompt: int, completion: int, budget: int, whole: bool) -> Part:
    """What batch.microbatches makes of equal groups: as many as the budget holds, at least one; a group over the budget is split by
    rows unless it must stay whole, or its prompt would be the larger half of a part."""
    while not whole and size > 1 and prompt + size * completion > max(budget, 2 * prompt):
        smaller = next(n for n in range(size - 1, 0, -1) if size % n == 0)
        groups, size = groups * size // smaller, smaller
    each = prompt + size * completion
    held = min(groups, max(1, budget // each))
    longest = max(prompt * prompt, completion * (prompt + completion)) if size > 1 else each * each
    rows = attention_rows(held, size, prompt, completion)
    return Part(groups / held, held * each, held * size, held * size * completion, rows, longest)
