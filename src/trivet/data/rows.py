"""Read rows of files and hub datasets: one after the other, or by number if there are too many to
hold in memory.

Whatever can't be read is reported in one sentence with the file and the line (of .jsonl) or row.
"""

import csv
import functools
import gzip
import io
import json
import shutil
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy

from trivet.dependencies import require_extra
from trivet.errors import InputError, first_line
from trivet.places import data_file

Row = dict[str, Any]
SMALL = 4 << 20  # a file of fewer bytes is always read whole
MANY, LARGE = 100_000, 200 << 20  # more rows or bytes than this are not held in memory
BLOCK = 1 << 24


def read_rows(path: str) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json, .csv or .parquet file (also .gz and .zst), or of the train
    split of a hub dataset.
    """
    return (row for _, row in numbered_rows(path))


def numbered_rows(path: str) -> Iterator[tuple[str, Row]]:
    """Yield the same rows, each with its place: the file and the line or row."""
    file, kind = data_file(path)
    if file is None:
        table = _hub(path)
        # the cache is shared only with many_rows; a folder may change before the next run
        _hub.cache_clear()
        yield from ((f"{path} row {number}", row) for number, row in enumerate(table, 1))
        return
    number, unit = 0, "line" if kind == ".jsonl" else "row"
    try:
        with _open(path) as data:
            rows = (
                map(_parse, iter(data.readline, b""))
                if kind == ".jsonl"
                else _file_rows(data, kind)
            )
            while True:
                number += 1
                row = next(rows, StopIteration)
                if row is StopIteration:
                    return
                if row is not None:
                    yield f"{path} {unit} {number}", _require_object(row, kind)
    except Exception as error:  # the readers raise many exception types
        whole = number == 1 and kind in (".parquet", ".json")
        raise _unreadable(path if whole else f"{path} {unit} {number}", kind, error) from None


def many_rows(path: str) -> "Lines | Table | None":
    """The rows by number if there are too many to hold in memory, else None. A .json file is read
    whole, so always None.
    """
    file, kind = data_file(path)
    if file is None:
        table = _hub(path)
        if len(table) <= MANY:
            return None  # numbered_rows reuses the cached table
        _hub.cache_clear()
        return Table(path, table)
    if file.stat().st_size < SMALL or kind == ".json":
        return None
    if kind == ".parquet":
        return _parquet_table(path) if file.suffix.lower() == kind else None
    lines = Lines(path, file.open("rb") if file.suffix.lower() == ".jsonl" else _spool(path, kind))
    return lines if len(lines) > MANY or lines.bytes > LARGE else None


class Lines:
    """Rows of a JSON lines file by number. One pass over its bytes finds where each row begins;
    only these offsets are held in memory.
    """

    def __init__(self, path: str, file: IO[bytes]):
        self.path, self.file = path, file
        weakref.finalize(self, file.close)
        self.starts, self.bytes = _line_starts(path, file)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> Row:
        try:
            self.file.seek(int(self.starts[row]))
            return _require_object(_parse(self.file.readline()), ".jsonl")
        except Exception as error:
            raise _unreadable(self.where(row), ".jsonl", error) from None

    def where(self, row: int) -> str:
        """The file and the line number, counting empty lines as an editor does."""
        self.file.seek(0)
        left, number = int(self.starts[row]), 1
        while left and (block := self.file.read(min(left, BLOCK))):
            left, number = left - len(block), number + block.count(b"\n")
        return f"{self.path} line {number}"


@dataclass
class Place:
    """The place of a row, the file and the line or row, computed only when converted to str."""

    rows: "Lines | Table"
    row: int

    def __str__(self) -> str:
        return self.rows.where(self.row)


class Table:
    """Rows, by number, of a dataset that `datasets` keeps on disk."""

    def __init__(self, path: str, table: Any):
        self.path, self.table = path, table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Row:
        try:
            return self.table[row]
        except Exception as error:  # arrow and the feature decoders raise many exception types
            raise InputError(f"{self.where(row)}: can't be read: {first_line(error)}") from None

    def where(self, row: int) -> str:
        """The dataset and the row number."""
        return f"{self.path} row {row + 1}"


def _line_starts(path: str, file: IO[bytes]) -> tuple[Any, int]:
    """The offset of each non-empty line, and the size of the file.

    Errors: InputError for a line that is not a complete {...}: cut short, zeros left by a crash, or
    anything else. What is between the braces is not checked.
    """
    starts, size, lines = [], 0, 0
    file.seek(0)
    while block := file.read(BLOCK) + file.readline():
        letters = numpy.frombuffer(block, numpy.uint8)
        ends = numpy.flatnonzero(letters == ord("\n"))
        if not block.endswith(b"\n"):
            ends = numpy.append(ends, len(block))
        begins = numpy.concatenate(([0], ends[:-1] + 1))
        last = letters[ends - 1]
        returns = last == ord("\r")
        last[returns] = letters[ends[returns] - 2]
        odd = (letters[begins] != ord("{")) | (last != ord("}"))
        for line in numpy.flatnonzero(odd):
            try:
                row = _parse(block[begins[line] : ends[line]])
                odd[line] = row is None or _require_object(row, ".jsonl") is None
            except Exception as error:
                raise _unreadable(f"{path} line {lines + line + 1}", ".jsonl", error) from None
        starts.append(size + begins[~odd])
        size, lines = size + len(block), lines + len(ends)
    return numpy.concatenate(starts or [numpy.zeros(0, numpy.int64)]), size


def _open(path: str) -> Any:
    packed = Path(path.lower()).suffix
    if packed == ".zst":
        require_extra("hub", path)
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
    return gzip.open(path) if packed == ".gz" else open(path, "rb")


def _spool(path: str, kind: str) -> IO[bytes]:
    """Write the rows as plain JSON lines to a temporary file, which is deleted when closed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  Lines closes it
    try:
        if kind == ".csv":
            file.writelines(json.dumps(row).encode() + b"\n" for row in read_rows(path))
        else:
            with _open(path) as data:
                shutil.copyfileobj(data, file, BLOCK)
    except Exception as error:
        file.close()
        for _ in read_rows(path):  # a damaged archive: reading it row by row finds the line
            pass
        raise _unreadable(path, kind, error) from None
    return file


