"""LoRA adapters (Hu et al. 2021) by peft: put into a model in place, read from and written to peft folders, merged.

    y = x W' + (alpha / r) x A' B'

W (out, in) is frozen; A (r, in) and B (out, r) are trained. B starts at zero.

The model stays the transformers model that it was. Two models over one base are two trees of modules with the same frozen tensors
(model/copies.py), each with an adapter of its own: nothing is switched on and off.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, load_peft_weights
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from trivet.errors import InputError, first_line
from trivet.model.scalar import with_scalar_head
from trivet.model.weights import makes_model
from trivet.places import ADAPTER_CONFIG, is_path

WEIGHTS, PREFIX = "adapter_model.safetensors", "base_model.model."
CAUSAL, SCORER = "CAUSAL_LM", "SEQ_CLS"


def adapter_of(name: str) -> LoraConfig | None:
    """What the adapter in a folder or hub name says of itself; None where there is no adapter."""
    if not name or (is_path(name) and not (Path(name) / ADAPTER_CONFIG).exists()):
        return None
    try:
        if not find_adapter_config_file(name):
            return None
    except Exception:  # no such name; who loads it will say so
        return None
    try:
        config = PeftConfig.from_pretrained(name)
    except Exception as error:  # a damaged file, a stranger's kind
        raise InputError(f"adapter {name}: its {ADAPTER_CONFIG} can't be read: {first_line(error)}") from error
    if not isinstance(config, LoraConfig) or not config.base_model_name_or_path:
        what = "names no base model" if isinstance(config, LoraConfig) else f"is of kind {config.peft_type}"
        raise InputError(f"adapter {name}: its {ADAPTER_CONFIG} {what}; expected LoRA with a base_model_name_or_path")
    return config


def new_adapter(model: Any, base: str, rank: int, alpha: int, targets: Sequence[str]) -> Any:
    """The model with an adapter of this rank on the linear layers whose names end so (none given: on all but the head), in
    place; alpha 0 stands for 2 rank. It changes nothing yet, and it and a scalar head are all that will be trained."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and id(m) not in heads}
    names = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise InputError(
                f"--lora-targets {target}: no such linear layer below the head; there is {', '.join(names)}"
            )
    chosen = tuple(f".{target}" for target in targets or names)
    conv = any(isinstance(m, Conv1D) for n, m in linear.items() if f".{n}".endswith(chosen))
    config = LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(targets or names), fan_in_fan_out=conv
    )  # type: ignore[arg-type]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    return inject(model, config)


def inject(model: Any, config: LoraConfig) -> Any:
    """The model with this adapter, not yet its weights. A model with a scalar head trains and saves the head too."""
    scorer = hasattr(model, "score")
    config.task_type, config.inference_mode = SCORER if scorer else CAUSAL, False  # type: ignore[assignment]
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *(("score",) if scorer else ())}) or None
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"adapter on {config.base_model_name_or_path}: {first_line(error)}") from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError("an adapter on the output head is not read here; merge it first (peft's merge_and_unload)")
    return model.eval()


def read_adapter(model: Any, name: str) -> None:
    """Put the weights of the adapter in this folder or hub name into the model's own. Errors: InputError where they don't fit."""
    try:
        weights = {key.removeprefix(PREFIX): x for key, x in load_peft_weights(name, device="cpu").items()}
        if hasattr(model, "score"):  # an adapter of a language model brings no head
            weights.setdefault("score.weight", model.score.weight.detach())
        result = set_peft_model_state_dict(model, weights)
    except Exception as error:  # safetensors, peft and the hub client raise many kinds
        raise InputError(f"adapter {name} can't be loaded: {first_line(error)}") from error
    if wrong := [*filter(is_adapters, result.missing_keys), *result.unexpected_keys]:
        raise InputError(f"adapter {name}: {len(wrong)} of its tensors do not fit its base model: {wrong[0]}")


def write_adapter(model: Any, folder: Path) -> None:
    """A peft folder: adapter_config.json and adapter_model.safetensors, which peft, transformers and vLLM load over the base."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    said = model.peft_config["default"].to_dict() | {"inference_mode": True}
    said = {
        key: sorted(value) if isinstance(value, set) else value for key, value in said.items()
    }  # peft's order varies
    (folder / ADAPTER_CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True), encoding="utf-8")
    if model.can_generate():
        model.generation_config.save_pretrained(folder)  # where completions end, for Trivet


def is_adapters(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter, with its head, and not to the base."""
    return "lora_" in name or ".modules_to_save." in name


@makes_model
def trainable_copy(model: Any, like: Any) -> Any:
    """A copy of a scorer, to be trained as like is: where that has an adapter, an adapter and head over the scorer's weights."""
    if not hasattr(like, "peft_config"):
        return copy.deepcopy(model).requires_grad_(True)
    shared = {id(x): x for name, x in model.named_parameters() if not is_adapters(name)}
    copied = copy.deepcopy(model, shared)
    if not hasattr(model, "peft_config"):
        own = like.peft_config["default"]
        new_adapter(copied, model.name_or_path, own.r, own.lora_alpha, sorted(own.target_modules))
    for name, x in copied.named_parameters():
        x.requires_grad_(is_adapters(name))
    return copied


@makes_model
def scorer_over(policy: Any, name: str) -> Any:
    """The reward model in an adapter folder over the frozen weights of the policy; None where they are not of the same base."""
    config, own = adapter_of(name), getattr(policy, "peft_config", {}).get("default")
    if config is None or own is None or _place(config) != _place(own):
        return None
    model = without_layers(with_scalar_head(policy))
    inject(model, config)
    read_adapter(model, name)
    return model


def _place(config: LoraConfig) -> str:
    name = str(config.base_model_name_or_path)
    return str(Path(name).resolve()) if Path(name).exists() else name


def merged(model: Any) -> Any:
    """The same model in place without its adapter: W + (alpha / r) B A in place of W."""
    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return without_layers(model)


def without_layers(model: Any) -> Any:
    """The model in place without peft's layers: with the weights below them, and the head that was trained beside them."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            setattr(model.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]])
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
