"""Attention over groups: each prompt goes through the trunk once and its completions attend to it.

All real tokens of a microbatch travel as one packed row (1, N), prompts first, then completions, no padding anywhere but
inside attention. There every prompt, and every completion with its prompt before it, is a row of keys whose last tokens ask;
rows of similar length are padded together. The layout goes through the Hugging Face model as the keyword `layout`; without it
the model is as it was.
"""

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


SMALL = (
    1 << 20
)  # scores of one head in one row: so far, plain products beat the fused kernel on a CPU, and fit in memory
ROUND = 32  # longer rows are rounded up to multiples: the CPU's products are compiled for each shape, so few are fast
BLOCK = {"cpu": 1 << 17}  # scores of one head in one block: what a cache holds; elsewhere 1 << 26


def attend_dense(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float | None) -> Tensor:
    """softmax(scale q k') v with grouped-query heads. query (R, L, heads, d), key and value (R, M, kv heads, d), hidden
    (R, L, M) bool: keys that a query may not see. Returns (R, L, heads, d)."""
    (rows, count, heads, width), groups = query.shape, key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (R, heads, L or M, d)
    if query.device.type != "cpu" or hidden[0].numel() > SMALL:
        mask = ~hidden[:, None]
        out = scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=heads != groups)
        return out.transpose(1, 2)
    with torch.autocast(
        "cpu", enabled=False
    ):  # on a CPU the backward of these products is several times the fused one's
        q = (query * (scale or width**-0.5)).reshape(rows * groups, -1, width)  # queries that share keys side by side
        k, v = (x.reshape(rows * groups, -1, width) for x in (key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, count, -1)
        chance = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
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
        for asked, most in dict.fromkeys(shapes):
            same = rows[torch.tensor([shape == (asked, most) for shape in shapes], device=rows.device)]
            parts = same.split(max(1, BLOCK.get(rows.device.type, 1 << 26) // (asked * most)))
            self.blocks += [Block(part, asked, most) for part in parts]
        self.order = torch.cat([block.queries[block.real] for block in self.blocks]).argsort()
        # the packed index whose hidden state predicts each completion token: the one token before it
        prompt_end = (before_start + before - 1)[:, None]  # (B, 1)
        self.predictor = torch.where(own_column == 0, prompt_end, own_start[:, None] + own_column - 1)  # (B, T)
        self.last = torch.where(own > 0, own_start + own - 1, prompt_end[:, 0])  # (B,) end of the sequence

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of the packed row: (1, heads, N, d) -> (1, N, heads, d)."""
        asked, seen = [block.queries for block in self.blocks], [block.keys for block in self.blocks]
        spread = (_spread(x[0], indices) for x, indices in ((query, asked), (key, seen), (value, seen)))
        blocks = zip(self.blocks, *spread, strict=True)
        parts = [attend_dense(q, k, v, block.hidden(window), scale)[block.real] for block, q, k, v in blocks]
        return torch.cat(parts).index_select(0, self.order)[None]


class Block:
    """R rows, padded to M keys, of which the last, at most L, are its queries: indices of the packed row."""

    def __init__(self, rows: Tensor, asked: int, most: int):
        prompt_start, own_start, prompt, keys, queries = rows[:, :, None].unbind(1)  # (R, 1) each
        column = torch.arange(most, device=rows.device)[None]  # (1, M)
        self.real = column[:, :asked] < queries  # (R, L)
        self.place = column[:, : self.real.shape[1]] + keys - queries  # (R, L) of each query among its row's keys
        self.keys = torch.where(column < prompt, prompt_start + column, own_start + column - prompt)
        self.keys = self.keys.where(column < keys, 0)  # (R, M)
        self.queries = self.keys.gather(1, self.place.clamp(max=column.shape[1] - 1)).where(self.real, 0)  # (R, L)

    def hidden(self, window: int | None) -> Tensor:
        """Keys after the query, and those that the sliding window has left behind. (R, L, M) bool"""
        behind = self.place[:, :, None] - torch.arange(self.keys.shape[1], device=self.keys.device)
        return behind < 0 if window is None else (behind < 0) | (behind >= window)


def _spread(x: Tensor, indices: list[Tensor]) -> list[Tensor]:
    """(heads, N, d) to (R, L, heads, d) of each block, in the type of the products; one selection, so one sum backward."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    wide = torch.promote_types(x.dtype, torch.float32)  # a prompt's keys gather the gradients of all its completions
    chosen = x.transpose(0, 1).to(wide).index_select(0, torch.cat([index.flatten() for index in indices])).to(dtype)
    parts = chosen.split([index.numel() for index in indices])
    return [part.view(*index.shape, *x.shape[::2]) for part, index in zip(parts, indices, strict=True)]
