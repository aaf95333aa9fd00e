"""The method table: one row a run, measured numbers where others print adjectives."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trivet.errors import InputError

METHODS = {  # method: objective, reward model needed, stages, best for
    "sft": ("-log pi(y_w|x)", "no", "SFT", "good answers exist to copy"),
    "reward-model": ("Bradley-Terry on a score", "it is one", "SFT → RM", "preferences to be used again and again"),
    "dpo": ("Bradley-Terry on beta log pi/pi_ref", "no", "SFT → DPO", "preference pairs, nothing to sample"),
    "ppo": (
        "clipped surrogate, critic, KL charge",
        "yes, or a rule",
        "SFT → RM → PPO",
        "long credit assignment, noisy rewards",
    ),
    "grpo": (
        "-A log pi, A = R - group mean, + KL",
        "yes, or a rule",
        "SFT (→ RM) → GRPO",
        "rewards a program can check",
    ),
    "pairwise-grpo": (
        "Bradley-Terry on all ranked pairs",
        "yes, or a ranking",
        "SFT (→ RM) → pairwise",
        "rewards trusted as a ranking only",
    ),
}
FIRST = (
    "gold",
    "gold_se",
    "learned_reward",
    "kl",
    "win_rate",
    "length",
    "accuracy",
    "reward",
    "loss",
)  # held-out columns, in order


def compare(args: list[str]) -> None:
    """trivet compare RUN [RUN ...]: print the table of these runs."""
    if not args or any(arg in ("-h", "--help") for arg in args):
        print(
            "trivet compare RUN [RUN ...]\n\nOne row a run directory: the method, its last held-out numbers, and what it cost."
        )
        return
    console = Console()
    for table in tables([Path(arg) for arg in args]):
        console.print(table)


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    path = run / "summary.json"
    if not path.exists():
        state = "has not finished" if (run / "config.toml").exists() else "is not a run directory"
        raise InputError(f"{run} {state}: there is no {path.name} in it")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); was it edited?") from None


def tables(runs: list[Path]) -> tuple[Table, Table]:
    """What each method is, and what it did and cost."""
    summaries = [(run.name, read_summary(run)) for run in runs]
    about = Table(title="the methods", title_justify="left", header_style="bold")
    for title in ("method", "objective", "reward model needed", "stages", "memory", "compute", "best for"):
        about.add_column(title, overflow="fold")
    for name, summary in summaries:
        objective, needed, stages, best = METHODS.get(summary["method"], ("", "", "", ""))
        about.add_row(label(name, summary), objective, needed, stages, memory(summary), compute(summary), best)
    keys = {key for _, summary in summaries for key in short_eval(summary)}
    ordered = [key for key in FIRST if key in keys and key != "gold_se"] + sorted(keys - set(FIRST))
    measured = Table(title="held-out numbers and cost", title_justify="left", header_style="bold")
    measured.add_column("method")
    for key in [*ordered, "seconds", "peak memory", "generated", "trained"]:
        measured.add_column(key.replace("_", " "), justify="right")
    for name, summary in summaries:
        numbers = short_eval(summary)
        cells = [f"{numbers[key]:.3g}" if key in numbers else "" for key in ordered]
        if "gold_se" in numbers and "gold" in ordered:
            cells[ordered.index("gold")] += f" ±{numbers['gold_se']:.2f}"
        tokens = [f"{summary[f'tokens_{kind}']:,}" for kind in ("generated", "trained")]
        measured.add_row(label(name, summary), *cells, f"{summary['seconds']:.1f}", memory(summary), *tokens)
    return about, measured


def short_eval(summary: dict[str, Any]) -> dict[str, float]:
    """Held-out numbers without their prefix; the many details of a recipe's own evaluation give way to quickstart's."""
    numbers = {key.removeprefix("eval/"): value for key, value in summary["eval"].items()}
    common = {key: value for key, value in numbers.items() if key in FIRST}
    if "rewards/accuracies" in numbers:
        common["accuracy"] = numbers["rewards/accuracies"]
    if "completions/mean_length" in numbers:
        common.setdefault("length", numbers["completions/mean_length"])
    if (
        "gold" in common
    ):  # one judge for all, so the recipe's own training reward and loss are left to its run directory
        common = {key: value for key, value in common.items() if key not in ("reward", "loss")}
    return common


def label(name: str, summary: dict[str, Any]) -> str:
    """The run's folder name, with the method where the name does not say it."""
    return escape(name if name == summary["method"] else f"{name} ({summary['method']})")


def memory(summary: dict[str, Any]) -> str:
    """Peak memory in MiB."""
    return f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"


def compute(summary: dict[str, Any]) -> str:
    """Wall time, and thousands of tokens sampled and trained."""
    tokens = (summary["tokens_generated"] + summary["tokens_trained"]) / 1000
    return f"{summary['seconds']:.0f} s, {tokens:,.0f}k tokens"
