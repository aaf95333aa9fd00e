"""Models made from models in memory."""

import copy
from typing import Any


def frozen_copy(model: Any) -> Any:
    """A reference: the model as it stands in memory, not as its files are on disk, without gradients."""
    return copy.deepcopy(model).requires_grad_(False)
