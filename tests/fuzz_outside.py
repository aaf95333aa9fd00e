"""Anything that may come back: from reward functions, from a judge's server, from a disk. The targets of fuzz.py for it."""

import asyncio
import atexit
import decimal
import fractions
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import numpy
import torch
from hypothesis import strategies as st

from conftest import tiny
from trivet.arguments import to_toml
from trivet.batch import Rollouts, collate
from trivet.errors import InputError
from trivet.recipes import sft
from trivet.rewards.functions import FunctionReward
from trivet.rewards.judge import Judge
from trivet.runner import resume as resuming
from trivet.step.optimizer import Optimizer
from trivet.store.checkpoints import Checkpoints, damage
from trivet.store.reading import read_metrics
from trivet.store.record import Record, _append

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where fsync costs nothing
TEXT = st.one_of(
    st.sampled_from(["", "a", "\0", "\ud800", "é\u2028", "Score: 7", "x" * 600]),
    st.text(max_size=9),
)


def told(error: InputError) -> None:
    """What a person reads is one line, and can be written."""
    assert "\n" not in str(error).strip(), error
    assert str(error).strip()
    StringIO().write(str(error).encode("utf-8", "backslashreplace").decode())


# Reward functions ---------------------------------------------------------------------------------------------------
class Broken:
    """Something that raises whatever is asked of it by these names."""

    def __init__(self, names: list[str], what: BaseException):
        self.__dict__.update(names=names, what=what)

    def _asked(self, name: str, known: Any) -> Any:
        if name in self.names:
            raise self.what
        return known

    def __len__(self) -> int:
        return self._asked("len", 4)

    def __getitem__(self, i: int) -> float:
        if i > 3:
            raise IndexError
        return self._asked("getitem", 1.0)

    def __float__(self) -> float:
        return self._asked("float", 1.0)

    def __abs__(self) -> float:
        return self._asked("abs", 1.0)

    def __repr__(self) -> str:
        return self._asked("repr", "Broken()")

    def __eq__(self, other: object) -> bool:
        return self._asked("eq", True)

    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._asked("getattr", lambda *args, **kwargs: self)


class NamelessError(Exception):
    """An error that can't say what it is."""

    def __str__(self) -> str:
        raise ValueError("no")


def errors(text: str) -> list[BaseException]:
    """What code may raise."""
    return [
        ValueError(text),
        NamelessError(),
        StopIteration(text),
        SystemExit(text),
        GeneratorExit(text),
        RecursionError(text),
        MemoryError(),
        OSError(28, text),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"),
        ExceptionGroup("two\nlines", [ValueError(text)]),
        asyncio.CancelledError(),
        AssertionError(),
        KeyError(text),
        type("Odd\nName", (Exception,), {})(text),
    ]


NUMBER = st.one_of(
    st.floats(),
    st.integers(),
    st.booleans(),
    st.none(),
    st.sampled_from([10**400, -(10**5000), 1e38, 1e39, 1j, math.nan, math.inf]),
    st.sampled_from(
        [decimal.Decimal("1"), decimal.Decimal("sNaN"), fractions.Fraction(1, 3), numpy.float16(1)]
    ),
    st.sampled_from(
        [
            numpy.float32("nan"),
            numpy.int64(3),
            numpy.array(1.0),
            numpy.array([1.0]),
            torch.tensor(1.0),
        ]
    ),
    st.sampled_from(
        [
            torch.tensor([1.0]),
            torch.tensor(1.0, requires_grad=True),
            torch.tensor(1.0, device="meta"),
        ]
    ),
    TEXT,
    st.binary(max_size=3),
)
BROKEN = st.builds(
    lambda names, text, i: Broken(names, errors(text)[i % len(errors(text))]),
    st.lists(
        st.sampled_from(["len", "getitem", "float", "abs", "repr", "eq", "getattr"]), max_size=3
    ),
    TEXT,
    st.integers(0, 13),
)
LIST = st.one_of(
    st.lists(NUMBER, min_size=4, max_size=4), st.lists(st.one_of(NUMBER, BROKEN), max_size=5)
)
RETURNS = st.one_of(
    LIST,
    LIST,
    st.lists(st.floats(-1e9, 1e9), min_size=4, max_size=4),
    st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=4, max_size=4),
    LIST.map(tuple),
    LIST.map(iter),
    st.lists(st.floats(), max_size=5).map(numpy.array),
    st.lists(st.floats(), max_size=5).map(torch.tensor),
    st.sampled_from(
        [
            torch.zeros(4, 1),
            torch.zeros(4, device="meta"),
            numpy.zeros((2, 2)),
            numpy.array(["a"] * 4),
        ]
    ),
    st.sampled_from(
        [
            numpy.array([None, 1, 2, 3]),
            numpy.zeros(4, "datetime64[s]"),
            {"a": 1},
            range(4),
            b"abcd",
            set(),
        ]
    ),
    NUMBER,
    BROKEN,
)
MISBEHAVES = st.fixed_dictionaries(
    {
        "returns": RETURNS,
        "raises": st.one_of(
            st.none(),
            st.none(),
            st.none(),
            TEXT.flatmap(lambda text: st.sampled_from(errors(text))),
        ),
        "prints": st.one_of(st.just(""), TEXT, TEXT.map(lambda text: (text + "\n") * 30)),
        "logs": st.one_of(
            st.none(),
            st.tuples(st.one_of(TEXT, NUMBER, st.just("step")), st.one_of(NUMBER, BROKEN)),
        ),
        "changes": st.booleans(),
        "asynchronous": st.sampled_from([False, False, False, True]),
        "on_failure": st.sampled_from(["stop", "skip"]),
        "retries": st.integers(0, 1),
    }
)


