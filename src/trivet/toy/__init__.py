"""The embedded default: small models, their tokenizers and tasks that need no download. Presets start from these options."""

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORIES: dict[str, Any] = {
    "model": str(HERE / "stories"),
    "data": str(HERE / "stories" / "preferences.jsonl.gz"),
    "max_completion_tokens": 64,
}
ARITHMETIC: dict[str, Any] = {
    "model": str(HERE / "arithmetic"),
    "data": str(HERE / "arithmetic" / "problems.jsonl"),
    "from_scratch": True,
    "eval_data": str(HERE / "arithmetic" / "problems.jsonl"),  # the task is the table itself
    "max_completion_tokens": 2,
    "prompts_per_step": 55,
}
