"""Settings of a reward: a TOML file that is given as --reward in its place.

reward = "my_rules.py:polite"
timeout = 30
retries = 2
on_failure = "skip"
"""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trivet.errors import InputError, nearest


def read_settings(path: str) -> tuple[str, dict[str, Any]]:
    """The reward that the file names, and its settings."""
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"reward {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"reward {path}: not TOML: {error}") from None
    reward = settings.pop("reward", None)
    if not isinstance(reward, str) or not reward or reward.endswith(".toml"):
        raise InputError(f'reward {path}: it must say which reward it is about, as in reward = "my_rules.py:polite"')
    return reward, settings


def with_settings(kind: Any, settings: Mapping[str, Any], **own: Any) -> Any:
    """kind(**own, **settings), for settings that are fields of this dataclass, of the right type, and at least 0.

    own: fields that are not a person's to set.
    """
    hints = typing.get_type_hints(kind)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init and f.name not in own}
    for key, value in settings.items():
        if key not in kinds:
            raise InputError(
                f"reward {own['name']}: unknown setting '{key}'; the nearest known one is '{nearest(key, kinds)}'"
            )
        if expected := _misfit(value, kinds[key]):
            raise InputError(f"reward {own['name']}: {key} is {value!r}; expected {expected}")
    return kind(**own, **settings)


def _misfit(value: Any, kind: Any) -> str:
    """What was expected, where the value is not of this kind; '' where it is."""
    if typing.get_origin(kind) is Literal:
        return "" if value in typing.get_args(kind) else f"one of {', '.join(typing.get_args(kind))}"
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 <= value < math.inf
        return "" if number else f"a {'whole ' if kind is int else ''}number, not negative"
    kind = typing.get_origin(kind) or kind
    return "" if isinstance(value, kind) else {bool: "true or false", str: "a text", dict: "a table"}[kind]
