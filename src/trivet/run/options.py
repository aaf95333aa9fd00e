"""The options that every recipe has; each recipe's Config adds its own few."""

import dataclasses
import json
import math
import os
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


def to_toml(config: Any) -> str:
    """The config as TOML that read_toml gives back."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        lines.append(f"{field.name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines) + "\n"


INF = math.inf
LIMITS = {
    **dict.fromkeys(("prompts_per_step", "max_prompt_tokens", "max_completion_tokens", "microbatch_tokens"), (1, INF)),
    **dict.fromkeys(("group_size", "epochs_per_batch", "minibatches"), (1, INF)),
    **dict.fromkeys(("epochs", "temperature", "max_grad_norm"), (1e-6, INF)),
    **{
        "gamma": (0, 1),
        "lam": (0, 1),
        "eval_fraction": (0, 0.999),
        "seed": (0, 2**63 - 1),
        "reward_weights": (-INF, INF),
    },
}


def check(config: Options, method: str) -> None:
    """InputError for a value that can't be meant. Numbers are finite and, where LIMITS says nothing else, at least 0."""
    for name, value in vars(config).items():
        low, high = LIMITS.get(name, (0, INF))
        if name == "group_size" and method != "ppo":
            low = 2  # the completions of a prompt are compared with each other
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, str) and not (low <= number <= high and math.isfinite(number)):
                limits = f"at least {low:g} and {f'at most {high:g}' if high < INF else 'finite'}"
                raise InputError(f"--{name.replace('_', '-')} is {number}; it must be {limits}")
    if config.out and (Path(config.out) / "config.toml").exists():
        raise InputError(f"--out {config.out} already holds a run; choose another directory, or remove it first")
    out = Path(config.out or "runs").absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {config.out}: {there} is not a directory that can be written to; choose another")
