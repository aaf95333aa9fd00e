"""Rewards from names: a built-in, a function in a file or module, a judge's URL, a reward model, a file of settings."""

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
from trivet.http import pause, settled
from trivet.places import require_reward
from trivet.rewards.guard import Heard, OutOfTime, within
from trivet.rewards.learned import load_learned_reward
from trivet.rewards.reward import Reward, WeightedSum
from trivet.rewards.settings import read_settings, with_settings

BUILT_IN = ("exact_match", "last_number", "brevity", "code")  # the functions of rules.py, and code.py
SHOWN = 20  # lines that a reward prints which are shown, of a whole run


def on_stderr(text: str) -> None:
    """A line for whoever watches, where nobody said how to tell them."""
    print(text, file=sys.stderr)


@dataclass
class FunctionReward:
    """A Python function f(prompts, completions, **columns) -> list[float | None], called once with all of a step.

    prompts and completions are strings, or lists of messages where the prompt is a conversation; every column of the
    source rows comes repeated per completion. `completion_ids` and `log_metric(name, value)` are given if asked for. What
    it is given is its own: changing it changes nothing else. An async function is awaited; what is printed is kept from the
    screen, its first lines are told. A call fails when it takes too long, raises, or returns anything but a number or None
    per completion.
    """

    function: Callable[..., Any]
    spec: str
    timeout: float = 600.0
    """Seconds that one call may take."""
    retries: int = 0
    """Call again so many times when it fails, after a pause of about 1, 2, 4, ... seconds."""
    on_failure: Literal["stop", "skip"] = "stop"
    """Then end the run in one sentence; or call again group by group, and leave groups unscored in which it fails."""
    name: str = ""
    note: Callable[[str], None] = on_stderr
    logged: dict[str, float] = field(default_factory=dict[str, float], init=False)
    told: int = field(default=0, init=False)  # lines that it printed

    def __post_init__(self) -> None:
        if not self.timeout:
            raise InputError(f"reward {self.spec}: timeout is 0; it must be above 0 seconds")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        size, count = rollouts.groups.group_size, len(rollouts.texts)
        attempt, failed, values = 0, 0, [math.nan] * count
        while True:
            try:
                values = self._called(rollouts, 0, count)
                break
            except _FailureError as failure:
                attempt += 1
                if attempt <= self.retries:
                    time.sleep(pause(attempt))
                    continue
                if self.on_failure == "stop":
                    tried = f" ({attempt} times in a row)" if attempt > 1 else ""
                    raise InputError(f"{failure}{tried}") from failure.__cause__
                self.logged, parts = {}, range(0, count, size) if count > size and not failure.slow else range(0)
                for start in parts:
                    with contextlib.suppress(_FailureError):
                        values[start : start + size] = self._called(rollouts, start, start + size)
                        failed -= size
                failed += count
                self.note(f"{failure}; {failed} of {count} completions go unscored")
                self.logged[f"rewards/{self.name}/failed"] = float(failed)
                break
        return torch.tensor(values, dtype=torch.float32, device=rollouts.groups.prompts.device)

    def _called(self, rollouts: Rollouts, start: int, end: int) -> list[float]:
        """One call, for completions start to end; sets `logged`."""
        logged: dict[str, float] = {}
        given = self._given(rollouts, start, end)
        if "log_metric" in given:
            given["log_metric"] = partial(_log, logged)
        heard = Heard()

        def call() -> Any:
            result = self.function(**given)
            return settled(result) if inspect.isawaitable(result) else result

        try:
            with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
                result = within(self.timeout, call)
            result = result.tolist() if hasattr(result, "tolist") else result  # an array or tensor
            result = (
                [x.tolist() if hasattr(x, "tolist") else x for x in result]
                if isinstance(result, list | tuple)
                else result
            )
            values = self._checked(result, end - start)
        except (KeyboardInterrupt, _FailureError):
            raise
        except OutOfTime:
            told = f"reward {self.spec} did not return within {self.timeout:g} seconds"
            raise _FailureError(told, slow=True) from None
        except BaseException as error:  # anything can go wrong in there
            try:
                said = str(error)
            except Exception:  # it can't even say what it is
                said = "?"
            told = f"raised {type(error).__name__} in its line {self._line(error)}: {said}"
            raise _FailureError(f"reward {self.spec} {' '.join(told.split()):.500}") from error
        finally:
            self._tell(heard.text)
        self.logged = logged
        return values

    def _given(self, rollouts: Rollouts, start: int, end: int) -> dict[str, Any]:
        """The arguments that the function asks for, copied."""
        size, groups = rollouts.groups.group_size, rollouts.groups
        rows = [row for row in rollouts.rows for _ in range(size)][start:end]
        known = dict.fromkeys(key for row in rows for key in row if key != "prompt")
        known |= dict.fromkeys(("prompts", "completions", "completion_ids", "log_metric"))
        parameters = inspect.signature(self.function).parameters.values()
        for p in parameters:
            if p.default is p.empty and p.name not in known and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise InputError(
                    f"reward {self.spec} asks for column '{p.name}', which the data does not have: {', '.join(sorted(known))}"
                )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            known = {p.name: None for p in parameters if p.name in known}
        given: dict[str, Any] = {key: [copy.deepcopy(row.get(key)) for row in rows] for key in known}
        if "prompts" in known:
            given["prompts"] = [copy.deepcopy(row.get("prompt")) for row in rows]
        if "completions" in known:
            given["completions"] = [
                [{"role": "assistant", "content": text}] if isinstance(row.get("prompt"), list) else text
                for text, row in zip(rollouts.texts[start:end], rows, strict=True)
            ]
        if "completion_ids" in known:
            lengths = groups.present[start:end].sum(1).tolist()
            ids = groups.completions[start:end].tolist()
            given["completion_ids"] = [line[:n] for line, n in zip(ids, lengths, strict=True)]
        return given

    def _checked(self, result: Any, count: int) -> list[float]:
        if not isinstance(result, Sequence) or len(result) != count:
            got = f"{len(result)} values" if isinstance(result, Sequence) else type(result).__name__
            raise _FailureError(
                f"reward {self.spec} returned {got}, expected a list of {count} numbers, one per completion"
            )
        for i, value in enumerate(result):
            if value is not None and not (isinstance(value, numbers.Real) and abs(value) < 1e38):  # type: ignore[operator]
                raise _FailureError(
                    f"reward {self.spec} returned {value!r:.80} for completion {i}; return a finite number, or None for no opinion"
                )
        return [math.nan if value is None else float(value) for value in result]

    def _line(self, error: BaseException) -> int | str:
        """The line of the function in which it was raised, or where it was raised if that can't be said."""
        own, lines = getattr(self.function, "__code__", None), list(traceback.walk_tb(error.__traceback__))
        return next((line for frame, line in lines if frame.f_code is own), lines[-1][1] if lines else "?")

    def _tell(self, printed: str) -> None:
        lines = [line for line in printed.splitlines() if line.strip()]
        for line in lines[: max(0, SHOWN - self.told)]:
            self.note(f"reward {self.name or self.spec} prints: {line:.200}")
        self.told += len(lines)
        if self.told >= SHOWN and self.told - len(lines) < SHOWN:
            self.note(f"reward {self.name or self.spec} prints much; the rest is not shown")


