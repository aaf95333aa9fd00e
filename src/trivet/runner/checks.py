"""Checks of option values, made before anything is loaded."""

import math
import os
import re
from pathlib import Path

from trivet.errors import InputError
from trivet.step.options import Options
from trivet.store.trackers import require

INF = math.inf
LIMITS = {
    **dict.fromkeys(("prompts_per_step", "max_prompt_tokens", "max_completion_tokens"), (1, INF)),
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


def check(config: Options, method: str, *, again: bool = False) -> None:
    """Raise an InputError for an invalid value. Numbers must be finite and, unless LIMITS says
    otherwise, at least 0. again: the run directory may exist already.
    """
    for name, value in vars(config).items():
        low, high = LIMITS.get(name, (0, INF))
        if name == "group_size" and method != "ppo":
            low = 2  # a prompt's completions are compared with each other
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, str) and re.search("[\0\ud800-\udfff]", number):
                raise InputError(
                    f"--{name.replace('_', '-')} is {number!a:.80}, which is not valid UTF-8 text; "
                    "rename it"
                )
            if not isinstance(number, str) and not (
                low <= number <= high and math.isfinite(number)
            ):
                limits = f"at least {low:g} and {f'at most {high:g}' if high < INF else 'finite'}"
                raise InputError(f"--{name.replace('_', '-')} is {number}; it must be {limits}")
    require(config.track)
    if not again and config.out and (Path(config.out) / "config.toml").exists():
        advice = f"choose another directory, or continue it: trivet resume {config.out}"
        raise InputError(f"--out {config.out} already holds a run; {advice}")
    out = Path(config.out or "runs").absolute()
    parent = next(path for path in (out, *out.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"--out {config.out}: {parent} is not a writable directory; choose another one"
        )
