"""Data that is huge or odd: rows that are not held give what held rows give, and what can't be read is named with its line."""

import csv
import gzip
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fuzz import byte_tokenizer, zst
from trivet.cli.main import main
from trivet.data import rows
from trivet.data.examples import LazyExamples, load_examples, split_by_prompt
from trivet.data.rows import Lines, many_rows, read_rows
from trivet.errors import InputError
from trivet.step.run import shuffled
from trivet.toy import ARITHMETIC

GOOD = b'{"prompt": "a b", "completion": "c"}\n'
TOKENIZER = byte_tokenizer()


@pytest.fixture
def few(monkeypatch):
    """Every file has too many rows to hold."""
    monkeypatch.setattr(rows, "SMALL", 0)
    monkeypatch.setattr(rows, "MANY", 0)


def load(
    path: Path,
    form: str = "supervised",
    counts: Counter | None = None,
    max_prompt: int = 100,
    **options,
):
    counts = Counter() if counts is None else counts
    return load_examples(
        str(path),
        TOKENIZER,
        [0],
        form,
        counts=counts,
        max_prompt=max_prompt,
        max_completion=9,
        **options,
    )


def numbered(path: Path, n: int, **columns: str) -> Path:
    """A file of n rows whose prompts are their numbers."""
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{i}", "completion": "x"} | columns) + "\n" for i in range(n)
        )
    )
    return path


def prompts(examples) -> list[str]:
    return [example.row["prompt"] for example in examples]


