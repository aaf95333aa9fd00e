"""Calls to servers: an event loop to run them in, a single call with limits, and the pause before a
retry.
"""

import asyncio
import email.utils
import json
import math
import random
import threading
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
BLOCKED_AFTER = 0.5  # seconds after which a loop that does not respond is abandoned
_draw = random.Random()  # separate from the generators that a run's results depend on


class NoAnswerError(Exception):
    """A call that failed but is worth retrying. wait: seconds the server asked to wait first."""

    def __init__(self, message: str, *, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class RefusedError(Exception):
    """A call that the server understood and refused. code: the HTTP status; reply: the body."""

    def __init__(self, code: int, reply: str):
        super().__init__(f"HTTP {code}: {reply}")
        self.code, self.reply = code, reply


async def call_server(
    client: httpx.AsyncClient,
    how: str,
    url: str,
    what: str,
    body: Any = None,
    *,
    timeout: float,
    largest: int,
    plain: bool = False,
) -> Any:
    """Call url/what with this HTTP method (`how`) and return the JSON it answers with, None if the
    answer is empty.

    timeout: seconds until the answer must be complete. largest: limit on the size of the answer,
    in bytes. plain: the answer is text, not JSON. Errors: NoAnswerError for what is worth retrying
    (no connection, too slow, 408, 409, 429, 5xx, too large, not JSON), RefusedError for any other
    code.
    """
    try:
        async with asyncio.timeout(timeout):
            async with client.stream(how, f"{url}/{what}", json=body) as response:
                text = bytearray()
                async for part in response.aiter_bytes():
                    text += part
                    if len(text) > largest:
                        raise NoAnswerError(f"{url} answered with more than {largest >> 20} MiB")
    except (TimeoutError, httpx.TimeoutException):
        raise NoAnswerError(f"{url} did not answer within {timeout:g} seconds") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise
    except httpx.HTTPError as error:
        raise NoAnswerError(
            f"{url} can't be reached or broke off: {error or type(error).__name__}"
        ) from None
    code = response.status_code
    if code in (408, 409, 429) or code >= 500:
        raise NoAnswerError(
            f"{url} answered with HTTP {code}", wait=_wait(response.headers.get("retry-after"))
        )
    if code != 200:
        raise RefusedError(code, text[:300].decode(errors="replace") or "(empty reply)")
    try:
        return text.decode(errors="replace") if plain else json.loads(text) if text else None
    except (ValueError, RecursionError):
        raise NoAnswerError(f"{url} answered with something that is not JSON") from None


_loops: list[asyncio.AbstractEventLoop] = []  # holds the one loop, once it was started


def run_async(awaitable: Awaitable[T]) -> T:
    """Run an awaitable in our own event loop, which lives as long as the process, and return its
    result.

    A single loop lets async code keep a client from call to call; a thread lets it work where a
    loop is already running, as in a notebook. Whatever ends the wait (OutOfTime, Ctrl-C) cancels
    the task.
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
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(BLOCKED_AFTER)
        except TimeoutError:  # blocked forever by code that never awaits: abandon this loop
            _loops.remove(loop)
        raise
    if error is not None:
        raise error
    return result


def pause(attempt: int, longest: float = 60.0) -> float:
    """Seconds to wait after this many failed attempts: about 1, 2, 4, ... up to `longest`, with
    jitter so that calls that failed together are not retried together.
    """
    return min(2.0 ** (attempt - 1), longest) * _draw.uniform(0.5, 1.0)


def _wait(header: str | None) -> float | None:
    """The seconds to wait from a Retry-After header, which is a number or a date."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
