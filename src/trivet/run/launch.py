"""From a Config to a run on disk: everything is loaded and checked here, before a recipe's loop begins.

out = launch(grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",)))
"""

import gc
import importlib
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from trivet.batch import Example
from trivet.data import LazyExamples, load_examples, split_by_prompt
from trivet.errors import InputError
from trivet.generation.server import NoServerError
from trivet.model.blocks import checkpoint_blocks
from trivet.model.load import (
    load_policy,
    load_scorer,
    model_facts,
    require_causal,
    usable_device,
)
from trivet.model.text import decode_completion, load_tokenizer, stop_ids
from trivet.places import model_folder, require_places
from trivet.rewards.functions import load_rewards
from trivet.run import ranks
from trivet.run.adapted import adapted, check_adapter
from trivet.run.arguments import typed
from trivet.run.checkpoints import Checkpoints, save_whole
from trivet.run.config import check
from trivet.run.dynamic_sampling import refill
from trivet.run.files import RunDirectory
from trivet.run.loop import Metrics, Run
from trivet.run.memory import by_part, memory_now, peak_memory
from trivet.run.options import Options
from trivet.run.reading import read_object
from trivet.run.record import Record, short
from trivet.run.rescue import (
    OutOfMemoryError,
    Skips,
    give_back,
    halved,
    is_lost_process,
    is_out_of_memory,
    save_beginning,
)
from trivet.run.servers import servers_of
from trivet.run.stopping import asked_of, asked_to_stop
from trivet.run.trackers import send, trackers, until_end
from trivet.run.unchanged import facts_of, facts_of_rewards, note_rewards, require_examples
from trivet.timing import Clock


class Launch:
    """A run with what surrounds it: its recipe, tokenizer, data report and directory. Writes nothing before the first step."""

    def __init__(self, config: Options, again: bool = False):
        given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
        config = replace(config, **typed(type(config), given, ""))
        self.config, self.recipe = config, importlib.import_module(type(config).__module__)
        self.method = self.recipe.__name__.rpartition(".")[2].replace("_", "-")
        check(config, self.method, again=again)
        require_places(config)
        self.start_from = model_folder(config.model)
        check_adapter(config, self.start_from)
        self.out = Path(ranks.same(config.out or f"runs/{self.method}-{time.strftime('%Y%m%d-%H%M%S')}"))
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
        how: dict[str, Any] = {"precision": config.precision, "quantize": config.quantize}
        how |= {"device": device, "from_scratch": config.from_scratch}
        load_adapted = ranks.loading(lambda name, **how: adapted(load(name, **how), config, name))
        model = load_adapted(self.start_from, **how)
        if config.gradient_checkpointing and ranks.US is None:
            checkpoint_blocks(model)
        if self.recipe.TRAINS == "scorer":
            self._give_pad_token(model)
        else:
            model.generation_config.eos_token_id = self.stops  # what is saved ends where it was taught to end
        names, weights = getattr(config, "reward", None), getattr(config, "reward_weights", ())
        own: dict[str, Any] = {"like": model, "note": lambda text: self.run.note(text)}
        self.run = Run(
            config=config,
            model=model,
            decode=partial(decode_completion, self.tokenizer),
            stops=self.stops,
            train=train,
            heldout=heldout,
            reward=None if names is None else load_rewards(names, weights, self.tokenizer, **own),
            steps=config.steps or max(1, round(config.epochs * len(train) / config.prompts_per_step)),
            device=device,
            generator=torch.Generator(device).manual_seed(config.seed),
        )
        self.run.refill = partial(refill, self.run)
        self.record = Record(self.out, config, self.method, self.run.steps, self.tokenizer, self.run.decode)
        self.record = ranks.recorder(self.record)
        self.record.reward, self.run.keep, self.run.keeps = self.run.reward, self.record.keep, self.record.keeps

    def example(self, most: int = 120) -> dict[str, Any]:
        """The first training example decoded: the end of its prompt, and its completions in spans, each learned or not."""
        example = self.run.train[0]
        cut, completions = "…" if len(example.prompt) > most else "", list[list[tuple[str, bool]]]()
        for ids, learned in zip(example.completions, example.learned, strict=True):
            flagged = list(zip(ids, learned, strict=True))[:most]
            spans = [(flag, [token for token, _ in span]) for flag, span in groupby(flagged, itemgetter(1))]
            completions.append([(self.tokenizer.decode(span), flag) for flag, span in spans])
            if len(ids) > most:
                completions[-1].append(("…", False))
        return {"prompt": cut + self.tokenizer.decode(example.prompt[-most:]), "completions": completions}

    def _examples(self) -> tuple[Sequence[Example], list[Example]]:
        config, room = self.config, self.context - self.config.max_completion_tokens
        if room < 1:
            raise InputError(
                f"--max-completion-tokens {config.max_completion_tokens} leaves no room for a prompt in the context of "
                f"{config.model} ({self.context} tokens); lower it"
            )

        def load(path: str, counts: Counter[str]) -> Sequence[Example]:
            limits: dict[str, Any] = {
                "max_prompt": min(config.max_prompt_tokens, room),
                "max_completion": config.max_completion_tokens,
                "truncate_prompts": config.truncate_prompts,
                "vocabulary": self.vocabulary,
                "lazily": True,
            }
            return load_examples(path, self.tokenizer, self.stops, self.recipe.ROWS, counts=counts, **limits)

        train = load(config.data, self.counts)
        if config.eval_data:
            counts = Counter[str]()
            heldout = load(config.eval_data, counts)
            self.counts |= {f"held-out data, {key}": n for key, n in counts.items() if key.startswith(("left", "cut"))}
        else:
            train, heldout = split_by_prompt(train, config.eval_fraction, config.seed, config.eval_limit)
        if not train:
            raise InputError(f"{config.data}: all rows fell into the held-out share; lower --eval-fraction")
        self.counts["for training"], self.counts["held out"] = len(train), len(heldout)
        if not heldout:
            self.counts["evaluations (nothing is held out: --eval-fraction, --eval-data)"] = 0
        looked_at = train[:1000] if isinstance(train, LazyExamples) else train
        plain = sum(isinstance(example.row.get("prompt"), str) for example in looked_at)
        if self.tokenizer.chat_template and plain:
            self.counts["prompts taken as plain text, though the model has a chat template"] = plain
        return train, list(heldout[: config.eval_limit])

    def _give_pad_token(self, model: Any) -> None:
        """Record a padding id that ends no sequence, so that transformers too reads the score at the last real token."""
        pad = self.tokenizer.pad_token_id
        if pad is None or pad in self.stops:
            unused = [i for i in self.tokenizer.all_special_ids if i not in self.stops]
            pad = unused[-1] if unused else len(self.tokenizer) - 1
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)
        model.config.pad_token_id = pad


