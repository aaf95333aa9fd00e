"""LoRA adapters (Hu et al. 2021) with peft: inject them into a model in place, read and write peft
folders, merge.

    y = x W' + (alpha / r) x A' B'

W (out, in) is frozen; A (r, in) and B (out, r) are trained. B starts at zero.

The model stays the same transformers model. Two models over one base are two module trees that
share frozen tensors (model/copies.py), each with its own adapter: nothing is switched on and off.
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
    """Read the config of the adapter in a folder or hub name; None if there is no adapter."""
    if not name or (is_path(name) and not (Path(name) / ADAPTER_CONFIG).exists()):
        return None
    try:
        if not find_adapter_config_file(name):
            return None
    except Exception:  # no such name; loading it will raise the error
        return None
    try:
        config = PeftConfig.from_pretrained(name)
    except Exception as error:  # a damaged file or an unknown kind
        raise InputError(
            f"adapter {name}: its {ADAPTER_CONFIG} can't be read: {first_line(error)}"
        ) from error
    if not isinstance(config, LoraConfig) or not config.base_model_name_or_path:
        what = (
            "names no base model"
            if isinstance(config, LoraConfig)
            else f"is of type {config.peft_type}"
        )
        raise InputError(
            f"adapter {name}: its {ADAPTER_CONFIG} {what}; expected LoRA with a "
            "base_model_name_or_path"
        )
    return config


def new_adapter(model: Any, base: str, rank: int, alpha: int, targets: Sequence[str]) -> Any:
    """Inject a new adapter of this rank in place, on the linear layers whose names end in one of
    targets (empty: all but the head); alpha 0 means 2 rank. Its product starts at zero, and only
    the adapter and a scalar head will be trained.
    """
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    linear = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D) and id(m) not in heads
    }
    names = sorted({name.rpartition(".")[2] for name in linear})
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise InputError(
                f"--lora-targets {target}: no such linear layer below the head; choose from "
                f"{', '.join(names)}"
            )
    chosen = tuple(f".{target}" for target in targets or names)
    conv = any(isinstance(m, Conv1D) for n, m in linear.items() if f".{n}".endswith(chosen))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,
        target_modules=list(targets or names),
        fan_in_fan_out=conv,
    )  # type: ignore[arg-type]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    return inject(model, config)


def inject(model: Any, config: LoraConfig) -> Any:
    """Inject this adapter in place, without loading its weights. A model with a scalar head trains
    and saves the head too.
    """
    scorer = hasattr(model, "score")
    config.task_type, config.inference_mode = SCORER if scorer else CAUSAL, False  # type: ignore[assignment]
    config.modules_to_save = (
        sorted({*(config.modules_to_save or ()), *(("score",) if scorer else ())}) or None
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(
            f"adapter on {config.base_model_name_or_path}: {first_line(error)}"
        ) from error
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "adapters on the output head are not supported; merge it first (peft's "
            "merge_and_unload)"
        )
    return model.eval()


def read_adapter(model: Any, name: str) -> None:
    """Load the weights of the adapter in this folder or hub name into the model's adapter. Errors:
    InputError if they don't fit.
    """
    try:
        weights = {
            key.removeprefix(PREFIX): x for key, x in load_peft_weights(name, device="cpu").items()
        }
        if hasattr(model, "score"):  # a language model's adapter has no scalar head
            weights.setdefault("score.weight", model.score.weight.detach())
        result = set_peft_model_state_dict(model, weights)
    except Exception as error:  # safetensors, peft and the hub client raise many kinds
        raise InputError(f"adapter {name} can't be loaded: {first_line(error)}") from error
    if wrong := [*filter(is_adapter_parameter, result.missing_keys), *result.unexpected_keys]:
        raise InputError(
            f"adapter {name}: {len(wrong)} of its tensors do not fit its base model: {wrong[0]}"
        )


def write_adapter(model: Any, folder: Path) -> None:
    """Write a peft folder: adapter_config.json and adapter_model.safetensors, which peft,
    transformers and vLLM load over the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {f"{PREFIX}{name}": x.detach().cpu().contiguous() for name, x in weights.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict() | {"inference_mode": True}
    # Sorted, since the order of peft's sets varies.
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"
    )
    if model.can_generate():
        # its EOS ids tell Trivet where completions end
        model.generation_config.save_pretrained(folder)


def is_adapter_parameter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter or its head rather than to the
    base.
    """
    return "lora_" in name or ".modules_to_save." in name


@makes_model
def trainable_copy(model: Any, like: Any) -> Any:
    """Return a copy of a scorer that trains like `like`: if that has an adapter, an adapter and
    head over the scorer's weights.
    """
    if not hasattr(like, "peft_config"):
        return copy.deepcopy(model).requires_grad_(True)
    shared = {id(x): x for name, x in model.named_parameters() if not is_adapter_parameter(name)}
    copied = copy.deepcopy(model, shared)
    if not hasattr(model, "peft_config"):
        config = like.peft_config["default"]
        targets = sorted(config.target_modules)
        new_adapter(copied, model.name_or_path, config.r, config.lora_alpha, targets)
    for name, x in copied.named_parameters():
        x.requires_grad_(is_adapter_parameter(name))
    return copied


@makes_model
def scorer_on_policy(policy: Any, name: str) -> Any:
    """Build the reward model of an adapter folder over the policy's frozen weights; None if their
    bases differ.
    """
    config = adapter_of(name)
    policy_config = getattr(policy, "peft_config", {}).get("default")
    if config is None or policy_config is None:
        return None
    if _base_path(config) != _base_path(policy_config):
        return None
    model = without_layers(with_scalar_head(policy))
    inject(model, config)
    read_adapter(model, name)
    return model


def _base_path(config: LoraConfig) -> str:
    name = str(config.base_model_name_or_path)
    return str(Path(name).resolve()) if Path(name).exists() else name


def merge_adapter(model: Any) -> Any:
    """Merge the adapter into the model in place: W + (alpha / r) B A replaces W."""
    for module in list(model.modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return without_layers(model)


def without_layers(model: Any) -> Any:
    """Remove peft's layers in place, leaving the weights below them and the head that was trained
    with them.
    """
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, BaseTunerLayer):
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            setattr(
                model.get_submodule(parent), leaf, module.modules_to_save[module.active_adapters[0]]
            )
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
