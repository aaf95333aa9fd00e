"""The names and help texts of the options of a recipe or command, read from source, so that --help
imports nothing heavy.
"""

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from trivet.errors import InputError

PACKAGE = Path(__file__).parent.parent


class Option(NamedTuple):
    """A field of a config, as written in its source."""

    kind: str  # the annotation
    default: Any
    text: str
    group: str


def file_of(module: str) -> Path:
    """Return the source file of a module of Trivet, given its full name."""
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def options_of(file: Path, kind: str = "Config") -> dict[str, Option]:
    """Return the options of the config class `kind` in this file, inherited ones first.

    A field's text is the comment behind it or the string below it; a comment line above a field
    begins a group.
    """
    config, source = _class(file, kind)
    lines, options = source.splitlines(), dict[str, Option]()
    for base in config.bases:
        if (place := _find_class(base, file, source)) is not None:
            options |= options_of(*place)
    group = "Method options" if options else "Options"
    for field, after in pairwise([*config.body, None]):
        if isinstance(field, ast.AnnAssign) and field.value:
            above = lines[field.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            text = lines[field.lineno - 1].partition("  # ")[2]
            text = (
                " ".join(ast.literal_eval(after.value).split())
                if isinstance(after, ast.Expr)
                else text
            )
            option = Option(ast.unparse(field.annotation), _default(field.value), text, group)
            options[ast.unparse(field.target)] = option
    return options


def about(file: Path, kind: str = "Config") -> str:
    """Return the docstring of the config class `kind` in this file."""
    return ast.get_docstring(_class(file, kind)[0]) or ""


def presets_of(file: Path) -> list[str]:
    """Return the names of a recipe's presets, including those of its variants."""
    presets = list[str]()
    for path in (file, file.with_name(f"{file.stem}_variants.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []:
            named = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(
                node.value, ast.Dict
            )
            target = (
                node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            )
            if named and isinstance(target, ast.Name) and target.id in ("PRESETS", "VARIANTS"):
                presets += [ast.literal_eval(key) for key in node.value.keys if key]  # type: ignore[union-attr]
    return presets


def _default(value: ast.expr) -> Any:
    """Return a field's default value, or its source where it is computed, as a user's recipe may
    do.
    """
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def _class(file: Path, kind: str) -> tuple[ast.ClassDef, str]:
    """Return the class of this name and the source of its file. Errors: InputError if there is no
    such class.
    """
    try:
        source = file.read_text(encoding="utf-8")
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError) as error:  # ValueError: the bytes are not text
        raise InputError(
            f"{file} can't be read as Python: {type(error).__name__}: {error}"
        ) from error
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name == kind:
            return node, source
    raise InputError(
        f"{file} has no class {kind}, which every recipe needs (docs/your-own-method.md)"
    )


def _find_class(base: ast.expr, file: Path, source: str) -> tuple[Path, str] | None:
    """Return the file and the name of a base class, if it is defined in this file or in Trivet;
    else None.
    """
    module, _, name = ast.unparse(base).rpartition(".")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name and not module:
            return file, name
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trivet"):
            for imported in node.names:
                if imported.name == name and not module:
                    return file_of(node.module), name
                if imported.name == module:  # from trivet.recipes import grpo; grpo.Config
                    return file_of(f"{node.module}.{module}"), name
    return None
