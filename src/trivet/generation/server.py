"""vLLM servers behind the engine's own interface: token ids in, token ids and their sampled log-probabilities out.

A server is trusted with a version of the weights once it has passed the probe on it (sync.py), and until a call to it fails; then its
work goes to another, and it is brought to the weights and probed again. Everything that is waited for has a time limit.
"""

import asyncio
import math
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trivet.batch import Example, Groups, Rollouts, collate
from trivet.calls import NoAnswerError, RefusedError, answered, pause
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.generation.local import Local
from trivet.generation.nccl import Link
from trivet.generation.sync import Weights, digest, fingerprint, next_tokens, publish

LARGEST = 256 << 20  # bytes of an answer
SHORT, BEAT = 10.0, 5.0  # seconds: for answers that need no model; between looks at a server that is at work
MINUTE = 60.0  # between signs of life to whoever waits with us
AT_ONCE, TRIES = 64, 10  # groups under way at a server; how often a group is tried
TOP, FLOOR = 20, -20.0  # most likely tokens after each probe that are compared, down to so many nats

Completion = tuple[list[int], list[float]]  # token ids, the log-probability of each as sampled


class NoServerError(InputError):
    """No server is left to generate with; the weights are as they were after the last step."""


class ProbeError(Exception):
    """A server that says it has the weights, and answers with other numbers."""


