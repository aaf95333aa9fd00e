"""Attention over groups: each prompt goes through the trunk once and its completions attend to it.

All real tokens of a microbatch travel as one packed row (1, N), prompts first, then completions, no padding anywhere but
inside attention. There every prompt, and every completion with its prompt before it, is a row of keys whose last tokens ask;
rows of the same rounded shape are padded together. The layout goes through the Hugging Face model as the keyword `layout`; without it
the model is as it was.
"""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trivet.batch import Groups

NAME = "trivet_groups"


class UnshareableError(Exception):
    """This model's attention does something that the shared prefix does not know; the plain forward takes over."""


def group_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function registered with transformers. (1, heads, N, d) -> (1, N, heads, d)."""
    layout = kwargs.pop("layout", None)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise UnshareableError
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    return layout.attend(module.layer_idx, query, key, value, scale, window), None


AttentionInterface.register(NAME, group_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls without a layout; with one, a 4D mask is passed as it is


SMALL = 1 << 20  # scores of a head in a row: up to here plain products beat a CPU's fused kernel, backward above all
ROUND = 32  # longer rows are rounded up to multiples: a CPU's products are compiled for each shape, so few are fast
BLOCK = {"cpu": 1 << 17}  # scores of one head in one block: what a cache holds; elsewhere 1 << 26


def attend_dense(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """softmax(scale q k' + bias) v with grouped-query heads. query (R, L, heads, d), key and value (R, M, kv heads, d), bias
    (R, L, M): 0, or -inf at keys that a query may not see. Returns (R, L, heads, d)."""
    (rows, count, heads, width), groups = query.shape, key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (R, heads, L or M, d)
    if query.device.type != "cpu" or bias[0].numel() > SMALL:
        out = scaled_dot_product_attention(query, key, value, bias[:, None], scale=scale, enable_gqa=heads != groups)
        return out.transpose(1, 2)
    with torch.autocast("cpu", enabled=False):
        q = (query * (scale or width**-0.5)).reshape(rows * groups, -1, width)  # queries that share keys side by side
        k, v = (x.reshape(rows * groups, -1, width) for x in (key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, count, -1)
        chance = scores.add_(bias[:, None]).softmax(-1)  # masked_fill takes three times the product's time
        return torch.bmm(chance.view(len(q), -1, k.shape[1]), v).view(rows, heads, count, width).transpose(1, 2)


class Layout:
    """Where the real tokens of Groups sit in the packed row, and how they attend to each other.

    ids, positions: (1, N) what the trunk is given. A prompt of n tokens has positions 0 ... n-1, each of its completions
    goes on from n. With one completion per prompt there is nothing to share: both are one causal sequence.
    """

    def __init__(self, groups: Groups):
        size, prompt, own = groups.group_size, groups.prompt_mask.sum(1), groups.present.sum(1)  # (P,), (B,) lengths
        prompt_start, own_start = prompt.cumsum(0) - prompt, prompt.sum() + own.cumsum(0) - own
        before, before_start = prompt.repeat_interleave(size), prompt_start.repeat_interleave(size)  # (B,)
        column, own_column = groups.prompt_mask.cumsum(1) - 1, groups.present.cumsum(1) - 1  # (P, S), (B, T)
        own_position = (before[:, None] + own_column)[groups.present]
        self.ids = torch.cat([groups.prompts[groups.prompt_mask], groups.completions[groups.present]])[None]
        self.positions = torch.cat([column[groups.prompt_mask], own_position])[None]
        # rows of keys: where the prompt and the rest of it begin, how long the prompt is, how many keys and queries
        rows = torch.stack([before_start, own_start, before, before + own, before + own if size == 1 else own], 1)
        if size > 1:
            rows = torch.cat([torch.stack([prompt_start, prompt_start, prompt, prompt, prompt], 1), rows[own > 0]])
        counts: list[list[int]] = rows[:, 2:].tolist()  # one read of the device
        if min(count[0] for count in counts) == 0:
            raise ValueError("a prompt without tokens predicts nothing; give each at least one, BOS for instance")
        shapes = [tuple(n if n < ROUND else -(-n // ROUND) * ROUND for n in count[:0:-1]) for count in counts]
        self.blocks: list[Block] = []
        for (asked, most), alike in groupby(sorted(range(len(shapes)), key=shapes.__getitem__), shapes.__getitem__):
            parts = rows[list(alike)].split(max(1, BLOCK.get(rows.device.type, 1 << 26) // (asked * most)))
            self.blocks += [Block(part, asked, most) for part in parts]
        self.asked = torch.cat([block.queries.flatten() for block in self.blocks])
        self.seen = torch.cat([block.keys.flatten() for block in self.blocks])
        real = torch.cat([block.real.flatten() for block in self.blocks]).nonzero()[:, 0]
        self.place = real[self.asked[real].argsort()]  # (N,) where each packed token asks, counted through the blocks
        # the packed index whose hidden state predicts each completion token: the one token before it
        prompt_end = (before_start + before - 1)[:, None]  # (B, 1)
        self.predictor = torch.where(own_column == 0, prompt_end, own_start[:, None] + own_column - 1)  # (B, T)
        self.last = torch.where(own > 0, own_start + own - 1, prompt_end[:, 0])  # (B,) end of the sequence

    def attend(self, _: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """Attention of the packed row in any layer: (1, heads, N, d) -> (1, N, heads, d)."""
        kind, asked, seen = q.device.type, [b.queries.shape for b in self.blocks], [b.keys.shape for b in self.blocks]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        ways = ((q, self.asked, asked), (k, self.seen, seen), (v, self.seen, seen))
        blocks = zip(self.blocks, *(_spread(x[0], index, shapes, dtype) for x, index, shapes in ways), strict=True)
        parts = [attend_dense(q, k, v, block.bias(window, dtype), scale).flatten(0, 1) for block, q, k, v in blocks]
        return torch.cat(parts).index_select(0, self.place)[None]


class Block:
    """R rows, padded to M keys, of which the last, at most L, are its queries: indices of the packed row."""

    def __init__(self, rows: Tensor, asked: int, most: int):
        prompt_start, own_start, prompt, keys, queries = rows[:, :, None].unbind(1)  # (R, 1) each
        column = torch.arange(most, device=rows.device)[None]  # (1, M)
        self.real = column[:, :asked] < queries  # (R, L)
        self.where = column[:, :asked] + keys - queries  # (R, L) of each query among its row's keys
        self.keys = torch.where(column < prompt, prompt_start + column, own_start + column - prompt)
        self.keys = self.keys.where(column < keys, 0)  # (R, M)
        self.queries = self.keys.gather(1, self.where.clamp(max=most - 1)).where(self.real, 0)  # (R, L)
        self.biases: dict[int | None, Tensor] = {}  # by window

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """-inf at keys after the query, and those that the sliding window has left behind. (R, L, M), made once."""
        if window not in self.biases:
            behind = self.where[:, :, None] - torch.arange(self.keys.shape[1], device=self.keys.device)
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            self.biases[window] = hide(hidden, dtype)
        return self.biases[window]


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where hidden, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _spread(x: Tensor, index: Tensor, shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """(heads, N, d) to (R, L, heads, d) of each block; one selection, so one sum backward."""
    wide = torch.promote_types(x.dtype, torch.float32)  # a prompt's keys gather the gradients of all its completions
    chosen = x.transpose(0, 1).to(wide).index_select(0, index).to(dtype)
    return [part.unflatten(0, s) for part, s in zip(chosen.split([s.numel() for s in shapes]), shapes, strict=True)]
