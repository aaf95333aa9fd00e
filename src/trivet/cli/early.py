"""Check options, their values, TOML files and paths before torch is imported, so that a typo is
reported at once.

The config class of a command is rebuilt here from its source text (step/option_texts.py). The
command then parses its arguments again by itself.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from trivet.arguments import parse, parse_values, read_flags, read_toml, runs_and_options
from trivet.cli.help import COMMAND_OPTIONS, file_and_class
from trivet.errors import InputError
from trivet.places import data_file, model_folder, require_model, require_places
from trivet.recipes import METHODS
from trivet.runner.checks import check
from trivet.step.option_texts import file_of, options_of, presets_of
from trivet.store.reading import recipe_source


def refuse_early(command: str, args: list[str]) -> None:
    """Raise the InputErrors of this command that can be found without importing its libraries."""
    if command in METHODS:
        config = _method_config(command, args)
    elif command == "resume":
        if (kind := config_kind(Path(args[0]))) is None:
            return
        config = kind(**parse_values(kind, read_flags(kind, args[1:]), "--"))
    elif command in COMMAND_OPTIONS:
        kind = _config(*file_and_class(command))
        config = (
            runs_and_options(kind, args, f"trivet {command}")[1]
            if COMMAND_OPTIONS[command][0]
            else parse(kind, args)
        )
    else:
        return
    require_places(config)


def _method_config(method: str, args: list[str]) -> Any:
    file, kind = file_and_class(method)
    config = parse(_config(file, kind), args, {name: {} for name in presets_of(file)})
    check(config, method)
    if not any(arg.split("=")[0] == "--preset" for arg in args):  # a preset may set model and data
        require_model(config.model and model_folder(config.model))
        data_file(config.data)
    return config


def config_kind(out: Path) -> type[Any] | None:
    """The config class of the run in this directory; None if the run's recipe is a user's file,
    which may be any Python.

    Errors: InputError if this is not a run directory, its recipe is missing, or its config.toml is
    not valid TOML.
    """
    source = recipe_source(out)
    if source not in METHODS:
        if not Path(source).is_file():
            raise InputError(f"{out}: its recipe, {source}, no longer exists; restore it")
        return None
    kind = _config(file_of(METHODS[source]))
    parse_values(kind, read_toml(str(out / "config.toml")), f"{out / 'config.toml'}: ")
    return kind


def _config(file: Path, name: str = "Config") -> type[Any]:
    """A dataclass with the fields, types and defaults of the config class of this name in this
    file.
    """
    names = {"Literal": Literal}
    fields = [
        (field, eval(option.kind, names), dataclasses.field(default=option.default))
        for field, option in options_of(file, name).items()
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
