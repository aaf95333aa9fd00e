"""What a run writes is on the disk before it has its name; a write that fails costs a sentence; and a little of chaos.py."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import trivet.store.checkpoints as saving
from test_resume import KilledError, config, killed_after, numbers, same
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.recipes import dpo, sft
from trivet.runner.launch import launch
from trivet.runner.resume import resume
from trivet.store.files import to_disk


def files_in(path):
    return [one for one in (path, *path.rglob("*")) if one.is_file()]


def test_nothing_gets_its_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    synced, renamed, out = {}, [], tmp_path / "new" / "run"

    def known(about):
        return about.st_mtime_ns, about.st_size

    def fsync(handle, real=os.fsync):
        real(handle)
        about = os.fstat(handle)
        synced[about.st_ino] = known(about)

    def on_disk(path):
        return synced.get(path.stat().st_ino) == known(path.stat())

    def move(old, new, real=os.rename):
        record = [path for path in files_in(out) if path.suffix == ".jsonl" and path.parent == out]
        for path in (*files_in(Path(old)), *(record if Path(old).is_dir() else [])):
            assert on_disk(path), f"{path} is not on the disk when {old} becomes {new}"
        assert not Path(old).is_dir() or on_disk(Path(old))
        real(old, new)
        renamed.append(Path(new))

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.rename", move)
    monkeypatch.setattr("os.replace", move)
    with pytest.raises(KilledError):
        launch(config(dpo, out), killed_after(3))
    (out / "metrics.jsonl").write_text((out / "metrics.jsonl").read_text() + "{")
    resume(out)
    assert on_disk(out)
    assert on_disk(out / "checkpoints")
    for path in renamed:  # and so are the names, up to the folder that was there before
        if path.parent.exists() and path.name.partition(".")[2] not in ("jsonl", "safetensors"):
            while path != tmp_path:
                path = path.parent
                assert path.stat().st_ino in synced, path
    names = {path.name for path in renamed}
    assert names >= {
        "step-2",
        "step-4",
        "model",
        "config.toml",
        "run.json",
        "summary.json",
        "metrics.jsonl",
    }


@pytest.mark.parametrize("name", ["config.toml", "run.json", "metrics.jsonl"])
def test_a_kill_in_the_middle_of_a_file_leaves_the_one_before(tmp_path, name, monkeypatch):
    whole = launch(config(sft, tmp_path / "whole"))
    with pytest.raises(KilledError):
        launch(config(sft, tmp_path / "r"), killed_after(3))
    before = (tmp_path / "r" / name).read_bytes()

    def killed(self, data, *args, real=Path.write_text, **named):
        if name in self.name:
            data = data[: len(data) // 2]
        real(self, data, *args, **named)
        if name in self.name:
            raise KilledError

    def stop(path):
        if name in str(path):
            raise KilledError
        to_disk(path)

    monkeypatch.setattr(Path, "write_text", killed)
    monkeypatch.setattr("trivet.store.record.to_disk", stop)
    with pytest.raises(KilledError):
        resume(tmp_path / "r")
    monkeypatch.undo()
    assert (tmp_path / "r" / name).read_bytes() == before
    same(whole, resume(tmp_path / "r"))


@pytest.mark.parametrize("place", ["state", "weights", "model at the end"])
def test_half_a_tensor_file_is_seen_though_nobody_said_so(tmp_path, place, monkeypatch):
    whole = launch(config(sft, tmp_path / "whole"))

    def halved(call):
        def save(tensors, path, *args, **named):
            call(tensors, path, *args, **named)
            wanted = {
                "state": ".step-4/state",
                "weights": ".step-4/model",
                "model at the end": "r/.model/",
            }[place]
            if wanted in str(path):
                os.truncate(path, os.path.getsize(path) // 2)

        return save

    monkeypatch.setattr(saving, "save_file", halved(saving.save_file))
    modeling = "transformers.modeling_utils.safe_save_file"
    monkeypatch.setattr(modeling, halved(sys.modules["transformers.modeling_utils"].safe_save_file))
    with pytest.raises(InputError):
        launch(config(sft, tmp_path / "r"))
    assert not (tmp_path / "r" / "summary.json").exists()
    if place != "model at the end":
        assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.undo()
    assert main(["resume", str(tmp_path / "r")]) == 0
    same(whole, tmp_path / "r")


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("No space left on device (os error 28)"),  # as tokenizers raises it
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_can_not_be_written_is_a_sentence_that_says_how_to_go_on(
    tmp_path, error, monkeypatch, capsys
):
    whole = launch(config(sft, tmp_path / "whole"))

    def full(model, tokenizer, folder):
        if ".step-4" in str(folder):
            raise error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    monkeypatch.setattr(saving, "save_model", full)
    options = config(sft, tmp_path / "r")
    flags = [
        f"--{key.replace('_', '-')}={getattr(options, key)}"
        for key in ("steps", "data", "out", "save_every")
    ]
    flags += [
        f"--{key.replace('_', '-')}={getattr(options, key)}"
        for key in ("prompts_per_step", "eval_limit")
    ]
    flags += ["--eval-every=2", "--keep-tokens-every=2"]
    assert main(["sft", "--preset", "toy", *flags]) == 2
    said = capsys.readouterr().err
    assert "No space left" in said
    assert said.count("\n") == 1
    assert f"trivet resume {tmp_path / 'r'}" in said
    monkeypatch.undo()
    same(whole, resume(tmp_path / "r"))


def test_a_resumed_run_that_fails_in_its_first_step_can_still_be_resumed(tmp_path, monkeypatch):
    whole = launch(config(sft, tmp_path / "whole", save_every=0))
    with pytest.raises(KilledError):
        launch(config(sft, tmp_path / "r", save_every=0), killed_after(3))
    for _ in range(2):
        monkeypatch.setattr(
            "trivet.store.record._append",
            lambda path, lines: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "r")
        monkeypatch.undo()
    same(whole, resume(tmp_path / "r"))


def test_a_run_whose_first_checkpoint_fails_keeps_the_step_it_recorded(tmp_path, monkeypatch):
    whole = launch(config(sft, tmp_path / "whole", save_every=1))
    monkeypatch.setattr(
        saving, "save_model", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error"))
    )
    with pytest.raises(InputError, match="trivet resume"):
        launch(config(sft, tmp_path / "r", save_every=1))
    monkeypatch.undo()
    assert [line["step"] for line in numbers(tmp_path / "r")] == [1]
    same(whole, resume(tmp_path / "r"))


@pytest.mark.slow
def test_a_little_chaos():
    """The long form is `python tests/chaos.py --kills 200 --faults 200`."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("chaos.py")),
        "--kills",
        "4",
        "--faults",
        "7",
    ]
    ended = subprocess.run([*command, "--methods", "sft", "dpo"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counted = json.loads(ended.stdout.splitlines()[-1])
    assert counted["lost"] == 0
    assert counted["kills"] >= 4
    assert counted["faults"] >= 7
