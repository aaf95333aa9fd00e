"""Configs in and out: from TOML and mappings, to TOML, with unknown keys and impossible values said in a sentence."""

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from trivet.errors import InputError
from trivet.run.options import Options


def from_mapping(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    """A config of this kind from keys and values, as a TOML file holds them (dashes or underscores).

    Errors: InputError that names an unknown key and the nearest known one, or a value of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
            raise InputError(f"{where}: unknown key '{key}'; the nearest known one is '{near[0]}'")
        expected = type(getattr(kind(), name))
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(value, bool) != (expected is bool) or not isinstance(
            value, (expected, int) if expected is float else expected
        ):
            raise InputError(f"{where}: key '{key}' has the value {value!r}; expected {expected.__name__}")
        given[name] = value
    return kind(**given)


def read_toml(path: str) -> dict[str, Any]:
    """The keys of a TOML file."""
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not TOML: {error}") from None


def to_toml(config: Any) -> str:
    """The config as TOML that read_toml gives back."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        lines.append(f"{field.name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines) + "\n"


def check(config: Options) -> None:
    """InputError for a value that can't be meant."""
    for name in ("prompts_per_step", "max_prompt_tokens", "max_completion_tokens", "microbatch_tokens"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 1")
    if not 0 <= config.eval_fraction < 1:
        raise InputError(f"--eval-fraction is {config.eval_fraction}; it must be at least 0 and below 1")
    if config.steps < 0 or config.epochs <= 0:
        raise InputError("--steps must be 0 or more, and --epochs above 0")
    if (Path(config.out) / "config.toml").exists() and config.out:
        raise InputError(f"--out {config.out} already holds a run; choose another directory, or remove it first")
    if config.out and Path(config.out).exists() and not Path(config.out).is_dir():
        raise InputError(f"--out {config.out} is a file; choose a directory")
