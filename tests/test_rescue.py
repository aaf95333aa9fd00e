"""Steps that go wrong: gradients that are not finite are skipped, kept and replayed; a full memory halves the microbatch."""

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from test_resume import RECIPES, config, numbers, same
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.recipes import dpo, grpo, ppo, sft
from trivet.runner.launch import launch
from trivet.runner.replay import replay_step
from trivet.runner.resume import resume
from trivet.step import trace
from trivet.step.optimizer import Optimizer
from trivet.step.run import Run
from trivet.store.checkpoints import damage, steps


def passes_of(recipe):
    """The function by which a step's trace goes through the recipe's model: log-probabilities, or scores of a reward model."""
    return "scores" if recipe.TRAINS == "scorer" else "token_logprobs"


def broken_at(monkeypatch, recipe, steps, what=math.nan):
    """The recipe's log-probabilities (scores, for a reward model) with gradients become this at these steps of the run."""
    name = passes_of(recipe)
    original, seen = getattr(trace, name), {"step": 0}
    batches = Run.batches

    def counted(self):
        for step, examples in batches(self):
            seen["step"] = step
            yield step, examples

    def broken(*args, **kwargs):
        result = original(*args, **kwargs)
        return result * what if result.requires_grad and seen["step"] in steps else result

    monkeypatch.setattr(Run, "batches", counted)
    monkeypatch.setattr(trace, name, broken)
    return seen


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name == "ppo" else name for name in RECIPES],
)
def test_a_step_that_is_not_finite_changes_nothing_and_is_replayed(tmp_path, monkeypatch, name):
    recipe = RECIPES[name]
    broken_at(monkeypatch, recipe, {3})
    run = launch(config(recipe, tmp_path / "run", save_every=0))
    lines = numbers(run)
    assert [line.get("skipped_updates", 0) > 0 for line in lines] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert lines[2]["grad_norm"] is None
    kept = run / "skipped" / "step-3"
    start = (
        0 if recipe is ppo else 2
    )  # the critic has moved in this step, so its beginning can't be saved
    assert json.loads((kept / "replay.json").read_text()) == {"step": 3, "from": start}
    assert not start or not damage(kept)
    assert len((kept / "batch.jsonl").read_text().splitlines()) == 4
    found = replay_step(kept)
    assert found.different == []
    assert found.parameters
    assert len(found.parameters) == len({name for name, *_ in found.parameters})
    if name in ("grpo", "ppo", "pairwise-grpo"):
        assert found.tokens


def test_skipping_is_going_on_without_the_step(tmp_path, monkeypatch):
    """The weights after a skipped step are those before it, and the optimizer's moments and schedule too."""
    broken_at(monkeypatch, grpo, {3, 4})
    run = launch(config(grpo, tmp_path / "run", save_every=1, lr_decay=True, warmup_steps=2))
    assert [step for step, _ in steps(run / "checkpoints")] == [
        1,
        2,
    ]  # none of a step that was not taken, nor of the last
    states = [
        json.loads((kept / "state.json").read_text())
        for kept in (run / "checkpoints/step-2", run / "skipped/step-3")
    ]
    assert states[0] == states[1]
    lines = numbers(run)
    assert lines[4]["lr"] == pytest.approx(1e-3 * (1 - 2 / 5))  # the third that was taken
    assert (run / "skipped/step-3").exists()
    assert not (run / "skipped/step-4").exists()


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run_at_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    whole = launch(config(grpo, tmp_path / "whole", save_every=0))
    with monkeypatch.context() as patched:
        broken_at(patched, grpo, {3, 4})
        with pytest.raises(
            InputError,
            match=r"2 steps in a row, from step 3, .*trivet replay .*step-3, .*continue from step 2: trivet resume",
        ):
            launch(config(grpo, tmp_path / "run", save_every=0, max_skipped_steps=2))
    assert [line["step"] for line in numbers(tmp_path / "run")] == [1, 2, 3, 4]
    assert not (tmp_path / "run" / "summary.json").exists()
    same(
        whole, resume(tmp_path / "run")
    )  # what broke the steps is gone, and so is all that they left


def test_only_what_is_there_is_named_for_replay(tmp_path, monkeypatch):
    """After three kept steps a fourth is not kept."""
    broken_at(monkeypatch, sft, {1, 3, 5, 7, 8})
    with pytest.raises(
        InputError, match=r"skipped 2 steps in a row, from step 7, .* not finite; fix the reward"
    ):
        launch(config(sft, tmp_path / "run", save_every=0, steps=10, max_skipped_steps=2))


