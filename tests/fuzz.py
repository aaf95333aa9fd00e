"""Anything for input: rows and files, TOML, flags; what reward functions, judges and disks give back (fuzz_outside.py).

Each case is taken, or refused by an InputError; nothing else, and no hang.

python tests/fuzz.py --cases 100000        # of each target; prints how many were taken and refused
"""

# ruff: noqa: PT017  what an error says is checked where it is caught
import argparse
import gzip
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fuzz_outside import outside
from trivet.arguments import parse, to_toml
from trivet.data import rows
from trivet.data.examples import NEEDS, load_examples, split_by_prompt
from trivet.errors import InputError
from trivet.model.text import PLAIN_TEMPLATE
from trivet.recipes import dpo, grpo, ppo, reward_model, sft
from trivet.runner.checks import check
from trivet.store.record import _append

LONGEST = 60_000  # milliseconds that a case may take, on a busy machine
COLUMNS = (
    "text",
    "messages",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "answer",
    "",
    "None",
)
TOOK: Counter[str] = Counter()


def byte_tokenizer() -> Any:
    """One token per byte, with the plain chat template."""
    letters = {
        letter: i + 1 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    raw = Tokenizer(models.BPE(vocab={"<eos>": 0, **letters}, merges=[]))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer


TOKENIZER = byte_tokenizer()

# Files -------------------------------------------------------------------------------------------------------------
WORDS = st.sampled_from(
    ["", " ", "a", "2+2=", "é", "\u2028", "\0", "\ud800", "\r\n", "\ufeff", "🙂", "\n\nAssistant:"]
)
TEXT = st.one_of(WORDS, st.text(st.characters(exclude_categories=()), max_size=20))
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), TEXT),
        "content": TEXT,
    },
    optional={
        "tool_calls": st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2),
        "name": TEXT,
    },
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
VALUE = st.one_of(TEXT, TEXT, st.lists(MESSAGE, max_size=4), ANYTHING)
ROW = st.dictionaries(st.one_of(st.sampled_from(COLUMNS), TEXT), VALUE, max_size=5)
PLAIN = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
GOOD = st.builds(
    lambda p, c: {"prompt": p, "completion": c, "chosen": c, "rejected": c + "x", "label": True},
    PLAIN,
    PLAIN,
)
LINE = st.one_of(
    GOOD.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20),
    st.integers(1, 3000).map(
        lambda depth: b'{"prompt": ' + b"[" * depth + b"]" * depth + b', "completion": "a"}'
    ),
    st.sampled_from(
        [
            b"",
            b" ",
            b"\xef\xbb\xbf",
            b"\0",
            b"{",
            b'{"prompt": "a',
            b"{}",
            b'{"a": 1, "a": 2}',
            b"NaN",
        ]
    ),
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\0"])
GOOD_LINES = st.lists(GOOD.map(lambda row: json.dumps(row).encode()), min_size=1, max_size=5)
LINES = st.builds(
    lambda lines, end: end.join(lines), st.one_of(GOOD_LINES, st.lists(LINE, max_size=5)), ENDS
)
ARRAY = st.one_of(GOOD_LINES, st.lists(LINE, max_size=4)).map(
    lambda lines: b"[" + b", ".join(lines) + b"]"
)
CELLS = st.lists(
    st.lists(TEXT, max_size=4).map(lambda cells: ",".join(map(quoted, cells))), max_size=5
)
GOOD_CELLS = st.lists(
    st.tuples(PLAIN, PLAIN).map(lambda cells: ",".join(map(quoted, (*cells, "1", "", "")))),
    max_size=5,
)
TABLE = st.one_of(GOOD_CELLS, CELLS).map(
    lambda lines: "\n".join(["prompt,completion,label,chosen,rejected", *lines]).encode(
        "utf-8", "surrogatepass"
    )
)
CONTENT = {
    ".jsonl": LINES,
    ".json": st.one_of(ARRAY, LINE),
    ".csv": st.one_of(TABLE, LINES),
    ".parquet": LINE,
}


def quoted(cell: str) -> str:
    """A cell, in quotes where it has something that asks for them."""
    return '"' + cell.replace('"', '""') + '"' if set(cell) & set(',"\r\n') else cell


@st.composite
def files(draw: Callable[..., Any]) -> tuple[str, bytes]:
    """A name and what the file holds: as it should be, or with a byte changed, cut short, or with something before it."""
    kind, packed = (
        draw(st.sampled_from(list(CONTENT))),
        draw(st.sampled_from(["", "", ".gz", ".zst"])),
    )
    content = draw(CONTENT[kind])
    content = draw(damaged(content)) if draw(st.booleans()) else content
    if packed:
        content = gzip.compress(content, mtime=0) if packed == ".gz" else bytes(zst(content))
        content = draw(damaged(content)) if draw(st.integers(0, 3)) == 0 else content
    return f"a{kind}{packed}", content


