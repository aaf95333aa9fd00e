"""Recovery from failed steps: a step whose gradient is not finite is kept for replay; when memory
runs out, the microbatch is halved.

A kept step is RUN/skipped/step-N/: the checkpoint from which the step is reached, batch.jsonl (its
rows of data) and replay.json.
"""

import ctypes
import gc
import json
import os
import shutil
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from trivet.errors import InputError
from trivet.step import Metrics
from trivet.step.optimizer import Optimizer
from trivet.step.run import Run
from trivet.store.checkpoints import Checkpoints, damage, steps
from trivet.store.files import write_json
from trivet.store.reading import read_object

MAX_KEPT = 3  # skipped steps of a run that are kept for replay, each with a checkpoint
MIN_MICROBATCH = 32  # tokens; a microbatch is not halved to less


class Skips:
    """Counts the steps of a run that were skipped because their gradient was not finite."""

    def __init__(self, out: Path, run: Run, checkpoints: Checkpoints):
        self.out, self.run, self.checkpoints = out, run, checkpoints
        self.known, self.in_a_row = 0, 0

    def check(self, step: int, counted: dict[str, Any]) -> Metrics:
        """Return the metrics of a skipped step, {} if it was taken. counted: launch's totals when
        the step began.
        """
        parts = self.checkpoints.parts.values()
        skipped = sum(part.skipped for part in parts if isinstance(part, Optimizer)) - self.known
        if not skipped:
            self.in_a_row = 0
            return {}
        self.known, self.in_a_row = self.known + skipped, self.in_a_row + 1
        kept = self._keep(step, counted) if self.in_a_row == 1 else None
        advice = f"; to inspect it: trivet replay {kept}" if kept else ""
        self.run.note(f"the gradient of step {step} is not finite; the step was skipped{advice}")
        return {"skipped_updates": skipped}

    def raise_if_too_many(self, step: int) -> None:
        """Raise an InputError after --max-skipped-steps in a row, or if every step of the run was
        skipped. The newest checkpoint is from before them.
        """
        if (
            self.in_a_row == self.run.config.max_skipped_steps
            or self.in_a_row == step == self.run.steps
        ):
            first, saved = step - self.in_a_row + 1, steps(self.checkpoints.folder)
            start = f"step {saved[-1][0]}" if saved else "the start"
            kept = self.out / "skipped" / f"step-{first}"
            inspect = f"inspect one with trivet replay {kept}, " if kept.exists() else ""
            raise InputError(
                f"skipped {self.in_a_row} steps in a row, from step {first}, because their "
                f"gradient was not finite; {inspect}"
                f"fix the reward or lower lr in {self.out / 'config.toml'}, and continue from "
                f"{start}: trivet resume {self.out}"
            )

    def _keep(self, step: int, counted: dict[str, Any]) -> Path | None:
        """Keep what trivet replay needs: the beginning of the step if its weights are unchanged,
        else an earlier checkpoint.

        With many processes, all save the beginning, and rank 0 keeps it.
        """
        folder, half = self.out / "skipped" / f"step-{step}", self.out / "skipped" / f".step-{step}"
        devices = self.run.devices
        if devices.first(lambda: len(list(folder.parent.glob("step-*"))) >= MAX_KEPT):
            return None
        start = save_beginning(self.checkpoints, step - 1, counted)
        if devices.rank:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        if start:
            shutil.copytree(start, half, copy_function=_link, dirs_exist_ok=True)
        rows = next(examples for number, examples in self.run.order() if number == step)
        with (half / "batch.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(dict(example.row), ensure_ascii=False, default=str) + "\n"
                for example in rows
            )
        facts = {"step": step, "from": int(start.name.removeprefix("step-")) if start else 0}
        write_json(
            half / "replay.json", facts | ({"processes": devices.size} if devices.size > 1 else {})
        )
        half.rename(folder)
        return folder


def save_beginning(checkpoints: Checkpoints, done: int, counted: dict[str, Any]) -> Path | None:
    """Save a checkpoint of the beginning of the step after `done` and return it, else the newest
    intact one before it; None means the start of the run.
    """
    last, run = (done, checkpoints.folder / f"step-{done}"), checkpoints.run
    if (
        done
        and checkpoints.untouched
        and run.devices.first(lambda: last not in steps(checkpoints.folder))
    ):
        return checkpoints.save(done, counted, checkpoints.run.config.keep, beginning=True)
    return next(
        (
            path
            for step, path in reversed(steps(checkpoints.folder))
            if step <= done and not damage(path)
        ),
        None,
    )


class OutOfMemoryError(Exception):
    """A step did not fit into memory; the run continues from its newest checkpoint with this many
    tokens in a microbatch.
    """

    def __init__(self, out: Path, microbatch_tokens: int):
        super().__init__(out, microbatch_tokens)
        self.out, self.microbatch_tokens = out, microbatch_tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raised this error because memory ran out, on a GPU or a CPU."""
    # the wordings of torch and of the system
    messages = ("can't allocate memory", "cannot allocate memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in messages)
    )


def release_memory() -> None:
    """Return unused memory to the system and to the device."""
    gc.collect()
    with suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_lost_process(error: BaseException) -> bool:
    """Whether torch raised this error because another process of the run exited silently, killed
    for example.
    """
    from_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return from_gloo or isinstance(error, torch.distributed.DistError)


def halve_microbatch(
    out: Path, run: Run, step: int, error: BaseException
) -> OutOfMemoryError | InputError:
    """Return what to raise if this step did not fit into memory: an InputError if smaller
    microbatches would not help.
    """
    functions = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    budget = run.config.microbatch_tokens
    if "generate" in functions:
        return InputError(
            f"out of memory while sampling in step {step}; lower --prompts-per-step, --group-size "
            "or --max-completion-tokens"
        )
    if budget // 2 < MIN_MICROBATCH:
        return InputError(
            f"out of memory in step {step}, even with {budget} tokens at once; "
            "lower --max-prompt-tokens and --max-completion-tokens, or choose a smaller --model"
        )
    facts = read_object(out / "run.json")
    facts["out_of_memory"] = [
        *facts.get("out_of_memory", []),
        {"step": step, "microbatch_tokens": budget},
    ]
    write_json(out / "run.json", facts)
    run.note(
        f"out of memory in step {step}; repeating it with --microbatch-tokens {budget // 2} "
        f"instead of {budget}"
    )
    return OutOfMemoryError(out, budget // 2)


def _link(source: str, target: str) -> None:
    """Hard-link a file if the disk can, else copy it; either way it outlives the original."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
