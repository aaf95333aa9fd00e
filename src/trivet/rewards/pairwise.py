"""Comparisons inside a group to win rates."""

import math
from collections.abc import Iterable


def matches(group_size: int, opponents: int = 0) -> list[tuple[int, int]]:
    """Who is compared with whom, (first shown, second shown): everybody with everybody once, or with this many neighbors
    in a ring on each side. Each is shown first about as often as second, as judges favor a place.

        3 in a group: (0, 1), (1, 2), (2, 0)
    """
    most = opponents or group_size
    return [
        (i, (i + step) % group_size)
        for step in range(1, min(most, group_size // 2) + 1)
        for i in range(group_size // 2 if 2 * step == group_size else group_size)
    ]


def win_rates(group_size: int, verdicts: Iterable[tuple[int, int, float | None]]) -> list[float]:
    """The share of its comparisons that each has won, ties half; NaN for one without any.

    verdicts: (i, j, what i has of the win: 1, 0, a half, or None where there was no verdict).
    """
    won, count = [0.0] * group_size, [0] * group_size
    for i, j, share in verdicts:
        if share is not None:
            won[i], won[j] = won[i] + share, won[j] + 1 - share
            count[i], count[j] = count[i] + 1, count[j] + 1
    return [w / n if n else math.nan for w, n in zip(won, count, strict=True)]
