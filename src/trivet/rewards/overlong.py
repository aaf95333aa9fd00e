"""A penalty for nearing the length limit."""

from torch import Tensor


def overlong_penalty(lengths: Tensor, *, longest: int, buffer: int) -> Tensor:
    """Penalty that falls linearly from 0 to -1 over the last `buffer` tokens before the length
    limit.

        -max(0, |y| - (longest - buffer)) / buffer

    lengths: (B,) tokens, at most longest. Returns (B,). Source: soft overlong punishment of DAPO
    (Yu et al. 2025), eq. 13.
    """
    return -(lengths - (longest - buffer)).clamp(min=0) / buffer
