"""Gather run directories into one payload for the report page: read leniently, truncated to a size
budget, every truncation noted.

A run that is still going, was stopped, has half a line at the end of a file, or is older than
run.json is read as far as possible. Nothing is made up: missing data is left out, and the page does
not draw it.
"""

import json
import math
import os
import re
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from trivet.recipes import METHODS
from trivet.report import compare
from trivet.report.plots import run_colors
from trivet.report.warnings import Warning, warnings
from trivet.step.option_texts import PACKAGE, Option, file_of, options_of
from trivet.store.reading import require_run, run_names, state

POINTS = 600  # most points of a line in a chart; longer lines are averaged
TEXT, TOKENS = 5_000, 2_000  # most characters of a text, most tokens of a completion
PLAIN_BYTES = 600_000  # budget for samples without tokens, for all runs together

Line = dict[str, Any]


def gather(runs: Sequence[Path], token_bytes: int = 3_000_000) -> dict[str, Any]:
    """The payload for report.page.build_page from these run directories. token_bytes: budget for
    samples with tokens, for all runs together.
    """
    for run in runs:
        require_run(run)
    read = [_read(run) for run in runs]
    methods = [run["method"] for run in read]
    for run, name, color in zip(read, run_names(runs, methods), run_colors(methods), strict=True):
        run |= {"name": name, "color": color}
    indexes = [_index(run / "samples.jsonl") for run in runs]
    left = {True: token_bytes, False: PLAIN_BYTES}
    smallest_first = sorted(range(len(runs)), key=lambda i: sum(size for *_, size, _ in indexes[i]))
    for waiting, i in zip(range(len(runs), 0, -1), smallest_first, strict=True):
        read[i]["samples"] = {}
        for kept, kind in ((True, "tokens"), (False, "plain")):
            read[i]["samples"][kind] = _samples(
                runs[i] / "samples.jsonl", indexes[i], kept, left[kept] // waiting
            )
            left[kept] -= len(json.dumps(read[i]["samples"][kind]["steps"]))
    comparison = _comparison(read) if len(read) > 1 else None
    for run in read:
        held = compare.heldout_numbers(run.pop("summary"))
        run["last"] = {
            title: held[key]
            for key, title in compare.COLUMNS.items()
            if _number(held.get(key)) is not None
        }
    return _finite({"made": time.time(), "runs": read, "comparison": comparison})


