"""Real vLLM on this machine's CPU, where it is installed (make vllm, or TRIVET_VLLM_PYTHON): weights in, rollouts out, kill -9.

Minutes each, so they run only when asked for: TRIVET_TEST_VLLM=1 pytest tests/test_vllm.py
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from trivet.errors import InputError
from trivet.generation.local import LocalServer, python_with_vllm
from trivet.generation.server import Servers
from trivet.model.adapters import inject
from trivet.recipes import grpo
from trivet.runner import prepare
from trivet.runner.launch import launch
from wide import widened

try:
    python_with_vllm()
    REASON = "" if os.environ.get("TRIVET_TEST_VLLM") else "takes minutes: set TRIVET_TEST_VLLM=1"
except InputError as error:
    REASON = str(error)
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(REASON), reason=REASON)]
FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64", "--max-model-len", "256", "--enable-scale-out",
         "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]  # fmt: skip
ADAPTERS = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
PROMPTS = [
    "Once upon a time",
    "Lily and Ben",
    "The little dog",
    "One day",
    "There was a big red ball",
    "Tom had a cat",
]
RUN = {"max_prompt_tokens": 64, "max_completion_tokens": 32, "prompts_per_step": 6, "group_size": 4, "lr": 1e-3,
       "reward": (f"{__file__}:vowels",), "eval_fraction": 0.0, "temperature": 0.9, "keep_tokens_every": 1}  # fmt: skip


def vowels(prompts, completions, **_) -> list[float]:
    """The share of letters that are an e."""
    return [completion.count("e") / max(1, len(completion)) for completion in completions]


@pytest.fixture
def stories(shared, tmp_path) -> Path:
    """stories260K with heads that vLLM's CPU attention takes, and prompts."""
    source = shared / "models" / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    widened(model).save_pretrained(tmp_path / "stories")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "stories")
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    )
    return tmp_path / "stories"


@pytest.fixture
def six(stories, tmp_path) -> Path:
    """A random model of 6 million parameters."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=7, head_dim=32,
                         num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=1,
                         eos_token_id=2, tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float()
    assert 5e6 < model.num_parameters() < 7e6
    model.save_pretrained(tmp_path / "six")
    AutoTokenizer.from_pretrained(stories).save_pretrained(tmp_path / "six")
    return tmp_path / "six"


@pytest.fixture
def with_adapter(monkeypatch):
    """Policies get a LoRA adapter as they are loaded."""
    load = prepare.load_policy

    def loaded(*args, **kwargs):
        policy = load(*args, **kwargs)
        return inject(
            policy,
            LoraConfig(
                r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"]
            ),
        )

    monkeypatch.setattr(prepare, "load_policy", loaded)


@pytest.fixture
def server(tmp_path):
    """Starts servers; ends them."""
    made: list[LocalServer] = []

    def start(model: Path, flags: list[str]) -> LocalServer:
        made.append(LocalServer(python_with_vllm(), tmp_path / f"vllm-{len(made)}.log", flags))
        made[-1].start(str(model))
        return made[-1]

    yield start
    for local in made:
        local.stop()


def lines(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for x in found:
        print(
            {
                key: x[key]
                for key in x
                if key.startswith(("sampling", "servers", "reward", "seconds", "eval/reward"))
            }
        )
    return found


@pytest.mark.shared
def test_full_weights_of_stories260k_are_whole_after_each_reload(stories, tmp_path):
    out = launch(
        grpo.Config(
            **RUN,
            model=str(stories),
            data=str(tmp_path / "data.jsonl"),
            out=str(tmp_path / "run"),
            vllm=True,
            steps=4,
        )
    )
    for x in lines(out):
        assert x["sampling/logprob_difference/max"] < 1e-4
        assert x["servers/probe_difference"] < 1e-4


@pytest.mark.shared
@pytest.mark.parametrize("untie", [True, False], ids=["head written out", "tied"])
def test_a_tied_head_is_reloaded_if_it_is_written_out_and_refused_if_not(
    stories, tmp_path, server, monkeypatch, untie
):
    """Of a server of somebody else's. Should "tied" fail with a later vLLM, its reload is whole there, and `untie` can go."""
    monkeypatch.setattr(
        "trivet.runner.servers.Servers", lambda **options: Servers(**options | {"untie": untie})
    )
    url = f"http://127.0.0.1:{server(stories, FLAGS).port}"
    data, out = str(tmp_path / "data.jsonl"), tmp_path / "run"
    config = grpo.Config(
        **RUN, model=str(stories), data=data, out=str(out), generate_with=(url,), steps=3
    )
    if untie:
        assert all(x["servers/probe_difference"] < 1e-4 for x in lines(launch(config)))
    else:
        with pytest.raises(
            InputError, match=r"its log-probabilities are not the learner's.*stopped after step 1"
        ):
            launch(config)


@pytest.mark.shared
def test_adapters_on_two_servers_one_of_which_is_killed_and_comes_back(
    six, tmp_path, server, with_adapter
):
    first, second = (server(six, FLAGS + ADAPTERS) for _ in range(2))
    out, killed = tmp_path / "run", list[float]()

    def kill() -> None:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(first.process.pid, signal.SIGKILL)
        killed.append(time.monotonic())
        first.start(str(six))  # back in a minute, with the base's weights and no adapter

    threading.Thread(target=kill, daemon=True).start()
    urls = tuple(f"http://127.0.0.1:{x.port}" for x in (first, second))
    launch(
        grpo.Config(
            **RUN,
            model=str(six),
            data=str(tmp_path / "data.jsonl"),
            out=str(out),
            generate_with=urls,
            steps=80,
        )
    )
    metrics = lines(out)
    assert killed
    assert [x["step"] for x in metrics] == list(range(1, 81))
    assert all(x["sampling/logprob_difference/max"] < 1e-4 for x in metrics)
    assert min(x["servers/usable"] for x in metrics) == 1
    assert (
        metrics[-1]["servers/usable"] == 2
    )  # it is back, and was brought to the adapter of the day
