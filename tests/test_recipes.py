"""Every recipe learns on the toy, in seconds, and leaves a run directory that transformers loads as it is."""

import copy
import json
import math
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from conftest import few_rows, ragged, tiny
from runs import stepwise
from steps import examples, recipe_step, rollouts_of
from trivet.arguments import parse_values, read_toml
from trivet.batch import Example, Rollouts, collate
from trivet.model.copies import frozen_copy
from trivet.model.forward import token_logprobs
from trivet.model.load import load_policy, load_scorer
from trivet.model.scalar import scores, values, with_scalar_head
from trivet.optimization import k2, k3, token_mean, weighted_kl
from trivet.recipes import dpo, grpo, pairwise_grpo, ppo, reward_model, sft
from trivet.recipes.dynamic_sampling import Refilling
from trivet.recipes.grpo_variants import objective_of
from trivet.recipes.ppo_parts import critic_from
from trivet.rewards.overlong import overlong_penalty
from trivet.runner.launch import launch
from trivet.runner.prepare import Launch
from trivet.step import trace
from trivet.step.optimizer import Optimizer
from trivet.step.run import Run
from trivet.toy import ARITHMETIC, STORIES

CHEAP = {
    **STORIES,
    "data": few_rows(),
    "prompts_per_step": 4,
    "steps": 2,
    "eval_fraction": 0.1,
    "eval_limit": 8,
}
GOLD = {"reward": ("trivet.toy.stories:gold",), "group_size": 3}


def curve(recipe, preset: str = "arithmetic", **options) -> list[dict[str, float]]:
    return list(stepwise(Launch(recipe.Config(**{**recipe.PRESETS[preset], **options}))))


def test_sft_learns_the_table():
    metrics = curve(sft)
    assert metrics[0]["loss"] == pytest.approx(math.log(13), abs=0.6)
    assert metrics[-1]["eval/loss"] < 0.05


def test_reward_model_starts_at_log_2_and_learns_to_rank():
    metrics = curve(reward_model, steps=120)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["eval/accuracy"] >= 0.95


def test_dpo_starts_at_log_2_and_learns_to_rank():
    metrics = curve(dpo)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics[-1]["eval/rewards/accuracies"] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", [grpo, ppo, pairwise_grpo], ids=lambda recipe: recipe.__name__.rpartition(".")[2]
)
def test_learns_arithmetic_from_scratch_by_reward_alone(recipe):
    metrics = curve(recipe, seed=0)
    assert metrics[0]["reward"] < 0.3
    assert abs(metrics[0]["kl"]) < 1e-5
    assert 0 <= metrics[0]["sampling/logprob_difference/max"] < 1e-5
    assert metrics[-1]["eval/reward"] >= 0.9


PAIR_VARIANTS = {
    "conservative": {"loss": "conservative", "label_smoothing": 0.1},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "hinge": {"loss": "hinge"},
    "ipo of sums": {"loss": "ipo"},
    "length-normalized": {"length_normalize": True, "beta": 1.0},
    "supervised term": {"sft_weight": 1.0},
    **{name: dpo.PRESETS[name] for name in ("ipo", "simpo", "orpo", "kto")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIR_VARIANTS)
def test_each_variant_of_dpo_learns_to_rank(name):
    metrics = curve(dpo, **PAIR_VARIANTS[name])
    assert metrics[-1]["eval/loss"] < 0.9 * metrics[0]["loss"]
    assert metrics[-1]["eval/rewards/accuracies"] >= 0.9


@pytest.mark.slow
def test_kto_learns_from_single_labels(tmp_path):
    rows = [json.loads(line) for line in Path(ARITHMETIC["data"]).read_text().splitlines()]
    sides = [(row, side) for row in rows for side in ("chosen", "rejected")]
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in sides
    ]
    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    metrics = curve(dpo, loss="kto", data=str(data), eval_data=str(data))
    assert metrics[-1]["eval/rewards/chosen"] > metrics[-1]["eval/rewards/rejected"] + 1
    assert metrics[-1]["eval/loss"] < 0.8 * metrics[0]["loss"]


