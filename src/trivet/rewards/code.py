"""A reward for code: runs what the model wrote against the tests of its row, isolated from this
machine.
"""

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.errors import InputError

BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
CONFINED = Path(__file__).with_name("confined.py")
# What holds in an isolated program.
PROBE = """
import os, socket
assert os.getpid() < 10 and not os.path.exists("/proc") and not os.access("/usr", os.W_OK)
assert socket.socket().connect_ex(("127.0.0.1", 9)) == 101  # the network is unreachable
"""
COLUMNS = "tests (or test_list, or test with entry_point), or stdin and expected_output"


@dataclass
class CodeReward:
    """1 where the code in a completion passes all tests of its row, else 0; NaN for a row without
    tests.

    The code is the last fenced block, or the whole completion if it has none. Tests are Python
    statements that raise when they fail (`tests`, a string or a list; also MBPP's `test_list` and
    HumanEval's `test` with `entry_point`), run after the code in one process; or `stdin` and
    `expected_output` (strings, or lists of equal length), compared line by line.
    """

    cpu_seconds: int = 10
    """CPU time of one process of a program."""
    wall_seconds: float = 20.0
    """Wall-clock time of a program; all of its processes end with it."""
    memory_mb: int = 1024
    """Memory that one process may allocate."""
    processes: int = 16
    """Processes and threads at a time."""
    file_mb: int = 16
    """How much a program may write to its folder, and to stdout."""
    at_once: int = 0
    """Programs that run at a time; 0 means one per core."""
    partial: bool = False
    """Reward the share of tests that pass instead of all or nothing."""
    unconfined: bool = False
    """Run with the limits alone if the machine provides no namespaces; the code then sees your
    files and your network.
    """
    name: str = "code"
    logged: dict[str, float] = field(default_factory=dict[str, float], init=False)
    # One entry per program that ran out of time.
    late: list[int] = field(default_factory=list[int], init=False)
    running: set[Any] = field(default_factory=set[Any], init=False)  # launchers

    def __post_init__(self) -> None:
        """Check by a trial run that programs can be isolated. Errors: InputError if they can't."""
        if not sys.platform.startswith("linux"):
            raise InputError(
                "reward code needs Linux, the only system where it can isolate the model's code "
                "from your machine"
            )
        self.at_once = self.at_once or len(os.sched_getaffinity(0))
        trial, reason = {"tests": ["assert answer == 42", "" if self.unconfined else PROBE]}, ""
        try:
            passed = self._share_passed("answer = 42", trial)
        except _NotIsolatedError as error:
            if self.unconfined:
                raise InputError(
                    f"reward code can't start a program on this machine: {error}"
                ) from None
            passed, reason = 0.5, f" ({error})"
        if passed == 0.5:
            raise InputError(
                f"reward code can't isolate the model's code on this machine{reason}; run where "
                "namespaces are allowed, or set unconfined = true in a .toml, which lets the code "
                "see your files and your network"
            )
        if passed < 1:
            raise InputError(
                "reward code: a one-line program does not run within the limits; raise memory_mb"
            )

    def __call__(self, rollouts: Rollouts) -> Tensor:
        size, self.late = rollouts.groups.group_size, []
        rows = [row for row in rollouts.rows for _ in range(size)]
        if not any(_has_tests(row) for row in rows):
            raise InputError(f"reward code: the data has no tests; it needs a column {COLUMNS}")
        with ThreadPoolExecutor(self.at_once) as pool:
            codes = [code_of(text) for text in rollouts.texts]
            jobs = [
                pool.submit(self._share_passed, code, row)
                for code, row in zip(codes, rows, strict=True)
            ]
            try:
                shares = [job.result() for job in jobs]
            except BaseException as error:  # also Ctrl-C: do not wait for running programs
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.kill()
                if isinstance(error, _NotIsolatedError):
                    raise InputError(f"reward code could not start a program: {error}") from None
                raise
        self.logged = {f"rewards/{self.name}/out_of_time": len(self.late) / len(rows)}
        values = [
            share if self.partial or share != share else float(share == 1) for share in shares
        ]
        return torch.tensor(values, dtype=torch.float32, device=rollouts.groups.prompts.device)

    def _share_passed(self, source: str, row: Mapping[str, Any]) -> float:
        """Return the share of the row's tests that this code passes; NaN if it has none."""
        if not _has_tests(row):
            return torch.nan
        if (tests := tests_of(row)) is not None:
            word = secrets.token_hex(16)
            job = {"source": source, "tests": tests, "word": word, "stdin": ""}
            verdict, passed = self._output(job).split(" "), 0
            if len(verdict) == 2 and verdict[0] == word:
                passed = int(verdict[1])
            return passed / len(tests)
        inputs, outputs = _as_list(row.get("stdin") or ""), _as_list(row["expected_output"])
        if len(inputs) != len(outputs):
            raise InputError(
                f"reward code: a row has {len(inputs)} entries in stdin but {len(outputs)} in "
                "expected_output"
            )
        passed = 0
        for stdin, expected in zip(inputs, outputs, strict=True):
            printed = self._output(
                {"source": source, "tests": None, "word": "", "stdin": str(stdin)}
            )
            right = _lines(printed) == _lines(str(expected))
            passed += right
            if not right and not self.partial:
                break
        return passed / len(outputs)

    def _output(self, job: dict[str, Any]) -> str:
        """Run a program and return its stdout; '' if it failed by its exit code or a limit.

        Errors: _NotIsolatedError if it could not be started.
        """
        limits = {
            "cpu_seconds": self.cpu_seconds,
            "memory": self.memory_mb << 20,
            "file_size": self.file_mb << 20,
        }
        job |= limits | {
            "processes": self.processes,
            "unconfined": self.unconfined,
            "parent": os.getpid(),
        }
        job |= {"python": sys.executable, "seen": [sys.prefix, sys.base_prefix]}
        with tempfile.TemporaryDirectory(prefix="trivet-") as folder, ExitStack() as stack:
            job_file, out, errors = (
                stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)
            )
            job_file.write(json.dumps(job | {"folder": folder}).encode())
            job_file.seek(0)
            command = [sys.executable, "-I", "-S", str(CONFINED)]
            streams: Any = {"stdin": job_file, "stdout": out, "stderr": errors}
            process = subprocess.Popen(command, **streams, env={}, cwd="/", start_new_session=True)
            self.running.add(process)
            try:
                ended = _wait(process.pid, self.wall_seconds)
            finally:
                # Not reaped yet, so the process id is still its own.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.running.discard(process)
            if not ended:
                self.late.append(1)
                return ""
            errors.seek(0)
            out.seek(0)
            if message := errors.read().decode(errors="replace").strip():
                raise _NotIsolatedError(message.splitlines()[-1])
            return (
                "" if process.returncode else out.read(self.file_mb << 20).decode(errors="replace")
            )


def _wait(process: int, seconds: float) -> bool:
    """Return whether a child process ends within this many seconds, without reaping it."""
    watch, poll = os.pidfd_open(process), select.poll()
    try:
        poll.register(watch, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(watch)


class _NotIsolatedError(Exception):
    """A program could not be started in isolation."""


def code_of(text: str) -> str:
    """Return the last fenced block of a text, or all of it."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else text


def tests_of(row: Mapping[str, Any]) -> list[str] | None:
    """Return the tests of a row as statements to run in order; None if it has inputs and outputs
    instead.
    """
    tests = row.get("tests") or row.get("test_list") or row.get("test")
    if not tests:
        return None
    before = "\n".join(
        [*_as_list(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    ).strip()
    if entry := row.get("entry_point"):
        return ["\n".join([before, *_as_list(tests), f"check({entry})"])]
    return [f"{before}\n{test}" for test in _as_list(tests)]


def _has_tests(row: Mapping[str, Any]) -> bool:
    return (
        bool(row.get("tests") or row.get("test_list") or row.get("test"))
        or row.get("expected_output") is not None
    )


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
