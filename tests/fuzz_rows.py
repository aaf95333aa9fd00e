"""Coverage-guided fuzzing of the row parser, by atheris (pip install atheris; it is not among the tests' requirements).

    python tests/fuzz_rows.py -atheris_runs=100000 -max_len=4096

Bytes as a .jsonl, .json or .csv file: rows that can be written as JSON and are read again, or one sentence with the file's name;
the same rows one after the other and by number.
"""

# ruff: noqa: PT017  what an error says is checked where it is caught
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["trivet", "json", "csv"]):
    from trivet.data.rows import Lines, read_rows
    from trivet.errors import InputError

FOLDER = TemporaryDirectory(dir="/dev/shm")
KINDS = (".jsonl", ".jsonl", ".json", ".csv")


def try_bytes(data: bytes) -> None:
    """One case; its first byte says what kind of file."""
    path = Path(FOLDER.name) / f"a{KINDS[data[0] % 4] if data else '.jsonl'}"
    path.write_bytes(data[1:])
    found = None
    try:
        found = list(read_rows(str(path)))
        for row in found:
            json.dumps(row, ensure_ascii=False).encode()
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    if path.suffix != ".jsonl":
        return
    try:
        with path.open("rb") as file:
            lines = Lines(str(path), file)
            again = [lines[i] for i in range(len(lines))]
    except InputError as error:
        assert found is None, f"taken one after the other, refused by number: {error}"
    else:
        assert found is not None, "taken by number, refused one after the other"
        assert repr(again) == repr(found)


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_bytes)
    atheris.Fuzz()
