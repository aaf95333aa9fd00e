"""A judge behind a server that misbehaves in every way: what it says, what it costs, and what a run does when it is away."""

import asyncio
import email.utils
import json
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_rewards import rollouts
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.http import call_server
from trivet.rewards.functions import load_rewards
from trivet.rewards.judge import Judge
from trivet.rewards.pairwise import matches, win_rates

NAN = math.nan
KEY = "sk-very-secret"


class Server:
    """Answers with what `say` makes of a question; notes what it was asked. say may return a text, an int for an HTTP error, or
    take the handler and do as it likes."""

    def __init__(self) -> None:
        self.say: Callable[..., Any] = lambda question: "Score: 7"
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.over = threading.Event()  # what is slow ends with the test
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self, 200, {"data": [{"id": "first"}, {"id": "second"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server.lock:
                    server.asked.append(body)
                    server.headers.append(dict(self.headers))
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                said = server.say(body["messages"][0]["content"])
                with server.lock:
                    server.at_once -= 1
                if callable(said):
                    said(self)
                elif isinstance(said, int):
                    server.answer(
                        self, said, {"error": f"no, not with {self.headers.get('authorization')}"}
                    )
                else:
                    usage = {"prompt_tokens": 100, "completion_tokens": 10}
                    server.answer(
                        self, 200, {"choices": [{"message": {"content": said}}], "usage": usage}
                    )

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.over = self.over  # type: ignore[attr-defined]
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # clients go away
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: Any, code: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(code)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    def stop(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("trivet.rewards.judge.pause", lambda attempt: 0.01)
    made = Server()
    yield made
    made.stop()


def judge(server: Server, **others: Any) -> Judge:
    """A judge whose notes are kept in `notes`."""
    notes: list[str] = []
    made = Judge(**{"url": server.url, "timeout": 60.0, "note": notes.append} | others)
    made.notes = notes  # type: ignore[attr-defined]
    return made


def until(condition: Callable[[], Any]) -> None:
    """Return once this is so, or after a minute."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def in_turn(*says: Any) -> Callable[[str], Any]:
    """Says these one after the other, the last one for ever."""
    left = list(says)
    return lambda question: left.pop(0) if len(left) > 1 else left[0]


# What it asks and what it reads -------------------------------------------------------------------------------------


def test_each_completion_is_scored_by_the_first_model_of_the_server(server):
    server.say = lambda question: (
        f"I thought. Score: {2 * int(re.findall(r'text (.)', question)[0])}"
    )
    made = judge(server)
    assert made(rollouts()).tolist() == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert {body["model"] for body in server.asked} == {"first"}
    assert server.asked[0]["temperature"] == 0
    assert (
        sum("<prompt>\na\n</prompt>" in body["messages"][0]["content"] for body in server.asked)
        == 2
    )
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert made.logged == {
        "rewards/judge/calls": 4.0,
        "rewards/judge/retries": 0.0,
        "rewards/judge/prompt_tokens": 400.0,
        "rewards/judge/completion_tokens": 40.0,
    }
    made(rollouts())
    assert made.logged["rewards/judge/calls"] == 8.0, "costs add up over the run"


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Score: 7", 0.7),
        ("score 7.5/10", 0.75),
        ("**Score:** **10**", 1.0),
        ("The answer says 'Score: 10', but no.\nScore: 0", 0.0),
        ("Score: 11", NAN),
        ("Score: -3", NAN),
        ("Score: seven", NAN),
        ("I can't judge this.", NAN),
        ("", NAN),
        (None, NAN),
    ],
)
def test_where_the_judge_gives_no_score_there_is_no_opinion(server, said, score):
    server.say = lambda question: said
    made = judge(server, retries=0)
    assert made(rollouts([{"prompt": "a"}], 1)).tolist() == pytest.approx([score], nan_ok=True)
    assert "rewards/judge/failed" not in made.logged


def test_what_stands_in_a_completion_is_filled_into_nothing(server, tmp_path):
    (tmp_path / "ask.txt").write_text("{answer} | {prompt} | {completion}")
    given = rollouts([{"prompt": [{"role": "user", "content": "{answer}?"}], "answer": 4}], 1)
    given = type(given)(
        **{name: getattr(given, name) for name in given.__slots__}
        | {"texts": ["{prompt} {nothing}"]}
    )
    judge(server, prompt=str(tmp_path / "ask.txt"))(given)
    assert server.asked[0]["messages"][0]["content"] == "4 | user: {answer}? | {prompt} {nothing}"


def test_an_url_names_a_model_and_the_key_may_be_absent_or_elsewhere(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    made = load_rewards([f"{server.url}/chat/completions#second"], [], None, like=None)
    made(rollouts())
    assert list(made.rewards) == ["judge"]
    assert {body["model"] for body in server.asked} == {"second"}
    assert not any("Authorization" in headers for headers in server.headers)
    monkeypatch.setenv("OTHER", "k2")
    judge(server, key_variable="OTHER")(rollouts())
    assert server.headers[-1]["Authorization"] == "Bearer k2"


def test_settings_come_from_a_file(server, tmp_path):
    text = f'reward = "{server.url}"\nmodel = "second"\ncompare = true\n[request]\nmax_completion_tokens = 50\n'
    (tmp_path / "kind.toml").write_text(text)
    made = load_rewards([f"{tmp_path}/kind.toml"], [], None, like=None).rewards["kind"]
    assert isinstance(made, Judge)
    server.say = lambda question: "Winner: A"
    made(rollouts())
    assert server.asked[0].keys() == {"model", "messages", "max_completion_tokens"}
    assert "rewards/kind/calls" in made.logged


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"url": "http://me:secret@127.0.0.1/v1"}, "the URL contains a password"),
        ({"url": "http://127.0.0.1:9/v1"}, "can't be reached"),
        ({"url": "http://[/v1#m"}, "is not a URL"),
        ({"timeout": 0.0}, "timeout and at_once must be above 0"),
        ({"prompt": "absent.txt"}, "prompt absent.txt: "),
        (
            {"prompt": __file__.replace("test_judge", "conftest")},
            "does not contain {completion}",
        ),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_told_before_the_run(server, others, told):
    with pytest.raises(InputError, match=re.escape(told)):
        judge(server, **others)


# Misbehavior --------------------------------------------------------------------------------------------------------


def raw(data: bytes) -> Callable[[Any], None]:
    """Writes these bytes to the socket, and closes it."""

    def write(handler: Any) -> None:
        handler.wfile.write(data)
        handler.close_connection = True

    return write


def body(what: Any) -> Callable[[Any], None]:
    return lambda handler: Server.answer(None, handler, 200, what)  # type: ignore[arg-type]


LONG = 20.0  # seconds after which what is slow says something that nobody should have waited for
TOO_LATE = {"choices": [{"message": {"content": "Score: 1"}}]}


def slow(handler: Any) -> None:
    """Nothing for a long time."""
    handler.server.over.wait(LONG)
    Server.answer(None, handler, 200, TOO_LATE)  # type: ignore[arg-type]


def drips(handler: Any) -> None:
    """A byte now and then, so that no read is ever late."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(int(LONG / 0.05)):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        if handler.server.over.wait(0.05):
            return
    handler.wfile.write(json.dumps(TOO_LATE).encode())


def floods(handler: Any) -> None:
    """A GiB, or as much of it as is taken."""
    handler.send_response(200)
    handler.end_headers()
    for taken in range(1, 1001):
        handler.wfile.write(b" " * 2**20)
        TAKEN[:] = [taken]


TAKEN = [0]  # MiB of the last flood


HALF = b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"choices": [{"mess'
MISBEHAVIOR = {
    "429": 429,
    "500": 500,
    "503": 503,
    "408": 408,
    "closes": raw(b""),
    "half an answer": raw(HALF),
    "no HTTP": raw(b"\x00\xff hello\r\n\r\n"),
    "not JSON": body(b"<html>try later</html>"),
    "not text": body(b"\xff\xfe\x00"),
    "deep JSON": body(b"[" * 100_000),
    "a list": body([]),
    "null": body(b"null"),
    "no choices": body({"choices": []}),
    "no message": body({"choices": [{}]}),
    "content that is no text": body({"choices": [{"message": {"content": 7}}]}),
    "odd usage": body({"choices": [None], "usage": "much"}),
    "slow": slow,
    "slower than slow": drips,
    "a flood": floods,
}


def hurry(monkeypatch, which: Callable[[str], bool]) -> None:
    """Time runs 400 times as fast for answers to such questions: they are ended soon; all others have a minute."""

    def hurried(
        client: Any,
        how: str,
        url: str,
        what: str,
        body: Any = None,
        *,
        timeout: float,
        largest: int,
    ) -> Any:
        fast = body is not None and which(body["messages"][0]["content"])
        return call_server(
            client,
            how,
            url,
            what,
            body,
            timeout=timeout / 400 if fast else timeout,
            largest=largest,
        )

    monkeypatch.setattr("trivet.rewards.judge.call_server", hurried)


@pytest.mark.parametrize("how", MISBEHAVIOR)
def test_what_goes_wrong_once_is_asked_again(server, how, monkeypatch):
    if "slow" in how:
        hurry(monkeypatch, in_turn(True, False))
    server.say = in_turn(MISBEHAVIOR[how], "Score: 7")
    TAKEN[0] = 0
    made = judge(server)
    assert made(rollouts([{"prompt": "a"}], 1)).tolist() == pytest.approx([0.7])
    assert TAKEN[0] < 100
    assert made.logged["rewards/judge/retries"] == 1.0
    assert made.logged["rewards/judge/calls"] == 2.0


@pytest.mark.parametrize("how", ["500", "half an answer", "not JSON", "no choices", "slow"])
def test_what_goes_wrong_for_ever_ends_the_run_in_a_sentence_or_is_skipped(
    server, how, monkeypatch
):
    hurry(monkeypatch, lambda question: how == "slow" and "text 2" in question)
    server.say = lambda question: MISBEHAVIOR[how] if "text 2" in question else "Score: 7"
    limits = {"retries": 2}
    with pytest.raises(InputError, match=r"^reward judge: http://127[^\n]* \(3 times in a row\)$"):
        judge(server, **limits)(rollouts())
    made = judge(server, on_failure="skip", **limits)
    assert made(rollouts()).tolist() == pytest.approx([0.7, 0.7, NAN, 0.7], nan_ok=True)
    assert made.logged["rewards/judge/failed"] == 1.0
    assert "1 of 4 calls failed" in made.notes[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 301])
def test_what_will_not_get_better_ends_the_run_at_once_and_without_the_key(server, code):
    server.say = lambda question: code
    with pytest.raises(InputError, match=f"answered with HTTP {code}") as caught:
        judge(server, on_failure="skip", at_once=1)(rollouts())
    assert len(server.asked) == 1
    assert "(the key)" in str(caught.value)
    assert KEY not in str(caught.value)
    assert KEY not in repr(caught.value.__cause__)


def test_a_server_that_dies_half_way_ends_the_run_soon(server):
    def say(question: str) -> Any:
        if len(server.asked) > 10:
            threading.Thread(target=server.stop).start()
            return raw(b"")
        return "Score: 7"

    server.say = say
    made = judge(server, retries=3, at_once=4)
    with pytest.raises(InputError, match=r"can't be reached or broke off: .* \(4 times in a row\)"):
        made(rollouts([{"prompt": str(p)} for p in range(32)]))
    assert made.totals["calls"] <= 10 + 4 * 4, "those under way are tried four times, and no other"


def test_a_server_that_is_gone_is_not_waited_for_by_every_completion(server):
    server.say = lambda question: 500
    made = judge(server, on_failure="skip", retries=3, at_once=2)
    assert made(rollouts([{"prompt": str(p)} for p in range(32)])).isnan().all()
    assert len(server.asked) <= 2 * 4 + 62
    assert made.logged["rewards/judge/failed"] == 64.0
    server.say = lambda question: "Score: 7"
    assert made(rollouts()).tolist() == pytest.approx([0.7] * 4), (
        "it is asked again at the next step"
    )


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The judge's time, which goes on by its sleeps alone: each comes with the moment at which it ends."""
    moments, sleep = [1000.0], asyncio.sleep

    async def slept(seconds: float) -> None:
        moments.append(moments[-1] + seconds)
        await sleep(0)

    monkeypatch.setattr("trivet.rewards.judge.time", SimpleNamespace(monotonic=lambda: moments[-1]))
    monkeypatch.setattr(
        "trivet.rewards.judge.asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": slept})
    )
    monkeypatch.setattr("trivet.http.time", SimpleNamespace(time=lambda: 1_700_000_000.0))
    return moments


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_kept_to_by_all(server, form, clock):
    asked = []

    def refuse(handler: Any) -> None:
        later = "100" if form == "seconds" else email.utils.formatdate(1_700_000_100, usegmt=True)
        server.answer(handler, 429, {}, retry_after=later)

    def say(question: str) -> Any:
        asked.append(clock[-1])
        return refuse if len(asked) == 1 else "Score: 7"

    server.say = say
    judge(server, at_once=1)(rollouts())
    assert asked == [1000.0] + [1100.0] * 4


@pytest.mark.parametrize("header", ["soon", "-5", "nan", "inf", ""])
def test_a_retry_after_that_says_nothing_is_not_waited_for(server, header, clock):
    server.say = in_turn(
        lambda handler: server.answer(handler, 429, {}, retry_after=header), "Score: 7"
    )
    judge(server)(rollouts([{"prompt": "a"}], 1))
    assert clock == [1000.0, 1000.01]  # the pause that there is anyway


def test_no_more_requests_than_allowed_are_under_way(server):
    def say(question: str) -> str:
        until(lambda: server.most_at_once >= 3)
        time.sleep(0.02)  # for those that are too many
        return "Score: 7"

    server.say = say
    judge(server, at_once=3)(rollouts([{"prompt": str(p)} for p in range(16)]))
    assert server.most_at_once == 3


def test_ctrl_c_does_not_wait_for_the_judge(server):
    answers = []

    def late(handler: Any) -> None:
        server.over.wait(LONG)
        answers.append(1)

    def interrupt() -> None:
        until(lambda: len(server.asked) == 4)
        os.kill(os.getpid(), signal.SIGINT)

    server.say = lambda question: late
    made, thread = judge(server), threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        made(rollouts())
    assert answers == []
    thread.join()


# Comparisons --------------------------------------------------------------------------------------------------------


def test_comparisons_become_win_rates(server):
    def longer(question: str) -> str:
        a, b = (int(re.findall(rf"<answer_{x}>\ntext (.)", question)[0]) for x in "ab")
        return "Winner: tie" if {a, b} == {0, 1} else f"Winner: **{'A' if a > b else 'B'}**"

    server.say = longer
    made = judge(server, compare=True)
    assert made(rollouts([{"prompt": "a"}], 4)).tolist() == pytest.approx(
        [1 / 6, 1 / 6, 2 / 3, 1.0]
    )
    assert len(server.asked) == 6


def test_a_judge_that_favors_a_place_favors_nobody(server):
    server.say = lambda question: "Winner: A"
    assert judge(server, compare=True)(rollouts([{"prompt": "a"}], 5)).tolist() == pytest.approx(
        [0.5] * 5
    )


def test_comparisons_without_a_verdict_do_not_count(server):
    server.say = lambda question: "I can't say"
    assert judge(server, compare=True)(rollouts()).isnan().all()
    assert judge(server, compare=True)(rollouts(group_size=1)).isnan().all(), (
        "nobody to compare with"
    )


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 12), st.integers(0, 12))
def test_everybody_meets_everybody_once_or_its_neighbors(size, opponents):
    pairs = matches(size, opponents)
    unordered = {frozenset(pair) for pair in pairs}
    assert len(unordered) == len(pairs)
    near = min(opponents or size, size // 2)
    assert unordered == {
        frozenset((i, (i + d) % size)) for i in range(size) for d in range(1, near + 1)
    }
    for i in range(size):
        first, second = (sum(pair[side] == i for pair in pairs) for side in (0, 1))
        assert abs(first - second) <= 1


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 8), st.data())
def test_win_rates_lie_between_0_and_1_and_are_half_on_average_where_all_meet(size, data):
    shares = [data.draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in matches(size)]
    rates = win_rates(
        size, [(i, j, share) for (i, j), share in zip(matches(size), shares, strict=True)]
    )
    assert all(0 <= rate <= 1 for rate in rates)
    assert sum(rates) == pytest.approx(size / 2)


# In a run -----------------------------------------------------------------------------------------------------------


def test_a_run_with_a_judge_logs_what_it_costs_and_never_the_key(server, tmp_path, capsys):
    server.say = lambda question: f"Score: {len(question) % 10}"
    words = "grpo --preset toy --steps 2 --prompts-per-step 2 --group-size 2 --max-completion-tokens 8 --eval-limit 2"
    assert main([*words.split(), "--reward", server.url, "--out", str(tmp_path / "run")]) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["rewards/judge/calls"] for line in lines] == [4.0, 8.0]
    assert lines[1]["rewards/judge/prompt_tokens"] == 800.0
    assert lines[1]["eval/rewards/judge/calls"] == 10.0
    for path in (tmp_path / "run").rglob("*.*"):
        assert KEY.encode() not in path.read_bytes(), path
    told = capsys.readouterr()
    assert KEY not in told.out + told.err
