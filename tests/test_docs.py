"""The README shows the code as it stands, and the documents name what exists."""

import dataclasses
import importlib
import re
import shutil
from pathlib import Path

import pytest

from trivet.cli import HELP, RECIPES

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_grpo_loop_verbatim():
    shown = re.search(r"<!-- grpo loop -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert shown
    lines = [line for line in shown[1].splitlines() if line.strip()]
    source = (ROOT / "src/trivet/recipes/grpo.py").read_text().splitlines()
    loop = [line[4:] for line in source[source.index("    for step, prompts in run.batches():") :]]
    assert lines == [line for line in loop if line.strip()][: len(lines)]
    assert lines[-1].strip() == "yield metrics"


@pytest.mark.parametrize("method", RECIPES)
def test_every_option_says_what_it_does_and_every_method_is_in_the_help(method):
    recipe = importlib.import_module(f"trivet.recipes.{method.replace('-', '_')}")
    source = "".join(
        (ROOT / "src/trivet" / path).read_text()
        for path in ("run/options.py", f"recipes/{recipe.__name__.split('.')[-1]}.py")
    )
    for field in dataclasses.fields(recipe.Config):
        assert re.search(rf'^    {field.name}: [^\n]+\n    """', source, re.M), f"{field.name} has no docstring"
    assert f"  {method} " in HELP
    assert "toy" in recipe.PRESETS
    assert f"trivet {method}" in recipe.__doc__


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_readme_names_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{verb}:", makefile, re.M), verb
