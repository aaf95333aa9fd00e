"""Reading run directories, including those of active runs: files that may still be growing, and
whether a process is writing them.
"""

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
    """Raise an InputError if this is not a run directory."""
    if not any((run / name).exists() for name in ("run.json", "config.toml", "metrics.jsonl")):
        why = "it has no run.json and no config.toml" if run.is_dir() else "it does not exist"
        raise InputError(f"{run} is not a run directory: {why}")


def common_folder(runs: Sequence[Path]) -> Path:
    """Return the folder that holds all these runs, relative if they are; the current one if they
    share nothing but the root.
    """
    folder = Path(os.path.commonpath([os.path.abspath(run) for run in runs]))
    if folder == Path(folder.anchor):
        return Path()
    return folder if any(run.is_absolute() for run in runs) else Path(os.path.relpath(folder))


def run_names(runs: Sequence[Path], methods: Sequence[str]) -> list[str]:
    """Return the last parts of each path, as few as tell the runs apart, and the method if it
    differs from the name.
    """
    parts = [run.resolve().parts for run in runs]
    count = next((n for n in range(1, 9) if len({some[-n:] for some in parts}) == len(parts)), 1)
    names = ["/".join(some[-count:]) for some in parts]
    return [
        name if method in ("", name) else f"{name} ({method})"
        for name, method in zip(names, methods, strict=True)
    ]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl, a line per step; skip a last line that is still being written."""
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
    """Read the object in a .json file; {} if the file is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def method_of(run: Path) -> str:
    """Return the method of this run; '' if it is unknown."""
    config = run / "config.toml"
    match = (
        re.match(r"# trivet (\S+)", config.read_text(errors="replace")) if config.exists() else None
    )
    return read_object(run / "run.json").get("method") or (match[1] if match else "")


def recipe_source(run: Path) -> str:
    """Return the recipe of this run: a method's name, or the absolute path of a user's file.

    Errors: InputError if it is unknown.
    """
    source = read_object(run / "run.json").get("recipe") or method_of(run)
    is_recipe = isinstance(source, str) and (
        source in METHODS or Path(source).is_absolute() or source == "__main__"
    )
    if not is_recipe or not (run / "config.toml").exists():
        raise InputError(f"{run} is not a run directory: it has no config.toml that names a method")
    return source


def state(run: Path, pid: Any, seconds: Sequence[float]) -> str:
    """Return 'done', 'running' or 'stopped', given the pid in run.json and the times of the last
    steps.

    A run that was killed leaves no summary.json, and a pid that no longer exists. But a missing pid
    may also belong to another machine that shares the disk: while lines appear at the usual pace,
    the run is running. If the pid is unknown, or may have been reused, the run has stopped if
    nothing was written for a very long time.
    """
    if (run / "summary.json").exists():
        return "done"
    written = next(
        (
            path
            for name in ("metrics.jsonl", "run.json", "config.toml")
            if (path := run / name).exists()
        ),
        run,
    )
    quiet, longest = time.time() - written.stat().st_mtime, max(seconds, default=0.0)
    if lives(pid) is False:
        return "running" if seconds and quiet < max(2.0, 2 * longest) else "stopped"
    return (
        "running" if quiet < max(600.0, 20 * longest) or (lives(pid) and not seconds) else "stopped"
    )


def lives(pid: Any) -> bool | None:
    """Whether this process exists and is not a zombie; None if there is no pid."""
    if not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process, or a system without /proc
        return True
