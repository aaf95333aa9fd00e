"""vLLM servers behind the interface of Engine: token ids in, token ids and their log-probabilities
as sampled out.

A server is trusted with a version of the weights once it has passed the probe on it (sync.py),
until a call to it fails; then its work goes to another server, and it is synced and probed again.
Every wait has a time limit.
"""

import asyncio
import math
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trivet.batch import Example, Groups, Rollouts, collate
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.generation.sync import Weights, fingerprint, next_token_logprobs, publish
from trivet.generation.vllm import AT_ONCE, SHORT, Completion, ProbeError, Server
from trivet.http import NoAnswerError, RefusedError, pause
from trivet.timing import timed

BEAT = 5.0  # seconds between health checks of a busy server
MINUTE = 60.0  # seconds between calls of `waits`
TRIES = 10  # attempts per group


class NoServerError(InputError):
    """No server is left to generate with; the weights are those after the last step."""


def unsharded(policy: Any, expects: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
    """Return the policy, whole as it is, and its log-probabilities after the probes."""
    return policy, expects(policy)


@dataclass(eq=False)
class Batch:
    """A batch of prompts, and the future of its rollouts once generation has started."""

    step: int
    prompts: list[Example]
    future: "Future[Rollouts] | None" = None


# fields of Rollouts besides groups and rows
ROLLOUT_FIELDS = ("logprobs", "finished", "texts", "versions")
# step of a batch and the future of its rollouts
PendingBatches = list[tuple[int, "Future[Rollouts]"]]


def batches_to_json(pending: PendingBatches) -> list[dict[str, Any]]:
    """Wait for pending batches and convert them for a checkpoint, without their data rows; failed
    ones are left out.
    """
    batches = list[dict[str, Any]]()
    for step, future in pending:
        with suppress(Exception):  # training on it will raise the error
            rollouts = future.result()
            groups = {item.name: getattr(rollouts.groups, item.name) for item in fields(Groups)}
            batches.append(
                {
                    "step": step,
                    "groups": groups,
                    **{name: getattr(rollouts, name) for name in ROLLOUT_FIELDS},
                }
            )
    return batches


def _batch_from_json(batch: dict[str, Any], prompts: Sequence[Example]) -> Rollouts:
    values = {name: batch[name] for name in ROLLOUT_FIELDS}
    return Rollouts(
        groups=Groups(**batch["groups"]), rows=[prompt.row for prompt in prompts], **values
    )


@dataclass(eq=False)
class Servers:
    """Does the work of an Engine on servers; with `staleness` above 0 they generate coming batches
    while the learner trains.
    """

    engine: Engine  # the engine that this replaces
    servers: list[Server]
    folder: Path  # where weights are written; must be readable by the servers
    probes: list[list[int]]
    patience: float  # seconds to wait for a working server
    staleness: int = 0
    untie: bool = False
    note: Callable[[str], None] = lambda text: None
    whole: Callable[..., tuple[Any, Tensor]] = unsharded  # gathers a sharded policy
    waits: Callable[[], None] = lambda: None  # called while waiting, so that other ranks wait along
    cache_bytes: int = 0  # this process holds none
    # batches of a checkpoint, by step
    kept: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]], init=False)
    counts: dict[str, float] = field(default_factory=dict[str, float], init=False)

    def __post_init__(self) -> None:
        self.run = secrets.token_hex(4)
        self.fingerprint: tuple[int, ...] | None = None
        self.weights: Weights | None = None
        self.coming: deque[Batch] = deque()
        self.now: Batch | None = None
        # Step of the loop, and the weights' fingerprint before that step changes them.
        self.step, self.at_start = (
            0,
            None,
        )
        self.wanted: list[Weights] = []
        self.versions: list[Weights] = []
        self.sync_tasks: list[Any] = []
        self.last_good, self.resent, self.sync_seconds = time.monotonic(), 0, 0.0
        self.changed = asyncio.Condition()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    @property
    def temperature(self) -> float:
        """The engine's temperature."""
        return self.engine.temperature

    def ahead(
        self, batches: Iterator[tuple[int, list[Example]]]
    ) -> Iterator[tuple[int, list[Example]]]:
        """Yield the same batches, having read as many ahead as `staleness` allows to generate
        ahead.
        """
        while True:
            while len(self.coming) <= self.staleness and (item := next(batches, None)):
                self.coming.append(ahead := Batch(*item))
                if ahead.step in self.kept:
                    ahead.future = Future()
                    ahead.future.set_result(
                        _batch_from_json(self.kept.pop(ahead.step), ahead.prompts)
                    )
            if not self.coming:
                return
            self.now = self.coming.popleft()
            self.step, self.at_start = self.now.step, None
            yield self.step, self.now.prompts

    @timed("generation")
    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Return group_size completions of every prompt; for a batch that was read ahead, the ones
        generated ahead.
        """
        batch, trained = self.now, self.now is not None and prompts is self.now.prompts
        if batch is None or not trained:
            batch = Batch(self.step, list(prompts))
        else:
            self.now, self.at_start = None, fingerprint(policy)  # each batch is returned once
        wanted = [batch, *self.coming] if trained else [batch]
        begun = [ahead.future or self._start(policy, ahead.prompts, group_size) for ahead in wanted]
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
        moved = {
            name: getattr(rollouts, name).to(policy.device)
            for name in ("groups", "logprobs", "finished")
        }
        return replace(rollouts, **moved)

    def state(self) -> "PendingBatches":
        """Return the coming batches whose generation has started or finished."""
        return [(ahead.step, ahead.future) for ahead in self.coming if ahead.future is not None]

    def set_state(self, state: list[dict[str, Any]]) -> None:
        """Take the batches of a checkpoint, as returned by `batches_to_json`, so that they are not
        generated again.
        """
        self.kept = {batch["step"]: batch for batch in state}

    def metrics(self) -> dict[str, float]:
        """Return metrics: how many steps the last batch's weights were behind, how many servers are
        usable, how often work was resent, seconds of syncs since the last call, and the largest
        difference in the last probes.
        """
        usable = [server for server in self.servers if not server.strikes]
        metrics = {
            "servers/usable": float(len(usable)),
            "servers/resent": float(self.resent),
            "servers/sync_seconds": round(self.sync_seconds, 4),
            "servers/probe_difference": max(
                (server.difference for server in usable), default=math.nan
            ),
        }
        self.sync_seconds = 0.0
        return self.counts | metrics

    def close(self) -> None:
        """Cancel work in flight and stop the servers that this process started."""
        if self.loop.is_closed():
            return
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._shut_down(), self.loop).result(SHORT)
        for server in self.servers:
            if server.local is not None:
                server.local.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(SHORT)
        if not self.thread.is_alive():
            self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _shut_down(self) -> None:
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

    def _start(
        self, policy: Any, prompts: Sequence[Example], group_size: int
    ) -> "Future[Rollouts]":
        """Start generation with the policy's current weights."""
        if (current := fingerprint(policy)) != self.fingerprint:
            self.fingerprint, engine = current, self.engine
            version = self.step - (current == self.at_start)
            cut = {"temperature": engine.temperature, "top_k": engine.top_k, "top_p": engine.top_p}
            whole, expected = self.whole(
                policy, partial(next_token_logprobs, probes=self.probes, cut=cut)
            )
            self.weights = publish(whole, expected, version, self.run, self.folder, self.untie)
            if not self.weights.expected.isfinite().any():
                raise InputError(
                    "the policy's probabilities are NaN or infinite; lower --lr or inspect its "
                    "weights"
                )
            self.versions.append(self.weights)
        assert self.weights is not None
        random = self.engine.generator
        seeds = torch.randint(
            2**31, (len(prompts),), generator=random, device=random.device
        ).tolist()
        work = self._rollouts(self.weights, prompts, group_size, seeds)
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _rollouts(
        self, weights: Weights, prompts: Sequence[Example], size: int, seeds: list[int]
    ) -> Rollouts:
        if not self.sync_tasks:
            self.sync_tasks = [
                asyncio.create_task(self._keep_in_sync(server)) for server in self.servers
            ]
            self.last_good = time.monotonic()
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
            await self._drop_unused()
        completions = [completion for group in groups for completion in group]
        bare = collate([prompt.prompt for prompt in prompts], [tokens for tokens, _ in completions])
        stops, texts = set(self.engine.stops), list[str]()
        for b, (tokens, _) in enumerate(completions):
            shown = tokens[:-1] if tokens[-1] in stops else tokens
            texts.append(self.engine.decode(prompts[b // size].prompt, shown))
        return Rollouts(
            groups=bare,
            logprobs=pad_sequence(
                [torch.tensor(logprobs) for _, logprobs in completions], batch_first=True
            ),
            finished=torch.tensor([tokens[-1] in stops for tokens, _ in completions]),
            texts=texts,
            rows=[prompt.row for prompt in prompts],
            versions=[weights.version] * len(completions),
        )

    async def _drop_unused(self) -> None:
        """Unload and delete versions that are no longer needed, except the newest."""
        for weights in [x for x in self.versions[:-1] if x not in self.wanted]:
            self.versions.remove(weights)
            for server in self.servers:
                if weights.adapter and weights.name in server.has:
                    with suppress(NoAnswerError, RefusedError):
                        await server.forget(weights.name)
            shutil.rmtree(weights.folder, ignore_errors=True)

    async def _group(
        self, weights: Weights, prompt: Sequence[int], size: int, seed: int
    ) -> list[Completion]:
        """Generate all completions of one prompt on one server; never a part of them."""
        problem = ""
        for _ in range(TRIES):
            server = await self._acquire(weights)
            limit = self.engine.max_completion_tokens
            work = asyncio.ensure_future(server.sample(weights, prompt, size, seed, limit))
            server.requests.add(work)
            try:
                return await work
            except NoAnswerError as error:
                problem = str(error)
            except RefusedError as error:
                raise InputError(f"{server.url} refuses to generate: {error}") from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    work.cancel()
                    raise
                problem = f"{server.url} stopped answering"
            finally:
                server.requests.discard(work)
                server.busy -= 1
                await self._notify()
            self._distrust(server, problem)
            self.resent += 1
        raise NoServerError(
            f"generating a group of completions failed {TRIES} times, most recently: {problem}"
        )

    async def _acquire(self, weights: Weights) -> Server:
        """Reserve a slot on the least busy server that is trusted with these weights and has
        room.
        """
        weights.waiting += 1
        try:
            async with self.changed:
                self.changed.notify_all()
                while True:
                    free = [
                        x for x in self.servers if weights.name in x.has and x.busy < self._share()
                    ]
                    if free:
                        server = min(free, key=lambda x: x.busy)
                        server.busy += 1
                        return server
                    if any(x.has for x in self.servers):
                        self.last_good = time.monotonic()
                    left = self.last_good + self.patience - time.monotonic()
                    # On a busy machine the first try may take longer than `patience`.
                    tried = all(x.strikes for x in self.servers)
                    if (left <= 0 and tried) or all(x.hopeless for x in self.servers):
                        raise NoServerError(
                            "no server to generate with: "
                            + "; ".join(x.trouble for x in self.servers)
                        )
                    with suppress(TimeoutError):
                        async with asyncio.timeout(min(left, BEAT) if left > 0 else BEAT):
                            await self.changed.wait()
        finally:
            weights.waiting -= 1

    def _share(self) -> int:
        """Return how many groups one server takes at a time: an equal share for every server
        without failures.
        """
        unfinished = sum(x.busy for x in self.servers) + sum(x.waiting for x in self.wanted)
        return min(AT_ONCE, -(-unfinished // max(1, sum(not x.strikes for x in self.servers))))

    def _next_weights(self, server: Server) -> Weights | None:
        """Return the weights to sync this server to: the oldest that groups wait for and it
        lacks.
        """
        waiting = [x for x in self.wanted if x.waiting]
        # Full weights are replaced in place: one version at a time, and only when the server is
        # idle.
        if waiting and not waiting[0].adapter:
            waiting = [] if server.busy else waiting[:1]
        return next((x for x in waiting if x.name not in server.has), None)

    async def _keep_in_sync(self, server: Server) -> None:
        """Keep a server synced to the weights in demand, retry after failures, and check its health
        while it is busy.
        """
        while True:
            async with self.changed:
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT):
                        await self.changed.wait_for(lambda: self._next_weights(server) is not None)
                weights = self._next_weights(server)
            if weights is None:
                if server.busy:
                    await self._check_health(server)
                continue
            began = time.monotonic()
            try:
                await server.sync(weights, self.probes)
                self.sync_seconds += time.monotonic() - began
                await self._notify()
                continue
            except NoAnswerError as error:
                self._distrust(server, str(error))
            except RefusedError as error:
                server.hopeless = True
                self._distrust(
                    server, f"{server.url} refuses: {error.reply}" if error.code else error.reply
                )
            except ProbeError as error:
                server.hopeless = True
                self._distrust(server, str(error))
            except (LookupError, TypeError, AttributeError):
                self._distrust(server, f"{server.url} does not answer like vLLM")
            await self._notify()
            await asyncio.sleep(pause(server.strikes, longest=10.0) * min(1.0, self.patience / 100))

    async def _check_health(self, server: Server) -> None:
        """Take its work away from a busy server that fails its health check."""
        problem = ""
        for _ in range(2):
            try:
                await server.call("GET", "health", timeout=SHORT)
                return
            except (NoAnswerError, RefusedError) as error:
                problem = str(error)
        self._distrust(server, problem)
        for work in list(server.requests):
            work.cancel()

    def _distrust(self, server: Server, problem: str) -> None:
        if server.has or not server.strikes:
            self.last_good = time.monotonic() if server.has else self.last_good
            self.note(f"{problem}; its work goes to other servers until it is back")
        server.has.clear()
        server.strikes, server.trouble = server.strikes + 1, problem

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()
