"""The options of every recipe, in groups, each followed by its --help text; a recipe's Config adds
its own.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options that all recipes share."""

    # Model, data and output
    model: str = ""
    """Hugging Face name or folder of the model to start from."""
    data: str = ""
    """File (.jsonl, .json, .csv, .parquet, also .gz, .zst) or hub name of the training rows."""
    out: str = ""
    """Run directory to create; default runs/METHOD-DATE-TIME."""
    eval_data: str = ""
    """Held-out rows, in the same formats; by default a share of the prompts of --data is held
    out.
    """
    eval_fraction: float = 0.05
    """Share of the prompts of --data to hold out (all rows of a prompt go together)."""
    eval_limit: int = 256
    """Evaluate at most this many held-out examples."""
    max_prompt_tokens: int = 512
    """Longer prompts are skipped and counted."""
    truncate_prompts: bool = False
    """Keep a row with a longer prompt, and the last --max-prompt-tokens tokens of the prompt."""
    max_completion_tokens: int = 256
    """Sampling stops here; longer completions in the data are cut and counted."""
    chat_template: str = ""
    """Replaces the tokenizer's chat template: 'plain' (Role: text) or a Jinja file."""
    from_scratch: bool = False
    """Start from random weights in the shape of the model's config.json."""
    # Steps
    steps: int = 0
    """Steps to take, each over --prompts-per-step prompts; 0 follows --epochs."""
    epochs: float = 1.0
    """Passes over the data, if --steps is 0."""
    prompts_per_step: int = 8
    """Prompts (rows, for preferences and supervised data) per step."""
    lr: float = 1e-5
    """Learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to --lr."""
    lr_decay: bool = False
    """Decay the learning rate linearly, to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Scale a gradient with a larger norm down to this norm."""
    max_skipped_steps: int = 3
    """End the run after this many steps in a row whose gradient was not finite; such a step changes
    nothing. 0: never.
    """
    eval_every: int = 0
    """Evaluate every this many steps; 0 evaluates only after the last step."""
    seed: int = 0
    """Seed of the data order, the split and the sampling."""
    # Memory and devices
    microbatch_tokens: int = 0
    """Maximum number of tokens in one pass through the model; 0 means 2,048 on a CPU, 16,384
    elsewhere. Results do not depend on it.
    """
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; weights are kept in float32."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass, and recompute the rest: less memory,
    a third more time.
    """
    offload_optimizer: bool = False
    """Keep weights, gradients and AdamW's moments in CPU memory while they are not in use (under
    torchrun).
    """
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto uses a GPU if there is one."""
    # Adapters
    lora: int = 0
    """Train a LoRA adapter of this rank instead of all weights, and save it as a peft folder; 0:
    all weights.
    """
    lora_alpha: int = 0
    """The adapter's product is multiplied by alpha / rank; 0 means twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get the adapter, such as q_proj; default: all but the
    head.
    """
    merge: bool = False
    """Save the adapter merged into its base, as an ordinary model folder."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """Hold the frozen base under an adapter in 4 or 8 bits per weight (pip install
    "trivet[quantize]").
    """
    # Record and checkpoints
    save_every: int = 0
    """Steps between checkpoints, from which trivet resume continues; 0: save every ten minutes and
    keep the last two.
    """
    keep: int = 0
    """Keep only this many of the newest checkpoints of --save-every; 0: all."""
    keep_tokens_every: int = 10
    """Keep the per-token numbers of a few completions every this many steps, and of the first and
    last step, for trivet report; 0: never.
    """
    track: tuple[str, ...] = ()
    """Also send metrics to tensorboard, wandb, trackio or mlflow (pip install "trivet[NAME]");
    metrics.jsonl is always written.
    """
    quiet: bool = False
    """Print only errors, and the run directory at the end."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """The further options of recipes that sample: rewards and generation."""

    # Rewards and sampling
    reward: tuple[str, ...] = ()
    """Built-in name, file.py:function, module:function, reward model (run, folder, hub name), judge
    (URL), or .toml; several are summed.
    """
    reward_weights: tuple[float, ...] = ()
    """One weight per reward; a reward with weight 0 is only logged."""
    temperature: float = 1.0
    """Sampling temperature; in training the logits are divided by it too."""
    generate_with: tuple[str, ...] = ()
    """URLs of vLLM servers that generate instead of this process (docs/servers.md)."""
    vllm: bool = False
    """Generate with a vLLM server that is started on this machine and stopped with the run; `make
    vllm` installs it.
    """
    max_staleness: int = 0
    """Servers generate ahead of training, with weights that are up to this many steps old; 0 waits
    for each batch.
    """
    importance_cap: float = 2.0
    """Weight tokens sampled by a server by pi_old / pi_sampler, capped at this value (ppo, grpo); 0
    turns the weights off.
    """
