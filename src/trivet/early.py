"""What can be refused before torch is imported, so that a typo is told at once: options, their values, TOML, what is not there.

The config of a command is made here from the source of its own (trivet.help). The command then reads its arguments itself.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from trivet.errors import InputError
from trivet.help import WHERE, options_of, presets_of, recipe_file
from trivet.places import data_file, model_folder, require_model, require_places
from trivet.recipes import RECIPES
from trivet.run.arguments import parse, read_flags, read_toml, runs_and_options, typed
from trivet.run.config import check
from trivet.run.reading import method_of


def refuse_early(command: str, args: list[str]) -> None:
    """InputError for what the command would refuse anyway, of what can be known without its libraries."""
    if command in RECIPES:
        file = recipe_file(command)
        config = parse(_config(file), args, {name: {} for name in presets_of(file)})
        check(config, command)
        if not any(arg.split("=")[0] == "--preset" for arg in args):  # which may bring a model and data
            require_model(config.model and model_folder(config.model))
            data_file(config.data)
    elif command == "resume":
        kind = config_kind(Path(args[0]))
        config = kind(**typed(kind, read_flags(kind, args[1:]), "--"))
    elif command in WHERE:
        takes, file, kind = WHERE[command]
        named = _config(file, kind)
        config = runs_and_options(named, args, f"trivet {command}")[1] if takes else parse(named, args)
    else:
        return
    require_places(config)


def config_kind(out: Path) -> type[Any]:
    """What the options of the run in this directory are made of. Errors: InputError where it is no run, or its file no TOML."""
    method = method_of(out)
    if method not in RECIPES:
        raise InputError(f"{out} is not a run directory: there is no config.toml in it that names a method")
    kind = _config(recipe_file(method))
    typed(kind, read_toml(str(out / "config.toml")), f"{out / 'config.toml'}: ")
    return kind


def _config(file: str, name: str = "Config") -> type[Any]:
    """A dataclass with the fields, types and defaults of the config of this name in this file of the package."""
    known = {"Literal": Literal}
    fields = [
        (field, eval(option.kind, known), dataclasses.field(default=option.default))
        for field, option in options_of(file, name).items()
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
