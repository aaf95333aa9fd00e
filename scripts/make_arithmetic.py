"""Make the arithmetic toy: every sum of two digits that is itself a digit, a tokenizer of 13 tokens, a config to start from.

    python scripts/make_arithmetic.py

There are no weights: runs start from scratch (--from-scratch), and learn in seconds. All 55 sums are in the training file and
there is nothing else to generalize to: the task is to find the table by trial and error.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent.parent / "src" / "trivet" / "toy" / "arithmetic"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(["<eos>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False
    ).save_pretrained(FOLDER)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(FOLDER)
    GenerationConfig(eos_token_id=0).save_pretrained(FOLDER)
    with (FOLDER / "problems.jsonl").open("w") as file:
        for a in range(10):
            for b in range(10 - a):
                wrong = str((a + b + 1 + (3 * a + b) % 9) % 10)
                row = {"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": str(a + b)}
                file.write(json.dumps(row | {"chosen": str(a + b), "rejected": wrong}) + "\n")


if __name__ == "__main__":
    main()
