"""Writing the files of a run directory durably."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a readable JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, even across a power cut: it gets its name once it is on the disk."""
    half = path.with_name(f".{path.name}")
    half.write_text(text, encoding="utf-8")
    to_disk(half)
    half.replace(path)
    to_disk(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its parents so that they survive a power cut."""
    if not path.exists():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
