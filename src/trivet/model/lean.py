"""Make modules of a loaded model save less for the backward pass with bitwise the same results:
RMSNorm, gated feed-forward, and one cast for all products of a tensor. What a few cheap operations
can recompute is not saved.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


def make_lean(model: Any) -> Any:
    """Replace the forward of every supported module that gives the same numbers on a trial by one
    that saves less.
    """
    forwards = {nn.Linear: _linear}
    for module in model.modules():
        kind = type(module)
        if kind not in forwards:
            forwards[kind] = _lean_forward(module)
        if forwards[kind] is not None:
            module.forward = MethodType(forwards[kind], module)
    return model


def _lean_forward(module: Any) -> Any:
    """Return the lean forward for this module, None if there is none."""
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        lean, width = _norm, module.weight.shape[0]
    elif all(
        isinstance(getattr(module, f"{name}_proj", None), nn.Linear)
        for name in ("gate", "up", "down")
    ):
        lean, width = _gated_mlp, module.gate_proj.in_features
    else:
        return None
    x = torch.linspace(-2, 2, 3 * width, device=next(module.parameters()).device).view(1, 3, width)
    with torch.no_grad():
        return lean if torch.equal(lean(module, x), module(x)) else None


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _normalize(hidden_states, self.weight, self.variance_epsilon)[0]
    return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # type: ignore[no-any-return]


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.float32)
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
    return weight * (wide * scale).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """w x / sqrt(mean x^2 + eps). Saves x and one number per row, but not the normalized x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, scale = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normed = grads[0], x * scale
        grad_weight = (
            (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
            if ctx.needs_input_grad[1]
            else None
        )
        grad = grad * weight
        mean = (grad * normed).mean(-1, keepdim=True)  # (..., 1)
        return grad.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype), grad_weight, None


def _gated_mlp(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    if type(down) is nn.Linear and down.bias is None and torch.is_grad_enabled():
        return _GatedProduct.apply(gate, up, down.weight)  # type: ignore[no-any-return]
    return down(silu(gate) * up)  # type: ignore[no-any-return]


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) up) W'. Saves gate and up, and W itself rather than its cast."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate) * up, weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        opened = silu(gate)
        grad, grad_weight = _linear_gradients(ctx, grads[0], opened * up, weight, 2)
        return torch.ops.aten.silu_backward(grad * up, gate), grad * opened, grad_weight


def _linear(self: Any, x: Tensor) -> Tensor:
    """nn.Linear; under autocast, all products of a tensor share its cast, and casts of weights are
    not saved.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return linear(x, self.weight, self.bias)
    narrow = x if x.dtype != torch.float32 else getattr(x, "_narrow", None)
    if narrow is None:
        narrow = x._narrow = x.to(torch.get_autocast_dtype(kind))  # type: ignore[attr-defined]
    if torch.is_grad_enabled():
        return _Product.apply(narrow, self.weight, self.bias)  # type: ignore[no-any-return]
    return linear(narrow, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x W' + b. Saves x, and W itself rather than its cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_bias = (
            grads[0].flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        )
        return *_linear_gradients(ctx, grads[0], x, weight, 1), of_bias


def _linear_gradients(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, place: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and the weight in x W'; place: position of the weight among the
    arguments.
    """
    grad_weight = None
    if ctx.needs_input_grad[place]:
        grad_weight = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
    return grad @ weight.to(grad.dtype), grad_weight
