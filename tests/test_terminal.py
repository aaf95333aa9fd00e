"""What a run says on the screen, of numbers that were written by hand."""

import json
import math
from types import SimpleNamespace

import pytest

from trivet.recipes import dpo, grpo
from trivet.report.terminal import Terminal


@pytest.fixture
def told(tmp_path, capsys):
    """Shows these steps to a terminal, the first `before` only in the record, as after a resume; returns what it printed."""

    def told(lines, config=None, before=0, completions=(), record=None):
        written = "".join(json.dumps(line).replace("NaN", "null") + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(written if record is None else record)
        run = SimpleNamespace(steps=lines[-1]["step"], device="cpu")
        example = {"prompt": "One day [b]", "completions": list(completions)}
        config = config or grpo.Config()
        launched = SimpleNamespace(
            run=run, out=tmp_path, config=config, method="grpo", start_from="here", counts={}
        )
        launched.example = lambda: example
        terminal = Terminal()
        terminal(launched, 0, {})
        for line in lines[before:]:
            terminal(launched, line["step"], line)
        return capsys.readouterr().out

    return told


def row(said, name):
    """The cells of one row of the table at the end."""
    return next(line.split()[1:] for line in said.splitlines() if line.split()[:1] == [name])


def test_the_first_step_is_that_of_the_run_not_that_after_a_resume(told):
    lines = [
        {"step": step, "seconds": 1.0 * step, "reward": step / 8, "kl": 1.0} for step in range(1, 9)
    ]
    lines[0]["kl"] = math.nan  # null in the record
    for before in (0, 5):
        said = told(lines, before=before)
        assert row(said, "reward") == ["0.125", "1"]
        assert row(said, "kl") == ["1"]
    assert "8 steps in 0:08" in said


def test_a_record_that_can_not_be_read_does_not_end_the_run(told):
    lines = [{"step": step, "seconds": 1.0 * step, "reward": step / 2} for step in (1, 2)]
    assert row(told(lines, record="{oops\n{}\n"), "reward") == ["0.5", "1"]
    assert row(told(lines, record=""), "reward") == ["0.5", "1"]


def test_warnings_of_the_page_end_the_run(told):
    lines = [
        {"step": step, "seconds": 1.0 * step, "kl": 20.0, "completions/mean_length": 30.0}
        for step in range(1, 12)
    ]
    said = told(lines, grpo.Config(beta=0.0))
    assert said.splitlines()[-1] == (
        "  KL is running away: 20 nats per completion, 0.67 per token (over 0.5); --beta above 0, or a smaller --lr"
    )
    assert "a larger --beta, or" in told(lines, grpo.Config(beta=0.1))
    assert "running away" not in told(lines[:9])


def test_the_speed_leaves_evaluations_out(told):
    lines = [{"step": step, "seconds": 1.0 * step, "tokens/trained": 100} for step in (1, 2, 3)]
    lines[1:] = [line | {"tokens/trained": 300} for line in lines[1:]]
    assert "  300 tokens/s" in told(lines)
    lines[2] |= {"seconds": 13.0, "time/evaluation": 10.0}
    assert "  300 tokens/s" in told(lines)


@pytest.mark.parametrize(
    ("accuracy", "margin"), [("accuracy", "margin"), ("rewards/accuracies", "rewards/margins")]
)
def test_an_accuracy_of_ties_says_so(told, accuracy, margin):
    lines = [{"step": step, "seconds": 1.0 * step, accuracy: 0.0, margin: 0.0} for step in (1, 2)]
    lines[1] |= {accuracy: 0.75, margin: 0.1}
    assert row(told(lines, dpo.Config()), accuracy) == ["0", "(all", "tied)", "0.75"]
    lines[0] |= {margin: -0.1}
    assert row(told(lines, dpo.Config()), accuracy) == ["0", "0.75"]
    assert row(told([line | {"reward": 0.0} for line in lines]), "reward") == ["0", "0"]


def test_what_is_learned_is_only_named_where_there_is_something(told):
    lines = [{"step": 1, "seconds": 1.0}]
    assert "  one prompt:\n  One day [b]\n" in told(lines)
    said = told(lines, completions=[[(" the fox", True)]])
    assert "  one example, prompt and learned tokens:\n  One day [b]\n  →  the fox\n" in said
