"""Ctrl-C, SIGTERM and a closed terminal: the step is finished and saved, then the run ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trivet.step.run import Run


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop, and did so after a step, with a checkpoint. code: what the process exits with."""

    code = 130


@contextmanager
def asked_to_stop(run: Run) -> Iterator[list[int]]:
    """Within it the first Ctrl-C, SIGTERM or SIGHUP (its terminal is gone) is only noted in this list; the second ends the process as ever.

    One that the process was started to ignore, by nohup for one, stays ignored."""
    asked, before, own = list[int](), dict[int, Any](), os.getpid()

    def note(number: int, _: Any) -> None:
        asked.append(number)
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
        if os.getpid() != own:  # a process that a reward function has forked, and means to end
            return os.kill(os.getpid(), number)
        run.note("stopping after this step, with a checkpoint; once more stops at once")

    if threading.current_thread() is threading.main_thread():
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before.update({number: signal.signal(number, note) for number in heard})
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked_of(number: int, said: str) -> Stopped:
    """The end of a run that this signal asked for."""
    stopped = Stopped(said)
    stopped.code = 128 + number
    return stopped
