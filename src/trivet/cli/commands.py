"""trivet generate and trivet score: sample a model's completions; score rows with rewards."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivet.arguments import parse
from trivet.batch import Example, Rollouts
from trivet.data.examples import load_examples
from trivet.data.rows import read_rows
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.model.load import (
    is_scorer,
    load_policy,
    load_scorer,
    model_facts,
    require_causal,
    usable_device,
)
from trivet.model.text import decode_completion, encode_prompt, load_tokenizer, stop_ids
from trivet.places import is_local_model, model_folder
from trivet.recipes.offline import to_groups
from trivet.rewards.functions import load_rewards


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Complete prompts; print the completions, or write them as JSON lines with --out."""

    model: str = ""
    """Run directory, model folder or hub name."""
    prompt: str = ""
    """A single prompt; for a chat model, the user's message."""
    data: str = ""
    """Instead of --prompt: a file or hub name whose rows have a prompt."""
    out: str = ""
    """Write JSON lines here instead of printing: the row's columns and the completion."""
    group_size: int = 1
    """Completions per prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together hold this share of the probability."""
    max_completion_tokens: int = 256
    """Maximum length of a completion."""
    limit: int = 0
    """Use only this many rows of --data; 0: all."""
    seed: int = 0
    """Sampling seed."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    chat_template: str = ""
    """Replace the tokenizer's chat template: 'plain' or a Jinja file."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score the completions (or the chosen and rejected sides) in a file with rewards."""

    data: str = ""
    """Rows with prompt and completion, or with chosen and rejected."""
    reward: tuple[str, ...] = ()
    """Built-in name, file.py:function, module:function, reward model (run, folder, hub name), judge
    (URL), or .toml; several are added up.
    """
    reward_weights: tuple[float, ...] = ()
    """One weight per reward."""
    model: str = ""
    """Model whose tokenizer and chat template encode the rows; default: the reward model."""
    out: str = ""
    """Write the rows with their scores here as JSON lines."""
    limit: int = 0
    """Use only this many rows; 0: all."""
    max_prompt_tokens: int = 512
    """Rows with a longer prompt are left out and counted."""
    max_completion_tokens: int = 256
    """Longer completions are cut and counted."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    chat_template: str = ""
    """Replace the tokenizer's chat template: 'plain' or a Jinja file."""


