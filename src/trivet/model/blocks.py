"""The repeated layers of a trunk, and passes through them that keep nothing but what goes in."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def blocks(model: Any) -> list[Any]:
    """The layers of the trunk, in order."""
    return [block for part in model.base_model.children() if isinstance(part, torch.nn.ModuleList) for block in part]


def checkpoint_blocks(model: Any) -> Any:
    """Gradient checkpointing: of each layer only its input is kept for the backward pass, which computes the rest again."""
    for block in blocks(model):
        block.forward = partial(_recomputed, block.forward)
    return model


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # a cache that is written must be written once
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
