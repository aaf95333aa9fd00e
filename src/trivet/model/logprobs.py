"""Log-probabilities of chosen tokens from hidden states, one vocabulary chunk at a time: (M, V)
never exists in float32.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 20}  # float32 logits at a time, to fit a CPU's cache; elsewhere 1 << 26
KEPT = 1 << 27  # bytes of products kept for the backward pass; others are recomputed


def selected_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    """log softmax((hidden weight' + bias) / temperature) at the target tokens.

    hidden: (M, D). weight: (V, D), the output embedding. targets: (M,). Returns (M,), float32 or
    wider: products in the dtype of hidden (under autocast, in its dtype), sums in float32.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return _SelectedLogprobs.apply(hidden, weight, bias, targets, 1.0 / temperature)  # type: ignore[no-any-return]


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        sharpness: float,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lse = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide)  # (M, 1)
        picked, kept, room = torch.zeros_like(lse), list[Tensor](), KEPT * any(ctx.needs_input_grad)
        for _, product, logits, here, column in _chunks(hidden, weight, bias, targets, sharpness):
            picked = torch.where(here, logits.gather(1, column), picked)
            top = logits.amax(-1, keepdim=True)
            lse = torch.logaddexp(lse, logits.sub_(top).exp_().sum(-1, keepdim=True).log() + top)
            room -= product.nbytes
            kept += [product] if room >= 0 else []
        ctx.save_for_backward(hidden, weight, bias, targets, lse, *kept)
        ctx.sharpness = sharpness
        return (picked - lse)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, *kept = ctx.saved_tensors
        scale = (-ctx.sharpness * grads[0])[:, None]  # (M, 1)
        cast = _cast(weight, hidden.dtype)  # (V, D)
        scaled = (hidden * scale).to(hidden.dtype)  # (M, D)
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)  # (M, D)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.empty_like(bias)
        for start, _, logits, here, column in _chunks(
            hidden, weight, bias, targets, ctx.sharpness, kept
        ):
            stop = start + logits.shape[1]
            # (M, C): softmax - one-hot
            slope = logits.sub_(lse).exp_().scatter_add_(1, column, -here.to(lse.dtype))
            if grad_bias is not None:
                grad_bias[start:stop] = (slope * scale).sum(0)
            slope = slope.to(hidden.dtype)
            grad_hidden += slope @ cast[start:stop]
            if grad_weight is not None:
                grad_weight[start:stop] = slope.T @ scaled
        return (grad_hidden * scale).to(hidden.dtype), grad_weight, grad_bias, None, None


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sharpness: float,
    kept: Sequence[Tensor] = (),
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """For each chunk of the vocabulary yield its start, the product, the logits (M, C) in the wider
    dtype, always in the same memory (fresh memory costs more than the sums), whether each target is
    in the chunk, and its column there (M, 1).
    """
    count, cast = len(hidden), _cast(weight, hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    size = min(len(weight), max(256, CHUNK.get(hidden.device.type, 1 << 26) // max(1, count)))
    memory = torch.empty(count * size, dtype=wide, device=hidden.device)
    for i, start in enumerate(range(0, len(weight), size)):
        product = kept[i] if i < len(kept) else hidden @ cast[start : start + size].T
        logits = memory[: product.numel()].view_as(product).copy_(product)
        logits = logits if bias is None else logits.add_(bias[start : start + size])
        column = (targets - start)[:, None]
        here = (column >= 0) & (column < logits.shape[1])
        yield start, product, logits.mul_(sharpness), here, column.clamp(0, logits.shape[1] - 1)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in the products' dtype, cached until the weight changes."""
    key = (weight._version, weight.data_ptr(), dtype)
    if weight.dtype != dtype and getattr(weight, "_cast_key", None) != key:
        weight._cast, weight._cast_key = weight.detach().to(dtype), key  # type: ignore[attr-defined]
    return weight if weight.dtype == dtype else weight._cast  # type: ignore[attr-defined]
