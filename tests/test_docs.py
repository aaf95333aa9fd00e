"""The README shows the code as it stands, and the documents name what exists."""

import ast
import dataclasses
import importlib
import re
import shutil
from pathlib import Path

import pytest

from trivet.cli.main import HELP
from trivet.recipes import METHODS as RECIPES

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_grpo_loop_verbatim():
    shown = re.search(
        r"<!-- grpo loop -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert shown
    lines = [line for line in shown[1].splitlines() if line.strip()]
    source = (ROOT / "src/trivet/recipes/grpo.py").read_text().splitlines()
    loop = [line[4:] for line in source[source.index("    for _, prompts in run.batches():") :]]
    assert lines == [line for line in loop if line.strip()][: len(lines)]
    assert lines[-1].strip().startswith("yield sampled_result(")


@pytest.mark.parametrize("method", RECIPES)
def test_every_option_says_what_it_does_and_every_method_is_in_the_help(method):
    recipe = importlib.import_module(f"trivet.recipes.{method.replace('-', '_')}")
    source = "".join(
        (ROOT / "src/trivet" / path).read_text()
        for path in ("step/options.py", f"recipes/{recipe.__name__.split('.')[-1]}.py")
    )
    for field in dataclasses.fields(recipe.Config):
        said = re.search(
            rf'^    {field.name}: [^\n]+(\n[^\n]+\n    \))?(  # \S|\n    """)', source, re.M
        )
        assert said, f"{field.name} says nothing of itself"
    assert f"  {method} " in HELP
    assert "toy" in recipe.PRESETS
    assert f"trivet {method}" in recipe.__doc__


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_readme_names_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{verb}:", makefile, re.M), verb


def test_servers_md_names_the_options_of_servers():
    text = (ROOT / "docs" / "servers.md").read_text()
    for flag in ("--generate-with", "--vllm", "--max-staleness", "--importance-cap"):
        assert f"`{flag}" in text or f" {flag} " in text, flag


def test_every_public_name_says_what_it_is():
    """Modules, classes, functions and methods whose names do not begin with an underscore; fields in options.py and recipes
    have theirs checked above."""
    missing = []
    for path in sorted((ROOT / "src" / "trivet").rglob("*.py")):
        tree = ast.parse(path.read_text())
        nodes: list[tuple[str, ast.AST]] = [(path.name, tree)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                nodes.append((f"{path.name}: {node.name}", node))
                methods = node.body if isinstance(node, ast.ClassDef) else []
                nodes += [
                    (f"{path.name}: {node.name}.{method.name}", method)
                    for method in methods
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                ]
        missing += [name for name, node in nodes if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert missing == []


def test_methods_md_names_options_presets_and_every_variant():
    text = (ROOT / "docs" / "methods.md").read_text()
    for method in RECIPES:
        recipe = importlib.import_module(f"trivet.recipes.{method.replace('-', '_')}")
        section = re.search(rf"^## `{method}`\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        assert section, method
        fields = {field.name for field in dataclasses.fields(recipe.Config)}
        for option, value in re.findall(r"--(?:no-)?([a-z][a-z-]+)(?: ([\w.+-]+))?", section[1]):
            if option == "preset":
                assert value in recipe.PRESETS, value
            else:
                assert option.replace("-", "_") in fields, f"{method} has no --{option}"
        for preset in set(recipe.PRESETS) - {"toy", "arithmetic"}:
            assert f"--preset {preset}" in section[1], f"{preset} is not explained"
        options = importlib.import_module("trivet.step.options").SamplingOptions
        shared = {field.name for field in dataclasses.fields(options)}
        plain = {
            "beta",
            "reward",
            "reward_weights",
            "group_size",
            "temperature",
            "clip_low",
            "clip_high",
            "gamma",
            "lam",
        }
        plain |= {
            "loss",
            "label_smoothing",
            "minibatches",
            "epochs_per_batch",
            "critic_lr",
            "baseline",
            "loss_mean",
            "kl_in",
        }
        for name in fields - shared - plain:
            flag = name.replace("_", "-")
            named = re.search(rf"--(no-)?{flag}\b", section[1]) or any(
                name in p for p in recipe.PRESETS.values()
            )
            assert named, f"--{flag} of {method} is not explained"
