"""trivet replay: a step whose gradient was not finite, made again from what was kept of it, and looked into."""

import json
import math
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trivet.distributed.ranks import joined, started_by_torchrun
from trivet.errors import InputError
from trivet.runner.launch import checkpoints_of, finish
from trivet.runner.prepare import Launch
from trivet.runner.resume import config_of
from trivet.step.devices import OneProcess
from trivet.store.checkpoints import damage
from trivet.store.reading import read_metrics, read_object


@dataclass(kw_only=True)
class Found:
    """What a replay has seen."""

    step: int
    out: Path  # the step's own run directory, with every token's numbers in samples.jsonl
    then: dict[str, Any]  # metrics as recorded in the run
    now: dict[str, Any]  # metrics of the replay
    processes: int = 1  # that have made the step
    parameters: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])  # name, bad, of how many

    @property
    def different(self) -> list[str]:
        """Metrics that are not those of the run, times aside: to the bit, or where several processes have made them to rounding."""
        names = {name for name in {*self.then, *self.now} if not name.startswith(("time/", "seconds", "skipped"))}
        return sorted(name for name in names if not self._same(self.then.get(name), self.now.get(name)))

    def _same(self, then: Any, now: Any) -> bool:
        if self.processes > 1 and isinstance(then, float) and isinstance(now, float):
            return math.isclose(then, now, rel_tol=1e-4, abs_tol=1e-5)
        return then == now

    @property
    def tokens(self) -> list[tuple[str, str]]:
        """(token, completion) where a sampled completion that was kept has a token whose gradient is not a number."""
        lines = map(json.loads, (self.out / "samples.jsonl").read_text(encoding="utf-8").splitlines())
        sampled = (line for line in lines if {"gradient", "sampler_logprob"} <= set(line))
        return [
            (token, line["completion"])
            for line in sampled
            for token, slope in zip(line["tokens"], line["gradient"], strict=True)
            if slope is None
        ]


def replayed(kept: str | Path) -> Found:
    """Make the step that was kept in RUN/skipped/step-N again. Errors: InputError where there is none."""
    kept = Path(kept)
    facts = read_object(kept / "replay.json")
    if not facts:
        raise InputError(f"{kept} holds no step to replay; they are in RUN/skipped/, where a gradient was not finite")
    run_folder, step, done = kept.resolve().parent.parent, facts["step"], facts["from"]
    if done and (trouble := damage(kept)):
        raise InputError(f"{kept} is damaged ({trouble}), so it can't be replayed")
    out = kept / "replayed"
    config = replace(config_of(run_folder), out=str(out), keep_tokens_every=1, save_every=0, track=())
    then = next((line for line in read_metrics(run_folder) if line["step"] == step), {})
    with joined(config) if started_by_torchrun() else nullcontext(OneProcess()) as devices:
        devices.first(lambda: shutil.rmtree(out, ignore_errors=True))
        launched = Launch(config, devices)
        run, record = launched.run, launched.record
        known = read_object(run_folder / "run.json").get("start")
        if known != devices.digest(run.model):
            raise InputError(f"{launched.start_from} is not what it was when {run_folder} began; restore it")
        checkpoints = checkpoints_of(launched)
        checkpoints.start, run.begins = kept if done else None, checkpoints.begin
        with record.locked():
            record.begin({"started_from": launched.start_from, "start": known, "replays": str(kept)}, done)
            for number, result in enumerate(launched.recipe.train(run.config, run), done + 1):
                record.step({"step": number} | finish(launched, number, result))
                if number == step:
                    break
        now = devices.first(lambda: read_metrics(out)[-1])
        bad = run.parts["optimizer"].bad
    return Found(step=step, out=out, then=then, now=now, processes=facts.get("processes", 1), parameters=bad)


def replay(args: list[str]) -> None:
    """trivet replay"""
    if len(args) != 1 or args[0].startswith("-"):
        print(
            "trivet replay RUN/skipped/step-N\n\nMake a step again whose gradient was not finite, and say where it is not."
        )
        sys.exit(0 if args in (["--help"], ["-h"]) else 2)
    started = started_by_torchrun()
    found = replayed(args[0])
    if os.environ.get("RANK", "0") != "0":  # the first one speaks
        return
    norm = found.now.get("grad_norm")
    print(
        f"step {found.step} again: the gradient is {'finite' if norm is not None and math.isfinite(norm) else 'not finite'}"
    )
    same = (
        f"other numbers than recorded: {', '.join(found.different)}"
        if found.different
        else f"the numbers recorded then, {'to the bit' if found.processes == 1 else f'by {found.processes} processes, to rounding'}"
    )
    print(f"  metrics: {same}")
    if "servers/usable" in found.then:
        print(
            "  the completions are others: servers wrote those of the run, and they are not kept; these were sampled here"
        )
    elif "tokens/generated" in found.then and found.processes > 1 and not started:
        print(
            f"  one process alone draws other completions than several; for those of the run: torchrun -m trivet replay {args[0]}"
        )
    print(f"  parameters with it: {len(found.parameters)}")
    for name, bad, count in found.parameters[:5]:
        print(f"    {name}: {bad:,} of {count:,} entries")
    if found.tokens:
        print(f"  tokens with it, of the completions kept: {len(found.tokens)}; the first is {found.tokens[0][0]!r}")
    print(f"  rows: {Path(args[0]) / 'batch.jsonl'}; every token: trivet report {found.out}")
