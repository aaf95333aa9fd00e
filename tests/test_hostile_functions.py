"""Reward functions that are slow, hang, raise, lie, print and meddle: the run goes on or stops in one sentence, as configured."""

import asyncio
import contextlib
import io
import json
import logging
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch.testing import assert_close

from test_rewards import rollouts
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.http import pause, run_async
from trivet.rewards.functions import FunctionReward, load_rewards
from trivet.rewards.guard import AGAIN, OutOfTime, with_time_limit

NAN = math.nan
LONG = 20.0  # seconds that nothing here waits for


def reward(function: Callable[..., Any], **settings: Any) -> FunctionReward:
    """A reward whose notes are kept in `notes`."""
    notes: list[str] = []
    made = FunctionReward(function, "mine.py:f", name="f", note=notes.append, **settings)
    made.notes = notes  # type: ignore[attr-defined]
    return made


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr("trivet.rewards.functions.pause", lambda attempt: 0.0)


# Slow, and for ever -------------------------------------------------------------------------------------------------


ENDED: list[str] = []  # of the functions below, those that came to an end of their own


def sleeps(completions):
    time.sleep(LONG)
    ENDED.append("sleeps")


def loops(completions):
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        pass
    ENDED.append("loops")


def loops_and_swallows(completions):
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(0.01)
    ENDED.append("loops_and_swallows")


def backtracks(completions):
    re.match(r"(a+)+$", "a" * 60 + "b")


def waits_for_a_lock(completions):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire(timeout=LONG)
    ENDED.append("waits_for_a_lock")


async def awaits(completions):
    await asyncio.sleep(LONG)
    ENDED.append("awaits")


async def blocks_the_loop(completions):
    time.sleep(LONG)
    ENDED.append("blocks_the_loop")


@pytest.mark.parametrize(
    "function",
    [sleeps, loops, loops_and_swallows, backtracks, waits_for_a_lock, awaits, blocks_the_loop],
)
def test_a_function_that_hangs_is_ended_and_told(function):
    threads = threading.active_count()
    ENDED.clear()
    with pytest.raises(InputError, match=r"^reward mine.py:f did not return within 0.2 seconds$"):
        reward(function, timeout=0.2)(rollouts())
    assert function.__name__ not in ENDED
    assert threading.active_count() <= threads + 1  # the loop of async functions at most


def rings() -> None:
    """What the alarm does when the time is up, whatever the clock says."""
    signal.raise_signal(signal.SIGALRM)


def test_code_that_catches_everything_is_interrupted_again_and_again():
    caught, timer = [], []

    def stubborn(completions):
        timer.extend(signal.getitimer(signal.ITIMER_REAL))
        for _ in range(2):
            try:
                rings()
            except BaseException as error:
                caught.append(type(error))
        return [1.0] * 4

    assert reward(stubborn, timeout=500)(rollouts()).tolist() == [1.0] * 4
    assert caught == [OutOfTime, OutOfTime]
    assert 0 < timer[0] <= 500
    assert timer[1] == AGAIN == 1.0  # seconds after which it rings again


def test_the_alarm_is_off_afterwards_and_what_was_there_before_is_back():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        assert with_time_limit(500, lambda: 3) == 3
        with pytest.raises(OutOfTime):
            with_time_limit(0.1, lambda: time.sleep(LONG))
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert not rang
        signal.raise_signal(signal.SIGALRM)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, before)


