"""Where the weights of a model are: in its own tensors, or in shards on several processes, gathered when a pass needs them."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol

from torch import Tensor

P = ParamSpec("P")


class WeightsHolder(Protocol):
    """Gathers the weights of a model in shards for the time of a pass (run/sharded.py)."""

    def gathered_pass(self, call: Callable[[], Tensor]) -> Tensor:
        """What the call returns, made where the weights are."""
        ...


def hold_weights(model: Any, holder: WeightsHolder) -> None:
    """From now on passes through this model go by its holder, which is no part of the model: not a module of it, not saved."""
    model.__dict__["_weights_holder"] = holder


def holder_of(model: Any) -> Any:
    """What gathers the weights of this model; None where they are its own tensors."""
    return model.__dict__.get("_weights_holder")


def with_weights(function: Callable[Concatenate[Any, P], Tensor]) -> Callable[Concatenate[Any, P], Tensor]:
    """Decorate a function of a model that needs all of its weights: for a model in shards they are gathered while it runs."""

    @wraps(function)
    def call(model: Any, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        holder = holder_of(model)
        if holder is None:
            return function(model, *args, **kwargs)
        return holder.gathered_pass(partial(function, model, *args, **kwargs))

    return call
