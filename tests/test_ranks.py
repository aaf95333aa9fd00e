"""Many processes: the same losses and weights whatever their number, checkpoints that any number goes on from, one voice.

python tests/test_ranks.py [METHOD ...] prints the largest differences over 20 steps, for docs/experiments.md.
"""

import contextlib
import dataclasses
import gzip
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from test_rescue import broken_at
from test_resume import RECIPES, KilledError
from trivet.cli.main import main
from trivet.distributed.ranks import SharedEngine, balance
from trivet.generation import engine, sampling
from trivet.runner import prepare
from trivet.runner.launch import launch
from trivet.runner.resume import resume
from trivet.step.optimizer import Optimizer
from trivet.timing import Clock
from trivet.toy import STORIES

pytestmark = pytest.mark.slow  # processes in numbers

OF_REWARDS = {"reward": ("trivet.toy.stories:gold",), "group_size": 2, "max_completion_tokens": 10}
SMALL = {
    "ppo": OF_REWARDS | {"minibatches": 2, "critic_lr": 1e-3, "whiten_rewards": True},
    "grpo": OF_REWARDS | {"epochs_per_batch": 2, "scale_rewards": "batch"},
    "pairwise-grpo": OF_REWARDS,
}


@cache
def folder() -> Path:
    """Few rows, and a language model and a reward model of two layers whose weights are large enough to matter."""
    out, source = Path(tempfile.mkdtemp(prefix="trivet-ranks-")), Path(STORIES["model"])
    with gzip.open(STORIES["data"], "rt", encoding="utf-8") as file:
        (out / "few.jsonl").write_text("".join(file.readlines()[:60]))
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "num_labels": 1,
        "dtype": "float32",
    }
    torch.manual_seed(0)
    for name, kind in (
        ("policy", AutoModelForCausalLM),
        ("scorer", AutoModelForSequenceClassification),
    ):
        model = kind.from_config(AutoConfig.from_pretrained(source, **sizes)).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(out / name)
        for file in source.glob("token*"):
            shutil.copy(file, out / name)
    return out


def config(method: str, out: Path, **options):
    given = {
        "model": str(folder() / "policy"),
        "data": str(folder() / "few.jsonl"),
        "out": str(out),
        "quiet": True,
    }
    given |= {
        "prompts_per_step": 5,
        "steps": 4,
        "eval_every": 3,
        "eval_limit": 3,
        "lr": 1e-3,
        "max_grad_norm": 0.5,
    }
    given |= {"microbatch_tokens": 150, "max_completion_tokens": 24, "keep_tokens_every": 3}
    return RECIPES[method].Config(**given | SMALL.get(method, {}) | options)


