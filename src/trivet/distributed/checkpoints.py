"""Checkpoints of many processes: each writes its own shards, and any number of processes, including
one, can resume from them.

checkpoints/step-N/ holds shards/, safetensors by torch's distributed checkpoint with the place of
each shard in its header, and, like checkpoints of one process, state.json and state.safetensors for
the rest, and manifest.json.
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
from trivet.store.state import random_state, to_json


class ShardedCheckpoints(Checkpoints):
    """The state of a run that many processes hold together. Every process calls each method."""

    def __init__(self, ranks: Ranks, out: Path, run: Run, tokenizer: Any):
        super().__init__(out, run, tokenizer)
        self.ranks = ranks

    def begin(self) -> None:
        """Checkpoints.begin; the checkpoint may have been written by one process."""
        if self.ranks.rank == 0:
            self._make_room()
        if self.start is not None:
            one = not (self.start / "shards").exists()
            given = self._read_unsharded(self.start) if one else None
            restore(self.run, self.parts, self.start, given)

    def save(
        self, step: int, counted: dict[str, Any], keep: int = 0, *, beginning: bool = False
    ) -> Path:
        """Checkpoints.save; each rank writes its shards, and rereads a share of the files for the
        manifest.
        """
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
                write_json(half / "state.json", {"state": to_json(state, small, "")})
                save_file(small, half / "state.safetensors")
            dist.barrier()
            files, every = files_of(half), [None] * self.ranks.size
            dist.all_gather_object(every, facts_of(half, files[self.ranks.rank :: self.ranks.size]))
            if leads:
                facts = {name: x for part in every for name, x in part.items()}  # type: ignore[attr-defined]
                write_json(half / "manifest.json", {"step": step, "files": facts})
                put_in_place(half, whole, self.folder.parent)
        except BaseException as error:
            if leads:
                shutil.rmtree(half, ignore_errors=True)
            if isinstance(error, dcp.api.CheckpointException):  # of any rank, raised on all
                trouble, run = next(iter(error.failures.values()))[0], self.folder.parent
                raise InputError(
                    f"{run}: {first_line(trouble)}; free some space or fix the cause, then: trivet "
                    f"resume {run}"
                ) from error
            raise
        if leads:
            self.size = sum(path.stat().st_size for path in whole.rglob("*"))
            self._prune(keep)
        dist.barrier()
        return whole

    def choose_start(self, note: Callable[[str], None]) -> dict[str, Any]:
        """Checkpoints.choose_start; rank 0 chooses for all."""
        counted, self.start = broadcast(
            (super().choose_start(note), self.start) if self.ranks.rank == 0 else None
        )
        return counted

    def expected(self) -> int:
        """Estimate the bytes of the first checkpoint."""
        return sum(x.numel() * x.itemsize for x in tensors(self.run, self.parts).values()) * 3

    def _read_unsharded(self, folder: Path) -> Callable[[str, Tensor], Tensor]:
        """Return a function that reads tensors of a checkpoint that one process wrote: rank 0 reads
        and broadcasts them.
        """
        full = dict[str, Tensor]()
        if self.ranks.rank == 0:
            model = (load_scorer if hasattr(self.run.model, "score") else load_policy)(str(folder))
            full = {f"model/{name}": x.detach() for name, x in model.named_parameters()}
            for name, x in load_file(folder / "state.safetensors").items():
                full[name.removeprefix("/parts/").replace("/adamw/state/", "/")] = x
        return partial(broadcast_tensor, full, self.ranks.device)