# Odd --------------------------------------------------------------------------------------------------------------
ODD = [
    ("bom.jsonl", b"\xef\xbb\xbf" + GOOD * 2, 2),
    ("boms.jsonl", (b"\xef\xbb\xbf" + GOOD) * 2, 2),  # files put one after the other
    ("crlf.jsonl", GOOD.replace(b"\n", b"\r\n") * 2, 2),
    ("crlf.csv", b"prompt,completion\r\na,b\r\n", 1),
    (
        "cr.jsonl",
        GOOD.replace(b"\n", b"\r") * 2,
        "line 1: can't be read as .jsonl: Extra data at character 38",
    ),
    ("cr.csv", b"prompt,completion\ra,b\r", "row 1: can't be read as .csv: new-line"),
    ("empty-lines.jsonl", b"\n \n" + GOOD + b"  \t\n\r\n" + GOOD + b"\r\n", 2),
    (
        "after-empty-lines.jsonl",
        b"\n\n" + GOOD + b"  \n\r\n" + GOOD + b'{"prompt": 5}\n',
        "line 7: prompt is 5",
    ),
    ("indented.jsonl", b"  " + GOOD.strip() + b"  \n" + GOOD, 2),
    ("no-newline.jsonl", GOOD + GOOD.strip(), 2),
    (
        "half-written.jsonl",
        GOOD * 3 + GOOD[:20],
        "line 4: can't be read as .jsonl: Unterminated string",
    ),
    (
        "half-written.json",
        b'[{"prompt": "a", "completion": "b"},',
        ".json: can't be read as .json: Expecting value",
    ),
    ("open.csv", b'prompt,completion\na,"b\nc,d\n', "row 1: can't be read as .csv: unexpected end"),
    (
        "nul.jsonl",
        GOOD + b'{"prompt": "a\0b", "completion": "c"}\n',
        "line 2: can't be read as .jsonl: Invalid control",
    ),
    ("nul.csv", b"prompt,completion\na,b\0c\n", 1),
    ("escaped-nul.jsonl", b'{"prompt": "a\\u0000b", "completion": "c"}\n', 1),
    ("zeros-of-a-crash.jsonl", GOOD + b"\0" * 500, "line 2: can't be read as .jsonl"),
    (
        "latin.jsonl",
        GOOD + GOOD.replace(b"a", b"\xe9"),
        "line 2: can't be read as .jsonl: 'utf-8' codec",
    ),
    (
        "utf16.jsonl",
        GOOD.decode().encode("utf-16"),
        "line 1: can't be read as .jsonl: 'utf-8' codec",
    ),
    (
        "utf16.csv",
        "prompt,completion\na,b\n".encode("utf-16"),
        "row 1: can't be read as .csv: 'utf-8' codec",
    ),
    (
        "surrogate.jsonl",
        GOOD + GOOD.replace(b"c", b"\\ud83d"),
        "line 2: can't be read as .jsonl: its text is not valid",
    ),
    (
        "in-another-column.jsonl",
        b'{"text": "abc", "x": ["\\uD800"]}\n',
        "line 1: can't be read as .jsonl: its text is not",
    ),
    (
        "surrogate.json",
        b'[{"text": "abc", "x": "\\ud800"}]',
        "can't be read as .json: its text is not valid",
    ),
    ("raw-surrogate.json", b'[{"text": "\xed\xa0\x80"}]', "can't be read as .json: 'utf-8' codec"),
    (
        "raw-surrogate.jsonl",
        GOOD.replace(b"c", b"\xed\xa0\x80"),
        "line 1: can't be read as .jsonl: 'utf-8' codec",
    ),
    ("emoji.jsonl", b'{"text": "\\ud83d\\ude00 and more"}\n', 1),
    (
        "same-key.jsonl",
        b'{"prompt": "a", "prompt": "b", "completion": "c"}\n',
        "line 1: can't be read as .jsonl: the key",
    ),
    ("same-column.csv", b"prompt,prompt,completion\na,b,c\n", "the key 'prompt' appears twice"),
    (
        "deep.jsonl",
        GOOD + b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        "line 2: can't be read as .jsonl: nested too",
    ),
    ("rather-deep.jsonl", GOOD + b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}\n", "line 2: "),
    (
        "number.jsonl",
        b'{"text": "abc", "n": ' + b"9" * 5000 + b"}\n",
        "line 1: can't be read as .jsonl: Exceeds the limit",
    ),
    ("mixed.jsonl", GOOD + b'{"text": "abc"}\n{"chosen": "a b", "rejected": "a c"}\n', 3),
    (
        "mixed-up.jsonl",
        GOOD + b'{"text": "abc"}\n{"question": "a"}\n',
        "line 3: needs text, messages or prompt",
    ),
    ("long.jsonl", GOOD + json.dumps({"text": "word " * 100_000}).encode(), 2),
    ("a.jsonl.zst", bytes(zst(GOOD * 3)), 3),
    ("two-frames.jsonl.zst", bytes(zst(GOOD)) + bytes(zst(GOOD)), 2),
    ("two-members.jsonl.gz", gzip.compress(GOOD) + gzip.compress(GOOD), 2),
    (
        "cut.jsonl.gz",
        gzip.compress(GOOD * 500)[:-9],
        "can't be read as .jsonl: Compressed file ended",
    ),
    (
        "cut.jsonl.zst",
        bytes(zst(random.Random(0).randbytes(9999)))[:5000],
        "can't be read as .jsonl: Truncated",
    ),
    ("not-packed.jsonl.gz", GOOD, "line 1: can't be read as .jsonl: Not a gzipped file"),
    ("not-packed.jsonl.zst", GOOD, "line 1: can't be read as .jsonl: ZSTD"),
    ("empty.jsonl.zst", b"", "the dataset is empty"),
    ("cut.parquet", b"PAR1xxxx", "can't be read as .parquet"),
]


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize(("name", "content", "wanted"), ODD, ids=[name for name, *_ in ODD])
def test_odd_files_work_or_are_named_with_their_line(
    request, tmp_path, name, content, wanted, lazily
):
    if lazily:
        request.getfixturevalue("few")
    (tmp_path / name).write_bytes(content)
    if isinstance(wanted, int):
        assert len(load(tmp_path / name, lazily=lazily)) == wanted
        return
    with pytest.raises(InputError) as said:
        load(tmp_path / name, lazily=lazily)
    assert wanted in str(said.value)
    assert str(tmp_path / name) in str(said.value)


