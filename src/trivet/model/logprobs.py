"""Log-probabilities of chosen tokens from hidden states, one vocabulary chunk at a time: (M, V) never exists in float32."""

from typing import Any

import torch
from torch import Tensor

CHUNK = {"cpu": 1 << 20}  # float32 logits worked on at once: what a cache holds; elsewhere 1 << 26
KEPT = 1 << 28  # bytes of logits, as the product made them, that wait for the backward pass; the others are made again


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
        picked = torch.zeros_like(lse)  # (M,)
        kept, room = list[Tensor](), KEPT if any(ctx.needs_input_grad) else 0
        with torch.autocast(hidden.device.type, enabled=False):
            cast = _cast(weight, hidden.dtype)
            for start, stop in _chunks(hidden, len(weight)):
                product = hidden @ cast[start:stop].T  # (M, C)
                room -= product.numel() * product.itemsize
                if room >= 0:
                    kept.append(product)
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
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        scale = (-ctx.sharpness * grads[0])[:, None]  # (M, 1)
        scaled = (hidden * scale).to(hidden.dtype)  # (M, D)
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        rows = torch.arange(len(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            cast = _cast(weight, hidden.dtype)
            for i, (start, stop) in enumerate(_chunks(hidden, len(weight))):
                product = kept[i] if i < len(kept) else hidden @ cast[start:stop].T
                logits = _logits(product, bias, start, stop, ctx.sharpness, lse.dtype)
                slope = logits.sub_(lse[:, None]).exp_() if logits is not product else (logits - lse[:, None]).exp_()
                here = (targets >= start) & (targets < stop)
                slope[rows[here], targets[here] - start] -= 1  # (M, C): softmax - one-hot
                slope = slope.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden += slope @ cast[start:stop]
                if grad_weight is not None:
                    grad_weight[start:stop] = slope.T @ scaled
                if grad_bias is not None:
                    grad_bias[start:stop] = (slope * scale).sum(0)
        return (
            None if grad_hidden is None else (grad_hidden * scale).to(hidden.dtype),
            grad_weight,
            grad_bias,
            None,
            None,
        )


def _logits(product: Tensor, bias: Tensor | None, start: int, stop: int, sharpness: float, wide: torch.dtype) -> Tensor:
    logits = product.to(wide)
    if bias is not None:
        logits = logits + bias[start:stop]
    return logits if sharpness == 1 else logits * sharpness


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the type of the products, made once for as long as it does not change."""
    if weight.dtype == dtype:
        return weight
    key = (weight._version, weight.data_ptr(), dtype)
    if getattr(weight, "_cast_key", None) != key:
        weight._cast, weight._cast_key = weight.detach().to(dtype), key  # type: ignore[attr-defined]
    return weight._cast  # type: ignore[attr-defined]


def _chunks(hidden: Tensor, vocabulary: int) -> list[tuple[int, int]]:
    room = CHUNK.get(hidden.device.type, 1 << 26) // max(1, len(hidden))
    size = max(1, min(vocabulary, max(256, room)))
    return [(start, min(vocabulary, start + size)) for start in range(0, vocabulary, size)]
