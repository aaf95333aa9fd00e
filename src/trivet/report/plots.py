"""Pictures of runs as PNG files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivet.report.compare import read_summary

COLORS = {  # Okabe and Ito's palette, told apart by color-blind readers too
    "sft": "#000000",
    "reward-model": "#999999",
    "dpo": "#E69F00",
    "ppo": "#0072B2",
    "grpo": "#009E73",
    "pairwise-grpo": "#CC79A7",
}


def draw_quickstart(out: Path, methods: Sequence[str]) -> list[Path]:
    """frontier.png: gold against KL; training.png: learned and gold reward by step; cost.png: time, memory, tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
    summaries = {method: read_summary(out / method) for method in (*methods, "reward-model")}
    steps = {method: read_metrics(out / method) for method in methods}

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for method in methods:
        held, trail = summaries[method]["eval"], [row for row in steps[method] if "rewards/gold/mean" in row]
        color = COLORS[method]
        if trail:
            kl, gold = ([row[key] for row in trail] for key in ("kl", "rewards/gold/mean"))
            axes.plot(smooth(kl), smooth(gold), color=color, alpha=0.45, linewidth=1.5)
        axes.errorbar(
            held["eval/kl"], held["eval/gold"], 2 * held["eval/gold_se"], fmt="o", color=color, capsize=3, label=method
        )
    axes.set(xlabel="KL to the SFT model (nats per story)", ylabel="gold reward", title="What the reward costs in KL")
    axes.legend(frameon=False)
    axes.text(
        0.99,
        0.01,
        "dots: held-out, ± 2 s.e.; lines: while training, mean of 5 steps (DPO samples nothing)",
        transform=axes.transAxes,
        ha="right",
        fontsize=8,
    )

    figure2, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True, layout="constrained")
    for method in methods:
        rows = [row for row in steps[method] if "rewards/gold/mean" in row]
        if rows:
            step = [row["step"] for row in rows]
            panels[0].plot(step, smooth([row["reward"] for row in rows]), color=COLORS[method], label=method)
            panels[1].plot(step, smooth([row["rewards/gold/mean"] for row in rows]), color=COLORS[method])
    panels[0].set(title="learned reward (trained on)", xlabel="step", ylabel="mean of the last 5 steps")
    panels[1].set(title="gold reward (the judge)", xlabel="step", ylabel="mean of the last 5 steps")
    panels[0].legend(frameon=False)

    figure3, bars = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    names = [name for name in COLORS if name in summaries][::-1]
    measured = {
        "wall time of this stage (s)": [summaries[name]["seconds"] for name in names],
        "peak memory (MiB)": [summaries[name]["peak_memory_bytes"] / 2**20 for name in names],
    }
    for axis, (title, numbers) in zip(bars[:2], measured.items(), strict=True):
        axis.barh(names, numbers, color=[COLORS[name] for name in names])
        axis.set(title=title)
    generated, trained = (
        [summaries[name][f"tokens_{kind}"] / 1e3 for name in names] for kind in ("generated", "trained")
    )
    colors = [COLORS[name] for name in names]
    bars[2].barh(names, trained, color=colors, label="trained")
    bars[2].barh(names, generated, left=trained, color="white", edgecolor=colors, hatch="////", label="generated")
    bars[2].set(title="tokens (thousands)")
    bars[2].legend(frameon=False, fontsize=8)

    paths = [out / "frontier.png", out / "training.png", out / "cost.png"]
    for drawn, path in zip((figure, figure2, figure3), paths, strict=True):
        drawn.savefig(path)
        plt.close(drawn)
    return paths


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Mean of the last few values at each point."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(len(values))]
