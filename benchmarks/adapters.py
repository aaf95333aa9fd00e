"""PPO's peak memory: policy, critic, reference and reward model as adapters over one base, against four models.

    python benchmarks/adapters.py --out runs/adapters --size M

The base has random weights (shape M of the benchmarks, 134.5 M parameters), so only memory means anything. Every stage is a fresh process: a reward
model, one step long, then two steps of PPO with it. Weights of one copy are what the base's file holds in float32.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import workloads

from trivet.toy import STORIES


def main() -> None:
    """Both ways, a line each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--size", default="M", help="T, S or M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--ways",
        nargs="+",
        default=[
            "adapters",
            "all weights",
            "adapters, 8bit",
            "adapters, 4bit",
            "adapters, bfloat16",
        ],
    )
    chosen = parser.parse_args()
    base = chosen.out / "base"
    if not base.exists():
        make_base(base, chosen.size)
    weights = (base / "model.safetensors").stat().st_size
    found: dict[str, Any] = {"weights of one copy": weights}
    for way in chosen.ways:
        options = ["--lora", str(chosen.rank)] if "adapters" in way else []
        options += ["--quantize", way[-4:]] if way.endswith("bit") else []
        options += ["--precision", "bfloat16"] if way.endswith("bfloat16") else []
        judge = chosen.out / f"reward model, {way}"
        train("reward-model", judge, base, [*options, "--steps", "1", "--prompts-per-step", "2"])
        run = chosen.out / f"ppo, {way}"
        sampling = ["--max-completion-tokens", "16", "--prompts-per-step", "4", "--group-size", "4"]
        train(
            "ppo",
            run,
            base,
            [
                *options,
                *sampling,
                "--reward",
                str(judge),
                "--steps",
                "2",
                "--microbatch-tokens",
                "128",
            ],
        )
        summary = json.loads((run / "summary.json").read_text())
        memory, peak = summary["memory"], summary["peak_memory_bytes"]
        held = sum(
            size
            for part, size in memory.items()
            if part not in ("program", "activations and the rest", "cache")
        )
        found[way] = memory | {
            "peak": peak,
            "models and optimizers": held,
            "multiple of one copy": round(held / weights, 3),
        }
        print(
            f"{way}: {held / weights:.2f} copies in models and optimizers; peak {peak / 1e9:.2f} GB"
        )
        for part, size in memory.items():
            print(f"    {part:28}{size / 1e6:10.1f} MB{size / weights:8.3f}", flush=True)
    (chosen.out / "adapters.json").write_text(json.dumps(found, indent=1) + "\n")


def train(method: str, out: Path, base: Path, options: list[str]) -> None:
    """One run of the command line, in a process of its own."""
    if (out / "summary.json").exists():
        return
    command = [
        sys.executable,
        "-m",
        "trivet.cli.main",
        method,
        "--model",
        str(base),
        "--data",
        STORIES["data"],
        "--out",
        str(out),
    ]
    subprocess.run(
        [*command, *options, "--quiet", "--eval-limit", "4"],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def make_base(folder: Path, size: str) -> None:
    """Random weights of this shape, with the tokenizer of the stories."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, feed_forward, vocabulary = workloads.SHAPES[size]
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
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES["model"]).save_pretrained(folder)


if __name__ == "__main__":
    main()
