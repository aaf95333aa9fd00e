"""A server that speaks as much of vLLM 0.32's protocol as Trivet uses, samples with our own engine, and misbehaves when asked to.

In a thread: Stub(folder). As a process, with vLLM's flags: python -m stub_vllm --model DIR --port N ... [--latency SECONDS];
there, POST /fault {"kind": ...} does what stub.fault(...) does.
"""

import argparse
import contextlib
import json
import os
import secrets
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trivet.batch import Example
from trivet.generation.engine import Engine

FAULTS = ("500", "hang", "truncated", "not json", "wrong version", "duplicate", "partial group", "cut short",
          "other request", "abort", "nan", "die")  # fmt: skip


LOADING = (
    threading.Lock()
)  # two loads at once leave transformers in a state where it ties no weights any more


class Listener(ThreadingHTTPServer):
    """Takes as many connections at once as a step has prompts."""

    request_queue_size = 512


class Stub:
    """One server. `faults` are taken one a request for completions, the probe's not counted; `asked` is what it was asked for."""

    def __init__(
        self,
        model: str,
        port: int = 0,
        latency: float = 0.0,
        process: bool = False,
        seeded: bool = False,
    ):
        self.folder, self.latency, self.process = str(model), latency, process
        self.seeded = seeded  # a group depends on weights, prompt and the request's seed alone
        self.faults: deque[str] = deque()
        self.asked: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.reload = "whole"  # or "half", "none"
        self.held = threading.Event()  # what hangs waits for it
        self.adapters: dict[str, Any] = {}  # a model each
        self.jobs: list[tuple[tuple[Any, ...], Example, list[Any], threading.Event]] = []
        self.ready, self.lock, self.closed = threading.Event(), threading.Lock(), False
        self.dead = False
        self.restart()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stub.route(self, {})

            def do_POST(self) -> None:
                stub.route(
                    self,
                    json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}"),
                )

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = Listener(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *args: None  # type: ignore[method-assign]  clients go away
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.work, daemon=True).start()
        if not process:
            threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def restart(self) -> None:
        """As a process that comes back does: the weights of its folder, no adapters, no memory of versions."""
        with self.lock:
            self.model = self.fresh()
            self.version, self.adapters, self.paused = "default", {}, False

    def fresh(self) -> Any:
        with LOADING:
            return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def fault(self, *kinds: str) -> None:
        """Misbehave so at the coming requests, one after the other; '' is a good one."""
        self.faults.extend(kinds)

    def close(self) -> None:
        """Gone."""
        self.closed = True
        self.held.set()
        self.ready.set()
        self.http.shutdown()
        self.http.server_close()

    def route(self, handler: Any, body: dict[str, Any]) -> None:
        path = handler.path.split("?")[0]
        if self.dead:
            handler.close_connection = True
            return None
        if path == "/inference/v1/generate":
            return self.generate(handler, body)
        if path == "/fault":
            self.fault(body["kind"])
        elif path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return self.say(handler, {"error": {"message": "already loaded"}}, 400)
            with self.lock:
                self.adapters[body["lora_name"]] = base = self.fresh()
                if self.reload != "none":
                    PeftModel.from_pretrained(
                        base, body["lora_path"]
                    )  # puts its layers into the base
            return self.say(
                handler,
                f"Success: LoRA adapter '{body['lora_name']}' added successfully.",
                plain=True,
            )
        elif path == "/v1/unload_lora_adapter":
            with self.lock:
                if body["lora_name"] not in self.adapters:
                    return self.say(handler, {"error": {"message": "cannot be found"}}, 404)
                del self.adapters[body["lora_name"]]
            return self.say(handler, "Success: removed", plain=True)
        elif path == "/v1/models":
            return self.say(handler, {"data": [{"id": name} for name in ("base", *self.adapters)]})
        elif path == "/collective_rpc":
            assert (body["method"], self.paused) == ("reload_weights", True)
            with self.lock:
                self.load(body["kwargs"]["weights_path"])
            return self.say(handler, {"results": [None]})
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/weight_info":
            return self.say(handler, {"weight_version": self.version})
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path != "/health":
            return self.say(handler, {"error": "no such route"}, 404)
        self.say(handler, {})

    def load(self, folder: str) -> None:
        """What reload_weights does; a half reload keeps the old output embedding, as vLLM's CPU build does."""
        tensors: dict[str, torch.Tensor] = {}
        for name in os.listdir(folder):
            if name.endswith(".safetensors"):
                tensors |= load_file(os.path.join(folder, name))
        own = self.model.state_dict()
        if self.reload == "half":
            tensors = {
                name: x for name, x in tensors.items() if "embed" not in name and "head" not in name
            }
        with torch.no_grad():
            for name, x in tensors.items() if self.reload != "none" else ():
                own[name].copy_(x)

    def generate(self, handler: Any, body: dict[str, Any]) -> None:
        given, probe = body["sampling_params"], body["sampling_params"]["max_tokens"] == 1
        fault = self.faults.popleft() if self.faults and not probe else ""
        self.asked.append(body)
        if "model" in body and body["model"] not in self.adapters:
            return self.say(handler, {"error": {"message": "no such model"}}, 404)
        if fault == "die":
            if self.process:
                os._exit(9)
            self.dead = True
            self.http.server_close()
            handler.close_connection = True
            return None
        if fault == "hang":
            self.held.wait()
            return None
        if fault == "500":
            return self.say(handler, {"error": "out of order"}, 500)
        example = Example(prompt=body["token_ids"], completions=[], learned=[], row={})
        result, done = list[Any](), threading.Event()
        key = (
            body.get("model"),
            given["n"],
            given["max_tokens"],
            given["temperature"],
            tuple(given["stop_token_ids"]),
        )
        key += (given["seed"] if self.seeded else None,)
        with self.lock:
            version = self.version
            self.jobs.append((key, example, result, done))
        self.ready.set()
        done.wait()
        if not probe and self.latency:
            time.sleep(self.latency)
        if probe:
            with self.lock, torch.no_grad():
                served = self.adapters[body["model"]] if "model" in body else self.model
                logits = (
                    served(torch.tensor([body["token_ids"]])).logits[0, -1] / given["temperature"]
                )
                top = logits.log_softmax(-1).topk(given["logprobs"])
                likely = [
                    {"token_id": t, "logprob": x}
                    for t, x in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ]
        choices = []
        for i, (tokens, logprobs) in enumerate(result):
            ended = tokens[-1] in given["stop_token_ids"]
            spans = [{"version": version, "start": 0, "end": len(tokens)}]
            content = [
                {"token_id": t, "logprob": x, "rank": None}
                for t, x in zip(tokens, logprobs, strict=True)
            ]
            if probe:
                content[0]["top_logprobs"] = likely
            choices.append({"index": i, "token_ids": tokens, "logprobs": {"content": content}, "stop_reason": None,
                            "finish_reason": "stop" if ended else "length", "weight_versions": spans})  # fmt: skip
        answer = {"request_id": f"generate-tokens-{body['request_id']}", "choices": choices}
        if fault == "wrong version":
            for choice in choices:
                choice["weight_versions"] = [{"version": "default", "start": 0, "end": 1}]
        elif fault == "duplicate":
            choices[-1] = dict(choices[0])
        elif fault == "partial group":
            choices.pop()
        elif fault == "cut short":
            for choice in choices:
                choice["token_ids"] = choice["token_ids"][:-1]
        elif fault == "other request":
            answer["request_id"] = "generate-tokens-" + secrets.token_hex(8)
        elif fault == "abort":
            choices[0]["finish_reason"] = "abort"
        elif fault == "nan":
            choices[0]["logprobs"]["content"][0]["logprob"] = float("nan")
        if not probe:
            self.answered.append(answer)
        self.say(handler, answer, fault=fault)

    def work(self) -> None:
        """All that wait for the same weights and settings are written together."""
        while not self.closed:
            self.ready.wait()
            time.sleep(0.003)
            with self.lock:
                self.ready.clear()
                jobs, self.jobs = self.jobs, []
                while jobs:
                    key = jobs[0][0]
                    alike, jobs = [x for x in jobs if x[0] == key], [x for x in jobs if x[0] != key]
                    model, n, limit, temperature, stops, seed = key
                    random = GENERATOR if seed is None else torch.Generator().manual_seed(seed)
                    served = self.adapters.get(model) if model else self.model
                    if (
                        served is None
                    ):  # unloaded since it was asked for: an answer without completions
                        for *_, done in alike:
                            done.set()
                        continue
                    engine = Engine(lambda prompt, ids: "", stops, limit, temperature, random)
                    rollouts = engine.generate(served, [x[1] for x in alike], n)
                    groups = rollouts.groups
                    for p, (_, _, result, done) in enumerate(alike):
                        for b in range(p * n, p * n + n):
                            own = groups.present[b]
                            result.append(
                                (
                                    groups.completions[b][own].tolist(),
                                    rollouts.logprobs[b][own].tolist(),
                                )
                            )
                        done.set()

    def say(
        self, handler: Any, body: Any, code: int = 200, fault: str = "", plain: bool = False
    ) -> None:
        data = body.encode() if plain else json.dumps(body).encode()
        data = b"<html>" if fault == "not json" else data
        with contextlib.suppress(OSError):
            handler.send_response(code)
            handler.send_header("content-length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2] if fault == "truncated" else data)
            if fault == "truncated":
                handler.connection.close()
                handler.close_connection = True


GENERATOR = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--seeded", action="store_true")
    known, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    Stub(
        known.model, known.port, known.latency, process=True, seeded=known.seeded
    ).http.serve_forever()
