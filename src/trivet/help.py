"""--help of a command, its options in groups. Read from the source of the options, so that nothing heavy is imported for it."""

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parent
WHERE = {  # command that is no recipe: what goes before its options, the file of its options, the class
    "generate": ("", "commands.py", "GenerateConfig"),
    "score": ("", "commands.py", "ScoreConfig"),
    "quickstart": ("", "quickstart.py", "Config"),
    "plan": ("", "plan/options.py", "Config"),
    "plot": (" RUN [RUN ...]", "report/plots.py", "Config"),
    "watch": (" RUN [RUN ...]", "report/watch.py", "Config"),
}
WORDS = {"str": "TEXT", "int": "INT", "float": "FLOAT", "bool": ""}


class Option(NamedTuple):
    """A field of a config, as its source says it."""

    kind: str  # the annotation
    default: Any
    text: str
    group: str


def recipe_file(method: str) -> str:
    """The file of the package that holds this method."""
    return f"recipes/{method.replace('-', '_')}.py"


def options_of(file: str, kind: str = "Config") -> dict[str, Option]:
    """The options of the config of this name in this file of the package, those that it inherits first.

    A field's text is the comment behind it or the string below it; a line of comment above one begins a group.
    """
    config, lines = _class(file, kind)
    found = dict[str, Option]()
    for base in config.bases:
        found |= options_of("run/options.py", ast.unparse(base))
    group = "Of this method" if found else "Options"
    for field, after in pairwise([*config.body, None]):
        if isinstance(field, ast.AnnAssign) and field.value:
            above = lines[field.lineno - 2].strip()
            group = above.removeprefix("# ") if above.startswith("# ") else group
            text = lines[field.lineno - 1].partition("  # ")[2]
            text = str(ast.literal_eval(after.value)) if isinstance(after, ast.Expr) else text
            default = ast.literal_eval(field.value)
            found[ast.unparse(field.target)] = Option(ast.unparse(field.annotation), default, text, group)
    return found


def print_help(command: str) -> None:
    """What trivet COMMAND --help says."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    takes, file, kind = WHERE.get(command, ("", recipe_file(command), "Config"))
    options = options_of(file, kind)
    rows = [(option.group, Text(_flag(name, option)), _said(option)) for name, option in options.items()]
    if command not in WHERE:
        several = "Several at once, flags on top"
        presets = ", ".join(presets_of(file))
        rows += [(several, Text("--preset NAME ..."), Text(f"One or more of {presets}."))]
        rows += [(several, Text("--config FILE.toml"), Text("Options from a file, by the same names."))]
    if "model" in options:
        trust = Text("Run Python code, and read pickles, that come with a model.")
        rows.append((options["model"].group, Text("--trust-remote-code"), trust))
    console = Console(highlight=False)
    console.print(
        f"usage: trivet {command}{takes} [options]\n\n{ast.get_docstring(_class(file, kind)[0])}", markup=False
    )
    for group in dict.fromkeys(row[0] for row in rows):
        table = Table(title=f"\n{group}", title_style="bold", title_justify="left")
        table.box, table.show_header, table.pad_edge = None, False, False
        table.add_column(no_wrap=True, width=max(len(flag) for _, flag, _ in rows))
        table.add_column(overflow="fold")
        for _, flag, text in (row for row in rows if row[0] == group):
            table.add_row(flag, text)
        console.print(table)


def presets_of(file: str) -> list[str]:
    """The names of a recipe's presets, those of its variants included."""
    found = list[str]()
    for path in (SOURCE / file, (SOURCE / file).with_name(f"{Path(file).stem}_variants.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.exists() else []:
            named = isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if named and isinstance(target, ast.Name) and target.id in ("PRESETS", "VARIANTS"):
                found += [ast.literal_eval(key) for key in node.value.keys if key]  # type: ignore[union-attr]
    return found


def _class(file: str, kind: str) -> tuple[ast.ClassDef, list[str]]:
    source = (SOURCE / file).read_text(encoding="utf-8")
    (found,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == kind)
    return found, source.splitlines()


def _flag(name: str, option: Option) -> str:
    flag = f"--{name.replace('_', '-')}"
    if option.kind.startswith("tuple["):
        return f"{flag} {WORDS[option.kind[6:].partition(',')[0]]} ..."
    return f"{flag} {WORDS.get(option.kind, 'WORD')}".rstrip()


def _said(option: Option) -> Any:
    from rich.text import Text

    text, notes = Text(option.text), list[str]()
    if option.kind.startswith("Literal["):
        notes.append(option.kind[8:-1].replace("'", "").replace(", ", " | "))
    if option.default is True:
        notes.append("on; --no-... turns it off")
    elif option.default not in ("", (), False) or (option.default == 0 and option.kind != "bool"):
        notes.append(f"default {option.default}")
    return text.append(f" [{'; '.join(notes)}]", style="dim") if notes else text