Watch = Callable[[Launch, int, Metrics], None]  # step 0 without metrics when all is loaded, then after each step
SAVE_SECONDS = 600.0  # between checkpoints where --save-every is not given


def launch(config: Options, watch: Watch | None = None, *, again: bool = False) -> Path:
    """Train by the recipe that this config belongs to; returns the run directory, a Path that a notebook displays.

    It holds config.toml, run.json, metrics.jsonl (a line a step), samples.jsonl, summary.json, checkpoints/ and model/.
    again: go on with the run in config.out from its newest checkpoint that is whole, as if it had never stopped.
    """
    if ranks.started():
        with ranks.together(config):
            return launch(config, watch if ranks.leads() else None, again=again)
    if watch is None and "ipykernel" in sys.modules:  # in a notebook somebody looks
        from trivet.run.terminal import Terminal

        with closing(Terminal()) as terminal:
            return launch(config, terminal, again=again)
    while True:
        try:
            return _launch(config, watch, again)
        except OutOfMemoryError as error:  # the same step again
            config, again = replace(config, out=str(error.out), microbatch_tokens=error.microbatch_tokens), True
        give_back()  # what the run held, its model above all


def _launch(config: Options, watch: Watch | None, again: bool) -> Path:
    program = memory_now(usable_device(config.device))
    launched = Launch(config, again)
    run, record, out = launched.run, launched.record, launched.out
    checkpoints = ranks.keeper(Checkpoints)(out, run, launched.tokenizer)
    run.holds = checkpoints.holds
    if watch:
        watch(launched, 0, {})
    about = {"started_from": launched.start_from, "start": ranks.start_of(run.model), "began": time.time()}
    about |= {"id": secrets.token_hex(4)}  # by which trackers know the run
    about |= {"data": launched.counts, "example": launched.example()}
    about |= {"parameters": sum(p.numel() for p in run.model.parameters())}
    about |= {"examples": facts_of(run.train, run.heldout), "rewards": facts_of_rewards(vars(config).get("reward", ()))}
    generates = servers_of(run, out, launched.start_from, launched.context)
    together = ranks.at_work(launched.recipe, run)
    with (
        record.locked(),
        together,
        Clock() as clock,
        asked_to_stop(run) as asked,
        generates as elsewhere,
    ):
        counted = (checkpoints.go_on(run.note) if again else {}) or {
            "step": 0,
            "seconds": 0.0,
            "tokens": {},
            "eval": {},
        }
        done, tokens, heldout = counted["step"], Counter[str](counted["tokens"]), dict[str, float](counted["eval"])
        if done:
            require_examples(out, config.data, about["examples"], run.note)
            note_rewards(out, about["rewards"], run.note)
        skips = Skips(out, run, checkpoints)
        record.begin(about, done)
        options = {"method": launched.method} | vars(launched.config)
        identifier = read_object(out / "run.json").get("id", "")
        tracked = trackers(config.track if ranks.leads() else (), out, options, identifier)
        began = time.perf_counter() - counted["seconds"]
        saved = time.monotonic()
        try:
            for step, metrics in enumerate(until_end(tracked, launched.recipe.train(run.config, run)), done + 1):
                seconds = time.perf_counter() - began
                metrics = {"step": step, "seconds": round(seconds, 3)} | metrics | skips.look(step, counted)
                metrics |= elsewhere.metrics() | clock.take()
                tokens.update({key: int(value) for key, value in metrics.items() if key.startswith("tokens/")})
                heldout |= {key: value for key, value in metrics.items() if key.startswith("eval/")}
                record.step(metrics)
                send(tracked, step, metrics)
                late = time.monotonic() - saved > SAVE_SECONDS
                due = step % config.save_every == 0 if config.save_every else late
                counted = {"seconds": seconds, "tokens": dict(tokens), "eval": dict(heldout)}
                stopping = asked[0] if asked else 0  # looked at once: the signal may come at any moment
                due, stopping = ranks.agreed(due, stopping)
                if (stopping or (due and not skips.in_a_row)) and step < run.steps:
                    checkpoints.save(step, counted, config.keep if config.save_every else 2)
                    saved = time.monotonic()
                if watch:
                    watch(launched, step, metrics)
                skips.enough(step)
                done = step
                checkpoints.step_begins()
                if stopping and step < run.steps:
                    raise asked_of(stopping, f"stopped after step {step} of {run.steps}; to go on: trivet resume {out}")
        except BaseException as error:
            failed = _failed(error, launched, checkpoints, done, counted)
            if failed is not error:
                raise failed from None
            raise
        if (whole := ranks.whole(run.model)) is not None:
            save_whole(whole, launched.tokenizer, out / "model", merge=config.merge)
        peak, rewards = peak_memory(run.device), {} if run.reward is None else run.reward.rewards
        summary = {
            "steps": run.steps,
            "seconds": round(time.perf_counter() - began, 2),
            "peak_memory_bytes": peak,
            "memory": by_part(run.model, checkpoints.parts, rewards, program, peak),
            "tokens_generated": tokens["tokens/generated"],
            "tokens_trained": tokens["tokens/trained"],
            "eval": {name: short(value) for name, value in heldout.items()},
        }
        record.end(summary | {key: about[key] for key in ("started_from", "data", "parameters")})
    return RunDirectory(out)


