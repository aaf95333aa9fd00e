"""The shape of the package: imports point one way, the three legs never import each other, recipes stay readable."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trivet

ROOT = Path(__file__).parent.parent / "src" / "trivet"
LEGS = ("rewards", "generation", "optimization")
FILES = {
    ".".join(("trivet", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports(path: Path) -> set[str]:
    """Every absolute module name that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("leg", LEGS)
def test_the_legs_never_import_each_other(leg):
    for path in (ROOT / leg).rglob("*.py"):
        for other in {*LEGS, "recipes", "run", "data", "cli"} - {leg}:
            assert not any(name.startswith(f"trivet.{other}") for name in imports(path)), f"{path} imports {other}"


def test_optimization_imports_torch_and_nothing_of_ours_but_itself():
    for path in (ROOT / "optimization").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] == "torch" or name.startswith("trivet.optimization"), f"{path} imports {name}"


def test_recipes_are_imported_by_nothing_below_them():
    for part in (*LEGS, "model", "run", "toy", "batch.py", "data.py"):
        paths = (ROOT / part).rglob("*.py") if not part.endswith(".py") else [ROOT / part]
        for path in paths:
            assert not any(name.startswith(("trivet.recipes", "trivet.cli")) for name in imports(path)), path


def test_reports_read_runs_and_runs_know_no_report_but_what_a_notebook_displays():
    for path in (ROOT / "run").rglob("*.py"):
        reports = {name for name in imports(path) if name.startswith("trivet.report")}
        assert reports <= (
            {"trivet.report.notebook", "trivet.report.notebook.shown"} if path.name == "files.py" else set()
        )


@pytest.mark.parametrize("recipe", ["sft", "reward_model", "dpo", "ppo", "grpo", "pairwise_grpo"])
def test_a_method_can_be_read_in_one_go(recipe):
    assert len(FILES[f"trivet.recipes.{recipe}"].read_text().splitlines()) <= 200


def test_public_names_are_there_and_cost_nothing_until_they_are_asked_for():
    code = "import sys, trivet; dir(trivet); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(getattr(trivet, name) for name in dir(trivet) if name in trivet._WHERE)
    assert trivet.launch is importlib.import_module("trivet.run.launch").launch
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trivet.nonsense  # noqa: B018


def test_threads_spin_briefly_wherever_trivet_is_imported_first():
    show = "import trivet, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    for given, said in (
        ({}, "1000 False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 False"),
        ({"OMP_WAIT_POLICY": "active"}, "None False"),
    ):
        own = {key: x for key, x in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        assert subprocess.check_output([sys.executable, "-c", show], env=own | given, text=True).strip() == said