# Huge -------------------------------------------------------------------------------------------------------------
def packed(path: Path, kind: str, columns: list[dict[str, str]]) -> Path:
    """The rows as a file of this kind."""
    path = path / f"a{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in columns).encode()
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), path)
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns[0]))
            writer.writeheader()
            writer.writerows(columns)
    else:
        path.write_bytes(
            {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zst}[kind](lines)
        )
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet"])
def test_rows_by_number_are_the_rows(few, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = [{"prompt": f"{i}\n", "completion": "é,x" * i} for i in range(1, 50)]
    path = packed(tmp_path, kind, columns)
    by_number = many_rows(str(path))
    assert by_number is not None
    assert (
        [by_number[i] for i in reversed(range(len(by_number)))]
        == columns[::-1]
        == list(read_rows(str(path)))[::-1]
    )
    assert str(path) in by_number.where(3)
    assert by_number.where(3).endswith(" 4")


def test_a_folder_of_files_by_number(few, tmp_path):
    numbered(tmp_path / "train.jsonl", 20)
    by_number = many_rows(str(tmp_path))
    assert by_number is not None
    assert [by_number[i] for i in range(20)] == list(read_rows(str(tmp_path)))
    assert prompts(load(tmp_path, lazily=True)) == prompts(load(tmp_path))


def test_lines_over_the_borders_of_blocks(tmp_path, monkeypatch):
    draw = random.Random(0)
    columns = [{"text": "x" * draw.randrange(40)} for _ in range(300)]
    lines = [
        json.dumps(row).encode() + draw.choice([b"\n", b"\r\n", b"\n\n", b"\n \n"])
        for row in columns
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr(rows, "BLOCK", block)
        found = Lines(str(tmp_path / "a.jsonl"), (tmp_path / "a.jsonl").open("rb"))
        assert [found[i] for i in range(len(found))] == columns
        before = b"".join(lines[:200]).count(b"\n")
        assert found.where(200).endswith(f" line {before + 1}")
        (tmp_path / "b.jsonl").write_bytes(b"".join(lines[:200]) + b'{"text": "x\n')
        with pytest.raises(InputError, match=rf"b\.jsonl line {before + 1}: can't be read"):
            Lines(str(tmp_path / "b.jsonl"), (tmp_path / "b.jsonl").open("rb"))


def test_only_large_files_are_read_lazily_and_only_where_asked_for(tmp_path, monkeypatch):
    path = numbered(tmp_path / "a.jsonl", 200)
    assert isinstance(load(path, lazily=True), list)
    monkeypatch.setattr(rows, "SMALL", 0)
    monkeypatch.setattr(rows, "MANY", 199)
    assert isinstance(load(path), list)
    assert isinstance(load(path, lazily=True), LazyExamples)
    monkeypatch.setattr(rows, "MANY", 200)
    assert isinstance(load(path, lazily=True), list)
    monkeypatch.setattr(rows, "LARGE", 1000)
    assert isinstance(load(path, lazily=True), LazyExamples)


def test_rows_are_read_when_they_are_asked_for_and_counted_once(few, tmp_path):
    path, counts = numbered(tmp_path / "a.jsonl", 5000), Counter()
    examples = load(path, counts=counts, lazily=True)
    assert counts["rows read"] == 1001  # the first thousand and the last
    assert prompts(examples[10:20]) == [f"{i}" for i in range(10, 20)]
    assert prompts([examples[-1], examples[3000], examples[3000]]) == ["4999", "3000", "3000"]
    assert counts["rows read"] == counts["examples"] == 1002
    assert (
        counts["rows in all, read as they are needed (what follows is of those read so far)"]
        == 5000
    )
    with pytest.raises(IndexError):
        examples[5000]


def test_another_row_stands_in_the_place_of_one_that_is_left_out(few, tmp_path):
    long = {i for i in range(300) if i % 3 == 0}
    lines = [
        json.dumps({"prompt": f"{i}" * (40 if i in long else 1), "completion": "x"})
        for i in range(300)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    first, again = (
        load(tmp_path / "a.jsonl", counts=Counter(), lazily=True, max_prompt=30) for _ in range(2)
    )
    assert (
        prompts(first) == prompts(reversed(again))[::-1]
    )  # by its number, whatever was asked for before
    drawn = [int(prompt) for prompt in prompts(first)]
    assert all(drawn[i] == i for i in range(300) if i not in long)
    assert not long & set(drawn)
    assert len({drawn[i] for i in long}) > 50  # not the same one for all
    assert first.counts["left out: prompt over 30 tokens"] == 100


def test_a_file_without_a_usable_row_says_so(few, tmp_path):
    path = numbered(tmp_path / "a.jsonl", 50)
    with pytest.raises(
        InputError,
        match=r"a\.jsonl: none of 1,000 rows is usable \(50 left out: prompt over 0 tokens",
    ):
        load(path, lazily=True, max_prompt=0)[7]
    same = numbered(tmp_path / "b.jsonl", 50, prompt="the same")
    train, heldout = split_by_prompt(load(same, lazily=True), 0.1, 0)
    assert prompts(heldout) == ["the same"] * 5
    with pytest.raises(InputError, match="have held-out prompts"):
        train[0]


def test_what_is_wrong_later_is_named_with_its_line_when_it_is_met(few, tmp_path):
    lines = [GOOD] * 3000 + [b"\n", b'{"prompt": "a" "b"}\n', b'{"prompt": 5}\n'] + [GOOD] * 10
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    examples = load(tmp_path / "a.jsonl", lazily=True)
    with pytest.raises(
        InputError, match=r"a\.jsonl line 3002: can't be read as \.jsonl: Expecting"
    ):
        examples[3000]
    with pytest.raises(InputError, match=r"a\.jsonl line 3003: prompt is 5"):
        examples[3001]
    assert examples[3002].row["completion"] == "c"
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines, b'{"prompt": "a\n']))  # seen in its bytes
    with pytest.raises(
        InputError, match=r"a\.jsonl line 3014: can't be read as \.jsonl: Unterminated"
    ):
        load(tmp_path / "a.jsonl", lazily=True)


