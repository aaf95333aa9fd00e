"""Every warning, on both sides of its threshold."""

import pytest

from trivet.report.warnings import warnings


def lines(steps: int = 30, **columns) -> list[dict]:
    """Metrics lines; a column is a number, or a function of the step."""
    return [
        {"step": step}
        | {
            key.replace("__", "/"): value(step) if callable(value) else value
            for key, value in columns.items()
        }
        for step in range(1, steps + 1)
    ]


def found(metrics: list[dict], **options) -> list[str]:
    return [warning.what for warning in warnings(options, metrics)]


@pytest.mark.parametrize(
    ("key", "below", "above", "what"),
    [
        ("frac_reward_zero_std", 0.79, 0.81, "Nearly all groups teach nothing"),
        ("completions__clipped_ratio", 0.24, 0.26, "Completions are cut"),
        ("clip_ratio", 0.49, 0.51, "Most tokens are clipped"),
        ("sampling__logprob_difference__mean", 0.049, 0.051, "Sampler and learner disagree"),
        ("value__explained_variance", 0.11, 0.09, "The critic does not learn"),
    ],
)
def test_levels(key, below, above, what):
    assert found(lines(**{key: below})) == []
    assert found(lines(**{key: above})) == [what]
    assert found(lines(9, **{key: above})) == []  # too few steps to say
    assert (
        found(lines(30, **{key: lambda step: above if step == 30 else below})) == []
    )  # a single step says little


def test_any_skipped_update_is_told():
    metrics = lines(5, reward=1.0)
    metrics[2]["skipped_updates"] = 1
    (warning,) = warnings({}, metrics)
    assert warning.what == "Updates were skipped"
    assert "in 1 of 5 steps, last in step 3" in warning.reason
    assert "trivet replay" in warning.help


def test_kl_per_token_and_doubling():
    assert found(lines(kl=19, completions__mean_length=40)) == []
    assert found(lines(kl=21, completions__mean_length=40)) == ["KL is running away"]
    doubling = lines(kl=lambda step: 4 if step <= 20 else 11, completions__mean_length=400)
    assert found(doubling) == ["KL is running away"]
    assert found(lines(kl=lambda step: 6 if step <= 20 else 11, completions__mean_length=400)) == []
    assert (
        found(lines(kl=lambda step: 4 if step <= 20 else 9.9, completions__mean_length=400)) == []
    )
    assert "--beta above 0" in warnings({"beta": 0.0}, doubling)[0].help
    assert "a larger --beta" in warnings({"beta": 0.1}, doubling)[0].help


def test_entropy_against_the_first_steps():
    assert found(lines(entropy=lambda step: 1.0 if step <= 20 else 0.21)) == []
    assert found(lines(entropy=lambda step: 1.0 if step <= 20 else 0.19)) == [
        "Entropy has collapsed"
    ]


def test_a_critic_that_improves_is_left_alone():
    assert found(lines(value__explained_variance=lambda step: 0.0 if step <= 20 else 0.06)) == []
    assert found(lines(value__explained_variance=lambda step: 0.0 if step <= 20 else 0.04)) == [
        "The critic does not learn"
    ]


@pytest.mark.parametrize(
    ("fall", "rise", "warns"), [(0.12, 0.12, True), (0.08, 0.12, False), (0.12, 0.08, False)]
)
def test_heldout_reward_falls_while_training_reward_rises(fall, rise, warns):
    metrics = lines(40, reward=lambda step: 1.0 if step <= 20 else 1.0 + rise, reward_std=1.0)
    for line in metrics[9::10] + metrics[4::10]:
        line["eval/reward"] = 2.0 if line["step"] <= 20 else 2.0 - fall
    assert bool(found(metrics)) == warns
    if warns:
        assert "held-out 2 around step" in warnings({}, metrics)[0].reason


def test_nothing_null_and_text_say_nothing():
    assert found([]) == []
    assert (
        found(lines(kl=None, entropy="much", clip_ratio=float("nan"), completions__mean_length=0.0))
        == []
    )


def test_help_names_the_options_that_there_are():
    metrics = lines(frac_reward_zero_std=0.9, completions__clipped_ratio=0.5)
    plain, more = (
        warnings({}, metrics),
        warnings({"dynamic_sampling": 0, "overlong_buffer": 0}, metrics),
    )
    assert all("--" in warning.help for warning in plain)
    assert "--dynamic-sampling" in more[0].help
    assert "--dynamic-sampling" not in plain[0].help
    assert "--overlong-buffer" in more[1].help
    assert "--overlong-buffer" not in plain[1].help
