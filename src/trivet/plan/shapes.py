"""What is planned for: models, counted by transformers' own classes without making their weights, and devices."""

import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from trivet.errors import InputError, first_line

# Public shapes and known cards -----------------------------------------------------------------------------------------

LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
QWEN3: dict[str, Any] = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {  # config.json of the hub's models, as far as it decides a count; `source`: where it stands
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
    "DeepSeek-V3": {  # without the module for multi-token prediction, which transformers does not build
        "source": "huggingface.co/deepseek-ai/DeepSeek-V3", "model_type": "deepseek_v3", "vocab_size": 129280,
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Card(NamedTuple):
    """A device: its memory in GB, dense peaks of matrix products in TFLOP/s, GB/s of its memory and to its neighbors (one way)."""

    memory: float
    bfloat16: float
    float32: float  # as torch makes them unless told otherwise: without TF32
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
NETWORK = 50.0  # GB/s a device and way between nodes: 400 Gbit/s
CONTEXT = 0.6e9  # bytes of a CUDA context with its libraries, assumed


class Machine(NamedTuple):
    """The device that is planned for, in bytes, operations a second and bytes a second."""

    name: str
    cpu: bool
    memory: float
    rate_16: float
    rate_32: float
    bandwidth: float
    link: float
    network: float
    program: float  # bytes held before a model is loaded


# What is counted of a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the formulas need of a model, counted from its own class in transformers on the meta device."""

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
    latent: int  # numbers of a token and layer that a server keeps of keys and values together (DeepSeek), or 0
    matrices: int  # parameters of the trunk's matrices that every token is multiplied by
    experts: int  # parameters of all experts
    active_experts: int  # of those that one token is multiplied by
    block: int  # parameters of the largest block
    trunk: int  # parameters without the output head, as a scorer holds them
    root: int  # parameters outside of the blocks: embedding, head, last norm
    adapters: int  # matrices that adapters sit beside: all but head and experts
    adapted: int  # sum of in + out over them
    inputs: int  # numbers that a token leaves for the backward in the type of the products: what matrices read, gates
    norms: int  # and in float32: what norms read
    gates: int  # sum of the widths of gated feed-forwards
    expert_inputs: int  # widths that the experts of one token read, and write
    expert_gates: int

    @property
    def widest(self) -> float:
        """Feed-forward of one block, as wide as it is for one token."""
        return (self.gates + self.expert_gates) / self.layers


SAME_INPUT = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "up_proj")  # read what the matrix before them reads


def shape_of(config: Any, name: str, source: str) -> Shape:
    """Count a model of this config without making its weights. Errors: InputError where transformers can't build it."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(
            f"--model {name}: transformers can't build a causal language model of it: {first_line(error)}"
        ) from None
    text = config.get_text_config()
    body, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if head is None or not hasattr(body, "layers"):
        raise InputError(
            f"--model {name}: {type(model).__name__} is no stack of layers under a head; plan knows only these"
        )
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    key_width = getattr(text, "qk_head_dim", None) or width
    value_width = getattr(text, "v_head_dim", None) or width
    chosen, there = _experts(text)
    linear = {name.split(".")[-1] for name, module in body.named_modules() if isinstance(module, torch.nn.Linear)}
    counted = dict.fromkeys(("matrices", "experts", "adapters", "adapted", "inputs", "gates", "norms"), 0)
    counted |= dict.fromkeys(("expert_inputs", "expert_gates"), 0)
    norms = [m for m in body.modules() if type(m).__name__.endswith("RMSNorm")]  # what model/lean.py knows keeps less:
    lean_norms = bool(norms) and all(hasattr(m, "variance_epsilon") for m in norms)
    lean_gates = getattr(text, "hidden_act", "") == "silu"
    for path, p in body.named_parameters():
        kind = path.split(".")[-2]
        if p is embedding or "embed" in kind or kind in ("wte", "wpe") or path.endswith("bias"):
            continue
        if p.dim() == 3:  # experts, fused: (experts, out, in)
            counted["experts"] += p.numel()
            counted["expert_inputs"] += chosen * (p.shape[2] + (0 if "gate" in path else p.shape[1]))
            counted["expert_gates"] += chosen * p.shape[1] // 2 if "gate" in path else 0
        elif p.dim() == 2:  # (out, in)
            counted["matrices"] += p.numel()
            counted["adapters"] += kind in linear
            counted["adapted"] += sum(p.shape) if kind in linear else 0
            counted["inputs"] += 0 if kind in SAME_INPUT or (kind == "down_proj" and lean_gates) else p.shape[1]
            if kind == "up_proj":  # gate and up; without lean also the activation of gate
                counted["gates"] += p.shape[0]
                counted["inputs"] += (2 if lean_gates else 3) * p.shape[0]
        elif p.dim() == 1:
            inner = {"q_norm": heads * width, "k_norm": kv_heads * width}.get(kind)
            if inner is None:  # what it reads; without lean also that over its root mean square
                counted["norms"] += p.numel() if lean_norms else 2 * p.numel()
            else:  # of queries or keys, which come in the type of the products
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
        latent=(getattr(text, "kv_lora_rank", None) or 0) and text.kv_lora_rank + text.qk_rope_head_dim,
        active_experts=counted["experts"] * chosen // there,
        block=max(blocks),
        root=total - sum(blocks),
        trunk=sum(p.numel() for p in body.parameters()),
        **counted,
    )


def _experts(config: Any) -> tuple[int, int]:
    """(experts of a token, experts there are); (1, 1) in a dense model."""
    there = next(
        (n for key in ("num_experts", "n_routed_experts", "num_local_experts") if (n := getattr(config, key, 0))), 1
    )
    return (getattr(config, "num_experts_per_tok", 1) or 1, there) if there > 1 else (1, 1)


def own_shape(config: Any) -> Shape:
    """A shape given by its dimensions: a Llama, or with experts a Qwen3 mixture. Errors: InputError where they don't fit together."""
    from transformers import AutoConfig

    if min(config.hidden, config.heads, config.vocabulary) < 1:
        raise InputError("a shape of your own needs --layers, --hidden and --heads, and a --vocabulary of at least 1")
    if config.hidden % config.heads and not config.head_dim:
        raise InputError(f"--hidden {config.hidden} is no multiple of --heads {config.heads}; give --head-dim")
    kv_heads = config.kv_heads or config.heads
    if config.heads % kv_heads:
        raise InputError(f"--heads {config.heads} is no multiple of --kv-heads {kv_heads}")
    if config.experts and not 0 < config.active_experts <= config.experts:
        raise InputError(
            f"--active-experts {config.active_experts}: expected 1 to {config.experts}, the --experts there are"
        )
    numbers: dict[str, Any] = {
        "vocab_size": config.vocabulary, "hidden_size": config.hidden, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": config.tied,
        "head_dim": config.head_dim or config.hidden // config.heads,
    }  # fmt: skip
    wide = config.feed_forward or 4 * config.hidden
    if config.experts:
        numbers |= {"num_experts": config.experts, "num_experts_per_tok": config.active_experts}
        made = AutoConfig.for_model("qwen3_moe", **numbers, intermediate_size=wide, moe_intermediate_size=wide)
    else:
        made = AutoConfig.for_model("llama", **numbers, intermediate_size=wide)
    return shape_of(made, "your own shape", "by its dimensions")


def card_of(name: str) -> Machine:
    """A known card. Errors: InputError with those there are."""
    if name.lower() not in CARDS:
        raise InputError(
            f"--card {name}: there is this, {', '.join(CARDS)}; or give --memory-gb, --tflops and --bandwidth"
        )
    card = CARDS[name.lower()]
    rates = 1e12 * card.bfloat16, 1e12 * card.float32, 1e9 * card.bandwidth, 1e9 * card.link
    return Machine(name.lower(), False, 1e9 * card.memory, *rates, 1e9 * NETWORK, CONTEXT)


def this_machine() -> Machine:
    """The machine at hand: its memory, and how fast it multiplies and copies, measured for a second or two."""
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
        return Machine(about.name, False, about.total_memory, *rates, bandwidth, 32e9, 1e9 * NETWORK, CONTEXT)
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
