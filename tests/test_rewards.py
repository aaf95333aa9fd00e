"""What is good: the contract of a reward function, weighted sums, rules, and the score and KL charge on each token."""

import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from trivet.batch import Rollouts, collate
from trivet.errors import InputError
from trivet.rewards.functions import FunctionReward, load_rewards
from trivet.rewards.reward import WeightedSum
from trivet.rewards.rules import brevity, exact_match, last_number, text_of
from trivet.rewards.shaping import kl_charged_rewards
from trivet.step.metrics import reduced

torch.set_num_threads(1)
NAN = math.nan
CHAT = [{"role": "user", "content": "2 + 2?"}]


def rollouts(
    rows: Sequence[dict[str, Any]] = ({"prompt": "a"}, {"prompt": "b"}), group_size: int = 2
) -> Rollouts:
    """Completion b is the text "text b", and b + 1 tokens of number b."""
    total = len(rows) * group_size
    groups = collate([[1]] * len(rows), [[b] * (b + 1) for b in range(total)])
    return Rollouts(
        groups=groups,
        logprobs=torch.zeros(groups.completions.shape),
        finished=torch.ones(total, dtype=torch.bool),
        texts=[f"text {b}" for b in range(total)],
        rows=rows,
    )


def scored(function: Callable[..., Any], *rows: dict[str, Any]) -> Tensor:
    return FunctionReward(function, "mine.py:f")(rollouts(rows) if rows else rollouts())


# One score per completion to one reward per token -------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.floats(0, 2))
def test_score_on_the_last_real_token_and_a_charge_on_each(seed, beta):
    torch.manual_seed(seed)
    mask = torch.rand(5, 6) < 0.6  # ragged, with holes, sometimes empty
    scores, logprobs, ref = (
        torch.randn(5).double(),
        torch.randn(5, 6).double(),
        torch.randn(5, 6).double(),
    )
    found = kl_charged_rewards(scores, logprobs - ref, mask, beta=beta)
    expected = torch.zeros(5, 6).double()
    for b in range(5):
        real = mask[b].nonzero()[:, 0].tolist()
        for t in real:
            expected[b, t] = -beta * (logprobs[b, t] - ref[b, t])
        if real:
            expected[b, real[-1]] += scores[b]
    assert_close(found, expected)


def test_token_rewards_sum_to_the_score_minus_the_charge_of_the_text():
    scores, logprobs, ref = (
        torch.randn(3).double(),
        torch.randn(3, 4).double(),
        torch.randn(3, 4).double(),
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    drift = [
        float((logprobs - ref)[b, :n].sum()) for b, n in enumerate((4, 2, 1))
    ]  # log pi_old / pi_ref of the text
    summed = kl_charged_rewards(scores, logprobs - ref, mask, beta=0.3).sum(1)
    assert_close(summed, scores - 0.3 * torch.tensor(drift).double())


def test_without_a_charge_the_score_stands_alone_and_padding_is_nothing():
    mask = torch.tensor([[True, True, False]])
    anything = torch.tensor([[-1.0, -2.0, NAN]])
    assert kl_charged_rewards(torch.tensor([5.0]), anything, mask, beta=0.0).tolist() == [
        [0.0, 5.0, 0.0]
    ]


def test_saying_what_the_reference_finds_unlikely_costs_reward():
    likely, unlikely, mask = torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), torch.tensor([[True]])
    assert kl_charged_rewards(torch.zeros(1), likely - unlikely, mask, beta=0.5).tolist() == [
        [-1.0]
    ]


# Weighted sums ------------------------------------------------------------------------------------------------------


def fixed(*values: float) -> Callable[[Rollouts], Tensor]:
    return lambda _: torch.tensor(values, dtype=torch.float32)


