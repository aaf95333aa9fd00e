"""Adapters: a new one changes nothing, its gradient is that of the product, and everything over one base shares that base."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
)

from conftest import few_rows, ragged, tiny
from runs import stepwise
from test_resume import RECIPES, KilledError, config, killed_after, numbers
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.model.adapters import (
    is_adapter_parameter,
    merge_adapter,
    new_adapter,
    read_adapter,
    write_adapter,
)
from trivet.model.copies import frozen_copy
from trivet.model.forward import token_logprobs
from trivet.model.load import load_policy, load_scorer
from trivet.model.scalar import scores, values, with_scalar_head
from trivet.recipes import dpo, grpo, ppo, reward_model, sft
from trivet.runner.launch import launch
from trivet.runner.prepare import Launch
from trivet.runner.resume import resume
from trivet.step.optimizer import Optimizer
from trivet.toy import STORIES

KINDS = pytest.mark.parametrize(
    "kind", [Qwen3Config, LlamaConfig, GPT2Config], ids=lambda kind: kind.model_type
)


def adapted(kind=Qwen3Config, *, moved=True, wide=True, rank=3, **options):
    """A tiny model with an adapter, whose B is no longer zero where it has moved."""
    model = tiny(kind)
    model = new_adapter(model.double() if wide else model, "somewhere", rank, 5, ())
    if moved:
        move(model)
    return model


def move(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def base_tensors(model):
    return {
        name: x.data_ptr() for name, x in model.named_parameters() if not is_adapter_parameter(name)
    }


# Mathematics


@KINDS
@pytest.mark.parametrize("wide", [False, True])
def test_a_new_adapter_changes_nothing_to_the_bit(kind, wide):
    plain = tiny(kind)
    plain = plain.double() if wide else plain
    model = adapted(kind, moved=False, wide=wide)
    assert torch.equal(token_logprobs(model, ragged()), token_logprobs(plain, ragged()))
    assert torch.equal(
        values(with_scalar_head(model), ragged()), values(with_scalar_head(plain), ragged())
    )
    move(model)
    assert not torch.allclose(token_logprobs(model, ragged()), token_logprobs(plain, ragged()))


@KINDS
def test_the_gradients_are_those_of_the_product(kind):
    """W + s B A in place of W: dL/dA = s B' dL/dW, dL/dB = s dL/dW A', for weights of shape (out, in)."""
    model, groups = adapted(kind), ragged()
    token_logprobs(model, groups).square().sum().backward()
    whole = merge_adapter(copy.deepcopy(model)).requires_grad_(True)
    token_logprobs(whole, groups).square().sum().backward()
    plain, seen = dict(whole.named_parameters()), 0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 5 / 3
            slope = plain[f"{name}.weight"].grad
            slope = slope.T if kind is GPT2Config else slope
            torch.testing.assert_close(a.grad, scale * b.T @ slope, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b.grad, scale * slope @ a.T, rtol=1e-9, atol=1e-12)
            seen += 1
    assert seen == (7 * 3 if kind is not GPT2Config else 4 * 2)  # every linear layer of every block
    assert {name for name, x in model.named_parameters() if x.grad is not None} == {
        name for name, x in model.named_parameters() if "lora_" in name
    }


@KINDS
def test_merged_is_the_same_function(kind):
    model, groups = adapted(kind), ragged()
    expected = token_logprobs(model, groups)
    whole = merge_adapter(model)
    assert {name for name, _ in whole.named_parameters()} == {
        name for name, _ in tiny(kind).named_parameters()
    }
    torch.testing.assert_close(token_logprobs(whole, groups), expected, rtol=1e-11, atol=1e-11)


# What is shared, and what moves


@KINDS
def test_the_reference_of_a_new_adapter_is_the_base_and_no_second_one(kind):
    model = adapted(kind, moved=False, wide=False)
    reference = frozen_copy(model)
    assert {x.data_ptr() for x in reference.parameters()} == set(base_tensors(model).values())
    move(model)
    assert torch.equal(token_logprobs(reference, ragged()), token_logprobs(tiny(kind), ragged()))


def test_the_reference_of_an_adapter_that_is_gone_on_with_is_its_frozen_copy(tmp_path):
    model = adapted(wide=False)
    write_adapter(model, tmp_path)
    again = new_adapter(tiny(), "somewhere", 3, 5, ())
    read_adapter(again, str(tmp_path))
    reference, before = frozen_copy(again), token_logprobs(model, ragged())
    assert torch.equal(token_logprobs(again, ragged()), before)
    assert base_tensors(reference) == base_tensors(again)
    move(again)
    assert torch.equal(token_logprobs(reference, ragged()), before)
    assert not torch.equal(token_logprobs(again, ragged()), before)
    assert not any(x.requires_grad for x in reference.parameters())


def test_only_adapter_and_head_are_trained(tmp_path):
    launched = Launch(config(reward_model, tmp_path / "r", lora=4))
    run = launched.run
    before = {name: x.clone() for name, x in run.model.named_parameters()}
    assert len(list(stepwise(launched))) == run.steps
    moved = {name for name, x in run.model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if is_adapter_parameter(name)}
    assert "score.modules_to_save.default.weight" in moved
    assert {id(x) for x in Optimizer(run.model, run.config, 1).parameters} == {
        id(x) for name, x in run.model.named_parameters() if name in moved
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An adapter by SFT, and a reward model as an adapter of the same base that went on from it."""
    folder = tmp_path_factory.mktemp("runs")
    start = launch(config(sft, folder / "sft", lora=4, lr=1e-2))
    return {
        "sft": start,
        "rm": launch(config(reward_model, folder / "rm", model=str(start), lr=1e-2)),
    }