def turning_point(
    steps: Sequence[float],
    true: Sequence[float],
    learned: Sequence[float],
    true_se: float | None = None,
) -> dict[str, Any] | None:
    """Find where the smoothed true reward is highest, and whether it falls from there to the end
    while the learned reward still rises.

    Smoothing is a mean over a tenth of the points. A fall counts if it exceeds six standard errors
    of such a mean (a maximum is above its neighbors by chance alone), a rise if it exceeds four.
    The noise of a point is true_se if given, otherwise estimated from second differences, which
    ignore a trend. Returns step, peak, fall and rise, their thresholds fall_noise and rise_noise,
    and turns, whether both exceed them; None for fewer than five points.
    """
    width = max(1, len(steps) // 10)
    if len(steps) < 5:
        return None
    flat, rising = _smooth(true, width), _smooth(learned, width)
    top = max(range(len(flat)), key=flat.__getitem__)
    fall, rise = flat[top] - flat[-1], rising[-1] - rising[top]
    noise = {
        "fall_noise": 6 * (true_se or _noise(true)) / width**0.5,
        "rise_noise": 4 * _noise(learned) / width**0.5,
    }
    turns = fall > noise["fall_noise"] and rise > noise["rise_noise"]
    return {
        "turns": turns,
        "step": steps[top],
        "peak": flat[top],
        "fall": fall,
        "rise": rise,
    } | noise


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of up to width neighbors around each point."""
    after = width // 2 + 1
    windows = [values[max(0, i - (width - 1) // 2) : i + after] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _noise(values: Sequence[float]) -> float:
    seconds = [a - 2 * b + c for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return (sum(x * x for x in seconds) / len(seconds) / 6) ** 0.5


# ---- one run


def _read(run: Path) -> dict[str, Any]:
    record, summary, judged = (_json(run / f"{name}.json") for name in ("run", "summary", "judged"))
    toml = (
        (run / "config.toml").read_text(errors="replace") if (run / "config.toml").exists() else ""
    )
    named = re.match(r"# trivet ([\w-]+) ", toml)
    method = record.get("method") or summary.get("method") or (named[1] if named else "")
    lines = [
        line for line in _lines(run / "metrics.jsonl") if _number(line.get("step")) is not None
    ]
    options = record.get("options") or _toml(toml)
    evaluated = {
        key: value for line in lines for key, value in line.items() if key.startswith("eval/")
    }
    last = lines[-1] if lines else {}
    done, planned = (
        int(last.get("step", 0)),
        record.get("steps") or summary.get("steps") or options.get("steps") or 0,
    )
    recent = [line for line in lines[-20:] if _number(line.get("seconds")) is not None]
    status = state(
        run, record.get("pid"), [b["seconds"] - a["seconds"] for a, b in pairwise(recent)]
    )
    pace = (
        (recent[-1]["seconds"] - recent[0]["seconds"]) / (len(recent) - 1)
        if len(recent) > 1
        else None
    )
    began = record.get("began") or ((run / "config.toml").stat().st_mtime if toml else None)
    explained, true = _options_of(record, method), _true(record, options, lines, judged)
    warned = warnings(options, lines)
    if true and true["turn"] and true["turn"]["turns"]:
        turn = true["turn"]
        reason = f"the {true['name']} reward was {turn['peak']:.3g} around step {turn['step']:g} "
        reason += f"and has fallen by {turn['fall']:.2g} since, while the learned reward rose by "
        reason += f"{turn['rise']:.2g}"
        help = "fewer --steps, a larger --beta, or a reward model trained on completions of this "
        help += "policy"
        warned.append(Warning("The reward is over-optimized", reason, help))
    return {
        "method": method,
        "status": status,
        "done": done,
        "planned": planned,
        "began": began,
        "seconds": summary.get("seconds", _number(last.get("seconds"))),
        "left": pace and status == "running" and max(0.0, (planned - done) * pace),
        "about": {
            key: _portable_path(record.get(key, summary.get(key)))
            for key in ("started_from", "parameters", "device", "machine", "versions", "data")
        },
        "example": _example(record.get("example")),
        "options": [
            {
                "name": key,
                "value": _portable_path(value),
                "default": key in explained and _same(value, explained[key].default),
            }
            | ({"help": explained[key].text} if key in explained else {})
            for key, value in options.items()
        ],
        "warnings": [asdict(warning) for warning in warned],
        "metrics": thin(lines),
        "heldout": thin(
            [
                {key: line.get(key) for key in ("step", *evaluated)}
                for line in lines
                if evaluated.keys() & line.keys()
            ]
        ),
        "time": {
            key.removeprefix("time/"): sum(_number(line.get(key)) or 0 for line in lines)
            for key in sorted({key for line in lines for key in line if key.startswith("time/")})
        },
        "speed": thin(_speed(lines)),
        "memory": summary.get("memory") or {},
        "peak_memory": summary.get("peak_memory_bytes"),
        "summary": summary | {"eval": summary.get("eval") or evaluated},
        "true": true,
        "judged": {
            "checkpoints": judged.get("checkpoints") or [],
            "samples": [_cut(sample) for sample in judged.get("samples") or []],
        },
    }


def _options_of(record: Line, method: str) -> dict[str, Option]:
    """The descriptions of the options of the run's recipe; if that no longer exists, of the options
    that all recipes have.
    """
    source = str(record.get("recipe") or method)
    try:
        return options_of(
            file_of(METHODS[source]) if source in METHODS else Path(source).with_suffix(".py")
        )
    except (OSError, ValueError, SyntaxError):
        return options_of(PACKAGE / "step" / "options.py", "SamplingOptions")


def _true(record: Line, options: Line, lines: list[Line], judged: Line) -> dict[str, Any] | None:
    """The learned reward against one that is only recorded (weight 0, or the judge's if the method
    samples nothing), and its turning point.
    """
    weights = record.get("reward_weights") or {
        re.split(r"[/:]", str(name).rstrip("/"))[-1]: weight
        for name, weight in zip(
            options.get("reward") or (), options.get("reward_weights") or (), strict=False
        )
    }
    for name in (name for name, weight in weights.items() if weight == 0):
        key = f"rewards/{name}/mean"
        both = [
            line
            for line in lines
            if _number(line.get(key)) is not None and _number(line.get("reward")) is not None
        ]
        if both:
            steps, true, learned = ([line[k] for line in both] for k in ("step", key, "reward"))
            chart = thin(
                [
                    {"step": line["step"], "true": line[key], "learned": line["reward"]}
                    for line in both
                ]
            )
            return {"name": name, "chart": chart, "turn": turning_point(steps, true, learned)}
    needed = ("step", "gold", "learned")
    points = [
        p
        for p in judged.get("checkpoints") or []
        if None not in [_number(p.get(key)) for key in needed]
    ]
    if len(points) < 2:
        return None
    chart = thin(
        [
            {"step": point["step"], "true": point["gold"], "learned": point["learned"]}
            for point in points
        ]
    )
    errors = [error for point in points if (error := _number(point.get("gold_se"))) is not None]
    steps, true, learned = ([point[key] for point in points] for key in ("step", "gold", "learned"))
    turn = turning_point(steps, true, learned, sum(errors) / len(errors) if errors else None)
    return {"name": "gold", "chart": chart, "turn": turn}


def _example(example: Line | None) -> Line | None:
    """The example of the data report, with long texts cut."""
    if not example:
        return None
    spans = [
        [(_cut_text(str(text), TEXT), on) for text, on in each]
        for each in example.get("completions") or []
    ]
    return {"prompt": _cut_text(_prompt_text(example.get("prompt")), TEXT), "completions": spans}


def _speed(lines: list[Line]) -> list[Line]:
    """Tokens per second, sampled and trained together, of every step without its evaluation."""
    speeds, before = [], 0.0
    for line in lines:
        now, tokens = (
            _number(line.get("seconds")),
            [_number(line.get(f"tokens/{kind}")) for kind in ("generated", "trained")],
        )
        spent = (now or 0) - before - (_number(line.get("time/evaluation")) or 0)
        if spent > 0 and any(tokens):
            speeds.append(
                {"step": line["step"], "tokens": sum(count or 0 for count in tokens) / spent}
            )
        before = before if now is None else now
    return speeds


def thin(lines: list[Line]) -> dict[str, Any]:
    """Turn lines into columns of at most POINTS points: {"per": N, "steps": [...], "series": {name:
    {"mean", "low", "high"}}}.

    If there are more lines, a point is the mean over N lines, with their minimum and maximum.
    """
    per = max(1, math.ceil(len(lines) / POINTS))
    buckets = [lines[i : i + per] for i in range(0, len(lines), per)]
    names = list(
        dict.fromkeys(
            key for line in lines for key in line if not key.startswith(("time/", "tokens/"))
        )
    )
    series: dict[str, Any] = {}
    for name in (name for name in names if name not in ("step", "seconds")):
        values = [
            [x for line in bucket if (x := _number(line.get(name))) is not None]
            for bucket in buckets
        ]
        if any(values):
            series[name] = {
                "mean": [_short(sum(some) / len(some), 5) if some else None for some in values]
            }
            if per > 1:
                series[name] |= {"low": [_short(min(some)) if some else None for some in values]}
                series[name] |= {"high": [_short(max(some)) if some else None for some in values]}
    return {
        "per": per,
        "steps": [bucket[len(bucket) // 2]["step"] for bucket in buckets],
        "series": series,
    }


# ---- samples

Index = list[tuple[int, int, int, bool]]  # per line: step, offset, size, whether it has tokens


def _index(path: Path) -> Index:
    """Locate the lines of samples.jsonl without parsing them, as they may be long; half a line at
    the end is left out.
    """
    index: Index = []
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                step = re.match(rb'\{"step": ?(\d+)', line)
                if step and line.endswith(b"\n"):
                    index.append(
                        (
                            int(step[1]),
                            file.tell() - len(line),
                            len(line),
                            b'"tokens": [' in line or b'"tokens":[' in line,
                        )
                    )
    return index


def _samples(path: Path, index: Index, kept: bool, budget: int) -> dict[str, Any]:
    """The completions of as many steps as fit into budget bytes, evenly spread, including the first
    and the last.

    kept: take the steps with tokens, else the others. Returns {"steps": [{"step", "samples":
    [...]}, ...], "of": the number of all such steps}.
    """
    with_tokens = {step for step, _, _, tokens in index if tokens}
    places: dict[int, list[tuple[int, int]]] = {}
    for step, offset, size, _ in index:
        if (step in with_tokens) == kept:
            places.setdefault(step, []).append((offset, size))
    if not places:
        return {"steps": [], "of": 0}

    def of_step(step: int) -> dict[str, Any]:
        samples = []
        with path.open("rb") as file:
            for offset, size in places[step]:
                file.seek(offset)
                line = _parse(file.read(size))
                samples += [_cut(line)] if line else []
        return {"step": step, "samples": samples}

    def spread(count: int) -> list[int]:
        steps = list(places)
        return (
            [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
            if count > 1
            else steps[-1:]
        )

    raw = {step: sum(size for _, size in lines) for step, lines in places.items()}
    last = next(reversed(places))
    rate = len(json.dumps(of_step(last))) / raw[last]
    count = min(
        len(places), int(1.2 * len(places) * budget / max(1.0, rate * sum(raw.values()))) + 1
    )
    while True:
        steps = [of_step(step) for step in spread(count)]
        size = len(json.dumps(steps))
        if size <= budget or count == 1:
            break
        count = max(1, min(count - 1, int(count * budget / size)))
    while size > budget and len(steps[0]["samples"]) > 1:  # a single step that is too large
        del steps[0]["samples"][-1:]
        size = len(json.dumps(steps))
    return {"steps": steps, "of": len(places)}


def _cut(sample: Line) -> Line:
    """Cut one completion: long texts shortened, numbers per token rounded to four digits."""
    cut: Line = {}
    count = len(sample["tokens"]) if isinstance(sample.get("tokens"), list) else 0
    for key, value in sample.items():
        if key in ("prompt", "completion"):
            cut[key] = _cut_text(_prompt_text(value), TEXT)
        elif key == "tokens" and count:
            cut[key] = [_cut_text(str(token), 200) for token in value[:TOKENS]]
        elif key == "advantage" and count and isinstance(value, int | float):
            cut[key] = [_short(value)] * min(count, TOKENS)  # one for the whole completion
        elif isinstance(value, list):
            if len(value) == count:  # an array of another length is not per token
                cut[key] = [_short(x) if isinstance(x, float) else x for x in value[:TOKENS]]
        else:
            cut[key] = _short(value, 6) if isinstance(value, float) else value
    return cut | ({"more_tokens": count - TOKENS} if count > TOKENS else {})


def _prompt_text(prompt: Any) -> str:
    """A prompt as text; chat messages become lines of role and content."""
    if isinstance(prompt, list):
        turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in prompt]
        return "\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    return "" if prompt is None else str(prompt)


def _cut_text(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"


# ---- several runs


def _comparison(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The measured numbers, the methods, and each run's path through reward and KL."""
    numbers = [compare.heldout_numbers(run["summary"]) for run in runs]
    shown = [
        key
        for key in compare.COLUMNS
        if any(_number(held.get(key)) is not None for held in numbers)
    ]
    rows = []
    for run, held in zip(runs, numbers, strict=True):
        whole = {"peak_memory_bytes", "seconds", "tokens_generated", "tokens_trained"} <= run[
            "summary"
        ].keys()
        cost = (
            [compare.memory(run["summary"]), compare.compute(run["summary"])] if whole else ["", ""]
        )
        rows.append([*compare.cells(held, shown), *cost])
    about = [compare.METHODS.get(run["method"], ("", "", "", "")) for run in runs]
    return {
        "measured": {
            "heads": [*(compare.COLUMNS[key] for key in shown), "memory", "compute"],
            "rows": rows,
        },
        "about": {
            "heads": ["objective", "reward model needed", "stages", "best for"],
            "rows": about,
        },
        "frontier": _frontier(runs),
    }


def _frontier(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out reward against KL, one point per evaluation: the judge's if it scored any run, else
    the runs' own.
    """

    def of_judge(run: dict[str, Any]) -> list[Line]:
        points = [
            {
                "step": point.get("step"),
                "kl": point.get("kl"),
                "reward": point.get("gold"),
                "se": point.get("gold_se"),
            }
            for point in run["judged"]["checkpoints"]
        ]
        held = run["summary"]["eval"]
        end = {
            name: held.get(f"eval/{key}")
            for name, key in (("kl", "kl"), ("reward", "gold"), ("se", "gold_se"))
        }
        return points or [end | {"step": run["done"]}]

    def of_run(run: dict[str, Any]) -> list[Line]:
        held = run["heldout"]
        kl, reward = (
            held["series"].get(f"eval/{key}", {}).get("mean", []) for key in ("kl", "reward")
        )
        return [
            {"step": s, "kl": k, "reward": r}
            for s, k, r in zip(held["steps"], kl, reward, strict=False)
        ]

    for name, points_of in (
        ("gold reward, by one judge for all", of_judge),
        ("each run's own reward", of_run),
    ):
        lines = [
            [p for p in points_of(run) if None not in (_number(p["kl"]), _number(p["reward"]))]
            for run in runs
        ]
        if any(lines):
            return {"reward": name, "lines": lines}
    return {"reward": "", "lines": []}


# ---- small things


def _portable_path(value: Any) -> Any:
    """Strip the machine-specific start of a path, or of several: for files shipped with Trivet, and
    for files below the current directory.
    """
    if isinstance(value, list | tuple):
        return [_portable_path(each) for each in value]
    if not isinstance(value, str) or not value.startswith(os.sep):
        return value
    inside = re.search(r"/(trivet/toy/.*)", value)
    return inside[1] if inside else value.removeprefix(f"{Path.cwd()}{os.sep}")


def _same(value: Any, default: Any) -> bool:
    return (list(default) if isinstance(default, tuple) else default) == (
        list(value) if isinstance(value, tuple) else value
    )


def _json(path: Path) -> Line:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}


def _lines(path: Path) -> list[Line]:
    """The objects in a JSON lines file; lines that are not JSON, such as half a line at the end,
    are left out.
    """
    try:
        return [line for raw in path.read_bytes().splitlines() if (line := _parse(raw))]
    except OSError:
        return []


def _parse(raw: bytes) -> Line:
    try:
        value = json.loads(raw)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _toml(text: str) -> Line:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits else None


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _finite(value: Any) -> Any:
    """The same value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
