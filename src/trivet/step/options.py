"""The options that every recipe has, one a line, the text under it its --help, in groups; each recipe's Config adds its own few."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train, on what, for how long, where to."""

    # Model, data and where to
    model: str = ""
    """Hugging Face name or folder of the model to start from."""
    data: str = ""
    """File (.jsonl, .json, .csv, .parquet, also .gz, .zst) or hub name of the training rows."""
    out: str = ""
    """Run directory to make; default runs/METHOD-DATE-TIME."""
    eval_data: str = ""
    """Held-out rows, in the same formats; without it a share of the prompts of --data is held out."""
    eval_fraction: float = 0.05
    """Share of the prompts of --data to hold out (all rows of a prompt together)."""
    eval_limit: int = 256
    """Evaluate at most this many held-out examples."""
    max_prompt_tokens: int = 512
    """Longer prompts are left out, and counted."""
    truncate_prompts: bool = False
    """Keep the last --max-prompt-tokens tokens of a longer prompt, and its row."""
    max_completion_tokens: int = 256
    """Sampling stops here; longer completions in the data are cut, and counted."""
    chat_template: str = ""
    """Replace the tokenizer's chat template: 'plain' (Role: text) or a Jinja file."""
    from_scratch: bool = False
    """Start from random weights in the shape of the model's config.json."""
    # Steps
    steps: int = 0
    """Steps to take, each over --prompts-per-step prompts; 0 follows --epochs."""
    epochs: float = 1.0
    """Passes over the data, where --steps is 0."""
    prompts_per_step: int = 8
    """Prompts (rows, for preferences and supervised data) of one step."""
    lr: float = 1e-5
    """Learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to --lr."""
    lr_decay: bool = False
    """Let the learning rate fall linearly to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Scale a larger gradient down to this norm."""
    max_skipped_steps: int = 3
    """End the run after so many steps in a row whose gradient was not finite; such a step changes nothing. 0: never."""
    eval_every: int = 0
    """Evaluate every so many steps; 0 evaluates after the last step only."""
    seed: int = 0
    """Seed of the data order, the split and the sampling."""
    # Memory and devices
    microbatch_tokens: int = 0
    """Most tokens to go through the model at once; 0 takes 2,048 on a CPU, 16,384 elsewhere. The result does not depend on it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights are kept in float32."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass, and compute the rest again: less memory, a third more time."""
    offload_optimizer: bool = False
    """Keep weights, gradients and AdamW's moments in CPU memory between their uses (under torchrun)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    # Adapters
    lora: int = 0
    """Train a LoRA adapter of this rank in place of all weights, and save it as a peft folder; 0: all weights."""
    lora_alpha: int = 0
    """The adapter's product is multiplied by alpha / rank; 0 takes twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get the adapter, q_proj for one; default: all but the head."""
    merge: bool = False
    """Save the adapter merged into its base, as an ordinary model folder."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base below an adapter in 4 or 8 bits a weight (pip install "trivet[quantize]")."""
    # Record and checkpoints
    save_every: int = 0
    """Steps between checkpoints, which trivet resume goes on from; 0: one every ten minutes, of which the last two are kept."""
    keep: int = 0
    """Keep only so many of the newest checkpoints of --save-every; 0: all."""
    keep_tokens_every: int = 10
    """Keep every token's numbers of a few completions every so many steps, the first and the last, for trivet report; 0: never."""
    track: tuple[str, ...] = ()
    """Also send metrics to tensorboard, wandb, trackio or mlflow (pip install "trivet[NAME]"); metrics.jsonl is always written."""
    quiet: bool = False
    """Print nothing but the run directory at the end, and errors."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """What recipes that sample have too: what rewards, and who generates."""

    # Rewards and sampling
    reward: tuple[str, ...] = ()
    """Built-in name, file.py:function, module:function, reward model (run, folder, hub name), judge (URL), or .toml; several add up."""
    reward_weights: tuple[float, ...] = ()
    """One weight per reward; a weight of 0 only logs it."""
    temperature: float = 1.0
    """Sampling temperature; the log-probabilities that train are divided by it too."""
    generate_with: tuple[str, ...] = ()
    """URLs of vLLM servers that generate, in place of this process (docs/servers.md)."""
    vllm: bool = False
    """Start a vLLM server on this machine to generate with, and end it with the run; `make vllm` installs it."""
    max_staleness: int = 0
    """Servers generate ahead of training, with weights of up to so many steps before; 0 waits for each batch."""
    importance_cap: float = 2.0
    """Weigh tokens that a server sampled by pi_old / pi_sampler, capped here (ppo, grpo); 0 turns the weights off."""