def exact_draw(logits: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The draw in float64: in float32 one in 1e5 draws falls to the neighbor for the sake of rounding."""
    tokens = (
        (logits.double().softmax(-1).cumsum(-1) <= level.double())
        .sum(-1)
        .clamp(max=logits.shape[-1] - 1)
    )
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@contextlib.contextmanager
def ragged():
    """Sampling that ends early now and then, as of a trained model: one token in six is a stop."""
    stops = [1, *range(2, 85)]
    with (
        patch.object(sampling, "draw", exact_draw),
        patch.object(prepare, "stop_ids", lambda *args: stops),
    ):
        yield


@pytest.fixture(autouse=True)
def sampled_lengths_are_ragged():
    with ragged():
        yield


def on_ranks(
    size: int, work: Callable[[], object], late: Callable[[list[int]], None] = lambda pids: None
) -> list[int]:
    """Exit codes of so many processes that each do this work as if torchrun had started them; late: what is done to them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    pids = []
    for rank in range(size):
        if not (pid := os.fork()):
            code = 99
            try:
                os.environ.update(told, RANK=str(rank), LOCAL_RANK=str(rank))
                code = int(work() or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    try:
        late(pids)
    except BaseException:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def trained(method: str, out: Path, size: int, **options) -> Path:
    """A run by so many processes; 0: by one that torchrun has not started."""
    given = config(method, out, **options)
    if not size:
        return launch(given)
    assert on_ranks(size, lambda: launch(given) and 0) == [0] * size
    return out


def numbers(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: x for key, x in line.items() if "seconds" not in key and not key.startswith("time/")}
        for line in lines
    ]


def differences(one: Path, other: Path) -> tuple[float, float, str]:
    """The largest of any weight, and of any metric, by its size if that is above 1, with its name."""
    a, b = (load_file(*(run / "model").glob("*.safetensors")) for run in (one, other))
    assert a.keys() == b.keys()
    weights = max(float((a[key] - b[key]).abs().max()) for key in a)
    found = [(0.0, "")]
    for p, q in zip(numbers(one), numbers(other), strict=True):
        assert p.keys() == q.keys()
        found += [
            (abs(p[key] - q[key]) / max(1, abs(p[key])), key)
            for key in p
            if None not in (p[key], q[key])
        ]
    return weights, *max(found)


def same(one: Path, other: Path, rounding: float = 2e-5) -> None:
    """AdamW divides a gradient that is almost zero by its own size, so weights are rounded more coarsely than losses."""
    weights, metric, name = differences(one, other)
    assert weights < 5 * rounding, weights
    assert metric < rounding, (metric, name)
    a, b = ((run / "samples.jsonl").read_text().splitlines() for run in (one, other))
    assert [json.loads(line)["completion"] for line in a] == [
        json.loads(line)["completion"] for line in b
    ]


@pytest.mark.parametrize("method", RECIPES)
def test_the_number_of_processes_does_not_change_losses_and_weights(tmp_path, method):
    one = trained(method, tmp_path / "1", 1)
    for size in (2, 4):  # 5 groups are no multiple of either
        same(one, trained(method, tmp_path / str(size), size))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (
            "ppo",
            {
                "shared_critic": True,
                "kl_in": "loss",
                "reward": ("scorer", "trivet.toy.stories:gold"),
            },
        ),
        ("ppo", {"reward": ("scorer",), "kl_target": 1.0, "missing_eos_penalty": 1.0}),
        (
            "grpo",
            {"dynamic_sampling": 2, "loss_mean": "sequence", "baseline": "batch", "beta": 0.0},
        ),
        ("dpo", {"loss": "kto"}),
        ("sft", {"precision": "bfloat16"}),
        ("sft", {"gradient_checkpointing": True, "offload_optimizer": True}),
    ],
)
def test_neither_do_variants(tmp_path, method, options):
    options = dict(options) | {"steps": 2, "prompts_per_step": 3}  # of four ranks one has no group
    if "reward" in options:
        options["reward"] = tuple(
            str(folder() / "scorer") if name == "scorer" else name for name in options["reward"]
        )
    one = trained(method, tmp_path / "1", 1, **options)
    rounding = 2e-3 if "precision" in options else 2e-5
    same(one, trained(method, tmp_path / "4", 4, **options), rounding)


@pytest.mark.parametrize("method", ["reward-model", "grpo"])
def test_a_process_of_torchrun_does_as_one_without_it(tmp_path, method):
    """Sampling too, as long as all rows are written: then both draw for the same ones."""
    options = (
        {"max_completion_tokens": 1, "reward": (str(folder() / "scorer"),)}
        if method == "grpo"
        else {}
    )
    same(
        trained(method, tmp_path / "0", 0, **options), trained(method, tmp_path / "2", 2, **options)
    )


def killed_after(step: int, given) -> None:
    """A run that ends there, before anything of that step is written."""
    take, taken = Clock.take, []

    def count(clock):
        taken.append(clock)
        if len(taken) == step:
            raise KilledError
        return take(clock)

    with patch.object(Clock, "take", count), contextlib.suppress(KilledError):
        launch(given)