GRPO_VARIANTS = {
    **{name: grpo.PRESETS[name] for name in grpo.PRESETS if name not in ("toy", "arithmetic")},
    "dual clip": {"epochs_per_batch": 2, "clip_dual": 3.0},
    "weighted k3": {"kl_estimator": "weighted-k3"},
    "batch scale": {"scale_rewards": "batch"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GRPO_VARIANTS)
def test_each_variant_of_grpo_climbs(name):
    metrics = curve(grpo, **GRPO_VARIANTS[name], steps=50, eval_limit=1)
    assert metrics[0]["reward"] < 0.02
    assert sum(m["reward"] for m in metrics[-5:]) / 5 > 0.08  # tenfold
    assert ("clip_ratio" in metrics[-1]) == (GRPO_VARIANTS[name].get("epochs_per_batch", 1) > 1)
    if name == "dapo":
        assert metrics[0]["dynamic_sampling/useful"] > 1.5 * (
            1 - metrics[0]["frac_reward_zero_std"]
        )


PPO_VARIANTS = {
    "no value clip": {"value_clip": 0.0},
    "KL in the loss": {"kl_in": "loss"},
    "whitened rewards": {"whiten_rewards": True},
    "missing-EOS penalty": {"missing_eos_penalty": 0.5},
    "adaptive KL": {"kl_target": 4.0},
    "shared critic": {"shared_critic": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PPO_VARIANTS)
def test_each_variant_of_ppo_climbs(name):
    metrics = curve(ppo, **PPO_VARIANTS[name], steps=40, eval_limit=1)
    assert metrics[0]["reward"] < 0.02
    assert sum(m["reward"] for m in metrics[-5:]) / 5 > 0.08  # tenfold
    if name == "adaptive KL":
        assert (
            metrics[-1]["objective/kl_coef"] < metrics[0]["objective/kl_coef"]
        )  # from 0 nats, it has room


def test_the_overlong_charge_falls_on_the_last_tokens_before_the_limit():
    penalty = overlong_penalty(torch.tensor([1, 6, 7, 8, 10]), longest=10, buffer=4)
    assert penalty.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0]


def test_a_shared_critic_is_a_head_on_the_policys_own_trunk():
    run = Launch(ppo.Config(**{**ppo.PRESETS["arithmetic"], "steps": 1})).run
    shared, apart = with_scalar_head(run.model, share=True), with_scalar_head(run.model)
    assert shared.base_model is run.model.base_model
    assert apart.base_model is not run.model.base_model
    groups = collate([[5, 6]], [[7, 8, 1]])
    assert (values(shared, groups) == 0).all()
    with torch.no_grad():
        shared.score.weight.normal_()
        apart.score.weight.copy_(shared.score.weight)
    torch.testing.assert_close(values(shared, groups), values(apart, groups))


def test_the_reference_is_a_frozen_copy_of_the_model_as_it_stands_in_memory():
    policy = tiny()
    with torch.no_grad():
        next(policy.parameters()).add_(1)  # not what any file says
    reference = frozen_copy(policy)
    before = [p.clone() for p in policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), before, strict=True))


def small_run(rows: int = 5, **options) -> Run:
    """A run of which only the order of its data is looked at."""
    train = [Example(prompt=[i], completions=[], learned=[], row={}) for i in range(rows)]
    nothing = {
        "model": None,
        "decode": None,
        "stops": [],
        "heldout": [],
        "device": "cpu",
        "generator": torch.Generator(),
    }
    return Run(config=grpo.Config(prompts_per_step=2, **options), train=train, steps=10, **nothing)


