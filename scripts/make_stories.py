"""Make the files of the story task: tokenizer, small language model and preference pairs.

`python scripts/make_stories.py` (with trivet installed from this checkout) rewrites src/trivet/toy/stories/ from
nothing but the grammar in trivet.toy.stories. It takes a few minutes on two CPU cores and downloads nothing.
The same seed gives the same files on the same machine and library versions.
"""

import argparse
import gzip
import json
import math
import random
import string
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trivet.toy import stories

FOLDER = Path(__file__).resolve().parents[1] / "src/trivet/toy/stories"
PAIRS = 6000  # openings with two samples each
MAX_NEW_TOKENS = 64

README = """# Story task: model, tokenizer and preference pairs

Everything here was made by `python scripts/make_stories.py` from the grammar in `trivet.toy.stories`; no text or
weights come from elsewhere. License: Apache-2.0, like the project.

- `model.safetensors`, `config.json`: a Llama-style model of {parameters:,} parameters (bfloat16), trained from scratch
  on {corpus:,} generated stories, held-out loss {loss:.3f} nats per token. It continues an opening with a short story.
- `tokenizer.json`: byte-level BPE, {vocab} tokens, `<pad>` = 0, `<eos>` = 1. It knows printable ASCII only and drops
  other characters.
- `preferences.jsonl.gz`: {pairs:,} pairs of the model's own samples (temperature 1, at most {tokens} tokens), with
  `prompt`, `chosen`, `rejected` and the gold rewards of both. The first sample is preferred with probability
  sigmoid(its gold reward - the other's), so labels are noisy: knowing the gold reward predicts {ceiling:.1%} of them.

Gold reward of the samples: mean {mean:.2f}, standard deviation {std:.2f}; chosen {chosen:.2f}, rejected {rejected:.2f}.
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = [
        *string.ascii_letters,
        *string.digits,
        *string.punctuation,
        "Ġ",
        "Ċ",
    ]  # space and newline
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def new_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batch_loss(model: LlamaForCausalLM, rows: list[list[int]]) -> torch.Tensor:
    """Mean next-token loss of right-padded rows; causal attention never sees the padding."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    logits = model(ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0
    )


def train(
    model: LlamaForCausalLM, rows: list[list[int]], epochs: int, rng: random.Random, batch: int = 64
) -> float:
    """Train on all rows but the last 512 and return the loss on those."""
    rows, held_out = rows[:-512], rows[-512:]
    steps = epochs * (len(rows) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        ),
    )
    for step in range(steps):
        start = step * batch % (len(rows) // batch * batch)
        if start == 0:
            rng.shuffle(rows)
        loss = batch_loss(model, rows[start : start + batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        return batch_loss(model, held_out).item()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """One completion per prompt at temperature 1; unfinished ones are cut at the limit."""
    completions = []
    for start in range(0, len(prompts), 400):
        inputs = tokenizer(prompts[start : start + 400], return_tensors="pt", padding=True)
        ids = inputs["input_ids"]
        out = model.generate(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
        completions += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories", type=int, default=80_000, help="size of the training corpus")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    began = time.time()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)

    openings = [stories.opening(rng) for _ in range(args.stories)]
    texts = [opening + stories.story(rng, opening) for opening in openings]
    train_tokenizer(texts).save_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = new_model(len(tokenizer))
    loss = train(model, [[*ids, 1] for ids in tokenizer(texts)["input_ids"]], args.epochs, rng)
    model.to(torch.bfloat16).save_pretrained(args.folder)
    print(f"held-out loss {loss:.3f} after {time.time() - began:.0f} s", flush=True)

    model = AutoModelForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32
    ).eval()  # sample from what is saved
    prompts = list(dict.fromkeys(stories.opening(rng) for _ in range(2 * PAIRS)))[:PAIRS]
    firsts, seconds = sample(model, tokenizer, prompts), sample(model, tokenizer, prompts)
    rows, ceiling = [], 0.0
    for prompt, *texts in zip(prompts, firsts, seconds, strict=True):
        if texts[0] == texts[1]:
            continue
        golds = stories.gold([prompt] * 2, texts)
        best = 0 if rng.random() < 1 / (1 + math.exp(golds[1] - golds[0])) else 1
        ceiling += 1 / (1 + math.exp(-abs(golds[0] - golds[1])))
        row = {"prompt": prompt, "chosen": texts[best], "rejected": texts[1 - best]}
        rows.append(row | {"gold_chosen": golds[best], "gold_rejected": golds[1 - best]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (args.folder / "preferences.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    chosen, rejected = (
        torch.tensor([row[key] for row in rows]) for key in ("gold_chosen", "gold_rejected")
    )
    golds = torch.cat([chosen, rejected])
    numbers = {
        "parameters": model.num_parameters(),
        "corpus": args.stories,
        "loss": loss,
        "vocab": len(tokenizer),
        "pairs": len(rows),
        "tokens": MAX_NEW_TOKENS,
        "ceiling": ceiling / len(rows),
        "mean": golds.mean().item(),
        "std": golds.std().item(),
        "chosen": chosen.mean().item(),
        "rejected": rejected.mean().item(),
    }
    (args.folder / "README.md").write_text(README.format(**numbers))
    print(numbers, f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
