"""Load and save models: ordinary Hugging Face folders, loaded as a policy or with a scalar head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from trivet.errors import InputError, first_line
from trivet.model.adapters import (
    SCORER,
    adapter_of,
    inject,
    merge_adapter,
    read_adapter,
    write_adapter,
)
from trivet.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from trivet.model.lean import make_lean
from trivet.model.quantize import component_tensors, keep_trainable, quantization
from trivet.model.trust import refusal, trusted
from trivet.places import ADAPTER_CONFIG, CONFIG, require_model

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
disable_progress_bar()
set_verbosity_error()  # missing weights are checked below instead


def load_policy(
    name: str,
    *,
    device: str = "cpu",
    precision: str = "float32",
    from_scratch: bool = False,
    quantize: str = "none",
) -> Any:
    """Load a causal language model from a folder or hub name: float32 weights, dropout off, matrix
    products in `precision`.

    An adapter's folder gives its base model with the adapter, and only the adapter is trainable.
    from_scratch: random weights in the shape of its config.json. quantize: hold the linear layers
    in 4bit or 8bit. Errors: InputError if there is no such model.
    """
    base, config = base_of(name)
    if from_scratch:
        model = _try_loading(base, lambda: from_config(base, AutoModelForCausalLM))
    else:
        model = _load_weights(
            base, AutoModelForCausalLM, **quantization(quantize, precision, device)
        )
    return _prepare(_with_adapter(model, config, name), device, PRECISIONS[precision])


def load_scorer(
    name: str,
    *,
    device: str = "cpu",
    precision: str = "float32",
    from_scratch: bool = False,
    quantize: str = "none",
    merge: bool = False,
) -> Any:
    """Load a model with a scalar head, `score`, with the options of load_policy; on a language
    model the head is new and starts at zero. merge: merge an adapter into its base in memory.
    """
    (name, config), folder = base_of(name), name
    kind, new_head = AutoModelForSequenceClassification, from_scratch or not is_scorer(name)
    if from_scratch:
        model = _try_loading(name, lambda: from_config(name, kind, num_labels=1))
    else:
        options = quantization(quantize, precision, device) | {"num_labels": 1}
        model = _load_weights(name, kind, may_lack=("score",) if new_head else (), **options)
    if not hasattr(model, "score"):
        raise InputError(
            f"{name}: {type(model).__name__} has no scalar head named 'score'; choose another kind "
            "of model"
        )
    if new_head:
        torch.nn.init.zeros_(model.score.weight)
    model = _prepare(_with_adapter(model, config, folder), device, PRECISIONS[precision])
    return merge_adapter(model) if merge else model


def base_of(name: str) -> tuple[str, Any]:
    """Return the base model of an adapter and the adapter's config; for any other model its own
    name and None.
    """
    config = adapter_of(name)
    return (name, None) if config is None else (str(config.base_model_name_or_path), config)


def _with_adapter(model: Any, config: Any, name: str) -> Any:
    if config is not None:
        inject(model, config)
        read_adapter(model, name)
    return model


def _prepare(model: Any, device: torch.device | str, compute_dtype: torch.dtype | None) -> Any:
    model.compute_dtype = compute_dtype
    # eval() turns dropout off; otherwise policy and reference would differ.
    model = keep_trainable(model, model.name_or_path).to(device).eval()
    return make_lean(model)


def save_model(model: Any, tokenizer: Any, folder: Path, *, merge: bool = False) -> None:
    """Save an ordinary Hugging Face folder that transformers, vLLM and TRL can load; for an adapter
    a peft folder, or with merge the merged model, whose base is loaded again in full precision.
    """
    if hasattr(model, "peft_config"):
        write_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    if merge:
        whole = merge_adapter(
            (load_scorer if hasattr(model, "score") else load_policy)(str(folder))
        )
        whole.config.pad_token_id = model.config.pad_token_id
        for path in (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS):
            path.unlink()
        whole.save_pretrained(folder)
        if whole.can_generate():
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore(model: Any, folder: Path) -> None:
    """Load the weights that save_model wrote into the model."""
    if hasattr(model, "peft_config"):
        read_adapter(model, str(folder))
    else:
        load = load_scorer if hasattr(model, "score") else load_policy
        model.load_state_dict(load(str(folder), device=model.device).state_dict())


def model_facts(name: str) -> tuple[str, int, int]:
    """Read from config.json the model's class ('' if absent), its number of positions and its
    number of token ids.
    """
    base, adapter = base_of(name)
    config = _try_loading(
        base, lambda: AutoConfig.from_pretrained(base, trust_remote_code=trusted())
    )
    text, unlimited = config.get_text_config(), 1 << 30
    positions, vocabulary = (
        getattr(text, key, 0) or unlimited for key in ("max_position_embeddings", "vocab_size")
    )
    kind = (
        "LoraForSequenceClassification"
        if adapter and adapter.task_type == SCORER
        else (config.architectures or [""])[0]
    )
    return kind, positions, vocabulary


def is_scorer(name: str) -> bool:
    """Return whether a folder or hub name holds a model with a sequence-classification head."""
    return model_facts(name)[0].endswith("ForSequenceClassification")


def require_causal(name: str, command: str) -> None:
    """Raise InputError if config.json names a model that can't generate; if it names none, loading
    will fail.
    """
    kind = model_facts(name)[0]
    if kind.endswith(("Classification", "QuestionAnswering", "ForMaskedLM", "ForPreTraining")):
        raise InputError(f"--model {name} is a {kind}; {command} needs a causal language model")


def usable_device(name: str) -> str:
    """Return the named device, or for 'auto' the best available one. Errors: InputError if torch
    can't use the device.
    """
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(
            f"--device {device}: torch can't use this device here; choose cpu or auto"
        ) from None
    return device


def from_config(name: str, kind: Any, **options: Any) -> Any:
    """Build the model in float32 with random weights."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trusted(), **options)
    return kind.from_config(config, trust_remote_code=trusted()).float()


def _load_weights(name: str, kind: Any, may_lack: tuple[str, ...] = (), **options: Any) -> Any:
    """Load the model in float32 and check that its files hold all weights: transformers would fill
    in random ones.
    """
    options |= {
        "dtype": torch.float32,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    options |= {"trust_remote_code": trusted(), "use_safetensors": None if trusted() else True}
    model, info = _try_loading(name, lambda: kind.from_pretrained(name, **options))
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if absent := sorted(key for key in absent if not key.startswith(may_lack)):
        raise InputError(
            f"model {name}: {len(absent)} tensors are missing from its files or differ in shape "
            f"from config.json, first {absent[0]}"
        )
    # A quantized weight is checked by its component tensors.
    weights = {key: component_tensors(weight) for key, weight in model.named_parameters()}
    if broken := [
        key for key, parts in weights.items() if not all(x.isfinite().all() for x in parts)
    ]:
        raise InputError(
            f"model {name}: {len(broken)} tensors contain NaN or infinite values, first {broken[0]}"
        )
    return model


def _try_loading(name: str, load: Callable[[], Any]) -> Any:
    require_model(name, files=(CONFIG,))  # for an adapter this is the base
    try:
        return load()
    except Exception as error:  # transformers, safetensors and the hub client raise many kinds
        raise InputError(
            f"model {name} can't be loaded: {refusal(error) or first_line(error)}"
        ) from error
