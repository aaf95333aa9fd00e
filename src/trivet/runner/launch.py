"""The loop of a run: from its first step, or the checkpoint that it resumes from, to the trained
model.

out = launch(grpo.Config(model="Qwen/Qwen3-0.6B", data="questions.jsonl", reward=("last_number",)))
"""

import gc
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trivet.distributed.checkpoints import ShardedCheckpoints
from trivet.distributed.ranks import Ranks, join_group, started_by_torchrun
from trivet.errors import InputError
from trivet.generation.server import NoServerError
from trivet.model.load import usable_device
from trivet.runner.memory import bytes_by_part, memory_now, peak_memory
from trivet.runner.prepare import Launch
from trivet.runner.rescue import (
    OutOfMemoryError,
    Skips,
    halve_microbatch,
    is_lost_process,
    is_out_of_memory,
    release_memory,
    save_beginning,
)
from trivet.runner.servers import servers_of
from trivet.runner.stopping import catch_stop_signals, stopped_by
from trivet.step import Metrics
from trivet.step.devices import Devices, OneProcess
from trivet.step.metrics import reduced
from trivet.step.optimizer import Optimizer
from trivet.step.options import Options
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.store.checkpoints import Checkpoints, save_whole
from trivet.store.fingerprint import facts_of, facts_of_rewards, note_rewards, require_examples
from trivet.store.reading import read_object
from trivet.store.record import short
from trivet.store.trackers import send, trackers, until_end
from trivet.timing import Clock

# called with step 0 and no metrics when everything is loaded, then after each step
Watch = Callable[[Launch, int, Metrics], None]
SAVE_SECONDS = 600.0  # between checkpoints if --save-every is not set


@dataclass
class Totals:
    """The totals of a run up to its last step; a checkpoint saves them."""

    seconds: float = 0.0
    tokens: Counter[str] = field(default_factory=Counter[str])
    eval: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, metrics: Metrics, seconds: float) -> None:
        """Add a step to the totals."""
        self.seconds = seconds
        self.tokens.update(
            {key: int(value) for key, value in metrics.items() if key.startswith("tokens/")}
        )
        self.eval |= {key: value for key, value in metrics.items() if key.startswith("eval/")}

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves."""
        return {"seconds": self.seconds, "tokens": dict(self.tokens), "eval": dict(self.eval)}


def launch(config: Options, watch: Watch | None = None, *, again: bool = False) -> Path:
    """Train with the recipe that this config belongs to; return the run directory.

    It holds config.toml, run.json, metrics.jsonl (a line per step), samples.jsonl, summary.json,
    checkpoints/ and model/. again: continue the run in config.out from its newest intact
    checkpoint, as if it had never stopped.
    """
    if started_by_torchrun():
        with join_group(config) as ranks:
            return _launch(config, ranks, watch if ranks.rank == 0 else None, again)
    while True:
        try:
            return _launch(config, OneProcess(), watch, again)
        except OutOfMemoryError as error:  # repeat the step with smaller microbatches
            smaller = error.microbatch_tokens
            config, again = replace(config, out=str(error.out), microbatch_tokens=smaller), True
        release_memory()  # of the failed attempt, its model above all


def _launch(config: Options, devices: Devices, watch: Watch | None, again: bool) -> Path:
    program = memory_now(usable_device(config.device))
    launched = Launch(config, devices, again)
    run, record, out = launched.run, launched.record, launched.out
    checkpoints = checkpoints_of(launched)
    run.begins = checkpoints.begin
    if watch:
        watch(launched, 0, {})
    with (
        record.locked(),
        Clock() as clock,
        catch_stop_signals(run) as asked,
        _servers_of(launched) as servers,
    ):
        saved_counts = checkpoints.choose_start(run.note) if again else {}
        done = saved_counts.get("step", 0)
        counted = Totals()
        if done:
            tokens = Counter(saved_counts["tokens"])
            counted = Totals(saved_counts["seconds"], tokens, saved_counts["eval"])
        facts = _run_facts(launched, done)
        record.begin(facts, done)
        skips = Skips(out, run, checkpoints)
        tracked = _trackers(launched)
        began = time.perf_counter() - counted.seconds
        saved = time.monotonic()
        try:
            for step, result in enumerate(
                until_end(tracked, launched.recipe.train(run.config, run)), done + 1
            ):
                measured = finish(launched, step, result)
                seconds = time.perf_counter() - began
                metrics = {"step": step, "seconds": round(seconds, 3)} | measured
                metrics |= skips.check(step, counted.state())
                metrics |= (servers.metrics(result) if servers else {}) | clock.take()
                record.step(metrics)
                send(tracked, step, metrics)
                counted.add(metrics, seconds)
                late = time.monotonic() - saved > SAVE_SECONDS
                due = step % config.save_every == 0 if config.save_every else late
                # read `asked` only once: a signal may arrive at any time
                due, stopping = devices.most(due, asked[0] if asked else 0)
                if (stopping or (due and not skips.in_a_row)) and step < run.steps:
                    checkpoints.save(step, counted.state(), config.keep if config.save_every else 2)
                    saved = time.monotonic()
                if watch:
                    watch(launched, step, metrics)
                skips.raise_if_too_many(step)
                done = step
                checkpoints.step_begins()
                if stopping and step < run.steps:
                    raise stopped_by(
                        stopping,
                        f"stopped after step {step} of {run.steps}; to continue: trivet resume "
                        f"{out}",
                    )
        except BaseException as error:
            final = _final_error(error, launched, checkpoints, done, counted)
            if final is not error:
                raise final from None
            raise
        if (whole := devices.whole(run.model)) is not None:
            save_whole(whole, launched.tokenizer, out / "model", merge=config.merge)
        summary = _summary(launched, time.perf_counter() - began, counted, program)
        record.end(summary | {key: facts[key] for key in ("started_from", "data", "parameters")})
    return out


def finish(launched: Launch, step: int, result: Result) -> Metrics:
    """Complete a step: record its completions, evaluate if it is time to, and return its metrics as
    numbers.
    """
    run, record, metrics = launched.run, launched.record, dict(result.metrics)
    record.keep(step, result)
    if isinstance(optimizer := run.parts.get("optimizer"), Optimizer):
        metrics |= optimizer.metrics
    if run.evaluates(step) and hasattr(launched.recipe, "evaluate"):
        heldout: Result = launched.recipe.evaluate(run)
        record.keep(step, heldout, heldout=True)
        metrics |= {f"eval/{key}": value for key, value in heldout.metrics.items()}
    return reduced(metrics)


def checkpoints_of(launched: Launch) -> Checkpoints:
    """Return the checkpoints of one process, or of the many that hold the run's models."""
    alone = launched.out, launched.run, launched.tokenizer
    return (
        ShardedCheckpoints(launched.devices, *alone)
        if isinstance(launched.devices, Ranks)
        else Checkpoints(*alone)
    )