def test_weighted_sum_keeps_its_parts_and_their_means():
    reward = WeightedSum({"a": fixed(1, 2, 3), "b": fixed(10, 20, NAN)}, [1.0, -0.5])
    assert reward(rollouts()).tolist() == [-4.0, -8.0, 3.0]
    assert reward.parts["a"].tolist() == [1.0, 2.0, 3.0]
    assert reduced(reward.metrics()) == {
        "rewards/a/mean": 2.0,
        "rewards/b/mean": 15.0,
        "rewards/unscored": 1.0,
    }


def test_where_no_reward_has_an_opinion_the_sum_has_none():
    reward = WeightedSum({"a": fixed(1, NAN, NAN), "b": fixed(NAN, NAN, 5)}, [2, 3])
    assert_close(reward(rollouts()), torch.tensor([2.0, NAN, 15.0]), equal_nan=True)


def test_a_weight_of_zero_only_logs():
    reward = WeightedSum({"used": fixed(1, NAN), "watched": fixed(50, 70)}, [1.0, 0.0])
    assert_close(reward(rollouts()), torch.tensor([1.0, NAN]), equal_nan=True)
    assert reduced(reward.metrics())["rewards/watched/mean"] == 60.0


def test_everything_scored_says_nothing_of_unscored():
    reward = WeightedSum({"a": fixed(1, 2)}, [1.0])
    reward(rollouts())
    assert reduced(reward.metrics()) == {"rewards/a/mean": 1.5}


# Functions: what they are given -------------------------------------------------------------------------------------


def seen_by(*rows: dict[str, Any]) -> dict[str, Any]:
    """All that a function with **columns is given."""
    seen: dict[str, Any] = {}

    def f(**columns):
        seen.update(columns)
        return [0.0] * len(columns["completions"])

    scored(f, *rows)
    return seen


def test_prompts_and_columns_come_repeated_for_every_completion_of_their_row():
    seen = seen_by({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2, "level": "hard"})
    assert seen["prompts"] == ["a", "a", "b", "b"]
    assert seen["completions"] == ["text 0", "text 1", "text 2", "text 3"]
    assert seen["answer"] == [1, 1, 2, 2]
    assert seen["level"] == [None, None, "hard", "hard"]
    assert "prompt" not in seen


def test_a_conversation_is_answered_by_messages_and_a_text_by_text():
    seen = seen_by({"prompt": CHAT}, {"prompt": "b"})
    assert seen["prompts"] == [CHAT, CHAT, "b", "b"]
    assert seen["completions"][1] == [{"role": "assistant", "content": "text 1"}]
    assert seen["completions"][2] == "text 2"


def test_completion_ids_are_the_sampled_tokens_without_padding():
    assert seen_by()["completion_ids"] == [[0], [1, 1], [2, 2, 2], [3, 3, 3, 3]]


def test_a_function_gets_only_what_it_asks_for():
    def f(completions, answer, scale=10):
        return [scale * a for a in answer]

    rows = {"prompt": "a", "answer": 1, "other": 0}, {"prompt": "b", "answer": 2, "other": 0}
    assert scored(f, *rows).tolist() == [10.0, 10.0, 20.0, 20.0]


def test_a_column_overrides_a_default():
    def f(completions, scale=10):
        return scale

    assert scored(f, {"prompt": "a", "scale": 3}).tolist() == [3.0, 3.0]


def test_logged_numbers_are_those_of_the_last_call():
    calls = iter([{"first": 1.0, "both": 2.0}, {"both": 3.0}])

    def f(completions, log_metric):
        for name, value in next(calls).items():
            log_metric(name, value)
        return [0.0] * len(completions)

    reward = WeightedSum({"f": FunctionReward(f, "mine.py:f")}, [1.0])
    reward(rollouts())
    assert reduced(reward.metrics()) == {"rewards/f/mean": 0.0, "first": 1.0, "both": 2.0}
    reward(rollouts())
    assert reduced(reward.metrics()) == {"rewards/f/mean": 0.0, "both": 3.0}


def test_a_logged_tensor_becomes_a_number():
    reward = FunctionReward(
        lambda completions, log_metric: log_metric("m", torch.tensor(2)) or [0] * 4, "mine.py:f"
    )
    reward(rollouts())
    assert [(name, type(value), value) for name, value in reward.logged.items()] == [
        ("m", float, 2.0)
    ]


