"""Trivet against TRL on all workloads: fresh processes in turn, medians, a table, JSON and a plot.

    python benchmarks/compare.py --quick          T and S, one round, under 10 minutes on two idle cores
    python benchmarks/compare.py                  T, S and M, three rounds: hours
    python benchmarks/compare.py --sizes Q        on a GPU: Qwen3-0.6B's shape

Runs add up in --out: what an earlier call measured there is kept, so the whole can be made in pieces, and a stop loses one run.
README.md says what is compared, and how.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import workloads

HERE = Path(__file__).resolve().parent
PPO_PEER = Path(sys.prefix) / "trl-1.12.0"  # beside the environment, not in it
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
VARIANTS = ("trivet", "trl", "trl, allocator")
WORKLOADS = [
    ("sft", ""),
    ("reward-model", ""),
    ("dpo", ""),
    ("grpo", "full"),
    ("grpo", "len40"),
    ("ppo", "full"),
]
COLUMNS = ("", "TRL, s · MB", "TRL + allocator", "Trivet", "times faster", "memory", "of the floor")
Cell = tuple[str, str, str]  # method, lengths, size
Result = dict[str, Any]


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument(
        "--quick",
        action="store_true",
        help="T and S, one round, TRL with the allocator setting only",
    )
    parser.add_argument("--sizes", nargs="+", help="T S M")
    parser.add_argument(
        "--methods", nargs="+", help="of sft reward-model dpo grpo ppo; all of them otherwise"
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help="processes of each side; 1 if quick, else 3"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        help=f"of {', '.join(map(repr, VARIANTS))}; as --quick says otherwise",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    sizes = chosen.sizes or (["T", "S"] if chosen.quick else ["T", "S", "M"])
    variants = chosen.variants or (("trivet", "trl, allocator") if chosen.quick else VARIANTS)
    cells = [
        (method, lengths, size)
        for method, lengths in WORKLOADS
        for size in sizes
        if (method, size) != ("ppo", "M")
    ]
    cells = [cell for cell in cells if not chosen.methods or cell[0] in chosen.methods]
    if not PPO_PEER.exists():
        print(f"PPO left out; for its peer: pip install --no-deps --target {PPO_PEER} trl==1.12.0")
        cells = [cell for cell in cells if cell[0] != "ppo"]
    chosen.out.mkdir(parents=True, exist_ok=True)
    kept = chosen.out / "bench.json"
    results: list[Result] = json.loads(kept.read_text())["runs"] if kept.exists() else []
    for cell in cells:
        for _ in range(chosen.rounds or (1 if chosen.quick else 3)):
            for variant in variants:
                results.append(measure(cell, variant))
                write(results, chosen.out)
    peak = measured_peak()
    print(f"this machine's bf16 matrix products: {peak / 1e12:.2f} TFLOP/s")
    everything = [
        (method, lengths, size) for method, lengths in WORKLOADS for size in workloads.SHAPES
    ]
    summary = [row for cell in everything if (row := summed_up(cell, results, peak))]
    write(results, chosen.out, summary)
    show(summary)
    (chosen.out / "bench.md").write_text(markdown(summary, peak), encoding="utf-8")
    plot(summary, chosen.out / "bench.png")


def measure(cell: Cell, variant: str) -> Result:
    """One fresh process of run_one.py."""
    method, lengths, size = cell
    steps = "3" if not lengths or size == "T" else "1"
    side = variant.split(",")[0]
    command = [sys.executable, str(HERE / "run_one.py"), side, method, size, "--steps", steps]
    command += ["--lengths", lengths] if lengths else []
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= ALLOCATOR if variant == "trl, allocator" else {}
    if side == "trl" and method == "ppo":
        environment["PYTHONPATH"] = str(PPO_PEER)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1]) | {"variant": variant, "lengths": lengths}
    took = time.perf_counter() - began
    said = f"{method} {lengths} {size}: {result['median_seconds_with_reference']} s, {result['peak_mb']:.0f} MB"
    print(f"{variant:16}{said}   ({took:.0f} s in all)", flush=True)
    return result


def measured_peak() -> float:
    """The bf16 matrix products of this machine, FLOP/s: the best of a few large ones."""
    a, b = (
        torch.randn(shape, device=workloads.DEVICE).bfloat16()
        for shape in ((2048, 1024), (1024, 4096))
    )
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        workloads.wait()
        seconds.append(time.perf_counter() - began)
    return 2 * a.numel() * b.shape[1] / min(seconds)


def summed_up(cell: Cell, results: list[Result], peak: float) -> Result:
    """Medians over the rounds of a cell, ratios, and the fraction of the floor on a machine of that peak; {} without both sides."""
    method, lengths, size = cell
    row: Result = {"method": method, "lengths": lengths, "size": size}
    own = [r for r in results if (r["method"], r["lengths"], r["size"]) == cell]
    if len({r["side"] for r in own}) < 2:
        return {}
    for variant in VARIANTS:
        rounds = [r for r in own if r["variant"] == variant]
        if rounds:
            row[variant] = {
                "rounds": len(rounds),
                "seconds": statistics.median(r["median_seconds_with_reference"] for r in rounds),
                "megabytes": statistics.median(r["peak_mb"] for r in rounds),
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in rounds),
                "without_reference": statistics.median(r["median_seconds"] for r in rounds),
            }
            if variant == "trivet":
                row["parts"] = rounds[0]["parts"]
                flops = (
                    statistics.median(r["floor_seconds"] for r in rounds)
                    * workloads.FLOPS_PER_SECOND
                )
                row["floor_seconds"] = flops / peak
    row["versions"] = {
        (f"{name} (PPO)" if name == "trl" and method == "ppo" else name): version
        for r in own
        for name, version in r["versions"].items()
    }
    ours, peers = row["trivet"], [variant for variant in VARIANTS[1:] if variant in row]
    row["times_faster"] = {peer: row[peer]["seconds"] / ours["seconds"] for peer in peers}
    row["memory_ratio"] = {peer: ours["megabytes"] / row[peer]["megabytes"] for peer in peers}
    row["floor_fraction"] = row["floor_seconds"] / ours["seconds"]
    return row


def name_of(row: Result) -> str:
    """As the table and the plot call it."""
    return f"{row['method']} {row['lengths']}".strip() + f" {row['size']}"


def cells_of(row: Result) -> list[str]:
    """Seconds and megabytes of each side, the ratios, the fraction of the floor."""
    sides = [row.get(variant) for variant in ("trl", "trl, allocator", "trivet")]
    ratios = [
        " · ".join(f"{ratio:.2f}" for ratio in row[key].values())
        for key in ("times_faster", "memory_ratio")
    ]
    return [f"{p['seconds']:.2f} · {p['megabytes']:.0f}" if p else "" for p in sides] + [
        *ratios,
        f"{row['floor_fraction']:.0%}",
    ]


def markdown(summary: list[Result], peak: float) -> str:
    """The first table for a page, with where and when it was measured."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {name_of(row)} | {' | '.join(cells_of(row))} |" for row in summary]
    versions = {name: version for row in summary for name, version in row["versions"].items()}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = f"{platform.machine()}, {os.cpu_count()} cores, bf16 products {peak / 1e12:.2f} TFLOP/s"
    return "\n".join([*lines, "", f"({time.strftime('%Y-%m-%d')}; {where}; {said}.)", ""])


