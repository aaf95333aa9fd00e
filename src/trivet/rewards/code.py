"""A reward for code: what the model wrote is run against the tests of its row, apart from this machine."""

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
HOLDS = """
import os, socket
assert os.getpid() < 10 and not os.path.exists("/proc") and not os.access("/usr", os.W_OK)
assert socket.socket().connect_ex(("127.0.0.1", 9)) == 101  # the network is unreachable
"""  # what is true of a program that is apart
COLUMNS = "tests (or test_list, or test with entry_point), or stdin and expected_output"


@dataclass
class CodeReward:
    """1 where the code in a completion passes all tests of its row, else 0; NaN for a row that has none.

    The code is the last fenced block, or the whole completion where there is none. Tests are Python statements that raise
    when they fail (`tests`, a text or a list; MBPP's `test_list` and HumanEval's `test` with `entry_point` too), run after
    the code in one process; or `stdin` and `expected_output` (texts, or lists of as many), compared line by line.
    """

    cpu_seconds: int = 10
    """Processor time of one process of a program."""
    wall_seconds: float = 20.0
    """Time of a program; all of its processes end with it."""
    memory_mb: int = 1024
    """Memory that one process may ask for."""
    processes: int = 16
    """Processes and threads at a time."""
    file_mb: int = 16
    """What a program may write: to its folder, and to stdout."""
    at_once: int = 0
    """Programs that run at a time; 0: as many as there are cores."""
    partial: bool = False
    """The share of tests that pass, in place of all or nothing."""
    unconfined: bool = False
    """Run with limits alone where the machine gives no namespaces: the code then sees your files and your network."""
    name: str = "code"
    logged: dict[str, float] = field(default_factory=dict[str, float], init=False)
    late: list[int] = field(default_factory=list[int], init=False)  # one for each program that was out of time
    running: set[Any] = field(default_factory=set[Any], init=False)  # launchers

    def __post_init__(self) -> None:
        """InputError where programs can't be run apart, found by running one that looks around."""
        if not sys.platform.startswith("linux"):
            raise InputError("reward code needs Linux: only there can it keep the model's code from your machine")
        self.at_once = self.at_once or len(os.sched_getaffinity(0))
        trial, told = {"tests": ["assert answer == 42", "" if self.unconfined else HOLDS]}, ""
        try:
            passed = self._passed("answer = 42", trial)
        except _NotApartError as error:
            if self.unconfined:
                raise InputError(f"reward code can't start a program on this machine: {error}") from None
            passed, told = 0.5, f" ({error})"
        if passed == 0.5:
            raise InputError(
                f"reward code can't keep the model's code apart on this machine{told}; run where namespaces are "
                "allowed, or set unconfined = true in a .toml, and the code sees your files and your network"
            )
        if passed < 1:
            raise InputError("reward code: a program of one line does not run within the limits; raise memory_mb")

    def __call__(self, rollouts: Rollouts) -> Tensor:
        size, self.late = rollouts.groups.group_size, []
        rows = [row for row in rollouts.rows for _ in range(size)]
        if not any(_has_tests(row) for row in rows):
            raise InputError(f"reward code: the data has no tests; it needs a column {COLUMNS}")
        with ThreadPoolExecutor(self.at_once) as pool:
            codes = [code_of(text) for text in rollouts.texts]
            jobs = [pool.submit(self._passed, code, row) for code, row in zip(codes, rows, strict=True)]
            try:
                shares = [job.result() for job in jobs]
            except BaseException as error:  # Ctrl-C too: wait for no program
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    process.kill()
                if isinstance(error, _NotApartError):
                    raise InputError(f"reward code could not start a program: {error}") from None
                raise
        self.logged = {f"rewards/{self.name}/out_of_time": len(self.late) / len(rows)}
        values = [share if self.partial or share != share else float(share == 1) for share in shares]
        return torch.tensor(values, dtype=torch.float32, device=rollouts.groups.prompts.device)

    def _passed(self, source: str, row: Mapping[str, Any]) -> float:
        """The share of the row's tests that this code passes; NaN where it has none."""
        if not _has_tests(row):
            return torch.nan
        if (tests := tests_of(row)) is not None:
            word = secrets.token_hex(16)
            said, passed = self._output({"source": source, "tests": tests, "word": word, "stdin": ""}).split(" "), 0
            if len(said) == 2 and said[0] == word:
                passed = int(said[1])
            return passed / len(tests)
        inputs, outputs = _listed(row.get("stdin") or ""), _listed(row["expected_output"])
        if len(inputs) != len(outputs):
            raise InputError(f"reward code: a row has {len(inputs)} of stdin for {len(outputs)} of expected_output")
        passed = 0
        for given, expected in zip(inputs, outputs, strict=True):
            printed = self._output({"source": source, "tests": None, "word": "", "stdin": str(given)})
            right = _lines(printed) == _lines(str(expected))
            passed += right
            if not right and not self.partial:
                break
        return passed / len(outputs)

    def _output(self, job: dict[str, Any]) -> str:
        """What a program writes to stdout; '' where its exit code or a limit says that it failed.

        Errors: _NotApartError where it could not be started.
        """
        limits = {"cpu_seconds": self.cpu_seconds, "memory": self.memory_mb << 20, "file_size": self.file_mb << 20}
        job |= limits | {"processes": self.processes, "unconfined": self.unconfined, "parent": os.getpid()}
        job |= {"python": sys.executable, "seen": [sys.prefix, sys.base_prefix]}
        with tempfile.TemporaryDirectory(prefix="trivet-") as folder, ExitStack() as stack:
            given, out, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(json.dumps(job | {"folder": folder}).encode())
            given.seek(0)
            command = [sys.executable, "-I", "-S", str(CONFINED)]
            streams: Any = {"stdin": given, "stdout": out, "stderr": errors}
            process = subprocess.Popen(command, **streams, env={}, cwd="/", start_new_session=True)
            self.running.add(process)
            try:
                ended = _ends(process.pid, self.wall_seconds)
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # it is not reaped yet, so the number is still its own
                process.wait()
                self.running.discard(process)
            if not ended:
                self.late.append(1)
                return ""
            errors.seek(0)
            out.seek(0)
            if said := errors.read().decode(errors="replace").strip():
                raise _NotApartError(said.splitlines()[-1])
            return "" if process.returncode else out.read(self.file_mb << 20).decode(errors="replace")


def _ends(process: int, seconds: float) -> bool:
    """Whether a child ends within so many seconds; it is not reaped."""
    watch, poll = os.pidfd_open(process), select.poll()
    try:
        poll.register(watch, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(watch)


class _NotApartError(Exception):
    """A program could not be started as it should be."""


def code_of(text: str) -> str:
    """The last fenced block of a text, or all of it."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else text


def tests_of(row: Mapping[str, Any]) -> list[str] | None:
    """The tests of a row as statements to run one after the other; None where it has input and output instead."""
    tests = row.get("tests") or row.get("test_list") or row.get("test")
    if not tests:
        return None
    before = "\n".join([*_listed(row.get("test_imports") or []), row.get("test_setup_code") or ""]).strip()
    if entry := row.get("entry_point"):
        return ["\n".join([before, *_listed(tests), f"check({entry})"])]
    return [f"{before}\n{test}" for test in _listed(tests)]


def _has_tests(row: Mapping[str, Any]) -> bool:
    return bool(row.get("tests") or row.get("test_list") or row.get("test")) or row.get("expected_output") is not None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
