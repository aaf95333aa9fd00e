"""A judge: a language model behind an OpenAI-compatible endpoint that rates one completion or
compares two.

Named by the URL up to its /v1, with #MODEL if the server has several: --reward
http://127.0.0.1:8000/v1#qwen3. The key, if the server requires one, is read from the environment
and kept nowhere else.
"""

import asyncio
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from trivet.batch import Rollouts
from trivet.errors import InputError, first_line
from trivet.http import NoAnswerError, RefusedError, call_server, pause, run_async
from trivet.rewards.pairwise import matches, win_rates

SCORE = re.compile(r"score\W{0,6}?(-?\d+(?:\.\d+)?)", re.IGNORECASE)
WINNER = re.compile(r"winner\W{0,6}(?:answer\s+)?(a|b|tie)\b", re.IGNORECASE)
PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")  # {prompt}, {completion}, {a}, {b}, or any column
LARGEST, LONGEST_WAIT = 4 << 20, 300.0  # bytes of an answer; seconds that a server may ask to wait


@dataclass
class Judge:
    """Reward completions with a judge's score, scaled to 0 to 1, or with the share of comparisons
    within the group that each wins.

    NaN where there is no verdict: the answer has no score from 0 to 10 or no winner, or the
    completion is alone in its group. Calls with a transient failure (no connection, too slow, 408,
    409, 429, 5xx, an unexpected answer) are retried.
    """

    url: str
    model: str = ""
    """The model's name on the server; the first that the server lists if empty."""
    compare: bool = False
    """Compare the completions of a group with each other, and reward the share of comparisons that
    each wins.
    """
    opponents: int = 0
    """Compare with only this many neighbors on each side; 0 means with all."""
    prompt: str = ""
    """File with the question; {prompt}, {completion} (or {a} and {b}) and {any_column} are filled
    in from the row.
    """
    request: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 1024})
    """What else to send with each request."""
    timeout: float = 120.0
    """Seconds until an answer must be complete."""
    retries: int = 5
    """How often to ask again, after pauses of about 1, 2, 4, ... seconds, or as long as the
    server's Retry-After.
    """
    at_once: int = 16
    """Requests in flight at a time."""
    on_failure: Literal["stop", "skip"] = "stop"
    """What to do after that: "stop" ends the run in one sentence; "skip" leaves the completion
    unscored.
    """
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    name: str = "judge"
    note: Callable[[str], None] = print
    logged: dict[str, float] = field(default_factory=dict[str, float], init=False)

    def __post_init__(self) -> None:
        """Check the settings before the first step. Errors: InputError."""
        self.url, _, named = self.url.partition("#")
        self.url, self.model = (
            self.url.rstrip("/").removesuffix("/chat/completions"),
            self.model or named,
        )
        try:
            address = urlsplit(self.url).netloc
        except ValueError:
            raise InputError(f"reward {self.name}: {self.url} is not a URL") from None
        if "@" in address:
            raise InputError(
                f"reward {self.name}: the URL contains a password, which would be saved with the "
                f"run; set {self.key_variable} instead"
            )
        if not (self.timeout and self.at_once):
            raise InputError(f"reward {self.name}: timeout and at_once must be above 0")
        default = Path(__file__).with_name(
            "judge_compare.txt" if self.compare else "judge_score.txt"
        )
        try:
            self.template = (Path(self.prompt) if self.prompt else default).read_text(
                encoding="utf-8"
            )
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"reward {self.name}: prompt {self.prompt}: {first_line(error)}"
            ) from None
        needed = ("a", "b") if self.compare else ("completion",)
        if absent := [name for name in needed if name not in PLACE.findall(self.template)]:
            raise InputError(
                f"reward {self.name}: prompt {self.prompt} does not contain {{{absent[0]}}}"
            )
        self.key = os.environ.get(self.key_variable, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"reward {self.name}: {self.key_variable} does not hold a valid key")
        self.totals = dict.fromkeys(("calls", "retries", "prompt_tokens", "completion_tokens"), 0)
        self.model = self.model or run_async(self._first_model())

    def __call__(self, rollouts: Rollouts) -> Tensor:
        self.failures, self.last = 0, ""
        size, texts = rollouts.groups.group_size, rollouts.texts
        questions: list[str] = []
        pairs = matches(size, self.opponents)
        for p, row in enumerate(rollouts.rows):
            answers = texts[p * size : (p + 1) * size]
            if self.compare:
                questions += [self._question(row, a=answers[i], b=answers[j]) for i, j in pairs]
            else:
                questions += [self._question(row, completion=answer) for answer in answers]
        replies = run_async(self._ask_all(questions))
        if self.compare:
            shares = [
                {"a": 1.0, "b": 0.0, "tie": 0.5}.get(self._read(WINNER, text).lower())
                for text in replies
            ]
            rated = [
                rate
                for p in range(len(rollouts.rows))
                for rate in win_rates(
                    size, [(i, j, shares[p * len(pairs) + k]) for k, (i, j) in enumerate(pairs)]
                )
            ]
        else:
            scores = [float(self._read(SCORE, text) or "nan") for text in replies]
            rated = [score / 10 if 0 <= score <= 10 else math.nan for score in scores]
        self.logged = {
            f"rewards/{self.name}/{key}": float(value) for key, value in self.totals.items()
        }
        if self.failures:
            self.logged[f"rewards/{self.name}/failed"] = float(self.failures)
            self.note(
                f"reward {self.name}: {self.failures} of {len(replies)} calls failed, most "
                f"recently: {self.last}"
            )
        return torch.tensor(rated, dtype=torch.float32, device=rollouts.groups.prompts.device)

    def _question(self, row: Mapping[str, Any], **answers: str) -> str:
        """Fill in the template's placeholders in one pass, so that placeholders within a completion
        stay as they are.
        """
        values = {**row, **answers}

        def fill(place: re.Match[str]) -> str:
            if place[1] not in values:
                names = ", ".join(sorted(values))
                raise InputError(
                    f"reward {self.name}: its prompt asks for {{{place[1]}}}; the data has {names}"
                )
            value = values[place[1]]
            if isinstance(value, list) and all(
                isinstance(x, dict) and "content" in x for x in value
            ):
                return "\n".join(f"{x.get('role', '')}: {x['content']}" for x in value)
            return str(value)

        return PLACE.sub(fill, self.template)

    def _read(self, form: re.Pattern[str], text: str | None) -> str:
        """Return the last match of a pattern in an answer, '' if there is none."""
        return matched[-1] if text and (matched := form.findall(text)) else ""

    async def _ask_all(self, questions: list[str]) -> list[str | None]:
        """Return the judge's answer to each question; None for a failed one if failures are
        skipped.
        """
        answers: list[str | None] = [None] * len(questions)
        waiting, self.resume, self.down = iter(enumerate(questions)), 0.0, False
        async with self._client() as client:

            async def ask() -> None:
                for number, question in waiting:
                    try:
                        answers[number] = await self._ask(client, question)
                    except NoAnswerError as error:
                        if self.on_failure == "stop":
                            raise InputError(f"reward {self.name}: {error}") from None
                        self.failures, self.last = self.failures + 1, str(error)

            workers = [asyncio.create_task(ask()) for _ in range(min(self.at_once, len(questions)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return answers

    def _client(self) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.AsyncClient(headers=headers, timeout=self.timeout)

    async def _ask(self, client: httpx.AsyncClient, question: str) -> str | None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            **self.request,
        }
        for attempt in range(1, self.retries + 2):
            # A server's Retry-After applies to all requests.
            while (wait := self.resume - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            self.totals["calls"] += 1
            try:
                reply = await self._call(client, "POST", "chat/completions", body)
                for key in ("prompt_tokens", "completion_tokens"):
                    usage = reply.get("usage")
                    spent = usage.get(key) if isinstance(usage, dict) else None
                    self.totals[key] += (
                        spent if isinstance(spent, int) and 0 <= spent < 1 << 40 else 0
                    )
                content = reply["choices"][0]["message"]["content"]
                if content is not None and not isinstance(content, str):
                    raise TypeError
                self.down = False
                return content
            except (LookupError, TypeError, AttributeError):
                error = NoAnswerError(
                    f"{self.url} does not answer like an OpenAI-compatible server"
                )
            except NoAnswerError as failure:
                error = failure
            if attempt > self.retries or self.down:
                # if failures are skipped, don't wait this long again for each of the others
                self.down = True
                times = f" ({attempt} times in a row)" if attempt > 1 else ""
                raise NoAnswerError(f"{error}{times}")
            self.totals["retries"] += 1
            if error.wait is not None:
                self.resume = max(self.resume, time.monotonic() + min(error.wait, LONGEST_WAIT))
            await asyncio.sleep(0 if error.wait else pause(attempt))
        raise AssertionError

    async def _call(self, client: httpx.AsyncClient, how: str, what: str, body: Any = None) -> Any:
        """Call the server and return the JSON it answers with.

        Errors: NoAnswerError for what is worth retrying, else InputError.
        """
        try:
            return await call_server(
                client, how, self.url, what, body, timeout=self.timeout, largest=LARGEST
            )
        except NoAnswerError as error:
            raise NoAnswerError(self._without_key(error), wait=error.wait) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            raise InputError(
                f"reward {self.name}: {self.url} is not a URL: {self._without_key(error)}"
            ) from None
        except RefusedError as error:
            reply = self._without_key(error.reply)
            hint = f"; the key is read from {self.key_variable}" if error.code in (401, 403) else ""
            raise InputError(
                f"reward {self.name}: {self.url} answered with HTTP {error.code}: {reply}{hint}"
            ) from None

    async def _first_model(self) -> str:
        async with self._client() as client:
            try:
                return str((await self._call(client, "GET", "models"))["data"][0]["id"])
            except (LookupError, TypeError, NoAnswerError) as error:
                problem = (
                    error
                    if isinstance(error, NoAnswerError)
                    else f"{self.url} does not list its models"
                )
                raise InputError(
                    f"reward {self.name}: {problem}; start the server, or name the model as "
                    "URL#MODEL"
                ) from None

    def _without_key(self, message: object) -> str:
        """Return the message in one line without the key; some servers repeat the key they were
        sent.
        """
        line = " ".join(str(message).split()) or type(message).__name__
        return line.replace(self.key, "(the key)") if self.key else line
