"""Rows to examples: files and hub data sets, the formats of the field, a split by prompt, and a count of what was left out.

Formats: text · messages · prompt + completion · prompt + chosen + rejected (strings or conversations, the prompt also
implicit) · prompt plus any columns.
"""

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trivet.batch import Example
from trivet.errors import InputError
from trivet.model.text import encode_completion, encode_prompt, is_conversation

Row = dict[str, Any]


def load_examples(
    path: str,
    tokenizer: Any,
    stops: Sequence[int],
    form: str,
    *,
    max_prompt: int,
    max_completion: int,
    counts: Counter[str],
) -> list[Example]:
    """Read, check and tokenize the rows of a file or hub data set.

    form: 'supervised', 'preference' or 'prompts'. counts: gets what was left out or cut, by reason.
    Errors: InputError that names the file and row where a row can't be understood or none is left.
    """
    examples: list[Example] = []
    for number, row in enumerate(read_rows(path), 1):
        where = f"{path} row {number}"
        counts["rows read"] += 1
        prompt, completions = _sides(row, form, where)
        if form == "preference" and completions[0] == completions[1]:
            counts["left out: chosen equals rejected"] += 1
            continue
        if any(not _content(completion) for completion in completions):
            counts["left out: empty completion"] += 1
            continue
        try:
            example = _encode_example(tokenizer, stops, prompt, completions, row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if not example.prompt or (form == "supervised" and not any(example.learned[0])):
            counts["left out: empty prompt" if not example.prompt else "left out: nothing to learn"] += 1
        elif len(example.prompt) > max_prompt:
            counts[f"left out: prompt over {max_prompt} tokens"] += 1
        else:
            for ids, learned in zip(example.completions, example.learned, strict=True):
                if len(ids) > max_completion:
                    counts[f"cut: completion over {max_completion} tokens (its EOS is not learned)"] += 1
                    del ids[max_completion:], learned[max_completion:]
            if form == "preference" and example.completions[0] == example.completions[1]:
                counts["left out: chosen equals rejected once cut"] += 1
                continue
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
    file, name = Path(path), path.removesuffix(".gz")
    if file.is_dir() or (not file.exists() and not name.endswith((".jsonl", ".json", ".csv", ".parquet"))):
        yield from _hub_rows(path)
        return
    if not file.exists():
        raise InputError(f"{path}: no such file")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet as parquet

            yield from parquet.read_table(file).to_pylist()
            return
        with gzip.open(file, "rt", encoding="utf-8") if path.endswith(".gz") else open(file, encoding="utf-8") as lines:
            if name.endswith(".csv"):
                yield from csv.DictReader(lines)
            elif name.endswith(".json"):
                rows = json.load(lines)
                yield from (
                    _checked(row, f"{path} row {i}")
                    for i, row in enumerate(rows if isinstance(rows, list) else [rows], 1)
                )
            elif name.endswith(".jsonl"):
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        try:
                            row = json.loads(line)
                        except json.JSONDecodeError as error:
                            raise InputError(f"{path} line {number}: not JSON ({error})") from None
                        yield _checked(row, f"{path} line {number}")
            else:
                raise InputError(f"{path}: unknown kind of file; use .jsonl, .json, .csv or .parquet, each also as .gz")
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError, ArithmeticError) as error:
        raise InputError(f"{path}: can't be read as {Path(name).suffix}: {error}") from None


def _hub_rows(name: str) -> Iterator[Row]:
    import datasets

    try:
        yield from datasets.load_dataset(name, split="train")  # type: ignore[misc]
    except Exception as error:  # the hub client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: neither a file here nor a data set that can be loaded from the hub: {reason}"
        ) from None


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with columns, got {type(row).__name__}")
    return row


def _content(completion: Any) -> bool:
    return any(message.get("content") for message in completion) if is_conversation(completion) else bool(completion)


def _sides(row: Row, form: str, where: str) -> tuple[Any, list[Any]]:
    """Prompt and completions of a row in whichever of the formats it is; prompt None where there is none to split off."""
    wanted = {
        "supervised": "text, messages, or prompt and completion",
        "preference": "chosen and rejected",
        "prompts": "prompt",
    }
    if form == "preference" and row.get("chosen") is not None and row.get("rejected") is not None:
        prompt, completions = row.get("prompt"), [row["chosen"], row["rejected"]]
        if is_conversation(prompt) and all(map(is_conversation, completions)):
            completions = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in completions]
        return (prompt, completions) if prompt is not None else _implicit_prompt(*completions)
    if form == "prompts" and (row.get("prompt") is not None or is_conversation(row.get("messages"))):
        return row.get("prompt") if row.get("prompt") is not None else _opening(row["messages"])[0], []
    if form == "supervised":
        answer = row.get("completion") if row.get("completion") is not None else row.get("chosen")
        if row.get("prompt") is not None and answer is not None:
            return row["prompt"], [answer]
        if answer is not None and row.get("rejected") is not None:
            prompt, completions = _implicit_prompt(answer, row["rejected"])
            return prompt, completions[:1]
        if is_conversation(row.get("messages")):
            prompt, completion = _opening(row["messages"])
            return prompt, [completion]
        if row.get("text") is not None:
            return None, [row["text"]]
    raise InputError(f"{where}: needs {wanted[form]}; it has {', '.join(map(str, row)) or 'no columns'}")


def _opening(messages: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split a conversation before the assistant's first turn."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[:first], messages[first:]


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
    if prompt is None:  # plain text: its first token is given, the rest is learned
        ids = [*encode_prompt(tokenizer, completions[0]), stops[0]]
        return Example(prompt=ids[:1], completions=[ids[1:]], learned=[[True] * (len(ids) - 1)], row=row)
    prompt_ids = encode_prompt(tokenizer, prompt)
    encoded = [encode_completion(tokenizer, prompt, prompt_ids, completion, stops) for completion in completions]
    return Example(
        prompt=prompt_ids, completions=[ids for ids, _ in encoded], learned=[flags for _, flags in encoded], row=row
    )
