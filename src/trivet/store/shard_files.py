"""Checkpoints with tensors in shards/, by torch's distributed checkpoint: their contents, and how a
run restores them.

Any number of processes can resume from them, including one.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor

from trivet.step.optimizer import Optimizer
from trivet.step.run import Run
from trivet.store.state import Stateful, from_json, set_random_state, state_of


def tensors(run: Run, parts: dict[str, Any]) -> dict[str, Tensor]:
    """Return the trained tensors and their AdamW moments, by name."""
    named, adapter = [*run.model.named_parameters()], hasattr(run.model, "peft_config")
    found: dict[str, Tensor] = {
        f"model/{name}": x for name, x in named if x.requires_grad or not adapter
    }
    own = {id(x) for _, x in named}
    for name, part in parts.items():
        if isinstance(part, Optimizer):
            for i, x in enumerate(part.parameters):
                moments = part.adamw.state.get(x, {})
                found |= {f"{name}/{i}/{key}": y for key, y in moments.items() if key != "step"}
        elif isinstance(part, torch.nn.Module):
            trained = (
                (key, x)
                for key, x in part.named_parameters()
                if x.requires_grad and id(x) not in own
            )
            found |= {f"{name}/{key}": x for key, x in trained}
    return found


def restore(
    run: Run,
    parts: dict[str, Any],
    folder: Path,
    given: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Restore the state in a checkpoint. given: returns its tensors, if they don't come from its
    shards.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]
    state = from_json(state, load_file(folder / "state.safetensors"))
    run.done = state["step"]
    for name, part in parts.items():
        kept: Any = state["parts"].get(name)
        if isinstance(part, Optimizer):
            steps = (
                kept["steps"]
                if "steps" in kept
                else {i: x["step"] for i, x in kept["adamw"]["state"].items()}
            )
            for i, step in steps.items():
                x = part.parameters[i]
                moments = {key: torch.zeros_like(x) for key in ("exp_avg", "exp_avg_sq")}
                part.adamw.state[x] = {
                    "step": torch.tensor(float(step), device=x.device),
                    **moments,
                }
            part.set_schedule(kept["schedule"])
        elif isinstance(part, Stateful) and kept is not None:
            part.set_state(kept)
        elif isinstance(part, Tensor) and kept is not None:
            part.copy_(kept)
    found = {name: x.detach() for name, x in tensors(run, parts).items()}
    if given is None:
        with warnings.catch_warnings():
            # the warning is about a single process, which is intended
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(folder / "shards"))
            dcp.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    else:
        for name, x in found.items():
            full = given(name, x)
            if isinstance(x, DTensor):
                full = distribute_tensor(full, x.device_mesh, x.placements, src_data_rank=None)
            x.copy_(full)
    set_random_state(run.generator, state["random"])


def rest(part: Any) -> Any:
    """Return the state of a part that is not in `tensors`."""
    if isinstance(part, Optimizer):
        steps = enumerate(part.adamw.state.get(x, {}).get("step") for x in part.parameters)
        return {
            "steps": {i: float(step) for i, step in steps if step is not None},
            "schedule": part.schedule.state_dict(),
        }
    return None if isinstance(part, torch.nn.Module) else state_of(part, set())