def test_batches_visit_every_row_once_an_epoch_in_an_order_of_the_seeds():
    def order(**options) -> list[int]:
        return [
            example.prompt[0]
            for _, examples in small_run(**options).batches()
            for example in examples
        ]

    first = order()
    assert len(first) == 20
    for epoch in range(4):  # steps of 2 go on over the end of an epoch of 5
        assert sorted(first[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert first[:5] != first[5:10]
    assert order() == first
    assert order(seed=1) != first


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1.0]),
        ({"lr_decay": True}, [1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_the_optimizers_learning_rate(options, expected):
    model = torch.nn.Linear(2, 1)
    optimizer = Optimizer(model, grpo.Config(lr=1.0, **options), 4)
    seen = []
    for _ in range(4):
        model(torch.ones(2)).sum().backward()
        seen.append(optimizer.step()["lr"])
    assert seen == pytest.approx(expected)


def test_sampling_follows_the_seed():
    runs = [
        Launch(grpo.Config(**{**grpo.PRESETS["arithmetic"], "seed": seed})).run for seed in (3, 4)
    ]
    assert [run.generator.initial_seed() for run in runs] == [3, 4]


def test_kl_terms_are_k2_unless_asked_otherwise():
    logprobs, old, ref = (
        torch.randn(2, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)
    )

    def kl_term(**options) -> torch.Tensor:
        return objective_of(grpo.Config(**options)).kl(logprobs, old, ref)

    terms = {name: kl_term(kl_estimator=name) for name in ("k2", "k3", "weighted-k3")}
    assert torch.equal(terms["k2"], k2(logprobs, ref))
    assert torch.equal(terms["k3"], k3(logprobs, ref))
    assert torch.equal(terms["weighted-k3"], weighted_kl(k3(logprobs, ref), logprobs, old))
    assert torch.equal(kl_term(), terms["k2"])


def test_the_batch_baseline_is_the_mean_of_the_step():
    rewards, logprobs = torch.tensor([0.0, 0.0, 1.0, 3.0]), torch.zeros(4, 5)

    def centered(**options) -> list[float]:
        objective = objective_of(grpo.Config(group_size=2, **options))
        return objective.advantages(
            rewards, logprobs, logprobs, torch.ones(4, 5, dtype=torch.bool)
        ).tolist()

    assert centered(baseline="batch") == [-1.0, -1.0, 0.0, 2.0]
    assert centered() == [0.0, 0.0, -1.0, 1.0]
    assert centered(baseline="leave-one-out") == [0.0, 0.0, -2.0, 2.0]


def test_groups_of_equal_rewards_are_still_tied_to_the_reference():
    policy, groups = tiny(), ragged(2, 2)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        reference.get_input_embeddings().weight.mul_(1.1)
    given = rollouts_of(groups, token_logprobs(policy, groups))
    options = {"rollouts": given, "rewards": torch.ones(4), "group_size": 2, "reference": reference}
    [(_, tied)] = recipe_step(grpo, policy, examples(groups), beta=1.0, **options)
    ref_logprobs = token_logprobs(reference, groups).detach()
    policy.zero_grad()
    token_mean(k2(token_logprobs(policy, groups), ref_logprobs), groups.mask).backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(tied[name], parameter.grad, rtol=1e-4, atol=1e-6)
    [(_, free)] = recipe_step(grpo, policy, examples(groups), beta=0.0, **options)
    assert free == {}


@pytest.mark.slow
def test_several_epochs_per_batch_learn_through_the_clipped_ratio():
    metrics = curve(grpo, epochs_per_batch=2, steps=80)
    assert metrics[-1]["reward"] > 20 * metrics[0]["reward"]


@pytest.mark.parametrize(
    "recipe", [grpo, ppo, pairwise_grpo], ids=lambda recipe: recipe.__name__.rpartition(".")[2]
)
def test_the_first_step_has_exactly_no_kl(recipe):
    options = (
        {}
        if recipe is not pairwise_grpo
        else {"reward": ("trivet.rewards.rules:brevity",), "max_completion_tokens": 2}
    )
    first = curve(recipe, steps=1, **options)[0]
    assert abs(first["kl"]) <= (
        0.0 if recipe is not pairwise_grpo else 1e-6
    )  # groups without pairs are not visited


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
        recipe.Config(
            **parse_values(recipe.Config, read_toml(str(out / "config.toml")), "config.toml: ")
        ).prompts_per_step
        == 4
    )
    assert tomllib.loads((out / "config.toml").read_text())["prompts_per_step"] == 4
    kept = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert any("tokens" in line for line in kept) == (recipe is not reward_model)
    if "save_every" in options:
        assert (out / "checkpoints" / "step-1" / "model.safetensors").exists()

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    ids = tokenizer("One day, Mia the fox met a small bird.")["input_ids"]
    theirs = (
        model(torch.tensor([ids]))
        .logits[0]
        .log_softmax(-1)[4:-1]
        .gather(1, torch.tensor(ids[5:])[:, None])[:, 0]
    )
    ours = token_logprobs(load_policy(str(out / "model")), collate([ids[:5]], [ids[5:]]))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_reward_model_scores_the_same_in_transformers_padded_or_not(tmp_path):
    out = launch(reward_model.Config(**CHEAP, out=str(tmp_path / "run"), lr=1e-2))
    folder = str(out / "model")
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    texts = [
        "One day, Mia the fox met a bird. Mia shared her cake.<eos>",
        "One day, Tom hit the dog.<eos>",
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    theirs = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[
        :, 0
    ]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ours = scores(
        load_scorer(folder), collate([row[:3] for row in rows], [row[3:] for row in rows])
    )
    assert ours.abs().min() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_critic_starts_as_the_reward_model(tmp_path):
    out = launch(reward_model.Config(**CHEAP, out=str(tmp_path / "rm"), lr=1e-2))
    run = Launch(ppo.Config(**CHEAP, reward=(str(out),))).run
    critic, judge = critic_from(run.reward, run.model), run.reward.rewards["rm"].model
    groups = collate([[5, 6]], [[7, 8, 1]])
    assert torch.equal(scores(critic, groups), scores(judge, groups))
    assert critic is not judge
    assert all(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in judge.parameters())


@pytest.mark.slow
def test_microbatch_size_does_not_change_a_run():
    losses = [
        curve(
            dpo,
            "toy",
            steps=3,
            prompts_per_step=4,
            eval_fraction=0.01,
            eval_limit=4,
            microbatch_tokens=n,
        )
        for n in (150, 8192)
    ]
    for small, large in zip(*losses, strict=True):
        assert small["loss"] == pytest.approx(large["loss"], rel=1e-4)
        assert small["grad_norm"] == pytest.approx(large["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("preset", ["dr-grpo", "rloo", "reinforce++"])
def test_a_constant_reward_leaves_the_weights_exactly_as_they_are_at_first(preset, monkeypatch):
    """What is charged for the KL is exactly 0 too: AdamW would make a whole step of its rounding."""
    monkeypatch.setitem(
        sys.modules,
        "constant",
        SimpleNamespace(one=lambda completions, **_: [1.0] * len(completions)),
    )
    options = {
        **CHEAP,
        **grpo.PRESETS[preset],
        "reward": ("constant:one",),
        "steps": 1,
        "eval_fraction": 0.0,
        "lr": 1e-2,
    }
    launched = Launch(grpo.Config(**options))
    before = [x.detach().clone() for x in launched.run.model.parameters()]
    (metrics,) = stepwise(launched)
    assert metrics["grad_norm"] == 0
    assert all(
        torch.equal(x, y) for x, y in zip(before, launched.run.model.parameters(), strict=True)
    )
    assert math.isnan(
        metrics["sampling/logprob_difference/mean"]
    )  # the learner looked at none of them
    assert math.isnan(metrics["sampling/logprob_difference/max"])


def test_the_sampler_is_compared_where_the_learner_has_looked(monkeypatch):
    """Half of the groups have no pair: they don't halve the difference."""
    original = trace.token_logprobs
    monkeypatch.setattr(
        trace, "token_logprobs", lambda *args, **options: original(*args, **options) + 0.5
    )
    half = SimpleNamespace(
        half=lambda completions, **_: [
            (i % 3) * (i < len(completions) / 2) for i in range(len(completions))
        ]
    )
    monkeypatch.setitem(sys.modules, "constant", half)
    options = {**CHEAP, **GOLD, "reward": ("constant:half",), "steps": 1, "eval_fraction": 0.0}
    (metrics,) = stepwise(Launch(pairwise_grpo.Config(**options)))
    assert metrics["sampling/logprob_difference/mean"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["sampling/logprob_difference/max"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(("loss", "start"), [("sigmoid", math.log(2)), ("kto", 0.5)])
def test_every_row_has_a_reference_of_its_own_held_out_or_not(loss, start):
    """With a policy that has not moved, every loss is that of equal models."""
    metrics = curve(dpo, "toy", **CHEAP | {"prompts_per_step": 64, "lr": 1e-30}, loss=loss)
    assert [line["loss"] for line in metrics] == pytest.approx([start] * 2, abs=1e-5)
    assert metrics[-1]["eval/loss"] == pytest.approx(start, abs=1e-5)


def test_what_takes_the_place_of_other_groups_keeps_its_completions_and_rewards():
    asked = []

    def generate(policy, prompts, size):
        asked.append(len(prompts))
        words = [
            [100 + 10 * prompt.prompt[0] + i] * (1 + i) for prompt in prompts for i in range(size)
        ]
        groups = collate([prompt.prompt for prompt in prompts], words)
        texts, finished = [str(ids[0]) for ids in words], torch.ones(len(words), dtype=torch.bool)
        given = {"finished": finished, "texts": texts, "rows": [prompt.row for prompt in prompts]}
        return Rollouts(groups=groups, logprobs=groups.completions.float(), **given)

    def reward(rollouts):  # prompts below 4 teach nothing
        return torch.tensor([float(text) if int(text) >= 140 else 1.0 for text in rollouts.texts])

    reward.metrics = dict
    data = [Example(prompt=[n], completions=[], learned=[], row={"prompt": n}) for n in range(8)]
    draw = SimpleNamespace(choices=lambda prompts, k: prompts[6 : 6 + k])
    both = Refilling(SimpleNamespace(generate=generate), reward, data, 3, lambda: draw)
    rollouts = both.generate(None, [data[n] for n in (1, 5, 2, 4)], 2)
    assert asked == [4, 2]
    assert (
        [row["prompt"] for row in rollouts.rows]
        == rollouts.groups.prompts[:, 0].tolist()
        == [5, 4, 6, 7]
    )
    assert rollouts.texts == ["150", "151", "140", "141", "160", "161", "170", "171"]
    assert (
        rollouts.groups.completions[:, 0].tolist()
        == both(rollouts).tolist()
        == [float(x) for x in rollouts.texts]
    )
    assert both.metrics()["dynamic_sampling/useful"] == 1
    assert both.metrics()["tokens/generated"] == 12 + 6
