"""Reading run directories, also of runs that go on: files that may still be written, and whether somebody writes them."""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trivet.errors import InputError
from trivet.recipes import METHODS


def require_run(run: Path) -> None:
    """InputError where this is no run directory."""
    if not any((run / name).exists() for name in ("run.json", "config.toml", "metrics.jsonl")):
        why = "there is no run.json and no config.toml in it" if run.is_dir() else "there is no such directory"
        raise InputError(f"{run} is not a run directory: {why}")


def common_folder(runs: Sequence[Path]) -> Path:
    """The folder that holds all these runs, relative as they are; the current one where they share nothing but the root."""
    folder = Path(os.path.commonpath([os.path.abspath(run) for run in runs]))
    if folder == Path(folder.anchor):
        return Path()
    return folder if any(run.is_absolute() for run in runs) else Path(os.path.relpath(folder))


def run_names(runs: Sequence[Path], methods: Sequence[str]) -> list[str]:
    """The last parts of each path, as few as tell the runs apart, and the method where that is not the name."""
    parts = [run.resolve().parts for run in runs]
    count = next((n for n in range(1, 9) if len({some[-n:] for some in parts}) == len(parts)), 1)
    names = ["/".join(some[-count:]) for some in parts]
    return [name if method in ("", name) else f"{name} ({method})" for name, method in zip(names, methods, strict=True)]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one a step; a last one that is still being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}, line {number}: not JSON; was it edited?") from None
    return rows


def read_object(path: Path) -> dict[str, Any]:
    """The object of a .json file; {} where there is none, or no whole one."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def method_of(run: Path) -> str:
    """The method that made this run; '' where nothing says so."""
    config = run / "config.toml"
    found = re.match(r"# trivet (\S+)", config.read_text(errors="replace")) if config.exists() else None
    return read_object(run / "run.json").get("method") or (found[1] if found else "")


def recipe_source(run: Path) -> str:
    """Where the recipe of this run is found: a method's name, or the absolute path of a file of one's own.

    Errors: InputError where nothing says so.
    """
    source = read_object(run / "run.json").get("recipe") or method_of(run)
    known = isinstance(source, str) and (source in METHODS or Path(source).is_absolute() or source == "__main__")
    if not known or not (run / "config.toml").exists():
        raise InputError(f"{run} is not a run directory: there is no config.toml in it that names a method")
    return source


def state(run: Path, pid: Any, seconds: Sequence[float]) -> str:
    """'done', 'running' or 'stopped', given the pid of run.json and how long the last steps took.

    A run that was killed leaves no summary.json, and a pid that is gone. That may be one of another machine, over a shared
    disk: while lines come as they did, it runs. One whose pid nobody knows, or somebody else has by now, has stopped when
    nothing came for very long.
    """
    if (run / "summary.json").exists():
        return "done"
    written = next(
        (path for name in ("metrics.jsonl", "run.json", "config.toml") if (path := run / name).exists()), run
    )
    quiet, longest = time.time() - written.stat().st_mtime, max(seconds, default=0.0)
    if lives(pid) is False:
        return "running" if seconds and quiet < max(2.0, 2 * longest) else "stopped"
    return "running" if quiet < max(600.0, 20 * longest) or (lives(pid) and not seconds) else "stopped"


def lives(pid: Any) -> bool | None:
    """Whether this process is there, and more than a name that its parent has not let go of; None for no pid."""
    if not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's; or a system without /proc
        return True
