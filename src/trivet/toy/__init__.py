"""The bundled toy tasks: small models, their tokenizers and data that need no download. Presets
start from these options.
"""

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = f"{HERE}/arithmetic/problems.jsonl"  # the whole task, for both training and evaluation
STORIES: Any = {
    "model": f"{HERE}/stories",
    "data": f"{HERE}/stories/preferences.jsonl.gz",
    "max_completion_tokens": 64,
}
ARITHMETIC: Any = {
    "model": f"{HERE}/arithmetic",
    "from_scratch": True,
    "data": TABLE,
    "eval_data": TABLE,
}
ARITHMETIC |= {"max_completion_tokens": 2, "prompts_per_step": 55}
