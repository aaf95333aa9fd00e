"""Attention over groups: each prompt passes through the trunk once and its completions attend to
it.

All real tokens of a microbatch form one packed row (1, N), prompts first, then completions, without
padding except inside attention. There every prompt, and every completion preceded by its prompt, is
a row of keys whose last tokens are the queries; rows of the same rounded shape are padded together.
The layout passes through the Hugging Face model as the keyword `layout`; without it the model
behaves as before.
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
    """The model's attention has a feature that the shared prefix does not support; the plain
    forward is used instead.
    """


def group_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
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
# Used by calls without a layout; with one, a 4D mask is passed through.
AttentionMaskInterface.register(NAME, sdpa_mask)


# Attention scores of one head in a row up to which plain products beat a CPU's fused kernel, most
# of all in the backward pass.
SMALL = 1 << 20
# Longer rows are rounded up to multiples of this: a CPU's products are compiled per shape, so few
# shapes are fast.
ROUND = 32
BLOCK = {"cpu": 1 << 17}  # scores of one head in one block, to fit a CPU's cache; elsewhere 1 << 26


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None
) -> Tensor:
    """softmax(scale q k' + bias) v with grouped-query heads. query (R, L, heads, d), key and value
    (R, M, kv heads, d), bias (R, L, M): 0, or -inf at keys that a query may not see. Returns (R, L,
    heads, d)."""
    (rows, count, heads, width), groups = query.shape, key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (R, heads, L or M, d)
    if query.device.type != "cpu" or bias[0].numel() > SMALL:
        out = scaled_dot_product_attention(
            query, key, value, bias[:, None], scale=scale, enable_gqa=heads != groups
        )
        return out.transpose(1, 2)
    with torch.autocast("cpu", enabled=False):
        # Queries that share keys are side by side.
        q = (query * (scale or width**-0.5)).reshape(rows * groups, -1, width)
        k, v = (x.reshape(rows * groups, -1, width) for x in (key, value))
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, count, -1)
        # Adding a bias, since masked_fill takes three times as long as the product.
        chance = scores.add_(bias[:, None]).softmax(-1)
        return (
            torch.bmm(chance.view(len(q), -1, k.shape[1]), v)
            .view(rows, heads, count, width)
            .transpose(1, 2)
        )


class Layout:
    """Positions of the real tokens of Groups in the packed row, and how they attend to each other.

    ids, positions: (1, N), the trunk's input. A prompt of n tokens has positions 0 ... n-1; each of
    its completions continues from n. With one completion per prompt there is nothing to share: both
    are one causal sequence.
    """

    def __init__(self, groups: Groups):
        size = groups.group_size
        prompt, completion = groups.prompt_mask.sum(1), groups.present.sum(1)  # (P,), (B,) lengths
        prompt_start = prompt.cumsum(0) - prompt  # (P,)
        completion_start = prompt.sum() + completion.cumsum(0) - completion  # (B,)
        before = prompt.repeat_interleave(size)  # (B,) length of each completion's prompt
        before_start = prompt_start.repeat_interleave(size)  # (B,)
        column = groups.prompt_mask.cumsum(1) - 1  # (P, S)
        completion_column = groups.present.cumsum(1) - 1  # (B, T)
        completion_position = (before[:, None] + completion_column)[groups.present]
        self.ids = torch.cat(
            [groups.prompts[groups.prompt_mask], groups.completions[groups.present]]
        )[None]
        self.positions = torch.cat([column[groups.prompt_mask], completion_position])[None]
        # rows of keys: start of the prompt and of the rest, length of the prompt, numbers of keys
        # and queries
        rows = torch.stack(
            [
                before_start,
                completion_start,
                before,
                before + completion,
                before + completion if size == 1 else completion,
            ],
            1,
        )
        if size > 1:
            rows = torch.cat(
                [
                    torch.stack([prompt_start, prompt_start, prompt, prompt, prompt], 1),
                    rows[completion > 0],
                ]
            )
        counts: list[list[int]] = rows[:, 2:].tolist()  # one transfer from the device
        if min(count[0] for count in counts) == 0:
            raise ValueError(
                "a prompt without tokens can't predict anything; give each at least one token, "
                "such as BOS"
            )
        shapes = [
            tuple(n if n < ROUND else -(-n // ROUND) * ROUND for n in count[:0:-1])
            for count in counts
        ]
        self.blocks: list[Block] = []
        for (queries, keys), alike in groupby(
            sorted(range(len(shapes)), key=shapes.__getitem__), shapes.__getitem__
        ):
            parts = rows[list(alike)].split(
                max(1, BLOCK.get(rows.device.type, 1 << 26) // (queries * keys))
            )
            self.blocks += [Block(part, queries, keys) for part in parts]
        self.query_index = torch.cat([block.queries.flatten() for block in self.blocks])
        self.key_index = torch.cat([block.keys.flatten() for block in self.blocks])
        real = torch.cat([block.real.flatten() for block in self.blocks]).nonzero()[:, 0]
        # Index of each packed token's query, counted through the blocks.
        self.place = real[self.query_index[real].argsort()]  # (N,)
        # packed index whose hidden state predicts each completion token: that of the token before
        # it
        prompt_end = (before_start + before - 1)[:, None]  # (B, 1)
        self.predictor = torch.where(
            completion_column == 0, prompt_end, completion_start[:, None] + completion_column - 1
        )  # (B, T)
        # (B,) end of the sequence
        self.last = torch.where(completion > 0, completion_start + completion - 1, prompt_end[:, 0])

    def attend(
        self, _: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of the packed row in any layer: (1, heads, N, d) -> (1, N, heads, d)."""
        kind = q.device.type
        queries, keys = [b.queries.shape for b in self.blocks], [b.keys.shape for b in self.blocks]
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype
        ways = (
            (q, self.query_index, queries),
            (k, self.key_index, keys),
            (v, self.key_index, keys),
        )
        blocks = zip(
            self.blocks,
            *(_to_blocks(x[0], index, shapes, dtype) for x, index, shapes in ways),
            strict=True,
        )
        parts = [
            attend_dense(q, k, v, block.bias(window, dtype), scale).flatten(0, 1)
            for block, q, k, v in blocks
        ]
        return torch.cat(parts).index_select(0, self.place)[None]


class Block:
    """R rows padded to M keys, the last of which (at most L) are the queries: indices into the
    packed row.
    """

    def __init__(self, rows: Tensor, max_queries: int, max_keys: int):
        # (R, 1) each
        prompt_start, completion_start, prompt, keys, queries = rows[:, :, None].unbind(1)
        column = torch.arange(max_keys, device=rows.device)[None]  # (1, M)
        self.real = column[:, :max_queries] < queries  # (R, L)
        # position of each query among its row's keys
        self.where = column[:, :max_queries] + keys - queries  # (R, L)
        self.keys = torch.where(
            column < prompt, prompt_start + column, completion_start + column - prompt
        )
        self.keys = self.keys.where(column < keys, 0)  # (R, M)
        # (R, L)
        self.queries = self.keys.gather(1, self.where.clamp(max=max_keys - 1)).where(self.real, 0)
        self.biases: dict[int | None, Tensor] = {}  # by window

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the cached bias (R, L, M): -inf at keys after the query and at those outside the
        sliding window.
        """
        if window not in self.biases:
            behind = self.where[:, :, None] - torch.arange(
                self.keys.shape[1], device=self.keys.device
            )
            hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
            self.biases[window] = hide(hidden, dtype)
        return self.biases[window]


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -inf where hidden, 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, -torch.inf
    )


def _to_blocks(
    x: Tensor, index: Tensor, shapes: list[torch.Size], dtype: torch.dtype
) -> list[Tensor]:
    """Spread (heads, N, d) to (R, L, heads, d) of each block, with one selection, so that the
    backward is one sum.
    """
    # At least float32: a prompt's keys sum the gradients of all its completions.
    wide = torch.promote_types(x.dtype, torch.float32)
    chosen = x.transpose(0, 1).to(wide).index_select(0, index).to(dtype)
    return [
        part.unflatten(0, s)
        for part, s in zip(chosen.split([s.numel() for s in shapes]), shapes, strict=True)
    ]
