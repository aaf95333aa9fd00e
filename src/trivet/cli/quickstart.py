"""trivet quickstart: run all six methods on the embedded story model, from the same start and
against the same reference, and compare them.

    SFT on the chosen answers -> reward model -> DPO, PPO, GRPO, pairwise GRPO
    -> evaluation on held-out openings

Every stage runs in its own process, so that its time and peak memory can be measured separately.
The last four methods see only the preference pairs or the reward model trained on them; the gold
reward, a program that none of them trains on, is the judge.
"""

import dataclasses
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivet.errors import InputError
from trivet.report.compare import read_summary, tables, wide_console
from trivet.store.files import write_json

GOLD = "trivet.toy.stories:gold"
STAGES = {  # with rough shares of the time
    "sft": 1,
    "reward-model": 3,
    "dpo": 3,
    "ppo": 6,
    "grpo": 4,
    "pairwise-grpo": 4,
}
EVALUATION_SHARE = 3
COMPARED = ("sft", "dpo", "ppo", "grpo", "pairwise-grpo")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train the embedded story model with all six methods, then print one table and samples and
    write one page. A rerun keeps finished stages.
    """

    out: str = "runs/quickstart"
    """Directory to create, with one run directory per method inside."""
    seed: int = 0
    """Seed of the split, the data order and the sampling."""
    device: str = "cpu"
    """cpu, cuda or mps; the model is so small that a CPU is fastest."""
    scale: float = 1.0
    """Multiply the steps of every method and the size of the evaluation by this; below 1 is faster
    and rougher.
    """


def quickstart(args: list[str]) -> None:
    """Run the stages that are not finished yet, evaluate all models and print the results."""
    from trivet.arguments import parse

    config: Config = parse(Config, args)
    console, out = wide_console(), Path(config.out)
    began, weights = time.perf_counter(), [*STAGES.values(), EVALUATION_SHARE]
    done = 0.0
    for number, method in enumerate(STAGES, 1):
        if not _is_finished(out / method, config):
            rate = (time.perf_counter() - began) / done if done else 0
            left = f"  about {rate * sum(weights[number - 1 :]):.0f} s left" if done else ""
            console.rule(f"{number} of {len(weights)} · {method}{left}", align="left")
            _in_process(_train, method, stage_options(method, config), config.scale)
            done += STAGES[method]
        else:
            console.rule(f"{number} of {len(weights)} · {method}  already finished", align="left")
    console.rule(
        f"{len(weights)} of {len(weights)} · evaluation on held-out openings", align="left"
    )
    from trivet.report.page import write_page

    samples = evaluate_all(out, config, prompts=max(8, round(256 * config.scale)))
    for table in tables([out / method for method in STAGES]):
        console.print(table)
    ceiling = read_summary(out / "reward-model")["eval"]
    console.print(
        f"reward model: {ceiling['eval/accuracy']:.1%} of the held-out pairs ranked as labeled; "
        "the labels are noisy, so even the "
        f"gold reward ranks only {ceiling['eval/noise_ceiling']:.1%} as labeled in expectation\n",
        soft_wrap=True,
    )
    console.print(samples, markup=False, soft_wrap=True)
    console.print(f"total: {time.perf_counter() - began:.0f} s")
    page = write_page([out / method for method in STAGES], out / "report.html")
    console.print(f"samples side by side: {out / 'samples.md'}", soft_wrap=True)
    console.print(f"full report, down to the token: open {page}", style="bold", soft_wrap=True)


def stage_options(method: str, config: Config) -> dict[str, Any]:
    """The options of one stage on top of its toy preset."""
    out = Path(config.out)
    options: dict[str, Any] = {
        "out": str(out / method),
        "seed": config.seed,
        "device": config.device,
        "eval_fraction": 0.1,
    }
    if method != "sft":
        options["model"] = str(out / "sft")
    if method in ("ppo", "grpo", "pairwise-grpo"):
        options |= {"reward": (str(out / "reward-model"), GOLD), "reward_weights": (1.0, 0.0)}
    save_every = {"dpo": 45, "sft": 0, "reward-model": 0}
    options["save_every"] = save_every.get(method, 10)  # evaluated later, for the frontier
    return options | {"eval_limit": max(8, round(600 * config.scale))}


def _is_finished(run: Path, config: Config) -> bool:
    """Whether this stage is complete with this seed; an incomplete one is deleted."""
    if (run / "summary.json").exists():
        if f"seed = {config.seed}\n" not in (run / "config.toml").read_text():
            raise InputError(f"{run} holds a quickstart with another seed; choose another --out")
        return True
    if run.exists():
        if any(run.iterdir()) and not (run / "config.toml").exists():
            raise InputError(
                f"{run} holds files that quickstart did not write; choose another --out"
            )
        shutil.rmtree(run)
    return False


def _in_process(function: Any, *args: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise InputError(
            "this stage failed; the finished ones are kept, and the same command continues after "
            "them"
        )


def _train(method: str, options: dict[str, Any], scale: float) -> None:
    from trivet.report.terminal import Terminal
    from trivet.runner.launch import launch
    from trivet.runner.methods import load_recipe

    recipe = load_recipe(method)
    config = recipe.Config(**(recipe.PRESETS["toy"] | options))
    steps, epochs = config.steps and max(1, round(config.steps * scale)), config.epochs * scale
    terminal = Terminal(brief=True)
    try:
        # an empty cache, so that a stage's time includes its whole reference pass
        with tempfile.TemporaryDirectory() as fresh:
            os.environ["XDG_CACHE_HOME"] = fresh
            launch(dataclasses.replace(config, steps=steps, epochs=epochs), terminal)
    except InputError as error:
        sys.exit(f"trivet {method}: {error}")
    except KeyboardInterrupt as stopped:  # the parent says so
        sys.exit(getattr(stopped, "code", 130))
    finally:
        terminal.close()


def evaluate_all(out: Path, config: Config, prompts: int, each: int = 4) -> str:
    """Score every method with the gold reward on the same held-out openings, `each` samples per
    opening, and its checkpoints on a quarter of them. Write the results to its summary.json and
    judged.json.

    Returns the samples for the first opening, side by side; samples.md gets four openings.
    """
    import torch

    from trivet.generation.engine import Engine
    from trivet.model.forward import in_microbatches, token_logprobs
    from trivet.model.load import load_policy
    from trivet.optimization.reduce import sequence_sum
    from trivet.recipes import reward_model
    from trivet.rewards.functions import load_rewards
    from trivet.runner.prepare import Launch
    from trivet.store.checkpoints import steps as saved_steps
    from trivet.toy import STORIES

    options: dict[str, Any] = STORIES | stage_options("reward-model", config) | {"out": ""}
    launched = Launch(reward_model.Config(**options))
    run, device = launched.run, config.device
    heldout = run.heldout[:prompts]
    reference = load_policy(launched.start_from, device=device)
    judges = load_rewards(
        [GOLD, str(out / "reward-model")], [1.0, 1.0], launched.tokenizer, like=reference
    )

    def evaluate(folder: Path, examples: Any) -> tuple[dict[str, float], dict[str, Any], Any]:
        """A model's metrics, its rewards (P, each) by name, and its texts."""
        policy = load_policy(str(folder), device=device)
        engine = Engine(
            run.decode, run.stops, 64, 1.0, torch.Generator(device).manual_seed(config.seed)
        )
        rollouts = engine.generate(policy, examples, each)
        judges(rollouts)
        gold, learned = (part.view(-1, each) for part in judges.parts.values())  # (P, each)
        mask = rollouts.groups.mask
        logprobs = in_microbatches(token_logprobs, policy, rollouts.groups, 8192)  # (B, T)
        kl = sequence_sum(
            logprobs - in_microbatches(token_logprobs, reference, rollouts.groups, 8192), mask
        )  # (B,)
        numbers = {
            "gold": float(gold.mean()),
            "gold_se": float(gold.mean(1).std() / len(examples) ** 0.5),
            "learned": float(learned.mean()),
            "kl": float(kl.mean()),
            "length": float(mask.sum(1).float().mean()),
        }
        return numbers, {"gold": gold, "learned": learned}, rollouts.texts

    results: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    start: list[dict[str, float]] = []
    for method in COMPARED:
        trail = start.copy()
        for step, folder in saved_steps(out / method / "checkpoints"):
            trail.append({"step": step} | evaluate(folder, heldout[: max(8, len(heldout) // 4)])[0])
        numbers, results[method], texts[method] = evaluate(out / method / "model", heldout)
        trail.append({"step": read_summary(out / method)["steps"]} | numbers)
        start = start or [numbers | {"step": 0}]  # the other methods start from the SFT model
        gold, base = results[method]["gold"], results["sft"]["gold"]
        wins = (gold[:, :, None] > base[:, None, :]).float() + (
            gold[:, :, None] == base[:, None, :]
        ).float() / 2
        numbers["learned_reward"] = numbers.pop("learned")
        _record(out / method, numbers | {"win_rate": float(wins.mean())})
        samples = [
            {
                "prompt": heldout[p].row["prompt"],
                "completion": texts[method][p * each],
                **{name: float(part[p, 0]) for name, part in results[method].items()},
            }
            for p in range(min(8, len(heldout)))
        ]
        write_json(out / method / "judged.json", {"checkpoints": trail, "samples": samples})
    gap = torch.tensor(
        [example.row["gold_chosen"] - example.row["gold_rejected"] for example in run.heldout]
    )
    _record(out / "reward-model", {"noise_ceiling": float(gap.abs().sigmoid().mean())})
    blocks = [_side_by_side(heldout[p].row["prompt"], p * each, texts, results) for p in range(4)]
    (out / "samples.md").write_text(
        "# The same openings, continued by every method\n\n"
        "One random sample each, at temperature 1.\n\n" + "\n".join(blocks)
    )
    return blocks[0]


def _record(run: Path, numbers: dict[str, float]) -> None:
    summary = read_summary(run)
    summary["eval"] |= {f"eval/{key}": value for key, value in numbers.items()}
    write_json(run / "summary.json", summary)


def _side_by_side(prompt: str, row: int, texts: dict[str, Any], results: dict[str, Any]) -> str:
    lines = [f"**{prompt}**\n"]
    for method, completions in texts.items():
        gold, learned = (float(results[method][key].flatten()[row]) for key in ("gold", "learned"))
        lines.append(f"- {method} (gold {gold:.1f}, learned {learned:.1f}):{completions[row]}")
    return "\n".join(lines) + "\n"