def words(given) -> list[str]:
    """The command line of sft with this config, whose switches are those that it needs."""
    flags = [
        (f.name.replace("_", "-"), getattr(given, f.name))
        for f in dataclasses.fields(given)
        if getattr(given, f.name) != f.default
    ]
    return [
        "sft",
        *(f"--{name}" if value is True else f"--{name}={value}" for name, value in flags),
    ]


def test_a_checkpoint_of_two_processes_resumes_on_one_and_on_four(tmp_path):
    options = {"steps": 4, "save_every": 2}
    whole = trained("ppo", tmp_path / "whole", 2, **options)
    assert on_ranks(2, lambda: killed_after(4, config("ppo", tmp_path / "2", **options))) == [0, 0]
    assert not (tmp_path / "2" / "model").exists()
    for size in (1, 2, 4):
        out = tmp_path / f"on {size}"
        shutil.copytree(tmp_path / "2", out)
        assert on_ranks(size, lambda out=out: resume(out) and 0) == [0] * size
        same(whole, out, 2e-5 if size != 2 else 1e-30)
    first = config("sft", tmp_path / "sft", **options)
    assert on_ranks(2, lambda: killed_after(4, first)) == [0, 0]
    resume(tmp_path / "sft")  # and on one that torchrun has not started
    same(trained("sft", tmp_path / "sft whole", 0, **options), tmp_path / "sft")


def test_a_checkpoint_of_one_process_resumes_on_two(tmp_path):
    options = {"steps": 4, "save_every": 2, "max_completion_tokens": 1}
    killed_after(4, config("ppo", tmp_path / "1", **options))
    assert on_ranks(2, lambda: resume(tmp_path / "1") and 0) == [0, 0]
    same(trained("ppo", tmp_path / "whole", 0, **options), tmp_path / "1")


