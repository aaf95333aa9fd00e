"""The --help of a command, with its options in groups."""

from pathlib import Path
from typing import Any

from trivet.recipes import METHODS
from trivet.step.option_texts import PACKAGE, Option, about, file_of, options_of, presets_of

# commands other than recipes: (arguments before the options, file of the config class, its name)
COMMAND_OPTIONS = {
    "generate": ("", "cli/commands.py", "GenerateConfig"),
    "score": ("", "cli/commands.py", "ScoreConfig"),
    "quickstart": ("", "cli/quickstart.py", "Config"),
    "plan": ("", "plan/options.py", "Config"),
    "plot": (" RUN [RUN ...]", "report/plots.py", "Config"),
    "watch": (" RUN [RUN ...]", "report/watch.py", "Config"),
}
WORDS = {"str": "TEXT", "int": "INT", "float": "FLOAT", "bool": ""}


def file_and_class(command: str) -> tuple[Path, str]:
    """The file and the name of the config class of a command."""
    if command in METHODS:
        return file_of(METHODS[command]), "Config"
    _, file, kind = COMMAND_OPTIONS[command]
    return PACKAGE / file, kind


def print_help(command: str, file: Path | None = None) -> None:
    """Print the help of a command; for `run`, that of the recipe in this file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    takes = f" {file}" if file else COMMAND_OPTIONS.get(command, ("",))[0]
    file, kind = (file, "Config") if file else file_and_class(command)
    options = options_of(file, kind)
    rows = [
        (option.group, Text(_flag(name, option)), _description(option))
        for name, option in options.items()
    ]
    if command not in COMMAND_OPTIONS:
        several = "Presets and config files"
        presets = ", ".join(presets_of(file))
        rows += (
            [(several, Text("--preset NAME ..."), Text(f"Use one or more of {presets}."))]
            if presets
            else []
        )
        rows += [
            (several, Text("--config FILE.toml"), Text("Read options from a file; same names."))
        ]
    if "model" in options:
        trust = Text("Allow Python code and pickles that come with a model to run.")
        rows.append((options["model"].group, Text("--trust-remote-code"), trust))
    console = Console(highlight=False)
    console.print(f"usage: trivet {command}{takes} [options]\n\n{about(file, kind)}", markup=False)
    for group in dict.fromkeys(row[0] for row in rows):
        table = Table(title=f"\n{group}", title_style="bold", title_justify="left")
        table.box, table.show_header, table.pad_edge = None, False, False
        table.add_column(no_wrap=True, width=max(len(flag) for _, flag, _ in rows))
        table.add_column(overflow="fold")
        for _, flag, text in (row for row in rows if row[0] == group):
            table.add_row(flag, text)
        console.print(table)


def _flag(name: str, option: Option) -> str:
    flag = f"--{name.replace('_', '-')}"
    if option.kind.startswith("tuple["):
        return f"{flag} {WORDS[option.kind[6:].partition(',')[0]]} ..."
    return f"{flag} {WORDS.get(option.kind, 'WORD')}".rstrip()


def _description(option: Option) -> Any:
    from rich.text import Text

    text, notes = Text(option.text), list[str]()
    if option.kind.startswith("Literal["):
        notes.append(option.kind[8:-1].replace("'", "").replace(", ", " | "))
    if option.default is True:
        notes.append("on; --no-... turns it off")
    elif option.default not in ("", (), False) or (option.default == 0 and option.kind != "bool"):
        notes.append(f"default {option.default}")
    return text.append(f" [{'; '.join(notes)}]", style="dim") if notes else text
