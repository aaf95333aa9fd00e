"""Quantize linear layers to 4 or 8 bits: the frozen base below an adapter."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from trivet.errors import InputError


def quantization(bits: str, precision: str, device: str) -> dict[str, Any]:
    """Return the options for transformers' from_pretrained: none for 'none'; 4bit is bitsandbytes'
    NF4 (QLoRA, Dettmers et al. 2023), 8bit torchao's integers with one scale per row. Both leave
    activations unquantized, so a product does not depend on its batch.
    """
    if bits == "none":
        return {}
    library = {"4bit": "bitsandbytes", "8bit": "torchao"}[bits]
    if importlib.util.find_spec(library) is None:
        raise InputError(f'--quantize {bits} needs {library}: pip install "trivet[quantize]"')
    if bits == "4bit":
        from transformers import BitsAndBytesConfig

        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        config: Any = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    else:
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(model: Any, name: str) -> Any:
    """Make gradients flow through the model's quantized layers. Errors: InputError for a kind whose
    products depend on the batch.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            raise InputError(
                f"{name} has bitsandbytes 8-bit weights, whose products also round activations and "
                "so depend on the batch; start from its full weights with --quantize 8bit"
            )
        # bitsandbytes would repack its weights at the first pass without gradients, and no gradient
        # could flow through them after that
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def component_tensors(x: Any) -> list[Tensor]:
    """Return the tensors that a quantized tensor consists of; any other tensor as it is."""
    names = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else ()
    return [part for name in names for part in component_tensors(getattr(x, name))] or [x]
