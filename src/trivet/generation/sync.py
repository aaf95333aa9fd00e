"""Versions of the learner's weights for servers: a name, a checksum, and the answers expected of a
server that has them.

How weights travel depends on what is trained and where: the in-process engine reads the learner's
own tensors; an adapter is written to a folder and loaded under its own name; full weights are
written as a model folder and reloaded in place. A reply of "success" proves nothing: before a
server is trusted, it samples one token after a few fixed prompts, and its log-probabilities must
match those that the learner computes itself.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
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

    version: int  # steps taken to reach them
    name: str  # their name on servers, unique to this run, version and content
    checksum: str  # SHA-256 of the files
    folder: Path  # a peft adapter, or a model folder
    adapter: bool
    # (N, V) log-probabilities of the token after each probe, at the temperature that samples
    expected: Tensor
    waiting: int = 0  # groups that no server has accepted yet
    batches: int = 0  # in flight


def publish(
    policy: Any,
    expected: Tensor,
    version: int,
    run: str,
    into: Path,
    untie: bool,
) -> Weights:
    """Write the policy's current weights to a folder of their own.

    expected: its next_token_logprobs. run: an identifier that no other run has. untie: write a tied
    head's weight too, which a server on a CPU needs (docs/servers.md).
    """
    half, adapter = into / ".half", bool(getattr(policy, "peft_config", None))
    shutil.rmtree(half, ignore_errors=True)
    dtype = None if adapter else getattr(policy, "compute_dtype", None)
    cast = (
        {}
        if dtype is None
        else {"state_dict": {name: x.to(dtype) for name, x in policy.state_dict().items()}}
    )
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
    """Return the SHA-256 of the names and contents of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder)} {content} ".encode())
    return total.hexdigest()


def fingerprint(policy: Any) -> tuple[int, ...]:
    """Return a value that changes whenever a step or a resume changes the weights."""
    return (id(policy), *(x._version for x in policy.parameters()))


@torch.no_grad()
def next_token_logprobs(
    policy: Any, probes: Sequence[Sequence[int]], cut: dict[str, Any]
) -> Tensor:
    """Return log-probabilities of the token after each of these prompts, (N, V). cut: temperature,
    top_k, top_p.
    """
    with autocast(policy):
        prompts = (torch.tensor([ids], device=policy.device) for ids in probes)
        return torch.cat(
            [warp(policy(ids, use_cache=False).logits[0, -1:], **cut).cpu() for ids in prompts]
        )
