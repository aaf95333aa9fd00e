"""Models in and out: ordinary Hugging Face folders, loaded as a policy or with a scalar head, copied, saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from trivet.errors import InputError

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
disable_progress_bar()


def load_policy(name: str, *, device: str = "cpu", precision: str = "float32", from_scratch: bool = False) -> Any:
    """A causal language model from a folder or hub name: float32 weights, dropout off, matrix products in `precision`.

    from_scratch: random weights in the shape of its config.json. Errors: InputError where there is no such model.
    """
    if from_scratch:
        model = _reading(name, lambda: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)).float())
    else:
        model = _reading(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))
    return _prepare(model, device, PRECISIONS[precision])


def load_scorer(name: str, *, device: str = "cpu", precision: str = "float32", from_scratch: bool = False) -> Any:
    """A model with a scalar head, `score`, as load_policy does it; a head that the folder does not hold starts at zero."""
    kind = AutoModelForSequenceClassification
    if from_scratch:
        model = _reading(name, lambda: kind.from_config(AutoConfig.from_pretrained(name, num_labels=1)).float())
    else:
        model = _reading(name, lambda: kind.from_pretrained(name, num_labels=1, dtype=torch.float32))
    if not hasattr(model, "score"):
        raise InputError(
            f"{name}: {type(model).__name__} has no scalar head named 'score'; choose a decoder-only model"
        )
    if from_scratch or not is_scorer(name):
        torch.nn.init.zeros_(model.score.weight)
    return _prepare(model, device, PRECISIONS[precision])


def _prepare(model: Any, device: torch.device | str, compute_dtype: torch.dtype | None) -> Any:
    model.compute_dtype = compute_dtype
    return model.to(device).eval()  # no dropout: with it, policy and reference would never agree


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """An ordinary Hugging Face folder that transformers, vLLM and TRL load as it is."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def context_length(name: str) -> int:
    """The most tokens that the model has positions for."""
    config = _reading(name, lambda: AutoConfig.from_pretrained(name)).get_text_config()
    return getattr(config, "max_position_embeddings", None) or 1 << 30


def is_scorer(name: str) -> bool:
    """Whether a folder or hub name holds a model with a sequence-classification head."""
    architectures = _reading(name, lambda: AutoConfig.from_pretrained(name)).architectures or [""]
    return architectures[0].endswith("ForSequenceClassification")


def model_folder(name: str) -> str:
    """The model inside a run directory, or the name as it is."""
    return str(Path(name) / "model") if (Path(name) / "model" / "config.json").exists() else name


def _reading(name: str, load: Callable[[], Any]) -> Any:
    if not name:
        raise InputError("no model was named: give --model a Hugging Face name or folder (or use --preset toy)")
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        raise InputError(
            f"{name}: no config.json in this folder; a model is a folder as transformers' save_pretrained writes it"
        )
    verbosity = get_verbosity()
    set_verbosity_error()  # a new scalar head is no news: load_scorer says what it does about it
    try:
        return load()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model {name} can't be loaded: {reason}") from error
    finally:
        set_verbosity(verbosity)
