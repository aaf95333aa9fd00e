"""Weights of linear layers in 4 or 8 bits, by bitsandbytes: the frozen base below an adapter."""

import importlib.util
from typing import Any

import torch

from trivet.errors import InputError


def quantization(bits: str, precision: str, device: str) -> dict[str, Any]:
    """What transformers' from_pretrained is told: nothing for 'none'. 4bit is NF4 (QLoRA, Dettmers et al. 2023), 8bit LLM.int8."""
    if bits == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f'--quantize {bits} needs bitsandbytes: pip install "trivet[quantize]"')
    from transformers import BitsAndBytesConfig

    how: dict[str, Any] = {"load_in_8bit": True}
    if bits == "4bit":
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**how), "device_map": {"": device}}