def test_a_shard_whose_bytes_have_changed_is_not_resumed_from(tmp_path):
    given = config("sft", tmp_path / "2", steps=4, save_every=1)
    assert on_ranks(2, lambda: killed_after(4, given)) == [0, 0]
    shard = sorted((tmp_path / "2" / "checkpoints" / "step-3" / "shards").iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert on_ranks(2, lambda: resume(tmp_path / "2") and 0) == [0, 0]
    assert json.loads((tmp_path / "2" / "run.json").read_text())["resumed"] == [2]


def test_one_process_asks_the_reward_for_all(tmp_path):
    asked = tmp_path / "asked"
    (tmp_path / "counted.py").write_text(
        f"def f(completions, **columns):\n    open({str(asked)!r}, 'a').write('x')\n    return [float(len(x)) for x in completions]"
    )
    trained(
        "grpo",
        tmp_path / "run",
        2,
        reward=(f"{tmp_path / 'counted.py'}:f",),
        steps=2,
        eval_fraction=0.0,
    )
    assert asked.read_text() == "xx"


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_the_record_has_the_gradient_of_all_tokens(tmp_path, method):
    kept = []
    for size in (1, 2):
        run = trained(method, tmp_path / str(size), size, keep_tokens_every=1, steps=2)
        lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        kept.append([torch.tensor(line["gradient"]) for line in lines if "gradient" in line])
    assert len(kept[0]) == len(kept[1]) > 0
    assert all(
        torch.allclose(one, two, rtol=1e-2, atol=1e-6) for one, two in zip(*kept, strict=True)
    )


def test_a_failure_is_said_once_and_ends_all(tmp_path, capfd):
    (tmp_path / "bad.py").write_text(
        "def f(prompts, completions, **columns): raise ValueError('no idea')"
    )
    flags = [
        "--model",
        str(folder() / "policy"),
        "--max-completion-tokens",
        "3",
        "--steps",
        "2",
        "--quiet",
    ]
    broken = ["--reward", f"{tmp_path / 'bad.py'}:f", "--data", str(folder() / "few.jsonl")]
    for own in (["--data", str(tmp_path / "nothing.jsonl"), "--reward", "exact_match"], broken):
        codes = on_ranks(
            3, lambda own=own: main(["grpo", *flags, *own, "--out", str(tmp_path / "run")])
        )
        said = capfd.readouterr().err
        assert 2 in codes
        assert 0 not in codes
        assert said.count("trivet grpo:") == 1
        assert "Traceback" not in said
        assert not (tmp_path / "run").exists()


def test_a_signal_to_one_stops_all_after_the_same_step_with_a_checkpoint(tmp_path, capfd):
    given = config("sft", tmp_path / "run", steps=10_000, eval_every=0)

    def ask(pids: list[int]) -> None:
        for _ in range(1200):
            time.sleep(0.05)
            if (tmp_path / "run" / "metrics.jsonl").exists():
                break
        os.kill(pids[1], signal.SIGTERM)

    assert on_ranks(2, lambda: main(words(given)), ask) == [128 + signal.SIGTERM] * 2
    (step,) = [
        int(path.name.removeprefix("step-"))
        for path in (tmp_path / "run" / "checkpoints").glob("step-*")
    ]
    assert len(numbers(tmp_path / "run")) == step < 10_000
    assert capfd.readouterr().err.count(f"stopped after step {step} of 10000") == 1


def test_a_process_that_is_killed_ends_all_in_a_sentence(tmp_path, capfd):
    """And without that lock or orphans: the run goes on to the bits of one that was left alone."""
    options = {"steps": 4, "save_every": 2}
    whole = trained("sft", tmp_path / "whole", 2, **options)
    given = words(config("sft", tmp_path / "run", **options))

    def work() -> int:
        def killed(clock):
            taken.append(clock)
            if len(taken) == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return take(clock)

        taken, take = list[Clock](), Clock.take
        with patch.object(Clock, "take", killed):
            return main(given)

    assert on_ranks(2, work) == [2, -signal.SIGKILL]
    said = capfd.readouterr().err
    assert re.search(
        r"another rank exited; see its output above; stopped in step [34]; to continue: trivet resume",
        said,
    )
    assert "Traceback" not in said
    assert on_ranks(2, lambda: resume(tmp_path / "run") and 0) == [0, 0]
    same(whole, tmp_path / "run", 1e-30)


@pytest.mark.parametrize("rank", [0, 1])
def test_shards_that_can_not_be_written_are_a_sentence(tmp_path, capfd, rank):
    given = words(
        config("sft", tmp_path / "run", steps=4, save_every=2)
    )  # models are made before the limit

    def work() -> int:
        if os.environ["RANK"] == str(rank):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return main(given)

    assert on_ranks(2, work) == [2, 2]
    said = capfd.readouterr().err
    assert "File too large; free some space or fix the cause, then: trivet resume" in said
    assert said.count("trivet sft:") == 1
    assert "Traceback" not in said
    assert [*(tmp_path / "run" / "checkpoints").iterdir()] == []
    assert on_ranks(2, lambda: main(["resume", str(tmp_path / "run")])) == [0, 0]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), RuntimeError("[...] DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_on_one_process_is_a_sentence(tmp_path, capfd, error):
    def full(*_):
        if os.environ["RANK"] == "1":
            raise error
        return {}

    given = words(config("sft", tmp_path / "run"))
    with patch.object(Optimizer, "step", full):
        codes = on_ranks(2, lambda: main(given))
    said = capfd.readouterr().err
    assert codes[1] == 2
    assert said.count("out of memory on rank 1 in step 1; start more processes") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_step_that_several_processes_skip_is_replayed_in_one(
    tmp_path, capfd, monkeypatch, method
):
    """PPO's critic has moved in the step, so that it is reached from the start."""
    broken_at(monkeypatch, RECIPES[method], {3})
    trained(method, tmp_path / "run", 2, eval_every=0, keep_tokens_every=0)
    assert [line.get("skipped_updates", 0) > 0 for line in numbers(tmp_path / "run")] == [
        False,
        False,
        True,
        False,
    ]
    kept = tmp_path / "run" / "skipped" / "step-3"
    start = 2 if method == "grpo" else 0
    assert json.loads((kept / "replay.json").read_text()) == {
        "step": 3,
        "from": start,
        "processes": 2,
    }
    assert len((kept / "batch.jsonl").read_text().splitlines()) == 5
    for size in (1, 2):
        capfd.readouterr()
        assert on_ranks(size, lambda: main(["replay", str(kept)])) == [0] * size
        said = capfd.readouterr().out
        assert said.count("step 3 repeated: the gradient is not finite") == 1
        assert "equal to the recorded ones, up to rounding (2 processes took the step)" in said
        entries = re.findall(r": ([\d,]+) of ([\d,]+) entries", said)
        assert len(entries) == 5
        assert all(bad == count for bad, count in entries)
    assert main(["replay", str(kept)]) == 0
    assert f"torchrun -m trivet replay {kept}" in capfd.readouterr().out


def test_too_many_skipped_steps_of_several_processes_name_what_is_kept(
    tmp_path, capfd, monkeypatch
):
    broken_at(monkeypatch, RECIPES["sft"], {1, 2})
    given = config("sft", tmp_path / "run", max_skipped_steps=2, eval_every=0)
    assert on_ranks(2, lambda: main(words(given))) == [2, 2]
    assert (
        f"inspect one with trivet replay {tmp_path}/run/skipped/step-1, fix"
        in capfd.readouterr().err
    )


def test_groups_are_shared_by_their_lengths():
    assert balance([9, 1, 1, 1, 1, 5], 2) == [0, 1, 1, 1, 1, 1]
    assert balance([3], 4) == [0]
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 100, (40,), generator=draw).tolist()
        loads = [
            sum(n for n, r in zip(lengths, balance(lengths, 4), strict=True) if r == rank)
            for rank in range(4)
        ]
        assert max(loads) - min(loads) < max(lengths) / 2


