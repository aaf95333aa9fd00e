"""Turn logits into tokens: pure functions on (R, V) logits."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# Logits sampled at a time: 4 MB in float32, which fits a CPU's cache; on other devices all.
CELLS = {"cpu": 1 << 20}


def sample(logits: Tensor, level: Tensor, **cut: Any) -> tuple[Tensor, Tensor]:
    """Draw tokens from the distribution that warp returns for `cut`, a few rows at a time."""
    rows = max(1, CELLS.get(logits.device.type, logits.numel()) // logits.shape[-1])
    plain = cut == {"temperature": 1, "top_k": 0, "top_p": 1}
    parts = zip(logits.split(rows), level.split(rows), strict=True)
    tokens, logprobs = zip(
        *(draw(x if plain else warp(x, **cut), u) for x, u in parts), strict=True
    )
    return torch.cat(tokens), torch.cat(logprobs)


def warp(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return log-probabilities (R, V) of the sampling distribution: logits / temperature, cut to
    the top_k most likely tokens (0: all) and to the smallest set that holds top_p of the mass.
    temperature 0 leaves only the most likely token.
    """
    logits = logits.float()
    logprobs = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    if top_k := 1 if temperature == 0 else top_k:
        keep = logprobs.topk(min(top_k, logprobs.shape[-1])).indices
        logprobs = (
            torch.full_like(logprobs, -torch.inf)
            .scatter(-1, keep, logprobs.gather(-1, keep))
            .log_softmax(-1)
        )
    if top_p < 1:
        ordered, order = logprobs.sort(descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the more likely tokens
        ordered = ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
        logprobs = ordered.gather(-1, order.argsort(-1)).log_softmax(-1)
    return logprobs


def draw(logits: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row, where the cumulative distribution of softmax reaches the row's level,
    a uniform number; also return its log-probability. (R, V), (R, 1) -> (R,), (R,). Sums over
    stretches of the vocabulary are searched first, then one stretch.
    """
    logits, width = logits.float(), int(logits.shape[-1] ** 0.5)
    top = logits.amax(-1, keepdim=True)
    chance = (logits - top).exp_()  # relative to the most likely token's
    chance = pad(chance, (0, -chance.shape[-1] % width)).unflatten(-1, (-1, width))  # (R, n, w)
    mass = chance.sum(-1)  # (R, n)
    stretch, level = _search(mass, level)  # (R, 1) each
    # (R, w)
    inside = chance[torch.arange(len(chance), device=level.device)[:, None], stretch][:, 0]
    place, _ = _search(inside, level)
    # parallel cumulative sums on a GPU are not quite monotone
    possible = inside.gather(-1, place) > 0
    tokens = stretch * width + torch.where(possible, place, inside.argmax(-1, keepdim=True))
    return tokens[:, 0], (logits.gather(-1, tokens) - top - mass.sum(-1, keepdim=True).log())[:, 0]


def _search(mass: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Find the index where the level, a share of the total, falls, and the share of that index's
    mass below it. (R, n), (R, 1) -> (R, 1).
    """
    reached = mass.cumsum(-1)
    # Rounding up to the total would pick an index without mass.
    level = level.clamp(max=1 - 2**-23) * reached[:, -1:]
    place = torch.searchsorted(reached, level, right=True).clamp(max=mass.shape[-1] - 1)
    own = mass.gather(-1, place)
    return place, ((level - reached.gather(-1, place) + own) / own).clamp(0, 1).nan_to_num(0.0)