def _file_rows(data: Any, kind: str) -> Iterator[Any]:
    if kind == ".parquet":
        require_extra("hub", "a .parquet file")
        import pyarrow.parquet as parquet

        yield from parquet.read_table(io.BytesIO(data.read())).to_pylist()
    elif kind == ".csv":
        csv.field_size_limit(sys.maxsize)
        reader = csv.DictReader((line.decode("utf-8-sig") for line in data), strict=True)
        _unique_keys([(name, None) for name in reader.fieldnames or () if name])
        yield from reader
    else:
        text = data.read()
        rows = JSON.decode(text.decode(json.detect_encoding(text)))
        yield from (_encodable(row, text) for row in (rows if isinstance(rows, list) else [rows]))


def _parse(line: bytes) -> Any:
    """Decode a line of JSON; None if it is empty."""
    return _encodable(JSON.decode(line.decode("utf-8-sig")), line) if line.strip() else None


def _unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """A dict of these keys and values; ValueError if a key is repeated (JSON would keep the
    last).
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!a:.60} appears twice; keep one of them")
    return row


JSON = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _encodable(row: Any, text: bytes) -> Any:
    """Return the row; ValueError if it contains half of a surrogate pair, which can be read but not
    written.
    """
    if b"\\ud" in text or b"\\uD" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "its text is not valid Unicode (half of a surrogate pair); repair or remove it"
            ) from None
    return row


def _require_object(row: Any, kind: str) -> Row:
    if not isinstance(row, dict) or None in row:  # csv keeps cells beyond the header under None
        raise ValueError(
            "more cells than its header" if kind == ".csv" else "not an object with columns"
        )
    return row


def _unreadable(where: str, kind: str, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
    # the error's own line number counts inside the row
    if isinstance(error, json.JSONDecodeError) and kind == ".jsonl":
        reason = f"{error.msg} at character {error.pos + 1}"
    return InputError(f"{where}: can't be read as {kind}: {reason}")


@functools.lru_cache(maxsize=1)
def _hub(name: str) -> Any:
    """The train split of a hub dataset or of a folder of files, which `datasets` keeps on disk and
    reads row by row.
    """
    require_extra("hub", f"{name}, which is not a local file and so is read as a dataset,")
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises many exception types
        raise InputError(
            f"{name}: neither a local file nor a dataset on the hub: {first_line(error)}"
        ) from None


def _parquet_table(path: str) -> Table | None:
    require_extra("hub", path)
    import datasets
    import pyarrow.parquet as parquet

    try:
        facts = parquet.read_metadata(path)
        size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        if facts.num_rows <= MANY and size <= LARGE:
            return None
        datasets.disable_progress_bars()
        return Table(path, datasets.Dataset.from_parquet(path))
    except Exception as error:
        raise _unreadable(path, ".parquet", error) from None
