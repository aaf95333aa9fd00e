"""Peak memory of real runs, each a fresh process, against what `trivet plan` says of the same options beforehand.

    python benchmarks/memory.py S M --out runs/memory             # all cases of these sizes, one after another
    python benchmarks/memory.py S --cases grpo ppo --out runs/memory

Two steps by the command line's own way (`launch`) on the benchmark's models and rows (workloads.py), bfloat16 products, nothing held
out. Writes OUT/measured.jsonl, a line a run; cases that stand there already are not run again. Memory hardly depends on
what else the machine does.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import workloads

STEPS = 2
REWARD = f"{Path(__file__).resolve()}:letters"
SAMPLED: dict[str, Any] = {"reward": [REWARD], "group_size": workloads.COMPLETIONS}
PROMPTS = {"M": 2}  # of a step where completions are sampled; else those of the benchmark
CASES: dict[str, dict[str, Any]] = {  # name: method and options beyond those of every run
    "sft": {"method": "sft"},
    "reward-model": {"method": "reward-model"},
    "dpo": {"method": "dpo"},
    "ppo": {"method": "ppo", **SAMPLED, "epochs_per_batch": 1},
    "grpo": {"method": "grpo", **SAMPLED},
    "pairwise-grpo": {"method": "pairwise-grpo", **SAMPLED},
    "grpo, no reference": {"method": "grpo", **SAMPLED, "beta": 0.0},
    "ppo, reward model": {"method": "ppo", **SAMPLED, "epochs_per_batch": 1, "reward": ["RM"]},
    "grpo, reward model": {"method": "grpo", **SAMPLED, "reward": ["RM"]},
    "ppo, shared critic": {
        "method": "ppo",
        **SAMPLED,
        "epochs_per_batch": 1,
        "shared_critic": True,
    },
    "ppo, float32": {"method": "ppo", **SAMPLED, "epochs_per_batch": 1, "precision": "float32"},
    "grpo, float32": {"method": "grpo", **SAMPLED, "precision": "float32"},
}


def main() -> None:
    """All cases asked for, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("sizes", nargs="+", choices=tuple(workloads.SHAPES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=tuple(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    parser.add_argument(
        "--compare", action="store_true", help="only set what was measured against the plan"
    )
    parser.add_argument(
        "--here", action="store_true", help="one case in this process; prints one JSON line"
    )
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.here:
        print(json.dumps(measure(chosen.sizes[0], chosen.cases[0], chosen.out)))
        return
    results = chosen.out / "measured.jsonl"
    if chosen.compare:
        for line in results.read_text().splitlines():
            compare(json.loads(line))
        return
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(row["size"], row["case"]) for row in map(json.loads, lines)}
    for size in chosen.sizes:
        for case in chosen.cases:
            if (size, case) not in done:
                command = [
                    sys.executable,
                    __file__,
                    size,
                    "--cases",
                    case,
                    "--out",
                    str(chosen.out),
                    "--here",
                ]
                found = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True
                ).stdout
                with results.open("a") as file:
                    file.write(found)
                print(f"{size} {case:20} {json.loads(found)['peak'] / 2**20:8,.0f} MiB", flush=True)


def measure(size: str, case: str, out: Path) -> dict[str, Any]:
    """One run of STEPS steps; what its summary says of memory, and how long its rows were."""
    import tempfile
    from importlib import import_module

    from trivet.runner.launch import launch

    options = dict(CASES[case])
    method, folder = options.pop("method"), str(workloads.model_folder(size))
    if options.get("reward") == ["RM"]:
        options["reward"] = [str(reward_model(size, out))]
    kind = "grpo" if "reward" in options else method
    rows = workloads.load_rows(kind, workloads_tokenizer(folder), STEPS * workloads.EXAMPLES, size)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "rows.jsonl"
        data.write_text("".join(json.dumps(as_row(row)) + "\n" for row in rows))
        if "reward" in options:
            options |= {
                "reward": tuple(options["reward"]),
                "max_completion_tokens": workloads.ROOM[size],
            }
        else:
            options |= {"max_completion_tokens": 512}
        common = {
            "model": folder,
            "data": str(data),
            "out": f"{scratch}/run",
            "steps": STEPS,
            "eval_fraction": 0.0,
        }
        prompts = (
            PROMPTS.get(size, workloads.EXAMPLES) if "reward" in options else workloads.EXAMPLES
        )
        common |= {"precision": "bfloat16", "prompts_per_step": prompts, "keep_tokens_every": 0}
        recipe = import_module(f"trivet.recipes.{method.replace('-', '_')}")
        ran = launch(recipe.Config(**common | options))
        summary = json.loads((Path(ran) / "summary.json").read_text())
    lengths = [(len(row.prompt_ids), [len(ids) for ids in row.completion_ids]) for row in rows]
    return {
        "size": size,
        "case": case,
        "method": method,
        "prompts": prompts,
        "options": {key: value for key, value in options.items() if key != "reward"},
        "peak": summary["peak_memory_bytes"],
        "memory": summary["memory"],
        "seconds": summary["seconds"],
        "tokens_trained": summary["tokens_trained"],
        "tokens_generated": summary["tokens_generated"],
        "lengths": lengths,
    }


def compare(row: dict[str, Any]) -> None:
    """A line of measured.jsonl against the plan, which knows mean lengths and the options, and nothing else of the run."""
    from statistics import mean

    from transformers import AutoConfig

    from trivet.plan.options import Config
    from trivet.plan.shapes import Machine, shape_of
    from trivet.plan.step import SAMPLES, Step

    shape = shape_of(
        AutoConfig.from_pretrained(workloads.model_folder(row["size"])), row["size"], "benchmark"
    )
    samples = row["method"] in SAMPLES
    written = [n for _, lengths in row["lengths"] for n in lengths]
    options = {
        key: row["options"][key]
        for key in ("shared_critic", "epochs_per_batch")
        if key in row["options"]
    }
    options |= {
        "precision": row["options"].get("precision", "bfloat16"),
        "reference": row["options"].get("beta") != 0,
    }
    options |= {"prompt_tokens": round(mean(prompt for prompt, _ in row["lengths"]))}
    options |= {
        "completion_tokens": workloads.ROOM[row["size"]] if samples else round(mean(written))
    }
    options |= {
        "prompts_per_step": row.get("prompts", workloads.EXAMPLES),
        "group_size": samples * workloads.COMPLETIONS,
    }
    cpu = Machine("a CPU", True, 1, 1, 1, 1, 1, 1, row["memory"]["program"])
    scorer = shape if "reward model" in row["case"] else None
    planned = Step(row["method"], shape, scorer, Config(**options), cpu).peak
    numbers = (
        f"{row['peak'] / 2**20:7,.0f} {planned / 2**20:7,.0f} MiB {planned / row['peak'] - 1:+6.1%}"
    )
    print(f"{row['size']} {row['case']:20} measured, planned {numbers}")


def reward_model(size: str, out: Path) -> Path:
    """A reward model of this shape with random weights, made once."""
    folder = out / f"reward-model-{size}"
    if not (folder / "done").exists():
        code = "import sys; from trivet.model.load import load_scorer, save_model; "
        code += (
            "from trivet.model.text import load_tokenizer; from pathlib import Path; import torch; "
        )
        code += "m = load_scorer(sys.argv[1]); torch.nn.init.normal_(m.score.weight, std=0.02); "
        code += "m.config.pad_token_id = 0; save_model(m, load_tokenizer(sys.argv[1]), Path(sys.argv[2]))"
        subprocess.run(
            [sys.executable, "-c", code, str(workloads.model_folder(size)), str(folder)], check=True
        )
        (folder / "done").touch()
    return folder


def workloads_tokenizer(folder: str) -> Any:
    """The model's own."""
    from trivet.model.text import load_tokenizer

    return load_tokenizer(folder)


def as_row(row: workloads.Row) -> dict[str, str]:
    """The row in a format that --data reads."""
    names = ("completion",) if len(row.completions) == 1 else ("chosen", "rejected")
    return {"prompt": row.prompt} | dict(zip(names, row.completions, strict=False))


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of the letter e, with a little noise so that no group ties."""
    return [text.count("e") / 128 + random.random() / 1000 for text in completions]


if __name__ == "__main__":
    main()
