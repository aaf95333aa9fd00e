"""trivet replay: repeat a step whose gradient was not finite, and show where it was not."""

import json
import math
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trivet.distributed.ranks import join_group, started_by_torchrun
from trivet.errors import InputError
from trivet.runner.launch import checkpoints_of, finish
from trivet.runner.prepare import Launch
from trivet.runner.resume import config_of
from trivet.step.devices import OneProcess
from trivet.store.checkpoints import damage
from trivet.store.reading import read_metrics, read_object


@dataclass(kw_only=True)
class Replay:
    """The result of a replay."""

    step: int
    out: Path  # the run directory of the replay, with every token's numbers in samples.jsonl
    then: dict[str, Any]  # metrics as recorded in the run
    now: dict[str, Any]  # metrics of the replay
    processes: int = 1  # how many took the step in the run
    # (name, entries that are not finite, entries)
    parameters: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])

    @property
    def different(self) -> list[str]:
        """Metrics that differ from those of the run, except times: compared exactly, or, if several
        processes computed them, up to rounding.
        """
        names = {
            name
            for name in {*self.then, *self.now}
            if not name.startswith(("time/", "seconds", "skipped"))
        }
        return sorted(
            name for name in names if not self._same(self.then.get(name), self.now.get(name))
        )

    def _same(self, then: Any, now: Any) -> bool:
        if self.processes > 1 and isinstance(then, float) and isinstance(now, float):
            return math.isclose(then, now, rel_tol=1e-4, abs_tol=1e-5)
        return then == now

    @property
    def tokens(self) -> list[tuple[str, str]]:
        """(token, completion) for each token of a recorded sampled completion whose gradient is not
        finite.
        """
        lines = map(
            json.loads, (self.out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        )
        sampled = (line for line in lines if {"gradient", "sampler_logprob"} <= set(line))
        return [
            (token, line["completion"])
            for line in sampled
            for token, slope in zip(line["tokens"], line["gradient"], strict=True)
            if slope is None
        ]


def replay_step(kept: str | Path) -> Replay:
    """Repeat the step that was kept in RUN/skipped/step-N. Errors: InputError if there is none."""
    kept = Path(kept)
    facts = read_object(kept / "replay.json")
    if not facts:
        raise InputError(
            f"{kept} holds no step to replay; a run keeps the steps whose gradient was not finite "
            "in RUN/skipped/"
        )
    run_folder, step, done = kept.resolve().parent.parent, facts["step"], facts["from"]
    if done and (trouble := damage(kept)):
        raise InputError(f"{kept} is damaged ({trouble}), so it can't be replayed")
    out = kept / "replayed"
    config = replace(
        config_of(run_folder), out=str(out), keep_tokens_every=1, save_every=0, track=()
    )
    then = next((line for line in read_metrics(run_folder) if line["step"] == step), {})
    with join_group(config) if started_by_torchrun() else nullcontext(OneProcess()) as devices:
        devices.first(lambda: shutil.rmtree(out, ignore_errors=True))
        launched = Launch(config, devices)
        run, record = launched.run, launched.record
        start = read_object(run_folder / "run.json").get("start")
        if start != devices.digest(run.model):
            raise InputError(
                f"{launched.start_from} has changed since {run_folder} began; restore it"
            )
        checkpoints = checkpoints_of(launched)
        checkpoints.start, run.begins = kept if done else None, checkpoints.begin
        with record.locked():
            record.begin(
                {"started_from": launched.start_from, "start": start, "replays": str(kept)}, done
            )
            for number, result in enumerate(launched.recipe.train(run.config, run), done + 1):
                record.step({"step": number} | finish(launched, number, result))
                if number == step:
                    break
        now = devices.first(lambda: read_metrics(out)[-1])
        bad = run.parts["optimizer"].bad
    return Replay(
        step=step, out=out, then=then, now=now, processes=facts.get("processes", 1), parameters=bad
    )


def replay(args: list[str]) -> None:
    """trivet replay"""
    if len(args) != 1 or args[0].startswith("-"):
        print(
            "trivet replay RUN/skipped/step-N\n\nRepeat a step whose gradient was not finite, and "
            "show where it is not."
        )
        sys.exit(0 if args in (["--help"], ["-h"]) else 2)
    started = started_by_torchrun()
    found = replay_step(args[0])
    if os.environ.get("RANK", "0") != "0":  # only rank 0 prints
        return
    norm = found.now.get("grad_norm")
    print(
        f"step {found.step} repeated: the gradient is "
        f"{'finite' if norm is not None and math.isfinite(norm) else 'not finite'}"
    )
    exact = (
        "bit for bit"
        if found.processes == 1
        else f"up to rounding ({found.processes} processes took the step)"
    )
    same = (
        f"these differ from the recorded ones: {', '.join(found.different)}"
        if found.different
        else f"equal to the recorded ones, {exact}"
    )
    print(f"  metrics: {same}")
    if "servers/usable" in found.then:
        print(
            "  the completions differ: servers wrote those of the run, which were not kept; these "
            "were sampled here"
        )
    elif "tokens/generated" in found.then and found.processes > 1 and not started:
        print(
            "  one process samples other completions than several do; for those of the run: "
            f"torchrun -m trivet replay {args[0]}"
        )
    print(f"  parameters with non-finite gradients: {len(found.parameters)}")
    for name, bad, count in found.parameters[:5]:
        print(f"    {name}: {bad:,} of {count:,} entries")
    if found.tokens:
        print(
            f"  tokens with non-finite gradients, in recorded completions: {len(found.tokens)}; "
            "the first is "
            f"{found.tokens[0][0]!r}"
        )
    print(f"  rows: {Path(args[0]) / 'batch.jsonl'}; every token: trivet report {found.out}")
