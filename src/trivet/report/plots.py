"""trivet plot: draw any metrics of any runs as PNG and SVG."""

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.arguments import runs_and_options
from trivet.dependencies import require_extra
from trivet.errors import InputError
from trivet.report.compare import place_of, runs_in
from trivet.store.reading import method_of, read_metrics, require_run, run_names

COLORS = {  # Okabe and Ito's palette, which color-blind readers can tell apart
    "sft": "#000000",
    "reward-model": "#999999",
    "dpo": "#E69F00",
    "ppo": "#0072B2",
    "grpo": "#009E73",
    "pairwise-grpo": "#CC79A7",
}
MORE_COLORS = ("#56B4E9", "#D55E00", "#8A6FB0", "#7A6A00")  # for a second run of the same method
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (10, 3)), (0, (1, 2.5)))
MARKERS = "os^DvPX*"
LABELS = {  # metric: axis label; other metrics are labeled with their names
    "step": "step",
    "seconds": "wall time (s)",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient before clipping",
    "tokens/trained": "tokens trained in the step",
    "tokens/generated": "tokens generated in the step",
    "loss": "loss",
    "nll_loss": "-log π of the chosen side (nats per token)",
    "accuracy": "share of pairs ranked correctly",
    "margin": "margin of the scores",
    "mean_reward": "mean score",
    "rewards/chosen": "implicit reward, chosen side",
    "rewards/rejected": "implicit reward, rejected side",
    "rewards/margins": "margin of the implicit rewards",
    "rewards/accuracies": "share of pairs with a positive margin",
    "rewards/unscored": "unscored completions",
    "logps/chosen": "log π of the chosen side (nats per completion)",
    "logps/rejected": "log π of the rejected side (nats per completion)",
    "reward": "reward",
    "reward_std": "standard deviation of the reward",
    "frac_reward_zero_std": "share of groups whose rewards are equal",
    "pairs": "ranked pairs in the step",
    "kl": "KL to the reference (nats per completion)",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "completions/clipped_ratio": "share of completions cut",
    "sampling/logprob_difference/mean": "sampler vs. learner log-probs, mean (nats per token)",
    "sampling/logprob_difference/max": "sampler vs. learner log-probs, max (nats per token)",
    "clip_ratio": "share of tokens clipped",
    "objective/kl_coef": "KL coefficient β",
    "objective/rlhf_reward": "reward minus the KL charge",
    "value/explained_variance": "share of the returns' variance explained by the critic",
    "value/grad_norm": "norm of the critic's gradient",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draw any metrics of any runs in one figure, one line per run, as PNG and SVG. RUN is a run
    directory or a folder of them.
    """

    y: tuple[str, ...] = ()
    """Metrics in metrics.jsonl; each gets its own panel."""
    x: str = "step"
    """Horizontal axis: step, seconds, or a metric such as kl."""
    smooth: int = 5
    """Average each step with the ones before it, this many in all; 1 turns smoothing off. Held-out
    numbers are never smoothed.
    """
    out: str = ""
    """Output path without .png or .svg. Default: plot-METRIC in the run directory; for all runs of
    a folder, in that folder; for any other set of runs, with their names added.
    """


def plot(args: list[str]) -> None:
    """trivet plot RUN [RUN ...] --y METRIC [METRIC ...]"""
    paths, config = runs_and_options(Config, args, "trivet plot")
    runs = [run for path in paths for run in runs_in(path)]
    if not config.y:
        raise InputError("name a metric to draw, such as --y reward")
    if config.smooth < 1:
        raise InputError(f"--smooth is {config.smooth}; it must be at least 1")
    name = "plot-" + "-".join(config.y) + (f"-by-{config.x}" if config.x != "step" else "")
    out = str(config.out or place_of(runs, name.replace("/", "-")))
    out = out[:-4] if out.endswith((".png", ".svg")) else out
    print("  ·  ".join(map(str, draw_metrics(runs, config.y, config.x, config.smooth, out))))


def draw_metrics(
    runs: Sequence[Path], ys: Sequence[str], x: str, width: int, out: str
) -> list[Path]:
    """Write OUT.png and OUT.svg with a panel for each y and a line for each run that has it; return
    their paths.

    Errors: InputError for a metric that none of the runs has, naming similar ones.
    """
    require_extra("plot", "a picture")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    for run in runs:
        require_run(run)
    rows = [read_metrics(run) for run in runs]
    drawn = [[points(lines, x, y) for lines in rows] for y in ys]
    for y, lines in zip(ys, drawn, strict=True):
        if not any(lines):
            raise InputError(_missing(runs, rows, x, y))
        for run in (run for run, line in zip(runs, lines, strict=True) if not line):
            print(
                f"trivet plot: {run} has no steps with both {y} and {x}; left out of that panel",
                file=sys.stderr,
            )
    methods = [method_of(run) for run in runs]
    colors = run_colors(methods)
    paper: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "trivet",
        "font.size": 9,
        "savefig.dpi": 200,
    }
    paper |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(
        {**paper, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    ):
        figure = Figure(figsize=(6.4, 0.8 + 2.4 * len(ys)), layout="constrained")
        panels = figure.subplots(len(ys), sharex=True, squeeze=False)[:, 0]
        keys: dict[int, Line2D] = {}
        for panel, y, lines in zip(panels, ys, drawn, strict=True):
            held = y.startswith("eval/") or x.startswith("eval/")
            for i, line in enumerate(lines):
                if not line:
                    continue
                xs, values = zip(*line, strict=True)
                style: dict[str, Any] = {"color": colors[i], "linestyle": DASHES[i % len(DASHES)]}
                if width > 1 and not held:
                    if x in ("step", "seconds"):
                        panel.plot(xs, values, color=colors[i], alpha=0.25, linewidth=0.8)
                    xs, values = (
                        (xs if x in ("step", "seconds") else smooth(xs, width)),
                        smooth(values, width),
                    )
                style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4}
                every = 1 if held else (i * 3 % max(1, len(xs) // 8), max(1, len(xs) // 8))
                (keys[i],) = panel.plot(xs, values, **style, markevery=every, linewidth=1.5)
            label = axis_label(y)
            panel.set_ylabel(
                label if len(label) < 36 else label.replace(" (", "\n("), parse_math=False
            )
            panel.grid(alpha=0.2, linewidth=0.6)
            note = "as measured" if held or width == 1 else f"mean of the last {width} steps"
            note += (
                "; faint: each step" if note.startswith("mean") and x in ("step", "seconds") else ""
            )
            panel.set_title(note, loc="right", fontsize=7.5, color="0.35")
        panels[-1].set_xlabel(axis_label(x), parse_math=False)
        names = [name for i, name in enumerate(run_names(runs, methods)) if i in keys]
        columns = max(1, min(len(names), 90 // (max(map(len, names)) + 8)))
        legend = figure.legend(
            [keys[i] for i in sorted(keys)],
            names,
            loc="outside upper center",
            ncols=columns,
            handlelength=3.5,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        paths = [Path(f"{out}.png"), Path(f"{out}.svg")]
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0])
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def points(rows: Sequence[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of the lines that have both; null becomes NaN, a gap in the plot."""

    def number(value: Any) -> float:
        return float(value) if isinstance(value, int | float) else math.nan

    return [(number(row[x]), number(row[y])) for row in rows if x in row and y in row]


def axis_label(metric: str) -> str:
    """The axis label of a metric: what it is, with its unit."""
    if metric.startswith("eval/"):
        return f"held-out {axis_label(metric.removeprefix('eval/'))}"
    if metric.startswith("time/"):
        return f"{metric.removeprefix('time/')} (s per step)"
    if metric.startswith("rewards/") and metric.endswith("/mean"):
        return f"reward: {metric.removeprefix('rewards/').removesuffix('/mean')}"
    return LABELS.get(metric, metric)


def run_colors(methods: Sequence[str]) -> list[str]:
    """A color for each run: its method's, or another one if that is taken."""
    colors = list[str]()
    for method in methods:
        first = COLORS.get(method, MORE_COLORS[0])
        colors.append(
            next((color for color in (first, *MORE_COLORS) if color not in colors), first)
        )
    return colors


def _missing(runs: Sequence[Path], rows: Sequence[list[dict[str, Any]]], x: str, y: str) -> str:
    """A sentence that says why there is nothing to draw."""
    metrics = sorted({key for lines in rows for row in lines for key in row})
    where = str(runs[0]) if len(runs) == 1 else "these runs"
    if not metrics:
        return f"{where}: metrics.jsonl has no lines yet"
    absent = next((name for name in (y, x) if name not in metrics), "")
    if not absent:
        return f"{where}: no step has both {y} and {x}"
    lowercase = {key.lower(): key for key in metrics}
    near = sorted(
        (key for name, key in lowercase.items() if absent.lower() in name.split("/")), key=len
    )
    near += [lowercase[name] for name in difflib.get_close_matches(absent.lower(), lowercase, n=4)]
    choices = ", ".join(dict.fromkeys(near or metrics))
    return f"{where}: unknown metric '{absent}'; choose from {choices}"


def smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """The mean of the last `width` values at each point. NaN (a gap) stays NaN, and the means
    around it leave it out.
    """
    windows = [
        [v for v in values[max(0, i - width + 1) : i + 1] if v == v] for i in range(len(values))
    ]
    return [
        sum(window) / len(window) if value == value else value
        for value, window in zip(values, windows, strict=True)
    ]
