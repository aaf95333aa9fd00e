"""Turn rows into examples: the field's usual formats, a split by prompt, and counts of what was
left out.

Formats: text · messages · prompt + completion · prompt + chosen + rejected (strings or
conversations; the prompt may be implicit) · prompt + completion + label · prompt plus any columns.
rows.py reads files and hub datasets.
"""

import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from trivet.batch import Example
from trivet.data.rows import Lines, Place, Row, Table, many_rows, numbered_rows
from trivet.errors import InputError
from trivet.model.text import encode_completion, encode_prompt, is_conversation

NEEDS = {
    "supervised": "text, messages or prompt and completion",
    "preference": "chosen and rejected",
    "feedback": "chosen and rejected (or, for --loss kto, prompt, completion and label)",
    "prompts": "prompt",
}
Encode = Callable[[Row, "Counter[str]"], Example | None]  # counts what it leaves out


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
    vocabulary: int = 1 << 60,
    lazily: bool = False,
) -> Sequence[Example]:
    """Read, check and tokenize the rows of a file or hub dataset.

    truncate_prompts: keep the end of a prompt over max_prompt tokens instead of leaving its row
    out. form: 'supervised', 'preference', 'feedback' (preferences, or completions with a label) or
    'prompts'. counts: receives the number of rows left out or cut, by reason. vocabulary: number of
    token ids the model has. lazily: return LazyExamples if there are too many rows to hold in
    memory. Errors: InputError naming the file and row if a row can't be understood, or if no row is
    left.
    """

    def encode(row: Row, counts: Counter[str]) -> Example | None:
        counts["rows read"] += 1
        prompt, completions = _sides(row, form)
        if form == "feedback" and len(completions) == 1:
            row = row | {"label": _label(row)}
        if reason := _skip_reason(prompt, completions):
            counts[f"left out: {reason}"] += 1
            return None
        example = _encode_example(tokenizer, stops, prompt, completions, row)
        longer = sum(len(ids) > max_completion for ids in example.completions)
        for part in (*example.completions, *example.learned):
            del part[max_completion:]
        if truncate_prompts and len(example.prompt) > max_prompt:
            del example.prompt[:-max_prompt]
            counts[f"cut: prompt over {max_prompt} tokens (its end is kept)"] += 1
        if reason := _skip_reason_in_tokens(example, max_prompt):
            counts[f"left out: {reason}"] += 1
            return None
        if (
            highest := max(max(ids) for ids in (example.prompt, *example.completions))
        ) >= vocabulary:
            raise InputError(
                f"{tokenizer.name_or_path}: its tokenizer produced token id {highest}, but its "
                f"model has only {vocabulary} ids; use a tokenizer and a model that match"
            )
        if longer:
            counts[f"cut: completion over {max_completion} tokens (its EOS is not learned)"] += (
                longer
            )
        counts["examples"] += 1
        return example

    if lazily and (rows := many_rows(path)):
        return LazyExamples(rows, encode, counts)
    examples = [
        example
        for place, row in numbered_rows(path)
        if (example := _with_place(encode, row, counts, place))
    ]
    if not counts["rows read"]:
        raise InputError(f"{path}: the dataset is empty; it needs at least one row")
    if not examples:
        raise InputError(
            f"{path}: no usable row is left ({_left_out(counts)}); check --max-prompt-tokens and "
            "the format of your rows"
        )
    return examples


