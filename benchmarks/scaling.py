"""How the training pass grows: seconds and peak memory of forward + backward, prompts shared against prompts copied.

    python benchmarks/scaling.py --out runs/scaling

One of group size, prompt length, completion length, vocabulary and model size varies at a time, the rest stays at BASE (shape S,
random weights, bf16 products). *Copied* is the same code on the same rows with a group of its own, and so a copy of the prompt, for
each completion. Each point is a fresh process: a warm-up, then the median of three (one, where a step takes over 3 s). Writes scaling.json and scaling.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import workloads

BASE = {"prompt": 256, "group": 8, "completion": 64, "vocabulary": 32768, "size": "S", "prompts": 1}
AXES: dict[str, list[Any]] = {
    "group": [2, 4, 8, 16, 32, 64],
    "prompt": [64, 256, 1024, 2048, 4096],
    "completion": [16, 64, 256, 1024],
    "vocabulary": [2048, 8192, 32768, 131072],
    "size": ["T", "S", "M"],
}
SHARED_PROMPT = BASE | {"prompt": 2048, "group": 16}  # where sharing has to show
NAMES = {
    "group": "completions of a prompt",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
}
NAMES |= {"vocabulary": "vocabulary", "size": "shape"}


def main() -> None:
    """One point, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--point", help="one point as JSON, in this process")
    parser.add_argument("--axes", nargs="+", default=list(AXES), help=", ".join(AXES))
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    chosen = parser.parse_args()
    if chosen.point:
        print(json.dumps(measure(json.loads(chosen.point))))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    points = [("shared prompt", SHARED_PROMPT)]
    points += [(axis, BASE | {axis: value}) for axis in chosen.axes for value in AXES[axis]]
    results: dict[str, list[dict[str, Any]]] = {}
    for axis, point in points:
        found = dict(point)
        for way in ("shared", "copied"):
            command = [sys.executable, __file__, "--point", json.dumps(point | {"way": way})]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found |= {f"{way} {key}": value for key, value in json.loads(done.stdout).items()}
        results.setdefault(axis, []).append(found)
        (chosen.out / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
        where = f"{axis} {point.get(axis, '2048 + 16 x 64')}"
        times = [
            f"{found[f'{way} seconds']:.2f} s, {found[f'{way} mb']:.0f} MB"
            for way in ("shared", "copied")
        ]
        ratio = found["copied seconds"] / found["shared seconds"]
        print(f"{where:32} shared {times[0]:18} copied {times[1]:18} {ratio:.1f} times", flush=True)
    plot(results, chosen.out / "scaling.png")


def measure(point: dict[str, Any]) -> dict[str, float]:
    """Seconds of forward + backward over the point's groups, and peak memory of this process."""
    from run_one import peak_megabytes
    from transformers import LlamaConfig, LlamaForCausalLM

    from trivet.batch import collate, microbatches
    from trivet.model.forward import shares_prefix, token_logprobs

    hidden, layers, heads, kv_heads, feed_forward, _ = workloads.SHAPES[point["size"]]
    vocabulary = point["vocabulary"] if point["size"] != "T" else min(point["vocabulary"], 2048)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    shape |= {
        "num_key_value_heads": kv_heads,
        "intermediate_size": feed_forward,
        "vocab_size": vocabulary,
    }
    model: Any = LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=True)
    ).eval()
    model.compute_dtype = torch.bfloat16
    shares_prefix(model)
    ids = torch.randint(
        vocabulary, (point["prompts"], point["prompt"] + point["group"] * point["completion"])
    ).tolist()
    prompts = [row[: point["prompt"]] for row in ids]
    rows = [torch.tensor(row[point["prompt"] :]).view(point["group"], -1).tolist() for row in ids]
    groups = collate(prompts, [completion for written in rows for completion in written])
    if point["way"] == "copied":
        groups = groups.regroup(1)

    def step() -> float:
        began = time.perf_counter()
        for _, part in microbatches(groups, 2048):
            token_logprobs(model, part).sum().backward()
        model.zero_grad()
        return time.perf_counter() - began

    seconds = statistics.median(step() for _ in range(3 if step() < 3 else 1))
    return {"seconds": seconds, "mb": peak_megabytes(), "tokens": int(groups.lengths.sum())}


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A column an axis: seconds above, memory below, both ways, and what grows with the unique tokens alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    axes = [axis for axis in AXES if axis in results]
    figure, panels = plt.subplots(
        2, len(axes), figsize=(3.4 * len(axes), 5.6), squeeze=False, sharex="col"
    )
    for column, axis in enumerate(axes):
        points = results[axis]
        places = [point[axis] if axis != "size" else i for i, point in enumerate(points)]
        for row, key in enumerate(("seconds", "mb")):
            panel = panels[row][column]
            for way, style in (("copied", "o--"), ("shared", "o-")):
                panel.plot(
                    places,
                    [point[f"{way} {key}"] for point in points],
                    style,
                    label=f"prompts {way}",
                )
            if key == "seconds" and axis not in ("size", "vocabulary"):
                first = points[0]
                unit = first["shared seconds"] / first["shared tokens"]
                ideal = [unit * point["shared tokens"] for point in points]
                panel.plot(places, ideal, ":", color="gray", label="in step with unique tokens")
            if axis == "size":
                panel.set_xticks(places, [point["size"] for point in points])
            else:
                panel.set_xscale("log", base=2)
            panel.set_yscale("log")
        panels[1][column].set_xlabel(NAMES[axis])
    panels[0][0].set_ylabel("forward + backward, seconds")
    panels[1][0].set_ylabel("peak memory of the process, MB")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
