"""The workloads both sides run: three models, their tokenizers, and batches of real data in a fixed order.

Nothing here imports Trivet or TRL, so that each side's process pays only for its own imports. GSM8K and HH harmless are not part
of the project: they are read from the folder `shared` beside the checkout.
"""

import gzip
import json
import math
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[2] / "shared"
FILES = {
    "gsm8k": "data/math/gsm8k_train.jsonl.gz",
    "hh": "data/preference/hh_harmless_base_test.jsonl.gz",
}
SHAPES = {  # hidden, layers, heads, key-value heads, feed-forward, vocabulary
    "T": (128, 4, 4, 2, 384, 2048),
    "S": (384, 8, 6, 2, 1024, 32768),
    "M": (576, 30, 9, 3, 1536, 49152),
    "Q": (1024, 28, 16, 8, 3072, 151936),  # Qwen3-0.6B's, for a GPU
}
HEAD_WIDTH = {"Q": 128}  # hidden / heads in the others
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ("sft", "reward-model", "dpo", "grpo", "ppo")
EXAMPLES, COMPLETIONS, BETA = 8, 8, 0.04  # of one step: rows or prompts, completions of each
ROOM = {"T": 128, "S": 128, "M": 128, "Q": 1024}  # the longest completion that is sampled
QUESTIONS = {
    "T": (64, 128),
    "S": (64, 128),
    "M": (64, 128),
    "Q": (448, 512),
}  # tokens of a prompt to sample from
PAD, EOS = 0, 1
MEAN_LENGTH = {"full": None, "len40": 40}  # of completions; None: nothing ends before the limit
FLOPS_PER_SECOND = 3.5e12  # bf16 matrix products of two cores with AMX, the yardstick of the floor


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one of the two data sets, in their order."""
    path = SHARED / FILES[name]
    if not path.exists():
        sys.exit(
            f"The benchmarks read {FILES[name]} from the folder `shared` beside the checkout, and it is not there."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pair_texts(row: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of an HH row as plain text."""
    names = {"user": "Human", "assistant": "Assistant"}
    turns = "".join(
        f"\n\n{names[turn['role']]}: {turn['content'].strip()}" for turn in row["prompt"]
    )
    chosen, rejected = (f" {row[side][0]['content'].strip()}" for side in ("chosen", "rejected"))
    return f"{turns}\n\nAssistant:", chosen, rejected


# Models and tokenizers, made once and kept in a cache folder ----------------------------------------------------------


def model_folder(size: str) -> Path:
    """An ordinary Hugging Face folder with the model of this size (random weights, seed 0) and its tokenizer."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    folder = cache_home / "trivet-benchmarks" / size
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make_tokenizer(SHAPES[size][-1]).save_pretrained(folder)
        _make_model(size).save_pretrained(folder)
        (folder / "done").touch()
    return folder


def _make_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    questions = [text for row in rows("gsm8k") for text in (row["prompt"], row["solution"])]
    dialogues = [text for row in rows("hh") for text in pair_texts(row)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(questions + dialogues, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=1024,
    )


def _make_model(size: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, kv_heads, feed_forward, vocabulary = SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_WIDTH.get(size, hidden // heads),
        max_position_embeddings=1024 if size != "Q" else 4096,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[[PAD, EOS]] = 0  # their logits are then the bias alone
    return model


def set_lengths(model: Any, lengths: str) -> None:
    """Give the tied head a bias that makes completions as long as the workload wants, for whoever samples and trains.

    full: EOS is never sampled. len40: every token is EOS with probability 1/40. Padding is never sampled in either.
    """
    head, mean = model.lm_head, MEAN_LENGTH[lengths]
    biased = nn.Linear(head.in_features, head.out_features, bias=True, device="meta")
    biased.weight, biased.bias = (
        head.weight,
        nn.Parameter(torch.zeros(head.out_features, device=head.weight.device)),
    )
    spread = (
        head.weight.detach().square().sum(1).mean().item()
    )  # variance of a logit: normed states have unit components
    others = head.out_features * math.exp(spread / 2)  # sum of the exponentials of all logits
    with torch.no_grad():
        biased.bias[PAD] = -30.0
        biased.bias[EOS] = -30.0 if mean is None else math.log(others / (mean - 1))
    model.lm_head = biased


# Batches --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One example, as text for trainers that tokenize and as ids for those that don't; the two agree."""

    prompt: str
    prompt_ids: list[int]
    completions: tuple[str, ...] = ()
    completion_ids: tuple[list[int], ...] = ()  # EOS included