def parts_of_ppo(launched):
    """What PPO holds after its first step, and the metrics of that step."""
    metrics = next(stepwise(launched))
    return launched.run.parts, metrics


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_ppo_is_four_roles_over_one_base(tmp_path, runs, start):
    model = {"lora": 4} if start == "base" else {"model": str(runs["sft"])}
    launched = Launch(
        config(ppo, tmp_path / "r", reward=(str(runs["rm"]),), critic_lr=1e-2, **model)
    )
    run = launched.run
    judge, base = run.reward.rewards["rm"].model, set(base_tensors(run.model).values())
    bits = {name: x.clone() for name, x in run.model.named_parameters()}
    heard = {name: x.clone() for name, x in judge.named_parameters()}
    held, metrics = parts_of_ppo(launched)
    for role in (held["reference"], held["critic"], judge):
        shared = [
            x.data_ptr()
            for name, x in role.named_parameters()
            if not is_adapter_parameter(name) and "score" not in name
        ]
        assert set(shared) <= base
        assert len(shared) == len(base)
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)  # the first pass is that of the start
    assert metrics["sampling/logprob_difference/max"] < 1e-5
    assert all(torch.equal(x, heard[name]) for name, x in judge.named_parameters())
    assert all(
        torch.equal(x, bits[name]) == (not is_adapter_parameter(name))
        for name, x in run.model.named_parameters()
    )
    moved = [name for name, x in held["critic"].named_parameters() if x.requires_grad]
    assert moved
    assert all(is_adapter_parameter(name) for name in moved)
    own = {id(x) for x in held["critic"].parameters() if x.requires_grad}
    assert {id(x) for x in held["critic_optimizer"].parameters} == own
    starts = dict(judge.named_parameters())
    assert not all(
        torch.equal(x, starts[name])
        for name, x in held["critic"].named_parameters()
        if name in moved
    )


def test_over_the_policys_base_a_reward_model_is_what_it_is_by_itself(tmp_path, runs):
    judge = launch(config(reward_model, tmp_path / "rm", lora=2, lora_targets=("q_proj",), lr=1e-2))
    run = Launch(config(ppo, tmp_path / "r", model=str(runs["sft"]), reward=(str(judge),))).run
    expected = scores(load_scorer(str(judge / "model")), ragged(longest=5))
    rounding = (
        1e-6 if os.environ.get("TRIVET_ANY_VERSION") == "1" else 0
    )  # transformers 5.18 takes the plain way here
    torch.testing.assert_close(
        scores(run.reward.rewards["rm"].model, ragged(longest=5)), expected, rtol=0, atol=rounding
    )


