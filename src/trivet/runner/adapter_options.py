"""--lora, --merge and --quantize: checks of their combinations, and the model with its adapter."""

from typing import Any

from trivet.errors import InputError
from trivet.model.adapters import adapter_of, new_adapter
from trivet.step.options import Options


def check_adapter(config: Options, start_from: str) -> None:
    """Raise an InputError for adapter options without an adapter, or for ones that differ from the
    existing adapter that is to be trained.
    """
    own = adapter_of(start_from)
    asked_for = {"merge": config.merge, "quantize": config.quantize != "none"}
    asked_for |= {"lora-alpha": config.lora_alpha, "lora-targets": config.lora_targets}
    for name, asked in asked_for.items():
        if asked and own is None and not config.lora:
            raise InputError(
                f"--{name} needs an adapter; add --lora RANK, or give an adapter as --model"
            )
    if config.from_scratch and (own is not None or config.lora):
        raise InputError(
            "--from-scratch trains all weights, but an adapter needs a trained base; drop one of "
            "the two"
        )
    as_it_is = own is None or (
        config.lora in (0, own.r) and config.lora_alpha in (0, own.lora_alpha)
    )
    if own is not None and not (as_it_is and not config.lora_targets):
        raise InputError(
            f"{start_from} is already a rank-{own.r} adapter with alpha {own.lora_alpha:g} and "
            "will be trained as is; drop --lora, --lora-alpha and --lora-targets, or start from a "
            "model saved with --merge"
        )


def with_adapter(model: Any, config: Options, start_from: str) -> Any:
    """Return the model, with a new adapter if --lora asks for one and it has none yet."""
    quantized, own = getattr(model, "is_quantized", False), hasattr(model, "peft_config")
    if quantized and not (config.lora or own):
        raise InputError(
            f"{start_from} is quantized, so its weights can't be trained; train an adapter with "
            "--lora 16"
        )
    if quantized and config.merge and config.quantize == "none":
        raise InputError(
            f"--merge: {start_from} is quantized on disk, so an adapter can't be merged into it "
            "exactly; drop --merge"
        )
    if config.lora and not own:
        new_adapter(model, start_from, config.lora, config.lora_alpha, config.lora_targets)
    return model