def _log(logged: dict[str, float], name: object, value: Any) -> None:
    """log_metric: what can be written, and not in the place of the run's own."""
    if (name := str(name).encode("utf-8", "backslashreplace").decode()) in ("step", "seconds"):
        raise ValueError(f"log_metric: {name} is the run's own; choose another name")
    logged[name] = float(value)


class _FailureError(Exception):
    """A call that came to nothing, said in a sentence."""

    def __init__(self, told: str, *, slow: bool = False):
        super().__init__(told)
        self.slow = slow


def load_rewards(
    specs: Sequence[str],
    weights: Sequence[float],
    tokenizer: Any,
    *,
    like: Any,
    note: Callable[[str], None] = on_stderr,
) -> WeightedSum:
    """Rewards from their names: a built-in, `file.py:function`, `module:function`, a judge's URL, a reward model's folder or
    hub name, or a .toml file that holds one of these under `reward`, and settings for it.

    tokenizer: the policy's. like: the policy; reward models go to its device and compute in its precision. note: takes a
    line for whoever watches.
    """
    if not all(specs) or not specs:
        raise InputError(
            f"no reward was named: give --reward one of {', '.join(BUILT_IN)}, file.py:function, or a reward model"
        )
    if weights and (len(weights) != len(specs) or not any(weights)):
        raise InputError(
            f"--reward-weights has {len(weights)} numbers for {len(specs)} rewards; give one each, not all 0, or none"
        )
    rewards: dict[str, Reward] = {}
    for spec in specs:
        given, settings = read_settings(spec) if spec.endswith(".toml") else (spec, {})
        url = given.startswith(("http://", "https://"))
        name = given.rsplit(":", 1)[-1] if ":" in given else Path(given).name
        name = Path(spec).stem if spec.endswith(".toml") else "judge" if url else name
        name = name if name not in rewards else f"{name} {len(rewards) + 1}" if url else f"{spec} {len(rewards) + 1}"
        rewards[name] = _load_reward(given, settings, {"name": name, "note": note}, tokenizer, like)
    return WeightedSum(rewards, list(weights) or [1.0] * len(specs))


def _load_reward(spec: str, settings: Mapping[str, Any], own: dict[str, Any], tokenizer: Any, like: Any) -> Reward:
    """own: what the reward is given beside its settings."""
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
                f"reward {spec}: not a built-in ({', '.join(BUILT_IN)}), no such folder; a function is given as file.py:function"
            )
        if settings:
            raise InputError(f"reward {spec}: a reward model takes no settings, but {', '.join(settings)} is given")
        return load_learned_reward(spec, tokenizer, like=like)
    if source.endswith(".py"):
        require_reward(spec)
        loader = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert loader is not None
        assert loader.loader is not None
        module = importlib.util.module_from_spec(loader)
        try:
            loader.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a stranger's file
            raise InputError(f"reward {spec}: {source} can't be imported: {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise InputError(
                f"reward {spec}: no module {source}; a function in a file is given as file.py:function"
            ) from error
    if not callable(getattr(module, function, None)):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise InputError(f"reward {spec}: {source} has no function {function}; it has {', '.join(names) or 'none'}")
    return with_settings(FunctionReward, settings, function=getattr(module, function), spec=spec, **own)
