"""The same Llama with wider heads: vLLM's CPU attention wants multiples of 32, stories260K has heads of 8."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def widened(model: Any, width: int = 32) -> Any:
    """A model with the same logits, to rounding. The new dimensions are zero; rotary pair k of the old width w stands where the
    new one turns as fast, at k width / w; and queries grow by sqrt(width / w), which the smaller scale takes back."""
    config = copy.deepcopy(model.config)
    old, config.head_dim = config.head_dim, width
    step, half = width // old, torch.arange(old // 2)
    place = torch.cat(
        [half * step, width // 2 + half * step]
    )  # of each old dimension in a new head
    wide = AutoModelForCausalLM.from_config(config).float().eval()
    tensors = {}
    for name, x in model.state_dict().items():
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            heads = x.unflatten(0, (-1, old))
            new = x.new_zeros(len(heads), width, x.shape[1])
            new[:, place] = heads * (step**0.5 if kind == "q_proj" else 1)
            x = new.flatten(0, 1)
        elif kind == "o_proj":
            heads = x.unflatten(1, (-1, old))
            new = x.new_zeros(len(x), heads.shape[1], width)
            new[:, :, place] = heads
            x = new.flatten(1)
        tensors[name] = x
    wide.load_state_dict(tensors)
    wide.generation_config = model.generation_config
    return wide