def test_the_critic_without_a_reward_model_is_an_adapter_of_its_own(tmp_path):
    launched = Launch(config(ppo, tmp_path / "r", lora=4))
    held, _ = parts_of_ppo(launched)
    own = {name: x for name, x in held["critic"].named_parameters() if x.requires_grad}
    policy = {x.data_ptr() for x in launched.run.model.parameters()}
    assert own.pop("score.weight").abs().sum() > 0
    assert own
    assert not policy & {x.data_ptr() for x in own.values()}
    assert {
        x.data_ptr()
        for name, x in held["critic"].named_parameters()
        if name not in (*own, "score.weight")
    } <= policy


def test_over_a_reward_model_of_all_weights_the_critic_is_an_adapter(tmp_path):
    judge = launch(config(reward_model, tmp_path / "rm", steps=1))
    run = Launch(config(ppo, tmp_path / "r", reward=(str(judge),), lora=4)).run
    model = run.reward.rewards["rm"].model
    expected = values(model, ragged(longest=5))
    critic = run.reward.rewards["rm"].critic()
    assert torch.equal(values(critic, ragged(longest=5)), expected)
    assert set(base_tensors(critic).values()) >= {x.data_ptr() for x in model.parameters()}
    assert {name for name, x in critic.named_parameters() if x.requires_grad} == {
        name for name, _ in critic.named_parameters() if is_adapter_parameter(name)
    }
    assert "score.modules_to_save.default.weight" in dict(critic.named_parameters())


def test_a_policy_of_all_weights_takes_an_adapter_of_a_reward_model_merged(tmp_path, runs):
    run = Launch(config(ppo, tmp_path / "r", reward=(str(runs["rm"]),))).run
    judge = run.reward.rewards["rm"]
    expected = scores(load_scorer(str(runs["rm"] / "model")), ragged(longest=5))
    torch.testing.assert_close(
        scores(judge.model, ragged(longest=5)), expected, rtol=1e-4, atol=1e-5
    )
    assert not any("lora" in name for name, _ in judge.model.named_parameters())
    assert all(x.requires_grad for x in judge.critic().parameters())


# Saved and loaded


def test_the_folder_is_loaded_by_peft_transformers_and_us(runs):
    folder, groups = str(runs["sft"] / "model"), ragged(longest=5)
    said = json.loads(Path(folder, "adapter_config.json").read_text())
    assert Path(said["base_model_name_or_path"]) == Path(STORIES["model"]).resolve()
    assert (said["r"], said["lora_alpha"], said["task_type"], said["peft_type"]) == (
        4,
        8,
        "CAUSAL_LM",
        "LORA",
    )
    assert said["target_modules"] == sorted(said["target_modules"])
    assert not {"lm_head", "score"} & set(said["target_modules"])
    ours = token_logprobs(load_policy(folder), groups)
    assert not torch.allclose(ours, token_logprobs(load_policy(STORIES["model"]), groups))
    base = AutoModelForCausalLM.from_pretrained(STORIES["model"], dtype=torch.float32)
    ids = torch.randint(50, (2, 9))
    by = [
        PeftModel.from_pretrained(base, folder),
        AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    ]
    by.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    expected = load_policy(folder)(ids).logits
    for model in by:
        torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_reward_model_brings_its_head(runs):
    folder, ids = str(runs["rm"] / "model"), torch.tensor([[7, 8, 9, 10, 11]])
    assert "base_model.model.score.weight" in load_file(f"{folder}/adapter_model.safetensors")
    ours = load_scorer(folder)
    expected = ours(ids).logits
    assert expected.abs() > 1e-4
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=0, dtype=torch.float32
    ).eval()
    padded = torch.tensor([[7, 8, 9, 10, 11, 0, 0], [7] * 7])
    torch.testing.assert_close(theirs(padded).logits[:1], expected, rtol=1e-4, atol=1e-6)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    ).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", [sft, reward_model])
