"""A sentiment reward as file.py:function: the log-odds of a bag-of-words classifier, fitted on
labeled sentences when it is loaded.

    SENTIMENT_DATA=sst2_train.jsonl.gz trivet grpo --model MODEL --data openings.jsonl \\
        --reward examples/sentiment.py:sentiment

The data file has rows {"text": str, "label": 1 or 0}. Words are unigrams and bigrams, hashed;
logistic regression with a small ridge. Fitting 60,000 phrases takes some seconds.
"""

import gzip
import itertools
import json
import os
import re
import zlib

import torch

BUCKETS = 1 << 16


def features(text: str) -> torch.Tensor:
    """Indices of the text's distinct words and pairs of words."""
    words = re.findall(r"[a-z']+", text.lower())
    terms = {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}
    return torch.tensor(
        sorted({zlib.crc32(term.encode()) % BUCKETS for term in terms}), dtype=torch.int64
    )


def bag(texts: list[str], weight: torch.Tensor) -> torch.Tensor:
    """Sum of the weights of each text's features. (N,)"""
    indices = [features(text) for text in texts]
    offsets = torch.tensor([0, *(len(index) for index in indices)]).cumsum(0)[:-1]
    return torch.nn.functional.embedding_bag(
        torch.cat(indices), weight[:, None], offsets, mode="sum"
    )[:, 0]


def fit(path: str, epochs: int = 4, batch: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (BUCKETS,) and bias by Adam on the logistic loss."""
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        rows = [json.loads(line) for line in lines]
    weight, bias = torch.zeros(BUCKETS, requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.02, weight_decay=1e-6)
    order = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for part in torch.randperm(len(rows), generator=order).split(batch):
            labels = torch.tensor([float(rows[i]["label"]) for i in part])
            logits = bag([rows[i]["text"] for i in part], weight) + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weight.detach(), bias.detach()


WEIGHT, BIAS = fit(os.environ["SENTIMENT_DATA"])


def sentiment(completions: list[str], **columns: object) -> list[float]:
    """Log-odds that each completion is positive, divided by the square root of its number of words,
    so that length alone does not pay.
    """
    sizes = torch.tensor([max(1.0, float(len(text.split()))) for text in completions])
    return ((bag(completions, WEIGHT) + BIAS) / sizes.sqrt()).tolist()
