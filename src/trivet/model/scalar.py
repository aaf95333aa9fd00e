"""Scalar heads: scores of whole sequences (reward models), values of states (critics), and new
heads on a policy's trunk.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from trivet.batch import Groups
from trivet.errors import InputError
from trivet.model.forward import autocast, place, shares_prefix, states
from trivet.model.weights import hold_weights, holder_of, makes_model, with_weights
from trivet.timing import timed


@timed("forward")
@with_weights
def values(model: Any, groups: Groups) -> Tensor:
    """Return V of the state before each trained completion token, from a model with a scalar head:
    (B, T), 0 outside the mask.
    """
    with autocast(model):
        hidden, before, _ = states(model, groups, shared=shares_prefix(model))
        return place(_scalar(model, hidden.index_select(0, before)), groups.mask)


@timed("forward")
@with_weights
def scores(model: Any, groups: Groups) -> Tensor:
    """Return the scalar head's output at the last real token of each sequence, EOS included:
    (B,).
    """
    with autocast(model):
        hidden, _, last = states(model, groups, shared=shares_prefix(model))
        return _scalar(model, hidden.index_select(0, last))


def with_scalar_head(policy: Any, *, share: bool = False) -> Any:
    """Build a model with a zero scalar head on a copy of the policy's trunk as it is in memory;
    share: on that trunk itself.
    """
    if not share:
        return _with_head_on_copy(policy)
    model = _with_head(policy, policy.base_model)
    # The holder of the trunk's weights serves both models.
    if (holder := holder_of(policy)) is not None:
        model._shares_prefix = shares_prefix(policy)
        hold_weights(model, holder)
    return model


@makes_model
def _with_head_on_copy(policy: Any) -> Any:
    # The base below an adapter is shared.
    frozen = {id(x): x for x in policy.parameters() if not x.requires_grad}
    return _with_head(policy, copy.deepcopy(policy.base_model, frozen))


def _with_head(policy: Any, trunk: Any) -> Any:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with torch.device("meta"):  # only the structure; the weights come from the policy
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):
        raise InputError(
            f"{type(model).__name__} has no scalar head named 'score'; choose another kind of model"
        )
    setattr(model, model.base_model_prefix, trunk)
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False, device=policy.device)
    torch.nn.init.zeros_(model.score.weight)
    model.compute_dtype = getattr(policy, "compute_dtype", None)
    return model.eval()


def _scalar(model: Any, hidden: Tensor) -> Tensor:
    """Apply the scalar head in the dtype of its weights. (M, D) -> (M,)"""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.to(model.score.weight.dtype))[:, 0]