def _failed(
    error: BaseException, launched: Launch, checkpoints: Checkpoints, done: int, counted: dict[str, Any]
) -> BaseException:
    """What the run ends with in place of this error of the step after `done`, whose beginning is saved if that helps."""
    run, out, failed = launched.run, launched.out, error
    if is_out_of_memory(error) and ranks.US is not None:
        go_on = f" in {out / 'config.toml'}, then: trivet resume {out}" if done else ""
        failed = InputError(
            f"out of memory on rank {ranks.US.rank} in step {done + 1}; start more processes, add --gradient-checkpointing, or "
            f"lower --microbatch-tokens ({run.config.microbatch_tokens}){go_on}"
        )
    elif is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # what the step held
        gc.collect()
        save_beginning(checkpoints, done, counted)
        failed = halved(out, run, done + 1, error)
    elif isinstance(error, NoServerError) and done:
        start = save_beginning(checkpoints, done, counted)
        step = int(start.name.removeprefix("step-")) if start else 0
        where = f"in step {done + 1}, to go on from {f'step {step}' if step else 'the start'}"
        where = f"after step {done}, to go on" if step == done else where
        failed = InputError(f"{error}; stopped {where}: trivet resume {out}")
    elif is_lost_process(error):
        said = f"; stopped in step {done + 1}, to go on: trivet resume {out}" if done else ""
        failed = InputError(f"another process of this run has gone, and what it said stands above, if anything{said}")
    if done == 0 and isinstance(failed, InputError | OSError | KeyboardInterrupt):
        launched.record.undo()
    return failed


def microbatch_that_fits(device: str) -> int:
    """Tokens of a microbatch where --microbatch-tokens is not given."""
    return 2048 if device == "cpu" else 16384
