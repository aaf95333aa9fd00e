"""Log-probabilities of chosen tokens from hidden states, one vocabulary chunk at a time: (M, V) never exists in float32."""

from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 20}  # float32 logits worked on at once: what a cache holds; elsewhere 1 << 26
KEPT = 1 << 27  # bytes of logits, as the product made them, that wait for the backward pass; the others are made again


def selected_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    """log softmax((hidden weight' + bias) / temperature) at the target tokens.

    hidden: (M, D). weight: (V, D), the output embedding. targets: (M,). Returns (M,), float32 or wider: products in the
    type of hidden (under autocast, in its type), sums in float32.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return _SelectedLogprobs.apply(hidden, weight, bias, targets, 1.0 / temperature)  # type: ignore[no-any-return]


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sharpness: float
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.full(targets.shape, -torch.inf, dtype=wide, device=hidden.device)  # (M,)
        picked, kept, room = torch.zeros_like(lse), list[Tensor](), KEPT * any(ctx.needs_input_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = _cast(weight, hidden.dtype)
            for start, stop in _chunks(hidden, len(weight)):
                product = hidden @ cast[start:stop].T  # (M, C)
                room -= product.nbytes
                kept += [product] if room >= 0 else []
                logits = _logits(product, bias, start, stop, sharpness, wide)
                lse = torch.logaddexp(lse, logits.logsumexp(-1))
                here = (targets >= start) & (targets < stop)
                found = logits.gather(1, (targets - start).clamp(0, stop - start - 1)[:, None])[:, 0]
                picked = torch.where(here, found, picked)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, *kept)
        ctx.sharpness = sharpness
        return picked - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, *kept = ctx.saved_tensors
        scale = (-ctx.sharpness * grads[0])[:, None]  # (M, 1)
        scaled, rows = (hidden * scale).to(hidden.dtype), torch.arange(len(hidden), device=hidden.device)  # (M, D)
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.empty_like(bias)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = _cast(weight, hidden.dtype)
            for i, (start, stop) in enumerate(_chunks(hidden, len(weight))):
                product = kept[i] if i < len(kept) else hidden @ cast[start:stop].T
                slope = (_logits(product, bias, start, stop, ctx.sharpness, lse.dtype) - lse[:, None]).exp_()
                here = (targets >= start) & (targets < stop)
                slope[rows[here], targets[here] - start] -= 1  # (M, C): softmax - one-hot
                if grad_bias is not None:
                    grad_bias[start:stop] = (slope * scale).sum(0)
                slope = slope.to(hidden.dtype)
                grad_hidden += slope @ cast[start:stop]
                if grad_weight is not None:
                    grad_weight[start:stop] = slope.T @ scaled
        return (grad_hidden * scale).to(hidden.dtype), grad_weight, grad_bias, None, None


def _logits(product: Tensor, bias: Tensor | None, start: int, stop: int, sharpness: float, wide: torch.dtype) -> Tensor:
    logits = product.to(wide) if bias is None else product + bias[start:stop].to(wide)
    return logits if sharpness == 1 else logits * sharpness


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the type of the products, made once for as long as it does not change."""
    key = (weight._version, weight.data_ptr(), dtype)
    if weight.dtype != dtype and getattr(weight, "_cast_key", None) != key:
        weight._cast, weight._cast_key = weight.detach().to(dtype), key  # type: ignore[attr-defined]
    return weight if weight.dtype == dtype else weight._cast  # type: ignore[attr-defined]


def _chunks(hidden: Tensor, vocabulary: int) -> list[tuple[int, int]]:
    size = max(256, CHUNK.get(hidden.device.type, 1 << 26) // max(1, len(hidden)))
    return [(start, min(vocabulary, start + size)) for start in range(0, vocabulary, size)]
