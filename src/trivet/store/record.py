"""The record of a run in its directory, written during the run.

config.toml and run.json when its loop begins, a line per step in metrics.jsonl, completions in
samples.jsonl, at some steps with their tokens, and summary.json at the end.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from safetensors import SafetensorError

from trivet.arguments import to_toml
from trivet.batch import Rollouts
from trivet.errors import InputError, first_line
from trivet.step import Metrics
from trivet.step.options import Options
from trivet.step.result import Result
from trivet.store.files import make_folder, to_disk, write_json, write_text
from trivet.store.reading import read_object

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

ROWS = 8  # completions of a kept step, or a whole group where it is larger, up to 16
TEXTS = 4  # completions of any other step, without their tokens


class Record:
    """Writes one run directory."""

    def __init__(
        self,
        out: Path,
        config: Options,
        method: str,
        recipe: str,
        steps: int,
        tokenizer: Any,
        decode: Callable[..., str],
        reward: Any,
    ):
        """recipe: where resume finds it. reward: rewards.reward.WeightedSum, whose parts are
        recorded beside their sum, or None.
        """
        self.out, self.config = out, config
        self.method, self.recipe, self.steps = method, recipe, steps
        self.tokenizer, self.decode, self.reward = tokenizer, decode, reward
        self.samples: list[dict[str, Any]] = []
        self.resumed = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and lock it for this process; a dead process holds no lock.

        Errors: InputError if it can't be locked, or, with how to resume, if the code inside can't
        write a file.
        """
        make_folder(self.out)
        with (self.out / ".lock").open("w") as file:
            _lock(file, self.out)
            if fcntl is not None:  # or a child forked by a reward function would keep the lock
                os.register_at_fork(after_in_child=file.close)
            try:
                yield
            except Exception as error:  # a failed write; libraries in Rust raise their own types
                rust = isinstance(error, SafetensorError) or type(error) is Exception
                if isinstance(error, BrokenPipeError) or not (rust or isinstance(error, OSError)):
                    raise
                begun = (self.out / "config.toml").exists()
                advice = (
                    f"; free some space or fix the cause, then: trivet resume {self.out}"
                    if begun
                    else ""
                )
                raise InputError(f"{self.out}: {first_line(error)}{advice}") from error

    def begin(self, about: Mapping[str, Any], step: int) -> None:
        """Write config.toml, and run.json: what is run, on what, since when. Remove what was
        recorded after this step.
        """
        for name in ("metrics.jsonl", "samples.jsonl"):
            _truncate(self.out / name, step)
        then = read_object(self.out / "run.json")
        if then.get("start", about["start"]) != about["start"]:
            raise InputError(
                f"{self.out}: {about['started_from']} has changed since the run began; restore it"
            )
        self.resumed = "began" in then
        again = {key: then[key] for key in ("began", "id", "out_of_memory") if key in then}
        again |= {"resumed": [*then.get("resumed", []), step]} if self.resumed else {}
        command = f"# trivet {self.method} --config config.toml\n"
        write_text(self.out / "config.toml", command + to_toml(self.config))
        weights = (
            {}
            if self.reward is None
            else dict(zip(self.reward.rewards, self.reward.weights, strict=True))
        )
        facts = {
            "method": self.method,
            "recipe": self.recipe,
            "steps": self.steps,
            **about,
            "pid": os.getpid(),
            "reward_weights": weights,
        }
        facts["directory"] = os.getcwd()  # the paths in the options are relative to it
        facts |= again | {"options": asdict(self.config)} | machine_facts(self.config.device)
        write_json(self.out / "run.json", facts)

    def undo(self) -> None:
        """Remove the record of a run that failed in its first step, unless it has metrics."""
        if self.resumed or ((line := self.out / "metrics.jsonl").exists() and line.stat().st_size):
            return
        for name in ("config.toml", ".config.toml", "run.json", ".run.json", ".lock"):
            (self.out / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.out.rmdir()

    def step(self, metrics: Metrics) -> None:
        """Write the line of a step, and the completions that were kept of it."""
        _append(self.out / "metrics.jsonl", [metrics])
        _append(self.out / "samples.jsonl", self.samples)
        self.samples.clear()

    def keeps(self, step: int) -> bool:
        """Whether the tokens of this step are kept."""
        every = self.config.keep_tokens_every
        return every > 0 and (step in (1, self.steps) or step % every == 0)

    def keep(self, step: int, result: Result, *, heldout: bool = False) -> None:
        """Keep completions of a step for samples.jsonl, at some steps with every token's numbers.

        If the numbers include old_logprob, the ratio is recorded; if they include ref_logprob, each
        token's part of the KL.
        """
        if (given := result.completions) is None:
            return
        rows, numbers = result.rows, dict(result.numbers)
        sampled = isinstance(given, Rollouts)
        groups = given.groups if isinstance(given, Rollouts) else given
        if isinstance(given, Rollouts):
            rows = given.rows
            numbers |= {"finished": given.finished, "sampler_logprob": given.logprobs}
        size = groups.group_size
        with_tokens = self.keeps(step) and not (heldout and sampled)
        if not (with_tokens or sampled):
            return
        parts = {} if self.reward is None or not sampled else self.reward.parts
        parts = {name: part for name, part in parts.items() if len(part) == len(groups.completions)}
        count = min(len(groups.completions), TEXTS if not with_tokens else min(16, max(ROWS, size)))
        if (chosen := numbers.pop("chosen", None)) is None and size == 2 and not sampled:
            chosen = torch.arange(len(groups.completions)) % 2 == 0
        if "old_logprob" in numbers:
            numbers["ratio"] = (numbers["logprob"] - numbers.pop("old_logprob")).exp()
        if getattr(self.config, "beta", 1) == 0:  # no reference
            numbers.pop("ref_logprob", None)
        if "ref_logprob" in numbers:
            numbers["kl"] = numbers["logprob"] - numbers["ref_logprob"]
        read = {name: x[:count].tolist() for name, x in numbers.items()}
        prompts = groups.prompts[: -(-count // size)].tolist()
        ids = groups.completions[:count].tolist()
        present, mask = groups.present[:count].tolist(), groups.mask[:count].tolist()
        prompt_mask = groups.prompt_mask[: -(-count // size)].tolist()
        for b in range(count):
            p = b // size
            own = [t for t, real in enumerate(present[b]) if real]
            before = [token for token, real in zip(prompts[p], prompt_mask[p], strict=True) if real]
            written = [ids[b][t] for t in own]
            text = self.decode(before, written[:-1] if sampled and read["finished"][b] else written)
            line: dict[str, Any] = {
                "step": step,
                "group": p,
                "prompt": rows[p].get("prompt"),
                "completion": text,
            }
            line |= {"set": "held-out"} if heldout else {}
            # version: the step of the weights that sampled it; staleness: steps since then
            if isinstance(given, Rollouts) and given.versions:
                done = step if heldout else step - 1
                line |= {"version": given.versions[b], "staleness": done - given.versions[b]}
            line |= {"side": "chosen" if chosen[b] else "rejected"} if chosen is not None else {}
            line |= {name: short(x[b]) for name, x in read.items() if not isinstance(x[b], list)}
            line |= (
                {"rewards": {name: short(part[b].item()) for name, part in parts.items()}}
                if parts
                else {}
            )
            by_token = {name: x[b] for name, x in read.items() if isinstance(x[b], list)}
            if with_tokens and by_token:
                line["tokens"] = token_texts(self.tokenizer, before, written)
                line |= {
                    name: [short(x[t]) if mask[b][t] else None for t in own]
                    for name, x in by_token.items()
                }
            self.samples.append(line)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run as done."""
        write_json(
            self.out / "summary.json",
            {"method": self.method, **summary} | machine_facts(self.config.device),
        )


class NoRecord:
    """The record of a process that writes nothing."""

    locked = staticmethod(nullcontext)

    def keep(self, step: int, result: Result, *, heldout: bool = False) -> None:
        """Do nothing."""

    def begin(self, about: Mapping[str, Any], step: int) -> None:
        """Do nothing."""

    def undo(self) -> None:
        """Do nothing."""

    def step(self, metrics: Metrics) -> None:
        """Do nothing."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Do nothing."""


def require_free(out: Path) -> None:
    """Raise an InputError if another process is using this directory, before a second model takes
    up memory.
    """
    with suppress(FileNotFoundError), (out / ".lock").open() as file:
        _lock(file, out, shared=True)


def _lock(file: IO[str], out: Path, *, shared: bool = False) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{out}: another process is using this run; wait for it, or stop it"
            ) from None
        except OSError:  # this file system has no locks
            pass


def token_texts(
    tokenizer: Any, before: Sequence[int], ids: Sequence[int], window: int = 4
) -> list[str]:
    """Return the text of each token, so that together they read as the whole. A character split
    over several tokens comes with its last one.
    """
    everything, texts = [*before[-window:], *ids], list[str]()
    for end in range(len(everything) - len(ids), len(everything)):
        context = everything[max(0, end - window) : end]
        without, with_it = tokenizer.decode(context), tokenizer.decode([*context, everything[end]])
        whole = with_it.startswith(without) and not with_it.endswith("\ufffd")
        texts.append(with_it[len(without) :] if whole else tokenizer.decode([everything[end]]))
    return texts


def machine_facts(device: str) -> dict[str, Any]:
    """Return the machine and the versions of the software."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"python": platform.python_version(), "trivet": version("trivet")}
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "versions": versions,
    }


def short(x: Any) -> Any:
    """Round a float to six digits; NaN and infinity, which JSON lacks, become None."""
    return (float(f"{x:.6g}") if math.isfinite(x) else None) if isinstance(x, float) else x


def _truncate(path: Path, step: int) -> None:
    """Keep only the complete lines up to this step."""
    if path.exists():
        half = path.with_name(f".{path.name}")
        with path.open("rb") as lines, half.open("wb") as kept:
            for line in lines:
                # the line may be cut off or damaged
                with suppress(ValueError, TypeError, LookupError, RecursionError):
                    if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                        kept.write(line)
        to_disk(half)
        half.replace(path)


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    if not lines:
        return
    with path.open("a", encoding="utf-8") as file:
        for line in lines:
            values = {
                key: None if isinstance(x, float) and not math.isfinite(x) else x
                for key, x in line.items()
            }
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