def test_a_lower_learning_rate_in_the_config_counts_after_resume(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        broken_at(patched, sft, {3, 4, 5})
        with pytest.raises(InputError):
            launch(config(sft, tmp_path / "run", save_every=0, lr=1e-3, lr_decay=False))
    written = tmp_path / "run" / "config.toml"
    written.write_text(written.read_text().replace("\nlr = 0.001\n", "\nlr = 0.0005\n"))
    assert [line["lr"] for line in numbers(resume(tmp_path / "run"))] == [
        1e-3,
        1e-3,
        5e-4,
        5e-4,
        5e-4,
    ]


def test_weights_that_moved_in_the_step_are_replayed_from_the_checkpoint_before(
    tmp_path, monkeypatch
):
    """PPO's second epoch breaks: the step's beginning is gone, so the replay starts earlier and comes to the same numbers."""
    calls = {"n": 0}
    original = Optimizer.step

    def step(self):
        calls["n"] += 1
        if calls["n"] == 11:  # two optimizers, two epochs: the policy's second update of step 3
            self.parameters[0].grad.fill_(math.nan)
        return original(self)

    monkeypatch.setattr(Optimizer, "step", step)
    run = launch(config(ppo, tmp_path / "run", save_every=1, keep=1, epochs_per_batch=2))
    kept = run / "skipped" / "step-3"
    assert json.loads((kept / "replay.json").read_text())["from"] == 2
    assert not damage(kept)
    assert [step for step, _ in steps(run / "checkpoints")] == [
        4
    ]  # the kept one does not go with it


def test_a_tensor_that_a_recipe_holds_is_kept_as_it_was_when_the_step_began(tmp_path, monkeypatch):
    """A running mean, say, which the step has changed in place before its gradient turned out not to be finite."""
    counts, batches = [], Run.batches

    def counted(self):
        counts.append(self.holds(count=torch.zeros(())))
        for step, examples in batches(self):
            counts[-1] += 1
            yield step, examples

    monkeypatch.setattr(Run, "batches", counted)
    broken_at(monkeypatch, sft, {3})
    run = launch(config(sft, tmp_path / "run", save_every=0))
    assert load_file(run / "skipped" / "step-3" / "state.safetensors")["/parts/count"] == 2
    assert replay_step(run / "skipped" / "step-3").different == []
    assert [float(count) for count in counts] == [5, 3]


def test_only_three_are_kept(tmp_path, monkeypatch):
    broken_at(monkeypatch, sft, {1, 3, 5, 7, 9})
    run = launch(config(sft, tmp_path / "run", save_every=0, steps=10))
    assert sorted(path.name for path in (run / "skipped").iterdir()) == [
        "step-1",
        "step-3",
        "step-5",
    ]
    assert json.loads((run / "skipped/step-1/replay.json").read_text())["from"] == 0
    assert replay_step(run / "skipped/step-1").different == []


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    broken_at(monkeypatch, grpo, {2})
    run = launch(config(grpo, tmp_path / "run", save_every=0))
    assert main(["replay", str(run / "skipped" / "step-2")]) == 0
    said = capsys.readouterr().out
    assert "step 2 repeated: the gradient is not finite" in said
    assert "equal to the recorded ones, bit for bit" in said
    assert "tokens with non-finite gradients" in said
    assert "the completions differ" not in said
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(
        lines.replace('"step": 2,', '"step": 2, "servers/usable": 1.0,')
    )
    assert main(["replay", str(run / "skipped" / "step-2")]) == 0
    assert "the completions differ: servers wrote those of the run" in capsys.readouterr().out
    assert main(["replay", str(run)]) == 2
    assert "holds no step to replay" in capsys.readouterr().err
    flipped = run / "skipped" / "step-2" / "model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    assert main(["replay", str(run / "skipped" / "step-2")]) == 2
    assert "damaged" in capsys.readouterr().err


def largest_part(monkeypatch, recipe, run):
    """The most tokens that went through the model at once with gradients, while this makes a run."""
    name = passes_of(recipe)
    original, seen = getattr(trace, name), [0]

    def counted(model, groups, **options):
        seen.append(int(groups.lengths.sum()) if torch.is_grad_enabled() else 0)
        return original(model, groups, **options)

    with monkeypatch.context() as patched:
        patched.setattr(trace, name, counted)
        return run(), max(seen)


def short_of_memory(
    monkeypatch, recipe, most, of=torch.OutOfMemoryError, said="out of memory", since=3
):
    """Forward passes with gradients over more than so many tokens don't fit from this step on."""
    seen = broken_at(monkeypatch, recipe, set())
    name = passes_of(recipe)
    original = getattr(trace, name)

    def limited(model, groups, **options):
        if torch.is_grad_enabled() and seen["step"] >= since and groups.lengths.sum() > most:
            raise of(said)
        return original(model, groups, **options)

    monkeypatch.setattr(trace, name, limited)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_out_of_memory_makes_the_step_again_with_half_the_tokens(tmp_path, monkeypatch, name):
    recipe = RECIPES[name]
    options = {"save_every": 0, "microbatch_tokens": 2048, "keep_tokens_every": 0}
    whole, largest = largest_part(
        monkeypatch, recipe, lambda: launch(config(recipe, tmp_path / "whole", **options))
    )
    told = []
    with monkeypatch.context() as patched:
        short_of_memory(patched, recipe, largest // 2)
        run = launch(
            config(recipe, tmp_path / "run", **options),
            lambda launched, *_: setattr(launched.run, "note", told.append),
        )
    known = json.loads((run / "run.json").read_text())
    budgets = [said["microbatch_tokens"] for said in known["out_of_memory"]]
    assert budgets == [2048 >> i for i in range(len(budgets))]
    assert {said["step"] for said in known["out_of_memory"]} == {3}
    assert known["resumed"] == [2] * len(budgets)
    assert f"microbatch_tokens = {budgets[-1] // 2}\n" in (run / "config.toml").read_text()
    assert any(
        "out of memory in step 3; repeating it with --microbatch-tokens 1024" in line
        for line in told
    )
    lines = numbers(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[:2] == numbers(whole)[:2]
    for line, expected in zip(lines, numbers(whole), strict=True):  # to rounding
        for key, value in expected.items():
            assert line[key] == pytest.approx(value, rel=2e-3, abs=1e-4), (line["step"], key)


@pytest.mark.slow
def test_out_of_memory_in_the_first_step_and_in_a_second_epoch(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        short_of_memory(
            patched,
            grpo,
            256,
            RuntimeError,
            "[enforce fail] DefaultCPUAllocator: can't allocate memory",
            1,
        )
        run = launch(config(grpo, tmp_path / "first", microbatch_tokens=512))
        assert json.loads((run / "run.json").read_text())["out_of_memory"] == [
            {"step": 1, "microbatch_tokens": 512}
        ]
    same(launch(config(grpo, tmp_path / "whole", microbatch_tokens=256)), run)

    calls = {"n": 0}
    step = Optimizer.step

    def full(self):
        calls["n"] += 1
        if (
            calls["n"] == 15
        ):  # step 4, second epoch: its beginning is gone, step 2 is the newest checkpoint
            raise MemoryError
        return step(self)

    monkeypatch.setattr(Optimizer, "step", full)
    run = launch(config(ppo, tmp_path / "ppo"))
    assert json.loads((run / "run.json").read_text())["resumed"] == [2]
    assert [line["step"] for line in numbers(run)] == [1, 2, 3, 4, 5]


def test_no_room_for_anything_is_a_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        short_of_memory(patched, dpo, 0)
        with pytest.raises(
            InputError,
            match="out of memory in step 3, even with 62 tokens at once; lower --max-prompt-tokens",
        ):
            launch(config(dpo, tmp_path / "run", save_every=0, microbatch_tokens=125))

    def generate(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Engine, "generate", generate)
    with pytest.raises(
        InputError,
        match="out of memory while sampling in step 1; lower --prompts-per-step, --group-size",
    ):
        launch(config(grpo, tmp_path / "grpo"))
    assert not (tmp_path / "grpo").exists()


def test_other_errors_are_not_taken_for_a_full_memory(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trace, "token_logprobs", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        launch(config(sft, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are Linux's")
def test_a_real_limit_on_memory(tmp_path):
    """The process may not have more than a little beyond what it holds when step 2 begins: microbatches shrink, the run ends well."""
    program = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
import torch
torch.set_num_threads(1)
from test_resume import config
from trivet.recipes import dpo
from trivet.runner.launch import launch
held = []
def watch(launched, step, metrics):
    launched.run.note = lambda text: print(text, flush=True)
    if step == 1 and not held:
        pages = int(open("/proc/self/statm").read().split()[0])
        held.append(resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + SPACE, -1)))
launch(config(dpo, sys.argv[1], steps=3, prompts_per_step=256, microbatch_tokens=65536, save_every=0, eval_fraction=0.0), watch)
"""
    for limit in (
        400e6,
        300e6,
        250e6,
        200e6,
        150e6,
        100e6,
    ):  # some that a step does not fit into, and a run does
        text = program.replace("SPACE", str(int(limit)))
        done = subprocess.run(
            [sys.executable, "-c", text, str(tmp_path / f"{limit:g}")],
            capture_output=True,
            text=True,
        )
        if "out of memory in step" in done.stdout and not done.returncode:
            break
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in numbers(tmp_path / f"{limit:g}")] == [1, 2, 3]
    assert json.loads((tmp_path / f"{limit:g}" / "run.json").read_text())["out_of_memory"]


def test_the_optimizer_names_what_is_not_finite():
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer(model, sft.Config(), 4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.weight.grad[0, 1] = math.inf
    optimizer.step()
    assert optimizer.bad == [("weight", 1, 6)]
    assert optimizer.skipped == 1
