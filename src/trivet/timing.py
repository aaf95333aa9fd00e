"""Measure where the time of a step goes: functions decorated with `timed` report to the running
clock, if any.

@timed("forward")
def token_logprobs(model, groups): ...

with Clock() as clock:
    step()
    clock.take()        # {"time/forward": 0.12, "time/backward": 0.18, "time/other": 0.02}
"""

import time
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, Self, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
_running: ContextVar["Clock | None"] = ContextVar("clock", default=None)


class Clock:
    """Wall-clock seconds of each part of a step. It runs inside its `with` block, for this thread.

    Time from a differentiable forward pass to the next part counts as `backward`, including the
    loss; time outside any part is `other`.
    """

    def __init__(self) -> None:
        self.part, self.since, self.spent = (
            "other",
            time.perf_counter(),
            defaultdict[str, float](float),
        )

    def __enter__(self) -> Self:
        self.before = _running.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _running.reset(self.before)

    def turn(self, part: str) -> None:
        """Charge the time since the last turn to the current part, then switch to this one."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # or a part would be charged for kernels an earlier one queued
        now = time.perf_counter()
        self.spent[self.part] += now - self.since
        self.part, self.since = part, now

    def take(self) -> dict[str, float]:
        """Return time/PART in seconds since the last take, and reset."""
        self.turn("other")
        taken = {f"time/{part}": round(seconds, 5) for part, seconds in self.spent.items()}
        self.spent.clear()
        return taken


def timed(part: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that its calls, including everything they call, count as this part of
    the running clock.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            clock = _running.get()
            # inside another part, the time belongs to that part
            if clock is None or clock.part not in ("other", "backward"):
                return function(*args, **kwargs)
            clock.turn(part)
            try:
                result = function(*args, **kwargs)
            finally:
                clock.turn("other")
            if isinstance(result, torch.Tensor) and cast(Any, result).requires_grad:
                clock.part = "backward"
            return result

        return call

    return decorate
