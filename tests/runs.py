"""Run directories as a recorder would leave them, made of random numbers: small, quick, every file and every key.

And a run in memory, a step at a time, where no directory is asked for.
"""

import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trivet.runner.launch import finish
from trivet.runner.prepare import Launch
from trivet.step import Metrics

METHODS = ("sft", "reward-model", "dpo", "ppo", "grpo", "pairwise-grpo")
SAMPLES = (
    "ppo",
    "grpo",
    "pairwise-grpo",
)  # the methods that sample, and so have rewards and several completions
WORDS = (
    "the",
    "a",
    "small",
    "old",
    "duck",
    "hen",
    "fox",
    "hill",
    "rain",
    "was",
    "met",
    "ran",
    "smiled",
    "lost",
    "kind",
)
TOKEN_ARRAYS = {
    "sft": ("logprob", "gradient"),
    "dpo": ("logprob", "gradient"),
    "ppo": (
        *(
            "logprob",
            "ref_logprob",
            "sampler_logprob",
            "ratio",
            "clipped",
            "advantage",
            "value",
            "return",
            "kl",
        ),
        *("token_reward", "gradient"),
    ),
    "grpo": (
        "logprob",
        "ref_logprob",
        "sampler_logprob",
        "ratio",
        "clipped",
        "advantage",
        "kl",
        "gradient",
    ),
    "pairwise-grpo": (
        "logprob",
        "ref_logprob",
        "sampler_logprob",
        "kl",
        "gradient",
        "implicit_reward",
    ),
}


