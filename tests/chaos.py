"""Kill runs with kill -9 at random moments, resume them, and compare with runs that were left alone.

    python tests/chaos.py --kills 20            the six methods in turn, each killed again and again until it ends
    python tests/chaos.py --kills 200 --seed 1

A run is whole if its weights are the same bytes, and metrics.jsonl and samples.jsonl the same lines, none lost and none twice. Prints a
table of counts; exits with 1 if anything was lost.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

METHODS = ("sft", "reward-model", "dpo", "ppo", "grpo", "pairwise-grpo")
OPTIONS = (
    "--preset toy --steps 12 --prompts-per-step 4 --eval-limit 4 --save-every 2 --eval-every 5 --keep-tokens-every 3"
)


def main() -> None:
    """Kill, resume, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    draw, counted = random.Random(chosen.seed), Counter[str]()
    with TemporaryDirectory() as folder:
        whole: dict[str, Path] = {}
        while counted["kills"] < chosen.kills:
            method = METHODS[counted["runs"] % len(METHODS)]
            if method not in whole:
                whole[method] = Path(folder) / f"whole-{method}"
                finished = command(method, whole[method]).wait()
                assert finished == 0, f"{method} does not run at all"
            run = Path(folder) / f"run-{counted['runs']}"
            one_run(method, run, draw, counted)
            counted["runs"] += 1
            for what in differences(whole[method], run):
                counted[f"lost: {what}"] += 1
                print(f"{method}: {what} differs from the run that was left alone", flush=True)
            lost = sum(n for name, n in counted.items() if name.startswith("lost"))
            print(f"{counted['runs']} runs, {counted['kills']} kills, lost {lost}: {method}", flush=True)
    print(json.dumps(counted, indent=2))
    sys.exit(any(name.startswith("lost") for name in counted))


def one_run(method: str, run: Path, draw: random.Random, counted: Counter[str]) -> None:
    """Start it and kill it until it ends by itself; a kill before its directory is there starts it anew."""
    while not (run / "summary.json").exists():
        began = (run / "config.toml").exists()
        process = command(method, run, resume=began)
        time.sleep(draw.uniform(0.0, 4.0))
        waited = 0.0
        while process.poll() is None and waited < draw.expovariate(0.5):  # past the imports, into the steps
            time.sleep(0.05)
            waited += 0.05
        if process.poll() is None:
            process.kill()
            counted["kills"] += 1
            counted["kills before the first step" if not (run / "metrics.jsonl").exists() else "kills later"] += 1
        elif process.returncode != 0:
            counted["lost: a resume that failed"] += 1
            print(process.communicate()[1], flush=True)
            return
        process.wait()
        counted["half-written checkpoints found"] += len(list(run.glob("checkpoints/.step-*")))


def command(method: str, run: Path, resume: bool = False) -> subprocess.Popen[str]:
    """A process of the command line."""
    words = ["resume", str(run)] if resume else [method, *OPTIONS.split(), "--out", str(run)]
    command = [sys.executable, "-m", "trivet.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def differences(whole: Path, run: Path) -> list[str]:
    """What is not the same in a run that was killed, the times aside."""
    found = []
    weights = [(one / "model" / "model.safetensors").read_bytes() for one in (whole, run)]
    found += ["weights"] if weights[0] != weights[1] else []
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [[untimed(line) for line in (one / name).read_text().splitlines()] for one in (whole, run)]
        found += [name] if lines[0] != lines[1] else []
    return found


def untimed(line: str) -> dict[str, object]:
    """The numbers without those of the clock."""
    return {key: x for key, x in json.loads(line).items() if key != "seconds" and not key.startswith("time/")}


if __name__ == "__main__":
    main()