def test_outside_the_main_thread_a_call_that_hangs_is_left_behind():
    ended: list[Any] = []
    ENDED.clear()

    def elsewhere():
        for seconds, call in ((500, lambda: 3), (0.1, lambda: sleeps([])), (500, lambda: 1 / 0)):
            try:
                ended.append(with_time_limit(seconds, call))
            except BaseException as error:
                ended.append(type(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "sleeps" not in ENDED
    assert ended == [3, OutOfTime, ZeroDivisionError]


def test_after_code_has_blocked_the_loop_there_is_a_new_one():
    with pytest.raises(InputError, match="did not return"):
        reward(blocks_the_loop, timeout=0.1)(rollouts())

    async def quick(completions):
        await asyncio.sleep(0.01)
        return [2.0] * len(completions)

    assert reward(quick)(rollouts()).tolist() == [2.0] * 4


# Async --------------------------------------------------------------------------------------------------------------


def test_an_async_function_is_awaited_and_what_it_keeps_stays_usable():
    kept: list[asyncio.AbstractEventLoop] = []

    async def f(completions, answer):
        kept.append(asyncio.get_running_loop())
        return [float(x) for x in await asyncio.gather(*(asyncio.sleep(0.01, a) for a in answer))]

    made, rows = reward(f), ({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2})
    assert made(rollouts(rows)).tolist() == made(rollouts(rows)).tolist() == [1.0, 1.0, 2.0, 2.0]
    assert kept[0] is kept[1]
    assert not kept[0].is_closed()


def test_where_a_loop_runs_already_as_in_a_notebook_async_functions_work_too():
    async def f(completions):
        return [1.0] * len(completions)

    async def cell():
        return reward(f)(rollouts()).tolist()

    assert asyncio.run(cell()) == [1.0] * 4


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), asyncio.CancelledError()])
def test_what_an_async_function_raises_is_told_and_the_loop_lives(error):
    async def f(completions):
        raise error

    with pytest.raises(InputError, match=f"raised {type(error).__name__}"):
        reward(f)(rollouts())
    assert run_async(asyncio.sleep(0, 5)) == 5


# Failures: retried, then stop or skip -------------------------------------------------------------------------------


def flaky(failures: int, how: Callable[[], Any]) -> Callable[..., Any]:
    """A function that fails so many times, then answers."""
    left = [failures]

    def f(completions):
        left[0] -= 1
        return how() if left[0] >= 0 else [1.0] * len(completions)

    return f


class Awkward(float):
    """A number that can't be compared."""

    def __abs__(self):
        raise RuntimeError("no")


HOWS = [
    lambda: [Awkward(1)] * 4,
    lambda: 1 / 0,
    lambda: [NAN] * 4,
    lambda: [math.inf] * 4,
    lambda: [1.0],
    lambda: None,
    lambda: sys.exit(1),
]


@pytest.mark.parametrize("how", HOWS)
def test_what_fails_twice_is_tried_a_third_time_where_asked(how):
    assert reward(flaky(2, how), retries=2)(rollouts()).tolist() == [1.0] * 4
    with pytest.raises(
        InputError, match=r"^reward mine.py:f (raised|returned) [^\n]+ \(2 times in a row\)$"
    ):
        reward(flaky(2, how), retries=1)(rollouts())


def test_a_timeout_is_retried_too():
    assert reward(flaky(1, rings), retries=1)(rollouts()).tolist() == [1.0] * 4
    with pytest.raises(
        InputError,
        match=r"^reward mine.py:f did not return within 600 seconds \(2 times in a row\)$",
    ):
        reward(flaky(2, rings), retries=1)(rollouts())


def test_pauses_between_retries_double_and_are_spread_and_limited():
    for attempt, most in ((1, 1), (2, 2), (3, 4), (20, 60)):
        drawn = [pause(attempt) for _ in range(200)]
        assert most / 2 <= min(drawn) < 0.6 * most < 0.9 * most < max(drawn) <= most


def choosy(completions):
    if "text 2" in completions:
        raise ValueError("not this one\nand more")
    return [1.0] * len(completions)


def test_skipping_leaves_only_the_groups_unscored_in_which_it_fails_and_counts_them():
    made = reward(choosy, on_failure="skip")
    assert_close(made(rollouts()), torch.tensor([1.0, 1.0, NAN, NAN]), equal_nan=True)
    assert made.logged == {"rewards/f/failed": 2.0}
    assert re.fullmatch(
        r"reward mine.py:f raised ValueError in its line \d+: not this one and more; 2 of 4 completions go unscored",
        made.notes[0],  # type: ignore[attr-defined]
    )
    assert made(rollouts([{"prompt": "a"}])).tolist() == [1.0, 1.0]
    assert made.logged == {}


