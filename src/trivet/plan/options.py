"""What trivet plan is asked for."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Memory by part, operations and bytes of a step, time and the largest microbatch that fits, before anything runs.
    Without --method all six side by side."""

    # The model
    model: str = ""
    """Folder or hub name with a config.json, one of the shapes that are known here (trivet plan lists them), or none: --layers and so on."""

    # The step
    method: tuple[str, ...] = ()
    """sft, reward-model, dpo, ppo, grpo, pairwise-grpo; several stand side by side, none means all."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    completion_tokens: int = 256
    """Tokens of a completion."""
    prompts_per_step: int = 8
    """Prompts (rows, for preferences and supervised data) of one step, over all devices."""
    group_size: int = 0
    """Completions per prompt where the method samples; 0: the method's own."""
    epochs_per_batch: int = 0
    """Passes over each batch of completions (ppo, grpo); 0: the method's own."""
    microbatch_tokens: int = 0
    """Most tokens to go through the model at once; 0 takes 2,048 on a CPU, 16,384 elsewhere."""
    eval_limit: int = 0
    """Held-out prompts that an evaluation samples at once, where there are so many (the recipes take up to 256); 0: no evaluation."""

    # Memory
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights are kept in float32."""
    reference: bool = True
    """--no-reference: grpo with --beta 0."""
    reward_model: str = ""
    """The reward is a model: 'same' for one of the policy's shape, or a folder, hub name or known shape; none: a program."""
    shared_critic: bool = False
    """ppo: the critic is a head on the policy's own trunk."""
    lora: int = 0
    """Rank of adapters beside all matrices of the trunk, over a frozen base; 0: all weights are trained."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base below the adapters in 4 or 8 bits a weight."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block, compute the rest again in the backward pass."""
    offload_optimizer: bool = False
    """The optimizer's states live in the host's memory."""

    # Devices
    devices: int = 1
    """Devices that share weights and prompts (FSDP2)."""
    servers: int = 0
    """Further devices of this kind that sample with vLLM, sharing one copy of the weights; 0: those that train sample too."""
    card: str = "this"
    """What a device is: 'this' machine, measured now, or a known card."""
    memory_gb: float = 0.0
    """Memory of a device in GB (10^9 bytes); 0: the card's."""
    tflops: float = 0.0
    """Its peak in matrix products of this precision, 10^12 operations a second; 0: the card's."""
    bandwidth: float = 0.0
    """Its memory bandwidth in GB/s; 0: the card's."""
    efficiency: float = 0.4
    """Share of the peaks of computing, memory and links that is reached."""

    # A shape of your own
    layers: int = 0
    """A shape of your own, in place of --model: how many blocks."""
    hidden: int = 0
    """Width of the hidden states."""
    heads: int = 0
    """Attention heads."""
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as heads."""
    head_dim: int = 0
    """Width of a head; 0: hidden / heads."""
    feed_forward: int = 0
    """Width of the gated feed-forward, in a mixture that of one expert; 0: 4 x hidden."""
    vocabulary: int = 32000
    """Token ids."""
    tied: bool = False
    """The head is the input embedding."""
    experts: int = 0
    """Experts of each block; 0: dense."""
    active_experts: int = 8
    """Experts that a token goes through."""

    # Output
    formulas: bool = False
    """Show each number with its formula and what was put in."""
    json: bool = False
    """Print all of it as JSON."""
