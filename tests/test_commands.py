"""generate and score: completions of prompts, rewards of rows; and what the command line says of itself."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import typing

import pytest
from transformers import AutoModelForSequenceClassification

from runs import write_quickstart, write_run
from trivet.cli.help import COMMAND_OPTIONS, file_and_class
from trivet.cli.main import main
from trivet.recipes import METHODS
from trivet.step.option_texts import PACKAGE, options_of
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
    arguments = [
        "generate",
        "--model",
        STORIES["model"],
        "--data",
        STORIES["data"],
        "--limit",
        "2",
        "--out",
        str(out),
    ]
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
    assert "1 of 2 pairs ranked correctly (50.0%)" in capsys.readouterr().out
    assert [json.loads(line)["score_chosen"] for line in out.read_text().splitlines()] == [1.0, 0.0]


def test_compare_takes_a_folder_and_says_what_was_not_generated_by_a_dash(tmp_path, capsys):
    runs = write_quickstart(tmp_path, steps=3)
    for run, gold in zip(runs, (1.49, None, 4.6, 4.597, 12.0, 0.005), strict=True):
        summary = json.loads((run / "summary.json").read_text())
        summary |= {"tokens_generated": 0} if run.name in ("sft", "reward-model", "dpo") else {}
        summary["eval"] |= {"eval/gold": gold, "eval/gold_se": 0.034} if gold else {}
        (run / "summary.json").write_text(json.dumps(summary))
    assert main(["compare", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert main(["compare", *map(str, runs)]) == 0
    assert capsys.readouterr().out == said
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in said.splitlines()
        if line.startswith("│")
    ][:6]
    assert [row[0] for row in rows] == [run.name for run in runs]
    assert [row[-2] == "-" for row in rows] == [True] * 3 + [False] * 3
    assert [row[1] for row in rows] == [
        "1.49 ± 0.03",
        "",
        *(f"{x} ± 0.03" for x in ("4.60", "4.60", "12.00", "0.01")),
    ]
    going = write_run(tmp_path / "going", "grpo", 3, done=False)
    assert main(["compare", str(tmp_path)]) == 2
    assert f"{going} has not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["score"], ["generate", "--model", STORIES["model"]], ["compare", "."]],
)
def test_missing_arguments_are_one_sentence(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"trivet {arguments[0]}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_device_that_is_not_there_is_one_sentence(command, capsys):
    given = {
        "generate": ["--prompt", "One day"],
        "score": ["--data", STORIES["data"], "--reward", "brevity"],
    }[command]
    assert main([command, "--model", STORIES["model"], *given, "--device", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "--device nonsense" in said
    assert said.count("\n") == 1


def test_a_model_that_scores_is_not_asked_to_write(tmp_path, capsys):
    AutoModelForSequenceClassification.from_pretrained(
        STORIES["model"], num_labels=1
    ).save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "One day"]) == 2
    assert "needs a causal language model" in capsys.readouterr().err


def test_help_is_quick_to_import():
    heavy = "import sys; import trivet.cli.main; assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0
    heavy = "import sys; from trivet.cli.main import main; main(['ppo', '--help']); assert not {'torch', 'transformers'} & set(sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", heavy], check=False, capture_output=True).returncode
        == 0
    )


@pytest.mark.parametrize("command", [*METHODS, *COMMAND_OPTIONS])
def test_help_tells_every_option_as_its_config_has_it(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file, kind = file_and_class(command)
    module = ".".join(("trivet", *file.relative_to(PACKAGE).with_suffix("").parts))
    config = getattr(importlib.import_module(module), kind)
    options = options_of(file, kind)
    assert {name: option.default for name, option in options.items()} == vars(config())
    assert all(option.text for option in options.values())
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert config.__doc__.split("\n")[0] in said
    for field in dataclasses.fields(config):
        assert re.search(
            rf"^--{field.name.replace('_', '-')} .*{re.escape(options[field.name].text[:20])}",
            said,
            re.M,
        )
        choices = getattr(typing.get_type_hints(config)[field.name], "__args__", ())
        assert all(str(choice) in said for choice in choices if isinstance(choice, str))
    for preset in getattr(importlib.import_module(config.__module__), "PRESETS", ()):
        assert preset in said.rpartition("--preset")[2]


def test_help_stands_in_groups_and_tells_what_is_on(capsys):
    assert main(["grpo", "--reward", "gold", "-h"]) == 0
    said = capsys.readouterr().out
    heads = [
        "Model, data",
        "--model",
        "--trust",
        "Steps",
        "--lr",
        "Rewards",
        "--reward",
        "Method options",
        "--beta",
        "--preset",
    ]
    assert sorted(heads, key=lambda word: said.index(f"\n{word}")) == heads
    assert main(["ppo", "-h"]) == 0
    assert re.search(r"--whiten-advantages [^-]*\[on; --no-...", capsys.readouterr().out)


def test_help_of_a_recipe_of_ones_own_is_read_from_its_file(tmp_path, capsys):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from trivet.recipes import grpo\n"
        "class Config(grpo.Config):\n"
        "    'Mine.'\n"
        "    twice: float = 2 * 0.5\n"
        "    'Computed.'\n"
    )
    assert main(["run", str(recipe), "-h"]) == 0
    said = capsys.readouterr().out
    assert "Mine." in said
    assert re.search(r"^--twice FLOAT +Computed\. \[default 2 \* 0\.5\]", said, re.M)
    assert re.search(r"^--group-size INT ", said, re.M)
    for content in (b"def (", b"\xff", b"x = 1"):
        recipe.write_bytes(content)
        assert main(["run", str(recipe), "-h"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"trivet run: {recipe}")
        assert told.count("\n") == 1
