"""Log-probabilities of chosen tokens from hidden states, one vocabulary chunk at a time: (M, V) never exists."""

from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # logits held at once: 16 MiB of float32


def selected_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> Tensor:
    """log softmax((hidden weight' + bias) / temperature) at the target tokens.

    hidden: (M, D). weight: (V, D), the output embedding. targets: (M,). Returns (M,), float32 or wider: products in the
    type of hidden, sums in float32. The backward pass makes each chunk again instead of keeping it.
    """
    return _SelectedLogprobs.apply(hidden, weight, bias, targets, 1.0 / temperature)  # type: ignore[no-any-return]


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sharpness: float
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.full(targets.shape, -torch.inf, dtype=wide, device=hidden.device)  # (M,)
        picked = torch.zeros_like(lse)  # (M,)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, stop in _chunks(len(hidden), len(weight)):
                logits = _logits(hidden, weight, bias, start, stop, sharpness, wide)  # (M, C)
                lse = torch.logaddexp(lse, logits.logsumexp(-1))
                here = (targets >= start) & (targets < stop)
                found = logits.gather(1, (targets - start).clamp(0, stop - start - 1)[:, None])[:, 0]
                picked = torch.where(here, found, picked)
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.sharpness = sharpness
        return picked - lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        grad = grads[0]  # (M,)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        rows = torch.arange(len(hidden), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, stop in _chunks(len(hidden), len(weight)):
                logits = _logits(hidden, weight, bias, start, stop, ctx.sharpness, lse.dtype)
                slope = (logits - lse[:, None]).exp_().mul_(-grad[:, None])  # (M, C): grad (one-hot - softmax)
                here = (targets >= start) & (targets < stop)
                slope[rows[here], targets[here] - start] += grad[here]
                slope = slope.mul_(ctx.sharpness).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden += slope @ weight[start:stop].to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight[start:stop] = slope.T @ hidden
                if grad_bias is not None:
                    grad_bias[start:stop] = slope.sum(0)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int, sharpness: float, wide: torch.dtype
) -> Tensor:
    logits = (hidden @ weight[start:stop].to(hidden.dtype).T).to(wide)
    if bias is not None:
        logits += bias[start:stop]
    return logits.mul_(sharpness)


def _chunks(rows: int, vocabulary: int) -> list[tuple[int, int]]:
    size = max(1, min(vocabulary, max(256, CHUNK // max(1, rows))))
    return [(start, min(vocabulary, start + size)) for start in range(0, vocabulary, size)]
