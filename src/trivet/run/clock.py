"""Where the time of a step goes. A recipe does not know of it: the functions that it calls are timed from outside, while it runs."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from trivet.generation.engine import Engine
from trivet.generation.server import Servers
from trivet.rewards.reward import WeightedSum
from trivet.run.loop import Metrics, Optimizer

METHODS = (
    (Engine, "generate", "generation"),
    (Servers, "generate", "generation"),
    (WeightedSum, "__call__", "reward"),
    (Optimizer, "step", "optimizer"),
)
CALLS = dict.fromkeys(("token_logprobs", "values", "scores", "in_microbatches"), "forward") | {"evaluate": "evaluation"}


class Clock:
    """Seconds by part. What follows a forward pass with gradients is `backward`, up to the next part: the loss is in it."""

    def __init__(self) -> None:
        self.part, self.since, self.spent = "other", time.perf_counter(), defaultdict[str, float](float)

    def turn(self, part: str) -> None:
        """The time since the last turn was the present part's; from now on it is this one's."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else a part would pay for what an earlier one only asked for
        now = time.perf_counter()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def take(self) -> Metrics:
        """time/PART in seconds since the last taking."""
        self.turn("other")
        taken = {f"time/{part}": round(seconds, 5) for part, seconds in self.spent.items()}
        self.spent.clear()
        return taken

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same function, whose calls count as this part, with all that they call."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.part not in ("other", "backward"):
                return function(*args, **kwargs)
            self.turn(part)
            try:
                result = function(*args, **kwargs)
            finally:
                self.turn("other")
            if isinstance(result, torch.Tensor) and result.requires_grad:
                self.part = "backward"
            return result

        return call


@contextmanager
def clock_on(recipe: ModuleType) -> Iterator[Clock]:
    """A clock that runs within, on this recipe's calls."""
    clock = Clock()
    calls = [*METHODS, *((recipe, name, part) for name, part in CALLS.items() if hasattr(recipe, name))]
    originals = [getattr(owner, name) for owner, name, _ in calls]
    try:
        for (owner, name, part), original in zip(calls, originals, strict=True):
            setattr(owner, name, clock.timed(original, part))
        yield clock
    finally:
        for (owner, name, _), original in zip(calls, originals, strict=True):
            setattr(owner, name, original)
