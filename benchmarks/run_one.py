"""One side of one workload in this process; prints one JSON line.

    python benchmarks/run_one.py trivet|trl sft|reward-model|dpo|grpo|ppo T|S|M [--lengths full|len40] [--steps 3]

A warm-up step, then the timed ones. Peak memory is that of the whole process (VmHWM). PPO of TRL wants TRL 1.12.0 first on
PYTHONPATH. compare.py runs this for everything; run it by itself to look at one number.
"""

import argparse
import json
import statistics
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import workloads


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("side", choices=("trivet", "trl"))
    parser.add_argument("method", choices=workloads.METHODS)
    parser.add_argument("size", choices=tuple(workloads.SHAPES))
    parser.add_argument(
        "--lengths", choices=tuple(workloads.MEAN_LENGTH), default="full", help="of completions"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--microbatch",
        type=int,
        default=0,
        help="tokens (trivet) or sequences (trl); 0: as configured",
    )
    parser.add_argument(
        "--precompute", action="store_true", help="DPO of TRL: precompute_ref_log_probs"
    )
    chosen = parser.parse_args()
    with redirect_stdout(sys.stderr):
        result = run(chosen)
    print(json.dumps(result))


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Take the steps and sum up the timed ones."""
    count = chosen.warmup + chosen.steps
    workload = (
        chosen.method,
        chosen.size,
        chosen.lengths,
        count,
        chosen.precision,
        chosen.microbatch,
    )
    if chosen.side == "trivet":
        import trivet_side

        taken, rows = [], []
        for step, part in trivet_side.steps(*workload):
            taken.append(step)
            rows += part
    else:
        import trl_side

        taken, rows = trl_side.steps(*workload, chosen.precompute)
    tokens = [tokens_of(chosen, step, rows[8 * k : 8 * k + 8]) for k, step in enumerate(taken)]
    timed, counted = taken[chosen.warmup :], tokens[chosen.warmup :]
    seconds = [step["seconds"] for step in timed]
    table = (
        taken[0]["parts"].get("reference table", 0.0) / count
    )  # a step's share of a pass made once before the first
    floors = [workloads.floor_seconds(chosen.method, chosen.size, step) for step in counted]
    return {
        "side": chosen.side,
        "method": chosen.method,
        "size": chosen.size,
        "lengths": chosen.lengths if chosen.method in ("grpo", "ppo") else None,
        "precision": chosen.precision,
        "seconds": [round(value, 4) for value in seconds],
        "median_seconds": round(statistics.median(seconds), 4),
        "reference_seconds": round(table, 4),
        "median_seconds_with_reference": round(statistics.median(seconds) + table, 4),
        "first_step_seconds": round(taken[0]["seconds"], 3),
        "tokens_per_second": round(
            sum(step.sequences for step in counted) / (sum(seconds) + table * len(seconds)), 1
        ),
        "tokens": [vars(step) | {"unique": step.unique} for step in counted],
        "floor_seconds": round(statistics.median(floors), 4),
        "parts": median_parts(timed),
        "peak_mb": round(peak_megabytes(), 1),
        "versions": versions(chosen.side),
    }


def tokens_of(
    chosen: argparse.Namespace, step: dict[str, Any], rows: list[workloads.Row]
) -> workloads.Tokens:
    """The tokens of a step, with the completions as long as they were sampled."""
    lengths = step["lengths"]
    if chosen.side == "trl" and chosen.method == "ppo":  # its reward saw prompts too
        lengths = [
            n - len(rows[b // workloads.COMPLETIONS].prompt_ids) for b, n in enumerate(lengths)
        ]
    return workloads.count(rows, lengths)


def median_parts(timed: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each part of a step, and of what is left."""
    names = list(dict.fromkeys(name for step in timed for name in step["parts"]))
    if not names:
        return {}
    parts = {
        name: statistics.median(step["parts"].get(name, 0.0) for step in timed) for name in names
    }
    parts["rest"] = statistics.median(
        step["seconds"] - sum(step["parts"].values()) for step in timed
    )
    return {name: round(value, 4) for name, value in parts.items()}


def peak_megabytes() -> float:
    """The most resident memory this process has had, or of a GPU the most that its tensors had, in MB."""
    if workloads.DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def versions(side: str) -> dict[str, str]:
    """Of what was measured."""
    import transformers

    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }
    if side == "trl":
        import trl

        found["trl"] = trl.__version__
    return found


if __name__ == "__main__":
    main()
