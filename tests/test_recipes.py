"""Every recipe learns on the toy, in seconds, and leaves a run directory that transformers loads as it is."""

import json
import math
import tomllib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trivet.batch import collate
from trivet.model.forward import token_logprobs
from trivet.model.load import load_policy, load_scorer
from trivet.model.scalar import scores
from trivet.recipes import dpo, grpo, pairwise_grpo, ppo, reward_model, sft
from trivet.run.arguments import read_toml, typed
from trivet.run.launch import Launch, launch
from trivet.toy import STORIES

CHEAP = {**STORIES, "prompts_per_step": 4, "steps": 2, "eval_fraction": 0.01, "eval_limit": 8}
GOLD = {"reward": ("trivet.toy.stories:gold",), "group_size": 3}


def curve(recipe, preset: str = "arithmetic", **options) -> list[dict[str, float]]:
    run = Launch(recipe.Config(**{**recipe.PRESETS[preset], **options})).run
    return list(recipe.train(run.config, run))


def test_sft_learns_the_table():
    metrics = curve(sft)
    assert metrics[0]["loss"] == pytest.approx(math.log(13), abs=0.6)
    assert metrics[-1]["eval/loss"] < 0.05


def test_reward_model_starts_at_log_2_and_learns_to_rank():
    metrics = curve(reward_model)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["eval/accuracy"] >= 0.95


def test_dpo_starts_at_log_2_and_learns_to_rank():
    metrics = curve(dpo)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[-1]["eval/rewards/accuracies"] >= 0.95


@pytest.mark.parametrize("recipe", [grpo, ppo, pairwise_grpo], ids=lambda recipe: recipe.__name__.rpartition(".")[2])
def test_learns_arithmetic_from_scratch_by_reward_alone(recipe):
    metrics = curve(recipe)
    assert metrics[0]["reward"] < 0.3
    assert abs(metrics[0]["kl"]) < 1e-5
    assert metrics[0]["sampling/logprob_difference/max"] < 1e-5 if recipe is not ppo else True
    assert metrics[-1]["eval/reward"] >= 0.9


def test_several_epochs_per_batch_learn_through_the_clipped_ratio():
    metrics = curve(grpo, epochs_per_batch=2, steps=80)
    assert metrics[-1]["reward"] > 20 * metrics[0]["reward"]


def test_first_step_of_grpo_has_exactly_no_kl():
    assert curve(grpo, steps=1)[0]["kl"] == 0.0


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (sft, {}),
        (dpo, {}),
        (grpo, GOLD),
        (grpo, {**GOLD, "epochs_per_batch": 2, "scale_rewards": "group", "beta": 0.0}),
        (ppo, {**GOLD, "minibatches": 2, "kl_in": "loss", "save_every": 1}),
        (pairwise_grpo, GOLD),
    ],
    ids=lambda x: x.__name__.rpartition(".")[2] if hasattr(x, "__name__") else None,
)
def test_a_run_directory_explains_itself_and_loads_in_transformers(recipe, options, tmp_path):
    out = launch(recipe.Config(**CHEAP, **options, out=str(tmp_path / "run")))
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert summary["method"] == recipe.__name__.rpartition(".")[2].replace("_", "-")
    assert summary["steps"] == 2
    assert summary["peak_memory_bytes"] > 50 * 2**20
    assert summary["tokens_trained"] > 0
    assert any(key.startswith("eval/") for key in summary["eval"])
    assert (
        recipe.Config(**typed(recipe.Config, read_toml(str(out / "config.toml")), "config.toml: ")).prompts_per_step
        == 4
    )
    assert tomllib.loads((out / "config.toml").read_text())["prompts_per_step"] == 4
    assert (out / "samples.jsonl").exists() == ("reward" in options)
    if "save_every" in options:
        assert (out / "checkpoints" / "step-1" / "model.safetensors").exists()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "model"), AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("One day, Mia the fox met a small bird.")["input_ids"]
    theirs = model(torch.tensor([ids])).logits[0].log_softmax(-1)[4:-1].gather(1, torch.tensor(ids[5:])[:, None])[:, 0]
    ours = token_logprobs(load_policy(str(out / "model")), collate([ids[:5]], [ids[5:]]))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_reward_model_scores_the_same_in_transformers_padded_or_not(tmp_path):
    out = launch(reward_model.Config(**CHEAP, out=str(tmp_path / "run"), lr=1e-2))
    folder = str(out / "model")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["One day, Mia the fox met a bird. Mia shared her cake.<eos>", "One day, Tom hit the dog.<eos>"]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    theirs = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ours = scores(load_scorer(folder), collate([row[:3] for row in rows], [row[3:] for row in rows]))
    assert ours.abs().min() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_critic_starts_as_the_reward_model(tmp_path):
    out = launch(reward_model.Config(**CHEAP, out=str(tmp_path / "rm"), lr=1e-2))
    run = Launch(ppo.Config(**CHEAP, reward=(str(out),))).run
    critic, judge = ppo.critic_from(run.reward, run.model), run.reward.rewards["rm"].model
    groups = collate([[5, 6]], [[7, 8, 1]])
    assert torch.equal(scores(critic, groups), scores(judge, groups))
    assert critic is not judge
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in judge.parameters())


def test_microbatch_size_does_not_change_a_run():
    losses = [
        curve(dpo, "toy", steps=3, prompts_per_step=4, eval_fraction=0.01, eval_limit=4, microbatch_tokens=n)
        for n in (150, 8192)
    ]
    for small, large in zip(*losses, strict=True):
        assert small["loss"] == pytest.approx(large["loss"], rel=1e-4)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)
