"""trivet compare: a table with one row per run, of measured numbers instead of adjectives."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trivet.errors import InputError
from trivet.store.reading import common_folder, require_run

METHODS = {  # method: objective, reward model needed, stages, best for
    "sft": ("-log π(y_w)", "no", "SFT", "answers worth copying"),
    "reward-model": (
        "Bradley-Terry on a score",
        "is one",
        "SFT, RM",
        "preferences used again and again",
    ),
    "dpo": (
        "Bradley-Terry on β log π/π_ref",
        "no",
        "SFT, DPO",
        "preference pairs, nothing to sample",
    ),
    "ppo": (
        "clipped ρA, critic, KL charge",
        "no: any reward",
        "SFT, RM, PPO",
        "credit within long answers",
    ),
    "grpo": (
        "-A log π, A = R - mean, + KL",
        "no: any reward",
        "SFT, (RM,) GRPO",
        "rewards a program checks",
    ),
    "pairwise-grpo": (
        "Bradley-Terry on ranked pairs",
        "no: any ranking",
        "SFT, (RM,) pairwise",
        "rewards good as a ranking only",
    ),
}
COLUMNS = {  # held-out metric: column heading
    "gold": "gold reward",
    "learned_reward": "learned",
    "reward": "reward",
    "kl": "KL, nats",
    "win_rate": "win rate",
    "length": "length",
    "accuracy": "pairs right",
    "loss": "loss",
}


def compare(args: list[str]) -> None:
    """trivet compare RUN [RUN ...]: print the table of these runs."""
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(
            "trivet compare RUN [RUN ...]\n\nPrint one row per run: the method, its last held-out "
            "numbers and its cost. RUN is a run directory or a folder of them (runs/quickstart)."
        )
        return
    console = wide_console()
    for table in tables([run for arg in args for run in runs_in(Path(arg))]):
        console.print(table)


def runs_in(path: Path) -> list[Path]:
    """The path itself or, if it is a folder of runs, the run directories in it, ordered by
    method.
    """
    inside = [child.parent for child in path.glob("*/config.toml")]
    if (path / "config.toml").exists() or not inside:
        return [path]
    order = list(METHODS)
    return sorted(
        inside,
        key=lambda run: (order.index(run.name) if run.name in order else len(order), run.name),
    )


def place_of(runs: list[Path], name: str) -> Path:
    """The path, without suffix, of a file about these runs. Different sets of runs get different
    paths, so that no file overwrites another.
    """
    if len(runs) == 1:
        return runs[0] / name
    folder = common_folder(runs)
    if {run.resolve() for run in runs} == {run.resolve() for run in runs_in(folder)}:
        return folder / name
    names = "-".join(os.path.relpath(run, folder).replace(os.sep, "-") for run in runs)
    names = (
        names
        if len(names) < 150
        else f"{names[:140]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    )
    return folder / f"{name}-{names}"


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    path = run / "summary.json"
    if not path.exists():
        require_run(run)
        raise InputError(f"{run} has not finished: it has no {path.name}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON ({error}); was it edited?") from None


def tables(runs: list[Path]) -> tuple[Table, Table]:
    """Two tables: the last held-out numbers of the runs, and each method with the cost of its last
    stage.
    """
    summaries = [read_summary(run) for run in runs]
    names = [label(run, summary, runs) for run, summary in zip(runs, summaries, strict=True)]
    heldout = [heldout_numbers(summary) for summary in summaries]
    shown = [key for key in COLUMNS if any(key in numbers for numbers in heldout)]
    measured = Table(title="held-out numbers and tokens", title_justify="left", header_style="bold")
    measured.add_column("method", overflow="fold")
    for title in [*(COLUMNS[key] for key in shown), "generated", "trained"]:
        measured.add_column(title, justify="right", overflow="fold")
    for name, summary, numbers in zip(names, summaries, heldout, strict=True):
        tokens = [summary[f"tokens_{kind}"] for kind in ("generated", "trained")]
        measured.add_row(
            name, *cells(numbers, shown), *(f"{n / 1000:,.0f}k" if n else "-" for n in tokens)
        )
    about = Table(
        title="the methods and the cost of their last stage",
        title_justify="left",
        header_style="bold",
    )
    for title in ("method", "objective", "reward model", "stages", "memory", "compute", "best for"):
        about.add_column(title, overflow="fold")
    for name, summary in zip(names, summaries, strict=True):
        objective, needed, stages, best = METHODS.get(summary["method"], ("", "", "", ""))
        about.add_row(name, objective, needed, stages, memory(summary), compute(summary), best)
    return measured, about


def heldout_numbers(summary: dict[str, Any]) -> dict[str, float]:
    """The last held-out numbers, with the recipes' different metric names mapped to the keys of
    COLUMNS.
    """
    numbers = {key.removeprefix("eval/"): value for key, value in summary["eval"].items()}
    for key, name in (("accuracy", "rewards/accuracies"), ("length", "completions/mean_length")):
        if name in numbers:
            numbers.setdefault(key, numbers[name])
    if "gold" in numbers:  # the same judge for all runs, unlike a recipe's own reward
        numbers.pop("reward", None)
    if {"gold", "accuracy"} & set(numbers):
        numbers.pop("loss", None)
    return numbers


def cells(numbers: dict[str, Any], shown: Sequence[str]) -> list[str]:
    """The held-out numbers of a run under these keys of COLUMNS, formatted for a table; '' if
    missing or not finite.
    """
    finite = {
        key: value
        for key, value in numbers.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    texts = {key: f"{value:.3g}" for key, value in finite.items()}
    if {"gold", "gold_se"} <= finite.keys():
        texts["gold"] = f"{finite['gold']:.2f} ± {finite['gold_se']:.2f}"
    return [texts.get(key, "") for key in shown]


def label(run: Path, summary: dict[str, Any], runs: list[Path]) -> str:
    """The run's folder name (its whole path if another run has the same name), followed by the
    method unless that is the folder's name.
    """
    name = run.name if sum(other.name == run.name for other in runs) == 1 else str(run)
    return escape(name if run.name == summary["method"] else f"{name} ({summary['method']})")


def memory(summary: dict[str, Any]) -> str:
    """Peak memory in MiB."""
    return f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"


def compute(summary: dict[str, Any]) -> str:
    """Wall time and thousands of tokens sampled and trained."""
    tokens = (summary["tokens_generated"] + summary["tokens_trained"]) / 1000
    return f"{summary['seconds']:.0f} s, {tokens:,.0f}k tok"


def wide_console() -> Console:
    """A console as wide as the terminal; without a terminal, wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=150)
