"""Parse flags and TOML files into values for the fields of a config, checking names and types."""

import dataclasses
import json
import os
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from trivet.errors import InputError, nearest

OTHER_NAMES = {  # what transformers and TRL call our options, for suggestions
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset": "data",
    "output_dir": "out",
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "prompts_per_step",
    "batch_size": "prompts_per_step",
    "gradient_accumulation_steps": "microbatch_tokens",
    "num_generations": "group_size",
    "max_prompt_length": "max_prompt_tokens",
    "max_completion_length": "max_completion_tokens",
    "max_new_tokens": "max_completion_tokens",
    "max_length": "max_completion_tokens",
    "reward_funcs": "reward",
    "kl_coef": "beta",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "num_iterations": "epochs_per_batch",
    "use_vllm": "vllm",
    "lora_r": "lora",
    "dtype": "precision",
    "bf16": "precision",
    "report_to": "track",
    "save_steps": "save_every",
    "eval_steps": "eval_every",
    "save_total_limit": "keep",
}


def parse(
    kind: type[Any], args: list[str], presets: dict[str, dict[str, Any]] | None = None
) -> Any:
    """Build a config from --preset NAME ..., --config FILE.toml and flags; later ones override
    earlier ones.
    """
    presets = presets or {}
    others: dict[str, Any] = {"trust_remote_code": bool} if hasattr(kind, "model") else {}
    flags = read_flags(
        kind, args, others | ({"preset": tuple[str, ...], "config": str} if presets else {})
    )
    if flags.pop("trust-remote-code", False):
        os.environ["TRIVET_TRUST_REMOTE_CODE"] = "1"
    path, values = flags.pop("config", None), dict[str, Any]()
    for preset in flags.pop("preset", ()):
        if preset not in presets:
            raise InputError(f"unknown preset '{preset}'; choose from {', '.join(presets)}")
        values |= presets[preset]
    if path is not None:
        values |= parse_values(kind, read_toml(path), f"{path}: ")
    return kind(**values | parse_values(kind, flags, "--"))


def runs_and_options(kind: type[Any], args: list[str], program: str) -> tuple[list[Path], Any]:
    """Split the arguments into leading run directories and the options that follow them."""
    flags = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    options = parse(kind, args[flags:])
    if not flags:
        raise InputError(f"name a run directory first: {program} RUN [RUN ...]")
    return [Path(arg) for arg in args[:flags]], options


def read_flags(
    config: type[Any], args: Sequence[str], others: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read --key value, --key=value, --key and --no-key into a dict. A list option takes several
    values and may be repeated.

    others: keys beyond the fields of config, with their types. A word that is not a number where
    one is expected is left as a string. Errors: InputError for an unknown key (naming the nearest
    one), a repeated key, or the wrong number of values.
    """
    kinds, values = typing.get_type_hints(config) | (others or {}), dict[str, Any]()
    groups: list[list[str]] = []
    for word in args:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
        else:
            raise InputError(
                f"'{word}' belongs to no option; options begin with -- (--help lists them all)"
            )
    for flag, *words in groups:
        name = flag[2:].replace("-", "_")
        off = name not in kinds and kinds.get(name.removeprefix("no_")) is bool
        name = name.removeprefix("no_") if off else name
        key, kind = name.replace("_", "-"), kinds.get(name)
        if kind is None:
            near = _nearest(name, kinds).replace("_", "-")
            raise InputError(
                f"unknown option {flag}; the nearest known one is --{near} (--help lists them all)"
            )
        several = typing.get_origin(kind) is tuple
        if not several and (key in values or len(words) != (kind is not bool)):
            takes = "no value" if kind is bool else "one value"
            problem = (
                "was given twice"
                if key in values
                else f"was given {' '.join(words)}"
                if words
                else "has no value"
            )
            raise InputError(f"{flag} {problem}; it takes {takes}")
        numbers = [_number(word, typing.get_args(kind)[0] if several else kind) for word in words]
        values[key] = (
            not off if kind is bool else [*values.get(key, []), *numbers] if several else numbers[0]
        )
    return values


def parse_values(kind: type[Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check values from a TOML file or flags (dashes or underscores) against the fields of this
    config class, and return them under the fields' names.

    Errors: InputError that names an unknown key and the nearest known one, or a value of the wrong
    type.
    """
    kinds = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise InputError(
                f"{where}unknown key '{key}'; the nearest known one is '{_nearest(name, kinds)}'"
            )
        if expected := misfit(value, kinds[name]):
            raise InputError(f"{where}{key} is {value!r}; expected {expected}")
        fields[name] = value if typing.get_origin(kinds[name]) is not tuple else _as_tuple(value)
    return fields


def _nearest(name: str, kinds: dict[str, Any]) -> str:
    ours = OTHER_NAMES.get(name, "")
    return ours if ours in kinds else nearest(name, kinds)


def _number(word: str, kind: Any) -> Any:
    try:
        return kind(word) if kind in (int, float) else word
    except ValueError:
        return word


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """A list as a tuple, a single value as a tuple of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def misfit(value: Any, kind: Any) -> str:
    """What was expected if the value is not of this type; '' if it is."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "" if value in inner else f"one of {', '.join(inner)}"
    if typing.get_origin(kind) is tuple:
        fits = not any(misfit(item, inner[0]) for item in _as_tuple(value))
        return "" if fits else f"a list of {inner[0].__name__}"
    kind = typing.get_origin(kind) or kind
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(
        value, bool
    ) == (kind is bool)
    return "" if fits else kind.__name__


def read_toml(path: str, label: str = "--config") -> dict[str, Any]:
    """The keys of a TOML file. label: what error messages call it."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{label} {path}: {error.strerror or error}") from None
    # also raised for a number with thousands of digits and for arrays nested too deeply
    except (ValueError, RecursionError) as error:
        raise InputError(f"{label} {path}: not valid TOML: {error}") from None


def to_toml(config: Any) -> str:
    """The config as TOML that read_toml can read back."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
        # DEL is the one character that JSON strings may hold unescaped and TOML strings may not
        lines.append(f"{field.name} = {text}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"
