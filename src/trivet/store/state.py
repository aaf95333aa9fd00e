"""The parts of a run as tensors and JSON, and back: what could not be made with again to the same bits."""

import random
import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trivet.generation.server import written
from trivet.step.optimizer import Optimizer


@runtime_checkable
class Stateful(Protocol):
    """A part of a run that changes from step to step, and says by itself what a checkpoint keeps of it."""

    def state(self) -> Any:
        """What it could not be made with again."""
        ...

    def set_state(self, state: Any) -> None:
        """Take back what `state` returned."""
        ...


def small_states(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the parts that are small enough to be remembered at every step."""
    small: dict[str, Any] = {name: part.clone() for name, part in parts.items() if isinstance(part, Tensor)}
    for name, part in parts.items():
        if isinstance(part, Stateful) and not isinstance(part, Optimizer):
            small[name] = part.state()
    return small


def state_of(part: Any, own: set[int]) -> Any:
    """What a part has that it could not be made with again: of a model its trained tensors that the policy does not share."""
    if isinstance(part, Stateful):
        part = part.state()
    if isinstance(part, list):  # batches that servers have been asked for
        return written(part)
    if isinstance(part, dict):
        return part
    if isinstance(part, torch.nn.Module) and any(x.requires_grad for x in part.parameters()):
        return {name: x for name, x in part.state_dict().items() if x.data_ptr() not in own}
    return part if isinstance(part, Tensor) else None


def set_state(part: Any, state: Any) -> None:
    """Give a part, made again, what state_of said of it."""
    if state is None:
        return
    if isinstance(part, Stateful):
        part.set_state(state)
    elif isinstance(part, torch.nn.Module):
        part.load_state_dict(state, strict=False)
    else:
        part.copy_(state)


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Where every source of random numbers stands: that of the run, torch's, Python's, numpy's if anybody has it."""
    state: dict[str, Any] = {"run": generator.get_state(), "torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:  # a reward function may draw from it
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_random_state(generator: torch.Generator, state: dict[str, Any]) -> None:
    """What random_state said."""
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


def packed(x: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """x for JSON, its tensors put aside by the path to them; keys that are numbers keep their type."""
    if isinstance(x, Tensor):
        tensors[path] = x.detach().cpu().contiguous().clone()
        return {"tensor": path}
    if isinstance(x, dict):
        if all(isinstance(key, str) for key in x) and "tensor" not in x and "numbered" not in x:
            return {key: packed(value, tensors, f"{path}/{key}") for key, value in x.items()}
        return {"numbered": [[key, packed(value, tensors, f"{path}/{key}")] for key, value in x.items()]}
    if isinstance(x, list | tuple):
        return [packed(value, tensors, f"{path}/{i}") for i, value in enumerate(x)]
    return x


def unpacked(x: Any, tensors: dict[str, Tensor]) -> Any:
    """What packed has made."""
    if isinstance(x, dict):
        if "tensor" in x:
            return tensors[x["tensor"]]
        if "numbered" in x:
            return {key: unpacked(value, tensors) for key, value in x["numbered"]}
        return {key: unpacked(value, tensors) for key, value in x.items()}
    return [unpacked(value, tensors) for value in x] if isinstance(x, list) else x