def generate(args: list[str]) -> None:
    """trivet generate"""
    config: GenerateConfig = parse(GenerateConfig, args)
    if bool(config.prompt) == bool(config.data):
        raise InputError("pass either --prompt TEXT or --data FILE")
    if min(config.group_size, config.max_completion_tokens) < 1 or config.temperature < 0:
        raise InputError(
            "--group-size and --max-completion-tokens must be at least 1, --temperature at least 0"
        )
    new_file(config.out)
    folder = model_folder(config.model)
    require_causal(folder, "generate")
    tokenizer = load_tokenizer(folder, config.chat_template)
    stops, device, context = (
        stop_ids(folder, tokenizer),
        usable_device(config.device),
        model_facts(folder)[1],
    )
    if config.prompt:
        prompt = (
            [{"role": "user", "content": config.prompt}]
            if tokenizer.chat_template
            else config.prompt
        )
        row = {"prompt": prompt}
        examples = [
            Example(prompt=encode_prompt(tokenizer, prompt), completions=[], learned=[], row=row)
        ]
    else:
        counts = Counter[str]()
        limits: dict[str, Any] = {"max_prompt": context - 1, "max_completion": context}
        examples = load_examples(config.data, tokenizer, stops, "prompts", counts=counts, **limits)
        examples = examples[: config.limit or None]
        report(counts)
    room = min(
        config.max_completion_tokens, context - max(len(example.prompt) for example in examples)
    )
    if room < 1:
        raise InputError(
            f"the prompt is longer than the context window of {config.model} ({context} tokens); "
            "shorten it"
        )
    policy = load_policy(folder, device=device)
    sampler = torch.Generator(device).manual_seed(config.seed)
    decode = partial(decode_completion, tokenizer)
    engine = Engine(decode, stops, room, config.temperature, sampler, config.top_k, config.top_p)
    with open(config.out, "x", encoding="utf-8") if config.out else nullcontext(sys.stdout) as file:
        for start in range(0, len(examples), 32):  # finished batches are written at once
            rollouts = engine.generate(policy, examples[start : start + 32], config.group_size)
            for b, text in enumerate(rollouts.texts):
                row = rollouts.rows[b // config.group_size]
                line = {**row, "completion": text, "finished": bool(rollouts.finished[b])}
                number = f"[{b % config.group_size + 1}] " if config.group_size > 1 else ""
                print(
                    json.dumps(line, ensure_ascii=False) if config.out else number + text.strip(),
                    file=file,
                    flush=True,
                )
    if config.out:
        total = len(examples) * config.group_size
        print(f"wrote {total:,} completions to {config.out}", file=sys.stderr)


def report(counts: Counter[str]) -> None:
    """Print how many rows were read, left out or cut, on stderr."""
    print("\n".join(f"{reason}: {count:,}" for reason, count in counts.items()), file=sys.stderr)


def new_file(path: str) -> None:
    """Raise InputError if the output file already exists."""
    if path and Path(path).exists():
        raise InputError(f"--out {path} already exists; choose another name or remove it first")


def score(args: list[str]) -> None:
    """trivet score"""
    config: ScoreConfig = parse(ScoreConfig, args)
    new_file(config.out)
    folders = [folder for folder in map(model_folder, config.reward) if is_local_model(folder)]
    if not (config.model or folders):
        raise InputError(
            "none of these rewards is a local model; pass --model with the model whose tokenizer "
            "encodes the rows"
        )
    folder = model_folder(config.model) if config.model else folders[0]
    tokenizer = load_tokenizer(folder, config.chat_template)
    stops, device, counts = (
        stop_ids(folder, tokenizer),
        usable_device(config.device),
        Counter[str](),
    )
    limits: dict[str, Any] = {
        "max_prompt": config.max_prompt_tokens,
        "max_completion": config.max_completion_tokens,
    }
    form = "preference" if "chosen" in next(read_rows(config.data), {}) else "supervised"
    examples = load_examples(config.data, tokenizer, stops, form, counts=counts, **limits)[
        : config.limit or None
    ]
    load = load_scorer if is_scorer(folder) else load_policy
    rewards = load_rewards(
        config.reward, config.reward_weights, tokenizer, like=load(folder, device=device)
    )
    scores = torch.cat(
        [
            rewards(as_rollouts(examples[i : i + 64], tokenizer, stops, device))
            for i in range(0, len(examples), 64)
        ]
    )
    report(counts)
    if form == "preference":
        chosen, rejected = scores.view(-1, 2).unbind(1)
        lines: list[dict[str, Any]] = [
            {**example.row, "score_chosen": a, "score_rejected": b}
            for example, a, b in zip(examples, chosen.tolist(), rejected.tolist(), strict=True)
        ]
        right, pairs = int((chosen > rejected).sum()), len(examples)
        margin = (chosen - rejected).nanmean()
        print(
            f"{right:,} of {pairs:,} pairs ranked correctly ({right / pairs:.1%}), mean margin "
            f"{margin:.4f}"
        )
    else:
        lines = [
            {**example.row, "score": a}
            for example, a in zip(examples, scores.tolist(), strict=True)
        ]
        valid = scores[~scores.isnan()]
        unscored = f", {len(scores) - len(valid):,} unscored" if len(valid) < len(scores) else ""
        spread = valid.std(correction=0) if len(valid) else torch.nan
        print(
            f"mean score {valid.mean():.4f} over {len(valid):,} rows{unscored}, standard deviation "
            f"{spread:.4f}"
        )
    if config.out:
        with open(config.out, "x", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def as_rollouts(
    examples: Sequence[Example], tokenizer: Any, stops: Sequence[int], device: str
) -> Rollouts:
    """Completions from data wrapped as Rollouts, so that rewards can score them."""
    groups = to_groups(examples, device)
    finished = torch.tensor(
        [ids[-1] in stops for example in examples for ids in example.completions]
    )
    texts = [
        decode_completion(tokenizer, example.prompt, ids[:-1] if ids[-1] in stops else ids)
        for example in examples
        for ids in example.completions
    ]
    rows = [example.row for example in examples]
    return Rollouts(
        groups=groups,
        logprobs=torch.zeros_like(groups.completions, dtype=torch.float32),
        finished=finished,
        texts=texts,
        rows=rows,
    )
