"""Files of a run directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file, readable, whole or not there."""
    half = path.with_name(f".{path.name}")
    half.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    half.replace(path)


class RunDirectory(type(Path())):  # type: ignore[misc]  a Path of this system
    """The path of a run directory, which displays itself in a notebook."""

    def _repr_html_(self) -> str:
        from trivet.report.notebook import shown

        return shown(self)
