"""The options of trivet plan."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predict the memory by part, operations, bytes moved and time of a step, and the largest
    microbatch that fits, before anything runs. Without --method: all six methods side by side.
    """

    # The model
    model: str = ""
    """Folder or hub name with a config.json, or one of the built-in shapes (trivet plan lists
    them). Leave it out to describe a shape with --layers and so on.
    """

    # The step
    method: tuple[str, ...] = ()
    """One or more of sft, reward-model, dpo, ppo, grpo, pairwise-grpo, shown side by side; default:
    all.
    """
    prompt_tokens: int = 512
    """Tokens per prompt."""
    completion_tokens: int = 256
    """Tokens per completion."""
    prompts_per_step: int = 8
    """Prompts (for preferences and supervised data: rows) per step, over all devices."""
    group_size: int = 0
    """Completions per prompt if the method samples; 0: the method's default."""
    epochs_per_batch: int = 0
    """Passes over each batch of completions (ppo, grpo); 0: the method's default."""
    microbatch_tokens: int = 0
    """Most tokens to pass through the model at once; 0: 2,048 on a CPU, 16,384 elsewhere."""
    eval_limit: int = 0
    """Held-out prompts that an evaluation samples at once (the recipes take up to 256); 0: no
    evaluation.
    """

    # Memory
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products; weights are kept in float32."""
    reference: bool = True
    """grpo keeps a reference model; --no-reference for --beta 0."""
    reward_model: str = ""
    """Use a reward model: 'same' for the policy's shape, or a folder, hub name or built-in shape;
    default: the reward is a program.
    """
    shared_critic: bool = False
    """ppo: the critic is a head on the policy's own trunk."""
    lora: int = 0
    """Train adapters of this rank on all matrices of the trunk, over a frozen base; 0: train all
    weights.
    """
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base below the adapters in 4 or 8 bits per weight."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block and recompute the rest in the backward pass."""
    offload_optimizer: bool = False
    """Keep the optimizer's states in the host's memory."""

    # Devices
    devices: int = 1
    """Devices that share weights and prompts (FSDP2)."""
    servers: int = 0
    """Additional devices of this kind that sample with vLLM, sharing one copy of the weights; 0:
    the training devices sample.
    """
    card: str = "this"
    """Kind of device: 'this' machine, measured now, or a built-in card."""
    memory_gb: float = 0.0
    """Memory of a device in GB (10^9 bytes); 0: the card's."""
    tflops: float = 0.0
    """Peak of its matrix products at this precision, in 10^12 operations per second; 0: the card's.
    """
    bandwidth: float = 0.0
    """Its memory bandwidth in GB/s; 0: the card's."""
    efficiency: float = 0.4
    """Fraction of peak compute, memory and link speed that is reached."""

    # A shape of your own
    layers: int = 0
    """Number of blocks of a shape of your own, instead of --model."""
    hidden: int = 0
    """Width of the hidden states."""
    heads: int = 0
    """Attention heads."""
    kv_heads: int = 0
    """Heads of keys and values; 0: as many as --heads."""
    head_dim: int = 0
    """Width of a head; 0: hidden / heads."""
    feed_forward: int = 0
    """Width of the gated feed-forward (of one expert, in a mixture); 0: 4 x hidden."""
    vocabulary: int = 32000
    """Number of token ids."""
    tied: bool = False
    """The output head is the input embedding."""
    experts: int = 0
    """Experts per block; 0: dense."""
    active_experts: int = 8
    """Experts that each token goes through."""

    # Output
    formulas: bool = False
    """Show each number with its formula and the values put in."""
    json: bool = False
    """Print everything as JSON."""
