"""docs/your-own-method.md: a method in a file of one's own is trained, killed, resumed to the bit, explained, and shared by two processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trivet
from conftest import few_rows
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.recipes import grpo
from trivet.runner.launch import launch
from trivet.runner.methods import load_recipe, method_name, source_of
from trivet.toy import STORIES

PAGE = (Path(__file__).parent.parent / "docs" / "your-own-method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SMALL = {"model": STORIES["model"], "prompts_per_step": 4, "steps": 4, "max_completion_tokens": 8}
SMALL |= {
    "reward": ("trivet.toy.stories:gold",),
    "eval_limit": 4,
    "save_every": 1,
    "keep_tokens_every": 1,
}


@pytest.fixture
def own(tmp_path):
    """The page's file, and options for it: the teacher is the same model after a few steps of SFT."""
    (tmp_path / "distill.py").write_text(BLOCKS[0])
    sft = load_recipe("sft")
    options = {key: value for key, value in SMALL.items() if key != "reward"}
    options |= {"lr": 3e-3, "data": few_rows(), "steps": 10, "max_completion_tokens": 16}
    teacher = launch(sft.Config(**options, out=str(tmp_path / "teacher")))
    recipe = load_recipe(str(tmp_path / "distill.py"))
    return recipe, {**SMALL, "data": few_rows(), "teacher": str(teacher), "lr": 1e-3}


def flags(options) -> list[str]:
    words = []
    for name, value in options.items():
        words += [
            f"--{name.replace('_', '-')}",
            *map(str, value if isinstance(value, tuple) else [value]),
        ]
    return words


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def equal(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_page_is_under_sixty_lines_of_code():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) < 60


def test_it_is_trained_killed_and_resumed_to_the_bit(own, tmp_path, capsys):
    recipe, options = own
    whole = launch(recipe.Config(**options, out=str(tmp_path / "whole")))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] > 0
    assert "eval/reward" in lines[-1]
    assert not equal(whole, tmp_path / "teacher")
    record = json.loads((whole / "run.json").read_text())
    assert (record["method"], record["recipe"]) == ("distill", str(tmp_path / "distill.py"))

    class KilledError(Exception):
        pass

    def kill(launched, step, metrics):
        if step == 2:
            raise KilledError

    with pytest.raises(KilledError):
        launch(recipe.Config(**options, out=str(tmp_path / "killed")), kill)
    assert main(["resume", str(tmp_path / "killed")]) == 0
    assert equal(whole, tmp_path / "killed")
    assert trivet.resume is not None
    assert main(["report", str(whole), str(tmp_path / "killed")]) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_the_teacher_moves_the_student_towards_itself(own, tmp_path):
    recipe, options = own
    options |= {
        "steps": 12,
        "max_completion_tokens": 16,
        "prompts_per_step": 16,
        "save_every": 0,
        "keep_tokens_every": 0,
    }
    out = launch(recipe.Config(**options, out=str(tmp_path / "r")))
    kl = [json.loads(line)["kl"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(kl[-4:]) < 0.8 * sum(kl[:4])


def test_its_options_are_explained_and_checked_like_any(own, tmp_path, capsys):
    file = str(tmp_path / "distill.py")
    assert main(["run", file, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--teacher TEXT Run directory, folder or hub name of a model with the student's tokenizer."
        in said
    )
    assert "--importance-cap" in said  # inherited
    assert main(["run", file, "--techer", "x"]) == 2
    assert "the nearest known one is --teacher" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "none.py")]) == 2
    assert f"no file {tmp_path / 'none.py'}" in capsys.readouterr().err
    assert main(["run"]) == 2
    assert "name the file of a recipe first" in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(own, tmp_path):
    recipe, options = own
    with pytest.raises(InputError, match=r"the tokenizer of .* differs from that of"):
        launch(
            recipe.Config(
                **options | {"teacher": str(Path(STORIES["model"]).parent / "arithmetic")},
                out=str(tmp_path / "r"),
            )
        )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("ROWS, TRAINS", "KINDS"), "not a recipe: ROWS must be 'prompts'"),
        (('"policy"', '"actor"'), "not a recipe: TRAINS must be 'policy' or 'scorer'"),
        (("def train", "def learn"), "not a recipe: train must be a function"),
        (
            ("class Config(SamplingOptions)", "class Config"),
            "not a recipe: Config must be a dataclass that inherits",
        ),
        (
            ("from dataclasses import dataclass", "import nothing_there"),
            "can't be imported: ModuleNotFoundError",
        ),
    ],
)
def test_what_a_recipe_lacks_is_said_in_a_sentence(change, said, tmp_path, capsys):
    file = tmp_path / f"lacking_{abs(hash(change))}.py"
    file.write_text(BLOCKS[0].replace(*change))
    assert main(["run", str(file), "--preset", "toy"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_whose_recipe_has_gone_says_so(own, tmp_path, capsys):
    recipe, options = own
    out = tmp_path / "r"

    def stop(launched, step, metrics):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(recipe.Config(**options, out=str(out)), stop)
    (tmp_path / "distill.py").unlink()
    assert main(["resume", str(out)]) == 2
    assert (
        f"its recipe, {tmp_path / 'distill.py'}, no longer exists; restore it"
        in capsys.readouterr().err
    )


def test_another_objective_is_a_few_lines(tmp_path):
    (tmp_path / "sign.py").write_text(BLOCKS[1])
    recipe = load_recipe(str(tmp_path / "sign.py"))
    options = {**SMALL, "data": few_rows(), "group_size": 4, "lr": 1e-3}
    signed = launch(recipe.Config(**options, out=str(tmp_path / "signed")))
    plain = launch(grpo.Config(**options, out=str(tmp_path / "plain")))
    kept = [json.loads(line) for line in (signed / "samples.jsonl").read_text().splitlines()]
    assert {line["advantage"] for line in kept if "advantage" in line} <= {-1.0, 0.0, 1.0}
    assert not equal(signed, plain)


def test_methods_are_found_again_by_what_is_noted_of_them(tmp_path):
    assert method_name(load_recipe("pairwise-grpo")) == "pairwise-grpo"
    assert source_of(load_recipe("pairwise-grpo")) == "pairwise-grpo"
    (tmp_path / "my_way.py").write_text(BLOCKS[0])
    recipe = load_recipe(str(tmp_path / "my_way.py"))
    assert method_name(recipe) == "my-way"
    assert load_recipe(source_of(recipe)) is recipe


@pytest.mark.slow
def test_two_processes_share_it(own, tmp_path):
    _, options = own
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "trivet",
        "run",
    ]
    command += [
        str(tmp_path / "distill.py"),
        *flags(options | {"out": str(tmp_path / "two")}),
        "--quiet",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 4
    assert all(line["kl"] > 0 for line in lines)
    assert not equal(tmp_path / "two", tmp_path / "teacher")


def test_a_file_that_can_not_be_imported_is_not_taken_for_one_that_can(tmp_path):
    file = tmp_path / "mended.py"
    file.write_text("import nothing_there")
    for _ in range(2):
        with pytest.raises(InputError, match="can't be imported: ModuleNotFoundError"):
            load_recipe(str(file))
