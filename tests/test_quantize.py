"""A base in 4 or 8 bits below an adapter: it trains, the reference agrees with it, and what was saved goes on."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from conftest import few_rows, ragged
from runs import stepwise
from test_resume import RECIPES, KilledError, config, killed_after, numbers
from trivet.errors import InputError
from trivet.model.copies import frozen_copy
from trivet.model.forward import token_logprobs
from trivet.model.load import load_policy
from trivet.recipes import dpo, ppo, sft
from trivet.recipes.offline import to_groups
from trivet.runner.launch import launch
from trivet.runner.prepare import Launch
from trivet.runner.resume import resume
from trivet.toy import STORIES

LIBRARIES = {"4bit": "bitsandbytes", "8bit": "torchao"}


@pytest.fixture(params=LIBRARIES)
def bits(request) -> str:
    pytest.importorskip(LIBRARIES[request.param], reason='needs pip install "trivet[quantize]"')
    return request.param


def test_a_quantized_base_is_near_the_full_one_and_shared(bits):
    run = Launch(config(sft, "")).run
    groups, full = to_groups(run.train[:6], "cpu"), run.model
    model = load_policy(STORIES["model"], quantize=bits)
    difference = (
        token_logprobs(model, groups) - token_logprobs(full, groups)
    ).abs().sum() / groups.mask.sum()
    assert 0 < difference < (0.2 if bits == "4bit" else 0.02)
    one, two = (
        token_logprobs(model, groups),
        token_logprobs(model, groups.select(torch.tensor([1]))),
    )
    torch.testing.assert_close(one[1:2], two)  # whatever is in the batch with it
    assert torch.equal(token_logprobs(frozen_copy(model), groups), one)


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_an_adapter_learns_on_it_and_goes_on_to_the_same_bits(tmp_path, name, bits):
    options = {"lora": 4, "lr": 1e-2, "quantize": bits}
    whole = launch(config(RECIPES[name], tmp_path / "whole", **options))
    first = numbers(whole)[0]
    assert abs(first["kl"]) < 1e-5 if name == "ppo" else True
    assert abs(first["loss"] - 0.6931472) < 1e-5 if name == "dpo" else True
    memory = json.loads((whole / "summary.json").read_text())["memory"]
    assert memory["weights"] < 0.45 * 1_712_640  # of the model with its adapter, in float32
    assert memory.get("reference", 0) < 40_000
    with pytest.raises(KilledError):
        launch(config(RECIPES[name], tmp_path / "r", **options), killed_after(3))
    again = resume(tmp_path / "r")
    files = [run / "model" / "adapter_model.safetensors" for run in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert numbers(whole) == numbers(again)


def test_the_loss_falls(tmp_path, bits):
    data = tmp_path / "few.jsonl"
    data.write_text(
        "".join(Path(few_rows()).read_text().splitlines(keepends=True)[:9])
    )  # learned by heart
    options = {"lora": 8, "lr": 1e-2, "quantize": bits, "steps": 15, "prompts_per_step": 8}
    losses = [
        metrics["loss"] for metrics in stepwise(Launch(config(sft, "", data=str(data), **options)))
    ]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_merged_into_the_full_base(tmp_path, bits):
    run = launch(config(sft, tmp_path / "r", lora=4, lr=1e-2, quantize=bits, merge=True))
    apart = launch(config(sft, tmp_path / "a", lora=4, lr=1e-2, quantize=bits))
    groups = ragged(longest=5)
    merged, beside = load_policy(str(run / "model")), load_policy(str(apart / "model"))
    torch.testing.assert_close(
        token_logprobs(merged, groups), token_logprobs(beside, groups), rtol=1e-4, atol=1e-4
    )


def test_a_base_that_is_quantized_on_disk(tmp_path):
    pytest.importorskip("bitsandbytes", reason='needs pip install "trivet[quantize]"')
    launch(config(sft, tmp_path / "r", steps=1))
    for name, how in (("4", {"load_in_4bit": True}), ("8", {"load_in_8bit": True})):
        AutoModelForCausalLM.from_pretrained(
            STORIES["model"], quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
        ).save_pretrained(tmp_path / name)
        for path in (tmp_path / "r" / "model").glob("tokenizer*"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    four = str(tmp_path / "4")
    run = launch(config(dpo, tmp_path / "dpo", model=four, lora=4, lr=1e-2))
    assert abs(numbers(run)[0]["loss"] - 0.6931472) < 1e-5
    assert launch(config(ppo, tmp_path / "ppo", model=str(run), steps=1))
    for options, said in (
        ({"model": four}, "is quantized, so its weights can't be trained"),
        ({"model": four, "lora": 4, "merge": True}, "is quantized on disk"),
        ({"model": str(tmp_path / "8"), "lora": 4}, "change with the batch"),
    ):
        with pytest.raises(InputError, match=said):
            Launch(config(sft, tmp_path / "bad", **options))