def write_run(
    path: Path,
    method: str,
    steps: int = 20,
    *,
    keep_every: int = 5,
    eval_every: int = 5,
    planned: int | None = None,
    done: bool = True,
    pid: int | None = None,
    run_json: bool = True,
    judged: bool = False,
    over_optimized: bool = False,
    texts: Sequence[str] = (),
    prompts: Sequence[str] = (),
    length: int = 16,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Path:
    """Write the directory of one run that took `steps` steps (of `planned`), and return its path.

    done: with summary.json and a judge's numbers; else the run goes on (pid: a process that lives) or was stopped.
    run_json: False writes a run as it was before run.json and tokens were recorded.
    over_optimized: the gold reward turns at half of the steps while the learned one rises on.
    texts, prompts: what completions and prompts say, in place of random words; length: tokens of a completion.
    """
    draw = random.Random(f"{seed} {method}")
    path.mkdir(parents=True, exist_ok=True)
    planned = planned or steps
    config: dict[str, Any] = {
        "model": "runs/q/sft",
        "data": "stories.jsonl",
        "out": str(path),
        "steps": planned,
    }
    config |= {"lr": 0.001, "max_completion_tokens": 64, "seed": seed, "prompts_per_step": 16}
    if method in SAMPLES:
        config |= {
            "reward": ["runs/q/reward-model", "trivet.toy.stories:gold"],
            "reward_weights": [1.0, 0.0],
        }
        config |= {"group_size": 8, "beta": 0.05}
    config |= options or {}
    toml = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    (path / "config.toml").write_text(f"# trivet {method} --config config.toml\n{toml}\n")
    about = {
        "method": method,
        "recipe": method,
        "started_from": "runs/q/sft/model",
        "steps": planned,
        "data": {
            "rows read": 4000,
            "left out: the prompt is longer than --max-prompt-tokens": 12,
            "for training": 3589,
        }
        | {"held out": 399},
        "parameters": 1_050_000,
        "machine": "x86_64, 2 threads, cpu",
        "versions": {
            "torch": "2.9.0",
            "transformers": "5.0.0",
            "python": "3.11.7",
            "trivet": "0.1.0",
        },
    }
    if run_json:
        sides = [[[" The fox was kind.", True]], [[" The fox ran", True], [" away.", False]]]
        record = about | {
            "began": 1795270000.0,
            "pid": pid or 2**22 + 1,
            "device": "cpu",
            "options": config,
        }
        record["example"] = {
            "prompt": "Once the fox met a hen.",
            "completions": sides[: 2 if method in ("dpo", "reward-model") else 1],
        }
        if method in SAMPLES:
            record["reward_weights"] = {"learned": 1.0, "gold": 0.0}
        (path / "run.json").write_text(json.dumps(record))
    lines = [
        _metrics(method, step, steps, draw, over_optimized, step == steps or step % eval_every == 0)
        for step in range(1, steps + 1)
    ]
    with (path / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line if run_json else _old(line)) + "\n" for line in lines)
    with (path / "samples.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            kept = run_json and (step in (1, steps) or step % keep_every == 0)
            for sample in _samples(method, step, kept, draw, texts, prompts, length):
                file.write(json.dumps(sample) + "\n")
    held = {key: value for line in lines for key, value in line.items() if key.startswith("eval/")}
    if done:
        gold = {
            "eval/gold": 3.1,
            "eval/gold_se": 0.04,
            "eval/learned_reward": 2.9,
            "eval/kl": 4.2,
            "eval/length": 33.0,
        }
        memory = {
            "weights": 4e6,
            "optimizer": 8e6,
            "reference": 4e6,
            "activations and the rest": 9e7,
        }
        summary = about | {
            "seconds": lines[-1]["seconds"] if lines else 0.0,
            "peak_memory_bytes": 1.06e8,
        }
        summary |= {
            "tokens_generated": 52_000 if method in SAMPLES else 0,
            "tokens_trained": 240_000,
        }
        summary |= {
            "eval": held | (gold if judged and method != "reward-model" else {}),
            "memory": memory,
        }
        (path / "summary.json").write_text(json.dumps(summary))
    if judged and method != "reward-model":
        (path / "judged.json").write_text(json.dumps(_judged(method, steps, draw, over_optimized)))
    return path


def stepwise(launched: Launch) -> Iterator[Metrics]:
    """The metrics of each step of a run, held-out ones included, as launch would record them; nothing is written."""
    for step, result in enumerate(launched.recipe.train(launched.run.config, launched.run), 1):
        yield finish(launched, step, result)


def _curve(
    step: int, steps: int, start: float, end: float, draw: random.Random, noise: float = 0.05
) -> float:
    done = 1 - math.exp(-3 * step / max(1, steps))
    return start + (end - start) * done + draw.gauss(0, noise * abs(end - start) + 1e-9)


def _gold(step: int, steps: int, over_optimized: bool) -> float:
    done = step / max(1, steps)
    return 1.4 + (5 * done - (5 * done**2 if over_optimized else 2 * done**2))


def _metrics(
    method: str, step: int, steps: int, draw: random.Random, over: bool, evaluated: bool
) -> dict[str, Any]:
    def curve(start: float, end: float, noise: float = 0.05) -> float:
        return _curve(step, steps, start, end, draw, noise)

    line: dict[str, Any] = {
        "step": step,
        "seconds": round(0.6 * step, 3),
        "grad_norm": abs(curve(1.0, 0.4)),
        "lr": 1e-3,
    }
    line["tokens/trained"] = 12_000.0
    parts = {
        "generation": 0.2,
        "reward": 0.05,
        "forward": 0.12,
        "backward": 0.18,
        "optimizer": 0.03,
        "other": 0.02,
    }
    if method not in SAMPLES:
        parts |= {"generation": 0.0, "reward": 0.0}
    line |= {f"time/{part}": seconds * draw.uniform(0.9, 1.1) for part, seconds in parts.items()}
    if method == "sft":
        line |= {"loss": curve(2.1, 0.9)}
        held = {"loss": curve(2.2, 1.0)}
    elif method == "reward-model":
        line |= {
            "loss": curve(0.69, 0.4),
            "accuracy": curve(0.5, 0.82),
            "margin": curve(0, 2.0),
            "mean_reward": 0.4,
        }
        held = {
            "loss": curve(0.69, 0.45),
            "accuracy": curve(0.5, 0.8),
            "margin": curve(0, 1.8),
            "mean_reward": 0.4,
        }
    elif method == "dpo":
        margin = curve(0, 3.0)
        line |= {
            "loss": curve(0.69, 0.3),
            "rewards/chosen": margin / 3,
            "rewards/rejected": -margin * 2 / 3,
        }
        line |= {"rewards/margins": margin, "rewards/accuracies": curve(0.5, 0.9)}
        line |= {"logps/chosen": curve(-40, -38), "logps/rejected": curve(-41, -60)}
        held = {
            "loss": curve(0.69, 0.35),
            "rewards/margins": margin * 0.9,
            "rewards/accuracies": curve(0.5, 0.85),
        }
    else:
        reward, gold = curve(1.2, 4.0, 0.03), _gold(step, steps, over) + draw.gauss(0, 0.05)
        held = {"reward": reward - 0.1, "kl": curve(0, 5), "completions/mean_length": curve(36, 44)}
        held |= {
            "rewards/learned/mean": reward - 0.1,
            "rewards/gold/mean": gold - 0.05,
            "completions/clipped_ratio": 0.01,
        }
        line |= {
            "reward": reward,
            "reward_std": curve(1.8, 0.6),
            "frac_reward_zero_std": 0.02,
            "tokens/generated": 4800.0,
        }
        line |= {"rewards/learned/mean": reward, "rewards/gold/mean": gold, "kl": curve(0, 5, 0.02)}
        line |= {
            "completions/mean_length": curve(36, 44),
            "completions/clipped_ratio": 0.01,
            "entropy": curve(0.63, 0.4),
        }
        line |= {"sampling/logprob_difference/mean": 1e-6, "sampling/logprob_difference/max": 8e-6}
        if method != "pairwise-grpo":
            line |= {"clip_ratio": curve(0.02, 0.1)}
        if method == "pairwise-grpo":
            line |= {"pairs": float(draw.randint(300, 420))}
        if method == "ppo":
            line |= {
                "objective/rlhf_reward": reward - 0.2,
                "value/explained_variance": curve(0, 0.8),
                "value/grad_norm": 1.2,
            }
    return line | ({f"eval/{key}": value for key, value in held.items()} if evaluated else {})


def _old(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("time/")}


def _samples(
    method: str,
    step: int,
    kept: bool,
    draw: random.Random,
    texts: Sequence[str],
    prompts: Sequence[str],
    length: int,
) -> list[dict[str, Any]]:
    if not kept and method not in SAMPLES:
        return []
    sides = (
        ["chosen", "rejected"]
        if method in ("dpo", "reward-model")
        else [None] * (4 if method in SAMPLES else 2)
    )
    lines = []
    for number, side in enumerate(sides):
        group = 0 if method != "sft" else number
        prompt = (
            prompts[(step + group) % len(prompts)]
            if prompts
            else f"Story {step % 3 + group}: the fox met a hen."
        )
        tokens = [
            " " + draw.choice(WORDS) for _ in range(draw.randint(max(2, length // 2), length))
        ]
        completion = texts[number % len(texts)] if texts else "".join(tokens)
        if texts:
            tokens = [completion[i : i + 7] for i in range(0, len(completion), 7)]
        reward = round(draw.gauss(2, 1), 4)
        line: dict[str, Any] = {
            "step": step,
            "group": group,
            "prompt": prompt,
            "completion": completion,
        }
        if method != "sft":
            line["reward"] = reward
        if method in SAMPLES:
            line |= {
                "finished": number != 3,
                "rewards": {"learned": reward, "gold": round(reward / 2, 4)},
            }
        if side:
            line["side"] = side
        if kept and method in TOKEN_ARRAYS:
            line |= {"tokens": tokens} | _arrays(TOKEN_ARRAYS[method], len(tokens), draw)
        lines.append(line)
    if kept and method in SAMPLES:
        lines.append(lines[0] | {"set": "held-out", "prompt": "Held out: the old duck was lost."})
        lines[-1] = {
            key: value
            for key, value in lines[-1].items()
            if key not in ("tokens", *TOKEN_ARRAYS[method])
        }
    return lines


def _arrays(names: Sequence[str], count: int, draw: random.Random) -> dict[str, list[Any]]:
    arrays: dict[str, list[Any]] = {}
    for name in names:
        if name == "clipped":
            arrays[name] = [draw.random() < 0.15 for _ in range(count)]
        elif name == "ratio":
            arrays[name] = [round(math.exp(draw.gauss(0, 0.15)), 5) for _ in range(count)]
        elif "logprob" in name:
            arrays[name] = [round(-draw.expovariate(1.2), 5) for _ in range(count)]
        elif (
            name == "advantage" and "value" not in names
        ):  # GRPO: one number for the whole completion
            arrays[name] = [round(draw.gauss(0, 1), 5)] * count
        else:
            arrays[name] = [round(draw.gauss(0, 0.5), 5) for _ in range(count)]
        if count > 4:
            arrays[name][2] = None  # untrained: what a tool or a user said
    return arrays


def _judged(method: str, steps: int, draw: random.Random, over_optimized: bool) -> dict[str, Any]:
    at = [0] if method == "sft" else sorted({round(steps * part / 8) for part in range(9)})
    shift = 0.0 if method == "sft" else METHODS.index(method) * 0.15
    checkpoints = [
        {
            "step": step,
            "gold": _gold(step, steps, over_optimized) + shift * (step > 0) + draw.gauss(0, 0.02),
            "gold_se": 0.04,
            "learned": 0.2 + 3 * step / max(1, steps),
            "kl": 6 * (step / max(1, steps)) ** 1.3 * (1 + shift),
            "length": 38 + 6 * step / max(1, steps),
        }
        for step in at
    ]
    samples = []
    for number in range(6):
        words = random.Random(number).choices(WORDS, k=14)
        told = [draw.choice(WORDS) if draw.random() < 0.4 else word for word in words]
        prompt = f"Opening {number}: one day the old hen met a fox."
        numbers = {"gold": round(draw.gauss(3, 1), 2), "learned": round(draw.gauss(2, 1), 2)}
        samples.append({"prompt": prompt, "completion": " " + " ".join(told) + ".", **numbers})
    return {"checkpoints": checkpoints, "samples": samples}


def write_quickstart(path: Path, steps: int = 20) -> list[Path]:
    """All six methods in one folder, judged; PPO over-optimizes."""
    return [
        write_run(
            path / method, method, steps, judged=True, over_optimized=method == "ppo", seed=number
        )
        for number, method in enumerate(METHODS)
    ]


LIVING = os.getpid()  # a process that lives: the pid of a run that goes on
