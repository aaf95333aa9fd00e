"""Memory use: the peak of a run, and the share of each part."""

import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from trivet.step.reference_cache import component_tensors


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: allocated on the GPU, else resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return _of_process("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_now(device: str) -> int:
    """Return the bytes in use now; 0 where that is unknown."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS") if sys.platform == "linux" else 0


def bytes_by_part(
    model: Any, parts: Mapping[str, Any], rewards: Mapping[str, Any], program: int, peak: int
) -> dict[str, int]:
    """Return the bytes of each part; each tensor counts once, for the first part that has it.
    program: the memory in use before the model was loaded.

    Weights, gradients, optimizer states and models are counted tensor by tensor; the cache is the
    most that the engine held. The remainder of the peak is activations and the rest: buffers of the
    libraries, and memory that the allocator kept.
    """
    seen = set[int]()

    def bytes_of(tensors: Any) -> int:
        own = (getattr(x, "_local_tensor", x) for x in tensors)  # only this rank's shards
        new = {
            x.data_ptr(): x.nbytes
            for x in chain(*map(component_tensors, own))
            if x.data_ptr() not in seen
        }
        seen.update(new)
        return sum(new.values())

    trained = [x for part in parts.values() if hasattr(part, "adamw") for x in part.parameters]
    found = {
        "weights": bytes_of(model.parameters()),
        "gradients": sum(getattr(x, "_local_tensor", x).nbytes for x in trained),
    }
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            found[name] = bytes_of(part.parameters())
        elif hasattr(part, "adamw"):
            states = (
                x
                for state in part.adamw.state.values()
                for x in state.values()
                if isinstance(x, torch.Tensor)
            )
            found["optimizer"] = found.get("optimizer", 0) + bytes_of(states)
        elif hasattr(part, "cache_bytes"):
            found["cache"] = part.cache_bytes
    scorers = [
        reward.model
        for reward in rewards.values()
        if isinstance(getattr(reward, "model", None), torch.nn.Module)
    ]
    found["reward model"] = sum(bytes_of(scorer.parameters()) for scorer in scorers)
    # the run may have reused some of what the program held
    program = max(0, min(program, peak - sum(found.values())))
    found = {"program": program, **found}
    found["activations and the rest"] = max(0, peak - sum(found.values()))
    return {name: size for name, size in found.items() if size}


def _of_process(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
