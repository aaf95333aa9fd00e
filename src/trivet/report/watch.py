"""trivet watch: serve the page of trivet report, live while runs are going. It only reads their
directories.
"""

import asyncio
import hashlib
import os
import socket
import sys
import time
import webbrowser
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from trivet.arguments import runs_and_options
from trivet.errors import InputError
from trivet.report.compare import runs_in
from trivet.report.gather import gather
from trivet.report.page import as_json, build_page
from trivet.store.reading import lives, read_object, require_run

HOSTS = ("127.0.0.1", "localhost", "[::1]")
FILES = ("config.toml", "run.json", "metrics.jsonl", "samples.jsonl", "summary.json", "judged.json")
WAIT = 60.0  # seconds to wait for a run directory that does not exist yet
EVERY = 2.0  # seconds between a page's requests for new data
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Serve the page of trivet report, live while runs are going, to browsers on this machine. RUN
    is a run directory or a folder of them.
    """

    port: int = 0
    """Port to listen on; 0 picks a free one."""
    open: bool = False
    """Open the page in a browser."""


def watch(args: list[str]) -> None:
    """trivet watch RUN [RUN ...]: serve the page until Ctrl-C."""
    paths, config = runs_and_options(Config, args, "trivet watch")
    if not 0 <= config.port < 2**16:
        raise InputError(f"--port is {config.port}; it must be from 0 to 65535")
    wait_for(paths)
    try:
        listening = socket.create_server(("127.0.0.1", config.port))
    except OSError as error:  # taken, or not allowed
        raise InputError(
            f"--port {config.port}: {error.strerror}; leave out --port to use a free one"
        ) from None
    os.nice(10)  # runs on this machine go first
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    print(
        f"{', '.join(map(str, paths))}: {address}  (Ctrl-C stops the viewer, not the run)",
        flush=True,
    )
    if config.open:
        webbrowser.open(address)
    settings = uvicorn.Config(
        application(paths),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(settings).run(sockets=[listening])


def wait_for(paths: list[Path]) -> None:
    """Return once all of these are run directories. A missing one may belong to a run that is still
    loading its model, so it is given a minute.

    Errors: InputError if any is still missing then, or at once if it exists but is not a run
    directory.
    """
    until = time.monotonic()
    if missing := [str(path) for path in paths if not path.exists()]:
        print(
            f"trivet watch: waiting up to {WAIT:.0f} s for {', '.join(missing)} to start",
            file=sys.stderr,
            flush=True,
        )
        until += WAIT
    while True:
        try:
            for run in (run for path in paths for run in runs_in(path)):
                require_run(run)
            return
        except InputError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.2)


def application(paths: list[Path]) -> ASGIApp:
    """An app that serves the page at / and its data at /data.json, and nothing else: it serves no
    files, so no path can reach one.

    Gathered data is kept until a file of the runs changes, so that several viewers cost as much as
    one, and for at least ten times as long as gathering took, so that watching does not slow down
    a long run. The ETag is a hash of what the page shows.
    """
    seen: tuple[Any, ...] | None = None
    shown: tuple[dict[str, Any], str, str] = {}, "", ""  # the payload, as JSON, its ETag
    rest = 0.0
    one_at_a_time = asyncio.Lock()

    def latest() -> tuple[dict[str, Any], str, str]:
        nonlocal seen, shown, rest
        runs = [run for path in paths for run in runs_in(path)]
        now, began = stamp(runs), time.monotonic()
        if now != seen and began > rest:
            payload = gather(runs)
            tag = hashlib.sha256(as_json(payload | {"made": None}).encode()).hexdigest()
            seen, shown = now, (payload, as_json(payload), f'"{tag}"')
            rest = time.monotonic() + 10 * (time.monotonic() - began) - EVERY
        return shown

    async def answer(request: Request) -> Response:
        host = request.headers.get("host", "").lower()
        if host.rpartition(":")[0] not in HOSTS and host not in HOSTS:
            message = f"Forbidden: this server only answers requests to {HOSTS[0]}.\n"
            return PlainTextResponse(message, 403)
        if request.url.path not in ("/", "/data.json"):
            return PlainTextResponse("Not found. Available: /, /data.json\n", 404)
        if request.method not in ("GET", "HEAD"):
            message = "Method not allowed: this server only answers GET and HEAD.\n"
            return PlainTextResponse(message, 405, {"Allow": "GET, HEAD"})
        try:
            async with one_at_a_time:
                payload, data, tag = await run_in_threadpool(latest)
        except (InputError, OSError) as error:  # perhaps the directory is gone; it may come back
            return PlainTextResponse(f"{error}\n", 503)
        if request.url.path == "/":
            return Response(
                await run_in_threadpool(partial(build_page, payload, live=True)),
                media_type="text/html",
            )
        if request.headers.get("if-none-match") == tag:
            return Response(None, 304, {"ETag": tag})
        return Response(data, 200, {"ETag": tag}, "application/json")

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        response = await answer(Request(scope))
        response.headers.update(HEADERS)
        await response(scope, receive, send)

    return application


def stamp(runs: list[Path]) -> tuple[Any, ...]:
    """A value that changes whenever the payload may have: from the sizes and times of the runs'
    files and whether their processes are alive. For unfinished runs it also changes every ten
    seconds, since a run that has been quiet for too long counts as stopped.
    """
    seen: list[Any] = []
    for run in runs:
        for path in (run / name for name in FILES):
            with suppress(OSError):
                seen.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
        if not (run / "summary.json").exists():
            seen.append((lives(read_object(run / "run.json").get("pid")), int(time.time() / 10)))
    return tuple(seen)
