"""Atomic checkpoints of everything that a run needs to resume bit for bit.

checkpoints/step-N/ is an ordinary model folder with state.safetensors and state.json beside the
weights, and manifest.json, the sizes and SHA-256 of all files. It is written under another name and
renamed when it is on the disk, so a kill leaves the old checkpoints intact.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trivet.errors import InputError
from trivet.model.load import restore, save_model
from trivet.model.quantize import component_tensors
from trivet.step.optimizer import Optimizer
from trivet.step.run import Run
from trivet.store.files import make_folder, to_disk, write_json
from trivet.store.state import (
    from_json,
    random_state,
    set_random_state,
    set_state,
    small_states,
    state_of,
    to_json,
)


class Checkpoints:
    """The state of one run: its model, the parts that its recipe holds, its random generators, and
    launch's totals.
    """

    def __init__(self, out: Path, run: Run, tokenizer: Any):
        self.folder, self.run, self.tokenizer = out / "checkpoints", run, tokenizer
        # the state at the beginning of the current step, except weights and optimizers
        self.before: dict[str, Any] = {}
        self.start: Path | None = None  # the checkpoint that the run resumes from
        self.size = 0  # bytes of the last checkpoint

    @property
    def parts(self) -> dict[str, Any]:
        """What the recipe has created for its loop: models, optimizers, tensors."""
        return self.run.parts

    def begin(self) -> None:
        """Restore the recipe's parts from the checkpoint that the run resumes from. Called when the
        loop begins.
        """
        self._make_room()
        if self.start is not None:
            self._restore(self.start)
        self.step_begins()

    def step_begins(self) -> None:
        """Remember the small states that the next step will change."""
        small, random = small_states(self.parts), random_state(self.run.generator)
        self.before = {"updates": self._updates(), "small": small, "random": random}

    @property
    def untouched(self) -> bool:
        """Whether the current step has not changed any weights yet, so that its beginning can still
        be saved.
        """
        return bool(self.before) and self.before["updates"] == self._updates()

    def _updates(self) -> list[int]:
        return [
            part.schedule.last_epoch for part in self.parts.values() if isinstance(part, Optimizer)
        ]

    def save(
        self, step: int, counted: dict[str, Any], keep: int = 0, *, beginning: bool = False
    ) -> Path:
        """Write the state after this step; with `beginning`, the state at the beginning of the next
        one, which must still be untouched.

        keep: afterwards remove all but this many of the newest checkpoints; 0 keeps all.
        """
        if not all(
            bool(part.isfinite().all())
            for x in self.run.model.parameters()
            for part in component_tensors(x)
        ):
            saved = [str(number) for number, _ in steps(self.folder)[-1:]]
            raise InputError(
                f"weights are NaN or infinite after step {step}; checkpoint not written; lower lr "
                f"in {self.folder.parent / 'config.toml'} and continue from "
                f"{' '.join(['step', *saved]) if saved else 'the start'}: "
                f"trivet resume {self.folder.parent}"
            )
        tensors: dict[str, Tensor] = {}
        own = {x.data_ptr() for x in self.run.model.state_dict().values()}
        parts = self.parts | (self.before["small"] if beginning else {})
        state = {
            "step": step,
            "counted": counted,
            "parts": {name: state_of(part, own) for name, part in parts.items()},
            "random": self.before["random"] if beginning else random_state(self.run.generator),
        }
        whole, half = self.folder / f"step-{step}", self.folder / f".step-{step}"
        self._make_room()
        shutil.rmtree(half, ignore_errors=True)
        make_folder(half)
        try:
            save_model(self.run.model, self.tokenizer, half)
            write_json(half / "state.json", {"state": to_json(state, tensors, "")})
            save_file(tensors, half / "state.safetensors")
            write_json(half / "manifest.json", {"step": step, "files": manifest(half)})
            put_in_place(half, whole, self.folder.parent)
        except BaseException:  # e.g. a full disk: earlier checkpoints stay as they are
            shutil.rmtree(half, ignore_errors=True)
            raise
        self.size = sum(path.stat().st_size for path in whole.rglob("*"))
        self._prune(keep)
        return whole

    def _prune(self, keep: int) -> None:
        for _, old in steps(self.folder)[: -keep or None] if keep else []:
            shutil.rmtree(old)

    def choose_start(self, note: Callable[[str], None]) -> dict[str, Any]:
        """Choose the newest intact checkpoint as the start; return launch's totals from it, {} if
        there is none.
        """
        for step, folder in reversed(steps(self.folder)):
            if trouble := damage(folder):
                note(f"{folder} is damaged ({trouble}); using the one before it")
                continue
            self.start = folder
            return json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"][
                "counted"
            ] | {"step": step}
        return {}

    def _restore(self, folder: Path) -> None:
        if (folder / "shards").exists():  # many processes wrote it
            from trivet.store import shard_files  # torch's distributed checkpoint imports slowly

            return shard_files.restore(self.run, self.parts, folder)
        run, tensors = self.run, load_file(folder / "state.safetensors")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]
        state = from_json(state, tensors)
        # only now: what the recipe created before its loop, DPO's reference, needs all steps
        run.done = state["step"]
        restore(run.model, folder)
        for name, part in self.parts.items():
            set_state(part, state["parts"].get(name))
        set_random_state(run.generator, state["random"])

    def _make_room(self) -> None:
        """Raise an InputError if the disk has no room for another checkpoint: before writing it, so
        that nothing is lost.
        """
        parent = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        free, needed = shutil.disk_usage(parent).free, self.size or self.expected()
        if free < 1.1 * needed:
            raise InputError(
                f"{self.folder}: a checkpoint takes {needed / 1e9:.2f} GB, but only "
                f"{free / 1e9:.2f} GB are free on the disk; free some space, then: trivet resume "
                f"{self.folder.parent}"
            )

    def expected(self) -> int:
        """Estimate the bytes of the first checkpoint: the weights, and two moments for each trained
        one.
        """
        model = self.run.model
        saved = {
            x.data_ptr(): x
            for x in model.parameters()
            if x.requires_grad or not hasattr(model, "peft_config")
        }
        trained = [
            x for part in self.parts.values() if hasattr(part, "adamw") for x in part.parameters
        ]
        return sum(x.nbytes for x in saved.values()) + 3 * sum(x.nbytes for x in trained)


def save_whole(model: Any, tokenizer: Any, folder: Path, *, merge: bool = False) -> None:
    """Save the model under another name, then rename it."""
    half = folder.with_name(f".{folder.name}")
    shutil.rmtree(half, ignore_errors=True)
    save_model(model, tokenizer, half, merge=merge)
    put_in_place(half, folder, folder.parent)


def put_in_place(half: Path, whole: Path, run: Path) -> None:
    """Rename a folder to its final name once its tensor files are whole and it and the run's record
    so far are on the disk.
    """
    for path in half.rglob("*.safetensors"):
        _require_whole(path)
    for path in (*half.rglob("*"), half, *run.glob("*.jsonl"), run):
        to_disk(path)
    # a damaged one, or one from steps that a resumed run repeats
    shutil.rmtree(whole, ignore_errors=True)
    half.rename(whole)
    to_disk(whole.parent)


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder, sorted by step."""
    paths = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted((int(path.name.removeprefix("step-")), path) for path in paths)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of every file in a folder."""
    return facts_of(folder, files_of(folder))


def files_of(folder: Path) -> list[Path]:
    """Return the files that a manifest lists."""
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"
    )


def facts_of(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of these files."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, '' if it is intact."""
    try:
        listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name, facts in listed.items():
            if (size := (folder / name).stat().st_size) != facts["bytes"]:
                return f"{name} has {size} bytes instead of {facts['bytes']}"
            if _sha256(folder / name) != facts["sha256"]:
                return f"the bytes of {name} have changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_whole(path: Path) -> None:
    """Raise an OSError if a file of tensors is not as long as its own header says."""
    size, length, ends = path.stat().st_size, 0, list[int]()
    with path.open("rb") as file, suppress(ValueError):  # the header may be cut off
        length = int.from_bytes(file.read(8), "little")
        tensors = json.loads(file.read(min(length, size)))
        ends = [
            facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"
        ]
    if size != 8 + length + max(ends, default=0):
        raise OSError(f"{path} is not as long as its header says")
