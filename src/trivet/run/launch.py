"""From a Config to a run on disk: everything is loaded and checked here, before a recipe's loop begins.

out = launch(grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",)))
"""

import importlib
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from trivet.batch import Example
from trivet.data import load_examples, split_by_prompt
from trivet.errors import InputError
from trivet.model.load import (
    load_policy,
    load_scorer,
    model_facts,
    model_folder,
    require_causal,
    save_model,
    usable_device,
)
from trivet.model.text import decode_completion, load_tokenizer, stop_ids
from trivet.rewards.functions import load_rewards
from trivet.run.config import check, to_toml
from trivet.run.loop import Metrics, Run
from trivet.run.options import Options
from trivet.run.trackers import send, trackers, until_end


class Launch:
    """A run with what surrounds it: its recipe, tokenizer, data report and directory. Writes nothing before the first step."""

    def __init__(self, config: Options):
        self.config, self.recipe = config, importlib.import_module(type(config).__module__)
        self.method = self.recipe.__name__.rpartition(".")[2].replace("_", "-")
        check(config, self.method)
        self.start_from = model_folder(config.model)
        self.out = Path(config.out or f"runs/{self.method}-{time.strftime('%Y%m%d-%H%M%S')}")
        device = usable_device(config.device)
        budget = config.microbatch_tokens or microbatch_that_fits(device)
        self.config = config = replace(config, microbatch_tokens=budget)
        if self.recipe.TRAINS == "policy":  # a reward model may go on from a reward model
            require_causal(self.start_from, self.method)
        _, self.context, self.vocabulary = model_facts(self.start_from)
        self.tokenizer = load_tokenizer(self.start_from, config.chat_template)
        self.stops = stop_ids(self.start_from, self.tokenizer)
        self.counts: Counter[str] = Counter()
        train, heldout = self._examples()
        torch.manual_seed(config.seed)
        load = load_scorer if self.recipe.TRAINS == "scorer" else load_policy
        model = load(self.start_from, device=device, precision=config.precision, from_scratch=config.from_scratch)
        if self.recipe.TRAINS == "scorer":
            self._give_pad_token(model)
        else:
            model.generation_config.eos_token_id = self.stops  # what is saved ends where it was taught to end
        names, weights = getattr(config, "reward", None), getattr(config, "reward_weights", ())
        self.run = Run(
            config=config,
            model=model,
            decode=partial(decode_completion, self.tokenizer),
            stops=self.stops,
            train=train,
            heldout=heldout,
            reward=None if names is None else load_rewards(names, weights, self.tokenizer, like=model),
            steps=config.steps or max(1, round(config.epochs * len(train) / config.prompts_per_step)),
            device=device,
            generator=torch.Generator(device).manual_seed(config.seed),
        )

    def _examples(self) -> tuple[list[Example], list[Example]]:
        config, room = self.config, self.context - self.config.max_completion_tokens
        if room < 1:
            raise InputError(
                f"--max-completion-tokens {config.max_completion_tokens} leaves no room for a prompt in the context of "
                f"{config.model} ({self.context} tokens); lower it"
            )

        def load(path: str, counts: Counter[str]) -> list[Example]:
            limits: dict[str, Any] = {
                "max_prompt": min(config.max_prompt_tokens, room),
                "max_completion": config.max_completion_tokens,
                "truncate_prompts": config.truncate_prompts,
            }
            examples = load_examples(path, self.tokenizer, self.stops, self.recipe.ROWS, counts=counts, **limits)
            highest = max(max(ids) for example in examples for ids in (example.prompt, *example.completions))
            if highest >= self.vocabulary:
                said = f"its tokenizer gives token id {highest}, but its model has {self.vocabulary} ids"
                raise InputError(f"{config.model}: {said}; take a tokenizer and a model that belong together")
            return examples

        train = load(config.data, self.counts)
        if config.eval_data:
            counts = Counter[str]()
            heldout = load(config.eval_data, counts)
            self.counts |= {f"held-out data, {key}": n for key, n in counts.items() if key.startswith(("left", "cut"))}
        else:
            train, heldout = split_by_prompt(train, config.eval_fraction, config.seed)
        if not train:
            raise InputError(f"{config.data}: all rows fell into the held-out share; lower --eval-fraction")
        self.counts["for training"], self.counts["held out"] = len(train), len(heldout)
        if not heldout:
            self.counts["evaluations (nothing is held out: --eval-fraction, --eval-data)"] = 0
        plain = sum(isinstance(example.row.get("prompt"), str) for example in train)
        if self.tokenizer.chat_template and plain:
            self.counts["prompts taken as plain text, though the model has a chat template"] = plain
        return train, heldout[: config.eval_limit]

    def _give_pad_token(self, model: Any) -> None:
        """Record a padding id that ends no sequence, so that transformers too reads the score at the last real token."""
        pad = self.tokenizer.pad_token_id
        if pad is None or pad in self.stops:
            unused = [i for i in self.tokenizer.all_special_ids if i not in self.stops]
            pad = unused[-1] if unused else len(self.tokenizer) - 1
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)
        model.config.pad_token_id = pad


Watch = Callable[[Launch, int, Metrics], None]  # step 0 without metrics when all is loaded, then after each step


def launch(config: Options, watch: Watch | None = None) -> Path:
    """Train by the recipe that this config belongs to; returns the run directory.

    It holds config.toml, metrics.jsonl (a line a step), samples.jsonl, summary.json, checkpoints/ and model/.
    """
    launched = Launch(config)
    run, out = launched.run, launched.out
    tracked = trackers(config.track, out, {"method": launched.method} | vars(config))
    began, heldout, tokens = time.perf_counter(), dict[str, float](), Counter[str]()
    if watch:
        watch(launched, 0, {})
    for step, metrics in enumerate(until_end(tracked, launched.recipe.train(run.config, run)), 1):
        metrics = {"step": step, "seconds": round(time.perf_counter() - began, 3)} | metrics
        tokens.update({key: int(value) for key, value in metrics.items() if key.startswith("tokens/")})
        heldout |= {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if step == 1:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.toml").write_text(f"# trivet {launched.method} --config config.toml\n" + to_toml(config))
        _append(out / "metrics.jsonl", [metrics])
        send(tracked, step, metrics)
        _append(out / "samples.jsonl", run.samples)
        run.samples.clear()
        if config.save_every and step % config.save_every == 0 and step < run.steps:
            save_model(run.model, launched.tokenizer, out / "checkpoints" / f"step-{step}")
        if watch:
            watch(launched, step, metrics)
    save_model(run.model, launched.tokenizer, out / "model")
    summary = {
        "method": launched.method,
        "started_from": launched.start_from,
        "steps": run.steps,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_memory_bytes": peak_memory(run.device),
        "tokens_generated": tokens["tokens/generated"],
        "tokens_trained": tokens["tokens/trained"],
        "eval": _known(heldout),
        "data": dict(launched.counts),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {run.device}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return out


def microbatch_that_fits(device: str) -> int:
    """Tokens of a microbatch where --microbatch-tokens is not given."""
    return 2048 if device == "cpu" else 16384


def peak_memory(device: str) -> int:
    """Bytes: the most that the GPU held for us, else the most resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    if not lines:
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_known(line), ensure_ascii=False) + "\n" for line in lines)


def _known(numbers: dict[str, Any]) -> dict[str, Any]:
    """null for NaN, which JSON does not have."""
    return {key: value if value == value else None for key, value in numbers.items()}
