"""generate and score: completions of prompts, rewards of rows; and what the command line says of itself."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForSequenceClassification

from trivet.cli import main
from trivet.toy import STORIES


def test_generate_prints_completions_and_repeats_with_the_seed(capsys):
    arguments = [
        "generate",
        "--model",
        STORIES["model"],
        "--prompt",
        "One day, Mia the fox met a small bird.",
        "--group-size",
        "3",
    ]
    printed = []
    for seed in ("0", "0", "1"):
        assert main([*arguments, "--max-completion-tokens", "40", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert len(printed[0].splitlines()) == 3
    assert printed[0] == printed[1] != printed[2]


def test_generate_writes_json_lines_with_every_column_and_never_over_a_file(tmp_path, capsys):
    out = tmp_path / "written.jsonl"
    arguments = ["generate", "--model", STORIES["model"], "--data", STORIES["data"], "--limit", "2", "--out", str(out)]
    assert main([*arguments, "--max-completion-tokens", "20", "--temperature", "0"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2
    assert {"prompt", "chosen", "completion", "finished"} <= set(rows[0])
    assert main(arguments) == 2
    assert "written.jsonl" in capsys.readouterr().err


def test_score_says_how_many_pairs_a_reward_ranks_right(tmp_path, capsys):
    rows = [
        {"prompt": "2+2=", "answer": "4", "chosen": "4", "rejected": "5"},
        {"prompt": "1+1=", "answer": "2", "chosen": "3", "rejected": "2"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scored.jsonl"
    arguments = [
        "score",
        "--model",
        STORIES["model"],
        "--data",
        str(tmp_path / "pairs.jsonl"),
        "--reward",
        "exact_match",
    ]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "1 of 2 pairs ranked right (50.0%)" in capsys.readouterr().out
    assert [json.loads(line)["score_chosen"] for line in out.read_text().splitlines()] == [1.0, 0.0]


@pytest.mark.parametrize(
    "arguments", [["generate"], ["score"], ["generate", "--model", STORIES["model"]], ["compare", "."]]
)
def test_missing_arguments_are_one_sentence(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"trivet {arguments[0]}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_device_that_is_not_there_is_one_sentence(command, capsys):
    given = {"generate": ["--prompt", "One day"], "score": ["--data", STORIES["data"], "--reward", "brevity"]}[command]
    assert main([command, "--model", STORIES["model"], *given, "--device", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "--device nonsense" in said
    assert said.count("\n") == 1


def test_a_model_that_scores_is_not_asked_to_write(tmp_path, capsys):
    AutoModelForSequenceClassification.from_pretrained(STORIES["model"], num_labels=1).save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "One day"]) == 2
    assert "needs a causal language model" in capsys.readouterr().err


def test_help_is_quick_to_import():
    heavy = "import sys; import trivet.cli; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