def test_merge_saves_an_ordinary_model(tmp_path, recipe):
    run = launch(config(recipe, tmp_path / "r", lora=4, lr=1e-2, merge=True))
    apart = launch(config(recipe, tmp_path / "apart", lora=4, lr=1e-2))
    assert not (run / "model" / "adapter_config.json").exists()
    kind = AutoModelForCausalLM if recipe is sft else AutoModelForSequenceClassification
    whole, info = kind.from_pretrained(run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, load = torch.randint(50, (1, 9)), load_policy if recipe is sft else load_scorer
    expected = load(str(apart / "model"))(ids).logits
    torch.testing.assert_close(whole.eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    plain = launch(config(recipe, tmp_path / "plain", steps=1))
    assert {path.name for path in (run / "model").iterdir()} == {
        path.name for path in (plain / "model").iterdir()
    }


def test_generate_and_score_read_adapters(runs, tmp_path, capsys):
    assert (
        main(
            [
                "generate",
                "--model",
                str(runs["sft"]),
                "--prompt",
                "Once",
                "--max-completion-tokens",
                "5",
            ]
        )
        == 0
    )
    written = capsys.readouterr().out
    assert (
        main(
            [
                "score",
                "--data",
                few_rows(),
                "--reward",
                str(runs["rm"]),
                "--out",
                str(tmp_path / "s.jsonl"),
            ]
        )
        == 0
    )
    assert "pairs ranked correctly" in capsys.readouterr().out
    first = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert first["score_chosen"] != first["score_rejected"]
    assert written
    assert main(["generate", "--model", str(runs["rm"]), "--prompt", "Once"]) == 2


# Runs


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, name):
    whole = launch(config(RECIPES[name], tmp_path / "whole", lora=4))
    with pytest.raises(KilledError):
        launch(config(RECIPES[name], tmp_path / "r", lora=4), killed_after(3))
    saved = tmp_path / "r" / "checkpoints" / "step-2"
    assert (saved / "adapter_model.safetensors").exists()
    assert not (saved / "model.safetensors").exists()
    heavy = (
        400_000 if name != "ppo" else 800_000
    )  # its critic is a second adapter; the base has 1.7 MB
    assert sum(path.stat().st_size for path in saved.iterdir()) < heavy
    same(whole, resume(tmp_path / "r"))


@pytest.mark.slow
def test_a_run_over_adapters_goes_on_to_the_same_bits(tmp_path, runs):
    options = {
        "model": str(runs["sft"]),
        "reward": (str(runs["rm"]),),
        "lr": 1e-3,
        "critic_lr": 1e-3,
    }
    whole = launch(config(ppo, tmp_path / "whole", **options))
    with pytest.raises(KilledError):
        launch(config(ppo, tmp_path / "r", **options), killed_after(3))
    same(whole, resume(tmp_path / "r"))


def same(one, other):
    files = [run / "model" / "adapter_model.safetensors" for run in (one, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert numbers(one) == numbers(other)
    assert numbers(one, "samples.jsonl") == numbers(other, "samples.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [dpo, grpo, ppo])
def test_an_adapter_is_gone_on_with(tmp_path, runs, recipe):
    launched = Launch(config(recipe, tmp_path / "r", model=str(runs["sft"])))
    run = launched.run
    start = load_file(runs["sft"] / "model" / "adapter_model.safetensors")
    weights = {name: x for name, x in run.model.named_parameters() if x.requires_grad}
    assert len(weights) == len(start)
    for name, x in weights.items():
        assert torch.equal(x, start["base_model.model." + name.replace(".default", "")])
    metrics = list(stepwise(launched))
    first = metrics[0]["loss"] if recipe is dpo else metrics[0]["kl"]
    assert first == pytest.approx(
        0.6931472 if recipe is dpo else 0, abs=1e-5
    )  # the reference is the adapter as it was
    name, x = next((name, x) for name, x in run.model.named_parameters() if "lora_B" in name)
    assert not torch.equal(x, start["base_model.model." + name.replace(".default", "")])


def test_the_memory_by_part_has_one_base(tmp_path, runs):
    run = launch(
        config(ppo, tmp_path / "r", model=str(runs["sft"]), reward=(str(runs["rm"]),), steps=1)
    )
    memory = json.loads((run / "summary.json").read_text())["memory"]
    adapter, base = 72_000, 1_640_000  # bytes
    assert memory["weights"] == pytest.approx(base + adapter, rel=0.02)
    for part in ("reference", "critic", "reward model"):
        assert memory[part] == pytest.approx(adapter, rel=0.02)
    assert memory["gradients"] == pytest.approx(2 * adapter, rel=0.02)
    assert memory["optimizer"] == pytest.approx(4 * adapter, rel=0.02)


@pytest.mark.slow
def test_products_in_bfloat16(tmp_path):
    launched = Launch(config(grpo, tmp_path / "r", lora=4, precision="bfloat16"))
    metrics = list(stepwise(launched))
    assert metrics[0]["kl"] == pytest.approx(0, abs=0.05)
    assert all(x.dtype == torch.float32 for x in launched.run.model.parameters() if x.requires_grad)


@pytest.mark.slow
def test_grpo_learns_with_an_adapter():
    small = {"prompts_per_step": 6, "group_size": 6, "max_completion_tokens": 32, "eval_limit": 1}
    launched = Launch(
        grpo.Config(**{**grpo.PRESETS["toy"], **small, "lora": 8, "lr": 1e-2, "steps": 10})
    )
    rewards = [metrics["reward"] for metrics in stepwise(launched)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.5


# What can not be


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"merge": True}, "--merge needs an adapter"),
        ({"quantize": "4bit"}, "--quantize needs an adapter"),
        ({"lora_alpha": 4}, "--lora-alpha needs an adapter"),
        ({"lora": 4, "from_scratch": True}, "--from-scratch trains all weights"),
        (
            {"lora": 4, "lora_targets": ("q_prj",)},
            "--lora-targets q_prj: no such linear layer .* q_proj",
        ),
        (
            {"lora": 4, "lora_targets": ("lm_head",)},
            "--lora-targets lm_head: no such linear layer below the head",
        ),
    ],
)
def test_what_does_not_go_together_is_said(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        Launch(config(sft, tmp_path / "r", **options))


def test_targets_are_those_asked_for(tmp_path):
    run = launch(
        config(
            sft, tmp_path / "r", lora=4, lora_alpha=3, lora_targets=("v_proj", "q_proj"), steps=1
        )
    )
    said = json.loads((run / "model" / "adapter_config.json").read_text())
    assert (said["target_modules"], said["lora_alpha"]) == (["q_proj", "v_proj"], 3)
    assert {
        name.split(".")[-4] for name in load_file(run / "model" / "adapter_model.safetensors")
    } == {"self_attn"}


def test_an_adapter_that_does_not_fit_is_said(tmp_path, runs):
    with pytest.raises(InputError, match="is already a rank-4 adapter with alpha 8"):
        Launch(config(sft, tmp_path / "r", model=str(runs["sft"]), lora=8))
    assert Launch(config(sft, tmp_path / "r", model=str(runs["sft"]), lora=4)).run.model.peft_config
    folder = tmp_path / "adapter"
    shutil.copytree(runs["sft"] / "model", folder)
    config_file = folder / "adapter_config.json"
    said = json.loads(config_file.read_text())
    for change, expected in (
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "gone"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "IA3"}, "is of type|can't be read"),
        ({"r": 5}, "can't be loaded"),
        ({"target_modules": ["q_proj"]}, "do not fit"),
        ({"target_modules": ["no_proj"]}, "no_proj"),
    ):
        config_file.write_text(json.dumps(said | change))
        with pytest.raises(InputError, match=expected):
            load_policy(str(folder))
    config_file.write_text("{")
    with pytest.raises(InputError, match="can't be read"):
        load_policy(str(folder))
    config_file.write_text(json.dumps(said))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="can't be loaded"):
        load_policy(str(folder))
