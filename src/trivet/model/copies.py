"""Models made from models in memory: a frozen reference, a critic on a policy's trunk."""

import copy
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from trivet.errors import InputError


def frozen_copy(model: Any) -> Any:
    """A reference: the model as it stands in memory, not as its files are on disk, without gradients."""
    return copy.deepcopy(model).requires_grad_(False)


def with_scalar_head(policy: Any) -> Any:
    """A zero scalar head on a copy of the policy's trunk as it stands in memory."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).float()
    if not hasattr(model, "score"):
        raise InputError(f"{type(model).__name__} has no scalar head named 'score'; choose another kind of model")
    model.base_model.load_state_dict(policy.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    model.compute_dtype = getattr(policy, "compute_dtype", None)
    return model.to(policy.device).eval()
