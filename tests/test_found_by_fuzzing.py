"""What fuzz.py and chaos.py found, one test each."""

import json
import math
import re
import shutil
import sys

import pytest

from conftest import few_rows
from fuzz_outside import rollouts, try_judge
from test_resume import KilledError, config, killed_after, numbers, same
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.recipes import sft
from trivet.rewards.functions import FunctionReward
from trivet.runner.launch import launch
from trivet.runner.resume import resume
from trivet.store.reading import read_object
from trivet.store.record import _append, short


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed after step 3, and one that was left alone."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(KilledError):
        launch(config(sft, folder / "killed"), killed_after(3))
    return folder / "killed", launch(config(sft, folder / "whole"))


@pytest.mark.parametrize(
    "line", ["null", "[]", "5", "{}", '{"step": null}', '{"step": "1"}', "[" * 9000, '"a']
)
def test_lines_of_a_record_that_are_no_steps_are_cut(tmp_path, killed, line):
    shutil.copytree(killed[0], tmp_path / "r")
    kept = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "r" / "metrics.jsonl").write_text("\n".join([kept[0], line, *kept[1:], ""]))
    same(killed[1], resume(tmp_path / "r"))


@pytest.mark.parametrize("content", ["[]", "5", "null", "[" * 9000, "{"])
def test_a_json_file_that_holds_no_object_is_as_good_as_none(tmp_path, killed, content):
    (tmp_path / "a.json").write_text(content)
    assert read_object(tmp_path / "a.json") == {}
    shutil.copytree(killed[0], tmp_path / "r")
    (tmp_path / "r" / "run.json").write_text(content)
    same(killed[1], resume(tmp_path / "r"))


@pytest.mark.parametrize("fact", ["method", "recipe"])
@pytest.mark.parametrize(
    "said", ["sgt", "", 5, ["sft"], "../sft", "grpo_variants", "trivet.recipes.sft", "\0"]
)
def test_a_directory_of_a_method_that_is_none_can_not_be_resumed(
    tmp_path, killed, fact, said, capsys
):
    shutil.copytree(killed[0], tmp_path / "r")
    (tmp_path / "r" / "run.json").write_text(json.dumps({fact: said}))
    lines = (tmp_path / "r" / "config.toml").read_text().splitlines()[1:]
    (tmp_path / "r" / "config.toml").write_text("\n".join(lines))
    assert main(["resume", str(tmp_path / "r")]) == 2
    told = capsys.readouterr().err
    assert (
        f"{tmp_path / 'r'} is not a run directory: it has no config.toml that names a method"
        in told
    )
    assert told.count("\n") == 1
    with pytest.raises(InputError, match="is not a run directory"):
        resume(tmp_path / "r")


def test_a_recipe_of_ones_own_that_is_gone_or_broken_is_a_sentence(tmp_path, capsys):
    """And its config may be any Python: early.py reads only those of Trivet."""
    recipe, out = tmp_path / "mine.py", tmp_path / "r"
    recipe.write_text(OWN)
    flags = [
        "--preset",
        "toy",
        "--steps=2",
        "--prompts-per-step=2",
        "--eval-fraction=0",
        "--save-every=1",
        "--data",
        few_rows(),
    ]
    assert main(["run", str(recipe), *flags, "--out", str(out)]) == 0
    (out / "summary.json").unlink()
    shutil.rmtree(out / "model")
    capsys.readouterr()
    for broken, said in (
        (lambda: recipe.write_text("def ("), r"recipe .*mine\.py.*: SyntaxError"),
        (recipe.unlink, "its recipe, .*mine.py, no longer exists"),
    ):
        broken()
        sys.modules.pop("trivet_recipe_mine", None)
        assert main(["resume", str(out)]) == 2
        told = capsys.readouterr().err
        assert re.search(said, told)
        assert told.count("\n") == 1
    recipe.write_text(OWN)
    assert main(["resume", str(out)]) == 0


OWN = """
from dataclasses import dataclass
from trivet.recipes import sft
from trivet.recipes.sft import PRESETS, ROWS, TRAINS, train

@dataclass(frozen=True, kw_only=True)
class Config(sft.Config):
    twice: float = 2 * 0.5
"""


def test_an_error_that_can_not_say_what_it_is_costs_a_sentence():
    class NamelessError(Exception):
        def __str__(self):
            raise ValueError

    def raises(completions):
        raise NamelessError

    with pytest.raises(InputError, match=r"raised NamelessError in its line .*: \?"):
        FunctionReward(raises, "mine.py:f")(rollouts())


def test_infinity_is_null_in_a_record_since_json_has_none(tmp_path):
    assert [short(x) for x in (math.inf, -math.inf, math.nan, 1.5)] == [None, None, None, 1.5]
    _append(tmp_path / "metrics.jsonl", [{"step": 1, "a": math.inf, "b": math.nan, "c": 2.0}])
    assert numbers(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 2.0}]


def test_half_of_a_surrogate_pair_can_be_printed(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def f(completions):\n    print('odd \\ud800')\n    return [1.0] * len(completions)"
    )
    flags = [
        "--preset",
        "toy",
        "--steps=1",
        "--prompts-per-step=2",
        "--max-completion-tokens=4",
        "--eval-limit=1",
    ]
    assert (
        main(["grpo", *flags, "--reward", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "r")])
        == 0
    )
    assert "odd \\ud800" in capsys.readouterr().out


@pytest.mark.parametrize("spent", [10**400, -5, 1.5, "many", None])
def test_a_server_that_counts_nonsense_costs_nothing(tmp_path, spent):
    body = {"choices": [{"message": {"content": "Score: 7"}}], "usage": {"prompt_tokens": spent}}
    assert (
        try_judge([(200, {}, json.dumps(body).encode())], False, "stop", "m", tmp_path) == "taken"
    )


def test_a_reward_logs_names_that_can_be_written_and_none_of_the_run(tmp_path):
    made = FunctionReward(
        lambda completions, log_metric: log_metric("\ud800", 2) or [1.0] * 4, "mine.py:f"
    )
    made(rollouts())
    assert made.logged == {"\\ud800": 2.0}
    made = FunctionReward(lambda completions, log_metric: log_metric("step", 2), "mine.py:f")
    with pytest.raises(InputError, match="the name 'step' is reserved; choose another"):
        made(rollouts())