def load_rows(method: str, tokenizer: Any, count: int, size: str) -> list[Row]:
    """The first `count` rows that fit the method's limits, in an order shuffled once; step k takes the k-th eight."""
    data = rows("gsm8k" if method in ("grpo", "ppo") else "hh")
    random.Random(0).shuffle(data)
    kept: list[Row] = []
    if size == "Q" and method in ("grpo", "ppo"):  # several questions in one prompt
        data = [
            {"prompt": "\n\n".join(row["prompt"] for row in data[i : i + 5])}
            for i in range(0, len(data), 5)
        ]
    for row in data:
        made = (
            _question(row, tokenizer, *QUESTIONS[size])
            if method in ("grpo", "ppo")
            else _pair(row, tokenizer, method)
        )
        if made is not None:
            kept.append(made)
        if len(kept) == count:
            return kept
    sys.exit(
        f"Only {len(kept)} rows fit the limits of {method}, and {count} are needed: take fewer steps."
    )


def _question(row: dict[str, Any], tokenizer: Any, shortest: int, longest: int) -> Row | None:
    ids = tokenizer(row["prompt"])["input_ids"]
    return Row(row["prompt"], ids) if shortest <= len(ids) <= longest else None


def _pair(row: dict[str, Any], tokenizer: Any, method: str) -> Row | None:
    prompt, *sides = pair_texts(row)
    sides = sides[:1] if method == "sft" else sides
    prompt_ids = tokenizer(prompt)["input_ids"]
    whole = [[*tokenizer(prompt + side)["input_ids"], EOS] for side in sides]
    fits = all(len(ids) <= 512 and ids[: len(prompt_ids)] == prompt_ids for ids in whole)
    if not fits or (method != "sft" and len(prompt_ids) > 384):
        return None
    return Row(prompt, prompt_ids, tuple(sides), tuple(ids[len(prompt_ids) :] for ids in whole))


# The reward -----------------------------------------------------------------------------------------------------------


@cache
def letter_table(tokenizer: Any, vocabulary: int) -> Tensor:
    """(V,) on the device, 1/128 for every token that holds the letter e. The reward of a text is the sum over its tokens."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    table = torch.tensor([float("e" in piece and piece != "<eos>") / 128 for piece in pieces])
    return nn.functional.pad(table, (0, vocabulary - len(table))).to(DEVICE)


def wait() -> None:
    """Until the device is done, so that a clock tells the time of its work."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# Counting -------------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Tokens of one step. Padding is never counted."""

    prompts: int = 0  # each prompt once
    completions: int = 0  # all of them, EOS included
    sequences: int = 0  # what plain rows hold: the prompt once for each of its completions

    @property
    def unique(self) -> int:
        """What has to go through the trunk."""
        return self.prompts + self.completions


def count(examples: list[Row], lengths: list[int] | None = None) -> Tokens:
    """The tokens of a step; lengths: those of the sampled completions, row by row, where the method samples."""
    sizes = (
        [len(ids) for row in examples for ids in row.completion_ids] if lengths is None else lengths
    )
    copies = len(sizes) // len(examples)
    prompts = sum(len(row.prompt_ids) for row in examples)
    return Tokens(prompts, sum(sizes), copies * prompts + sum(sizes))


def floor_seconds(method: str, size: str, tokens: Tokens) -> float:
    """Time of the step's matrix products at 3.5 TFLOP/s, each unique token once: the weights' alone, no attention, no optimizer.

    Passes in units of one forward: training 3, sampling 1, reference 1, the critic's old values 1 and training 3.
    """
    hidden, layers, heads, kv_heads, feed_forward, vocabulary = SHAPES[size]
    width = HEAD_WIDTH.get(size, hidden // heads)
    layer = hidden * width * (2 * heads + 2 * kv_heads) + 3 * hidden * feed_forward
    trunk, head = {
        "sft": (3, 3),
        "reward-model": (3, 0),
        "dpo": (4, 4),
        "grpo": (5, 5),
        "ppo": (9, 5),
    }[method]
    flops = 2 * (
        trunk * layers * layer * tokens.unique + head * hidden * vocabulary * tokens.completions
    )
    return flops / FLOPS_PER_SECOND
