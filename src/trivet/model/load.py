"""Models in and out: ordinary Hugging Face folders, loaded as a policy or with a scalar head, copied, saved."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from trivet.errors import InputError, first_line
from trivet.model.lean import make_lean
from trivet.model.trust import refusal, trusted

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
disable_progress_bar()
set_verbosity_error()  # what its reports of missing weights say is checked here


def load_policy(name: str, *, device: str = "cpu", precision: str = "float32", from_scratch: bool = False) -> Any:
    """A causal language model from a folder or hub name: float32 weights, dropout off, matrix products in `precision`.

    from_scratch: random weights in the shape of its config.json. Errors: InputError where there is no such model.
    """
    if from_scratch:
        model = _reading(name, lambda: _from_config(name, AutoModelForCausalLM))
    else:
        model = _with_weights(name, AutoModelForCausalLM)
    return _prepare(model, device, PRECISIONS[precision])


def load_scorer(name: str, *, device: str = "cpu", precision: str = "float32", from_scratch: bool = False) -> Any:
    """A model with a scalar head, `score`, as load_policy does it; on a language model the head is new, and starts at zero."""
    kind, new_head = AutoModelForSequenceClassification, from_scratch or not is_scorer(name)
    if from_scratch:
        model = _reading(name, lambda: _from_config(name, kind, num_labels=1))
    else:
        model = _with_weights(name, kind, may_lack=("score",) if new_head else (), num_labels=1)
    if not hasattr(model, "score"):
        raise InputError(
            f"{name}: {type(model).__name__} has no scalar head named 'score'; choose another kind of model"
        )
    if new_head:
        torch.nn.init.zeros_(model.score.weight)
    return _prepare(model, device, PRECISIONS[precision])


def _prepare(model: Any, device: torch.device | str, compute_dtype: torch.dtype | None) -> Any:
    model.compute_dtype = compute_dtype
    return make_lean(model.to(device).eval())  # no dropout: with it, policy and reference would never agree


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary Hugging Face folder that transformers, vLLM and TRL load as it is."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_facts(name: str) -> tuple[str, int, int]:
    """What config.json says: the model's class ('' where it doesn't say), how many positions it has, how many token ids."""
    config = _reading(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trusted()))
    text, unlimited = config.get_text_config(), 1 << 30
    positions, vocabulary = (getattr(text, key, 0) or unlimited for key in ("max_position_embeddings", "vocab_size"))
    return (config.architectures or [""])[0], positions, vocabulary


def is_scorer(name: str) -> bool:
    """Whether a folder or hub name holds a model with a sequence-classification head."""
    return model_facts(name)[0].endswith("ForSequenceClassification")


def require_causal(name: str, command: str) -> None:
    """InputError where config.json names a model that can't write; where it names none, loading will tell."""
    kind = model_facts(name)[0]
    if kind.endswith(("Classification", "QuestionAnswering", "ForMaskedLM", "ForPreTraining")):
        raise InputError(f"--model {name} is a {kind}; {command} needs a causal language model")


def usable_device(name: str) -> str:
    """The device of this name, or the best one there is for 'auto'. Errors: InputError where torch finds no such device."""
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device}: torch finds no such device here; use cpu or auto") from None
    return device


def model_folder(name: str) -> str:
    """The model inside a run directory, or the name as it is."""
    return str(Path(name) / "model") if (Path(name) / "model" / "config.json").exists() else name


def _from_config(name: str, kind: Any, **options: Any) -> Any:
    """The model in float32 with random weights."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusted(), **options)
    return kind.from_config(config, trust_remote_code=trusted()).float()


def _with_weights(name: str, kind: Any, may_lack: tuple[str, ...] = (), **options: Any) -> Any:
    """The model in float32, all of its weights from its files: transformers alone would fill in random ones."""
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"trust_remote_code": trusted(), "use_safetensors": None if trusted() else True}
    model, info = _reading(name, lambda: kind.from_pretrained(name, **options))
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if absent := sorted(key for key in absent if not key.startswith(may_lack)):
        raise InputError(
            f"model {name}: its files lack {len(absent)} tensors, or have them in another shape than config.json says: {absent[0]}"
        )
    return model


def _reading(name: str, load: Callable[[], Any]) -> Any:
    if not name:
        raise InputError("no model was named: give --model a Hugging Face name or folder (or use --preset toy)")
    local = Path(name).exists() or name[0] in "/." or ("/" in name and Path(name).parts[0] in os.listdir())
    if local and not (Path(name) / "config.json").exists():
        raise InputError(f"{name}: no config.json there; a model is a folder as transformers' save_pretrained makes it")
    try:
        return load()
    except Exception as error:  # transformers, safetensors and the hub client raise many kinds
        raise InputError(f"model {name} can't be loaded: {refusal(error) or first_line(error)}") from error