@pytest.mark.parametrize("how", [*HOWS, rings])
def test_skipping_a_call_that_fails_altogether_leaves_all_unscored(how):
    """A slow one is not called again for each group."""
    calls = []
    made = reward(lambda completions: calls.append(len(completions)) or how(), on_failure="skip")
    assert made(rollouts([{"prompt": str(p)} for p in range(8)])).isnan().all()
    assert calls == ([16] if how is rings else [16] + [2] * 8)
    assert made.logged == {"rewards/f/failed": 16.0}


def test_an_absent_column_is_no_failure_to_skip():
    with pytest.raises(InputError, match="asks for column 'answer'"):
        reward(lambda completions, answer: answer, on_failure="skip")(rollouts())


def test_ctrl_c_is_not_taken_for_a_failure():
    def f(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reward(f, on_failure="skip", retries=3)(rollouts())


# Meddling -----------------------------------------------------------------------------------------------------------


def test_changing_what_it_is_given_changes_nothing_else():
    chat = [{"role": "user", "content": "2 + 2?"}]
    rows = [{"prompt": chat, "answer": {"all": [4]}}, {"prompt": chat, "answer": {"all": [4]}}]
    given = rollouts(rows)
    before = json.dumps([given.rows, given.texts, given.groups.completions.tolist()])

    def f(prompts, completions, answer, completion_ids):
        prompts[0].append("mine")
        assert len(prompts[1]) == 1, "copies of one row are apart too"
        prompts[1][0]["content"] = completions[0][0]["content"] = "mine"
        answer[0]["all"].append(5)
        completion_ids[0][0] = 99
        for x in (prompts, completions, answer, completion_ids):
            x.clear()
        return [0.0] * 4

    for _ in range(2):
        assert reward(f)(given).tolist() == [0.0] * 4
    assert json.dumps([given.rows, given.texts, given.groups.completions.tolist()]) == before


def test_a_retry_is_given_what_the_first_call_was_given():
    seen = []

    def f(completions, answer):
        seen.append(list(answer))
        answer.clear()
        return [1.0] * (4 if len(seen) > 1 else 3)

    reward(f, retries=1)(rollouts([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]))
    assert seen == [[1, 1, 2, 2]] * 2


def test_numbers_logged_by_a_call_that_failed_do_not_count():
    def f(completions, log_metric):
        log_metric("tries", 1)
        raise ValueError

    made = reward(f, on_failure="skip")
    made(rollouts())
    assert made.logged == {"rewards/f/failed": 4.0}


# Printing -----------------------------------------------------------------------------------------------------------


def test_what_is_printed_stays_off_the_screen_and_its_first_lines_are_told(capsys):
    def f(completions):
        print("one")
        print("two [bold]", file=sys.stderr)
        return [0.0] * 4

    made = reward(f)
    made(rollouts())
    assert capsys.readouterr() == ("", "")
    assert made.notes == ["reward f prints: one", "reward f prints: two [bold]"]  # type: ignore[attr-defined]


def test_endless_printing_is_ended_and_kept_short():
    def f(completions):
        for line in range(2000):
            print("x" * 1000)
            if line == 1000:
                rings()
        raise AssertionError("it went on")

    made = reward(f, on_failure="skip")
    for _ in range(10):
        made(rollouts())
    assert [note for note in made.notes if "print" not in note] == [  # type: ignore[attr-defined]
        "reward mine.py:f did not return within 600 seconds; 4 of 4 completions go unscored"
    ] * 10
    notes = [note for note in made.notes if "print" in note]  # type: ignore[attr-defined]
    assert len(notes) == 21
    assert notes[-1] == "reward f prints a lot; further output is not shown"
    assert max(map(len, notes)) < 300


def test_the_live_line_goes_on_while_a_function_prints(monkeypatch):
    """rich draws in a thread of its own, on what it finds as sys.stdout at that moment."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    drawn = list[int]()

    def f(completions):
        print("noise")
        for _ in range(2):
            drawn.append(screen.getvalue().count("training"))
            thread = threading.Thread(target=progress.refresh)
            thread.start()
            thread.join()
        return [0.0] * 4

    made = reward(f)
    with Progress(console=Console(force_terminal=True, width=60), auto_refresh=False) as progress:
        progress.add_task("training", total=2)
        made(rollouts())
        drawn.append(screen.getvalue().count("training"))
    assert drawn[0] < drawn[1] < drawn[2]
    assert made.notes == ["reward f prints: noise"]  # type: ignore[attr-defined]
    assert "noise" not in screen.getvalue()


def test_logging_to_a_closed_ear_is_no_error():
    def f(completions):
        logging.getLogger("theirs").warning("careful")
        return [0.0] * 4

    assert reward(f)(rollouts()).tolist() == [0.0] * 4


# Settings in a file -------------------------------------------------------------------------------------------------


def test_a_toml_file_names_a_reward_and_its_settings(tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [2.0] * len(completions)\n")
    file = tmp_path / "polite.toml"
    file.write_text(
        f'reward = "{tmp_path}/mine.py:f"\ntimeout = 300\nretries = 1\non_failure = "skip"\n'
    )
    sum_of = load_rewards([str(file), "brevity"], [], None, like=None)
    made = sum_of.rewards["polite"]
    assert isinstance(made, FunctionReward)
    assert (made.timeout, made.retries, made.on_failure, made.name) == (300, 1, "skip", "polite")
    assert sum_of(rollouts()).tolist() == pytest.approx([1.98] * 4)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("timeout = 3", "the file must name its reward, as in reward = "),
        (
            'reward = "brevity"\ntimeot = 3',
            "unknown setting 'timeot'; the nearest known one is 'timeout'",
        ),
        ('reward = "brevity"\ntimeout = -1', "timeout is -1; expected a number, not negative"),
        ('reward = "brevity"\ntimeout = 0', "timeout is 0; it must be above 0"),
        ('reward = "brevity"\ntimeout = true', "timeout is True; expected a number"),
        ('reward = "brevity"\nretries = 1.5', "retries is 1.5; expected a whole number"),
        (
            'reward = "brevity"\non_failure = "ignore"',
            "on_failure is 'ignore'; expected one of stop, skip",
        ),
        ('reward = "brevity"\nfunction = "f"', "unknown setting 'function'"),
        ('reward = "brevity"\nlogged = {}', "unknown setting 'logged'"),
        ("reward = ", "not valid TOML"),
    ],
)
def test_settings_that_can_not_be_meant_are_told(tmp_path, text, told):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(told)):
        load_rewards([str(file)], [], None, like=None)


def test_a_settings_file_that_is_not_there_is_told():
    with pytest.raises(InputError, match=r"reward absent.toml: No such file"):
        load_rewards(["absent.toml"], [], None, like=None)


# In a run -----------------------------------------------------------------------------------------------------------

FILE = """
calls = 0

def sometimes(completions):
    global calls
    calls += 1
    print("call", calls)
    if calls in (2, 3, 4):
        raise RuntimeError("the service is away")
    return [float(len(c)) for c in completions]
"""


def run(tmp_path, method: str, settings: str) -> int:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "mine.toml").write_text(f'reward = "{tmp_path}/mine.py:sometimes"\n{settings}\n')
    words = f"{method} --preset toy --steps 4 --prompts-per-step 2 --group-size 2 --max-completion-tokens 8"
    limits = f"--eval-limit 4 --reward {tmp_path}/mine.toml --out {tmp_path}/run"
    return main([*words.split(), *limits.split()])


@pytest.mark.parametrize("method", ["grpo", "ppo", "pairwise-grpo"])
def test_a_run_goes_on_over_steps_without_rewards(tmp_path, method, capsys):
    assert run(tmp_path, method, 'on_failure = "skip"') == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert ["rewards/mine/failed" in line for line in lines] == [False, True, False, False]
    assert lines[1]["rewards/unscored"] == 4.0
    told = " ".join(capsys.readouterr().out.split())  # the terminal wraps it
    assert "the service is away; 4 of 4 completions go unscored" in told
    assert all(math.isfinite(line["grad_norm"]) for line in lines)


def test_a_run_stops_with_one_sentence(tmp_path, capsys):
    assert run(tmp_path, "grpo", "retries = 0") == 2
    errors = capsys.readouterr().err
    assert "sometimes raised RuntimeError in its line 9: the service is away" in errors
    assert "Traceback" not in errors
