"""vLLM servers behind the engine's own interface: token ids in, token ids and their sampled log-probabilities out.

A server is trusted with a version of the weights once it has passed the probe on it (sync.py), and until a call to it fails; then its
work goes to another, and it is brought to the weights and probed again. Everything that is waited for has a time limit.
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
from trivet.generation.sync import Weights, fingerprint, next_tokens, publish
from trivet.generation.vllm import AT_ONCE, SHORT, Completion, ProbeError, Server
from trivet.http import NoAnswerError, RefusedError, pause
from trivet.timing import timed

BEAT = 5.0  # seconds between looks at a server that is at work
MINUTE = 60.0  # between signs of life to whoever waits with us
TRIES = 10  # how often a group is tried


class NoServerError(InputError):
    """No server is left to generate with; the weights are as they were after the last step."""


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

    def ahead(self, batches: Iterator[tuple[int, list[Example]]]) -> Iterator[tuple[int, list[Example]]]:
        """The same batches, looked at as many steps ahead as may be generated ahead."""
        while True:
            while len(self.coming) <= self.staleness and (given := next(batches, None)):
                self.coming.append(ahead := Ahead(*given))
                if ahead.step in self.kept:
                    ahead.future = Future()
                    ahead.future.set_result(_read_back(self.kept.pop(ahead.step), ahead.prompts))
            if not self.coming:
                return
            self.now = self.coming.popleft()
            self.step, self.at_start = self.now.step, None
            yield self.step, self.now.prompts

    @timed("generation")
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

    def state(self) -> "Begun":
        """The batches to come that are being written, or are written."""
        return [(ahead.step, ahead.future) for ahead in self.coming if ahead.future is not None]

    def set_state(self, state: list[dict[str, Any]]) -> None:
        """Batches that a checkpoint holds as `written` gave them: they are not generated again."""
        self.kept = {batch["step"]: batch for batch in state}

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
