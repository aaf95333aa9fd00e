"""Kill runs at any moment, break their writes, cut their power; resume them, and compare with runs that were left alone.

    python tests/chaos.py --kills 200 --faults 200 --seed 1     # the six methods and adapters in turn; prints a table

Each life is forked from a process that has imported everything, so it is short, and a moment drawn from it falls into the run's
own work; every third is drawn from its writes. A run ends whole if all files of its model are the same bytes, and metrics.jsonl,
samples.jsonl and summary.json the same but for the times. Exits with 1 if anything was lost.
"""

import argparse
import builtins
import errno
import fcntl
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that forks has one thread

import torch
import transformers.modeling_utils

from trivet import timing
from trivet.cli.main import main as trivet
from trivet.data.rows import read_rows
from trivet.recipes import dpo, grpo, pairwise_grpo, ppo, reward_model, sft  # noqa: F401
from trivet.report import terminal  # noqa: F401
from trivet.runner import launch
from trivet.store import checkpoints, record
from trivet.store.checkpoints import damage, steps
from trivet.toy import STORIES

METHODS = (
    "sft",
    "reward-model",
    "dpo",
    "ppo",
    "grpo",
    "pairwise-grpo",
    "ppo --lora 4",
)  # a critic of adapters too
STEPS = 7
OPTIONS = f"--preset toy --steps {STEPS} --prompts-per-step 3 --max-completion-tokens 24 --eval-limit 3 --save-every 2 --eval-every 3"
OPTIONS += " --keep-tokens-every 3 --quiet"
PHASES = (
    "loading",
    "generation",
    "reward",
    "update",
    "evaluation",
    "record",
    "checkpoint",
    "restoring",
    "the end",
)
WRITES = [PHASES.index(name) for name in ("record", "checkpoint", "the end")]
FAULTS = (
    "full disk",
    "file too large",
    "EIO",
    "ENOSPC",
    "half a write, then EIO",
    "half a tensor file",
    "power cut",
)
HANGS, LIVES = (
    120,
    12,
)  # seconds that a life may take, lives that are disturbed before a run is left to end


# Inside a life ------------------------------------------------------------------------------------------------------


class Board:
    """What a life tells its parent, in memory that both see: its phase, the step it last saved, its steps, its calls."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 64)

    def __getitem__(self, place: int) -> int:
        return struct.unpack_from("q", self.memory, 8 * place)[0]

    def __setitem__(self, place: int, value: int) -> None:
        struct.pack_into("q", self.memory, 8 * place, value)


PHASE, SAVED, TAKEN, CALLED = range(4)


def around(
    owner: Any,
    name: str,
    before: Callable[..., Any],
    after: Callable[..., Any] = lambda *args: None,
) -> None:
    """From now on these are called around that function, with its arguments; after with what before returned in front."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        known = before(*args)
        result = original(*args, **kwargs)
        after(known, *args)
        return result

    setattr(owner, name, call)


def watched(board: Board) -> None:
    """Write the phase and the saved step to the board."""

    def enter(phase: str) -> Callable[..., int]:
        def begin(*_: Any) -> int:
            known, board[PHASE] = board[PHASE], PHASES.index(phase)
            return known

        return begin

    def leave(known: int, *_: Any) -> None:
        board[PHASE] = known

    def saved(known: int, _: Any, step: int, *__: Any) -> None:
        board[PHASE], board[SAVED] = known, step

    def recorded(known: int, *_: Any) -> None:
        board[PHASE] = known
        board[TAKEN] += 1

    around(checkpoints.Checkpoints, "save", enter("checkpoint"), saved)
    around(record.Record, "step", enter("record"), recorded)
    for owner, name, phase in (
        (checkpoints.Checkpoints, "choose_start", "restoring"),
        (checkpoints.Checkpoints, "_restore", "restoring"),
        (record.Record, "begin", "record"),
        (record.Record, "end", "the end"),
        (launch, "save_whole", "the end"),
    ):
        around(owner, name, enter(phase), leave)

    def turn(_: Any, part: str) -> None:
        board[PHASE] = PHASES.index(
            part if part in ("generation", "reward", "evaluation") else "update"
        )

    around(timing.Clock, "turn", turn)


