"""The recipe behind a method's name, a module or a file of one's own, and behind a Config."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trivet.errors import InputError
from trivet.recipes import METHODS
from trivet.step.options import Options

PREFIX = "trivet_recipe_"  # of the module that a recipe's file becomes


def load_recipe(source: str) -> ModuleType:
    """The recipe that is named: a method of Trivet's (grpo), a module (mypackage.mymethod), or a file (mymethod.py).

    Errors: InputError where there is none, it can't be imported, or it lacks a part that every recipe has.
    """
    name, own = METHODS.get(source, source), source not in METHODS
    try:
        recipe = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a stranger's file
        if not own:
            raise
        raise InputError(f"recipe {source} can't be imported: {type(error).__name__}: {error}") from error
    require_recipe(recipe)
    return recipe


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    name = PREFIX + path.stem
    if (known := sys.modules.get(name)) is not None and Path(str(known.__file__)).resolve() == path.resolve():
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def recipe_of(config: Options) -> ModuleType:
    """The recipe that a Config belongs to: the module in which its class stands."""
    recipe = sys.modules[type(config).__module__]
    require_recipe(recipe)
    return recipe


def require_recipe(recipe: ModuleType) -> None:
    """InputError where a module lacks a part that every recipe has (docs/your-own-method.md)."""
    parts: dict[str, Any] = vars(recipe)
    wants = {
        "Config": isinstance(parts.get("Config"), type) and issubclass(parts["Config"], Options),
        "train": callable(parts.get("train")),
        "ROWS": parts.get("ROWS") in ("prompts", "supervised", "preference", "feedback"),
        "TRAINS": parts.get("TRAINS") in ("policy", "scorer"),
    }
    means = {
        "Config": "a dataclass that inherits trivet.step.options.Options or SamplingOptions",
        "train": "a function train(config, run) that yields a Result after each step",
        "ROWS": "'prompts', 'supervised', 'preference' or 'feedback', what the data must hold",
        "TRAINS": "'policy' or 'scorer', what kind of model is trained",
    }
    for name, fits in wants.items():
        if not fits:
            where = getattr(recipe, "__file__", None) or recipe.__name__
            raise InputError(f"{where} is no recipe: {name} must be {means[name]}")


def method_name(recipe: ModuleType) -> str:
    """What a run of this recipe is called: grpo, pairwise-grpo, or the name of one's own file."""
    name = recipe.__name__.rpartition(".")[2]
    if name == "__main__" and getattr(recipe, "__file__", None):
        name = Path(str(recipe.__file__)).stem
    return name.removeprefix(PREFIX).replace("_", "-")


def source_of(recipe: ModuleType) -> str:
    """What load_recipe takes to find this recipe again: a method's name, a file, or a module."""
    known = {module: method for method, module in METHODS.items()}
    if recipe.__name__ in known:
        return known[recipe.__name__]
    return str(Path(str(recipe.__file__)).resolve()) if getattr(recipe, "__file__", None) else recipe.__name__