class LazyExamples(Sequence[Example]):
    """Examples from more rows than fit in memory: each is read, checked, tokenized and counted when
    it is first accessed.

    A skipped row is replaced by another chosen from its index, so an index always yields the same
    example.
    """

    def __init__(
        self, rows: Lines | Table, encode: Encode, counts: Counter[str], *, checked: int = 1000
    ):
        self.rows, self.encode, self.counts = rows, encode, counts
        self.counted, self.heldout, self.seed = bytearray(len(rows)), set[str](), 0
        counts["rows in all, read as they are needed (what follows is of those read so far)"] = len(
            rows
        )
        # check some rows now, so that an error in all rows is reported at once
        for row in (*range(min(checked, len(rows))), len(rows) - 1):
            self._read(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._usable(range(len(self))[index])

    def hold_out(self, fraction: float, seed: int, limit: int) -> list[Example]:
        """Draw this share of the rows at random, at most limit; from now on, rows with these
        prompts count as unusable.
        """
        count = min(limit, round(fraction * len(self)))
        heldout = [self._usable(row) for row in random.Random(seed).sample(range(len(self)), count)]
        self.heldout, self.seed = {_split_key(example, seed) for example in heldout}, seed
        return heldout

    def _usable(self, row: int, tries: int = 1000) -> Example:
        draw = random.Random(row)
        for _ in range(tries):
            example = self._read(row)
            if example and not (self.heldout and _split_key(example, self.seed) in self.heldout):
                return example
            row = draw.randrange(len(self))
        raise InputError(
            f"{self.rows.path}: none of {tries:,} rows is usable "
            f"({_left_out(self.counts) or 'nothing left out'}; the others "
            "have held-out prompts); check --max-prompt-tokens, --eval-fraction and the "
            "format of your rows"
        )

    def _read(self, row: int) -> Example | None:
        counts = Counter[str]() if self.counted[row] else self.counts
        self.counted[row] = 1
        return _with_place(self.encode, self.rows[row], counts, Place(self.rows, row))


def split_by_prompt(
    examples: Sequence[Example], fraction: float, seed: int, limit: int = 1 << 60
) -> tuple[Sequence[Example], list[Example]]:
    """Hold out about this fraction of the prompts. All rows with the same prompt fall on the same
    side, whatever their order.

    limit: the most rows to hold out when there are too many rows to read them all.
    """
    if isinstance(examples, LazyExamples):
        return examples, examples.hold_out(fraction, seed, limit)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[zlib.crc32(_split_key(example, seed).encode()) / 2**32 < fraction].append(example)
    return sides


def _split_key(example: Example, seed: int) -> str:
    """The string that decides an example's side of the split: its prompt; for plain text, whose
    prompt is only a first token, the whole text.
    """
    whole = example.completions[0] if example.row["prompt"] is None else []
    return json.dumps([seed, example.prompt + whole])


def _with_place(encode: Encode, row: Row, counts: Counter[str], place: object) -> Example | None:
    """Call encode(row, counts) and prefix its errors with the row's place, made by str()."""
    try:
        return encode(row, counts)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except RecursionError:
        raise InputError(f"{place}: nested too deeply") from None


def _left_out(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {reason}" for reason, count in counts.items() if reason.startswith("left out")
    )


def _skip_reason(prompt: Any, completions: list[Any]) -> str:
    """Why nothing can be learned from this row; '' if something can."""
    if len(completions) == 2 and completions[0] == completions[1]:
        return "chosen equals rejected"
    for side in completions:
        if not (
            any(m.get("content") or m.get("tool_calls") for m in side)
            if is_conversation(side)
            else side
        ):
            return "empty completion"
    return "empty prompt" if prompt == [] else ""


def _skip_reason_in_tokens(example: Example, max_prompt: int) -> str:
    """The same check on its tokens, after completions were cut."""
    if not 0 < len(example.prompt) <= max_prompt:
        return f"prompt over {max_prompt} tokens" if example.prompt else "empty prompt"
    if len(example.completions) == 2 and example.completions[0] == example.completions[1]:
        return "chosen equals rejected once cut"
    return "" if all(map(any, example.learned)) else "nothing to learn"


def _sides(row: Row, form: str) -> tuple[Any, list[Any]]:
    """The prompt and completions of a row in any of the formats; the prompt is None for plain
    text.
    """

    def get(column: str) -> Any:
        value = row.get(column)
        if (
            value is None
            or (isinstance(value, str) and column != "messages")
            or is_conversation(value)
        ):
            return value
        expected = "messages" if column == "messages" else "a string or messages"
        raise InputError(
            f"{column} is {value!r:.60}; expected {expected}, each with a string role and content"
        )

    prompt: Any = get("prompt")
    if form == "prompts" and (prompt is not None or row.get("messages") is not None):
        return (_opening(get("messages"))[0], []) if prompt is None else (prompt, [])
    labelled = form == "feedback" and row.get("label") is not None and row.get("chosen") is None
    pair = not labelled and (form != "supervised" or row.get("completion") is None)
    sides: list[Any] = [
        side
        for side in map(get, ("chosen", "rejected") if pair else ("completion",))
        if side is not None
    ]
    if len(sides) == 2 or ((form == "supervised" or labelled) and sides and prompt is not None):
        if isinstance(sides[0], str) != isinstance(sides[-1], str):
            raise InputError(
                "one of chosen and rejected is a string, the other messages; make both the same"
            )
        prompt, sides = _split(prompt, sides)
        return prompt, {"supervised": sides[:1], "prompts": []}.get(form, sides)
    if form == "supervised" and row.get("messages") is not None:
        return _opening(get("messages"))
    if form == "supervised" and isinstance(get("text"), str):
        return None, [row["text"]]
    has = ", ".join(
        column if value is not None else f"{column} (null)" for column, value in row.items()
    )
    raise InputError(f"needs {NEEDS[form]}; it has {has or 'no columns'}")


def _label(row: Row) -> bool:
    """Whether a labelled completion is good: true or false, 1 or 0, or their spellings in a CSV
    file.
    """
    label = str(row["label"]).strip().lower()
    if label not in ("true", "1", "1.0", "false", "0", "0.0"):
        raise InputError(
            f"label is {row['label']!r:.60}; expected true (a good completion) or false"
        )
    return label in ("true", "1", "1.0")


def _split(prompt: Any, sides: list[Any]) -> tuple[Any, list[Any]]:
    """Separate prompt and completions if the prompt is implicit, repeated in each side, or a string
    before messages.
    """
    if isinstance(prompt, str) and not isinstance(sides[0], str):
        alone = all(side and side[0]["role"] == "assistant" for side in sides)
        prompt = [{"role": "user", "content": prompt}] if alone else None
    if prompt is None:
        return _implicit_prompt(*sides) if len(sides) == 2 else _opening(sides[0])
    repeated = not isinstance(sides[0], str) and all(
        side[: len(prompt)] == prompt for side in sides
    )
    return prompt, [side[len(prompt) :] for side in sides] if repeated else sides


def _opening(messages: Any) -> tuple[list[Row], list[list[Row]]]:
    """Split a conversation before the assistant's first turn into prompt and completion."""
    first = next(
        (i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages)
    )
    return messages[:first], [messages[first:]]


def _implicit_prompt(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """Split off the prompt that both sides begin with: their common messages, or their common text
    up to the last turn or the last space.
    """
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, str):
        turn, space = chosen[:same].rfind("\n\nAssistant:"), chosen[:same].rfind(" ")
        same = turn + len("\n\nAssistant:") if turn >= 0 else max(space, 0)
    return chosen[:same], [chosen[same:], rejected[same:]]


def _encode_example(
    tokenizer: Any, stops: Sequence[int], prompt: Any, completions: list[Any], row: Row
) -> Example:
    row = row | {"prompt": prompt}  # rewards see the prompt even if it was implicit
    if prompt is None:  # plain text: its first token is the prompt, the rest is learned
        ids = [*encode_prompt(tokenizer, completions[0]), stops[0]]
        return Example(
            prompt=ids[:1], completions=[ids[1:]], learned=[[True] * (len(ids) - 1)], row=row
        )
    prompt_ids = encode_prompt(tokenizer, prompt, has_answer=bool(completions))
    encoded = [
        encode_completion(tokenizer, prompt, prompt_ids, completion, stops)
        for completion in completions
    ]
    return Example(
        prompt=prompt_ids,
        completions=[ids for ids, _ in encoded],
        learned=[flags for _, flags in encoded],
        row=row,
    )
