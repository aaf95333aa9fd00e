"""What saves a run from a step that went wrong: gradients that are not finite are kept for replay, a full memory halves the microbatch.

kept = RUN/skipped/step-N/: the checkpoint that the step is reached from, batch.jsonl (its rows of data) and replay.json.
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

KEPT = 3  # skipped steps of a run that are kept for replay, each with a checkpoint
SMALLEST = 32  # tokens of a microbatch, under which halving it is given up


class Skips:
    """Counts the steps of a run that were not taken, because their gradient was not finite."""

    def __init__(self, out: Path, run: Run, checkpoints: Checkpoints):
        self.out, self.run, self.checkpoints = out, run, checkpoints
        self.known, self.in_a_row = 0, 0

    def look(self, step: int, counted: dict[str, Any]) -> Metrics:
        """Metrics of the step just made, empty if it was taken. counted: what launch had counted when it began."""
        parts = self.checkpoints.parts.values()
        skipped = sum(part.skipped for part in parts if isinstance(part, Optimizer)) - self.known
        if not skipped:
            self.in_a_row = 0
            return {}
        self.known, self.in_a_row = self.known + skipped, self.in_a_row + 1
        kept = self._keep(step, counted) if self.in_a_row == 1 else None
        look = f"; to look at it: trivet replay {kept}" if kept else ""
        self.run.note(f"the gradient of step {step} is not finite; the step was not taken{look}")
        return {"skipped_updates": skipped}

    def enough(self, step: int) -> None:
        """InputError after --max-skipped-steps of them in a row, the newest checkpoint being of before them, or where no step was taken."""
        if self.in_a_row == self.run.config.max_skipped_steps or self.in_a_row == step == self.run.steps:
            first, saved = step - self.in_a_row + 1, steps(self.checkpoints.folder)
            there = f"step {saved[-1][0]}" if saved else "the start"
            kept = self.out / "skipped" / f"step-{first}"
            look = f"look at one with trivet replay {kept}, " if kept.exists() else ""
            raise InputError(
                f"{self.in_a_row} steps in a row, from step {first} on, had a gradient that is not finite, and were not taken; {look}"
                f"mend the reward or lower lr in {self.out / 'config.toml'}, and go on from {there}: trivet resume {self.out}"
            )

    def _keep(self, step: int, counted: dict[str, Any]) -> Path | None:
        """What trivet replay needs, from the beginning of the step if its weights are still those, else from a checkpoint before.

        Of many processes all save the beginning, and the first keeps it.
        """
        folder, half = self.out / "skipped" / f"step-{step}", self.out / "skipped" / f".step-{step}"
        devices = self.run.devices
        if devices.first(lambda: len(list(folder.parent.glob("step-*"))) >= KEPT):
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
            file.writelines(json.dumps(dict(example.row), ensure_ascii=False, default=str) + "\n" for example in rows)
        facts = {"step": step, "from": int(start.name.removeprefix("step-")) if start else 0}
        write_json(half / "replay.json", facts | ({"processes": devices.size} if devices.size > 1 else {}))
        half.rename(folder)
        return folder


def save_beginning(checkpoints: Checkpoints, done: int, counted: dict[str, Any]) -> Path | None:
    """A checkpoint of the beginning of the step after `done`, else the newest whole one before it; None stands for the start."""
    last, run = (done, checkpoints.folder / f"step-{done}"), checkpoints.run
    if done and checkpoints.untouched and run.devices.first(lambda: last not in steps(checkpoints.folder)):
        return checkpoints.save(done, counted, checkpoints.run.config.keep, beginning=True)
    return next((path for step, path in reversed(steps(checkpoints.folder)) if step <= done and not damage(path)), None)


class OutOfMemoryError(Exception):
    """A step did not fit; the run goes on from its newest checkpoint with this many tokens in a microbatch."""

    def __init__(self, out: Path, microbatch_tokens: int):
        super().__init__(out, microbatch_tokens)
        self.out, self.microbatch_tokens = out, microbatch_tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or Python say that there is no more memory, on a GPU or a CPU."""
    known = ("can't allocate memory", "cannot allocate memory", "out of memory")  # torch's, the system's
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in known)
    )


def give_back() -> None:
    """What nobody holds any more goes back to the system, and to the device."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc's: a file is mapped into what its heaps leave
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def is_lost_process(error: BaseException) -> bool:
    """Whether this is how torch says that another process of the run has gone without a word, killed for one."""
    known = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return known or isinstance(error, torch.distributed.DistError)


def halved(out: Path, run: Run, step: int, error: BaseException) -> OutOfMemoryError | InputError:
    """What to raise where this step did not fit: an InputError where smaller microbatches would not help."""
    called = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    budget = run.config.microbatch_tokens
    if "generate" in called:
        return InputError(
            f"out of memory while sampling in step {step}; lower --prompts-per-step, --group-size or --max-completion-tokens"
        )
    if budget // 2 < SMALLEST:
        return InputError(
            f"out of memory in step {step}, even with {budget} tokens at once; "
            "lower --max-prompt-tokens and --max-completion-tokens, or take a smaller --model"
        )
    known = read_object(out / "run.json")
    known["out_of_memory"] = [*known.get("out_of_memory", []), {"step": step, "microbatch_tokens": budget}]
    write_json(out / "run.json", known)
    run.note(
        f"out of memory in step {step}; making it again with --microbatch-tokens {budget // 2} in place of {budget}"
    )
    return OutOfMemoryError(out, budget // 2)


def _link(source: str, target: str) -> None:
    """The same bytes under a second name where the disk can do that: no copy, and they stay when the first name goes."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
