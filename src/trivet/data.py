"""Rows to examples: files and hub data sets, the formats of the field, a split by prompt, and a count of what was left out.

Formats: text · messages · prompt + completion · prompt + chosen + rejected (strings or conversations, the prompt also
implicit) · prompt + completion + label · prompt plus any columns.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trivet.batch import Example
from trivet.errors import InputError, first_line
from trivet.model.text import encode_completion, encode_prompt, is_conversation

Row = dict[str, Any]
NEEDS = {
    "supervised": "text, messages or prompt and completion",
    "preference": "chosen and rejected",
    "feedback": "chosen and rejected (or, for --loss kto, prompt, completion and label)",
    "prompts": "prompt",
}
KINDS = (".jsonl", ".json", ".csv", ".parquet")


def load_examples(
    path: str,
    tokenizer: Any,
    stops: Sequence[int],
    form: str,
    *,
    max_prompt: int,
    max_completion: int,
    counts: Counter[str],
    truncate_prompts: bool = False,
) -> list[Example]:
    """Read, check and tokenize the rows of a file or hub data set.

    truncate_prompts: keep the end of a prompt over max_prompt tokens rather than leave its row out.
    form: 'supervised', 'preference', 'feedback' (preferences, or completions with a label) or 'prompts'. counts: gets what was left out or cut, by reason.
    Errors: InputError that names the file and row where a row can't be understood or none is left.
    """
    examples: list[Example] = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        counts["rows read"] += 1
        prompt, completions = _sides(row, form, where)
        if form == "feedback" and len(completions) == 1:
            row = row | {"label": _label(row, where)}
        if reason := _useless(prompt, completions):
            counts[f"left out: {reason}"] += 1
            continue
        try:
            example = _encode_example(tokenizer, stops, prompt, completions, row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        longer = sum(len(ids) > max_completion for ids in example.completions)
        for part in (*example.completions, *example.learned):
            del part[max_completion:]
        if truncate_prompts and len(example.prompt) > max_prompt:
            del example.prompt[:-max_prompt]
            counts[f"cut: prompt over {max_prompt} tokens (its end is kept)"] += 1
        if reason := _useless_tokens(example, max_prompt):
            counts[f"left out: {reason}"] += 1
            continue
        if longer:
            counts[f"cut: completion over {max_completion} tokens (its EOS is not learned)"] += longer
        counts["examples"] += 1
        examples.append(example)
    if not counts["rows read"]:
        raise InputError(f"{path}: the data set is empty; it needs at least one row")
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason.startswith("left out"))
        raise InputError(
            f"{path}: no usable row is left ({reasons}); see --max-prompt-tokens and the format of your rows"
        )
    return examples


def split_by_prompt(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out about this fraction of the prompts: all rows of one prompt fall on the same side, whatever their order."""
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        key = zlib.crc32(json.dumps([seed, example.prompt]).encode()) / 2**32
        sides[key < fraction].append(example)
    return sides


def read_rows(path: str) -> Iterator[Row]:
    """The rows of a .jsonl, .json, .csv or .parquet file (.gz too), or of a hub data set's train split."""
    if not path:
        raise InputError(
            "no data was named: give --data a file (.jsonl, .json, .csv, .parquet) or a hub name (or use --preset toy)"
        )
    file, kind = Path(path), Path(path.lower().removesuffix(".gz")).suffix
    if file.is_dir() or (not file.exists() and kind not in KINDS):
        yield from _hub_rows(path)
        return
    if not file.exists():
        raise InputError(f"{path}: no such file")
    if kind not in KINDS:
        raise InputError(f"{path}: unknown kind of file; use {', '.join(KINDS)}, each also as .gz")
    number = 0
    try:
        with gzip.open(file) if path.lower().endswith(".gz") else file.open("rb") as data:
            for row in _file_rows(data, kind):
                if not isinstance(row, dict) or None in row:  # csv keeps cells beyond the header under None
                    raise ValueError("more cells than its header" if kind == ".csv" else "not an object with columns")
                number += 1
                yield row
    except Exception as error:  # the readers raise many kinds
        where = "" if kind == ".parquet" or (kind == ".json" and not number) else f" row {number + 1}"
        raise InputError(f"{path}{where}: can't be read as {kind}: {error}") from None


def _file_rows(data: Any, kind: str) -> Iterator[Any]:
    if kind == ".parquet":
        import pyarrow.parquet as parquet

        yield from parquet.read_table(io.BytesIO(data.read())).to_pylist()
    elif kind == ".csv":
        csv.field_size_limit(sys.maxsize)
        yield from csv.DictReader((line.decode("utf-8-sig") for line in data), strict=True)
    elif kind == ".json":
        rows = json.load(data)
        yield from rows if isinstance(rows, list) else [rows]
    else:
        yield from (json.loads(line) for line in data if line.strip())


def _hub_rows(name: str) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(name, split="train")  # type: ignore[misc]
    except Exception as error:  # the hub client raises many kinds
        raise InputError(f"{name}: neither a file here nor a data set from the hub: {first_line(error)}") from None


