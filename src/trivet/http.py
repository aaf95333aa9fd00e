"""Calls to servers: an event loop to make them in, one call with its limits, the pause before the next attempt."""

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
BLOCKED = 0.5  # seconds after which a loop that does not come back is given up
_draw = random.Random()  # apart from the generators that a run's results depend on


class NoAnswerError(Exception):
    """A call that came to nothing, said in a sentence, and may go better another time; wait: seconds that the server asks for."""

    def __init__(self, told: str, *, wait: float | None = None):
        super().__init__(told)
        self.wait = wait


class RefusedError(Exception):
    """A call that the server understood and refused: HTTP code, and what it said."""

    def __init__(self, code: int, said: str):
        super().__init__(f"HTTP {code}: {said}")
        self.code, self.said = code, said


async def answered(
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
    """The JSON that the server at this url answers with on /what; None where it says nothing.

    timeout: seconds until the answer must be complete. largest: bytes of an answer. plain: it is text, not JSON. Errors: NoAnswerError for what may go better
    another time (no connection, too slow, 408, 409, 429, 5xx, too much, not JSON), RefusedError for any other code.
    """
    try:
        async with asyncio.timeout(timeout):
            async with client.stream(how, f"{url}/{what}", json=body) as response:
                text = bytearray()
                async for part in response.aiter_bytes():
                    text += part
                    if len(text) > largest:
                        raise NoAnswerError(f"{url} answers with more than {largest >> 20} MiB")
    except (TimeoutError, httpx.TimeoutException):
        raise NoAnswerError(f"{url} gives no answer within {timeout:g} seconds") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):
        raise
    except httpx.HTTPError as error:
        raise NoAnswerError(f"{url} can't be reached or breaks off: {error or type(error).__name__}") from None
    code = response.status_code
    if code in (408, 409, 429) or code >= 500:
        raise NoAnswerError(f"{url} answers with HTTP {code}", wait=_wait(response.headers.get("retry-after")))
    if code != 200:
        raise RefusedError(code, text[:300].decode(errors="replace") or "nothing more")
    try:
        return text.decode(errors="replace") if plain else json.loads(text) if text else None
    except (ValueError, RecursionError):
        raise NoAnswerError(f"{url} answers with something that is not JSON") from None


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
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(BLOCKED)
        except TimeoutError:  # blocked for good by code that never awaits: leave that loop to it
            _loops.remove(loop)
        raise
    if error is not None:
        raise error
    return result


def pause(attempt: int, longest: float = 60.0) -> float:
    """Seconds to wait after this many failed attempts: about 1, 2, 4, ... up to `longest`, spread by half so that many
    who failed together do not come back together."""
    return min(2.0 ** (attempt - 1), longest) * _draw.uniform(0.5, 1.0)


def _wait(header: str | None) -> float | None:
    """Seconds of a Retry-After, which is a number or a date."""
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
