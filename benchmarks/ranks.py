"""Memory of every rank of GRPO under torchrun: all weights and an adapter, on 1, 2 and 4 processes.

    python benchmarks/ranks.py --out runs/ranks --size M

The base has random weights (shape M of the benchmarks, 134.5 M parameters). Two steps of 4 completions of 8 tokens, so that weights dominate.
Prints a line a rank: what its own shards of models, gradients and moments take, and the most resident memory of its process.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from adapters import make_base

from trivet.recipes import grpo
from trivet.runner import launch as launching
from trivet.runner.memory import bytes_by_part
from trivet.toy import STORIES


def main() -> None:
    """Every case, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("runs/ranks"))
    parser.add_argument("--size", default="M", help="T, S or M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    chosen = parser.parse_args()
    if "RANK" in os.environ:
        return measure(chosen.out, chosen.rank)
    if not (chosen.out / "base").exists():
        make_base(chosen.out / "base", chosen.size)
    for rank in (0, chosen.rank):
        for size in chosen.processes:
            out = chosen.out / f"{'lora' if rank else 'all weights'} on {size}"
            torchrun = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(size),
            ]
            subprocess.run(
                [*torchrun, __file__, "--out", str(out), "--rank", str(rank)], check=True
            )
            for file in sorted(out.glob("rank-*.json")):
                found = {
                    name: f"{size / 2**20:,.0f}"
                    for name, size in json.loads(file.read_text()).items()
                }
                print(
                    out.name,
                    file.stem,
                    *(f"{name} {size}" for name, size in found.items()),
                    flush=True,
                )
    return None


def measure(out: Path, rank: int) -> None:
    """One run as this rank."""

    def noted(model: Any, parts: Any, rewards: Any, program: int, peak: int) -> dict[str, int]:
        found = bytes_by_part(model, parts, rewards, program, peak)
        out.mkdir(parents=True, exist_ok=True)
        (out / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found | {"peak": peak}))
        return found

    launching.bytes_by_part = noted
    sizes: dict[str, Any] = {
        "steps": 2,
        "prompts_per_step": 4,
        "group_size": 4,
        "max_completion_tokens": 8,
    }
    sizes |= {
        "max_prompt_tokens": 16,
        "truncate_prompts": True,
        "microbatch_tokens": 64,
        "eval_fraction": 0.0,
    }
    given = {
        "model": str(out.parent / "base"),
        "data": STORIES["data"],
        "out": str(out / "run"),
        "lora": rank,
    }
    launching.launch(
        grpo.Config(**given, **sizes, reward=("trivet.toy.stories:gold",), quiet=True, device="cpu")
    )


if __name__ == "__main__":
    main()