# Functions: what they return ----------------------------------------------------------------------------------------


def test_none_is_no_opinion_and_the_result_is_float32():
    found = scored(lambda completions: [1, None, True, -2.5])
    assert_close(found, torch.tensor([1.0, NAN, 1.0, -2.5]), equal_nan=True)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ([1.0] * 3, "returned 3 values; expected a list of 4 numbers, one per completion"),
        ([1.0] * 5, "returned 5 values; expected a list of 4 numbers"),
        (1.0, "returned float; expected a list of 4 numbers"),
        (None, "returned NoneType; expected a list of 4 numbers"),
        (
            [0.0, 1.0, NAN, 1.0],
            "returned nan for completion 2; return a finite number, or None for no opinion",
        ),
        ([0.0, -math.inf, 1.0, 1.0], "returned -inf for completion 1"),
        ([0.0, 1.0, 1.0, "good"], "returned 'good' for completion 3"),
        ("good", "returned 'g' for completion 0"),
    ],
)
def test_a_wrong_result_is_told_in_words(returned, told):
    with pytest.raises(InputError, match="reward mine.py:f " + re.escape(told)):
        scored(lambda completions: returned)


def test_an_error_inside_is_told_with_its_kind_and_line():
    def f(completions):
        return [1 / 0 for _ in completions]

    line = f.__code__.co_firstlineno + 1
    with pytest.raises(
        InputError, match=f"mine.py:f raised ZeroDivisionError in its line {line}: division"
    ) as caught:
        scored(f)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_exits_is_told_and_does_not_end_the_run():
    with pytest.raises(InputError, match="raised SystemExit"):
        scored(lambda completions: sys.exit(3))


def test_a_column_that_the_data_does_not_have_is_named_with_those_it_has():
    with pytest.raises(
        InputError,
        match=r"mine.py:f asks for column 'answer', which the data does not have; it has .*level",
    ):
        scored(lambda completions, answer: answer, {"prompt": "a", "level": 3})


@pytest.mark.parametrize("function", [exact_match, last_number])
def test_the_built_in_rules_say_so_when_there_is_no_answer(function):
    with pytest.raises(
        InputError, match=r"asks for column 'answer', which the data does not have; it has .*level"
    ):
        scored(function, {"prompt": "a", "level": 3})


@pytest.mark.parametrize(
    "as_what", [lambda x: x, lambda x: x.double().numpy(), lambda x: list(x.numpy())]
)
def test_tensors_and_arrays_are_lists_of_numbers(as_what):
    assert scored(lambda completions: as_what(torch.arange(4.0))).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_list_of_tensors_of_one_number_is_a_list_of_numbers():
    assert scored(lambda completions: list(torch.arange(4.0))).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_number_too_large_for_float32_is_refused():
    with pytest.raises(InputError, match=r"returned 1e\+39 for completion 0"):
        scored(lambda completions: [1e39, 0, 0, 0])


# Names to rewards ---------------------------------------------------------------------------------------------------


def load(*specs: str, weights: Sequence[float] = ()) -> WeightedSum:
    return load_rewards(specs, weights, None, like=None)


def test_rewards_load_from_a_built_in_a_file_and_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [2.0] * len(completions)\n")
    reward = load(
        "brevity",
        f"{tmp_path}/mine.py:f",
        "trivet.rewards.rules:exact_match",
        weights=[100.0, 1.0, 4.0],
    )
    rows = {"prompt": "a", "answer": "text 1"}, {"prompt": "b", "answer": "no"}
    assert reward(rollouts(rows)).tolist() == [0.0, 4.0, 0.0, 0.0]
    assert list(reward.parts) == ["brevity", "f", "exact_match"]


