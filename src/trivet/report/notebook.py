"""Launch runs from Python. A notebook shows the run's progress, and displays a run directory as its
last numbers and curves.
"""

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

CURVES = ("reward", "loss", "rewards/accuracies", "accuracy", "kl")  # drawn if the run has them


class RunDirectory(type(Path())):  # type: ignore[misc]  the Path class of this system
    """The path of a run directory, which a notebook displays as numbers and curves."""

    def _repr_html_(self) -> str:
        return run_html(self)


def launch(config: Options, watch: Watch | None = None) -> Path:
    """Train with the recipe that this config belongs to, and return the run directory, a Path that
    a notebook displays.

    It holds config.toml, run.json, metrics.jsonl (one line per step), samples.jsonl, summary.json,
    checkpoints/ and model/. watch: called after each step with the launch, the step and its
    metrics; notebooks show progress by default.
    """
    with _watch_context(watch) as watching:
        return RunDirectory(launching.launch(config, watching))


def resume(out: str | Path, /, watch: Watch | None = None, **options: Any) -> Path:
    """Continue a run that was stopped or killed from its newest checkpoint, with bit-identical
    results, and return its directory.

    options: the options that may change: generate_with, vllm, track, save_every, keep,
    microbatch_tokens.
    """
    with _watch_context(watch) as watching:
        return RunDirectory(resuming.resume(out, watching, **options))


def _watch_context(watch: Watch | None) -> Any:
    if watch is None and "ipykernel" in sys.modules:
        return closing(Terminal())
    return nullcontext(watch)


def run_html(run: Path) -> str:
    """The HTML that a notebook displays for this run."""
    summary, metrics = read_summary(run), read_metrics(run)
    numbers = heldout_numbers(summary)
    cells = {
        f"held-out {title}": f"{numbers[key]:.4g}"
        for key, title in COLUMNS.items()
        if key in numbers
    }
    cells |= {
        "steps": f"{summary['steps']}",
        "time": f"{summary['seconds']:.0f} s",
        "memory": memory(summary),
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in cells.items()
    )
    curves = [name for name in CURVES if any(name in line for line in metrics)]
    title = f"<b>{escape(summary['method'])}</b> · {escape(str(run))}"
    return f"{title}<table>{rows}</table>{_curves_svg(run, curves)}"


def _curves_svg(run: Path, curves: list[str]) -> str:
    with TemporaryDirectory() as folder:
        try:
            _, picture = draw_metrics([run], curves, "step", 5, f"{folder}/curves")
        except InputError as error:  # matplotlib is not installed
            return f"<p>{escape(str(error))}</p>"
        svg = picture.read_text(encoding="utf-8")
    return svg[svg.index("<svg") :]
