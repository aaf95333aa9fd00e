"""Finding the recipe that a method's name, a module, a file or a Config stands for."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trivet.errors import InputError
from trivet.recipes import METHODS
from trivet.step.options import Options

PREFIX = "trivet_recipe_"  # of the names of modules loaded from recipe files


def load_recipe(source: str) -> ModuleType:
    """Load a recipe by name: a method of Trivet (grpo), a module (mypackage.mymethod), or a file
    (mymethod.py).

    Errors: InputError if there is no such recipe, it can't be imported, or it lacks a part that
    every recipe needs.
    """
    name, built_in = METHODS.get(source, source), source in METHODS
    try:
        recipe = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        if built_in:
            raise
        raise InputError(
            f"recipe {source} can't be imported: {type(error).__name__}: {error}"
        ) from error
    require_recipe(recipe)
    return recipe


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    name = PREFIX + path.stem
    loaded = sys.modules.get(name)
    if loaded is not None and Path(str(loaded.__file__)).resolve() == path.resolve():
        return loaded
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
    """Return the recipe that a Config belongs to: the module that defines its class."""
    recipe = sys.modules[type(config).__module__]
    require_recipe(recipe)
    return recipe


def require_recipe(recipe: ModuleType) -> None:
    """Raise an InputError if a module lacks a part of a recipe (docs/your-own-method.md)."""
    parts: dict[str, Any] = vars(recipe)
    valid = {
        "Config": isinstance(parts.get("Config"), type) and issubclass(parts["Config"], Options),
        "train": callable(parts.get("train")),
        "ROWS": parts.get("ROWS") in ("prompts", "supervised", "preference", "feedback"),
        "TRAINS": parts.get("TRAINS") in ("policy", "scorer"),
    }
    expected = {
        "Config": "a dataclass that inherits trivet.step.options.Options or SamplingOptions",
        "train": "a function train(config, run) that yields a Result after each step",
        "ROWS": "'prompts', 'supervised', 'preference' or 'feedback', the kind of rows it reads",
        "TRAINS": "'policy' or 'scorer', the kind of model it trains",
    }
    for name, is_valid in valid.items():
        if not is_valid:
            where = getattr(recipe, "__file__", None) or recipe.__name__
            raise InputError(f"{where} is not a recipe: {name} must be {expected[name]}")


def method_name(recipe: ModuleType) -> str:
    """Return the method's name: grpo, pairwise-grpo, or the name of the user's file."""
    name = recipe.__name__.rpartition(".")[2]
    if name == "__main__" and getattr(recipe, "__file__", None):
        name = Path(str(recipe.__file__)).stem
    return name.removeprefix(PREFIX).replace("_", "-")


def source_of(recipe: ModuleType) -> str:
    """Return what load_recipe needs to load this recipe: a method's name, a file, or a module."""
    methods = {module: method for method, module in METHODS.items()}
    if recipe.__name__ in methods:
        return methods[recipe.__name__]
    return (
        str(Path(str(recipe.__file__)).resolve())
        if getattr(recipe, "__file__", None)
        else recipe.__name__
    )