def show(summary: list[Result]) -> None:
    """Print both tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=130)
    table = Table(*COLUMNS, "rounds")
    for row in summary:
        table.add_row(name_of(row), *cells_of(row), str(row["trivet"]["rounds"]))
    console.print(table)
    names = list(dict.fromkeys(name for row in summary for name in row["parts"] if name != "rest"))
    table = Table("Trivet, seconds of a step", *names, "rest")
    for row in summary:
        parts = [row["parts"].get(name) for name in [*names, "rest"]]
        table.add_row(name_of(row), *("" if part is None else f"{part:.3f}" for part in parts))
    console.print(table)


def plot(summary: list[Result], path: Path) -> None:
    """Two bar charts: how many times faster, and the share of the memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 1.2 + 0.42 * len(summary)), sharey=True)
    titles = {
        "times_faster": "TRL's seconds / Trivet's",
        "memory_ratio": "Trivet's peak memory / TRL's",
    }
    labels = {
        "trl": "TRL as it is",
        "trl, allocator": "TRL with the allocator setting that helps it",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for i, (peer, label) in enumerate(labels.items()):
            known = [
                (y + 0.38 * i - 0.19, row[key][peer])
                for y, row in enumerate(summary)
                if peer in row[key]
            ]
            if known:
                bars = panel.barh(
                    *zip(*known, strict=True),
                    height=0.36,
                    color=("tab:blue", "tab:cyan")[i],
                    label=label,
                )
                panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(title)
        panel.margins(x=0.15)
    panels[0].set_yticks(range(len(summary)), [name_of(row) for row in summary])
    panels[0].invert_yaxis()
    panels[1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results: list[Result], out: Path, summary: list[Result] | None = None) -> None:
    """Everything so far as bench.json."""
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    cpu = [line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")]
    about = {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg(), "cpu": cpu[:1]} | machine
    text = json.dumps({"about": about, "summary": summary or [], "runs": results}, indent=1)
    (out / "bench.json").write_text(text + "\n", encoding="utf-8")


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
