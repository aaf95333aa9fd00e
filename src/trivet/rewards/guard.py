"""Around code that somebody else wrote: a time limit, an ear for what it prints."""

import io
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN = 1.0  # seconds after which an alarm that was swallowed rings again


class OutOfTime(BaseException):
    """Raised inside code whose time is up; no Exception, so that `except Exception` in there does not swallow it."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """call(), or OutOfTime when it takes longer.

    In the main thread an alarm interrupts it where it stands, in a loop, a sleep, a socket, a lock or a regular expression,
    and nothing of it goes on. In another thread, and on Windows, there are no alarms: it runs in a daemon thread, which is
    left to itself when its time is up. What an alarm can't end: a call into C that never looks at signals, and code that
    catches everything for ever. Code that sets an alarm of its own takes ours off.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        return _within_a_thread(seconds, call)
    armed = True

    def ring(number: int, frame: object) -> None:
        if armed:
            raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        try:
            return call()
        finally:
            armed = False  # should it ring just here, the outer finally still puts things back
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _within_a_thread(seconds: float, call: Callable[[], Any]) -> Any:
    ended: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            ended.append((call(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise OutOfTime
    result, error = ended[0]
    if error is not None:
        raise error
    return result


class Heard(io.TextIOBase):
    """Stands in for stdout: keeps the beginning of what is printed, and forgets the rest."""

    def __init__(self, most: int = 4000):
        self.text, self.most = "", most
        self.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # rich draws its live line there

    def write(self, text: str) -> int:
        """Keep it while there is room."""
        if len(self.text) < self.most:
            self.text += text[: self.most - len(self.text)]
        return len(text)

    def fileno(self) -> int:
        """That of the real one, for a program that is started with it."""
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        """It is."""
        return True
