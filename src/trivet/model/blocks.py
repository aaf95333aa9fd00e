"""The repeated layers of a trunk, and gradient checkpointing of them."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def blocks(model: Any) -> list[Any]:
    """Return the layers of the trunk in order."""
    return [
        block
        for part in model.base_model.children()
        if isinstance(part, torch.nn.ModuleList)
        for block in part
    ]


def checkpoint_blocks(model: Any) -> Any:
    """Turn on gradient checkpointing: only each layer's input is kept for the backward pass, which
    recomputes the rest.
    """
    for block in blocks(model):
        block.forward = partial(_checkpoint_forward, block.forward)
    return model


def _checkpoint_forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # a cache must be written only once
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