def failing(board: Board, number: int, action: Callable[..., Any]) -> None:
    """From now on the call of this number that writes, syncs, renames or makes a folder is answered by action(what, call).

    Writes are those of Python's own files. What libraries in Rust write is reached by the full disk and the limit on a file.
    """

    def counted(what: str, call: Callable[..., Any], *args: Any) -> Any:
        board[CALLED] += 1
        return action(what, call, *args) if board[CALLED] == number else call(*args)

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            return counted("write", super().write, data)

    real = io.open

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        *args: Any,
        **named: Any,
    ) -> Any:
        if not set(mode) & set("wax+") or isinstance(file, int):
            return real(file, mode, buffering, encoding, *args, **named)
        buffered = io.BufferedWriter(File(file, mode.replace("b", "").replace("t", "")))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=encoding)

    io.open = builtins.open = opened  # type: ignore[assignment]
    for name in ("fsync", "rename", "replace", "mkdir"):
        setattr(os, name, partial(counted, name, getattr(os, name)))


def refused(number: int) -> Callable[..., Any]:
    """A call that fails with this error."""

    def action(what: str, *_: Any) -> Any:
        raise OSError(number, os.strerror(number), what)

    return action


def half(what: str, call: Callable[..., Any], *args: Any) -> Any:
    """A write of which half arrives before it fails; any other call fails."""
    if what == "write":
        call(bytes(args[0])[: len(args[0]) // 2])
    raise OSError(errno.EIO, os.strerror(errno.EIO), what)


def halved(board: Board, number: int) -> None:
    """The tensor file of this number is written as half of itself, without a word."""

    def after(_: Any, __: Any, path: Any, *___: Any) -> None:
        board[CALLED] += 1
        if board[CALLED] == number:
            os.truncate(path, os.path.getsize(path) // 2)

    for owner, name in (
        (checkpoints, "save_file"),
        (transformers.modeling_utils, "safe_save_file"),
    ):
        around(owner, name, lambda *_: None, after)


def noted(place: Path, shadow: Path) -> None:
    """Put aside what fsync has made safe: bytes of files, names in folders. All that is there now counts as safe."""
    fsync, rename, held = os.fsync, os.rename, []

    def safe(handle: int) -> None:
        held.append(os.dup(handle))  # so that no other file gets its number
        about = os.fstat(handle)
        if stat.S_ISDIR(about.st_mode):
            names = {name: os.stat(name, dir_fd=handle).st_ino for name in os.listdir(handle)}
            content = json.dumps(names).encode()
        else:
            with open(f"/proc/self/fd/{handle}", "rb") as file:
                content = file.read()
        kind = "folder" if stat.S_ISDIR(about.st_mode) else "file"
        (shadow / "new").write_bytes(content)
        rename(shadow / "new", shadow / f"{about.st_ino}.{kind}")

    for path in (place, *place.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        safe(handle)
        os.close(handle)
    around(os, "fsync", lambda *_: None, lambda _, handle: safe(handle))
    assert fsync is not os.fsync


class Life:
    """A forked process that runs this command line."""

    def __init__(self, words: list[str], board: Board, prepare: Callable[[], Any] = lambda: None):
        board[PHASE], board[TAKEN], board[CALLED] = (
            -1,
            0,
            0,
        )  # -1: what is to happen to it is not prepared yet
        self.heard, told = os.pipe()  # not a file: its size may be limited
        self.pid = os.fork()
        if self.pid:
            os.close(told)
            return
        code = 99
        try:
            fcntl.fcntl(told, fcntl.F_SETPIPE_SZ, 1 << 20)
            os.dup2(told, 1)
            os.dup2(told, 2)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  the old one may think it is a file
            os.environ["XDG_CACHE_HOME"] = str(
                Path(words[-1]).parent / "cache"
            )  # the reference that dpo remembers
            watched(board)
            prepare()
            board[PHASE] = 0
            code = trivet(words)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def gone(self) -> bool:
        """Whether it has ended; it can still be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> tuple[int, str]:
        """Kill it if it still runs; its exit code and what it said."""
        os.kill(self.pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with open(self.heard, encoding="utf-8", errors="replace") as file:
            return code, file.read()


# From outside -------------------------------------------------------------------------------------------------------


def cut_power(place: Path, shadow: Path, draw: random.Random) -> None:
    """Leave what a power cut may leave: of all that was not synced any part, by the draw, of what was synced everything."""
    now = {path.stat().st_ino: path for path in (place, *place.rglob("*"))}

    def content(number: int) -> bytes:
        synced = shadow / f"{number}.file"
        kept = synced.read_bytes() if synced.exists() else b""
        late = now[number].read_bytes() if number in now else kept
        if not late.startswith(kept):  # it was written over in place
            return draw.choice([kept, late, late[: draw.randint(0, len(late))]])
        arrived = draw.choice([len(kept), len(late), draw.randint(len(kept), len(late))])
        return late[:arrived] + draw.choice(
            [b"", bytes(len(late) - arrived)]
        )  # zeros: the size came, the bytes did not

    def put(number: int, path: Path) -> None:
        synced = shadow / f"{number}.folder"
        if not synced.exists() and not (number in now and now[number].is_dir()):
            path.write_bytes(content(number))
            return
        path.mkdir()
        before: dict[str, int] = json.loads(synced.read_text()) if synced.exists() else {}
        after = (
            {one.name: one.stat().st_ino for one in now[number].iterdir()} if number in now else {}
        )
        for name in sorted(before | after):
            if one := draw.choice([before.get(name), after.get(name)]):
                put(one, path / name)

    left = place.with_name("left")
    put(place.stat().st_ino, left)
    shutil.rmtree(place)
    left.rename(place)


class Chaos:
    """All runs, and the counts."""

    def __init__(self, folder: Path, small: Path | None, seed: int):
        self.folder, self.small, self.draw = folder, small, random.Random(seed)
        self.whole: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.kills, self.faults, self.methods, self.lost = (
            Counter[str](),
            Counter[str](),
            Counter[str](),
            list[str](),
        )
        self.data = folder / "few.jsonl"
        rows = [row for row, _ in zip(read_rows(STORIES["data"]), range(80), strict=False)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.runs = self.turns = 0

    def words(self, method: str, run: Path) -> list[str]:
        """The command line that begins this run, or goes on with it."""
        if (run / "config.toml").exists():
            return ["resume", str(run)]
        return [*method.split(), *OPTIONS.split(), "--data", str(self.data), "--out", str(run)]

    def left_alone(self, method: str) -> None:
        """The run to compare with; how long it takes, and how many calls that can fail it makes."""
        self.whole[method] = self.folder / f"whole-{method}" / "run"
        self.whole[method].parent.mkdir()
        board, began = Board(), time.perf_counter()
        alone = Life(self.words(method, self.whole[method]), board, lambda: failing(board, 0, half))
        assert self.ended(alone, method, expected=(0,)) == 0
        self.seconds[method], self.calls[method] = time.perf_counter() - began, board[CALLED]

    def run(self, method: str, disturbed: Callable[[str, Path, Board], None], place: Path) -> None:
        """One run, disturbed again and again until it ends."""
        self.runs += 1
        if method not in self.whole:
            self.left_alone(method)
        out, board, seen = place / "run", Board(), dict[str, set[str]]()
        place.mkdir()
        faults = self.faults.total()
        for number in range(LIVES + 1):
            if number < LIVES:
                disturbed(method, out, board)
            else:
                self.undisturbed(method, out, board)
            found = list(wrong(out, board[SAVED], seen))
            if found or (ended := (out / "summary.json").exists()):
                break
        for trouble in found or (
            differences(self.whole[method], out, seen) if ended else ["it never ends"]
        ):
            self.lost.append(f"{method}, run {self.runs}: {trouble}")
            print(f"LOST: {self.lost[-1]}", flush=True)
        self.methods[f"faults in {method}"] += self.faults.total() - faults
        shutil.rmtree(place)

    def undisturbed(self, method: str, out: Path, board: Board) -> None:
        self.ended(Life(self.words(method, out), board), method, expected=(0,))

    def moment(self, life: Life, method: str, out: Path, board: Board) -> None:
        """Wait for a moment of this life: in any of the steps it has left, its loading or its end, or while it writes."""
        left = STEPS - max((step for step, _ in steps(out / "checkpoints")), default=0)
        step, writing = self.draw.randint(0, left), self.draw.random() < 1 / 3
        until = step, WRITES if writing else range(len(PHASES))
        while not life.gone() and not (board[TAKEN] >= until[0] and board[PHASE] in until[1]):
            time.sleep(0.0005)
        time.sleep(self.draw.uniform(0, 0.03 if writing else self.seconds[method] / (STEPS + 2)))

    def killed(
        self, method: str, out: Path, board: Board, prepare: Callable[[], None] = lambda: None
    ) -> str:
        """A life that is killed; the phase in which that was, '' where it had ended."""
        life = Life(self.words(method, out), board, prepare)
        self.moment(life, method, out, board)
        if life.gone():
            self.ended(life, method, expected=(0,))
            return ""
        life.end()
        return PHASES[board[PHASE]]

    def kill(self, method: str, out: Path, board: Board) -> None:
        """Kill it once."""
        if phase := self.killed(method, out, board):
            self.kills[phase] += 1
            self.methods[f"kills of {method}"] += 1

    def fault(self, method: str, out: Path, board: Board) -> None:
        """Break something that it relies on, once."""
        self.turns += 1
        kinds = FAULTS if self.small else FAULTS[1:]
        kind = kinds[self.turns % len(kinds)]
        if kind == "power cut":
            shadow = self.folder / "shadow"
            shadow.mkdir()
            if phase := self.killed(method, out, board, lambda: noted(out.parent, shadow)):
                cut_power(out.parent, shadow, self.draw)
                self.faults[f"{kind}: {phase}"] += 1
            shutil.rmtree(shadow)
            return
        number = self.draw.randint(1, self.calls[method])
        tensors, limit = self.draw.randint(1, 6), int(10 ** self.draw.uniform(2.5, 6.5))
        prepare: dict[str, Callable[[], Any]] = {
            "full disk": lambda: None,
            "file too large": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            "EIO": lambda: failing(board, number, refused(errno.EIO)),
            "ENOSPC": lambda: failing(board, number, refused(errno.ENOSPC)),
            "half a write, then EIO": lambda: failing(board, number, half),
            "half a tensor file": lambda: halved(board, tensors),
        }
        ballast = out.parent / "ballast"
        life = Life(self.words(method, out), board, prepare[kind])
        happened = False
        if kind == "full disk":
            self.moment(life, method, out, board)
            happened = not life.gone()
            with ballast.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(65536))
        code = self.ended(life, method, expected=(0, 2))
        ballast.unlink(missing_ok=True)
        if (
            happened
            or code == 2
            or board[CALLED] >= (tensors if kind == "half a tensor file" else number)
        ):
            self.faults[f"{kind}: {'stopped in a sentence' if code == 2 else 'went on'}"] += 1

    def ended(self, life: Life, method: str, expected: tuple[int, ...]) -> int:
        """Wait for it; its exit code. What it should not have done is counted as lost."""
        until = time.perf_counter() + HANGS
        while not life.gone() and time.perf_counter() < until:
            time.sleep(0.002)
        hangs = not life.gone()
        code, said = life.end()
        if hangs or code not in expected or "Traceback" in said:
            self.lost.append(
                f"{method}, run {self.runs}: {'it hangs' if hangs else f'exit code {code}'}: {said[-1500:]}"
            )
            print(f"LOST: {self.lost[-1]}", flush=True)
        return code


def wrong(run: Path, saved: int, seen: dict[str, set[str]]) -> Iterator[str]:
    """What should not be so after a life; seen gets the lines that are recorded."""
    whole = [step for step, folder in steps(run / "checkpoints") if not damage(folder)]
    if saved and max(whole, default=0) < saved:
        yield f"the checkpoint of step {saved} is gone: {[(s, damage(f)) for s, f in steps(run / 'checkpoints')]}"
    if saved and not (run / "config.toml").exists():
        yield "config.toml is gone"
    for name in ("metrics.jsonl", "samples.jsonl"):
        path, at = run / name, list[int]()
        for line in path.read_text(errors="replace").split("\n")[:-1] if path.exists() else ():
            with suppress(ValueError):  # of a line in the middle: what is cut at resume
                at.append(json.loads(line)["step"])
                seen.setdefault(name, set()).add(json.dumps(untimed(line)))
        if name == "metrics.jsonl" and at[: max(whole, default=0)] != list(
            range(1, max(whole, default=0) + 1)
        ):
            yield f"metrics.jsonl has the steps {at} at a checkpoint of step {max(whole)}"


def differences(whole: Path, run: Path, seen: dict[str, set[str]]) -> Iterator[str]:
    """What is not the same in a run that was disturbed, the times aside; and what it had recorded and has no more."""
    names = sorted(path.name for path in (whole / "model").glob("*"))
    if names != sorted(path.name for path in (run / "model").glob("*")):
        yield "model/ has other files"
        return
    for name in names:
        if (whole / "model" / name).read_bytes() != (run / "model" / name).read_bytes():
            yield f"model/{name} differs"
    for name in ("metrics.jsonl", "samples.jsonl"):
        if not (whole / name).exists() and not (run / name).exists():
            continue
        one, other = (
            [untimed(line) for line in (path / name).read_text().splitlines()]
            for path in (whole, run)
        )
        if one != other:
            yield f"{name} differs"
        if seen.get(name, set()) - {json.dumps(line) for line in other}:
            yield f"{name} has lost lines"
    summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, run)]
    for key in ("steps", "eval", "tokens_generated", "tokens_trained", "data", "parameters"):
        if summaries[0][key] != summaries[1][key]:
            yield f"summary.json: {key} differs"
    if extra := {path.name for path in run.rglob(".*")} - {".lock"}:
        yield f"left over: {extra}"


def untimed(line: str) -> dict[str, object]:
    """The numbers without those of the clock."""
    return {
        key: x
        for key, x in json.loads(line).items()
        if key != "seconds" and not key.startswith("time/")
    }


def main() -> int:
    """Kill and break, resume, compare, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):  # ends with the table
        signal.signal(number, signal.default_int_handler)
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        small.mkdir()
        mounted = "--inside" in os.environ.get("CHAOS", "") and not subprocess.call(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)]
        )
        chaos = Chaos(Path(folder), small if mounted else None, chosen.seed)
        order = random.Random(chosen.seed).sample(chosen.methods, len(chosen.methods))
        try:
            while (
                killing := chaos.kills.total() < chosen.kills
            ) or chaos.faults.total() < chosen.faults:
                method = order[chaos.runs % len(order)]
                kind, place = (chaos.kill, Path(folder)) if killing else (chaos.fault, small)
                chaos.run(method, kind, place / f"place-{chaos.runs}")
                done = (
                    f"{chaos.runs} runs, {chaos.kills.total()} kills, {chaos.faults.total()} faults"
                )
                print(
                    f"{done}, lost {len(chaos.lost)}: {method}, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
        except KeyboardInterrupt:
            print("stopped; what was counted so far:")
        finally:
            if mounted:
                subprocess.call(["umount", str(small)])
    for what, counts in (
        ("kills by phase", chaos.kills),
        ("faults by kind", chaos.faults),
        ("both", chaos.methods),
    ):
        print(f"{what}: {counts.total()}")
        for name, n in sorted(counts.items()):
            print(f"  {n:5} {name}")
    counts = {
        "kills": chaos.kills.total(),
        "faults": chaos.faults.total(),
        "runs": chaos.runs,
        "lost": len(chaos.lost),
    }
    print(json.dumps(counts))
    return bool(chaos.lost)


if __name__ == "__main__":
    inside = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
    ]  # where a small disk can be mounted
    if (
        "CHAOS" not in os.environ
        and shutil.which("unshare")
        and not subprocess.call([*inside, "true"])
    ):
        os.environ["CHAOS"] = "--inside"
        os.execvp("unshare", [*inside, sys.executable, *sys.argv])
    sys.exit(main())
