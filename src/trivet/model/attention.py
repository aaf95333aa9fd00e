"""Attention over groups: each prompt goes through the trunk once and its completions attend to it.

All real tokens of a microbatch travel as one packed row (1, N), prompts first, then completions, no padding anywhere but
inside attention. There two scaled-dot-product calls do the work: prompts, causal; completions over their prompt and their
own prefix. The layout goes through the Hugging Face model as the keyword `layout`; without it the model is as it was.
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
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnshareableError(name)
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    return layout.attend(module.layer_idx, query, key, value, scale, window), None


AttentionInterface.register(NAME, group_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for calls without a layout; with one, a 4D mask is passed as it is
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


Blocks = list[tuple[slice, int, int]]  # rows, and how many of their queries and keys are real at most
SMALL, BLOCK = 1 << 20, 1 << 17  # scores of one head in one row that plain products take, and in one block of rows


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, blocks: Blocks | None = None
) -> Tensor:
    """softmax(scale q k') v with grouped-query heads. query (R, heads, L, d), key and value (R, kv heads, M, d), mask
    (R or 1, 1, L, M) bool. On a CPU by plain products, whose backward is several times faster than the fused kernel's."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    blocks = blocks or [(slice(0, len(query)), query.shape[2], key.shape[2])]
    if kind == "cpu" and max(queries * keys for _, queries, keys in blocks) <= SMALL:
        return _PlainAttention.apply(query, key, value, ~mask, scale or query.shape[-1] ** -0.5, blocks)  # type: ignore[no-any-return]
    gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)


def row_blocks(queries: list[int], keys: list[int]) -> Blocks:
    """Neighboring rows together as long as their scores fit a cache: padding then is that of the block, not of the batch."""
    blocks: Blocks = []
    for row, (wide, long) in enumerate(zip(queries, keys, strict=True)):
        rows, widest, longest = blocks.pop() if blocks else (slice(0, 0), 0, 0)
        wider, longer = max(wide, widest), max(long, longest)
        if rows.stop > rows.start and (row + 1 - rows.start) * wider * longer > BLOCK:
            blocks.append((rows, widest, longest))
            rows, wider, longer = slice(row, row), wide, long
        blocks.append((slice(rows.start, row + 1), wider, longer))
    return blocks


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float, blocks: Blocks
    ) -> Tensor:
        out, kept, groups = torch.zeros_like(query), list[Tensor](), key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            for rows, queries, keys in blocks:
                q, k, v = (_heads(x[rows, :, :n], groups) for x, n in ((query, queries), (key, keys), (value, keys)))
                scores = torch.bmm(q * scale, k.transpose(1, 2)).view(-1, query.shape[1], queries, keys)
                scores.masked_fill_(hidden[rows if len(hidden) > 1 else slice(1), :, :queries, :keys], -torch.inf)
                chance = scores.softmax(-1).view(len(q), -1, keys)
                out[rows, :, :queries] = torch.bmm(chance, v).view(-1, query.shape[1], queries, v.shape[-1])
                kept.append(chance)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale, ctx.blocks = scale, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        results = [torch.zeros_like(x) for x in (query, key, value)]
        for (rows, queries, keys), chance in zip(ctx.blocks, kept, strict=True):
            groups, sizes = key.shape[1], (queries, keys, keys)
            q, k, v = (_heads(x[rows, :, :n], groups) for x, n in zip((query, key, value), sizes, strict=True))
            grad = _heads(grads[0][rows, :, :queries], groups)
            slope = torch.bmm(grad, v.transpose(1, 2))
            slope = torch._softmax_backward_data(slope, chance, -1, chance.dtype).mul_(ctx.scale)
            found = (
                torch.bmm(slope, k),
                torch.bmm(slope.transpose(1, 2), q),
                torch.bmm(chance.transpose(1, 2), grad),
            )
            for result, x, n in zip(results, found, sizes, strict=True):
                result[rows, :, :n] = x.view(-1, result.shape[1], n, x.shape[-1])
        return *results, None, None, None


def _heads(x: Tensor, groups: int) -> Tensor:
    """(r, heads, n, d) -> (r groups, n heads / groups, d): the queries that share keys and values side by side."""
    return x.reshape(len(x) * groups, -1, x.shape[-1])


