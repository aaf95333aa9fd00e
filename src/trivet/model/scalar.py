"""Scalar heads: scores of whole sequences (reward models), values of states (critics), and a new head on a policy."""

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
    """V of the state before each trained completion token, from a model with a scalar head. Returns (B, T), 0 outside mask."""
    with autocast(model):
        hidden, before, _ = states(model, groups, shared=shares_prefix(model))
        return place(_scalar(model, hidden.index_select(0, before)), groups.mask)


@timed("forward")
@with_weights
def scores(model: Any, groups: Groups) -> Tensor:
    """The scalar head at the last real token of each sequence, EOS included. Returns (B,)."""
    with autocast(model):
        hidden, _, last = states(model, groups, shared=shares_prefix(model))
        return _scalar(model, hidden.index_select(0, last))


def with_scalar_head(policy: Any, *, share: bool = False) -> Any:
    """A zero scalar head on a copy of the policy's trunk as it stands in memory; share: on that trunk itself."""
    if not share:
        return _on_a_copy(policy)
    model = _headed(policy, policy.base_model)
    if (holder := holder_of(policy)) is not None:  # what gathers the trunk's weights for the one does it for the other
        model._shares_prefix = shares_prefix(policy)
        hold_weights(model, holder)
    return model


@makes_model
def _on_a_copy(policy: Any) -> Any:
    frozen = {id(x): x for x in policy.parameters() if not x.requires_grad}  # the base below an adapter is shared
    return _headed(policy, copy.deepcopy(policy.base_model, frozen))


def _headed(policy: Any, trunk: Any) -> Any:
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with torch.device("meta"):  # only its shape: the weights come from the policy
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):
        raise InputError(f"{type(model).__name__} has no scalar head named 'score'; choose another kind of model")
    setattr(model, model.base_model_prefix, trunk)
    model.score = torch.nn.Linear(model.score.in_features, 1, bias=False, device=policy.device)
    torch.nn.init.zeros_(model.score.weight)
    model.compute_dtype = getattr(policy, "compute_dtype", None)
    return model.eval()


def _scalar(model: Any, hidden: Tensor) -> Tensor:
    """The scalar head, in the type of its weights. (M, D) -> (M,)"""
    with torch.autocast(hidden.device.type, enabled=False):
        return model.score(hidden.to(model.score.weight.dtype))[:, 0]
