"""Checkpoints of many processes: each writes the parts it has, and any number of processes can go on from them, one included.

checkpoints/step-N/ holds shards/, safetensors by torch's distributed checkpoint with the place of each part in its header,
and, as checkpoints of one process do, state.json and state.safetensors for the rest, and manifest.json.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from trivet.distributed.fsdp import broadcast, broadcast_tensor
from trivet.distributed.ranks import Ranks
from trivet.errors import InputError, first_line
from trivet.model.load import load_policy, load_scorer
from trivet.step.run import Run
from trivet.store.checkpoints import Checkpoints, facts_of, files_of, put_in_place
from trivet.store.files import make_folder, write_json
from trivet.store.shard_files import rest, restore, tensors
from trivet.store.state import packed, random_state


class ShardedCheckpoints(Checkpoints):
    """The state of one run that many processes hold together. All of them call each method."""

    def __init__(self, ranks: Ranks, out: Path, run: Run, tokenizer: Any):
        super().__init__(out, run, tokenizer)
        self.ranks = ranks

    def begin(self) -> None:
        """As of one process, which may have written it."""
        if self.ranks.rank == 0:
            self._make_room()
        if self.start is not None:
            one = not (self.start / "shards").exists()
            restore(self.run, self.parts, self.start, self._of_one(self.start) if one else None)

    def save(self, step: int, counted: dict[str, Any], keep: int = 0, *, beginning: bool = False) -> Path:
        """As of one process: each rank writes its shards, and reads a part of the files again for the manifest."""
        leads, small = self.ranks.rank == 0, dict[str, Tensor]()
        whole, half = self.folder / f"step-{step}", self.folder / f".step-{step}"
        random, parts = random_state(self.run.generator), self.parts
        if beginning:
            random, parts = self.before["random"], parts | self.before["small"]
        state = {"step": step, "counted": counted, "random": random}
        state["parts"] = {name: rest(part) for name, part in parts.items()}
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
            files, every = files_of(half), [None] * self.ranks.size
            dist.all_gather_object(every, facts_of(half, files[self.ranks.rank :: self.ranks.size]))
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
        counted, self.start = broadcast((super().go_on(note), self.start) if self.ranks.rank == 0 else None)
        return counted

    def expected(self) -> int:
        """Bytes of a checkpoint before the first one is written."""
        return sum(x.numel() * x.itemsize for x in tensors(self.run, self.parts).values()) * 3

    def _of_one(self, folder: Path) -> Callable[[str, Tensor], Tensor]:
        """Tensors of a checkpoint that one process wrote: rank 0 reads them, and tells."""
        full = dict[str, Tensor]()
        if self.ranks.rank == 0:
            model = (load_scorer if hasattr(self.run.model, "score") else load_policy)(str(folder))
            full = {f"model/{name}": x.detach() for name, x in model.named_parameters()}
            for name, x in load_file(folder / "state.safetensors").items():
                full[name.removeprefix("/parts/").replace("/adamw/state/", "/")] = x
        return partial(broadcast_tensor, full, self.ranks.device)
