"""Load rewards by name: a built-in, a function in a file or module, a judge's URL, a reward model,
a settings file.
"""

import contextlib
import copy
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.errors import InputError
from trivet.http import pause, run_async
from trivet.places import require_reward
from trivet.rewards.guard import CapturedOutput, OutOfTime, with_time_limit
from trivet.rewards.learned import load_learned_reward
from trivet.rewards.reward import Reward, WeightedSum
from trivet.rewards.settings import read_settings, with_settings

BUILT_IN = ("exact_match", "last_number", "brevity", "code")  # functions of rules.py; code.py
SHOWN = 20  # lines printed by a reward that are shown, in a whole run


def print_to_stderr(text: str) -> None:
    """Print a line to stderr: where notes go by default."""
    print(text, file=sys.stderr)


@dataclass
class FunctionReward:
    """A Python function f(prompts, completions, **columns) -> list[float | None], called once per
    step.

    prompts and completions are strings, or lists of messages where the prompt is a conversation;
    every column of the source rows is repeated per completion. `completion_ids` and
    `log_metric(name, value)` are passed if the function asks for them. Arguments are copies:
    changing them changes nothing else. An async function is awaited. Printed output is kept off the
    screen; its first lines become notes. A call fails if it takes too long, raises, or returns
    anything but a number or None per completion.
    """

    function: Callable[..., Any]
    spec: str
    timeout: float = 600.0
    """Seconds that one call may take."""
    retries: int = 0
    """How often to call again when a call fails, after pauses of about 1, 2, 4, ... seconds."""
    on_failure: Literal["stop", "skip"] = "stop"
    """What to do after that: "stop" ends the run in one sentence; "skip" calls once more, group by
    group, and leaves the groups in which it fails unscored.
    """
    name: str = ""
    note: Callable[[str], None] = print_to_stderr
    logged: dict[str, float] = field(default_factory=dict[str, float], init=False)
    printed: int = field(default=0, init=False)  # lines so far

    def __post_init__(self) -> None:
        if not self.timeout:
            raise InputError(f"reward {self.spec}: timeout is 0; it must be above 0 seconds")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        size, count = rollouts.groups.group_size, len(rollouts.texts)
        attempt, failed, values = 0, 0, [math.nan] * count
        while True:
            try:
                values = self._call(rollouts, 0, count)
                break
            except _FailureError as failure:
                attempt += 1
                if attempt <= self.retries:
                    time.sleep(pause(attempt))
                    continue
                if self.on_failure == "stop":
                    times = f" ({attempt} times in a row)" if attempt > 1 else ""
                    raise InputError(f"{failure}{times}") from failure.__cause__
                self.logged = {}
                by_group = count > size and not failure.slow
                parts = range(0, count, size) if by_group else range(0)
                for start in parts:
                    with contextlib.suppress(_FailureError):
                        values[start : start + size] = self._call(rollouts, start, start + size)
                        failed -= size
                failed += count
                self.note(f"{failure}; {failed} of {count} completions go unscored")
                self.logged[f"rewards/{self.name}/failed"] = float(failed)
                break
        return torch.tensor(values, dtype=torch.float32, device=rollouts.groups.prompts.device)

    def _call(self, rollouts: Rollouts, start: int, end: int) -> list[float]:
        """Call the function once, for completions start to end; sets `logged`."""
        logged: dict[str, float] = {}
        arguments = self._arguments(rollouts, start, end)
        if "log_metric" in arguments:
            arguments["log_metric"] = partial(_log, logged)
        output = CapturedOutput()

        def call() -> Any:
            result = self.function(**arguments)
            return run_async(result) if inspect.isawaitable(result) else result

        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                result = with_time_limit(self.timeout, call)
            result = result.tolist() if hasattr(result, "tolist") else result  # an array or tensor
            result = (
                [x.tolist() if hasattr(x, "tolist") else x for x in result]
                if isinstance(result, list | tuple)
                else result
            )
            values = self._check(result, end - start)
        except (KeyboardInterrupt, _FailureError):
            raise
        except OutOfTime:
            message = f"reward {self.spec} did not return within {self.timeout:g} seconds"
            raise _FailureError(message, slow=True) from None
        except BaseException as error:  # user code can raise anything
            try:
                text = str(error)
            except Exception:  # even its message can fail
                text = "?"
            message = f"raised {type(error).__name__} in its line {self._line(error)}: {text}"
            raise _FailureError(f"reward {self.spec} {' '.join(message.split()):.500}") from error
        finally:
            self._show(output.text)
        self.logged = logged
        return values

    def _arguments(self, rollouts: Rollouts, start: int, end: int) -> dict[str, Any]:
        """Copy the arguments that the function asks for."""
        size, groups = rollouts.groups.group_size, rollouts.groups
        rows = [row for row in rollouts.rows for _ in range(size)][start:end]
        names = dict.fromkeys(key for row in rows for key in row if key != "prompt")
        names |= dict.fromkeys(("prompts", "completions", "completion_ids", "log_metric"))
        parameters = inspect.signature(self.function).parameters.values()
        for p in parameters:
            if (
                p.default is p.empty
                and p.name not in names
                and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            ):
                raise InputError(
                    f"reward {self.spec} asks for column '{p.name}', which the data does not have; "
                    f"it has {', '.join(sorted(names))}"
                )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            names = {p.name: None for p in parameters if p.name in names}
        arguments: dict[str, Any] = {
            name: [copy.deepcopy(row.get(name)) for row in rows] for name in names
        }
        if "prompts" in names:
            arguments["prompts"] = [copy.deepcopy(row.get("prompt")) for row in rows]
        if "completions" in names:
            arguments["completions"] = [
                [{"role": "assistant", "content": text}]
                if isinstance(row.get("prompt"), list)
                else text
                for text, row in zip(rollouts.texts[start:end], rows, strict=True)
            ]
        if "completion_ids" in names:
            lengths = groups.present[start:end].sum(1).tolist()
            ids = groups.completions[start:end].tolist()
            arguments["completion_ids"] = [row[:n] for row, n in zip(ids, lengths, strict=True)]
        return arguments

    def _check(self, result: Any, count: int) -> list[float]:
        if not isinstance(result, Sequence) or len(result) != count:
            got = f"{len(result)} values" if isinstance(result, Sequence) else type(result).__name__
            raise _FailureError(
                f"reward {self.spec} returned {got}; expected a list of {count} numbers, one per "
                "completion"
            )
        for i, value in enumerate(result):
            if value is not None and not (isinstance(value, numbers.Real) and abs(value) < 1e38):  # type: ignore[operator]
                raise _FailureError(
                    f"reward {self.spec} returned {value!r:.80} for completion {i}; return a "
                    "finite number, or None for no opinion"
                )
        return [math.nan if value is None else float(value) for value in result]

    def _line(self, error: BaseException) -> int | str:
        """Return the line of the function in which the error was raised, or the innermost line if
        it was raised outside.
        """
        code = getattr(self.function, "__code__", None)
        lines = list(traceback.walk_tb(error.__traceback__))
        return next(
            (line for frame, line in lines if frame.f_code is code), lines[-1][1] if lines else "?"
        )

    def _show(self, output: str) -> None:
        """Pass the printed lines on as notes, up to SHOWN in a run."""
        lines = [line for line in output.splitlines() if line.strip()]
        for line in lines[: max(0, SHOWN - self.printed)]:
            self.note(f"reward {self.name or self.spec} prints: {line:.200}")
        self.printed += len(lines)
        if self.printed >= SHOWN and self.printed - len(lines) < SHOWN:
            self.note(f"reward {self.name or self.spec} prints a lot; further output is not shown")