def zst(content: bytes) -> Any:
    """Packed by zstandard, with the size in front left out as streams do."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(content)
    return sink.getvalue()


@st.composite
def damaged(draw: Callable[..., Any], content: bytes) -> bytes:
    """These bytes with one accident."""
    at, extra = draw(st.integers(0, len(content))), draw(st.binary(max_size=4))
    return draw(
        st.sampled_from(
            [content[:at], content[:at] + extra + content[at:], extra + content[at:], content * 2]
        )
    )


def try_file(name: str, content: bytes, form: str) -> str:
    """Read a file at once and lazily: both must take it, and find the same, or refuse it with its name."""
    with tempfile.TemporaryDirectory() as folder:
        path, limits = str(Path(folder) / name), {"max_prompt": 50, "max_completion": 50}
        Path(path).write_bytes(content)
        try:
            found = list(load_examples(path, TOKENIZER, [0], form, counts=Counter(), **limits))
        except InputError as error:
            assert path in str(error), error
            found = None
        if found:
            split_by_prompt(found, 0.5, 0)
            for row in found:  # what is read can be written
                _append(Path(folder) / "samples.jsonl", [{"prompt": row.row.get("prompt")}])
        with mock.patch.multiple(rows, SMALL=0, MANY=0):
            try:
                lazy = load_examples(
                    path, TOKENIZER, [0], form, counts=Counter(), lazily=True, **limits
                )
                again = [example for i in range(len(lazy)) if (example := lazy[i])]
            except InputError as error:
                assert path in str(error), error
                assert not found or "rows is usable" in str(error), (
                    f"taken at once, refused lazily: {error}"
                )
                return "refused"
        assert found, "taken lazily, refused at once"
        assert {repr(row) for row in again} == {repr(row) for row in found}
        return "taken"


# Options -----------------------------------------------------------------------------------------------------------
CONFIGS = (sft.Config, reward_model.Config, dpo.Config, ppo.Config, grpo.Config)
KEYS = sorted(
    {name for config in CONFIGS for name in config.__dataclass_fields__}
    | {"preset", "config", "x", ""}
)
GOOD_TOML = [
    "lr = 1e-5",
    "steps = 3",
    "out = 'x'",
    "data = 'a.jsonl'",
    "quiet = true",
    "track = []",
    "epochs = 2",
    "model = '\\u0000'",
]
SCALAR = st.one_of(
    st.sampled_from(
        [
            "1",
            "-1",
            "0",
            "1e-5",
            "nan",
            "inf",
            "true",
            "false",
            "''",
            '"a"',
            "[]",
            "[1, 2]",
            "{}",
            "1979-05-27",
        ]
    ),
    st.integers().map(str),
    st.floats().map(str),
    TEXT.map(json.dumps),
    st.integers(1, 2000).map(lambda depth: "[" * depth + "]" * depth),
)
TOML = st.one_of(
    st.lists(st.sampled_from(GOOD_TOML), unique=True, max_size=5).map("\n".join),
    st.lists(st.builds("{} = {}".format, st.sampled_from(KEYS), SCALAR), max_size=4).map("\n".join),
    st.lists(
        st.builds("{}{}".format, st.sampled_from(["[", "[[", "#", "a.b = ", ""]), TEXT), max_size=4
    ).map("\n".join),
)
FLAG = st.builds(
    "{}{}{}".format,
    st.sampled_from(["--", "--no-", "-", ""]),
    st.sampled_from(KEYS),
    st.sampled_from(["", "=1", "="]),
)
GOOD_FLAGS = [
    "--lr=1e-5",
    "--steps=3",
    "--preset=toy",
    "--quiet",
    "--lr-decay",
    "--no-from-scratch",
    "--epochs=2",
    "--seed=7",
    "--data=\ud800",
    "--model=\U00010000",
    "--chat-template=\x7f",
]
WORD = st.one_of(FLAG, FLAG.map(lambda flag: flag.replace("_", "-")), TEXT, SCALAR)

COMMAND_LINE = st.one_of(
    st.lists(st.sampled_from(GOOD_FLAGS), unique=True, max_size=5), st.lists(WORD, max_size=6)
)


def try_toml(config: Any, text: bytes) -> str:
    """Read a config file; one that is taken is also checked, written and read again."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.toml").write_bytes(text)
        return try_flags(config, ["--config", str(Path(folder) / "a.toml")])


def try_flags(config: Any, words: list[str]) -> str:
    """Read a command line."""
    try:
        made = parse(config, words, {"toy": {"steps": 1}})
        check(made, "grpo")
    except InputError:
        return "refused"
    (again := Path(tempfile.mkdtemp()) / "config.toml").write_text(to_toml(made), encoding="utf-8")
    assert parse(config, ["--config", str(again)], {"toy": {}}) == made
    again.unlink()
    again.parent.rmdir()
    return "taken"


def targets(cases: int) -> dict[str, Callable[[], None]]:
    """All of them, each over this many cases."""
    ways = settings(
        max_examples=cases, deadline=LONGEST, suppress_health_check=list(HealthCheck), database=None
    )

    @ways
    @example(("a.jsonl", b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b"}\r\n'), "supervised")
    @given(files(), st.sampled_from(list(NEEDS)))
    def data(file: tuple[str, bytes], form: str) -> None:
        TOOK[f"files {try_file(*file, form)}"] += 1

    @ways
    @given(
        st.sampled_from(CONFIGS),
        st.one_of(TOML.map(lambda text: text.encode("utf-8", "replace")), st.binary(max_size=30)),
    )
    def toml(config: Any, text: bytes) -> None:
        TOOK[f"TOML {try_toml(config, text)}"] += 1

    @ways
    @given(st.sampled_from(CONFIGS), COMMAND_LINE)
    def flags(config: Any, words: list[str]) -> None:
        TOOK[f"flags {try_flags(config, words)}"] += 1

    return {"files": data, "TOML": toml, "flags": flags} | outside(ways, TOOK, given)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    reader.add_argument("--cases", type=int, default=10_000)
    reader.add_argument("--only", default="")
    chosen = reader.parse_args()
    for name, run in targets(chosen.cases).items():
        if chosen.only in name:
            began = time.perf_counter()
            run()
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    print(
        ", ".join(f"{count:,} {what}" for what, count in sorted(TOOK.items())),
        "· nothing raised but InputError",
    )
