"""Guards around user code: a time limit, and captured output."""

import io
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN = 1.0  # seconds after which an alarm that was swallowed fires again


class OutOfTime(BaseException):
    """Raised inside code whose time is up. Not an Exception, so that an `except Exception` in that
    code does not swallow it.
    """


def with_time_limit(seconds: float, call: Callable[[], T]) -> T:
    """Return call(), or raise OutOfTime if it takes longer.

    In the main thread an alarm interrupts it wherever it is, in a loop, a sleep, a socket, a lock
    or a regular expression, and nothing of it keeps running. In another thread, and on Windows,
    there are no alarms: it runs in a daemon thread, which is abandoned when its time is up. An
    alarm can't end a C call that never checks for signals, nor code that catches everything
    forever. Code that sets its own alarm disables this one.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        return _run_in_thread(seconds, call)
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
            armed = False  # if it fires right here, the outer finally still restores the handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _run_in_thread(seconds: float, call: Callable[[], Any]) -> Any:
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


class CapturedOutput(io.TextIOBase):
    """Replaces stdout: keeps the beginning of what is printed and drops the rest."""

    def __init__(self, most: int = 4000):
        self.text, self.most = "", most
        # rich draws its live line on this file.
        self.rich_proxied_file = getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    def write(self, text: str) -> int:
        """Keep the text while there is room."""
        if len(self.text) < self.most:
            self.text += text[: self.most - len(self.text)]
        return len(text)

    def fileno(self) -> int:
        """Return the real one's descriptor, for programs started with this as their stdout."""
        return self.rich_proxied_file.fileno()

    def writable(self) -> bool:
        """Always True."""
        return True
