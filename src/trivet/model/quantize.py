"""Weights of linear layers in 4 or 8 bits: the frozen base below an adapter."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from trivet.errors import InputError


def quantization(bits: str, precision: str, device: str) -> dict[str, Any]:
    """What transformers' from_pretrained is told: nothing for 'none'; 4bit is bitsandbytes' NF4 (QLoRA, Dettmers et al. 2023), 8bit
    torchao's whole numbers with one scale a row. Both keep the activations as they are, so a product does not depend on its batch."""
    if bits == "none":
        return {}
    library = {"4bit": "bitsandbytes", "8bit": "torchao"}[bits]
    if importlib.util.find_spec(library) is None:
        raise InputError(f'--quantize {bits} needs {library}: pip install "trivet[quantize]"')
    if bits == "4bit":
        from transformers import BitsAndBytesConfig

        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        config: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    else:
        from torchao.quantization import Int8WeightOnlyConfig  # type: ignore[import-not-found]
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    return {"quantization_config": config, "device_map": {"": device}}


def keep_trainable(model: Any, name: str) -> Any:
    """The model so that gradients go through its quantized layers. Errors: InputError for a kind whose products change with the batch."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            raise InputError(
                f"{name} holds bitsandbytes' 8-bit weights, whose products round activations too and so change with the batch; "
                "start from its full weights with --quantize 8bit"
            )
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would pack its weights anew at the first pass
            module.support_avx512bf16_for_cpu = False  # without gradients, and none can go through them after that
    return model


def plain(x: Any) -> list[Tensor]:
    """The tensors that a quantized one is made of; any other is itself."""
    names = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else ()
    return [part for name in names for part in plain(getattr(x, name))] or [x]
