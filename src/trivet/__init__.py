"""Trivet post-trains language models on preferences and rewards.

It stands on three legs that never import each other: trivet.rewards (what is good?),
trivet.generation (what does the policy say?) and trivet.optimization (how does it change?). They
meet in trivet.recipes, one short file per method.

    import trivet
    from trivet.recipes import grpo

    trivet.launch(
        grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",))
    )
"""

import importlib
import os
from typing import Any

# by default torch's threads spin for a long time, which is slow when other processes need the cores
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # torch reads this when it is first imported

# the public names in reading order, imported on first use so that the command line starts quickly
_MODULES = {
    "Example": "trivet.batch",
    "Groups": "trivet.batch",
    "Rollouts": "trivet.batch",
    "collate": "trivet.batch",
    "load_policy": "trivet.model.load",
    "load_scorer": "trivet.model.load",
    "load_tokenizer": "trivet.model.text",
    "token_logprobs": "trivet.model.forward",
    "scores": "trivet.model.scalar",
    "values": "trivet.model.scalar",
    "shares_prefix": "trivet.model.forward",
    "Engine": "trivet.generation.engine",
    "launch": "trivet.report.notebook",
    "resume": "trivet.report.notebook",
    "InputError": "trivet.errors",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'trivet' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