def test_no_prompt_is_on_both_sides_of_a_lazy_split(few, tmp_path):
    lines = [json.dumps({"prompt": f"{i % 100}", "completion": f"{i}"}) for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train, heldout = split_by_prompt(
        load(tmp_path / "a.jsonl", lazily=True), 0.02, seed=0, limit=15
    )
    assert len(heldout) == 15
    assert not set(prompts(heldout)) & set(prompts(train))
    assert len(train) == 1000
    again = split_by_prompt(load(tmp_path / "a.jsonl", lazily=True), 0.02, seed=0, limit=15)
    assert (prompts(again[1]), prompts(again[0])) == (prompts(heldout), prompts(train))
    other = split_by_prompt(load(tmp_path / "a.jsonl", lazily=True), 0.02, seed=1, limit=15)
    assert prompts(other[1]) != prompts(heldout)
    assert split_by_prompt(load(tmp_path / "a.jsonl", lazily=True), 0.0, seed=0)[1] == []


@pytest.mark.parametrize("lazily", [False, True])
def test_texts_are_split_by_all_of_them_though_they_begin_alike(request, tmp_path, lazily):
    if lazily:
        request.getfixturevalue("few")
    texts = [f"A text, number {i % 100}" for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {"counts": Counter(), "max_prompt": 100, "max_completion": 100, "lazily": lazily}
    examples = load_examples(str(tmp_path / "a.jsonl"), TOKENIZER, [0], "supervised", **options)
    train, heldout = split_by_prompt(examples, 0.1, seed=0)
    sides = [{example.row["text"] for example in side} for side in (train, heldout)]
    assert 3 <= len(sides[1]) <= 30
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_the_order_drawn_as_it_goes_is_that_of_a_sample(n):
    whole = random.Random(5)
    epochs = [row for _ in range(3) for row in whole.sample(range(n), n)]
    assert list(islice(shuffled(n, random.Random(5).randrange), 3 * n)) == epochs


@pytest.mark.parametrize("method", ["sft", "reward-model", "dpo", "grpo"])
def test_a_run_whose_rows_are_not_held(few, tmp_path, method):
    columns = [
        {
            "prompt": f"{i % 10}+{i % 7}=",
            "completion": "1",
            "chosen": f"{i % 4}",
            "rejected": f"{5 + i % 3}",
        }
        for i in range(3000)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in columns))
    options = [
        "--model",
        ARITHMETIC["model"],
        "--from-scratch",
        "--data",
        str(tmp_path / "a.jsonl"),
        "--quiet",
    ]
    options += [
        "--steps",
        "3",
        "--prompts-per-step",
        "4",
        "--eval-limit",
        "5",
        "--max-completion-tokens",
        "2",
    ]
    options += ["--reward", "brevity"] if method == "grpo" else []
    first, again = tmp_path / "run", tmp_path / "again"
    for out in (first, again):
        assert main([method, *options, "--out", str(out)]) == 0
    summary = json.loads((first / "summary.json").read_text())
    assert 1001 < summary["data"]["rows read"] < 1100
    assert (summary["data"]["for training"], summary["data"]["held out"]) == (3000, 5)
    assert any(name.startswith("eval/") for name in summary["eval"])
    times = ("seconds", "time/", "tokens_per")
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if not key.startswith(times)}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (first, again)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}\n', "prompt"),
        (
            b'{"prompt": [{"role": "user", "content": "a", "role": "user"}], "completion": "b"}\n',
            "role",
        ),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_line(few, tmp_path, line, key):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 2 + line)
    with pytest.raises(
        InputError,
        match=rf"a\.jsonl line 3: can't be read as \.jsonl: the key '{key}' appears twice",
    ):
        load(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3000 + line + GOOD)  # one of many: when it is met
    examples = load(tmp_path / "a.jsonl", lazily=True)
    assert examples[2999].row["completion"] == "c"
    with pytest.raises(InputError, match=rf"a\.jsonl line 3001: .* the key '{key}' appears twice"):
        examples[3000]
    (tmp_path / "a.json").write_bytes(b"[" + line + b"]")
    with pytest.raises(InputError, match=rf"a\.json: .* the key '{key}' appears twice"):
        load(tmp_path / "a.json")


def test_a_column_that_stands_twice_in_a_header_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(InputError, match=r"a\.csv row 1: .* the key 'prompt' appears twice"):
        load(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("prompt,completion,,\na,b,,\n")  # as spreadsheets write it
    assert prompts(load(tmp_path / "a.csv")) == ["a"]
