"""Many processes and servers: the first process asks, all train on the same; nobody waits for ever."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import pytest

from stub_vllm import Stub
from test_ranks import config, folder, killed_after, numbers, on_ranks, ragged, same, trained
from test_servers import impatient
from trivet.arguments import to_toml
from trivet.cli.main import main
from trivet.distributed import ranks
from trivet.generation import server
from trivet.generation.local import LocalServer
from trivet.runner import servers
from trivet.runner.launch import launch
from trivet.runner.resume import resume

pytestmark = pytest.mark.slow  # processes in numbers


@pytest.fixture(autouse=True)
def sampled_lengths_are_ragged():
    with ragged():
        yield


@pytest.fixture
def stub():
    """A server whose answers repeat."""
    made = Stub(folder() / "policy", seeded=True)
    yield made
    made.close()


def alone(stub: Stub) -> None:
    """In a forked process: without its copy of the stub's socket, which would be listened to after the stub is gone."""
    stub.http.socket.close()


def words(method: str, given, place: Path) -> list[str]:
    """The command line of a run with this config."""
    file = place / f"{method}.toml"
    file.write_text(to_toml(given))
    return [method, "--config", str(file)]


def comes(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether this is so, now or in a while."""
    end = time.monotonic() + seconds
    while not (so := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(so)


def lines(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {"dynamic_sampling": 2, "max_staleness": 1, "importance_cap": 1.001}),
        ("ppo", {"importance_cap": 1.001, "max_staleness": 1}),
        ("grpo", {"lora": 4, "max_staleness": 1}),
        ("pairwise-grpo", {}),
    ],
)
def test_servers_and_two_processes_give_what_they_give_one(stub, tmp_path, method, options):
    options = options | {"generate_with": (stub.url,), "lr": 1e-2}
    one = trained(method, tmp_path / "1", 0, **options)
    same(
        one, trained(method, tmp_path / "2", 2, **options), rounding=4e-5
    )  # of a sum over tokens, at this rate
    stale, out = options.get("max_staleness", 0), tmp_path / "2"
    assert [x["sampling/staleness"] for x in numbers(out)] == [min(stale, i) for i in range(4)]
    assert all(
        ((x["sampling/logprob_difference/max"] or 0) > 1e-4) == (stale > 0)
        for x in numbers(out)[1:]
    )
    assert all(x["servers/probe_difference"] < 1e-5 for x in numbers(out))
    versions = [[x["version"] for x in lines(run, "samples.jsonl")] for run in (one, out)]
    assert versions[0] == versions[1]
    assert not (out / "served").exists()


def test_more_processes_than_prompts_held_out(stub, tmp_path):
    """Four, who have no share in what is sampled."""
    options = {"generate_with": (stub.url,), "eval_limit": 1, "prompts_per_step": 2, "steps": 2}
    same(
        trained("grpo", tmp_path / "1", 0, **options), trained("grpo", tmp_path / "4", 4, **options)
    )


def test_a_server_that_dies_and_comes_back_changes_nothing_however_long_it_takes(stub, tmp_path):
    """The others wait meanwhile, and get a sign of life now and then: no message between processes takes long."""
    options = {"generate_with": (stub.url,)}
    one, back, heard = (
        trained("grpo", tmp_path / "1", 0, **options),
        list[Stub](),
        tmp_path / "heard",
    )
    stub.fault("", "", "", "", "", "", "", "die")  # the third group of the second step
    broadcast = ranks.broadcast

    def listened(*given):
        told = broadcast(*given)
        if told is None and os.environ["RANK"] == "1":
            with heard.open("a") as file:
                file.write(".")
        return told

    def signs() -> int:
        return heard.stat().st_size if heard.exists() else 0

    def revive(pids: list[int]) -> None:
        assert comes(lambda: stub.dead)
        before = signs()
        assert comes(lambda: signs() >= before + 5, seconds=30)
        back.append(
            Stub(folder() / "policy", port=stub.port, seeded=True)
        )  # it has the weights of its folder

    with patch.object(ranks, "broadcast", listened), patch.object(server, "MINUTE", 0.1):
        given = config("grpo", tmp_path / "2", **options)
        codes = on_ranks(2, lambda: alone(stub) or (launch(given) and 0), revive)
    back[0].close()
    assert codes == [0, 0]
    assert numbers(tmp_path / "2")[-1]["servers/resent"] >= 1
    for run in (one, tmp_path / "2"):  # but for these counts
        found = [
            {key: x for key, x in line.items() if not key.startswith("servers/")}
            for line in numbers(run)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    same(one, tmp_path / "2")


def test_without_a_server_all_stop_with_a_checkpoint_that_any_number_goes_on_from(
    stub, tmp_path, monkeypatch, capfd
):
    impatient(monkeypatch, 0.5)
    options = {"generate_with": (stub.url,), "group_size": 4, "kl_target": 1.0, "eval_every": 0}
    whole, out = trained("ppo", tmp_path / "whole", 2, **options), tmp_path / "run"
    stub.fault(*[""] * 10, "", "die")
    given = config("ppo", out, **options)
    command = words("ppo", given, tmp_path)
    codes = on_ranks(3, lambda: alone(stub) or main(command))
    said = capfd.readouterr().err
    assert codes == [2, 2, 2]
    assert said.count("trivet ppo: no server to generate with:") == 1
    assert said.count(f"stopped after step 2; to continue: trivet resume {out}") == 1
    assert "Traceback" not in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    assert not (out / "served").exists()
    back = Stub(folder() / "policy", port=stub.port, seeded=True)
    for size in (0, 2):
        shutil.copytree(out, here := tmp_path / str(size))
        if size:
            assert on_ranks(size, lambda here=here: resume(here) and 0) == [0] * size
        else:
            resume(here)
        same(whole, here)
    back.close()


def test_rollouts_not_yet_used_are_in_a_checkpoint_of_two(stub, tmp_path):
    options = {
        "generate_with": (stub.url,),
        "max_staleness": 1,
        "save_every": 2,
        "steps": 5,
        "lr": 1e-2,
    }
    whole, out = trained("grpo", tmp_path / "whole", 2, **options), tmp_path / "run"
    given = config("grpo", out, **options)
    assert on_ranks(2, lambda: alone(stub) or killed_after(3, given)) == [0, 0]
    shutil.copytree(out, one := tmp_path / "one")
    assert on_ranks(2, lambda: alone(stub) or (resume(out) and 0)) == [0, 0]
    resume(one)
    for run in (out, one):
        assert [x["sampling/staleness"] for x in numbers(run)] == [0, 1, 1, 1, 1]
        for own in (whole, run):  # but for these counts
            found = [
                {key: x for key, x in line.items() if not key.startswith("servers/")}
                for line in numbers(own)
            ]
            (own / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
        same(whole, run)


def test_before_the_first_step_nothing_is_left(tmp_path, monkeypatch, capfd):
    impatient(monkeypatch, 0.5)
    monkeypatch.setenv("TRIVET_VLLM_PYTHON", "/nowhere/python")
    for options, said in (
        (
            {"generate_with": ("http://127.0.0.1:9",)},
            "no server to generate with: http://127.0.0.1:9 can't be reached",
        ),
        ({"vllm": True}, "TRIVET_VLLM_PYTHON is /nowhere/python, which does not exist"),
    ):
        given = config("grpo", tmp_path / "run", **options)
        command = words("grpo", given, tmp_path)
        assert on_ranks(2, lambda command=command: main(command)) == [2, 2]
        found = capfd.readouterr().err
        assert found.count("trivet grpo:") == found.count(said) == 1
        assert "Traceback" not in found
        assert not (tmp_path / "run").exists()


def test_the_first_process_starts_a_server_which_ends_with_it_however_it_ends(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TRIVET_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setattr(servers, "LocalServer", partial(LocalServer, module="stub_vllm"))
    given, found = config("grpo", tmp_path / "run", steps=10000, vllm=True), list[int]()

    def of_server() -> list[int]:
        running = [path for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid())]
        return [
            int(path.name)
            for path in running
            if b"import os, runpy" in said(path / "cmdline") and named(path)
        ]

    def named(path: Path) -> bool:
        return str(tmp_path).encode() in said(path / "cmdline")

    def said(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError:
            return b""

    def kill(pids: list[int]) -> None:
        assert comes((tmp_path / "run" / "metrics.jsonl").exists)
        found.extend(of_server())
        environment = said(Path(f"/proc/{found[0]}/environ"))
        assert not any(
            line.startswith((b"RANK=", b"LOCAL_RANK=", b"MASTER_"))
            for line in environment.split(b"\0")
        )
        os.kill(pids[0], signal.SIGKILL)

    codes = on_ranks(2, lambda: launch(given) and 0, kill)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] > 0
    assert len(found) == 1
    assert comes(lambda: not of_server())
