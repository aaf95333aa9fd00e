"""The models and devices that trivet plan knows. Models are counted by transformers' own classes
without creating their weights.
"""

import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from trivet.errors import InputError, first_line

# Built-in shapes and cards
# -----------------------------------------------------------------------------------------


LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
# the parts of the hub models' config.json that decide a count; `source`: where to find it
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "source": "huggingface.co/Qwen/Qwen2.5-0.5B", "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": QWEN3 | {
        "source": "huggingface.co/Qwen/Qwen3-0.6B", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "tie_word_embeddings": True,
    },
    "Qwen3-8B": QWEN3 | {
        "source": "huggingface.co/Qwen/Qwen3-8B", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False,
    },
    "Llama-3-8B": LLAMA | {
        "source": "huggingface.co/meta-llama/Meta-Llama-3-8B", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "Llama-3-70B": LLAMA | {
        "source": "huggingface.co/meta-llama/Meta-Llama-3-70B", "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": QWEN3 | {
        "source": "huggingface.co/Qwen/Qwen3-30B-A3B", "model_type": "qwen3_moe", "hidden_size": 2048,
        "num_key_value_heads": 4, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    },
    # without the multi-token prediction module, which transformers does not build
    "DeepSeek-V3": {
        "source": "huggingface.co/deepseek-ai/DeepSeek-V3", "model_type": "deepseek_v3", "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Card(NamedTuple):
    """A device: its memory in GB, its dense peaks of matrix products in TFLOP/s, its bandwidth in
    GB/s to memory and to its neighbors (one way).
    """

    memory: float
    bfloat16: float
    float32: float  # by torch's default: without TF32
    bandwidth: float
    link: float


CARDS = {  # vendors' data sheets
    "a100-40gb": Card(40, 312, 19.5, 1555, 300),
    "a100-80gb": Card(80, 312, 19.5, 2039, 300),
    "h100": Card(80, 989, 67, 3350, 450),
    "h200": Card(141, 989, 67, 4800, 450),
    "b200": Card(180, 2250, 75, 7700, 900),
    "mi300x": Card(192, 1307, 163, 5300, 448),
    "l40s": Card(48, 362, 91.6, 864, 32),
    "rtx-4090": Card(24, 165, 82.6, 1008, 32),
}
NETWORK = 50.0  # GB/s per device and direction between nodes: 400 Gbit/s
CONTEXT = 0.6e9  # bytes of a CUDA context with its libraries, assumed


class Machine(NamedTuple):
    """The device to plan for, in bytes, operations per second and bytes per second."""

    name: str
    cpu: bool
    memory: float
    rate_16: float
    rate_32: float
    bandwidth: float
    link: float
    network: float
    program: float  # bytes held before a model is loaded


# Counting a model
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the formulas need to know of a model, counted from its transformers class on the meta
    device.
    """

    name: str
    source: str
    parameters: int  # all of them, a tied head once
    vocabulary: int
    hidden: int
    layers: int
    head: int  # parameters of the output embedding
    tied: bool  # the head is the input embedding
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    # numbers per token and layer that a server caches for keys and values together (DeepSeek), or 0
    latent: int
    matrices: int  # parameters of the trunk's matrices that every token is multiplied by
    experts: int  # parameters of all experts
    active_experts: int  # parameters of the experts that one token is multiplied by
    block: int  # parameters of the largest block
    trunk: int  # parameters without the output head, as a scorer holds them
    root: int  # parameters outside the blocks: embedding, head, last norm
    adapters: int  # matrices that get adapters: all but head and experts
    adapted: int  # sum of in + out over them
    # numbers per token kept for the backward pass in the products' dtype: inputs of matrices, gates
    inputs: int
    norms: int  # the same in float32: inputs of norms
    gates: int  # sum of the widths of gated feed-forwards
    expert_inputs: int  # widths that the experts of one token read and write
    expert_gates: int

    @property
    def widest(self) -> float:
        """Width of one block's feed-forward, as one token sees it."""
        return (self.gates + self.expert_gates) / self.layers


# these matrices read the same input as the one before them
SAME_INPUT = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "up_proj")


def shape_of(config: Any, name: str, source: str) -> Shape:
    """Count a model with this config without creating its weights. Errors: InputError if
    transformers can't build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"--model {name}: transformers can't build a causal language model from it: "
            f"{first_line(error)}"
        ) from None
    text = config.get_text_config()
    body, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if head is None or not hasattr(body, "layers"):
        raise InputError(
            f"--model {name}: {type(model).__name__} is not a stack of layers under a head, the "
            "only kind that plan supports"
        )
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    key_width = getattr(text, "qk_head_dim", None) or width
    value_width = getattr(text, "v_head_dim", None) or width
    chosen, experts = _experts(text)
    linear = {
        name.split(".")[-1]
        for name, module in body.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    counted = dict.fromkeys(
        ("matrices", "experts", "adapters", "adapted", "inputs", "gates", "norms"), 0
    )
    counted |= dict.fromkeys(("expert_inputs", "expert_gates"), 0)
    # norms and gates that model/lean.py supports keep less
    norms = [m for m in body.modules() if type(m).__name__.endswith("RMSNorm")]
    lean_norms = bool(norms) and all(hasattr(m, "variance_epsilon") for m in norms)
    lean_gates = getattr(text, "hidden_act", "") == "silu"
    for path, p in body.named_parameters():
        kind = path.split(".")[-2]
        if p is embedding or "embed" in kind or kind in ("wte", "wpe") or path.endswith("bias"):
            continue
        if p.dim() == 3:  # experts, fused: (experts, out, in)
            counted["experts"] += p.numel()
            counted["expert_inputs"] += chosen * (
                p.shape[2] + (0 if "gate" in path else p.shape[1])
            )
            counted["expert_gates"] += chosen * p.shape[1] // 2 if "gate" in path else 0
        elif p.dim() == 2:  # (out, in)
            counted["matrices"] += p.numel()
            counted["adapters"] += kind in linear
            counted["adapted"] += sum(p.shape) if kind in linear else 0
            counted["inputs"] += (
                0 if kind in SAME_INPUT or (kind == "down_proj" and lean_gates) else p.shape[1]
            )
            if kind == "up_proj":  # gate and up; without model/lean.py also the activated gate
                counted["gates"] += p.shape[0]
                counted["inputs"] += (2 if lean_gates else 3) * p.shape[0]
        elif p.dim() == 1:
            inner = {"q_norm": heads * width, "k_norm": kv_heads * width}.get(kind)
            if inner is None:  # its input; without model/lean.py also the normalized input
                counted["norms"] += p.numel() if lean_norms else 2 * p.numel()
            else:  # the norm of queries or keys, which come in the products' dtype
                counted["inputs"] += inner
                counted["norms"] += 0 if lean_norms else inner
    total = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in body.layers]
    return Shape(
        name=name,
        source=source,
        parameters=total,
        vocabulary=head.weight.shape[0],
        hidden=head.weight.shape[1],
        layers=len(blocks),
        head=head.weight.numel(),
        tied=head.weight is embedding,
        heads=heads,
        kv_heads=kv_heads,
        key_width=key_width,
        value_width=value_width,
        latent=(getattr(text, "kv_lora_rank", None) or 0)
        and text.kv_lora_rank + text.qk_rope_head_dim,
        active_experts=counted["experts"] * chosen // experts,
        block=max(blocks),
        root=total - sum(blocks),
        trunk=sum(p.numel() for p in body.parameters()),
        **counted,
    )


def _experts(config: Any) -> tuple[int, int]:
    """(experts per token, experts in all); (1, 1) for a dense model."""
    experts = next(
        (
            n
            for key in ("num_experts", "n_routed_experts", "num_local_experts")
            if (n := getattr(config, key, 0))
        ),
        1,
    )
    return (getattr(config, "num_experts_per_tok", 1) or 1, experts) if experts > 1 else (1, 1)


def own_shape(config: Any) -> Shape:
    """A shape from its dimensions: a Llama or, with experts, a Qwen3 mixture. Errors: InputError if
    the dimensions don't fit together.
    """
    from transformers import AutoConfig

    if min(config.hidden, config.heads, config.vocabulary) < 1:
        raise InputError(
            "a shape of your own needs --layers, --hidden and --heads, and a --vocabulary of at "
            "least 1"
        )
    if config.hidden % config.heads and not config.head_dim:
        raise InputError(
            f"--hidden {config.hidden} is not a multiple of --heads {config.heads}; pass --head-dim"
        )
    kv_heads = config.kv_heads or config.heads
    if config.heads % kv_heads:
        raise InputError(f"--heads {config.heads} is not a multiple of --kv-heads {kv_heads}")
    if config.experts and not 0 < config.active_experts <= config.experts:
        raise InputError(
            f"--active-experts is {config.active_experts}; expected 1 to {config.experts}, the "
            "number of --experts"
        )
    numbers: dict[str, Any] = {
        "vocab_size": config.vocabulary, "hidden_size": config.hidden, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": config.tied,
        "head_dim": config.head_dim or config.hidden // config.heads,
    }  # fmt: skip
    wide = config.feed_forward or 4 * config.hidden
    if config.experts:
        numbers |= {"num_experts": config.experts, "num_experts_per_tok": config.active_experts}
        built = AutoConfig.for_model(
            "qwen3_moe", **numbers, intermediate_size=wide, moe_intermediate_size=wide
        )
    else:
        built = AutoConfig.for_model("llama", **numbers, intermediate_size=wide)
    return shape_of(built, "your own shape", "from its dimensions")


def card_of(name: str) -> Machine:
    """A built-in card. Errors: InputError that lists them all."""
    if name.lower() not in CARDS:
        raise InputError(
            f"unknown card '{name}'; choose from this, {', '.join(CARDS)}, or describe yours with "
            "--memory-gb, --tflops and --bandwidth"
        )
    card = CARDS[name.lower()]
    rates = 1e12 * card.bfloat16, 1e12 * card.float32, 1e9 * card.bandwidth, 1e9 * card.link
    return Machine(name.lower(), False, 1e9 * card.memory, *rates, 1e9 * NETWORK, CONTEXT)


def this_machine() -> Machine:
    """This machine: its memory, and how fast it multiplies and copies, measured for a second or
    two.
    """
    import torch

    from trivet.runner.memory import memory_now

    device = "cuda" if torch.cuda.is_available() else "cpu"
    big, small = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 26)
    x = torch.randn(big, big, device=device)
    y = torch.empty(small, dtype=torch.uint8, device=device).fill_(1)
    half = x.to(torch.bfloat16)
    rates = 2 * big**3 / _shortest(lambda: half @ half), 2 * big**3 / _shortest(lambda: x @ x)
    bandwidth = 2 * small / _shortest(y.clone)
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        return Machine(
            about.name, False, about.total_memory, *rates, bandwidth, 32e9, 1e9 * NETWORK, CONTEXT
        )
    name, memory = f"this machine, {torch.get_num_threads()} threads", _memory()
    return Machine(name, True, memory, *rates, bandwidth, 1e9, 1e9, memory_now("cpu"))


def _shortest(work: Any) -> float:
    import torch

    times = list[float]()
    for _ in range(9):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