def rollouts() -> Rollouts:
    """Two prompts with two completions each."""
    groups = collate([[1, 2], [3]], [[4], [5, 6], [7], [8, 9]])
    rows = [{"prompt": "a", "answer": {"b": [1]}}, {"prompt": "c", "answer": None}]
    ones = torch.zeros(groups.completions.shape)
    return Rollouts(
        groups=groups,
        logprobs=ones,
        finished=torch.ones(4) > 0,
        texts=["d", "e", "f", "g"],
        rows=rows,
    )


def try_reward(does: dict[str, Any], folder: Path) -> str:
    """A reward function that does this: a number or NaN for each completion, or a sentence; and a line that can be read."""
    given, shown = rollouts(), TextIOWrapper(BytesIO(), encoding="utf-8", errors="backslashreplace")

    def function(prompts: Any, completions: Any, answer: Any, log_metric: Any) -> Any:
        print(does["prints"])
        if does["logs"]:
            log_metric(*does["logs"])
        if does["changes"]:
            prompts.clear()
            completions[0] = None
            answer[0]["b"] = 0
        if does["raises"] is not None:
            raise does["raises"]
        return does["returns"]

    async def later(prompts: Any, completions: Any, answer: Any, log_metric: Any) -> Any:
        return function(prompts, completions, answer, log_metric)

    made = FunctionReward(
        later if does["asynchronous"] else function,
        "mine.py:f",
        retries=does["retries"],
        on_failure=does["on_failure"],
        name="f",
        note=lambda text: print(text, file=shown),
    )
    with shown, mock.patch("trivet.rewards.functions.pause", return_value=0.0):
        try:
            scores = made(given)
        except InputError as error:
            told(error)
            return "refused"
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert not scores.isinf().any()
    assert given.texts == ["d", "e", "f", "g"]
    assert given.rows[0] == {"prompt": "a", "answer": {"b": [1]}}
    recordable(made.logged, folder)
    return "taken"


def recordable(logged: dict[str, float], folder: Path) -> None:
    """These numbers in a line of metrics.jsonl are JSON, and are read again."""
    path = folder / "metrics.jsonl"
    _append(path, [{"step": 1, **logged}])
    try:
        json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0)
        assert read_metrics(folder)[0]["step"] == 1
    finally:
        path.unlink()


