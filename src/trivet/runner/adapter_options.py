"""--lora, --merge and --quantize: what does not go together, and the model with its adapter."""

from typing import Any

from trivet.errors import InputError
from trivet.model.adapters import adapter_of, new_adapter
from trivet.step.options import Options


def check_adapter(config: Options, start_from: str) -> None:
    """InputError for what is asked of an adapter where there is none, or another than the one that is gone on with."""
    own = adapter_of(start_from)
    asked_for = {"merge": config.merge, "quantize": config.quantize != "none"}
    asked_for |= {"lora-alpha": config.lora_alpha, "lora-targets": config.lora_targets}
    for name, asked in asked_for.items():
        if asked and own is None and not config.lora:
            raise InputError(f"--{name} belongs to an adapter; give --lora RANK, or an adapter as --model")
    if config.from_scratch and (own is not None or config.lora):
        raise InputError("--from-scratch trains all weights, and an adapter needs trained ones below it; leave one out")
    as_it_is = own is None or (config.lora in (0, own.r) and config.lora_alpha in (0, own.lora_alpha))
    if own is not None and not (as_it_is and not config.lora_targets):
        raise InputError(
            f"{start_from} is an adapter of rank {own.r} and alpha {own.lora_alpha:g}, which is gone on with as it is; "
            "leave out --lora, --lora-alpha and --lora-targets, or start from one that was saved with --merge"
        )


def adapted(model: Any, config: Options, start_from: str) -> Any:
    """The model with a new adapter where one is asked for, and it has none yet."""
    quantized, own = getattr(model, "is_quantized", False), hasattr(model, "peft_config")
    if quantized and not (config.lora or own):
        raise InputError(f"{start_from} is quantized, so its weights can't be trained; train an adapter: --lora 16")
    if quantized and config.merge and config.quantize == "none":
        raise InputError(
            f"--merge: {start_from} is quantized on disk, so nothing exact can be added to it; leave it out"
        )
    if config.lora and not own:
        new_adapter(model, start_from, config.lora, config.lora_alpha, config.lora_targets)
    return model
