"""The learner's weights as servers get them: a version with a name, a checksum, and what a server that has them must answer.

Rungs, by what is trained and where: the in-process engine reads the learner's own tensors, nothing to do; an adapter is written
beside and loaded under a name of its own; full weights are written as a model folder and reloaded in place; between GPUs they go over
NCCL (nccl.py). An answer of "success" proves nothing: before a server is trusted, it samples one token after a few fixed
prompts, and the log-probabilities must be those that the learner computes itself.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trivet.generation.sampling import warp
from trivet.model.adapters import write_adapter
from trivet.model.forward import autocast


@dataclass(eq=False)
class Weights:
    """One version of the learner's weights."""

    version: int  # steps behind them
    name: str  # what servers call them: of this run, this version and these bytes alone
    checksum: str  # SHA-256 of the files
    folder: Path  # a peft adapter, or a model folder
    adapter: bool
    expected: Tensor  # (N, V) log-probabilities of the token after each probe, at the temperature that samples
    tensors: dict[str, Tensor] = field(
        default_factory=dict[str, Tensor]
    )  # what NCCL sends: a copy, for training goes on
    waiting: int = 0  # groups that no server has taken yet
    batches: int = 0  # under way


def publish(
    policy: Any,
    expected: Tensor,
    version: int,
    run: str,
    into: Path,
    untie: bool,
    nccl: bool = False,
) -> Weights:
    """The policy as it is now, written into a folder of its own.

    expected: its next_tokens. run: a word that no other run has. untie: with a tied head's weight written out, which a server
    on a CPU needs (docs/servers.md). nccl: full weights are kept in memory in place of files.
    """
    half, adapter = into / ".half", bool(getattr(policy, "peft_config", None))
    if nccl and not adapter:
        dtype = getattr(policy, "compute_dtype", None) or policy.dtype
        tensors = {name: x.detach().to(dtype, copy=True) for name, x in policy.named_parameters()}
        said = "".join(f"{name} {torch.hash_tensor(x).view(torch.int64).item()} " for name, x in tensors.items())
        checksum = hashlib.sha256(said.encode()).hexdigest()
        name = f"trivet-{run}-{version}-{checksum[:12]}"
        return Weights(version, name, checksum, into / name, adapter, expected, tensors)
    shutil.rmtree(half, ignore_errors=True)
    dtype = None if adapter else getattr(policy, "compute_dtype", None)
    cast = {} if dtype is None else {"state_dict": {name: x.to(dtype) for name, x in policy.state_dict().items()}}
    if adapter:
        write_adapter(policy, half)
    else:
        policy.save_pretrained(half, **cast)
    head = None if adapter or not untie else policy.get_output_embeddings()
    if head is not None and policy.config.tie_word_embeddings:
        name = next(name for name, module in policy.named_modules() if module is head)
        weight = head.weight.detach().to(dtype or head.weight.dtype).cpu().contiguous().clone()
        save_file({f"{name}.weight": weight}, half / "model-head.safetensors", {"format": "pt"})
    checksum = digest(half)
    name = f"trivet-{run}-{version}-{checksum[:12]}"
    shutil.rmtree(into / name, ignore_errors=True)
    half.rename(into / name)
    return Weights(version, name, checksum, (into / name).absolute(), adapter, expected)


def digest(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files in it."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()} ".encode())
    return found.hexdigest()


def fingerprint(policy: Any) -> tuple[int, ...]:
    """Changes when a step, or a resumed run, changes the weights."""
    return (id(policy), *(x._version for x in policy.parameters()))


def rank_of(folder: Path) -> int:
    """The rank of a peft adapter."""
    return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])


@torch.no_grad()
def next_tokens(policy: Any, probes: Sequence[Sequence[int]], cut: dict[str, Any]) -> Tensor:
    """Log-probabilities of the token after each of these prompts (N, V). cut: temperature, top_k, top_p."""
    with autocast(policy):
        given = (torch.tensor([ids], device=policy.device) for ids in probes)
        return torch.cat([warp(policy(ids, use_cache=False).logits[0, -1:], **cut).cpu() for ids in given])