# A judge ------------------------------------------------------------------------------------------------------------
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)
SAYS = st.one_of(
    st.sampled_from(
        [
            "Score: 7",
            "Score: 1e400",
            "score 11",
            "Winner: A",
            "**Winner:** tie",
            "Score: ",
            "-" * 9,
            None,
        ]
    ),
    st.integers().map("Score: {}".format),
    st.floats().map("Score: {}".format),
    st.integers(4000, 9000).map(lambda n: "Score: " + "9" * n),
    TEXT,
    JSON,
)
ANSWER = st.one_of(
    st.builds(
        lambda said, usage: {"choices": [{"message": {"content": said}}], "usage": usage},
        SAYS,
        st.one_of(
            JSON,
            st.fixed_dictionaries(
                {"prompt_tokens": JSON, "completion_tokens": st.one_of(st.integers(), JSON)}
            ),
        ),
    ),
    st.builds(lambda inner: {"choices": inner}, JSON),
    st.builds(lambda inner: {"choices": [{"message": inner}]}, JSON),
    JSON,
)
BODY = st.one_of(
    ANSWER.map(lambda x: json.dumps(x).encode()),
    ANSWER.map(lambda x: json.dumps(x).encode()),
    ANSWER.map(lambda x: json.dumps(x, ensure_ascii=False).encode("utf-16", "surrogatepass")),
    st.binary(max_size=30),
    st.integers(900, 3000).map(lambda n: b"[" * n + b"]" * n),
)
HEADER = st.one_of(
    st.just({}),
    st.builds(
        lambda name, value: {name: value},
        st.sampled_from(
            ["retry-after", "content-encoding", "content-type", "content-length", "location"]
        ),
        st.one_of(
            st.sampled_from(
                [
                    "0",
                    "-1",
                    "1e999",
                    "nan",
                    "Fri, 31 Dec 9999 23:59:59 GMT",
                    "gzip",
                    "zstd",
                    "text/x; charset=é",
                ]
            ),
            st.text(st.characters(codec="latin-1", min_codepoint=32), max_size=9),
        ),
    ),
)
CODE = st.one_of(
    st.just(200),
    st.just(200),
    st.sampled_from([204, 301, 302, 307, 401, 404, 408, 429, 500, 503, 600]),
)
FAILS = st.sampled_from(
    [
        httpx.ConnectError("no\nroute"),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError("half"),
        httpx.DecodingError("x"),
        httpx.TooManyRedirects("x"),
    ]
)
SERVED = st.lists(st.one_of(st.tuples(CODE, HEADER, BODY), FAILS), min_size=1, max_size=3)


def try_judge(served: list[Any], compare: bool, on_failure: str, model: str, folder: Path) -> str:
    """A server that answers like this, in turn: a score or NaN for each completion, or a sentence."""
    turns, asked = list(served), 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        turn = turns.pop(0) if len(turns) > 1 else turns[0]
        if isinstance(turn, Exception):
            raise turn
        code, headers, body = turn
        return httpx.Response(code, headers=headers, stream=httpx.ByteStream(body))

    def client(self: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer), timeout=self.timeout)

    patched = {"pause": lambda attempt: 0.0, "LONGEST_WAIT": 0.0}
    with (
        mock.patch.object(Judge, "_client", client),
        mock.patch.multiple("trivet.rewards.judge", **patched),
    ):
        try:
            judge = Judge(
                "http://x/v1",
                model,
                compare,
                retries=1,
                on_failure=on_failure,
                note=lambda text: None,
            )  # type: ignore[arg-type]
            scores = judge(rollouts())
        except InputError as error:
            told(error)
            return "refused"
    assert scores.shape == (4,)
    assert ((scores >= 0) & (scores <= 1) | scores.isnan()).all(), scores
    assert asked <= 20
    recordable(judge.logged, folder)
    return "taken"


