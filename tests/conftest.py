"""Shared pieces of the tests: one thread a worker, tiny models of several kinds, groups with ragged lengths.

Two tiers: `pytest` runs what is not marked slow, `pytest -m slow` the rest (pyproject.toml). A test that computes for longer than
--limit seconds, what it starts and waits for included, fails unless it is marked slow, so that the first tier stays quick.
"""

import gzip
import os
import random
import signal
import tempfile
import time
from functools import cache
from itertools import islice
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: workers and their children share the cores

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from trivet.batch import Groups, collate
from trivet.toy import STORIES

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # also where all this was begun in the background, deaf to it

SHARED = Path(__file__).parent.parent.parent / "shared"
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--limit",
        type=float,
        default=0.0,
        help="seconds of computing that an unmarked test may take; 0: any",
    )


def computed() -> float:
    """Seconds that this process and its children have computed; how busy the machine is besides does not count."""
    return sum(os.times()[:4])


def pace() -> float:
    """How much longer a piece of work takes now than on a quiet machine of the kind that CI has, at least 1: neighbors slow it."""
    began = time.process_time()
    sum(i * i for i in range(1_000_000))
    return max(1.0, (time.process_time() - began) / 0.08)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes what a test computes."""
    began = computed()
    try:
        return (yield)
    finally:
        item.computed = computed() - began


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fails a test that took too long for its tier."""
    report, limit = (yield), item.config.getoption("--limit")
    took = getattr(item, "computed", 0.0)
    checked = (
        call.when == "call" and report.passed and limit and not item.get_closest_marker("slow")
    )
    if checked and took > limit and took > limit * pace():
        report.outcome = "failed"
        report.longrepr = f"computed for {took:.1f} s, over {limit:g} s: make it quicker, or mark it with pytest.mark.slow"
    return report


@pytest.fixture(autouse=True)
def no_earlier_runs(tmp_path, monkeypatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the checkout."""
    if not SHARED.exists():
        pytest.skip("needs the folder ../shared beside the checkout")
    return SHARED


@cache
def few_rows() -> str:
    """A file of the first rows of the stories: loading all of them would take longer than the runs."""
    path = Path(tempfile.mkdtemp()) / "few.jsonl"
    with gzip.open(STORIES["data"], "rt", encoding="utf-8") as file:
        path.write_text("".join(islice(file, 80)))
    return str(path)


def tiny(kind: type = Qwen3Config, **options) -> torch.nn.Module:
    """A random model whose weights are large enough to make every part matter."""
    torch.manual_seed(0)
    sizes = (
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "vocab_size": 61,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        if kind is GPT2Config
        else SMALL
    )
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=[Qwen3Config, LlamaConfig, GPT2Config], ids=lambda kind: kind.model_type)
def model(request) -> torch.nn.Module:
    """One of three kinds of model that can share a prefix."""
    return tiny(request.param)


def ragged(prompts: int = 3, group_size: int = 4, longest: int = 11, seed: int = 0) -> Groups:
    """Groups of random tokens and lengths."""
    draw = random.Random(seed)
    return collate(
        [[draw.randrange(61) for _ in range(draw.randint(1, longest))] for _ in range(prompts)],
        [
            [draw.randrange(61) for _ in range(draw.randint(1, longest))]
            for _ in range(prompts * group_size)
        ],
    )
