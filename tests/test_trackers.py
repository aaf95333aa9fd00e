"""Trackers: what each wrote, read back by its own library; a missing package is a sentence, and a failing tracker ends no run.

The run that they follow is killed and resumed, and they know it as one, with every step once.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from stub_wandb import Stub
from trivet.cli.main import main
from trivet.store import trackers

INSTALLED = [name for name in trackers.OPEN if importlib.util.find_spec(name)]
PRESET = ["--preset", "arithmetic", "--prompts-per-step", "4"]


KILLED = """
import os, sys, time
from trivet.recipes import reward_model
from trivet.runner.launch import launch
def watch(launched, step, metrics):
    if step == 3:
        end = time.monotonic() + 60
        while "trackio" in sys.argv and stored() < 3 and time.monotonic() < end:
            time.sleep(0.05)  # it is told by a thread
        os.kill(os.getpid(), 9)
def stored():
    from trackio.sqlite_storage import SQLiteStorage
    return sum(len(SQLiteStorage.get_logs("trivet", run)) for run in SQLiteStorage.get_runs("trivet"))
toy = reward_model.PRESETS["arithmetic"] | {"prompts_per_step": 4, "steps": 4, "save_every": 2}
launch(reward_model.Config(**toy, out=sys.argv[1], track=tuple(sys.argv[2:])), watch)
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run of four steps, killed after the third and resumed from the second, that all installed trackers followed, and its metrics by step."""
    out = tmp_path_factory.mktemp("runs") / "tracked"
    env = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(out.parent / "trackio")}
    assert python(["-c", KILLED, str(out), *INSTALLED], env).returncode == -signal.SIGKILL
    ran = python(["-m", "trivet", "resume", str(out)], env)
    assert (ran.returncode, "left out" in ran.stderr) == (0, False), ran.stderr
    assert json.loads((out / "run.json").read_text())["resumed"] == [2]
    return out, recorded(out)


def python(arguments, environment):
    """A process of its own, without trackers' settings of this one."""
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))
    }
    env |= {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def recorded(out):
    """The metrics of a run by step, those that are known."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        line.pop("step"): {key: value for key, value in line.items() if value is not None}
        for line in lines
    }


def needs(name: str):
    """Skip where this tracker's package is not installed."""
    return pytest.mark.skipif(name not in INSTALLED, reason=f'needs pip install "trivet[{name}]"')


@pytest.mark.slow
@needs("tensorboard")
def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, metrics = tracked
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {key for line in metrics.values() for key in line}
    for key in events.Tags()["scalars"]:
        found = {event.step: event.value for event in events.Scalars(key)}
        assert len(found) == len(events.Scalars(key))
        assert found == pytest.approx(
            {step: line[key] for step, line in metrics.items() if key in line}, rel=1e-6
        )
    written = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert 'method = "reward-model"' in written
    assert "prompts_per_step = 4" in written


def is_time(key: str) -> bool:
    """Whether a step that is made again has another number there."""
    return key == "seconds" or key.startswith("time/")


def wandb_records(data: bytes) -> list[bytes]:
    """A LevelDB log, in which wandb keeps its records: 7 bytes, then blocks of 32 KiB with parts of records, 7 bytes before each."""
    records, at = [b""], 7
    while at + 7 < len(data):
        if at % 32768 > 32768 - 7:
            at += -at % 32768
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        records[-1] += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(b"")
    return records[:-1]


def wandb_history(path) -> tuple[list[dict], dict]:
    """Steps and options in a file that wandb sync would send."""
    from wandb.proto.wandb_internal_pb2 import Record

    history, config = [], {}
    for record in map(Record.FromString, wandb_records(path.read_bytes())):
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            history.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return history, config


def without_times(history) -> list[dict]:
    """Steps as W&B has them, without what it adds itself."""
    return [
        {key: value for key, value in line.items() if key == "_step" or key[0] != "_"}
        for line in history
    ]


@pytest.mark.slow
@needs("wandb")
def test_wandb_offline(tracked):
    out, metrics = tracked
    (path,) = (out / "wandb").glob(
        "offline-run-*/run-*.wandb"
    )  # that of the killed one ends in the middle
    history, config = wandb_history(path)
    assert without_times(history) == [{"_step": step, **line} for step, line in metrics.items()]
    assert config["method"] == "reward-model"
    assert config["prompts_per_step"] == 4


LIVES = """
import json, sys
from pathlib import Path
from trivet.store.trackers import trackers, send, until_end
out = Path(sys.argv[1])
for first, last, how in json.loads(sys.argv[2]):  # a life of the run: its record ends before first, it makes steps up to last
    out.mkdir(exist_ok=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "x": n / 2}) + "\\n" for n in range(1, first)))
    opened = trackers(["wandb"], out, {"a": 1}, "0a1b2c3d")
    steps = until_end(opened, [{"x": step / 2} for step in range(first, last + 1)])
    for step, metrics in enumerate(steps, first):
        send(opened, step, metrics)
        if step == last and how != "done":
            break
    steps.close()
    for path in out.glob("wandb/*/*.wandb") if how == "synced" else ():  # what wandb sync leaves
        path.with_name(path.name + ".synced").touch()
"""


@pytest.mark.slow
@needs("wandb")
def test_wandb_with_a_server_that_is_told_each_step_once(tmp_path):
    stub, known = Stub(), {"WANDB_API_KEY": "0" * 40}
    lives = [[1, 4, "stopped"], [3, 6, "stopped"], [7, 8, "done"]]  # the second resumed from step 2
    ran = python(
        ["-c", LIVES, str(tmp_path / "run"), json.dumps(lives)],
        known | {"WANDB_BASE_URL": stub.url},
    )
    stub.shutdown()
    stub.server_close()
    assert (ran.returncode, "left out" in ran.stderr, "WARNING" in ran.stderr) == (
        0,
        False,
        False,
    ), ran.stderr
    assert {run: without_times(lines) for run, lines in stub.runs.items()} == {
        "0a1b2c3d": [{"_step": step, "x": step / 2} for step in range(1, 9)]
    }


@pytest.mark.slow
@needs("wandb")
def test_wandb_offline_after_a_life_that_was_synced_is_a_run_of_its_own(tmp_path):
    lives = [[1, 4, "synced"], [3, 4, "stopped"], [5, 6, "done"]]
    out = tmp_path / "run"
    assert (
        python(["-c", LIVES, str(out), json.dumps(lives)], {"WANDB_MODE": "offline"}).returncode
        == 0
    )
    assert len(list(out.glob("wandb/offline-run-*/run-0a1b2c3d.wandb.synced"))) == 1
    (path,) = out.glob(
        "wandb/offline-run-*/run-0a1b2c3d-1.wandb"
    )  # by the file: folders of one second get a -1 of wandb's
    assert without_times(wandb_history(path)[0]) == [
        {"_step": step, "x": step / 2} for step in range(1, 7)
    ]


@pytest.mark.slow
@needs("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_a_file(tracked):
    import mlflow

    out, metrics = tracked
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("trivet").experiment_id])
    assert (run.info.run_name, run.info.status) == (out.name, "FINISHED")
    assert run.data.params["method"] == "reward-model"
    assert set(run.data.metrics) == {key for line in metrics.values() for key in line}
    for key in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, key)
        found = {metric.step: metric.value for metric in history}
        assert len(found) == len(history)
        if not is_time(key):  # the third step has those of its first time
            assert found == {step: line[key] for step, line in metrics.items() if key in line}


