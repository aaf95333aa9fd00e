"""Files of a run directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The whole file, readable."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


class RunDirectory(type(Path())):  # type: ignore[misc]  a Path of this system
    """The path of a run directory, which displays itself in a notebook."""

    def _repr_html_(self) -> str:
        from trivet.report.notebook import shown

        return shown(self)
