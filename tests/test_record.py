"""What a run leaves for those who look: completions, tokens with their numbers, the time and the memory of its parts."""

import json
import math
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from conftest import few_rows
from test_resume import RECIPES
from trivet.model.load import load_policy
from trivet.model.text import load_tokenizer
from trivet.optimization.advantages import group_advantages
from trivet.recipes import dpo, grpo, sft
from trivet.recipes.offline import completion_logprob
from trivet.runner.launch import launch
from trivet.runner.memory import bytes_by_part
from trivet.runner.prepare import Launch
from trivet.step.metrics import mean, reduced
from trivet.store.record import token_texts
from trivet.timing import Clock, timed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run directories of all six methods, four steps each, tokens kept at steps 1, 3 and 4."""
    out = {}
    for name, recipe in RECIPES.items():
        options = recipe.PRESETS["toy"] | {
            "steps": 4,
            "prompts_per_step": 4,
            "eval_limit": 3,
            "keep_tokens_every": 3,
        }
        options |= {
            "data": few_rows(),
            "out": str(tmp_path_factory.mktemp(name) / "run"),
            "eval_every": 2,
        }
        out[name] = launch(recipe.Config(**options))
    return out


def lines(run, name="samples.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


@pytest.mark.parametrize("method", RECIPES)
def test_tokens_are_kept_at_the_first_the_last_and_every_nth_step(runs, method):
    kept = lines(runs[method])
    by_token = {line["step"] for line in kept if "tokens" in line}
    assert by_token == (set() if method == "reward-model" else {1, 3, 4})
    assert {line["step"] for line in kept} == (
        {1, 2, 3, 4} if "grpo" in method or method == "ppo" else {1, 3, 4}
    )
    for line in kept:
        assert line.keys() >= {"step", "group", "prompt", "completion"}
        if "tokens" in line:
            assert "".join(line["tokens"]).startswith(
                line["completion"]
            )  # the rest is what ended it
            lists = {name: x for name, x in line.items() if isinstance(x, list)}
            assert {len(x) for x in lists.values()} == {len(line["tokens"])}
            assert len(lists) > 1


def test_nothing_is_kept_of_methods_without_samples_where_that_is_asked_for(tmp_path):
    run = launch(
        sft.Config(
            **sft.PRESETS["toy"]
            | {"steps": 2, "keep_tokens_every": 0, "eval_limit": 1, "out": str(tmp_path / "r")}
        )
    )
    assert not (run / "samples.jsonl").exists()


@pytest.mark.parametrize("method", ["ppo", "grpo", "pairwise-grpo"])
def test_numbers_of_tokens_agree_with_each_other(runs, method):
    config = json.loads((runs[method] / "run.json").read_text())["options"]
    for line in (line for line in lines(runs[method]) if "tokens" in line):
        policy, reference = torch.tensor(line["logprob"]), torch.tensor(line["ref_logprob"])
        written = 1e-5 * (1 + policy.abs() + reference.abs())  # six digits of each
        assert ((torch.tensor(line["kl"]) - (policy - reference)).abs() < written).all()
        if line["step"] == 1 and method != "ppo":  # ppo keeps the second pass over the batch
            assert torch.allclose(
                policy, torch.tensor(line["sampler_logprob"]), rtol=2e-5, atol=1e-4
            )
            assert not torch.tensor(line["kl"]).any()
        if method == "grpo":
            assert line["ratio"] == [1.0] * len(policy)
            assert not any(line["clipped"])
            assert isinstance(line["advantage"], float)
        if method == "ppo":
            ratio = (policy - torch.tensor(line["sampler_logprob"])).exp()
            assert torch.allclose(torch.tensor(line["ratio"]), ratio, rtol=2e-3)
            assert not torch.tensor(line["gradient"])[torch.tensor(line["clipped"])].any()
        if method == "pairwise-grpo":
            assert torch.allclose(
                torch.tensor(line["implicit_reward"]),
                config["beta"] * (policy - reference),
                atol=1e-5,
            )
            assert (
                max(line["gradient"]) - min(line["gradient"]) < 1e-9
            )  # every token of a completion is pushed alike


def test_the_gradient_of_grpo_is_the_advantage_over_the_tokens_of_the_step_and_the_pull_of_the_kl(
    runs,
):
    metrics, config = (
        lines(runs["grpo"], "metrics.jsonl"),
        json.loads((runs["grpo"] / "run.json").read_text())["options"],
    )
    for line in (line for line in lines(runs["grpo"]) if "tokens" in line):
        tokens = metrics[line["step"] - 1]["tokens/generated"]
        pull = config["beta"] * torch.tensor(line["kl"])
        expected = (line["advantage"] - pull) / tokens
        assert torch.allclose(torch.tensor(line["gradient"]), expected, rtol=1e-3, atol=1e-9)


def test_kept_groups_are_whole_and_their_advantages_are_those_of_their_rewards(runs):
    kept = [line for line in lines(runs["grpo"]) if "tokens" in line and line["step"] == 3]
    assert [line["group"] for line in kept] == [0] * 8
    rewards, advantages = (
        torch.tensor([line[name] for line in kept]) for name in ("reward", "advantage")
    )
    assert torch.allclose(group_advantages(rewards, 8), advantages, atol=1e-4)
    assert all(line["rewards"] == {"gold": line["reward"]} for line in kept)


def test_the_charge_of_ppo_and_its_score_add_up_to_the_reward_of_each_token(runs):
    beta = json.loads((runs["ppo"] / "run.json").read_text())["options"]["beta"]
    for line in (line for line in lines(runs["ppo"]) if "tokens" in line):
        charge = beta * (torch.tensor(line["sampler_logprob"]) - torch.tensor(line["ref_logprob"]))
        expected = -charge
        expected[-1] += line["reward"]
        assert torch.allclose(torch.tensor(line["token_reward"]), expected, rtol=1e-4, atol=1e-4)


def test_both_sides_of_dpo_of_the_pairs_of_the_step_that_ran(runs):
    options, kept = (
        json.loads((runs["dpo"] / "run.json").read_text())["options"],
        lines(runs["dpo"]),
    )
    metrics, run = (
        lines(runs["dpo"], "metrics.jsonl"),
        Launch(dpo.Config(**options | {"out": ""})).run,
    )
    for step, pairs in run.order():
        shown = [line for line in kept if line["step"] == step]
        if step == 2:
            assert not shown
            continue
        assert [line["group"] for line in shown] == [0, 0, 1, 1, 2, 2, 3, 3]  # the whole step
        assert [line["side"] for line in shown] == ["chosen", "rejected"] * 4
        assert [line["prompt"] for line in shown[::2]] == [pair.row["prompt"] for pair in pairs]
        written = [run.decode(pair.prompt, ids) for pair in pairs for ids in pair.completions]
        assert [line["completion"] for line in shown] == written
        ref_logprob = completion_logprob(run, pairs)  # (B,) by the model that the run began with
        rewards = options["beta"] * (
            torch.tensor([sum(line["logprob"]) for line in shown]) - ref_logprob
        )
        assert rewards.tolist() == pytest.approx([line["reward"] for line in shown], abs=1e-4)
        margins = [
            chosen["reward"] - rejected["reward"]
            for chosen, rejected in zip(shown[::2], shown[1::2], strict=True)
        ]
        assert sum(margins) / 4 == pytest.approx(metrics[step - 1]["rewards/margins"], abs=1e-5)
        for number, line in enumerate(shown):
            push = (-1) ** number * options["beta"] / (1 + math.exp(margins[number // 2])) / 4
            assert torch.allclose(torch.tensor(line["gradient"]), torch.tensor(push), rtol=1e-3)
    assert all(
        abs(line["reward"]) < 1e-5 for line in kept if line["step"] == 1
    )  # the policy is the reference yet
    assert all(abs(line["reward"]) > 1e-6 for line in kept if line["step"] == 4)


def test_held_out_completions_are_marked(runs):
    for method in ("ppo", "grpo", "pairwise-grpo"):
        heldout = [line for line in lines(runs[method]) if line.get("set") == "held-out"]
        assert {line["step"] for line in heldout} == {2, 4}
        assert all("tokens" not in line for line in heldout)


@pytest.mark.parametrize("method", RECIPES)
def test_the_parts_of_a_step_add_up_to_it(runs, method):
    metrics = lines(runs[method], "metrics.jsonl")
    for before, line in pairwise(metrics):
        parts = {name: seconds for name, seconds in line.items() if name.startswith("time/")}
        assert parts.keys() >= {"time/forward", "time/backward", "time/optimizer", "time/other"}
        assert (
            ("time/generation" in parts)
            == ("time/reward" in parts)
            == (method in ("ppo", "grpo", "pairwise-grpo"))
        )
        assert ("time/evaluation" in parts) == (line["step"] % 2 == 0)
        assert sum(parts.values()) <= line["seconds"] - before["seconds"] + 0.02


def test_a_clock_gives_each_moment_to_one_part_and_leaves_no_trace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("trivet.timing.time.perf_counter", lambda: now[0])

    @timed("forward")
    def token_logprobs(x: Tensor) -> Tensor:
        now[0] += 1
        x = values(x)  # inside a forward pass: counts with it, and so does what comes after
        now[0] += 32
        return x

    @timed("forward")
    def values(x: Tensor) -> Tensor:
        now[0] += 2
        return x * 2

    with Clock() as clock:
        token_logprobs(torch.ones(1, requires_grad=True)).sum().backward()
        now[0] += 4
        values(torch.ones(1))
        now[0] += 8
        assert clock.take() == {"time/other": 8.0, "time/forward": 37.0, "time/backward": 4.0}
        now[0] += 16
        assert clock.take() == {"time/other": 16.0}
    values(torch.ones(1))  # nobody listens
    assert clock.spent == {}


def test_a_part_that_fails_does_not_keep_the_clock():
    @timed("evaluation")
    def evaluate() -> None:
        raise OSError("disk")

    with Clock() as clock, pytest.raises(OSError, match="disk"):
        evaluate()
    assert clock.part == "other"
    with pytest.raises(OSError, match="disk"), Clock():
        evaluate()
    with Clock() as other, pytest.raises(OSError, match="disk"):
        evaluate()
    assert set(other.spent) == {"other", "evaluation"}


def test_means_come_in_sums_and_counts_that_add_up_over_parts():
    x, mask = torch.randn(7, 5, dtype=torch.float64), torch.rand(7, 5) > 0.4
    x[0, 0], mask[0, 0] = math.nan, True
    whole = reduced({"x": mean(x, mask)})["x"]
    assert whole == pytest.approx(float(x[mask].nanmean()), rel=1e-12)
    parts = [mean(x[i : i + 2], mask[i : i + 2]) for i in range(0, 7, 2)]
    assert reduced({"x": (sum(p[0] for p in parts), sum(p[1] for p in parts))})[
        "x"
    ] == pytest.approx(whole, rel=1e-12)
    values = {
        "number": 2.5,
        "count": torch.tensor(3),
        "share": mean(torch.tensor([True, False])),
        "none": mean(x[:0]),
    }
    values = reduced(values)
    assert math.isnan(values.pop("none"))
    assert values == {"number": 2.5, "count": 3.0, "share": 0.5}
    assert reduced({}) == {}


def test_memory_counts_each_tensor_once_and_names_what_is_left():
    model = torch.nn.Linear(8, 8)
    critic = torch.nn.Sequential(model, torch.nn.Linear(8, 1))  # shares the trunk
    found = bytes_by_part(model, {"critic": critic}, {}, 100, 100 + 4 * 72 + 4 * 9 + 50)
    assert found == {
        "program": 100,
        "weights": 4 * 72,
        "critic": 4 * 9,
        "activations and the rest": 50,
    }


@pytest.mark.parametrize("method", RECIPES)
def test_memory_of_a_run_by_part(runs, method):
    summary = json.loads((runs[method] / "summary.json").read_text())
    parts = summary["memory"]
    assert sum(parts.values()) == summary["peak_memory_bytes"]
    assert parts["gradients"] == parts["weights"] + parts.get("critic", 0)
    assert parts["optimizer"] >= 2 * parts["weights"]
    assert (
        ("reference" in parts) == ("cache" in parts) == (method in ("ppo", "grpo", "pairwise-grpo"))
    )
    assert ("critic" in parts) == (method == "ppo")


def test_tokens_are_spelled_so_that_they_read_as_the_whole():
    stories = load_tokenizer(grpo.PRESETS["toy"]["model"])
    text = "Once, Zoë said 👋 to a naïve owl. "
    ids = stories(text)["input_ids"]
    spelling = token_texts(stories, ids[:2], ids[2:])
    assert len(spelling) == len(ids) - 2
    assert "".join(spelling).replace("\ufffd", "") in stories.decode(ids)


def test_run_json_tells_what_is_run(runs):
    about = json.loads((runs["grpo"] / "run.json").read_text())
    assert about["method"] == about["recipe"] == "grpo"
    assert about["steps"] == 4
    assert about["reward_weights"] == {"gold": 1.0}
    assert about["options"]["group_size"] == 8
    assert about["data"]["held out"] > 0
    assert about["example"]["prompt"]
    assert abs(about["began"] - time.time()) < 3600
    assert load_policy(str(runs["grpo"] / "model")) is not None
    assert replace(grpo.Config(**grpo.PRESETS["toy"])).keep_tokens_every == 10
