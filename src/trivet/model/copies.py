"""Models made from models in memory."""

import copy
from typing import Any


def frozen_copy(model: Any) -> Any:
    """A reference: the model as it stands in memory, not as its files are on disk, without gradients. Over an adapter's base."""
    copied = copy_over_frozen(model).requires_grad_(False)
    moved = [bool(x.any()) for name, x in copied.named_parameters() if "lora_B" in name]
    if moved and not any(moved):  # a new adapter: the reference is the base alone
        copied.delete_adapter("default")
    return copied


def copy_over_frozen(model: Any) -> Any:
    """A deep copy, but for frozen weights, such as those below an adapter: they don't move, so both have the same."""
    return copy.deepcopy(model, {id(x): x for x in model.parameters() if not x.requires_grad})
