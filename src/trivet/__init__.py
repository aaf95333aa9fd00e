"""Trivet post-trains language models on preferences and rewards.

Three legs that never import each other: trivet.rewards (what is good?), trivet.generation (what does the policy say?),
trivet.optimization (how does it change?); trivet.recipes is where they meet, one short file for each method.

    import trivet
    from trivet.recipes import grpo

    trivet.launch(grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",)))
"""

import importlib
import os
from typing import Any

# torch's threads spin for long, and are slow where another process wants a core
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported, so after this

_WHERE = {  # the public names, in reading order; imported when they are asked for, so that the command line is there at once
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
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'trivet' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *_WHERE]