@dataclass(eq=False)
class Server:
    """One vLLM server, and what is known of it."""

    url: str
    stops: Sequence[int]
    cut: dict[str, Any]  # temperature, top_k, top_p
    timeout: float  # seconds for a group
    tolerance: float  # of the probe, nats; the largest difference where exact, else their mean
    exact: bool
    local: Local | None = None
    base: str = ""  # what a local server starts from, where adapters are loaded on top
    has: set[str] = field(default_factory=set[str])  # names of weights that it is trusted with
    asked: set[Any] = field(default_factory=set[Any])  # requests under way
    busy: int = 0
    strikes: int = 0
    starts: int = 0  # of a local one, since it was last well
    trouble: str = "it has not been reached yet"
    hopeless: bool = False  # the trouble is not of the kind that passes
    difference: float = 0.0  # largest one of the last probe, nats
    client: httpx.AsyncClient | None = None
    link: Link | None = None  # of NCCL

    async def call(self, how: str, what: str, body: Any = None, timeout: float = 0.0, plain: bool = False) -> Any:
        """One call to it, as calls.answered makes them."""
        if self.client is None:
            key = os.environ.get("VLLM_API_KEY", "")
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
            self.client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=False)
        limit = timeout or self.timeout
        told = {"timeout": limit, "largest": LARGEST, "plain": plain}
        return await answered(self.client, how, self.url, what, body, **told)

    async def sample(self, weights: Weights, prompt: Sequence[int], n: int, seed: int, limit: int) -> list[Completion]:
        """n completions of one prompt by these weights. Errors: NoAnswerError for any answer that is not whole or not theirs."""
        choices = await self._choices(weights, prompt, n, seed, limit)
        return [(tokens, [x["logprob"] for x in content]) for tokens, content in choices]

    async def _choices(
        self, weights: Weights, prompt: Sequence[int], n: int, seed: int, limit: int, top: int = 0
    ) -> list[tuple[list[int], list[dict[str, Any]]]]:
        """Token ids, and of each token the log-probability, as vLLM says it: with those of the `top` most likely ones."""
        name = secrets.token_hex(8)
        settings = {"n": n, "seed": seed, "max_tokens": limit, "logprobs": top, "detokenize": False} | self.cut
        settings |= {"stop_token_ids": list(self.stops), "ignore_eos": True, "min_p": 0.0, "repetition_penalty": 1.0}
        body = {"request_id": name, "token_ids": list(prompt), "cache_salt": weights.name, "sampling_params": settings}
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
                raise NoAnswerError(f"{self.url} answers to another request than it was asked")
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(n)):
                raise NoAnswerError(f"{self.url} answers with {len(choices)} completions, not each of {n} once")
            return [self._read(choice, weights, limit) for choice in choices]
        except (LookupError, TypeError, AttributeError, ValueError):
            raise NoAnswerError(f"{self.url} answers in another form than vLLM's /inference/v1/generate") from None

    def _read(self, choice: Any, weights: Weights, limit: int) -> tuple[list[int], list[dict[str, Any]]]:
        tokens, content = [int(token) for token in choice["token_ids"]], choice["logprobs"]["content"]
        logprobs = [float(x["logprob"]) for x in content]
        made_by = {span["version"] for span in choice.get("weight_versions") or ()}
        if not weights.adapter and made_by != {weights.name}:
            raise NoAnswerError(f"{self.url} answers with weights {'/'.join(map(str, made_by))}, not {weights.name}")
        ended = bool(tokens) and tokens[-1] in self.stops
        whole = ended or len(tokens) == limit
        if choice["finish_reason"] not in ("stop", "length") or not whole or [x["token_id"] for x in content] != tokens:
            raise NoAnswerError(f"{self.url} answers with a completion that is not whole")
        if not all(map(math.isfinite, logprobs)):
            raise NoAnswerError(f"{self.url} answers with log-probabilities that are not numbers")
        return tokens, content

    async def bring(self, weights: Weights, probes: Sequence[Sequence[int]]) -> None:
        """Give it these weights, where it lacks them, and trust it with them if it passes the probe."""
        if not weights.adapter:
            self.has.clear()  # full weights replace each other
        if self.local is not None and self.starts > 1 and not self.local.alive():
            said = self.local.complaint()
            raise RefusedError(0, f"the server that --vllm starts does not stay: {said}; see {self.local.log}")
        await self._reach(weights)
        there = await self._holds(weights)
        if not there:
            await self._load(weights)
        try:
            await self._probe(weights, probes)
        except ProbeError:
            if not there:
                raise
            await self._load(weights)
            await self._probe(weights, probes)
        self.has.add(weights.name)
        self.strikes, self.starts, self.hopeless, self.trouble = 0, 0, False, ""

    async def _reach(self, weights: Weights) -> None:
        """It answers; a local one that does not run is started."""
        if self.local is None or self.local.alive():
            await self.call("GET", "health", timeout=SHORT)
            return
        self.local.start(self.base or str(weights.folder))
        self.starts += 1
        began = time.monotonic()
        while True:
            await asyncio.sleep(0.2)
            if not self.local.alive():
                said = self.local.complaint()
                raise RefusedError(0, f"the server that --vllm starts ends at once: {said}; see {self.local.log}")
            if time.monotonic() - began > self.timeout:
                raise NoAnswerError(f"{self.url} is not up after {self.timeout:g} seconds; see {self.local.log}")
            with suppress(NoAnswerError):
                await self.call("GET", "health", timeout=SHORT)
                return

    async def _holds(self, weights: Weights) -> bool:
        """Whether it says that it has them."""
        if weights.adapter:
            models = await self.call("GET", "v1/models", timeout=SHORT)
            return any(model.get("id") == weights.name for model in models["data"])
        return (await self.call("GET", "weight_info", timeout=SHORT))["weight_version"] == weights.name

    async def _load(self, weights: Weights) -> None:
        if weights.tensors:
            await self._send(weights)
            return
        if digest(weights.folder) != weights.checksum:
            raise RefusedError(0, f"the files in {weights.folder} have changed since they were written")
        path = str(weights.folder)
        if weights.adapter:
            with suppress(RefusedError, NoAnswerError):
                await self.forget(weights.name)
            await self.call("POST", "v1/load_lora_adapter", {"lora_name": weights.name, "lora_path": path}, plain=True)
            return
        await self.call("POST", "pause?mode=abort")  # and clear the cache of prefixes
        await self.call("POST", "collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        await self.call("POST", "update_weight_version", {"new_version": weights.name}, timeout=SHORT)
        await self.call("POST", "resume", timeout=SHORT)

    async def _send(self, weights: Weights) -> None:
        """Over NCCL: both sides at once, ours in a thread; a side that fails leaves the other to its time limit."""
        if self.link is None:
            workers = int((await self.call("GET", "get_world_size", timeout=SHORT))["world_size"])
            link = Link(workers, next(iter(weights.tensors.values())).device)
            joined = asyncio.to_thread(link.join)
            await self._both(joined, "init_weight_transfer_engine", {"init_info": link.invitation()})
            self.link = link
        facts = [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in weights.tensors.items()]
        told = dict(zip(("names", "dtype_names", "shapes"), map(list, zip(*facts, strict=True)), strict=True))
        await self.call("POST", "pause?mode=abort")
        await self.call("POST", "start_weight_update")
        sent = asyncio.to_thread(self.link.send, weights.tensors.values())
        await self._both(sent, "update_weights", {"update_info": told})
        await self.call("POST", "finish_weight_update", {"weight_version": weights.name})
        await self.call("POST", "resume", timeout=SHORT)

    async def _both(self, ours: Coroutine[Any, Any, None], what: str, body: Any) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                await asyncio.gather(ours, self.call("POST", what, body))
        except BaseException as error:  # the communicator is of no use any more
            self.link = None
            if isinstance(error, RuntimeError | TimeoutError):
                raise NoAnswerError(f"{self.url}: weights over NCCL: {error or 'not within the time'}") from None
            raise

    async def forget(self, name: str) -> None:
        """Let go of an adapter."""
        self.has.discard(name)
        await self.call("POST", "v1/unload_lora_adapter", {"lora_name": name}, timeout=SHORT, plain=True)

    async def _probe(self, weights: Weights, probes: Sequence[Sequence[int]]) -> None:
        top = min(TOP, weights.expected.shape[1])
        asked = [self._choices(weights, prompt, 1, seed, 1, top) for seed, prompt in enumerate(probes)]
        differences = list[float]()
        for expected, choices in zip(weights.expected, await asyncio.gather(*asked), strict=True):
            said = choices[0][1][0]
            likely = [said, *(x for x in said["top_logprobs"] if expected[x["token_id"]] > FLOOR)]
            differences += [abs(float(expected[x["token_id"]]) - x["logprob"]) for x in likely]
        self.difference, average = max(differences), sum(differences) / len(differences)
        if not (self.difference if self.exact else average) <= self.tolerance:
            raise ProbeError(
                f"{self.url} took version {weights.version} of the weights, but its log-probabilities are not the learner's: "
                f"they differ by up to {self.difference:.2g} nats, {average:.2g} on average"
            )


def in_one_piece(policy: Any, expects: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
    """A policy as it can be written, and what it expects of the tokens after the probes."""
    return policy, expects(policy)


@dataclass(eq=False)
class Ahead:
    """A batch of prompts, and its generation once that is under way."""

    step: int
    prompts: list[Example]
    future: "Future[Rollouts] | None" = None


WRITTEN = ("logprobs", "finished", "texts", "versions")  # of rollouts, beside their groups
Begun = list[tuple[int, "Future[Rollouts]"]]  # the step of a batch, and what it will be


def written(begun: Begun) -> list[dict[str, Any]]:
    """These batches for a checkpoint, once they are written; those that can't be are left out. Rows of data are not in them."""
    found = list[dict[str, Any]]()
    for step, future in begun:
        with suppress(Exception):  # whoever trains on it will hear why
            rollouts = future.result()
            groups = {known.name: getattr(rollouts.groups, known.name) for known in fields(Groups)}
            found.append({"step": step, "groups": groups, **{name: getattr(rollouts, name) for name in WRITTEN}})
    return found


def _read_back(batch: dict[str, Any], prompts: Sequence[Example]) -> Rollouts:
    own = {name: batch[name] for name in WRITTEN}
    return Rollouts(groups=Groups(**batch["groups"]), rows=[prompt.row for prompt in prompts], **own)


@dataclass(eq=False)
class Servers:
    """What an Engine does, done by servers; with `staleness` above 0 they write the coming batches while the learner trains."""

    engine: Engine  # in whose place it stands
    servers: list[Server]
    folder: Path  # where weights are written; servers must be able to read it
    probes: list[list[int]]
    patience: float  # seconds to wait for a server that works
    staleness: int = 0
    untie: bool = False
    nccl: bool = False
    note: Callable[[str], None] = lambda text: None
    whole: Callable[..., tuple[Any, Tensor]] = in_one_piece  # or run.ranks, for a policy in shards
    waits: Callable[[], None] = lambda: None  # called while servers write: others wait with us
    cache_bytes: int = 0  # of this process: none
    # batches of a checkpoint, by step
    kept: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]], init=False)
    counts: dict[str, float] = field(default_factory=dict[str, float], init=False)

    def __post_init__(self) -> None:
        self.run = secrets.token_hex(4)
        self.print: tuple[int, ...] | None = None
        self.weights: Weights | None = None
        self.coming: deque[Ahead] = deque()
        self.now: Ahead | None = None
        self.step, self.at_start = 0, None  # of the loop; the weights' fingerprint before the step moves them
        self.wanted: list[Weights] = []
        self.versions: list[Weights] = []
        self.keepers: list[Any] = []
        self.good_at, self.resent, self.sync_seconds = time.monotonic(), 0, 0.0
        self.changed = asyncio.Condition()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    @property
    def temperature(self) -> float:
        """That of the engine."""
        return self.engine.temperature

    def batches(self, source: Callable[[], Iterator[tuple[int, list[Example]]]]) -> Iterator[tuple[int, list[Example]]]:
        """The same batches, looked at as many steps ahead as may be generated ahead."""
        rest = source()
        while True:
            while len(self.coming) <= self.staleness and (given := next(rest, None)):
                self.coming.append(ahead := Ahead(*given))
                if ahead.step in self.kept:
                    ahead.future = Future()
                    ahead.future.set_result(_read_back(self.kept.pop(ahead.step), ahead.prompts))
            if not self.coming:
                return
            self.now = self.coming.popleft()
            self.step, self.at_start = self.now.step, None
            yield self.step, self.now.prompts

    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """group_size completions of every prompt; of a batch that was looked at ahead, those that were written ahead."""
        batch, trained = self.now, self.now is not None and prompts is self.now.prompts
        if batch is None or not trained:
            batch = Ahead(self.step, list(prompts))
        else:
            self.now, self.at_start = None, fingerprint(policy)  # each batch is handed out once
        wanted = [batch, *self.coming] if trained else [batch]
        begun = [ahead.future or self._begin(policy, ahead.prompts, group_size) for ahead in wanted]
        for ahead, future in zip(wanted, begun, strict=True):
            ahead.future = future
        try:
            while not wait(begun[:1], MINUTE).done:
                self.waits()
            rollouts = begun[0].result()
        except BaseException:
            begun[0].cancel()
            raise
        if trained:
            self.counts["sampling/staleness"] = float(self.step - 1 - rollouts.versions[0])
        moved = {name: getattr(rollouts, name).to(policy.device) for name in ("groups", "logprobs", "finished")}
        return replace(rollouts, **moved)

    def begun(self) -> "Begun":
        """The batches to come that are being written, or are written."""
        return [(ahead.step, ahead.future) for ahead in self.coming if ahead.future is not None]

    def take(self, written: list[dict[str, Any]]) -> None:
        """Batches that a checkpoint holds as `written` gave them: they are not generated again."""
        self.kept = {batch["step"]: batch for batch in written}

    def metrics(self) -> dict[str, float]:
        """Of the last batch: how many steps its weights were behind; of the servers: how many work, work sent again, seconds of
        syncs since the last call, and the largest difference that the last probes have found."""
        usable = [server for server in self.servers if not server.strikes]
        said = {
            "servers/usable": float(len(usable)),
            "servers/resent": float(self.resent),
            "servers/sync_seconds": round(self.sync_seconds, 4),
            "servers/probe_difference": max((server.difference for server in usable), default=math.nan),
        }
        self.sync_seconds = 0.0
        return self.counts | said

    def close(self) -> None:
        """End what is under way, and the servers that are ours."""
        if self.loop.is_closed():
            return
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(SHORT)
        for server in self.servers:
            if server.local is not None:
                server.local.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(SHORT)
        if not self.thread.is_alive():
            self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            for weights in self.versions if server.local is None else ():
                if weights.adapter and weights.name in server.has:
                    with suppress(NoAnswerError, RefusedError):
                        await server.forget(weights.name)
            if server.client is not None:
                await server.client.aclose()

    def _begin(self, policy: Any, prompts: Sequence[Example], group_size: int) -> "Future[Rollouts]":
        """Generation by the policy as it is now, under way."""
        if (found := fingerprint(policy)) != self.print:
            self.print, engine, version = found, self.engine, self.step - (found == self.at_start)
            cut = {"temperature": engine.temperature, "top_k": engine.top_k, "top_p": engine.top_p}
            whole, expected = self.whole(policy, partial(next_tokens, probes=self.probes, cut=cut))
            self.weights = publish(whole, expected, version, self.run, self.folder, self.untie, self.nccl)
            if not self.weights.expected.isfinite().any():
                raise InputError(
                    "the policy's probabilities are not numbers any more: lower --lr, or look at its weights"
                )
            self.versions.append(self.weights)
        assert self.weights is not None
        random = self.engine.generator
        seeds = torch.randint(2**31, (len(prompts),), generator=random, device=random.device).tolist()
        work = self._rollouts(self.weights, prompts, group_size, seeds)
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _rollouts(self, weights: Weights, prompts: Sequence[Example], size: int, seeds: list[int]) -> Rollouts:
        if not self.keepers:
            self.keepers = [asyncio.create_task(self._keep(server)) for server in self.servers]
            self.good_at = time.monotonic()
        if weights not in self.wanted:
            self.wanted.append(weights)
        weights.batches += 1
        tasks = [
            asyncio.create_task(self._group(weights, prompt.prompt, size, seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        try:
            groups = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            weights.batches -= 1
            if not weights.batches:
                self.wanted.remove(weights)
            await self._tidy()
        written = [completion for group in groups for completion in group]
        bare = collate([prompt.prompt for prompt in prompts], [tokens for tokens, _ in written])
        stops, texts = set(self.engine.stops), list[str]()
        for b, (tokens, _) in enumerate(written):
            said = tokens[:-1] if tokens[-1] in stops else tokens
            texts.append(self.engine.decode(prompts[b // size].prompt, said))
        return Rollouts(
            groups=bare,
            logprobs=pad_sequence([torch.tensor(logprobs) for _, logprobs in written], batch_first=True),
            finished=torch.tensor([tokens[-1] in stops for tokens, _ in written]),
            texts=texts,
            rows=[prompt.row for prompt in prompts],
            versions=[weights.version] * len(written),
        )

    async def _tidy(self) -> None:
        """Forget the versions that nobody wants any more, but for the newest."""
        for weights in [x for x in self.versions[:-1] if x not in self.wanted]:
            self.versions.remove(weights)
            for server in self.servers:
                if weights.adapter and weights.name in server.has:
                    with suppress(NoAnswerError, RefusedError):
                        await server.forget(weights.name)
            shutil.rmtree(weights.folder, ignore_errors=True)

    async def _group(self, weights: Weights, prompt: Sequence[int], size: int, seed: int) -> list[Completion]:
        """All completions of one prompt, from whichever server gives them; never a part of them."""
        said = ""
        for _ in range(TRIES):
            server = await self._free(weights)
            limit = self.engine.max_completion_tokens
            work = asyncio.ensure_future(server.sample(weights, prompt, size, seed, limit))
            server.asked.add(work)
            try:
                return await work
            except NoAnswerError as error:
                said = str(error)
            except RefusedError as error:
                raise InputError(f"{server.url} refuses to generate: {error}") from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    work.cancel()
                    raise
                said = f"{server.url} does not answer any more"
            finally:
                server.asked.discard(work)
                server.busy -= 1
                await self._tell()
            self._distrust(server, said)
            self.resent += 1
        raise NoServerError(f"a group of completions failed {TRIES} times, the last one: {said}")

    async def _free(self, weights: Weights) -> Server:
        """A server that is trusted with these weights and has room, taken; the one that has the least to do."""
        weights.waiting += 1
        try:
            async with self.changed:
                self.changed.notify_all()
                while True:
                    free = [x for x in self.servers if weights.name in x.has and x.busy < self._share()]
                    if free:
                        server = min(free, key=lambda x: x.busy)
                        server.busy += 1
                        return server
                    if any(x.has for x in self.servers):
                        self.good_at = time.monotonic()
                    left = self.good_at + self.patience - time.monotonic()
                    tried = all(x.strikes for x in self.servers)  # on a busy machine the first try may take longer
                    if (left <= 0 and tried) or all(x.hopeless for x in self.servers):
                        raise NoServerError("no server to generate with: " + "; ".join(x.trouble for x in self.servers))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(left, BEAT) if left > 0 else BEAT):
                            await self.changed.wait()
        finally:
            weights.waiting -= 1

    def _share(self) -> int:
        """Groups that one server takes at a time: those that are well, or on their way, get the same."""
        unfinished = sum(x.busy for x in self.servers) + sum(x.waiting for x in self.wanted)
        return min(AT_ONCE, -(-unfinished // max(1, sum(not x.strikes for x in self.servers))))

    def _next(self, server: Server) -> Weights | None:
        """The weights that this server is to be brought to: of those that groups wait for the oldest that it lacks."""
        waiting = [x for x in self.wanted if x.waiting]
        if waiting and not waiting[0].adapter:  # in place, so one after the other, and when nobody reads the old ones
            waiting = [] if server.busy else waiting[:1]
        return next((x for x in waiting if x.name not in server.has), None)

    async def _keep(self, server: Server) -> None:
        """Bring a server to what is wanted, again after each failure, and watch it while it works."""
        while True:
            async with self.changed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT):
                        await self.changed.wait_for(lambda: self._next(server) is not None)
                weights = self._next(server)
            if weights is None:
                if server.busy:
                    await self._look_at(server)
                continue
            began = time.monotonic()
            try:
                await server.bring(weights, self.probes)
                self.sync_seconds += time.monotonic() - began
                await self._tell()
                continue
            except NoAnswerError as error:
                self._distrust(server, str(error))
            except RefusedError as error:
                server.hopeless = True
                self._distrust(server, f"{server.url} refuses: {error.said}" if error.code else error.said)
            except ProbeError as error:
                server.hopeless = True
                self._distrust(server, str(error))
            except (LookupError, TypeError, AttributeError):
                self._distrust(server, f"{server.url} does not answer as vLLM does")
            await self._tell()
            await asyncio.sleep(pause(server.strikes, longest=10.0) * min(1.0, self.patience / 100))

    async def _look_at(self, server: Server) -> None:
        """A server at work that does not even say that it lives loses its work."""
        said = ""
        for _ in range(2):
            try:
                await server.call("GET", "health", timeout=SHORT)
                return
            except (NoAnswerError, RefusedError) as error:
                said = str(error)
        self._distrust(server, said)
        for work in list(server.asked):
            work.cancel()

    def _distrust(self, server: Server, said: str) -> None:
        if server.has or not server.strikes:
            self.good_at = time.monotonic() if server.has else self.good_at
            self.note(f"{said}; its work goes to others until it is back")
        server.has.clear()
        server.strikes, server.trouble = server.strikes + 1, said

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()
