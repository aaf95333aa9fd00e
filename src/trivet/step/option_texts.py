"""What the options of a recipe or command are called and mean, read from their source, so that nothing heavy is imported for it."""

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from trivet.errors import InputError

PACKAGE = Path(__file__).parent.parent


class Option(NamedTuple):
    """A field of a config, as its source says it."""

    kind: str  # the annotation
    default: Any
    text: str
    group: str


def file_of(module: str) -> Path:
    """The source file of a module of Trivet's, by its full name."""
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def options_of(file: Path, kind: str = "Config") -> dict[str, Option]:
    """The options of the config of this name in this file, those that it inherits first.

    A field's text is the comment behind it or the string below it; a line of comment above one begins a group.
    """
    config, source = _class(file, kind)
    lines, found = source.splitlines(), dict[str, Option]()
    for base in config.bases:
        if (place := _where(base, file, source)) is not None:
            found |= options_of(*place)
    group = "Method options" if found else "Options"
    for field, after in pairwise([*config.body, None]):
        if isinstance(field, ast.AnnAssign) and field.value:
            above = lines[field.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            text = lines[field.lineno - 1].partition("  # ")[2]
            text = " ".join(ast.literal_eval(after.value).split()) if isinstance(after, ast.Expr) else text
            option = Option(ast.unparse(field.annotation), _default(field.value), text, group)
            found[ast.unparse(field.target)] = option
    return found


def about(file: Path, kind: str = "Config") -> str:
    """The docstring of the config of this name in this file."""
    return ast.get_docstring(_class(file, kind)[0]) or ""


def presets_of(file: Path) -> list[str]:
    """The names of a recipe's presets, those of its variants included."""
    found = list[str]()
    for path in (file, file.with_name(f"{file.stem}_variants.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []:
            named = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if named and isinstance(target, ast.Name) and target.id in ("PRESETS", "VARIANTS"):
                found += [ast.literal_eval(key) for key in node.value.keys if key]  # type: ignore[union-attr]
    return found


def _default(value: ast.expr) -> Any:
    """The value that a field has; of one that is computed, in a recipe of one's own, its source."""
    try:
        return ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def _class(file: Path, kind: str) -> tuple[ast.ClassDef, str]:
    """The class of this name, and the source that it stands in. Errors: InputError where there is none."""
    try:
        source = file.read_text(encoding="utf-8")
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError) as error:  # a ValueError: bytes that are no text
        raise InputError(f"{file} can't be read as Python: {type(error).__name__}: {error}") from error
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name == kind:
            return node, source
    raise InputError(f"{file} has no class {kind}, which every recipe has (docs/your-own-method.md)")


def _where(base: ast.expr, file: Path, source: str) -> tuple[Path, str] | None:
    """The file and the name of a class that is inherited, where it stands in this file or in Trivet; else None."""
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
