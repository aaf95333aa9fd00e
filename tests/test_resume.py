"""Resume: a run that was killed goes on to the same bits; checkpoints are whole or not there."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from conftest import few_rows
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.model.text import load_tokenizer
from trivet.recipes import dpo, grpo, pairwise_grpo, ppo, reward_model, sft
from trivet.runner import launch as launching
from trivet.runner.launch import launch
from trivet.runner.resume import resume
from trivet.runner.stopping import Stopped
from trivet.store import record as recording
from trivet.store.checkpoints import damage, steps
from trivet.toy import STORIES

RECIPES = {
    "sft": sft,
    "reward-model": reward_model,
    "dpo": dpo,
    "ppo": ppo,
    "grpo": grpo,
    "pairwise-grpo": pairwise_grpo,
}
SMALL = {
    "steps": 5,
    "prompts_per_step": 4,
    "eval_limit": 3,
    "save_every": 2,
    "eval_every": 2,
    "keep_tokens_every": 2,
}


class KilledError(BaseException):
    """As good as a kill: nothing catches it."""


def config(recipe, out, **options):
    return recipe.Config(
        **recipe.PRESETS["toy"] | {"data": few_rows()} | SMALL | options | {"out": str(out)}
    )


def killed_after(step):
    """A watcher that ends the run there, before anything else is written."""

    def watch(launched, done, metrics):
        if done == step:
            raise KilledError

    return watch


def numbers(run, name="metrics.jsonl"):
    """The lines, without the times that the clock gave."""
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [
        {key: x for key, x in line.items() if key != "seconds" and not key.startswith("time/")}
        for line in lines
    ]


def same(one, other):
    assert (one / "model" / "model.safetensors").read_bytes() == (
        other / "model" / "model.safetensors"
    ).read_bytes()
    assert numbers(one) == numbers(other)
    assert numbers(one, "samples.jsonl") == numbers(other, "samples.jsonl")
    kept = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    for key in ("eval", "steps", "tokens_generated", "tokens_trained", "data", "parameters"):
        assert kept[0][key] == kept[1][key]


VARIANTS = {
    **{name: (recipe, {}) for name, recipe in RECIPES.items()},
    "ppo, everything": (
        ppo,
        {
            "kl_target": 3.0,
            "minibatches": 2,
            "shared_critic": True,
            "lr_decay": True,
            "warmup_steps": 2,
        }
        | {
            "group_size": 2,
            "max_completion_tokens": 16,
        },  # small: five planted defects are tried on it
    ),
    "dapo": (grpo, grpo.PRESETS["dapo"]),
    "kto": (dpo, dpo.PRESETS["kto"]),
    "adapters, layers checkpointed, merged": (
        grpo,
        {
            "lora": 4,
            "gradient_checkpointing": True,
            "merge": True,
            "epochs_per_batch": 2,
            "max_completion_tokens": 16,
        },
    ),
    "from scratch": (grpo, grpo.PRESETS["arithmetic"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, name):
    recipe, options = VARIANTS[name]
    short = (
        {"max_completion_tokens": 8}
        if hasattr(recipe.Config, "group_size") and name != "from scratch"
        else {}
    )
    killed_at(tmp_path, recipe, options | short, (3,))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_it_does_so_wherever_it_was_killed(tmp_path, name):
    """Before the first checkpoint, after it, after the last step; completions of any length."""
    killed_at(tmp_path, *VARIANTS[name], (1, 3, 5))


def killed_at(folder, recipe, options, at):
    """A run that is killed after each of these steps and goes on is the one that was left alone."""
    whole = launch(config(recipe, folder / "whole", **options | SMALL))
    for step in at:
        with pytest.raises(KilledError):
            launch(config(recipe, folder / f"{step}", **options | SMALL), killed_after(step))
        same(whole, resume(folder / f"{step}"))
    assert [step for step, _ in steps(whole / "checkpoints")] == [2, 4]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path):
    whole = launch(config(ppo, tmp_path / "whole"))
    with pytest.raises(KilledError):
        launch(config(ppo, tmp_path / "r"), killed_after(0))
    assert not (tmp_path / "r").exists()
    with pytest.raises(KilledError):
        launch(config(ppo, tmp_path / "r"), killed_after(3))
    for step in (4, 5, 5):
        with pytest.raises(KilledError):
            resume(tmp_path / "r", killed_after(step))
    same(whole, resume(tmp_path / "r"))
    assert json.loads((tmp_path / "r" / "run.json").read_text())["resumed"] == [2, 4, 4, 4]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A killed run with checkpoints at 2 and 4, and the whole one."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KilledError):
        launch(config(grpo, folder / "killed"), killed_after(4))
    return folder / "killed", launch(config(grpo, folder / "whole"))


@pytest.mark.parametrize(
    "harm", ["flip", "cut", "gone", "no manifest", "manifest is not JSON", "half written"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, stopped, harm, capsys):
    killed, whole = stopped
    run = tmp_path / "r"
    shutil.copytree(killed, run)
    last = run / "checkpoints" / "step-4"
    path = last / ("manifest.json" if "manifest" in harm else "state.safetensors")
    if harm == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "manifest is not JSON":
        path.write_text("{")
    elif harm == "half written":
        last.rename(last.with_name(".step-4"))
    else:
        path.unlink()
    assert damage(last) != ""
    assert main(["resume", str(run)]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert ("is damaged" in said and "step-4" in said) == (harm != "half written")
    same(whole, run)


def test_lines_after_the_checkpoint_are_cut_not_doubled(tmp_path, stopped):
    killed, whole = stopped
    run = tmp_path / "r"
    shutil.copytree(killed, run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward": 1.0}\n{"step": 6, "rew')
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "completion": "half a li')
    same(whole, resume(run))


def test_what_can_not_go_on_says_so(tmp_path, stopped, capsys):
    killed, whole = stopped
    for argument, said in (
        (whole, "is done"),
        (tmp_path, "is not a run directory"),
        (tmp_path / "no", "is not a run"),
    ):
        assert main(["resume", str(argument)]) == 2
        assert said in capsys.readouterr().err
    assert main(["grpo", "--preset", "toy", "--out", str(killed)]) == 2
    assert f"trivet resume {killed}" in capsys.readouterr().err
    run = tmp_path / "r"
    shutil.copytree(killed, run)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"start": "0"}))
    with pytest.raises(InputError, match="has changed since the run began"):
        resume(run)


def test_what_does_not_change_the_result_may_be_given_anew(tmp_path, stopped, monkeypatch):
    run = tmp_path / "r"
    shutil.copytree(stopped[0], run)
    assert (
        main(["resume", str(run), "--save-every", "1", "--keep=3", "--microbatch-tokens", "1000"])
        == 0
    )
    known = (run / "config.toml").read_text()
    assert all(
        line in known for line in ("save_every = 1\n", "keep = 3\n", "microbatch_tokens = 1000\n")
    )
    assert json.loads((run / "run.json").read_text())["options"]["keep"] == 3
    norms = [[line["grad_norm"] for line in numbers(out)] for out in (run, stopped[1])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # the last one in other microbatches


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--lr 0.1",
            "--lr would change what the run computes; resume accepts only --generate-with, --vllm, --track, --save-every",
        ),
        ("--keep 1 --out elsewhere", "--out would change"),
        ("--keep -1", "--keep is -1; it must be at least 0"),
        ("--keepp 1", "unknown option --keepp; the nearest known one is --keep"),
        ("again", "'again' belongs to no option"),
        (
            "--generate-with http://127.0.0.1:1",
            "this run samples in its own process; resume without --vllm",
        ),
        ("--track tensorflow", "unknown --track tensorflow; choose from tensorboard"),
    ],
)
def test_what_changes_the_result_may_not(tmp_path, stopped, capsys, monkeypatch, words, said):
    monkeypatch.setenv("TRIVET_SERVER_TIMEOUT", "1")
    run = tmp_path / "r"
    shutil.copytree(stopped[0], run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["resume", str(run), *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_with_servers_goes_on_with_servers(tmp_path, stopped):
    run = tmp_path / "r"
    shutil.copytree(stopped[0], run)
    toml = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        toml.replace("generate_with = []", 'generate_with = ["http://127.0.0.1:1"]')
    )
    with pytest.raises(InputError, match="samples with vLLM servers; resume with --vllm or"):
        resume(run, generate_with=())
    with pytest.raises(InputError, match="unknown key 'lrr'; the nearest known one is 'lr'"):
        resume(run, lrr=1.0)


def test_one_process_a_directory(tmp_path, stopped):
    run = tmp_path / "r"
    shutil.copytree(stopped[0], run)

    def second(launched, step, metrics):
        if step == 5:
            with pytest.raises(InputError, match="another process"):
                resume(run)

    same(stopped[1], resume(run, second))  # the lock of a killed process is none


def test_a_run_that_goes_on_is_not_loaded_a_second_time(tmp_path, stopped, monkeypatch):
    """Two models might not fit into the memory that one has."""
    run = tmp_path / "r"
    shutil.copytree(stopped[0], run)

    def second(launched, step, metrics):
        if step == 5:
            monkeypatch.setattr(launching, "Launch", None)
            with pytest.raises(InputError, match="another process"):
                resume(run)
            monkeypatch.undo()

    same(stopped[1], resume(run, second))


def test_what_a_reward_function_has_forked_does_not_hold_the_lock(tmp_path, stopped):
    """A pool's workers outlive a process that is killed."""
    forked, run = list[int](), tmp_path / "r"

    def fork(launched, step, metrics):
        if step == 3:
            told, tell = os.pipe()
            if not (pid := os.fork()):
                os.write(tell, b".")  # by now it has let go
                time.sleep(100)
                os._exit(0)
            forked.append(pid)
            os.read(told, 1)
            raise KilledError

    with pytest.raises(KilledError):
        launch(config(grpo, run), fork)
    try:
        same(stopped[1], resume(run))
    finally:
        os.kill(forked[0], signal.SIGKILL)
        os.waitpid(forked[0], 0)


