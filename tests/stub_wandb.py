"""A stand-in for W&B's server on 127.0.0.1, as far as wandb-core asks: it keeps the lines of history of each run."""

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Stub(ThreadingHTTPServer):
    """Answers at `url` until it is shut down; `runs` holds for each run the metrics that it was sent, in their order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url, self.lines = f"http://127.0.0.1:{self.server_port}", dict[str, list[str]]()
        Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that wandb-core has closed."""

    @property
    def runs(self) -> dict[str, list[dict[str, Any]]]:
        return {run: list(map(json.loads, lines)) for run, lines in self.lines.items()}


class Answers(BaseHTTPRequestHandler):
    protocol_version, server = "HTTP/1.1", Stub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        told = json.loads(body) if self.command == "POST" else {}
        given = json.dumps(
            streamed(self.server, self.path, told)
            if "files" in self.path
            else asked(self.server, told)
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(given)))
        self.end_headers()
        self.wfile.write(given.encode())

    do_GET = do_PUT = do_POST = answer  # noqa: N815


def streamed(stub: Any, path: str, told: dict[str, Any]) -> dict[str, Any]:
    """Lines of the files of a run, each from a line on."""
    if part := (told.get("files") or {}).get("wandb-history.jsonl"):
        stub.lines[path.split("/")[-2]][part["offset"] :] = part["content"]
    return {"exitcode": None, "limits": {}}


def asked(stub: Any, told: dict[str, Any]) -> dict[str, Any]:
    """What wandb-core asks by GraphQL."""
    query, known = told.get("query", ""), told.get("variables") or {}
    called, name = re.search(r"(?:query|mutation)\s+(\w+)|$", query)[1], known.get("name", "")
    project = {"id": "p", "name": "trivet", "entity": {"id": "e", "name": "me"}}
    run = {
        "id": "x",
        "name": name,
        "config": "{}",
        "project": project,
        "historyLineCount": len(stub.lines.get(name, [])),
    }
    if called == "UpsertBucket":
        stub.lines.setdefault(name, [])
        return {"data": {"upsertBucket": {"bucket": run, "inserted": True}}}
    if called == "RunResumeStatus":
        run |= {
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "tags": [],
        }
        run |= {"historyTail": json.dumps(stub.lines.get(name, [])[-1:]), "wandbConfig": '{"t": 1}'}
        return {"data": {"model": project | {"bucket": run if name in stub.lines else None}}}
    if called == "CreateRunFiles":
        files = [{"name": file, "uploadUrl": stub.url} for file in known["files"]]
        return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
    viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    return {"data": {"viewer": viewer, "serverInfo": {"features": []}, "entity": None}}
