"""The states of a run's parts as tensors and JSON, and back: everything that is needed to resume
bit for bit.
"""

import random
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trivet.generation.server import batches_to_json
from trivet.step.optimizer import Optimizer


@runtime_checkable
class Stateful(Protocol):
    """A part of a run that changes from step to step and defines what a checkpoint saves of it."""

    def state(self) -> Any:
        """Return what a checkpoint must save."""
        ...

    def set_state(self, state: Any) -> None:
        """Restore what `state` returned."""
        ...


def small_states(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of the parts that are small enough to be copied at every step."""
    small: dict[str, Any] = {
        name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)
    }
    for name, part in parts.items():
        if isinstance(part, Stateful) and not isinstance(part, Optimizer):
            small[name] = part.state()
    return small


def state_of(part: Any, own: set[int]) -> Any:
    """Return what a checkpoint must save of a part: of a model, the trained tensors that it does
    not share with the policy. own: the addresses of the policy's tensors.
    """
    if isinstance(part, Stateful):
        part = part.state()
    if isinstance(part, list):  # batches that servers have been asked for
        return batches_to_json(part)
    if isinstance(part, dict):
        return part
    if isinstance(part, torch.nn.Module) and any(x.requires_grad for x in part.parameters()):
        return {name: x for name, x in part.state_dict().items() if x.data_ptr() not in own}
    return part if isinstance(part, Tensor) else None


def set_state(part: Any, state: Any) -> None:
    """Restore a newly created part from what state_of returned."""
    if state is None:
        return
    if isinstance(part, Stateful):
        part.set_state(state)
    elif isinstance(part, torch.nn.Module):
        part.load_state_dict(state, strict=False)
    else:
        part.copy_(state)


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Return the state of every random number generator: the run's, torch's, Python's, and numpy's
    if it is imported.
    """
    state: dict[str, Any] = {
        "run": generator.get_state(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:  # a reward function may draw from it
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_random_state(generator: torch.Generator, state: dict[str, Any]) -> None:
    """Restore what random_state returned."""
    generator.set_state(state["run"])
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy

        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))


def to_json(x: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Convert x for JSON, and move its tensors to `tensors`, named by their path; keys that are
    numbers keep their type.
    """
    if isinstance(x, Tensor):
        tensors[path] = x.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(x, dict):
        if all(isinstance(key, str) for key in x) and "tensor" not in x and "numbered" not in x:
            return {key: to_json(value, tensors, f"{path}/{key}") for key, value in x.items()}
        return {
            "numbered": [
                [key, to_json(value, tensors, f"{path}/{key}")] for key, value in x.items()
            ]
        }
    if isinstance(x, list | tuple):
        return [to_json(value, tensors, f"{path}/{i}") for i, value in enumerate(x)]
    return x


def from_json(x: Any, tensors: dict[str, Tensor]) -> Any:
    """Convert back what to_json returned."""
    if isinstance(x, dict):
        if "tensor" in x:
            return tensors[x["tensor"]]
        if "numbered" in x:
            return {key: from_json(value, tensors) for key, value in x["numbered"]}
        return {key: from_json(value, tensors) for key, value in x.items()}
    return [from_json(value, tensors) for value in x] if isinstance(x, list) else x
