"""TRL's side: each trainer's own train(), configured as well as we found. PPO needs TRL 1.12.0, the last release that has it."""

import copy
import os
import tempfile
import time
import warnings
from typing import Any

import torch
import workloads
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.simplefilter("ignore")
MICROBATCH = {
    "sft": 1,
    "reward-model": 1,
    "dpo": 1,
    "grpo": 8,
    "ppo": 8,
}  # sequences or pairs; the fastest of those tried


class StepClock(TrainerCallback):
    """The time between the ends of two optimizer steps: everything that the loop does is in it."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, list[float]()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One optimizer step is done."""
        workloads.wait()
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now


def steps(
    method: str,
    size: str,
    lengths: str,
    count: int,
    precision: str,
    microbatch: int,
    precompute: bool,
) -> tuple[list[dict[str, Any]], list[workloads.Row]]:
    """Take `count` steps; returns what each took, with all rows. precompute: DPO's reference before training."""
    folder = workloads.model_folder(size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = workloads.load_rows(method, tokenizer, count * workloads.EXAMPLES, size)
    clock, sampled = StepClock(), list[list[int]]()
    make = {"sft": sft, "reward-model": reward_model, "dpo": dpo, "grpo": grpo, "ppo": ppo}[method]
    arguments = common(precision, microbatch or MICROBATCH[method], count, method)
    if method == "dpo" and precompute:
        arguments["precompute_ref_log_probs"] = True
    began = time.perf_counter()
    trainer = make(folder, tokenizer, data, arguments, lengths, sampled)
    making = time.perf_counter() - began
    trainer.add_callback(clock)
    trainer.train()
    result = [
        {"seconds": seconds, "lengths": sampled[k] if sampled else None, "parts": {}}
        for k, seconds in enumerate(clock.seconds)
    ]
    if precompute:
        result[0]["parts"]["reference table"] = making
    return result, data


def common(precision: str, microbatch: int, count: int, method: str) -> dict[str, Any]:
    """Options of every trainer: nothing is logged, saved or recomputed, and rows come in their order."""
    of_a_step = workloads.EXAMPLES * (workloads.COMPLETIONS if method in ("grpo", "ppo") else 1)
    options = {
        "output_dir": tempfile.gettempdir() + "/trivet-benchmarks/trl",
        "use_cpu": workloads.DEVICE == "cpu",
        "bf16": precision == "bfloat16",
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": of_a_step // microbatch,
        "max_steps": count,
        "gradient_checkpointing": False,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return (
        options
        if method in ("grpo", "ppo")
        else options | {"train_sampling_strategy": "sequential"}
    )


def policy_from(folder: Any) -> Any:
    """float32 weights, sdpa attention. (Llama has no dropout unless asked.)"""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def sft(folder: Any, tokenizer: Any, data: Any, arguments: Any, lengths: str, sampled: Any) -> Any:
    """Completion tokens are learned, prompts are not."""
    from trl import SFTConfig, SFTTrainer

    rows = []
    for row in data:
        (completion,) = row.completion_ids
        labels = [-100] * len(row.prompt_ids) + completion
        rows.append({"input_ids": row.prompt_ids + completion, "labels": labels})
    return SFTTrainer(
        model=policy_from(folder),
        args=SFTConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def reward_model(
    folder: Any, tokenizer: Any, data: Any, arguments: Any, lengths: str, sampled: Any
) -> Any:
    """Bradley-Terry on a new scalar head."""
    from trl import RewardConfig, RewardTrainer

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
    )
    nn.init.zeros_(model.score.weight)
    rows = [
        {
            f"{side}_ids": row.prompt_ids + ids
            for side, ids in zip(("chosen", "rejected"), row.completion_ids, strict=True)
        }
        for row in data
    ]
    return RewardTrainer(
        model=model,
        args=RewardConfig(**arguments, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def dpo(folder: Any, tokenizer: Any, data: Any, arguments: Any, lengths: str, sampled: Any) -> Any:
    """Given text: it tokenizes itself, to the same ids."""
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": row.prompt, "chosen": row.completions[0], "rejected": row.completions[1]}
        for row in data
    ]
    trainer = DPOTrainer(
        model=policy_from(folder),
        ref_model=None if arguments.get("precompute_ref_log_probs") else policy_from(folder),
        args=DPOConfig(**arguments, max_length=None, beta=0.1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert all(
        (seen["prompt_ids"], seen["chosen_ids"], seen["rejected_ids"])
        == (row.prompt_ids, *row.completion_ids)
        for seen, row in zip(trainer.train_dataset, data, strict=True)
    ), "both sides train on the same ids"
    return trainer


def grpo(folder: Any, tokenizer: Any, data: Any, arguments: Any, lengths: str, sampled: Any) -> Any:
    """One generation of 64 completions and one optimizer step on them, KL to the reference in the loss."""
    from trl import GRPOConfig, GRPOTrainer

    policy = policy_from(folder)
    workloads.set_lengths(policy, lengths)
    table = workloads.letter_table(tokenizer, policy.config.vocab_size)

    def letters(completion_ids: list[list[int]], **_: Any) -> list[float]:
        sampled.append([len(ids) for ids in completion_ids])
        return [float(table[ids].sum()) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=letters,
        args=GRPOConfig(
            **arguments,
            beta=workloads.BETA,
            num_generations=workloads.COMPLETIONS,
            max_completion_length=workloads.ROOM[folder.name],
            temperature=1.0,
            scale_rewards="none",
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in data]),
        processing_class=tokenizer,
    )
    workloads.set_lengths(trainer.ref_model, lengths)  # it loaded its reference from the folder
    return trainer


def ppo(folder: Any, tokenizer: Any, data: Any, arguments: Any, lengths: str, sampled: Any) -> Any:
    """TRL 1.12.0. One epoch and one minibatch on 64 completions. It has no autocast outside its update, so it is given one."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = (
        "bf16" if arguments["bf16"] else "no"
    )  # its Accelerator looks only there
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy = policy_from(folder)
    workloads.set_lengths(policy, lengths)
    critic = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
    )
    nn.init.zeros_(critic.score.weight)
    reference = copy.deepcopy(policy)
    if arguments["bf16"]:
        for part in (policy, reference, critic.model):
            part.forward = torch.autocast(workloads.DEVICE, torch.bfloat16)(part.forward)
    rows = [{"input_ids": row.prompt_ids} for row in data for _ in range(workloads.COMPLETIONS)]
    steps = arguments.pop("max_steps")
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    args = PPOConfig(
        **arguments,
        num_ppo_epochs=1,
        num_mini_batches=1,
        total_episodes=steps * batch,
        response_length=workloads.ROOM[folder.name],
        local_rollout_forward_batch_size=batch,
        stop_token="eos",
        temperature=1.0,
        kl_coef=workloads.BETA,
        num_sample_generations=0,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=LetterModel(
            workloads.letter_table(tokenizer, policy.config.vocab_size), sampled
        ),
        train_dataset=Dataset.from_list(rows),
        value_model=critic,
    )
    in_order = torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=batch, collate_fn=trainer.data_collator
    )
    trainer.dataloader = in_order
    return trainer


class LetterModel(nn.Module):
    """The reward as a model, as PPOTrainer wants it: at each token, the sum of the table over the text so far."""

    base_model_prefix = "model"

    def __init__(self, table: Tensor, sampled: list[list[int]]):
        super().__init__()
        self.table, self.sampled = table, sampled
        self.model, self.score = self._hidden, nn.Identity()

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        self.sampled.append(attention_mask.sum(1).tolist())
        sums = (self.table[input_ids] * attention_mask).cumsum(1)
        return type("Output", (), {"hidden_states": [sums[..., None]]})