def _log(logged: dict[str, float], name: object, value: Any) -> None:
    """log_metric for reward functions: makes the name writable and protects the run's own keys."""
    if (name := str(name).encode("utf-8", "backslashreplace").decode()) in ("step", "seconds"):
        raise ValueError(f"log_metric: the name '{name}' is reserved; choose another")
    logged[name] = float(value)


class _FailureError(Exception):
    """A failed call, described in one sentence."""

    def __init__(self, message: str, *, slow: bool = False):
        super().__init__(message)
        self.slow = slow


def load_rewards(
    specs: Sequence[str],
    weights: Sequence[float],
    tokenizer: Any,
    *,
    like: Any,
    note: Callable[[str], None] = print_to_stderr,
) -> WeightedSum:
    """Load rewards by name: a built-in, `file.py:function`, `module:function`, a judge's URL, a
    reward model's folder or hub name, or a .toml file with one of these under `reward` and its
    settings.

    tokenizer: the policy's. like: the policy; reward models are placed on its device and compute in
    its precision. note: takes one line of text for the user.
    """
    if not all(specs) or not specs:
        raise InputError(
            f"no reward was named; give --reward one of {', '.join(BUILT_IN)}, file.py:function, "
            "or a reward model"
        )
    if weights and (len(weights) != len(specs) or not any(weights)):
        raise InputError(
            f"--reward-weights has {len(weights)} numbers for {len(specs)} rewards; give one per "
            "reward, not all 0, or leave it out"
        )
    rewards: dict[str, Reward] = {}
    for spec in specs:
        target, settings = read_settings(spec) if spec.endswith(".toml") else (spec, {})
        url = target.startswith(("http://", "https://"))
        name = target.rsplit(":", 1)[-1] if ":" in target else Path(target).name
        name = Path(spec).stem if spec.endswith(".toml") else "judge" if url else name
        name = (
            name
            if name not in rewards
            else f"{name} {len(rewards) + 1}"
            if url
            else f"{spec} {len(rewards) + 1}"
        )
        rewards[name] = _load_reward(
            target, settings, {"name": name, "note": note}, tokenizer, like
        )
    return WeightedSum(rewards, list(weights) or [1.0] * len(specs))