# Disks --------------------------------------------------------------------------------------------------------------
@cache
def saved() -> tuple[Path, Checkpoints]:
    """Checkpoints of the steps 2 and 4, of a tiny model with an optimizer that has taken a step."""
    model = tiny()
    config = sft.Config()
    optimizer = Optimizer(model, config, 4)
    parts = {"optimizer": optimizer}
    run = SimpleNamespace(
        model=model, generator=torch.Generator(), device="cpu", done=0, parts=parts
    )
    out = Path(tempfile.mkdtemp(dir=MEMORY)) / "run"
    made = Checkpoints(out, run, SimpleNamespace(save_pretrained=lambda folder: None))  # type: ignore[arg-type]
    atexit.register(shutil.rmtree, out.parent)
    made.begin()
    for step in (2, 4):
        sum(p.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        made.save(step, {"seconds": 1.0, "tokens": {}, "eval": {}})
    return out, made


ACCIDENT = st.sampled_from(
    ["flip", "flip", "byte", "cut", "insert", "zeros", "gone", "empty", "other"]
)


def struck(content: bytes, kind: str, at: float, extra: bytes, other: bytes) -> bytes | None:
    """These bytes after an accident, None where the file is gone."""
    i = int(at * len(content))
    return {
        "flip": content[:i] + bytes([content[i] ^ 1 << (len(extra) % 8)]) + content[i + 1 :]
        if content
        else b"",
        "byte": content[:i] + extra[:1] + content[i + 1 :],
        "cut": content[:i],
        "insert": content[:i] + extra + content[i:],
        "zeros": content[:i] + bytes(len(content) - i),
        "gone": None,
        "empty": b"",
        "other": other,
    }[kind]


def try_checkpoint(number: int, kind: str, at: float, extra: bytes) -> str:
    """An accident to one file of the newest checkpoint: it is seen and named, and the one before is taken."""
    out, made = saved()
    last = out / "checkpoints" / "step-4"
    files = sorted(path for path in last.rglob("*") if path.is_file())
    path = files[number % len(files)]
    content, other = path.read_bytes(), (last.with_name("step-2") / path.name).read_bytes()
    now = struck(content, kind, at, extra, other)
    if now == content:
        return "the same"
    said: list[str] = []
    try:
        path.unlink() if now is None else path.write_bytes(now)
        counted = made.choose_start(said.append)
        if not (
            path.name == "manifest.json" and not damage(last)
        ):  # a space more in the JSON harms nothing
            assert counted["step"] == 2, f"{kind} in {path.name} at {at} was not seen"
            assert str(last) in said[0]
            assert "is damaged" in said[0]
            assert "\n" not in said[0], said
            return "named"
        return "harmless"
    finally:
        path.write_bytes(content)


@cache
def directory() -> dict[str, bytes]:
    """The files of a run that was killed after two steps."""
    config = sft.Config(model="m", data="a.jsonl", steps=4, out="r")
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder), config, "sft", "sft", 4, None, str, None)
        record.begin({"start": "0", "started_from": "m", "began": 1.0, "data": {}}, 0)
        for step in (1, 2):
            record.samples = [{"step": step, "completion": "\u2028é", "reward": None}]
            record.step({"step": step, "loss": math.nan})
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def try_directory(name: str, content: bytes | None) -> str:
    """A run directory in which a file is something else: resume takes it or says why not, and cuts its record to whole lines."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        out = Path(folder)
        for each, known in directory().items():
            now = content if each == name else known
            if now is not None:
                (out / each).write_bytes(now)
        made: list[Any] = []
        with mock.patch.object(resuming, "launch", lambda config, *_, **__: made.append(config)):
            try:
                resuming.resume(out)
                config = made[0]
                record = Record(out, config, "sft", "sft", 4, None, str, None)
                record.begin({"start": "0", "started_from": "m", "began": 1.0, "data": {}}, 2)
            except InputError as error:
                told(error)
                return "refused"
        lines = read_metrics(out)
        assert all(line["step"] <= 2 for line in lines)
        for line in (
            (out / "samples.jsonl").read_bytes().splitlines()
            if (out / "samples.jsonl").exists()
            else ()
        ):
            assert json.loads(line)["step"] <= 2 or b"\xc2\x85" in line
        assert json.loads((out / "run.json").read_bytes())["method"] == "sft"
        assert to_toml(config).encode() in (out / "config.toml").read_bytes()
        return "taken"


def outside(
    ways: Callable[[Any], Any], took: Any, given: Callable[..., Any]
) -> dict[str, Callable[[], None]]:
    """The targets."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)

    @ways
    @given(MISBEHAVES)
    def rewards(does: dict[str, Any]) -> None:
        took[f"rewards {try_reward(does, folder)}"] += 1

    @ways
    @given(
        SERVED,
        st.booleans(),
        st.sampled_from(["stop", "skip"]),
        st.sampled_from(["m", "m", "m", ""]),
    )
    def judges(served: list[Any], compare: bool, on_failure: str, model: str) -> None:
        took[f"judges {try_judge(served, compare, on_failure, model, folder)}"] += 1

    @ways
    @given(
        st.integers(0, 20),
        ACCIDENT,
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    )
    def checkpoints(number: int, kind: str, at: float, extra: bytes) -> None:
        took[f"checkpoints {try_checkpoint(number, kind, at, extra)}"] += 1

    @ways
    @given(
        st.sampled_from(sorted(directory())),
        ACCIDENT,
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=30),
            JSON.map(lambda x: b"\n" + json.dumps(x).encode() + b"\n"),
        ),
        st.one_of(st.binary(max_size=30), JSON.map(lambda x: json.dumps(x).encode() + b"\n")),
    )
    def directories(name: str, kind: str, at: float, extra: bytes, other: bytes) -> None:
        content = struck(directory()[name], kind, at, extra, other)
        took[f"directories {try_directory(name, content)}"] += 1

    return {
        "rewards": rewards,
        "judges": judges,
        "checkpoints": checkpoints,
        "directories": directories,
    }
