"""Turn comparisons within a group into win rates."""

import math
from collections.abc import Iterable


def matches(group_size: int, opponents: int = 0) -> list[tuple[int, int]]:
    """List which completions to compare, as (shown first, shown second): every pair once, or each
    with this many neighbors in a ring on each side. Each is shown first about as often as second,
    since judges favor one position.

        3 in a group: (0, 1), (1, 2), (2, 0)
    """
    most = opponents or group_size
    return [
        (i, (i + step) % group_size)
        for step in range(1, min(most, group_size // 2) + 1)
        for i in range(group_size // 2 if 2 * step == group_size else group_size)
    ]


def win_rates(group_size: int, verdicts: Iterable[tuple[int, int, float | None]]) -> list[float]:
    """Return the share of its comparisons that each completion won, ties counting half; NaN for one
    without any.

    verdicts: (i, j, i's share of the win: 1, 0, a half, or None for no verdict).
    """
    won, count = [0.0] * group_size, [0] * group_size
    for i, j, share in verdicts:
        if share is not None:
            won[i], won[j] = won[i] + share, won[j] + 1 - share
            count[i], count[j] = count[i] + 1, count[j] + 1
    return [w / n if n else math.nan for w, n in zip(won, count, strict=True)]
