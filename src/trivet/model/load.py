"""Models in and out: ordinary Hugging Face folders, loaded as a policy or with a scalar head, copied, saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from trivet.errors import InputError, first_line
from trivet.model.adapters import SCORER, adapter_of, inject, merged, read_adapter, write_adapter
from trivet.model.adapters import WEIGHTS as ADAPTER_WEIGHTS
from trivet.model.lean import make_lean
from trivet.model.quantize import keep_trainable, plain, quantization
from trivet.model.trust import refusal, trusted
from trivet.places import ADAPTER_CONFIG, CONFIG, require_model

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
disable_progress_bar()
set_verbosity_error()  # what its reports of missing weights say is checked here


def load_policy(
    name: str, *, device: str = "cpu", precision: str = "float32", from_scratch: bool = False, quantize: str = "none"
) -> Any:
    """A causal language model from a folder or hub name: float32 weights, dropout off, matrix products in `precision`.

    An adapter's folder gives the model that it belongs to, with it, and only it left to be trained. from_scratch: random weights in
    the shape of its config.json. quantize: hold the linear layers in 4bit or 8bit. Errors: InputError where there is no such model.
    """
    base, config = base_of(name)
    if from_scratch:
        model = _reading(base, lambda: from_config(base, AutoModelForCausalLM))
    else:
        model = _with_weights(base, AutoModelForCausalLM, **quantization(quantize, precision, device))
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
    """A model with a scalar head, `score`, as load_policy does it; on a language model the head is new, and starts at zero.
    merge: an adapter's product is added to its base in memory."""
    (name, config), folder = base_of(name), name
    kind, new_head = AutoModelForSequenceClassification, from_scratch or not is_scorer(name)
    if from_scratch:
        model = _reading(name, lambda: from_config(name, kind, num_labels=1))
    else:
        options = quantization(quantize, precision, device) | {"num_labels": 1}
        model = _with_weights(name, kind, may_lack=("score",) if new_head else (), **options)
    if not hasattr(model, "score"):
        raise InputError(
            f"{name}: {type(model).__name__} has no scalar head named 'score'; choose another kind of model"
        )
    if new_head:
        torch.nn.init.zeros_(model.score.weight)
    model = _prepare(_with_adapter(model, config, folder), device, PRECISIONS[precision])
    return merged(model) if merge else model


def base_of(name: str) -> tuple[str, Any]:
    """The base model of an adapter and the adapter's config; of any other model its own name and None."""
    config = adapter_of(name)
    return (name, None) if config is None else (str(config.base_model_name_or_path), config)


def _with_adapter(model: Any, config: Any, name: str) -> Any:
    if config is not None:
        inject(model, config)
        read_adapter(model, name)
    return model


def _prepare(model: Any, device: torch.device | str, compute_dtype: torch.dtype | None) -> Any:
    model.compute_dtype = compute_dtype
    model = (
        keep_trainable(model, model.name_or_path).to(device).eval()
    )  # no dropout: with it, policy and reference would differ
    return make_lean(model)


def save_model(model: Any, tokenizer: Any, folder: Path, *, merge: bool = False) -> None:
    """An ordinary Hugging Face folder that transformers, vLLM and TRL load as it is; of an adapter peft's, unless it is to be
    merged into its base, which is read again for that in its full precision."""
    if hasattr(model, "peft_config"):
        write_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    if merge:
        whole = merged((load_scorer if hasattr(model, "score") else load_policy)(str(folder)))
        whole.config.pad_token_id = model.config.pad_token_id
        for path in (folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS):
            path.unlink()
        whole.save_pretrained(folder)
        if whole.can_generate():
            model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore(model: Any, folder: Path) -> None:
    """Give the model the weights that save_model wrote of it."""
    if hasattr(model, "peft_config"):
        read_adapter(model, str(folder))
    else:
        load = load_scorer if hasattr(model, "score") else load_policy
        model.load_state_dict(load(str(folder), device=model.device).state_dict())


def model_facts(name: str) -> tuple[str, int, int]:
    """What config.json says: the model's class ('' where it doesn't say), how many positions it has, how many token ids."""
    base, adapter = base_of(name)
    config = _reading(base, lambda: AutoConfig.from_pretrained(base, trust_remote_code=trusted()))
    text, unlimited = config.get_text_config(), 1 << 30
    positions, vocabulary = (getattr(text, key, 0) or unlimited for key in ("max_position_embeddings", "vocab_size"))
    kind = (
        "LoraForSequenceClassification"
        if adapter and adapter.task_type == SCORER
        else (config.architectures or [""])[0]
    )
    return kind, positions, vocabulary


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


def from_config(name: str, kind: Any, **options: Any) -> Any:
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
    weights = {key: plain(weight) for key, weight in model.named_parameters()}  # of a quantized one its parts
    if broken := [key for key, parts in weights.items() if not all(x.isfinite().all() for x in parts)]:
        raise InputError(
            f"model {name}: {len(broken)} tensors hold values that are not finite numbers, first {broken[0]}"
        )
    return model


def _reading(name: str, load: Callable[[], Any]) -> Any:
    require_model(name, files=(CONFIG,))  # of an adapter this is the base
    try:
        return load()
    except Exception as error:  # transformers, safetensors and the hub client raise many kinds
        raise InputError(f"model {name} can't be loaded: {refusal(error) or first_line(error)}") from error
