"""What can be refused before torch is imported, so that a typo is told at once: options, their values, TOML, what is not there.

The config of a command is made here from the source of its own (step/option_texts.py). The command then reads its arguments itself.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from trivet.arguments import parse, read_flags, read_toml, runs_and_options, typed
from trivet.cli.help import WHERE, file_and_class
from trivet.errors import InputError
from trivet.places import data_file, model_folder, require_model, require_places
from trivet.recipes import METHODS
from trivet.runner.checks import check
from trivet.step.option_texts import file_of, options_of, presets_of
from trivet.store.reading import recipe_source


def refuse_early(command: str, args: list[str]) -> None:
    """InputError for what the command would refuse anyway, of what can be known without its libraries."""
    if command in METHODS:
        config = _method_config(command, args)
    elif command == "resume":
        if (kind := config_kind(Path(args[0]))) is None:
            return
        config = kind(**typed(kind, read_flags(kind, args[1:]), "--"))
    elif command in WHERE:
        named = _config(*file_and_class(command))
        config = runs_and_options(named, args, f"trivet {command}")[1] if WHERE[command][0] else parse(named, args)
    else:
        return
    require_places(config)


def _method_config(method: str, args: list[str]) -> Any:
    file, kind = file_and_class(method)
    config = parse(_config(file, kind), args, {name: {} for name in presets_of(file)})
    check(config, method)
    if not any(arg.split("=")[0] == "--preset" for arg in args):  # which may bring a model and data
        require_model(config.model and model_folder(config.model))
        data_file(config.data)
    return config


def config_kind(out: Path) -> type[Any] | None:
    """What the options of the run in this directory are made of; None for a recipe of one's own, which may be any Python.

    Errors: InputError where it is no run, its recipe is gone, or its file no TOML.
    """
    source = recipe_source(out)
    if source not in METHODS:
        if not Path(source).is_file():
            raise InputError(f"{out}: its recipe, {source}, is not there any more; restore it")
        return None
    kind = _config(file_of(METHODS[source]))
    typed(kind, read_toml(str(out / "config.toml")), f"{out / 'config.toml'}: ")
    return kind


def _config(file: Path, name: str = "Config") -> type[Any]:
    """A dataclass with the fields, types and defaults of the config of this name in this file."""
    known = {"Literal": Literal}
    fields = [
        (field, eval(option.kind, known), dataclasses.field(default=option.default))
        for field, option in options_of(file, name).items()
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
