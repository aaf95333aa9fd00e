"""Disk cache of DPO's reference log-probabilities, keyed by weights and tokens."""

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from trivet.batch import Example
from trivet.model.quantize import component_tensors
from trivet.model.weights import holder_of


def load_or_compute(
    model: Any,
    examples: Iterable[Example],
    compute: Callable[[], Tensor],
    note: Callable[[str], None],
) -> Tensor:
    """Return compute(), or its result from an earlier run with the same weights, precision and
    tokens.

    The tokenizer, the chat template and truncation matter only through the tokens. Files are
    ~/.cache/trivet/reference/*.safetensors (or under XDG_CACHE_HOME), named by the SHA-256 of all
    that; you may delete them at any time. A folder that can't be written to is not an error.
    """
    if holder_of(model) is not None:  # the weights are sharded, so no digest is computed
        return compute()
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trivet" / "reference"
    )
    path = folder / f"{digest(model, examples)}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # the file is missing or damaged
        result = load_file(path, device=str(model.device))["logprobs"]
        note(f"using the reference log-probabilities of an earlier run, from {folder}")
        return result
    result = compute()
    with suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({"logprobs": result.contiguous()}, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    return result


def digest(model: Any, examples: Iterable[Example]) -> str:
    """SHA-256 of the weights and their names, the type of the matrix products, and the tokens and
    masks of the examples.
    """
    sha256 = hashlib.sha256(repr(getattr(model, "compute_dtype", None)).encode())
    for name, weight in model.state_dict().items():
        sha256.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        for x in component_tensors(weight.detach()):
            sha256.update(x.cpu().contiguous().flatten().view(uint8).numpy())  # type: ignore[arg-type]
    for example in examples:
        sha256.update(repr((example.prompt, example.completions, example.learned)).encode())
    return sha256.hexdigest()
