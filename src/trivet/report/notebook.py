"""Launching from Python: a notebook shows the run's progress, and a run directory as its last numbers and its curves."""

import sys
from contextlib import closing, nullcontext
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trivet.errors import InputError
from trivet.report.compare import COLUMNS, heldout_numbers, memory, read_summary
from trivet.report.plots import draw_metrics
from trivet.report.terminal import Terminal
from trivet.runner import launch as launching
from trivet.runner import resume as resuming
from trivet.runner.launch import Watch
from trivet.step.options import Options
from trivet.store.reading import read_metrics

CURVES = ("reward", "loss", "rewards/accuracies", "accuracy", "kl")  # drawn where the run has them


class RunDirectory(type(Path())):  # type: ignore[misc]  a Path of this system
    """The path of a run directory, which displays itself in a notebook."""

    def _repr_html_(self) -> str:
        return shown(self)


def launch(config: Options, watch: Watch | None = None) -> Path:
    """Train by the recipe that this config belongs to; returns the run directory, a Path that a notebook displays.

    It holds config.toml, run.json, metrics.jsonl (a line a step), samples.jsonl, summary.json, checkpoints/ and model/.
    watch: called with the launch, the step and its metrics after each step; in a notebook progress is shown by default.
    """
    with _watched(watch) as watching:
        return RunDirectory(launching.launch(config, watching))


def resume(out: str | Path, /, watch: Watch | None = None, **options: Any) -> Path:
    """Go on with a run that was stopped or killed, from its newest checkpoint, to the same bits; returns its directory.

    options: what may change on the way, by name: generate_with, vllm, track, save_every, keep, microbatch_tokens.
    """
    with _watched(watch) as watching:
        return RunDirectory(resuming.resume(out, watching, **options))


def _watched(watch: Watch | None) -> Any:
    if watch is None and "ipykernel" in sys.modules:
        return closing(Terminal())
    return nullcontext(watch)


def shown(run: Path) -> str:
    """The HTML that a notebook displays for this run."""
    summary, there = read_summary(run), read_metrics(run)
    numbers = heldout_numbers(summary)
    cells = {f"held-out {title}": f"{numbers[key]:.4g}" for key, title in COLUMNS.items() if key in numbers}
    cells |= {"steps": f"{summary['steps']}", "time": f"{summary['seconds']:.0f} s", "memory": memory(summary)}
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in cells.items())
    curves = [name for name in CURVES if any(name in line for line in there)]
    return f"<b>{escape(summary['method'])}</b> · {escape(str(run))}<table>{rows}</table>{_drawn(run, curves)}"


def _drawn(run: Path, curves: list[str]) -> str:
    with TemporaryDirectory() as folder:
        try:
            _, picture = draw_metrics([run], curves, "step", 5, f"{folder}/curves")
        except InputError as error:  # the package that draws is not installed
            return f"<p>{escape(str(error))}</p>"
        drawn = picture.read_text(encoding="utf-8")
    return drawn[drawn.index("<svg") :]
