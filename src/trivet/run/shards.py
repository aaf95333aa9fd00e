"""Checkpoints of many processes: each writes the parts it has, and any number of processes can go on from them, one included.

checkpoints/step-N/ holds shards/, safetensors by torch's distributed checkpoint with the place of each part in its header,
and, as checkpoints of one process do, state.json and state.safetensors for the rest, and manifest.json.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from trivet.errors import InputError, first_line
from trivet.model.load import load_policy, load_scorer
from trivet.run import checkpoints
from trivet.run.checkpoints import facts_of, files_of, put_in_place
from trivet.run.files import make_folder, write_json
from trivet.run.loop import Run
from trivet.run.ranks import Ranks
from trivet.run.sharded import broadcast, broadcast_tensor
from trivet.run.state import packed, random_state, set_random_state, set_schedule, state_of, unpacked


class Checkpoints(checkpoints.Checkpoints):
    """The state of one run that many processes hold together. All of them call each method."""

    def __init__(self, us: Ranks, out: Path, run: Run, tokenizer: Any):
        super().__init__(out, run, tokenizer)
        self.us = us

    def holds(self, **parts: Any) -> None:
        """As of one process, which may have written it."""
        self.parts = parts
        if self.us.rank == 0:
            self._make_room()
        if self.start is not None:
            if (self.start / "shards").exists():
                restore(self.run, parts, self.start)
            else:
                restore(self.run, parts, self.start, self._of_one(self.start))

    def save(self, step: int, counted: dict[str, Any], keep: int = 0, *, beginning: bool = False) -> Path:
        """As of one process: each rank writes its shards, and reads a part of the files again for the manifest."""
        leads, small = self.us.rank == 0, dict[str, Tensor]()
        whole, half = self.folder / f"step-{step}", self.folder / f".step-{step}"
        random, parts = random_state(self.run.generator), self.parts
        if beginning:
            random, parts = self.before["random"], parts | self.before["small"]
        state = {"step": step, "counted": counted, "random": random}
        state["parts"] = {name: _rest(part) for name, part in parts.items()}
        try:
            if leads:
                self._make_room()
                shutil.rmtree(half, ignore_errors=True)
                make_folder(half)
            dist.barrier()
            written = {name: x.detach() for name, x in tensors(self.run, self.parts).items()}
            writer = HuggingFaceStorageWriter(str(half / "shards"), save_distributed=True)
            dcp.save(written, storage_writer=writer)
            if leads:
                write_json(half / "state.json", {"state": packed(state, small, "")})
                save_file(small, half / "state.safetensors")
            dist.barrier()
            files, every = files_of(half), [None] * self.us.size
            dist.all_gather_object(every, facts_of(half, files[self.us.rank :: self.us.size]))
            if leads:
                known = {name: facts for part in every for name, facts in part.items()}  # type: ignore[attr-defined]
                write_json(half / "manifest.json", {"step": step, "files": known})
                put_in_place(half, whole, self.folder.parent)
        except BaseException as error:
            if leads:
                shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, dcp.api.CheckpointException):  # of any rank, raised on all
                trouble, run = next(iter(error.failures.values()))[0], self.folder.parent
                said = f"{run}: {first_line(trouble)}; make room or mend what is wrong, then: trivet resume {run}"
                raise InputError(said) from error
            raise
        if leads:
            self.size = sum(path.stat().st_size for path in whole.rglob("*"))
            self._prune(keep)
        dist.barrier()
        return whole

    def go_on(self, note: Callable[[str], None]) -> dict[str, Any]:
        """As of one process: rank 0 looks which one is whole."""
        counted, self.start = broadcast((super().go_on(note), self.start) if self.us.rank == 0 else None)
        return counted

    def expected(self) -> int:
        """Bytes of a checkpoint before the first one is written."""
        return sum(x.numel() * x.itemsize for x in tensors(self.run, self.parts).values()) * 3

    def _of_one(self, folder: Path) -> Callable[[str, Tensor], Tensor]:
        """Tensors of a checkpoint that one process wrote: rank 0 reads them, and tells."""
        full = dict[str, Tensor]()
        if self.us.rank == 0:
            model = (load_scorer if hasattr(self.run.model, "score") else load_policy)(str(folder))
            full = {f"model/{name}": x.detach() for name, x in model.named_parameters()}
            for name, x in load_file(folder / "state.safetensors").items():
                full[name.removeprefix("/parts/").replace("/adamw/state/", "/")] = x
        return partial(broadcast_tensor, full, self.us.device)


def tensors(run: Run, parts: dict[str, Any]) -> dict[str, Tensor]:
    """What is trained, and AdamW's moments of it, by name."""
    named, adapter = [*run.model.named_parameters()], hasattr(run.model, "peft_config")
    found: dict[str, Tensor] = {f"model/{name}": x for name, x in named if x.requires_grad or not adapter}
    own = {id(x) for _, x in named}
    for name, part in parts.items():
        if hasattr(part, "adamw"):
            for i, x in enumerate(part.parameters):
                moments = part.adamw.state.get(x, {})
                found |= {f"{name}/{i}/{key}": y for key, y in moments.items() if key != "step"}
        elif isinstance(part, torch.nn.Module):
            trained = ((key, x) for key, x in part.named_parameters() if x.requires_grad and id(x) not in own)
            found |= {f"{name}/{key}": x for key, x in trained}
    return found


def restore(
    run: Run, parts: dict[str, Any], folder: Path, given: Callable[[str, Tensor], Tensor] | None = None
) -> None:
    """Take the state in a checkpoint. given: where its tensors come from, if not from its shards."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]
    state = unpacked(state, load_file(folder / "state.safetensors"))
    run.done = state["step"]
    for name, part in parts.items():
        said = state["parts"][name]
        if hasattr(part, "adamw"):
            steps = said["steps"] if "steps" in said else {i: x["step"] for i, x in said["adamw"]["state"].items()}
            for i, step in steps.items():
                x = part.parameters[i]
                moments = {key: torch.zeros_like(x) for key in ("exp_avg", "exp_avg_sq")}
                part.adamw.state[x] = {"step": torch.tensor(float(step), device=x.device), **moments}
            set_schedule(part, said["schedule"])
        elif isinstance(part, Tensor):
            part.copy_(said)
        elif hasattr(part, "begun") and said:
            part.take(said)
    found = {name: x.detach() for name, x in tensors(run, parts).items()}
    if given is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, on purpose
            reader = HuggingFaceStorageReader(str(folder / "shards"))
            dcp.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    else:
        for name, x in found.items():
            full = given(name, x)
            if isinstance(x, DTensor):
                full = distribute_tensor(full, x.device_mesh, x.placements, src_data_rank=None)
            x.copy_(full)
    set_random_state(run.generator, state["random"])


def _rest(part: Any) -> Any:
    """Of a part, what is not among the tensors."""
    if hasattr(part, "begun") or isinstance(part, list):
        return state_of(part, set())
    if hasattr(part, "adamw"):
        known = enumerate(part.adamw.state.get(x, {}).get("step") for x in part.parameters)
        return {
            "steps": {i: float(step) for i, step in known if step is not None},
            "schedule": part.schedule.state_dict(),
        }
    return part if isinstance(part, Tensor) else None
