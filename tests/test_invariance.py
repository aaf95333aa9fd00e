"""A step's loss and gradient do not depend on how it is laid out: every recipe, through a real small model.

Split into microbatches, order of rows, padding (amount, side, id), shared prompts or plain ones, one process or two.
"""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, Qwen3Config

from conftest import SMALL, ragged, tiny
from steps import Gradient, examples, recipe_step, rollouts_of
from trivet.batch import Groups, microbatches
from trivet.model.forward import token_logprobs
from trivet.recipes import dpo, grpo, kto, offline, pairwise_grpo, ppo, reward_model, sft
from trivet.recipes.objective import Objective
from trivet.recipes.offline import to_groups
from trivet.step.devices import OneProcess

POLICY = tiny()
PROMPTS, SIZE = 5, 4
SINGLES, PAIRS, GROUPS = ragged(6, 1), ragged(5, 2, seed=1), ragged(PROMPTS, SIZE, seed=2)
REWARDS = torch.randn(PROMPTS * SIZE, generator=torch.Generator().manual_seed(0))
Steps = list[tuple[float, Gradient]]


def moved(model: Any, seed: int) -> Any:
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return other


REFERENCE, OLD = moved(POLICY, 1), moved(POLICY, 2)
torch.manual_seed(0)
SCORER = AutoModelForSequenceClassification.from_config(
    Qwen3Config(**SMALL, num_labels=1, pad_token_id=60)
).eval()
OLD_LOGPROBS = token_logprobs(OLD, GROUPS).detach()


def step(
    method: str, *, order: Tensor | None = None, groups: Groups | None = None, budget: int = 90
) -> Steps:
    """The step of one method; order: of the prompts; groups: the same, laid out otherwise."""
    if method in ("sft", "reward-model", "dpo", "kto"):
        recipe, model, rows, options = {
            "sft": (sft, POLICY, SINGLES, {}),
            "reward-model": (reward_model, SCORER, PAIRS, {"margin": 0.3, "center": 0.1}),
            "dpo": (dpo, POLICY, PAIRS, {"sft_weight": 0.5}),
            "kto": (dpo, POLICY, SINGLES, {"loss": "kto"}),
        }[method]
        data = examples(rows, [{"label": p % 2 == 0} for p in range(len(rows.prompts))])
        if (
            order is not None and method != "kto"
        ):  # its reference point pairs neighbors, so there order is meant
            data = [data[p] for p in order.tolist()]
        if method in ("dpo", "kto"):
            options = {**options, "reference": REFERENCE}
        return recipe_step(recipe, model, data, microbatch_tokens=budget, **options)
    laid, rewards, old = groups or GROUPS, REWARDS, OLD_LOGPROBS
    if groups is not None:
        old = torch.zeros(laid.completions.shape).masked_scatter(
            laid.mask, OLD_LOGPROBS[GROUPS.mask]
        )
    data = examples(GROUPS)
    if order is not None:
        rows = (order[:, None] * SIZE + torch.arange(SIZE)).flatten()
        laid, rewards, old, data = (
            laid.select(order),
            rewards[rows],
            old[rows],
            [data[p] for p in order.tolist()],
        )
    given: dict[str, Any] = {
        "reference": REFERENCE,
        "rollouts": rollouts_of(laid, old),
        "rewards": rewards,
    }
    given |= {"group_size": SIZE, "microbatch_tokens": budget}
    if method == "ppo":
        return recipe_step(ppo, POLICY, data, critic=SCORER, epochs_per_batch=1, **given)
    if method == "pairwise-grpo":
        return recipe_step(pairwise_grpo, POLICY, data, **given)
    options = {
        "grpo": {},
        "deepseekmath": grpo.PRESETS["deepseekmath"],
        "dr-grpo": grpo.PRESETS["dr-grpo"],
    }[method]
    return recipe_step(grpo, POLICY, data, before=OLD, epochs_per_batch=2, **given, **options)


METHODS = (
    "sft",
    "reward-model",
    "dpo",
    "kto",
    "ppo",
    "grpo",
    "deepseekmath",
    "dr-grpo",
    "pairwise-grpo",
)
SAMPLING = METHODS[4:]


def same(found: Steps, expected: Steps) -> None:
    assert len(found) == len(expected)
    for (loss, gradient), (loss_expected, gradient_expected) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_expected, rel=2e-5, abs=2e-6)
        assert gradient.keys() == gradient_expected.keys()
        largest = max(float(g.abs().max()) for g in gradient_expected.values())
        assert largest > 1e-3
        for name, g in gradient_expected.items():
            assert_close(gradient[name], g, rtol=1e-4, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("method", METHODS)
def test_split_into_microbatches_down_to_one_prompt_at_a_time(method, budget):
    same(step(method, budget=budget), step(method))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "kto"])
