"""Disk cache of DPO's reference log-probabilities, keyed by weights and tokens."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, uint8

from trivet.batch import Example
from trivet.model.quantize import plain
from trivet.model.weights import holder_of


def remembered(
    model: Any, examples: Sequence[Example], compute: Callable[[], Tensor], note: Callable[[str], None]
) -> Tensor:
    """compute(), or what it gave in an earlier run for these weights, in this precision, and these tokens.

    Tokenizer, chat template and truncation act through the tokens. Files are ~/.cache/trivet/reference/*.safetensors (or under
    XDG_CACHE_HOME), named by the SHA-256 of all that; they may be deleted at any time. A folder that can't be written is no error.
    """
    if holder_of(model) is not None:  # weights in shards are not read for a digest
        return compute()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trivet" / "reference"
    path = folder / f"{digest(model, examples)}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # not there, or damaged
        result = load_file(path, device=str(model.device))["logprobs"]
        note(f"reference log-probabilities are kept from an earlier run, in {folder}")
        return result
    result = compute()
    with suppress(OSError, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        save_file({"logprobs": result.contiguous()}, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    return result


def digest(model: Any, examples: Sequence[Example]) -> str:
    """SHA-256 of the weights, what they are called, the type of the products, and the examples' tokens and masks."""
    found = hashlib.sha256(repr(getattr(model, "compute_dtype", None)).encode())
    for name, weight in model.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        for x in plain(weight.detach()):
            found.update(x.cpu().contiguous().flatten().view(uint8).numpy())  # type: ignore[arg-type]
    for example in examples:
        found.update(repr((example.prompt, example.completions, example.learned)).encode())
    return found.hexdigest()