def _servers_of(launched: Launch) -> Any:
    return servers_of(launched.run, launched.out, launched.start_from, launched.context)


def _run_facts(launched: Launch, done: int) -> dict[str, Any]:
    """Collect the facts for run.json; for a resumed run, compare them with the recorded ones."""
    run, out, config = launched.run, launched.out, launched.run.config
    examples, rewards = (
        facts_of(run.train, run.heldout),
        facts_of_rewards(vars(config).get("reward", ())),
    )
    if done:
        require_examples(out, config.data, examples, run.note)
        note_rewards(out, rewards, run.note)
    return {
        "started_from": launched.start_from,
        "start": launched.devices.digest(run.model),
        "began": time.time(),
        "id": secrets.token_hex(4),  # identifies the run to trackers
        "data": launched.counts,
        "example": launched.example(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "examples": examples,
        "rewards": rewards,
    }


def _trackers(launched: Launch) -> Any:
    names = launched.config.track if launched.devices.rank == 0 else ()
    identifier = read_object(launched.out / "run.json").get("id", "")
    return trackers(
        names, launched.out, {"method": launched.method} | vars(launched.config), identifier
    )


def _summary(launched: Launch, seconds: float, counted: Totals, program: int) -> dict[str, Any]:
    """Build summary.json. program: the bytes in use before the model was loaded."""
    run: Run = launched.run
    peak, rewards = peak_memory(run.device), {} if run.reward is None else run.reward.rewards
    return {
        "steps": run.steps,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak,
        "memory": bytes_by_part(run.model, run.parts, rewards, program, peak),
        "tokens_generated": counted.tokens["tokens/generated"],
        "tokens_trained": counted.tokens["tokens/trained"],
        "eval": {name: short(value) for name, value in counted.eval.items()},
    }


def _final_error(
    error: BaseException, launched: Launch, checkpoints: Checkpoints, done: int, counted: Totals
) -> BaseException:
    """Return what to raise in place of this error of the step after `done`; save the beginning of
    that step if it helps.
    """
    run, out, devices, final = launched.run, launched.out, launched.devices, error
    if is_out_of_memory(error) and devices.size > 1:
        resume = f" in {out / 'config.toml'}, then: trivet resume {out}" if done else ""
        final = InputError(
            f"out of memory on rank {devices.rank} in step {done + 1}; start more processes, add "
            "--gradient-checkpointing, or "
            f"lower --microbatch-tokens ({run.config.microbatch_tokens}){resume}"
        )
    elif is_out_of_memory(error):
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
        gc.collect()
        save_beginning(checkpoints, done, counted.state())
        final = halve_microbatch(out, run, done + 1, error)
    elif isinstance(error, NoServerError) and done:
        start = save_beginning(checkpoints, done, counted.state())
        step = int(start.name.removeprefix("step-")) if start else 0
        where = f"in step {done + 1}; to continue from {f'step {step}' if step else 'the start'}"
        where = f"after step {done}; to continue" if step == done else where
        final = InputError(f"{error}; stopped {where}: trivet resume {out}")
    elif is_lost_process(error):
        then = f"; stopped in step {done + 1}; to continue: trivet resume {out}" if done else ""
        final = InputError(f"another rank exited; see its output above{then}")
    if done == 0 and isinstance(final, InputError | OSError | KeyboardInterrupt):
        launched.record.undo()
    return final
