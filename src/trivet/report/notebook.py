"""What a notebook shows of a run directory: its last numbers, and its curves."""

from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from trivet.errors import InputError
from trivet.report.compare import COLUMNS, heldout_numbers, memory, read_summary
from trivet.report.plots import draw_metrics
from trivet.run.reading import read_metrics

CURVES = ("reward", "loss", "rewards/accuracies", "accuracy", "kl")  # drawn where the run has them


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
