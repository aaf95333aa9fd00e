"""A client for one vLLM server: requests completions, loads weights, and probes that the server has
them.

Token ids go in and come out, with the log-probability of each as sampled. An incomplete answer, or
one from other weights than requested, is a NoAnswerError; what the server refuses is a
RefusedError.
"""

import asyncio
import math
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from trivet.generation.local import LocalServer
from trivet.generation.sync import Weights, digest
from trivet.http import NoAnswerError, RefusedError, call_server

LARGEST = 256 << 20  # limit on the bytes of an answer
SHORT = 10.0  # seconds for answers that need no model
AT_ONCE = 64  # groups in flight per server
# The probe compares this many most likely tokens after each prompt, down to this log-probability.
TOP, FLOOR = 20, -20.0

Completion = tuple[list[int], list[float]]  # token ids, the log-probability of each as sampled


class ProbeError(Exception):
    """A server claims to have the weights but returns different log-probabilities."""


@dataclass(eq=False)
class Server:
    """One vLLM server and its state."""

    url: str
    stops: Sequence[int]
    cut: dict[str, Any]  # temperature, top_k, top_p
    timeout: float  # seconds per group
    tolerance: float  # of the probe, in nats: on the largest difference if exact, else on the mean
    exact: bool
    local: LocalServer | None = None
    base: str = ""  # the model a local server starts with, if adapters are loaded on top
    has: set[str] = field(default_factory=set[str])  # names of the weights it is trusted with
    requests: set[Any] = field(default_factory=set[Any])  # requests in flight
    busy: int = 0
    strikes: int = 0
    starts: int = 0  # starts of a local server since it last passed the probe
    trouble: str = "not reached yet"
    hopeless: bool = False  # the trouble is permanent
    difference: float = 0.0  # largest difference in the last probe, in nats
    client: httpx.AsyncClient | None = None

    async def call(
        self, how: str, what: str, body: Any = None, timeout: float = 0.0, plain: bool = False
    ) -> Any:
        """Call the server with http.call_server."""
        if self.client is None:
            key = os.environ.get("VLLM_API_KEY", "")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
            self.client = httpx.AsyncClient(
                headers=headers, timeout=None, limits=limits, trust_env=False
            )
        limit = timeout or self.timeout
        options = {"timeout": limit, "largest": LARGEST, "plain": plain}
        return await call_server(self.client, how, self.url, what, body, **options)

    async def sample(
        self, weights: Weights, prompt: Sequence[int], n: int, seed: int, limit: int
    ) -> list[Completion]:
        """Sample n completions of one prompt with these weights. Errors: NoAnswerError for an
        answer that is incomplete or from other weights.
        """
        choices = await self._choices(weights, prompt, n, seed, limit)
        return [(tokens, [x["logprob"] for x in content]) for tokens, content in choices]

    async def _choices(
        self, weights: Weights, prompt: Sequence[int], n: int, seed: int, limit: int, top: int = 0
    ) -> list[tuple[list[int], list[dict[str, Any]]]]:
        """Return token ids and vLLM's log-probability entry of each token, which includes the `top`
        most likely tokens.
        """
        name = secrets.token_hex(8)
        settings = {
            "n": n,
            "seed": seed,
            "max_tokens": limit,
            "logprobs": top,
            "detokenize": False,
        } | self.cut
        settings |= {
            "stop_token_ids": list(self.stops),
            "ignore_eos": True,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        body = {
            "request_id": name,
            "token_ids": list(prompt),
            "cache_salt": weights.name,
            "sampling_params": settings,
        }
        if weights.adapter:
            body["model"] = weights.name
        try:
            answer = await self.call("POST", "inference/v1/generate", body)
        except RefusedError as error:
            if error.code == 404 and weights.adapter:
                raise NoAnswerError(f"{self.url} has lost the adapter {weights.name}") from None
            raise
        try:
            if not str(answer["request_id"]).endswith(name):
                raise NoAnswerError(f"{self.url} answered a different request")
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(n)):
                raise NoAnswerError(
                    f"{self.url} returned {len(choices)} completions; expected each of {n} once"
                )
            return [self._read(choice, weights, limit) for choice in choices]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise NoAnswerError(
                f"{self.url} does not answer like vLLM's /inference/v1/generate"
            ) from None

    def _read(
        self, choice: Any, weights: Weights, limit: int
    ) -> tuple[list[int], list[dict[str, Any]]]:
        tokens, content = (
            [int(token) for token in choice["token_ids"]],
            choice["logprobs"]["content"],
        )
        logprobs = [float(x["logprob"]) for x in content]
        made_by = {span["version"] for span in choice.get("weight_versions") or ()}
        if not weights.adapter and made_by != {weights.name}:
            raise NoAnswerError(
                f"{self.url} answered with weights {'/'.join(map(str, made_by))}, not "
                f"{weights.name}"
            )
        ended = bool(tokens) and tokens[-1] in self.stops
        whole = ended or len(tokens) == limit
        if (
            choice["finish_reason"] not in ("stop", "length")
            or not whole
            or [x["token_id"] for x in content] != tokens
        ):
            raise NoAnswerError(f"{self.url} returned an incomplete completion")
        if not all(map(math.isfinite, logprobs)):
            raise NoAnswerError(f"{self.url} returned log-probabilities that are NaN or infinite")
        return tokens, content

    async def sync(self, weights: Weights, probes: Sequence[Sequence[int]]) -> None:
        """Load these weights onto the server if it lacks them, and trust it with them if it passes
        the probe.
        """
        if not weights.adapter:
            self.has.clear()  # full weights replace each other
        if self.local is not None and self.starts > 1 and not self.local.alive():
            problem = self.local.first_error()
            raise RefusedError(
                0, f"the server started by --vllm keeps exiting: {problem}; see {self.local.log}"
            )
        await self._ensure_running(weights)
        loaded = await self._has_weights(weights)
        if not loaded:
            await self._load(weights)
        try:
            await self._probe(weights, probes)
        except ProbeError:
            if not loaded:
                raise
            await self._load(weights)
            await self._probe(weights, probes)
        self.has.add(weights.name)
        self.strikes, self.starts, self.hopeless, self.trouble = 0, 0, False, ""

    async def _ensure_running(self, weights: Weights) -> None:
        """Check that the server answers; start a local one that is not running."""
        if self.local is None or self.local.alive():
            await self.call("GET", "health", timeout=SHORT)
            return
        self.local.start(self.base or str(weights.folder))
        self.starts += 1
        began = time.monotonic()
        while True:
            await asyncio.sleep(0.2)
            if not self.local.alive():
                problem = self.local.first_error()
                raise RefusedError(
                    0,
                    f"the server started by --vllm exited at once: {problem}; see {self.local.log}",
                )
            if time.monotonic() - began > self.timeout:
                raise NoAnswerError(
                    f"{self.url} is not up after {self.timeout:g} seconds; see {self.local.log}"
                )
            with suppress(NoAnswerError):
                await self.call("GET", "health", timeout=SHORT)
                return

    async def _has_weights(self, weights: Weights) -> bool:
        """Return whether the server reports that it has these weights."""
        if weights.adapter:
            models = await self.call("GET", "v1/models", timeout=SHORT)
            return any(model.get("id") == weights.name for model in models["data"])
        return (await self.call("GET", "weight_info", timeout=SHORT))[
            "weight_version"
        ] == weights.name

    async def _load(self, weights: Weights) -> None:
        if digest(weights.folder) != weights.checksum:
            raise RefusedError(
                0, f"the files in {weights.folder} have changed since they were written"
            )
        path = str(weights.folder)
        if weights.adapter:
            with suppress(RefusedError, NoAnswerError):
                await self.forget(weights.name)
            await self.call(
                "POST",
                "v1/load_lora_adapter",
                {"lora_name": weights.name, "lora_path": path},
                plain=True,
            )
            return
        await self.call("POST", "pause?mode=abort")  # also clears the prefix cache
        await self.call(
            "POST", "collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}
        )
        await self.call(
            "POST", "update_weight_version", {"new_version": weights.name}, timeout=SHORT
        )
        await self.call("POST", "resume", timeout=SHORT)

    async def forget(self, name: str) -> None:
        """Unload an adapter."""
        self.has.discard(name)
        await self.call(
            "POST", "v1/unload_lora_adapter", {"lora_name": name}, timeout=SHORT, plain=True
        )

    async def _probe(self, weights: Weights, probes: Sequence[Sequence[int]]) -> None:
        top = min(TOP, weights.expected.shape[1])
        requests = [
            self._choices(weights, prompt, 1, seed, 1, top) for seed, prompt in enumerate(probes)
        ]
        differences = list[float]()
        for expected, choices in zip(
            weights.expected, await asyncio.gather(*requests), strict=True
        ):
            sampled = choices[0][1][0]
            likely = [
                sampled,
                *(x for x in sampled["top_logprobs"] if expected[x["token_id"]] > FLOOR),
            ]
            differences += [abs(float(expected[x["token_id"]]) - x["logprob"]) for x in likely]
        self.difference, average = max(differences), sum(differences) / len(differences)
        if not (self.difference if self.exact else average) <= self.tolerance:
            raise ProbeError(
                f"{self.url} accepted version {weights.version} of the weights, but its "
                "log-probabilities are not the learner's; they differ by up to "
                f"{self.difference:.2g} nats, {average:.2g} on average"
            )
