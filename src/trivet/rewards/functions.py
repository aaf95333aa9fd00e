"""Rewards from names: a built-in, a function in a file or module, a reward model."""

import importlib
import importlib.util
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.errors import InputError
from trivet.rewards.learned import load_learned_reward
from trivet.rewards.reward import Reward, WeightedSum

BUILT_IN = ("exact_match", "last_number", "brevity")  # the functions of rules.py


class FunctionReward:
    """A Python function f(prompts, completions, **columns) -> list[float | None], called once with all of a step.

    prompts and completions are strings, or lists of messages where the prompt is a conversation; every column of the
    source rows comes repeated per completion. `completion_ids` and `log_metric(name, value)` are given if asked for.
    """

    def __init__(self, function: Callable[..., Any], spec: str):
        self.function, self.spec = function, spec
        self.logged: dict[str, float] = {}

    def __call__(self, rollouts: Rollouts) -> Tensor:
        self.logged = {}
        size, groups = rollouts.groups.group_size, rollouts.groups
        rows = [row for row in rollouts.rows for _ in range(size)]
        chats = [isinstance(row.get("prompt"), list) for row in rows]
        texts = [
            [{"role": "assistant", "content": text}] if chat else text
            for text, chat in zip(rollouts.texts, chats, strict=True)
        ]
        given: dict[str, Any] = {
            key: [row.get(key) for row in rows] for key in {key: None for row in rows for key in row}
        }
        given |= {
            "prompts": [row.get("prompt") for row in rows],
            "completions": texts,
            "log_metric": lambda name, value: self.logged.__setitem__(str(name), float(value)),
        }
        given["completion_ids"] = [
            ids[:n] for ids, n in zip(groups.completions.tolist(), groups.present.sum(1).tolist(), strict=True)
        ]
        given.pop("prompt", None)
        parameters = inspect.signature(self.function).parameters.values()
        for p in parameters:
            if p.default is p.empty and p.name not in given and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise InputError(
                    f"reward {self.spec} asks for column '{p.name}', which the data does not have: {', '.join(sorted(given))}"
                )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            given = {p.name: given[p.name] for p in parameters if p.name in given}
        try:
            result = self.function(**given)
            result = result.tolist() if hasattr(result, "tolist") else result  # an array or tensor
            result = [x.tolist() if hasattr(x, "tolist") else x for x in result] if isinstance(result, list) else result
        except (Exception, SystemExit) as error:  # anything can go wrong in there
            line = error.__traceback__.tb_next.tb_lineno if error.__traceback__ and error.__traceback__.tb_next else "?"
            raise InputError(f"reward {self.spec} raised {type(error).__name__} in its line {line}: {error}") from error
        if not isinstance(result, Sequence) or len(result) != len(texts):
            got = f"{len(result)} values" if isinstance(result, Sequence) else type(result).__name__
            raise InputError(
                f"reward {self.spec} returned {got}, expected a list of {len(texts)} numbers, one per completion"
            )
        for i, value in enumerate(result):
            if value is not None and not (isinstance(value, numbers.Real) and abs(value) < 1e38):  # type: ignore[operator]
                raise InputError(
                    f"reward {self.spec} returned {value!r:.80} for completion {i}; return a finite number, or None for no opinion"
                )
        values = [math.nan if value is None else float(value) for value in result]
        return torch.tensor(values, dtype=torch.float32, device=groups.prompts.device)


def load_rewards(specs: Sequence[str], weights: Sequence[float], tokenizer: Any, *, like: Any) -> WeightedSum:
    """Rewards from their names: a built-in, `file.py:function`, `module:function`, or a reward model's folder or hub name.

    tokenizer: the policy's. like: the policy; reward models go to its device and compute in its precision.
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
        name = spec.rsplit(":", 1)[-1] if ":" in spec else Path(spec).name
        name = name if name not in rewards else f"{spec} {len(rewards) + 1}"
        rewards[name] = _load_reward(spec, tokenizer, like)
    return WeightedSum(rewards, list(weights) or [1.0] * len(specs))


def _load_reward(spec: str, tokenizer: Any, like: Any) -> Reward:
    if spec in BUILT_IN:
        spec = f"trivet.rewards.rules:{spec}"
    source, _, function = spec.rpartition(":")
    if not source:
        if not Path(spec).exists() and "/" not in spec:
            raise InputError(
                f"reward {spec}: not a built-in ({', '.join(BUILT_IN)}), no such folder; a function is given as file.py:function"
            )
        return load_learned_reward(spec, tokenizer, like=like)
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise InputError(f"reward {spec}: no file {source}")
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
    return FunctionReward(getattr(module, function), spec)