@pytest.mark.slow
@needs("trackio")
def test_trackio(tracked):
    out, metrics = tracked
    read = "from trackio.sqlite_storage import SQLiteStorage as s; import json; print(json.dumps({run: s.get_logs('trivet', run) for run in s.get_runs('trivet')}))"
    ((name, lines),) = json.loads(
        python(["-c", read], {"TRACKIO_DIR": str(out.parent / "trackio")}).stdout
    ).items()
    assert name == f"tracked-{json.loads((out / 'run.json').read_text())['id']}"
    found = [
        {key: line[key] for key in line if key != "timestamp" and not is_time(key)}
        for line in lines
    ]
    assert found == [
        {"step": step, **{k: x for k, x in line.items() if not is_time(k)}}
        for step, line in metrics.items()
    ]


def test_a_missing_package_and_an_unknown_name_are_one_sentence(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, said in (
        ("wandb", 'pip install "trivet[wandb]"'),
        ("wandbb", "tensorboard, wandb, trackio, mlflow"),
    ):
        assert main(["sft", *PRESET, "--steps", "1", "--out", str(out), "--track", name]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert f"--track {name}" in error
        assert error.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_a_tracker_left_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "nothing").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.OPEN, "nothing", None)
    with pytest.raises(trackers.InputError, match="not installed"):
        trackers.require(["nothing"])