def _useless(prompt: Any, completions: list[Any]) -> str:
    """Why this row can't teach, '' where it can."""
    if len(completions) == 2 and completions[0] == completions[1]:
        return "chosen equals rejected"
    for side in completions:
        if not (any(m.get("content") or m.get("tool_calls") for m in side) if is_conversation(side) else side):
            return "empty completion"
    return "empty prompt" if prompt == [] else ""


def _useless_tokens(example: Example, max_prompt: int) -> str:
    """The same of its tokens, completions already cut."""
    if not 0 < len(example.prompt) <= max_prompt:
        return f"prompt over {max_prompt} tokens" if example.prompt else "empty prompt"
    if len(example.completions) == 2 and example.completions[0] == example.completions[1]:
        return "chosen equals rejected once cut"
    return "" if all(map(any, example.learned)) else "nothing to learn"


def _sides(row: Row, form: str, where: str) -> tuple[Any, list[Any]]:
    """Prompt and completions of a row in whichever of the formats it is; prompt None where there is none to split off."""

    def get(column: str) -> Any:
        value = row.get(column)
        if value is None or (isinstance(value, str) and column != "messages") or is_conversation(value):
            return value
        expected = "messages" if column == "messages" else "a string or messages"
        raise InputError(
            f"{where}: {column} is {value!r:.60}; expected {expected}, each with a role and content, strings"
        )

    prompt: Any = get("prompt")
    if form == "prompts" and (prompt is not None or row.get("messages") is not None):
        return (_opening(get("messages"))[0], []) if prompt is None else (prompt, [])
    labelled = form == "feedback" and row.get("label") is not None and row.get("chosen") is None
    pair = not labelled and (form != "supervised" or row.get("completion") is None)
    sides: list[Any] = [
        side for side in map(get, ("chosen", "rejected") if pair else ("completion",)) if side is not None
    ]
    if len(sides) == 2 or ((form == "supervised" or labelled) and sides and prompt is not None):
        if isinstance(sides[0], str) != isinstance(sides[-1], str):
            raise InputError(f"{where}: of chosen and rejected one is a string, one messages; make them the same kind")
        prompt, sides = _split(prompt, sides)
        return prompt, {"supervised": sides[:1], "prompts": []}.get(form, sides)
    if form == "supervised" and row.get("messages") is not None:
        return _opening(get("messages"))
    if form == "supervised" and isinstance(get("text"), str):
        return None, [row["text"]]
    has = ", ".join(column if value is not None else f"{column} (null)" for column, value in row.items())
    raise InputError(f"{where}: needs {NEEDS[form]}; it has {has or 'no columns'}")


def _label(row: Row, where: str) -> bool:
    """Whether a labelled completion is good: true or false, 1 or 0, also as a CSV file spells them."""
    said = str(row["label"]).strip().lower()
    if said not in ("true", "1", "1.0", "false", "0", "0.0"):
        raise InputError(f"{where}: label is {row['label']!r:.60}; expected true (a good completion) or false")
    return said in ("true", "1", "1.0")


def _split(prompt: Any, sides: list[Any]) -> tuple[Any, list[Any]]:
    """Prompt and completions apart, where the prompt is implicit, or said again in each side, or a string before messages."""
    if isinstance(prompt, str) and not isinstance(sides[0], str):
        alone = all(side and side[0]["role"] == "assistant" for side in sides)
        prompt = [{"role": "user", "content": prompt}] if alone else None
    if prompt is None:
        return _implicit_prompt(*sides) if len(sides) == 2 else _opening(sides[0])
    said_again = not isinstance(sides[0], str) and all(side[: len(prompt)] == prompt for side in sides)
    return prompt, [side[len(prompt) :] for side in sides] if said_again else sides


def _opening(messages: Any) -> tuple[list[Row], list[list[Row]]]:
    """Prompt and completion: a conversation split before the assistant's first turn."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[:first], [messages[first:]]


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """The prompt that both sides begin with: common messages, or common text up to the last turn or the last space."""
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if isinstance(chosen, str):
        turn, space = chosen[:same].rfind("\n\nAssistant:"), chosen[:same].rfind(" ")
        same = turn + len("\n\nAssistant:") if turn >= 0 else max(space, 0)
    return chosen[:same], [chosen[same:], rejected[same:]]


def _encode_example(tokenizer: Any, stops: Sequence[int], prompt: Any, completions: list[Any], row: Row) -> Example:
    row = row | {"prompt": prompt}  # as rewards see it, also where it was implicit
    if prompt is None:  # plain text: its first token is given, the rest is learned
        ids = [*encode_prompt(tokenizer, completions[0]), stops[0]]
        return Example(prompt=ids[:1], completions=[ids[1:]], learned=[[True] * (len(ids) - 1)], row=row)
    prompt_ids = encode_prompt(tokenizer, prompt)
    encoded = [encode_completion(tokenizer, prompt, prompt_ids, completion, stops) for completion in completions]
    return Example(
        prompt=prompt_ids, completions=[ids for ids, _ in encoded], learned=[flags for _, flags in encoded], row=row
    )