def _load_reward(
    spec: str, settings: Mapping[str, Any], own: dict[str, Any], tokenizer: Any, like: Any
) -> Reward:
    """own: fields that the reward gets besides its settings."""
    if spec.startswith(("http://", "https://")):
        from trivet.rewards.judge import Judge

        return with_settings(Judge, settings, url=spec, **own)
    if spec == "code":
        from trivet.rewards.code import CodeReward

        return with_settings(CodeReward, settings, name=own["name"])
    if spec in BUILT_IN:
        spec = f"trivet.rewards.rules:{spec}"
    source, _, function = spec.rpartition(":")
    if not source:
        if not Path(spec).exists() and "/" not in spec:
            raise InputError(
                f"reward {spec}: not a built-in ({', '.join(BUILT_IN)}) and no such folder; name a "
                "function as file.py:function"
            )
        if settings:
            raise InputError(
                f"reward {spec}: a reward model takes no settings; remove {', '.join(settings)}"
            )
        return load_learned_reward(spec, tokenizer, like=like)
    if source.endswith(".py"):
        require_reward(spec)
        loader = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert loader is not None
        assert loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        try:
            loader.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise InputError(
                f"reward {spec}: {source} can't be imported: {type(error).__name__}: {error}"
            ) from error
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise InputError(
                f"reward {spec}: no module {source}; name a function in a file as file.py:function"
            ) from error
    if not callable(getattr(module, function, None)):
        names = [
            n
            for n, f in vars(module).items()
            if inspect.isfunction(f) and f.__module__ == module.__name__
        ]
        raise InputError(
            f"reward {spec}: {source} has no function {function}; it has "
            f"{', '.join(names) or 'none'}"
        )
    return with_settings(
        FunctionReward, settings, function=getattr(module, function), spec=spec, **own
    )
