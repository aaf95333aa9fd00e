"""Settings of a reward: a TOML file that is passed as --reward in its place.

reward = "my_rules.py:polite"
timeout = 30
retries = 2
on_failure = "skip"
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

from trivet.arguments import misfit, read_toml
from trivet.errors import InputError, nearest


def read_settings(path: str) -> tuple[str, dict[str, Any]]:
    """Read the name of the reward and its settings from a TOML file."""
    settings = read_toml(path, "reward")
    reward = settings.pop("reward", None)
    if not isinstance(reward, str) or not reward or reward.endswith(".toml"):
        raise InputError(
            f'reward {path}: the file must name its reward, as in reward = "my_rules.py:polite"'
        )
    return reward, settings


def with_settings(kind: Any, settings: Mapping[str, Any], **own: Any) -> Any:
    """Return kind(**own, **settings), for settings that are fields of this dataclass, of the right
    type, and not negative.

    own: fields that a settings file can't set.
    """
    hints = typing.get_type_hints(kind)
    kinds = {
        f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init and f.name not in own
    }
    for key, value in settings.items():
        if key not in kinds:
            raise InputError(
                f"reward {own['name']}: unknown setting '{key}'; the nearest known one is "
                f"'{nearest(key, kinds)}'"
            )
        if expected := _misfit(value, kinds[key]):
            raise InputError(f"reward {own['name']}: {key} is {value!r}; expected {expected}")
    return kind(**own, **settings)


def _misfit(value: Any, kind: Any) -> str:
    """Like `misfit`, but a number must also be finite and not negative."""
    expected = misfit(value, kind)
    if kind in (int, float) and (expected or not 0 <= value < math.inf):
        return f"a {'whole ' if kind is int else ''}number, not negative"
    return expected
