"""The options that every recipe has; each recipe's Config adds its own few."""

import dataclasses
import difflib
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trivet.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, on what, for how long, where to."""

    model: str = ""
    """Hugging Face name or folder of the model to start from."""
    data: str = ""
    """File (.jsonl, .json, .csv, .parquet, also .gz) or hub name of the training rows."""
    out: str = ""
    """Run directory to make; default runs/METHOD-DATE-TIME."""
    eval_data: str = ""
    """Held-out rows, in the same formats; without it a share of the prompts of --data is held out."""
    eval_fraction: float = 0.05
    """Share of the prompts of --data to hold out (all rows of a prompt together)."""
    eval_every: int = 0
    """Evaluate every so many steps; 0 evaluates after the last step only."""
    eval_limit: int = 256
    """Evaluate at most this many held-out examples."""
    steps: int = 0
    """Optimizer steps to take; 0 follows --epochs."""
    epochs: float = 1.0
    """Passes over the data, where --steps is 0."""
    lr: float = 1e-5
    """Learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to --lr."""
    lr_decay: bool = False
    """Let the learning rate fall linearly to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Scale a larger gradient down to this norm."""
    seed: int = 0
    """Seed of the data order, the split and the sampling."""
    prompts_per_step: int = 8
    """Prompts (rows, for preferences and supervised data) of one step."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, and counted."""
    max_completion_tokens: int = 256
    """Sampling stops here; longer completions in the data are cut, and counted."""
    microbatch_tokens: int = 8192
    """Most tokens to go through the model at once: lower it if memory runs out. The result does not depend on it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights are kept in float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    chat_template: str = ""
    """Replace the tokenizer's chat template: 'plain' (Role: text) or a Jinja file."""
    from_scratch: bool = False
    """Start from random weights in the shape of the model's config.json."""
    save_every: int = 0
    """Also save the model every so many steps, under checkpoints/."""


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