def test_a_rows_noise_does_not_depend_on_who_else_is_written():
    drawn = {}
    for own in ([0, 1, 2, 3, 4, 5], [1, 4], [0, 2, 3, 5]):
        sampler = engine.Engine(lambda *ids: "", [0], 4, 1.0, torch.Generator().manual_seed(7))
        sampler = SharedEngine(**vars(sampler), ranks=None)
        sampler.rows, sampler.total_rows = torch.tensor(own), 6
        for kept in (list(range(len(own))), [len(own) - 1]):  # the others have ended
            for row, level in zip(
                sampler.rows[kept].tolist(), sampler.noise(torch.tensor(kept)), strict=True
            ):
                drawn.setdefault((row, len(kept) == 1), set()).add(float(level))
    assert all(len(levels) == 1 for levels in drawn.values())


def test_checkpointed_layers_keep_less_and_change_nothing(tmp_path):
    kept = []

    def run(**options) -> Path:
        sizes = []

        def count(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = trained("sft", tmp_path / f"{options}", 0, **options)
        kept.append(sum(sizes))
        return out

    plain, checkpointed = run(steps=2), run(steps=2, gradient_checkpointing=True)
    assert (plain / "model" / "model.safetensors").read_bytes() == (
        checkpointed / "model" / "model.safetensors"
    ).read_bytes()
    assert numbers(plain) == numbers(checkpointed)
    assert kept[1] < kept[0] / 2


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        with tempfile.TemporaryDirectory() as scratch, ragged():
            os.environ["XDG_CACHE_HOME"] = scratch
            runs = {
                n: trained(name, Path(scratch) / str(n), n, steps=20, prompts_per_step=6)
                for n in (1, 2, 4)
            }
            for n in (2, 4):
                weights, metric, which = differences(runs[1], runs[n])
                print(
                    f"{name:14} 1 against {n}: weights {weights:.1e}, metrics {metric:.1e} ({which})",
                    flush=True,
                )
