"""Around code that somebody else wrote: a time limit, a loop for what is async, an ear for what it prints."""

import asyncio
import io
import random
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN = 1.0  # seconds after which an alarm that was swallowed rings again
_draw = random.Random()  # apart from the generators that a run's results depend on


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


_loops: list[asyncio.AbstractEventLoop] = []  # the one loop, once there is one


def settled(awaitable: Awaitable[T]) -> T:
    """What an awaitable comes to, in an event loop of our own that lives as long as the process.

    One loop, so that a client which async code keeps from call to call stays usable; in a thread, so that it works where a
    loop runs already, as in a notebook. Whatever ends the wait, OutOfTime or Ctrl-C, cancels the task.
    """
    if not _loops:
        _loops.append(asyncio.new_event_loop())
        threading.Thread(target=_loops[0].run_forever, daemon=True).start()
    loop = _loops[0]

    async def wait() -> tuple[Any, BaseException | None]:
        try:
            return await awaitable, None
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # SystemExit too, which would end the loop
            return None, error

    future = asyncio.run_coroutine_threadsafe(wait(), loop)
    try:
        result, error = future.result()
    except BaseException:
        future.cancel()
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(AGAIN / 2)
        except TimeoutError:  # blocked for good by code that never awaits: leave that loop to it
            _loops.remove(loop)
        raise
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


def pause(attempt: int, longest: float = 60.0) -> float:
    """Seconds to wait after this many failed attempts: about 1, 2, 4, ... up to `longest`, spread by half so that many
    who failed together do not come back together."""
    return min(2.0 ** (attempt - 1), longest) * _draw.uniform(0.5, 1.0)
