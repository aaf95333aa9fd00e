"""Copies of models in memory."""

import copy
from typing import Any

from trivet.model.adapters import without_layers
from trivet.model.weights import makes_model


@makes_model
def frozen_copy(model: Any) -> Any:
    """Return a frozen copy of the model as it is in memory, to serve as the reference; the base
    below an adapter is shared.
    """
    copied = copy.deepcopy(
        model, {id(x): x for x in model.parameters() if not x.requires_grad}
    ).requires_grad_(False)
    moved = [bool(x.any()) for name, x in copied.named_parameters() if "lora_B" in name]
    if moved and not any(moved):  # a new adapter: the reference is the base alone
        return without_layers(copied)
    return copied