def test_a_file_system_without_locks_will_do(tmp_path, stopped, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(recording.fcntl, "flock", no_locks)
    run = tmp_path / "r"
    shutil.copytree(stopped[0], run)
    same(stopped[1], resume(run))


def test_paths_are_meant_from_where_the_run_was_begun(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    shutil.copy(few_rows(), tmp_path / "here" / "data.jsonl")
    (tmp_path / "here" / "mine.py").write_text(
        "def f(completions, **columns):\n    return [1.0 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    options = {"data": "data.jsonl", "reward": ("mine.py:f",), "steps": 3}
    with pytest.raises(KilledError):
        launch(config(grpo, "run", **options), killed_after(2))
    for moved in ("data.jsonl", "mine.py"):
        monkeypatch.chdir(tmp_path / "there")
        with pytest.raises(
            InputError,
            match=rf"{moved} is relative to .*here, where the run started; run `cd .*here && trivet resume",
        ):
            resume("../here/run")
        (tmp_path / "there" / moved).write_bytes((tmp_path / "here" / moved).read_bytes())
    resume("../here/run")  # what it names is here too


@pytest.mark.slow
def test_data_that_has_changed_is_seen(tmp_path, stopped):
    run, data, notes = tmp_path / "r", tmp_path / "data.jsonl", list[str]()
    rows = Path(few_rows()).read_text().splitlines(keepends=True)
    data.write_text("".join(rows))
    with pytest.raises(KilledError):
        launch(config(grpo, run, data=str(data)), killed_after(3))

    def hear(launched, step, metrics):
        launched.run.note = notes.append

    data.write_text("".join(rows[:60]))
    with pytest.raises(
        InputError,
        match=r"data.jsonl, or the code that reads it, has changed .*: 7\d examples then, 5\d now",
    ):
        resume(run, hear)
    data.write_text("".join([*rows[:-1], rows[-1].replace("the", "a")]))  # a row that was mended
    shutil.copytree(run, tmp_path / "other")
    resume(tmp_path / "other", hear)
    assert any("not be bit-identical" in note for note in notes)
    data.write_text("".join(rows))
    notes.clear()
    same(stopped[1], resume(run, hear))
    assert notes == []


@pytest.mark.slow
def test_a_reward_that_has_changed_is_seen(tmp_path, monkeypatch):
    """A function's file, a reward model's folder; both are gone on with."""
    monkeypatch.setattr(
        "trivet.store.fingerprint.END", 10_000
    )  # the model's weights are a large file
    run, notes, (mine, model) = tmp_path / "r", list[str](), (tmp_path / "mine.py", tmp_path / "rm")
    mine.write_text("def short(completions, **_):\n    return [-len(x) for x in completions]\n")
    AutoModelForSequenceClassification.from_pretrained(
        STORIES["model"], num_labels=1
    ).save_pretrained(model)
    load_tokenizer(STORIES["model"]).save_pretrained(model)
    (tmp_path / "brevity").mkdir()  # a folder that has the name of a built-in, by chance
    (tmp_path / "brevity" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    rewards = (f"{mine}:short", str(model), "trivet.toy.stories:gold", "brevity")
    with pytest.raises(KilledError):
        launch(config(grpo, run, reward=rewards), killed_after(3))
    assert set(json.loads((run / "run.json").read_text())["rewards"]) == set(rewards[:3])

    def hear(launched, step, metrics):
        launched.run.note = notes.append

    shutil.copytree(run, tmp_path / "other")
    resume(tmp_path / "other", hear)
    assert notes == []
    mine.write_text(mine.read_text().replace("-len", "-2 * len"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))  # the last number
    resume(run, hear)
    assert [note.split(" has changed")[0] for note in notes] == [
        f"reward {name}" for name in rewards[:2]
    ]


@pytest.mark.slow
def test_nobody_needs_to_listen(tmp_path, stopped):
    """A pipe whose reader has gone, a disk that is full below the log."""
    flags = [
        "--preset",
        "toy",
        "--data",
        few_rows(),
        "--steps",
        "5",
        "--prompts-per-step",
        "4",
        "--eval-limit",
        "3",
    ]
    flags += ["--save-every", "2", "--eval-every", "2", "--keep-tokens-every", "2"]
    read, write = os.pipe()
    os.close(read)
    for name, out in ("closed", os.fdopen(write, "w")), ("full", Path("/dev/full").open("w")):  # noqa: SIM115
        run = tmp_path / name
        command = [sys.executable, "-m", "trivet.cli.main", "grpo", *flags, "--out", str(run)]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
        out.close()
        assert (done.returncode, done.stderr) == (0, "")
        same(stopped[1], run)


def test_a_full_disk_is_said_before_the_run_and_leaves_what_is_there(
    tmp_path, stopped, monkeypatch
):
    free = shutil._ntuple_diskusage(10, 10, 1000)
    monkeypatch.setattr("trivet.store.checkpoints.shutil.disk_usage", lambda path: free)
    with pytest.raises(InputError, match=r"0\.00 GB are free"):
        launch(config(grpo, tmp_path / "r"))
    assert not (tmp_path / "r").exists()
    monkeypatch.undo()
    monkeypatch.setattr("trivet.store.checkpoints.write_json", _full)
    run = tmp_path / "again"
    shutil.copytree(stopped[0], run)
    shutil.rmtree(run / "checkpoints" / "step-4")
    with pytest.raises(
        InputError, match=r"No space left on device; free some space .* then: trivet resume"
    ):
        resume(run)
    monkeypatch.undo()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    same(stopped[1], resume(run))


def _full(path, content):
    raise OSError(28, "No space left on device")


def test_old_checkpoints_are_removed_where_that_is_asked_for(tmp_path):
    run = launch(config(sft, tmp_path / "r", save_every=1, keep=2))
    assert [step for step, _ in steps(run / "checkpoints")] == [3, 4]


def test_without_save_every_there_is_one_every_ten_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "SAVE_SECONDS", 0.0)
    run = launch(config(sft, tmp_path / "r", save_every=0))
    assert [step for step, _ in steps(run / "checkpoints")] == [3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path, stopped, number):
    def ask(launched, step, metrics):
        if step == 2:
            os.kill(os.getpid(), number)

    run = tmp_path / "r"
    before = signal.signal(
        number, lambda *_: None
    )  # else a signal that is not heard would end the tests
    try:
        with pytest.raises(
            Stopped, match=r"stopped after step 3 of 5; to continue: trivet resume"
        ) as ended:
            launch(config(grpo, run), ask)
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert [step for step, _ in steps(run / "checkpoints")] == [2, 3]
    resume(run)
    assert numbers(run) == numbers(stopped[1])


def test_a_signal_that_is_ignored_stays_so(tmp_path, stopped):
    """As nohup and the background jobs of a script leave it."""

    def ask(launched, step, metrics):
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with suppress(Stopped):
            same(stopped[1], launch(config(grpo, tmp_path / "r"), ask))
        assert (tmp_path / "r" / "summary.json").exists()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_reward_function_has_forked_ends_by_a_signal_as_ever(tmp_path):
    """A pool ends its workers so, and waits for them."""

    def fork(launched, step, metrics):
        if step == 1:
            read, write = os.pipe()
            if not (pid := os.fork()):
                os.write(write, b"up")
                time.sleep(20)
                os._exit(0)
            os.read(read, 2)  # Python drops signals of the first moment
            os.kill(pid, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM

    launch(config(grpo, tmp_path / "r", steps=1), fork)


@pytest.mark.slow
def test_the_command_is_killed_with_kill_9_and_resumed(tmp_path, stopped):
    run = tmp_path / "r"
    options = dataclasses.asdict(config(grpo, run))
    flags = [
        "--steps",
        "5",
        "--prompts-per-step",
        "4",
        "--eval-limit",
        "3",
        "--save-every",
        "2",
        "--eval-every",
        "2",
    ]
    command = [
        sys.executable,
        "-m",
        "trivet.cli.main",
        "grpo",
        "--preset",
        "toy",
        "--data",
        options["data"],
        *flags,
    ]
    command += ["--keep-tokens-every", "2"]
    process = subprocess.Popen([*command, "--out", options["out"]], stdout=subprocess.DEVNULL)
    while not (run / "checkpoints" / "step-2").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(["resume", str(run)]) == 0
    threads = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS") in (None, str(threads)):
        same(stopped[1], run)
