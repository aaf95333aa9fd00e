"""What generating ahead saves: seconds per step at --max-staleness 0 and 1, where sampling and training take as long as each other.

    python benchmarks/overlap.py

The generator is a stub that answers after 0.4 s; a reward that sleeps for 0.4 s stands for training. Both in turn, three times.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from stub_vllm import Stub
from trivet.model.load import load_policy
from trivet.recipes import grpo
from trivet.runner.launch import launch
from trivet.toy import ARITHMETIC

LATENCY, STEPS, ROUNDS = 0.4, 9, 3


def slow(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """A reward that takes as long as generation."""
    time.sleep(LATENCY)
    return [float(len(x)) for x in completions]


def seconds_per_step(folder: Path, ahead: int) -> float:
    """Of the steps between the first and the last, for which nothing is left to generate."""
    stub, out = (
        Stub(str(folder / "model"), latency=LATENCY),
        Path(tempfile.mkdtemp(dir=folder)) / "run",
    )
    options = dict(
        ARITHMETIC, group_size=2, prompts_per_step=8, steps=STEPS, eval_data="", eval_fraction=0.0
    )
    options |= {
        "reward": (f"{__file__}:slow",),
        "generate_with": (stub.url,),
        "max_staleness": ahead,
    }
    launch(grpo.Config(**options, out=str(out)), lambda launched, step, metrics: None)
    stub.close()
    at = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (at[-2] - at[0]) / (STEPS - 2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        load_policy(ARITHMETIC["model"], from_scratch=True).save_pretrained(f"{name}/model")
        found = [[seconds_per_step(Path(name), ahead) for ahead in (0, 1)] for _ in range(ROUNDS)]
    plain, ahead = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"waiting {plain:.2f} s a step, ahead {ahead:.2f} s: {ahead / plain:.2f} of it")