class Layout:
    """Where the real tokens of Groups sit in the packed row, and how they attend to each other.

    ids, positions: (1, N) what the trunk is given. A prompt of n tokens has positions 0 ... n-1, each of its completions
    goes on from n. With one completion per prompt there is nothing to share: both are one causal sequence.
    """

    def __init__(self, groups: Groups):
        prompt_length = groups.prompt_mask.sum(1)  # (P,)
        if int(prompt_length.min()) == 0:
            raise ValueError("a prompt without tokens predicts nothing; give each at least one, BOS for instance")
        start = prompt_length.repeat_interleave(groups.group_size)[:, None]  # (B, 1)
        prompt_column, own_column = groups.prompt_mask.cumsum(1) - 1, groups.present.cumsum(1) - 1  # (P, S), (B, T)
        prompt_row, completion_row = groups.prompt_mask.nonzero()[:, 0], groups.present.nonzero()[:, 0]
        columns = prompt_column[groups.prompt_mask], own_column[groups.present]
        self.group_size = groups.group_size
        self.ids = torch.cat([groups.prompts[groups.prompt_mask], groups.completions[groups.present]])[None]
        self.positions = torch.cat([columns[0], (start + own_column)[groups.present]])[None]
        self.prompt_tokens = len(prompt_row)
        if self.group_size == 1:
            self.first = Cells(torch.cat([prompt_row, completion_row]), self.positions[0], len(prompt_length))
            self.second = None
            lengths: list[int] = (prompt_length + groups.present.sum(1)).tolist()
        else:
            self.first = Cells(prompt_row, columns[0], len(prompt_length))
            self.second = Cells(completion_row, columns[1], len(start))
            lengths = prompt_length.tolist()
            own_lengths: list[int] = groups.present.sum(1).tolist()
            self.second_blocks = row_blocks(own_lengths, [self.first.width + n for n in own_lengths])
            seen = torch.arange(self.first.width, device=start.device) < start  # (B, S')
            own = torch.arange(self.second.width, device=start.device)
            self.mask = torch.cat(  # (B, 1, T', S' + T'): the whole prompt, and the own prefix
                [
                    seen[:, None, None, :].expand(-1, -1, len(own), -1),
                    (own[:, None] >= own).expand(len(start), 1, -1, -1),
                ],
                dim=-1,
            )
            prompt_at = torch.arange(self.first.width, device=start.device).expand(len(start), -1)
            self.distance = (start + own)[:, :, None] - torch.cat([prompt_at, start + own], 1)[
                :, None, :
            ]  # (B, T', S'+T')
        self.first_blocks = row_blocks(lengths, lengths)
        column = torch.arange(self.first.width, device=start.device)
        self.behind = (column[:, None] - column)[None, None]  # (1, 1, S', S')
        # the packed index whose hidden state predicts each completion token: the one token before it
        packed = self.prompt_tokens + groups.present.flatten().cumsum(0).view_as(own_column) - 1  # (B, T)
        prompt_end = (prompt_length.cumsum(0) - 1).repeat_interleave(self.group_size)[:, None]  # (B, 1)
        self.predictor = torch.where(own_column == 0, prompt_end, packed - 1)  # (B, T)
        self.last = torch.where(groups.present.any(1), packed[:, -1], prompt_end[:, 0])  # (B,) end of the sequence

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attention of the packed row: (1, heads, N, d) -> (1, N, heads, d)."""
        del layer
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
        first = slice(None) if self.second is None else slice(self.prompt_tokens)
        keys, values = self.first.spread(key[first]), self.first.spread(value[first])  # (P, kv heads, S', d)
        mask = (self.behind >= 0) & (self.behind < (window or self.first.width))
        attended = attend_dense(self.first.spread(query[first]), keys, values, mask, scale, self.first_blocks)
        attended = self.first.gather(attended)
        if self.second is None:
            return attended[None]
        own = slice(self.prompt_tokens, None)
        keys = torch.cat([keys.repeat_interleave(self.group_size, 0), self.second.spread(key[own])], 2)
        values = torch.cat([values.repeat_interleave(self.group_size, 0), self.second.spread(value[own])], 2)
        mask = self.mask if window is None else self.mask & (self.distance < window)[:, None]
        completed = attend_dense(self.second.spread(query[own]), keys, values, mask, scale, self.second_blocks)
        return torch.cat([attended, self.second.gather(completed)])[None]


class Cells:
    """A right-padded (rows, width) grid and the cell of each packed token in it."""

    def __init__(self, row: Tensor, column: Tensor, rows: int):
        self.rows, self.width = rows, int(column.max()) + 1
        self.index = row * self.width + column  # (n,)

    def spread(self, x: Tensor) -> Tensor:
        """(n, heads, d) -> (rows, heads, width, d), zeros where there is no token."""
        grid = x.new_zeros(self.rows * self.width, *x.shape[1:]).index_copy(0, self.index, x)
        return grid.view(self.rows, self.width, *x.shape[1:]).transpose(1, 2)

    def gather(self, grid: Tensor) -> Tensor:
        """(rows, heads, width, d) -> (n, heads, d): the inverse of spread."""
        return grid.transpose(1, 2).flatten(0, 1).index_select(0, self.index)
