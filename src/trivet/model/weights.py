"""Access to a model's weights, whether in its own tensors or sharded over several processes.

A sharded model has a holder, which gathers its weights for a pass and makes other models from it
(distributed/fsdp.py). The decorators below use the holder if a model has one, so that no caller
needs to know.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

P = ParamSpec("P")
M = TypeVar("M")


class WeightsHolder(Protocol):
    """Holds the weights of a sharded model."""

    def gathered_pass(self, call: Callable[[], Tensor]) -> Tensor:
        """Run the call while the weights are gathered and return its result."""
        ...

    def in_microbatches(
        self, function: Callable[..., Tensor], model: Any, *args: Any, **options: Any
    ) -> Tensor:
        """trivet.model.forward.in_microbatches, shared among the processes."""
        ...

    def make(self, function: Callable[..., M], model: Any, *args: Any, **options: Any) -> M:
        """Return the model that the function makes from this one, sharded as well."""
        ...

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Return the model that `load` reads from files, sharded as well."""
        ...


def hold_weights(model: Any, holder: WeightsHolder) -> None:
    """Let this holder gather the model's weights. The holder is not part of the model: it is not a
    module and not saved.
    """
    model.__dict__["_weights_holder"] = holder


def holder_of(model: Any) -> Any:
    """Return the holder of a sharded model; None for a model with its own tensors."""
    return model.__dict__.get("_weights_holder")


def with_weights(
    function: Callable[Concatenate[Any, P], Tensor],
) -> Callable[Concatenate[Any, P], Tensor]:
    """Decorate a function that needs all weights of its model, which are gathered while it runs."""

    @wraps(function)
    def call(model: Any, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        holder = holder_of(model)
        if holder is None:
            return function(model, *args, **kwargs)
        return holder.gathered_pass(partial(function, model, *args, **kwargs))

    return call


def makes_model(function: Callable[Concatenate[Any, P], M]) -> Callable[Concatenate[Any, P], M]:
    """Decorate a function that makes a model from another in memory, so that a sharded model gives
    a sharded one.
    """

    @wraps(function)
    def make(model: Any, *args: P.args, **kwargs: P.kwargs) -> M:
        holder = holder_of(model)
        return (
            function(model, *args, **kwargs)
            if holder is None
            else holder.make(function, model, *args, **kwargs)
        )

    return make


def load_beside(model: Any, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Return load(name, **options), sharded if this model is."""
    holder = holder_of(model)
    return load(name, **options) if holder is None else holder.load(load, name, **options)