def test_without_weights_rewards_add_up_and_two_of_one_name_both_count(tmp_path):
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / f"{name}.py").write_text(
            f"def f(completions):\n    return [{value}] * len(completions)\n"
        )
    reward = load(f"{tmp_path}/one.py:f", f"{tmp_path}/two.py:f")
    assert reward(rollouts()).tolist() == [3.0] * 4
    assert len(reward.metrics()) == 2


def test_the_same_reward_named_twice_counts_twice_or_is_refused():
    try:
        reward = load("brevity", "exact_match", "brevity")
    except InputError:
        return
    assert reward(rollouts([{"prompt": "a", "answer": "b"}])).tolist() == pytest.approx(
        [-0.04, -0.04]
    )


@pytest.mark.parametrize(
    ("specs", "weights", "told"),
    [
        ([], [], "no reward was named; give --reward one of exact_match, last_number, brevity"),
        ([""], [], "no reward was named"),
        (["brevity"], [1.0, 2.0], "--reward-weights has 2 numbers for 1 rewards"),
        (["brevity", "brevity"], [0.0, 0.0], "not all 0"),
        (
            ["brevty"],
            [],
            r"reward brevty: not a built-in \(exact_match, last_number, brevity, code\)",
        ),
        (["absent.py:f"], [], "reward absent.py:f: no file absent.py"),
        (["absent_module:f"], [], "reward absent_module:f: no module absent_module"),
        (
            ["trivet.rewards.rules:f"],
            [],
            "has no function f; it has text_of, exact_match, last_number, brevity",
        ),
    ],
)
def test_a_reward_that_is_not_there_is_told_in_words(specs, weights, told):
    with pytest.raises(InputError, match=told):
        load(*specs, weights=weights)


def test_a_file_that_does_not_import_is_told_with_its_error(tmp_path):
    (tmp_path / "broken.py").write_text("import absent_module\n")
    with pytest.raises(
        InputError, match=r"broken.py can't be imported: ModuleNotFoundError: .*absent_module"
    ):
        load(f"{tmp_path}/broken.py:f")


# Rules --------------------------------------------------------------------------------------------------------------


def test_text_of_messages_is_their_content_one_after_the_other():
    assert text_of("as it is") == "as it is"
    assert (
        text_of([{"role": "assistant", "content": "one "}, {"role": "assistant", "content": "two"}])
        == "one two"
    )


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris ", 1),
        ("4", 4, 1),
        ("paris", "Paris", 0),
        ("Paris.", "Paris", 0),
        ("", "x", 0),
    ],
)
def test_exact_match(completion, answer, reward):
    assert exact_match([completion], [answer]) == [reward]
    assert exact_match([[{"role": "assistant", "content": completion}]], [answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("so it is 72", "72", 1),
        ("first 3, then 72.", 72, 1),
        ("72.0", "72", 1),
        ("$1,072 in all", "1072", 1),
        ("1072", "6 + 1,066 = ...\n#### 1,072", 1),  # an answer as GSM8K writes it
        ("-5", "-5", 1),
        ("0.5", "0.50", 1),
        ("5", "-5", 0),
        ("72, no: 73", "72", 0),
        ("72 then 73", "73", 1),
        ("none", "72", 0),
        ("none", "none", 0),
        ("", "0", 0),
    ],
)
def test_last_number(completion, answer, reward):
    assert last_number([completion], [answer]) == [reward]


def test_last_number_after_a_hyphen_is_not_negative():
    assert last_number(["10-3 = 7, so 5-7"], ["7"]) == [1]


def test_brevity_is_minus_the_words_in_hundreds():
    assert brevity(["", "one", "one  two\nthree"]) == [0.0, -0.01, -0.03]


@pytest.mark.parametrize("rule", [exact_match, last_number, brevity])
def test_rules_score_each_completion_by_its_own_row(rule):
    completions, answer = ["1", "2 or 3", "4"], ["1", "3", "5"]
    alone = [rule([c], answer=[a])[0] for c, a in zip(completions, answer, strict=True)]
    assert rule(completions, answer=answer, level=["easy"] * 3) == alone
    assert len(set(alone)) > 1