@pytest.fixture
def followed(monkeypatch):
    """What a tracker named tensorboard was sent, and how it ended; it fails at the steps in `fails`."""
    seen: list = []
    fails: set[int] = set()

    def follow(out, config, identifier, done):
        seen.append("opened")
        try:
            while line := (yield):
                if line[0] in fails:
                    raise OSError("no route\nto host")
                seen.append(line)
            seen.append("done")
        except GeneratorExit:
            seen.append("failed")
            raise

    monkeypatch.setattr(trackers, "require", lambda names: None)
    monkeypatch.setattr("trivet.runner.checks.require", lambda names: None)
    monkeypatch.setitem(trackers.OPEN, "tensorboard", follow)
    return seen, fails


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(followed, tmp_path, capsys):
    seen, fails = followed
    fails.add(2)
    assert (
        main(
            [
                "sft",
                *PRESET,
                "--steps",
                "3",
                "--out",
                str(tmp_path / "run"),
                "--track",
                "tensorboard",
            ]
        )
        == 0
    )
    assert [line[0] for line in seen[1:]] == [1]
    said = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line]
    assert said == ["trivet: --track tensorboard failed and is now off: OSError: no route"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_fails_closes_its_trackers_as_failed(followed, tmp_path):
    seen, _ = followed
    (tmp_path / "mine.py").write_text(
        "n = 0\ndef r(completions, **k):\n    global n; n += 1\n    return [1 / (2 - n)] * len(completions)"
    )
    arguments = [
        "grpo",
        *PRESET,
        "--steps",
        "3",
        "--reward",
        f"{tmp_path / 'mine.py'}:r",
        "--track",
        "tensorboard",
    ]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert seen[0] == "opened"
    assert seen[-1] == "failed"
    assert [line[0] for line in seen[1:-1]] == [1]


def test_an_error_outside_of_the_recipe_closes_them_too(followed, tmp_path):
    seen, _ = followed
    opened = trackers.trackers(["tensorboard"], tmp_path, {}, "id")

    def loop():
        for step, metrics in enumerate(trackers.until_end(opened, [{"a": 1.0}] * 3), 1):
            trackers.send(opened, step, metrics)
            if step == 2:
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        loop()
    assert seen == ["opened", (1, {"a": 1.0}), (2, {"a": 1.0}), "failed"]


def test_what_is_not_known_is_not_sent_and_the_end_is_said(followed, tmp_path):
    seen, _ = followed
    opened = trackers.trackers(["tensorboard", "tensorboard"], tmp_path, {}, "id")
    for metrics in trackers.until_end(opened, [{"step": 1, "a": 1.0, "b": math.nan, "c": None}]):
        trackers.send(opened, 1, metrics)
    assert seen == ["opened", (1, {"a": 1.0}), "done"]
    assert opened == {}


def test_nothing_is_opened_where_nothing_is_asked_for(tmp_path):
    opened = trackers.trackers((), tmp_path / "run", {}, "id")
    assert not (tmp_path / "run").exists()
    assert list(trackers.until_end(opened, [{}, {}])) == [{}, {}]
