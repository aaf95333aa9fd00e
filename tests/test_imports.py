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
    ".".join(("trivet", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
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


# folders and files in import order: each imports only what stands above it, or beside it in its own folder
ROOMS = [
    {"trivet", "errors", "timing", "toy"},
    {"places", "dependencies", "http", "arguments"},
    {"batch"},
    {"optimization", "model"},
    {"data"},
    {"rewards", "generation"},
    {"step"},
    {"recipes"},
    {"store"},
    {"distributed"},
    {"runner"},
    {"plan"},
    {"report"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}


def room(module: str) -> str:
    """The folder, or the file beside the folders, that a module stands in."""
    return [*module.split("."), "trivet"][1]


def own_imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, lazy imports included."""
    return {name for name in imports(path) if name in FILES}


def test_every_room_has_its_place():
    assert {room(module) for module in FILES} <= FLOOR.keys()


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_one_way(module):
    own = room(module)
    for name in own_imports(FILES[module]) - {"trivet"}:
        other = room(name)
        assert other == own or FLOOR[other] < FLOOR[own], f"{module} imports {name}"


def test_no_module_imports_itself_over_others():
    """No circles, lazy imports included: each module can be put behind all that it imports."""
    left = {module: own_imports(path) - {module, "trivet"} for module, path in FILES.items()}
    left = {
        m: {n for n in names if not m.startswith(f"{n}.")} for m, names in left.items()
    }  # its own package
    while free := [module for module, names in left.items() if not names]:
        left = {module: names - set(free) for module, names in left.items() if module not in free}
    assert not left, f"a circle among {sorted(left)}"


def test_optimization_imports_torch_and_nothing_of_ours_but_itself():
    for path in (ROOT / "optimization").rglob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] == "torch" or name.startswith("trivet.optimization"), (
                f"{path} imports {name}"
            )


def test_the_legs_never_import_each_other():
    for leg in LEGS:
        for path in (ROOT / leg).rglob("*.py"):
            assert not {room(name) for name in own_imports(path)} & {*LEGS} - {leg}, path


def test_rooms_are_not_crowded():
    for folder in {path.parent for path in FILES.values()}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 14, (
            folder
        )


def test_nothing_is_replaced_behind_its_back():
    """No function or class of ours is exchanged by name while a run goes on, and no module keeps state of a run."""
    for path in FILES.values():
        tree = ast.parse(path.read_text())
        assert not any(name.startswith("unittest") for name in imports(path)), path
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), path
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
        bound = {
            (alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names
        }
        bound |= {
            node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        for node in ast.walk(tree):
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in bound, f"{path}:{target.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                assert ast.unparse(node.args[0]) not in bound, f"{path}:{node.lineno}"


def loop_of(method: str) -> ast.For:
    """The loop over steps of a recipe."""
    tree = ast.parse(FILES[f"trivet.recipes.{method}"].read_text())
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and "run.batches" in ast.unparse(node.iter)
    ]
    assert len(loops) == 1
    return loops[0]


@pytest.mark.parametrize(
    ("recipe", "lines"),
    [
        ("sft", 25),
        ("reward_model", 25),
        ("dpo", 25),
        ("kto", 25),
        ("grpo", 25),
        ("pairwise_grpo", 25),
        ("ppo", 35),
    ],
)
def test_a_method_can_be_read_in_one_go(recipe, lines):
    loop = loop_of(recipe)
    text = (
        FILES[f"trivet.recipes.{recipe}"]
        .read_text()
        .splitlines()[loop.lineno - 1 : loop.end_lineno]
    )
    assert len([line for line in text if line.strip()]) <= lines
    reads = [
        node
        for node in ast.walk(loop)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "config"
    ]
    assert len(reads) <= 5


def test_public_names_are_there_and_cost_nothing_until_they_are_asked_for():
    code = "import sys, trivet; dir(trivet); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(getattr(trivet, name) for name in dir(trivet) if name in trivet._MODULES)
    assert trivet.launch is importlib.import_module("trivet.report.notebook").launch
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trivet.nonsense  # noqa: B018


def test_threads_spin_briefly_wherever_trivet_is_imported_first():
    show = "import trivet, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    for given, said in (
        ({}, "1000 False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 False"),
        ({"OMP_WAIT_POLICY": "active"}, "None False"),
    ):
        own = {
            key: x
            for key, x in os.environ.items()
            if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
        }
        assert (
            subprocess.check_output(
                [sys.executable, "-c", show], env=own | given, text=True
            ).strip()
            == said
        )