def test_order_of_rows(method):
    count = {"sft": 6}.get(method, 5)
    same(
        step(method, order=torch.randperm(count, generator=torch.Generator().manual_seed(3))),
        step(method),
    )


def wider(groups: Groups, before: int, after: int, pad_id: int) -> Groups:
    """More padding on either side, of another id."""

    def stretch(x: Tensor, real: Tensor) -> Tensor:
        fill = pad_id if x.dtype == torch.int64 else 0
        x = x.masked_fill(~real, fill) if x.dtype == torch.int64 else x
        edges = [x.new_full((len(x), n), fill) for n in (before, after)]
        return torch.cat([edges[0], x, edges[1]], 1)

    prompts, completions = ("prompts", "prompt_mask"), ("completions", "mask", "present")
    changed = {name: stretch(getattr(groups, name), groups.prompt_mask) for name in prompts}
    changed |= {name: stretch(getattr(groups, name), groups.present) for name in completions}
    return dataclasses.replace(groups, **changed)


@pytest.mark.parametrize(("before", "after", "pad_id"), [(3, 0, 0), (0, 4, 7), (2, 1, 60)])
@pytest.mark.parametrize("method", METHODS)
def test_padding_amount_side_and_id(method, before, after, pad_id):
    if method in SAMPLING:
        found = step(method, groups=wider(GROUPS, before, after, pad_id))
    else:
        recipe = {"sft": sft, "reward-model": reward_model, "dpo": dpo, "kto": kto}[method]
        padded = lambda rows, device: wider(to_groups(rows, device), before, after, pad_id)  # noqa: E731
        with patch.object(recipe, "to_groups", padded), patch.object(offline, "to_groups", padded):
            found = step(method)
    same(found, step(method))


@pytest.mark.parametrize("method", METHODS)
def test_prompts_shared_or_repeated_in_plain_padded_rows(method):
    expected = step(method)
    with (
        patch("trivet.model.forward.shares_prefix", lambda model: False),
        patch("trivet.model.scalar.shares_prefix", lambda model: False),
    ):
        found = step(method)
    same(found, expected)


def share_of(rank: int) -> Any:
    """OneProcess.microbatches, of which a process visits every second one."""

    def mine(
        devices: OneProcess, groups: Groups, budget: int, *, filled: Any, **options: Any
    ) -> Iterator[tuple[Tensor, Groups]]:
        for number, part in enumerate(microbatches(groups, budget, **options)):
            if number % 2 == rank:
                yield part

    return mine


def two_processes(rank: int, folder: str) -> None:
    """One of two gloo processes: its share of every method's step, summed over both; process 0 compares."""
    import torch.distributed as distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for method in METHODS:
        expected = step(method, budget=40)
        with patch.object(OneProcess, "microbatches", share_of(rank)):
            partial = step(method, budget=40)
        summed: Steps = []
        for (loss, gradient), (_, full) in zip(partial, expected, strict=True):
            total = torch.tensor(loss)
            distributed.all_reduce(total)
            gradient = {name: gradient.get(name, torch.zeros_like(g)) for name, g in full.items()}
            for g in gradient.values():
                distributed.all_reduce(g)
            summed.append((float(total), gradient))
        assert any(abs(a[0] - b[0]) > 1e-6 for a, b in zip(partial, expected, strict=True)), (
            "nothing was shared"
        )
        same(summed, expected)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_each_with_a_share_of_the_step(tmp_path):
    """The totals of the step are all that a process has to know of the others."""
    code = (
        "import sys, test_invariance; test_invariance.two_processes(int(sys.argv[1]), sys.argv[2])"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path)],
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said


def test_the_first_pass_of_clipped_grpo_has_a_ratio_of_exactly_1():
    seen: list[Tensor] = []
    objective_of = grpo.objective_of

    def looked_at(config: grpo.Config) -> Objective:
        objective = objective_of(config)

        def look(logprobs: Tensor, old: Tensor, *rest: Tensor) -> Tensor:
            seen.append((logprobs - old).exp().detach())
            return objective.policy_loss(logprobs, old, *rest)

        return objective.but(policy_loss=look)

    with patch.object(grpo, "objective_of", looked_at):
        step("grpo")
    passes = len(seen) // 2
    assert all((ratio == 1).all() for ratio in seen[:passes])
    assert not all((ratio == 1).all() for ratio in seen[passes:])
