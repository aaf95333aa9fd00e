"""Ctrl-C, SIGTERM and a closed terminal: finish the step, save, then end the run."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trivet.step.run import Run


class Stopped(KeyboardInterrupt):
    """The run stopped after a step, with a checkpoint, because it was asked to. code: the exit code
    of the process.
    """

    code = 130


@contextmanager
def catch_stop_signals(run: Run) -> Iterator[list[int]]:
    """Only add the first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) to the list; a second
    one ends the process as usual.

    A signal that the process was started to ignore, by nohup for example, stays ignored.
    """
    asked, before, own = list[int](), dict[int, Any](), os.getpid()

    def note(number: int, _: Any) -> None:
        asked.append(number)
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        if os.getpid() != own:  # a process forked by a reward function, which wants to end it
            return os.kill(os.getpid(), number)
        run.note("finishing this step and saving; Ctrl-C again quits immediately")

    if threading.current_thread() is threading.main_thread():
        # Windows has no SIGHUP
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
        caught = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before.update({number: signal.signal(number, note) for number in caught})
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(number: int, message: str) -> Stopped:
    """Return the exception that ends a run because of this signal."""
    stopped = Stopped(message)
    stopped.code = 128 + number
    return stopped
