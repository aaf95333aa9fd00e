"""Generation by servers: the protocol, the probe after each sync, faults of every kind, generation ahead of training."""

import asyncio
import copy
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from conftest import tiny
from runs import stepwise
from stub_vllm import FAULTS, Stub
from test_resume import KilledError, killed_after, same
from trivet.batch import Example
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.generation.local import LocalServer
from trivet.generation.server import NoServerError, Servers
from trivet.generation.vllm import Server
from trivet.model.adapters import inject
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.model.load import load_policy
from trivet.model.text import load_tokenizer
from trivet.optimization import truncated_importance_weights
from trivet.recipes import grpo, pairwise_grpo, ppo
from trivet.rewards.guard import with_time_limit
from trivet.runner.launch import launch
from trivet.runner.prepare import Launch
from trivet.runner.resume import resume
from trivet.toy import ARITHMETIC

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11], [12]]
ROWS = [
    Example(prompt=prompt, completions=[], learned=[], row={"number": i})
    for i, prompt in enumerate(PROMPTS)
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder that servers start from."""
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def stub(folder):
    """One server."""
    server = Stub(folder)
    yield server
    server.close()


@pytest.fixture
def others(folder):
    """Makes more of them."""
    made: list[Stub] = []

    def make(**options) -> Stub:
        made.append(Stub(folder, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def client(tmp_path):
    """Makes what generates with stubs; closes it."""
    made: list[Servers] = []

    def make(
        *stubs: Stub, temperature: float = 0.7, tokens: int = 6, timeout: float = 60.0, **options
    ) -> Servers:
        engine = Engine(
            lambda prompt, ids: " ".join(map(str, ids)), [0], tokens, temperature, torch.Generator()
        )
        cut = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        servers = [Server(x.url, [0], cut, timeout, 1e-4, True) for x in stubs]
        patience = options.pop("patience", timeout)
        made.append(Servers(engine, servers, tmp_path / "served", PROMPTS[:3], patience, **options))
        return made[-1]

    yield make
    for servers in made:
        servers.close()


def move(policy, seed: int = 1) -> None:
    """A step that is no small one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def adapted(rank: int = 4):
    """The tiny model with an adapter that does something."""
    policy = tiny()
    inject(
        policy, LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    policy.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter.requires_grad_(True), std=0.2)
    return policy.eval()


def agrees(policy, rollouts, temperature: float = 0.7) -> float:
    """The largest difference between the log-probabilities as sampled and as the policy computes them."""
    learner = in_microbatches(token_logprobs, policy, rollouts.groups, 500, temperature=temperature)
    return (learner - rollouts.logprobs).abs().max().item()


# What comes back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [tiny, adapted], ids=["full weights", "adapter"])
def test_rollouts_are_the_engines_own_and_follow_the_weights(stub, client, kind):
    policy, servers = kind(), client(stub)
    for step in range(3):
        rollouts = servers.generate(policy, ROWS, 5)
        groups = rollouts.groups
        assert groups.group_size == 5
        assert [groups.prompts[p][groups.prompt_mask[p]].tolist() for p in range(4)] == PROMPTS
        assert [row["number"] for row in rollouts.rows] == [0, 1, 2, 3]
        assert agrees(policy, rollouts) < 1e-5
        assert servers.metrics()["servers/probe_difference"] < 1e-5
        for b in range(20):
            tokens = groups.completions[b][groups.present[b]].tolist()
            assert rollouts.finished[b] == (tokens[-1] == 0)
            assert 0 not in tokens[:-1]
            assert len(tokens) == 6 or tokens[-1] == 0
            assert rollouts.texts[b] == " ".join(
                map(str, tokens[:-1] if tokens[-1] == 0 else tokens)
            )
        assert len(rollouts.versions) == 20
        assert torch.equal(groups.mask, groups.present)
        move(policy, step)


def test_weights_are_sent_when_they_have_changed_and_then_only(stub, client):
    policy, servers = tiny(), client(stub)
    servers.generate(policy, ROWS, 2)
    first = stub.version
    servers.generate(policy, ROWS, 2)
    assert stub.version == first
    move(policy)
    servers.generate(policy, ROWS, 2)
    assert stub.version != first
    assert len(list((servers.folder).iterdir())) == 1  # earlier versions leave the disk


def test_an_adapter_has_a_name_for_each_version_and_old_ones_are_unloaded(stub, client):
    policy, servers = adapted(), client(stub)
    names = []
    for step in range(3):
        servers.generate(policy, ROWS, 2)
        names.append([x["model"] for x in stub.asked][-1])
        move(policy, step)
    assert len(set(names)) == 3
    assert servers.servers[0].strikes == 0
    assert list(stub.adapters) == names[-1:]
    assert {x["cache_salt"] for x in stub.asked} == set(
        names
    )  # no prefix of other weights is reused


def test_work_is_shared_among_servers(stub, others, client):
    second = others()
    servers = client(stub, second, tokens=2)
    servers.generate(tiny(), ROWS * 8, 2)
    counts = [
        sum(x["sampling_params"]["max_tokens"] > 1 for x in server.asked)
        for server in (stub, second)
    ]
    assert sum(counts) == 32
    assert min(counts) >= 8


def test_samples_are_those_of_the_policy(stub, client):
    """Frequencies of the first token against its probabilities."""
    policy, servers = tiny(), client(stub, temperature=1.3, tokens=1)
    rollouts = servers.generate(policy, ROWS[:1], 4000)
    found = torch.bincount(rollouts.groups.completions[:, 0], minlength=61) / 4000
    chance = (policy(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.3).softmax(-1)
    assert (found - chance).abs().max() < 0.04


# The probe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["half", "none"])
@pytest.mark.parametrize("policy", [tiny, adapted], ids=["full weights", "adapter"])
def test_a_server_that_took_the_weights_in_part_or_not_at_all_is_refused(
    stub, client, kind, policy
):
    if policy is adapted and kind == "half":
        pytest.skip("an adapter is loaded or not")
    policy, servers = policy(), client(stub, patience=5)
    stub.reload = kind
    move(policy)
    with pytest.raises(
        NoServerError,
        match="version 0 of the weights, but its log-probabilities are not the learner's",
    ):
        servers.generate(policy, ROWS, 2)
    assert not any(
        x["sampling_params"]["max_tokens"] > 1 for x in stub.asked
    )  # nothing was sampled to be trained on


def test_the_run_goes_on_with_the_server_that_passes_the_probe(stub, others, client):
    bad = others()
    bad.reload = "half"
    policy, servers = tiny(), client(bad, stub)
    move(policy)
    assert agrees(policy, servers.generate(policy, ROWS, 2)) < 1e-5
    assert servers.metrics()["servers/usable"] == 1


def test_the_probe_looks_at_the_temperature_that_samples(stub, client, monkeypatch):
    """A server whose log-probabilities are from before the temperature."""
    policy, servers = tiny(), client(stub, patience=3)
    servers.servers[0].cut = servers.servers[0].cut | {"temperature": 1.0}
    with pytest.raises(NoServerError, match="not the learner's"):
        servers.generate(policy, ROWS, 2)


# Faults -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("policy", [tiny, adapted], ids=["full weights", "adapter"])
def test_a_server_that_misbehaves_loses_its_work_to_another(stub, others, client, fault, policy):
    if fault == "wrong version" and policy is adapted:
        pytest.skip("an adapter's version is its name, which is asked for")
    second = others()
    policy, servers = policy(), client(stub, second)
    servers.generate(policy, ROWS, 3)
    servers.servers[0].timeout = 1.0 if fault == "hang" else 60.0
    move(policy)
    stub.fault(fault)
    while (
        stub.faults
    ):  # on a busy machine the other server may have it all written before this one is asked
        rollouts = servers.generate(policy, ROWS, 3)
        assert agrees(policy, rollouts) < 1e-5
        assert rollouts.groups.completions.shape[0] == 12
    assert servers.metrics()["servers/resent"] >= 1
    assert set(rollouts.versions) == set(rollouts.versions[:1])


@pytest.mark.parametrize("policy", [tiny, adapted], ids=["full weights", "adapter"])
def test_a_server_that_comes_back_with_old_weights_is_brought_to_the_new_ones(stub, client, policy):
    policy, servers = policy(), client(stub)
    servers.generate(policy, ROWS, 2)
    move(policy)
    servers.generate(policy, ROWS, 2)
    stub.restart()
    rollouts = servers.generate(
        policy, ROWS, 2
    )  # the same weights: no sync is due, the server says that it has others
    assert agrees(policy, rollouts) < 1e-5
    assert servers.metrics()["servers/resent"] >= 1


def test_without_a_server_the_wait_ends(folder, client):
    gone = Stub(folder)
    servers = client(gone, patience=0.5)
    gone.close()
    with pytest.raises(
        NoServerError, match=f"no server to generate with: {gone.url} can't be reached"
    ):
        with_time_limit(60.0, lambda: servers.generate(tiny(), ROWS, 2))


def test_no_server_is_given_up_before_it_was_tried(stub, client, monkeypatch):
    """As on a machine so busy that the first answer takes longer than the patience."""
    sync, policy = Server.sync, tiny()

    async def late(server, *args):
        await asyncio.sleep(0.6)
        await sync(server, *args)

    monkeypatch.setattr(Server, "sync", late)
    servers = client(stub, patience=0.2)
    assert agrees(policy, servers.generate(policy, ROWS, 2)) < 1e-5


def test_a_server_that_says_nothing_any_more_is_left_before_its_time_is_up(
    stub, others, client, monkeypatch
):
    monkeypatch.setattr("trivet.generation.server.BEAT", 0.2)
    monkeypatch.setattr("trivet.generation.server.SHORT", 0.3)
    servers, policy = client(stub, others(), timeout=3600.0), tiny()
    while not all(server.has for server in servers.servers):
        servers.generate(policy, ROWS, 2)
    stub.fault("hang")
    stub.route = lambda handler, body: (
        stub.held.wait() if "health" in handler.path else Stub.route(stub, handler, body)
    )
    while (
        stub.faults
    ):  # on a busy machine the other server may have it all written before this one is asked
        with_time_limit(60.0, lambda: servers.generate(policy, ROWS, 2))
    assert servers.metrics()["servers/resent"] >= 1
    assert not stub.held.is_set()


# A process of our own -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_local_server_is_started_and_ends_with_us(folder, client, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    local = LocalServer(
        Path(sys.executable), tmp_path / "log", ["--anything", "else"], module="stub_vllm"
    )
    servers = client()
    url, cut = f"http://127.0.0.1:{local.port}", {"temperature": 0.7, "top_k": 0, "top_p": 1.0}
    servers.servers.append(Server(url, [0], cut, 60.0, 1e-4, True, local=local))
    policy = tiny()
    assert agrees(policy, servers.generate(policy, ROWS, 2)) < 1e-5
    first = local.process
    os.kill(first.pid, signal.SIGKILL)
    move(policy)
    assert (
        agrees(policy, servers.generate(policy, ROWS, 2)) < 1e-5
    )  # another process, started on the newest weights
    second = local.process
    assert second.pid != first.pid
    servers.close()
    assert second.poll() is not None


# Whole runs ---------------------------------------------------------------------------------------------------------

TOY = {**ARITHMETIC, "group_size": 4, "prompts_per_step": 8, "keep_tokens_every": 1}
TOY |= {"reward": (f"{__file__}:letters",)}  # every group has a best one from the start


def letters(prompts, completions, **_) -> list[float]:
    """A reward that nearly all completions have another value of."""
    return [sum(map(ord, completion)) % 31 / 31 for completion in completions]


@pytest.fixture
def toy(tmp_path):
    """Stubs of the toy's model; their weights are others than the run's, which the first sync mends."""
    folder = tmp_path / "toy"
    load_policy(ARITHMETIC["model"], from_scratch=True).save_pretrained(folder)
    made = [Stub(folder), Stub(folder)]
    yield made
    for server in made:
        server.close()


def impatient(monkeypatch, seconds: float) -> None:
    """Runs wait so long for a server that works, and all the 500 s that they are told to for what one is asked."""

    def made(**options) -> Servers:
        assert [options["patience"], *(server.timeout for server in options["servers"])] == [
            500.0,
            500.0,
        ]
        return Servers(**options | {"patience": seconds})

    monkeypatch.setenv("TRIVET_SERVER_TIMEOUT", "500")
    monkeypatch.setattr("trivet.runner.servers.Servers", made)


def lines(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "recipe", [grpo, ppo, pairwise_grpo], ids=lambda recipe: recipe.__name__.rpartition(".")[2]
)
@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_says_which_weights_wrote_what(toy, tmp_path, recipe, staleness):
    out = launch(recipe.Config(**TOY, steps=5, generate_with=tuple(x.url for x in toy), out=str(tmp_path / "run"),
                               max_staleness=staleness, lr=1e-3))  # fmt: skip
    metrics, samples = lines(out, "metrics.jsonl"), lines(out, "samples.jsonl")
    assert [x["sampling/staleness"] for x in metrics] == [min(staleness, i) for i in range(5)]
    for sample in samples:
        held = sample.get("set") == "held-out"
        assert sample["staleness"] == (0 if held else min(staleness, sample["step"] - 1))
        assert sample["version"] == sample["step"] - (0 if held else 1) - sample["staleness"]
    largest = [x["sampling/logprob_difference/max"] for x in metrics]
    assert largest[0] < 1e-4
    assert all((x < 1e-4) == (staleness == 0) for x in largest[1:])
    assert all(x["servers/usable"] == 2 for x in metrics)
    assert not (out / "served").exists()


@pytest.mark.slow
def test_each_batch_is_trained_on_once_and_in_the_order_of_the_data(toy, tmp_path):
    """What an undisturbed run trains on is what one with faults trains on: no group is lost, doubled or cut."""
    prompts = {}
    for name, faults in {
        "plain": (),
        "faults": ("500", "", "truncated", "duplicate", "", "partial group", "cut short"),
    }.items():
        toy[0].fault(*faults)
        config = grpo.Config(
            **TOY,
            steps=6,
            generate_with=tuple(x.url for x in toy),
            out=str(tmp_path / name),
            max_staleness=1,
        )
        out = launch(config)
        assert len(toy[0].faults) == 0
        prompts[name] = [(x["step"], x["group"], x["prompt"]) for x in lines(out, "samples.jsonl")]
        metrics = lines(out, "metrics.jsonl")
        assert [x["step"] for x in metrics] == [1, 2, 3, 4, 5, 6]
    assert prompts["plain"] == prompts["faults"]
    assert metrics[-1]["servers/resent"] >= 5


@pytest.mark.slow
def test_without_a_server_the_run_stops_with_a_checkpoint_and_goes_on_later(
    toy, tmp_path, monkeypatch, capsys
):
    impatient(monkeypatch, 0.5)
    out, options = tmp_path / "run", dict(TOY, steps=6)
    toy[0].fault(*[""] * 3 * 8, "die")
    config = grpo.Config(**options, generate_with=(toy[0].url,), out=str(out))
    with pytest.raises(
        InputError,
        match=r"no server to generate with: .*; stopped after step 3; to continue: trivet resume",
    ):
        launch(config)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-3"]
    assert main(["resume", str(out), "--generate-with", toy[1].url]) == 0  # elsewhere by now
    assert f'generate_with = ["{toy[1].url}"]' in (out / "config.toml").read_text()
    metrics = lines(out, "metrics.jsonl")
    assert [x["step"] for x in metrics] == [1, 2, 3, 4, 5, 6]
    assert [x["sampling/staleness"] for x in metrics] == [0] * 6
    assert json.loads((out / "summary.json").read_text())["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [(grpo, {}), (ppo, {}), (grpo, {"lora": 4, "merge": True})],
    ids=["grpo", "ppo", "lora"],
)
def test_rollouts_not_yet_used_are_in_a_checkpoint(toy, tmp_path, recipe, options):
    """Killed after step 5, so that it goes on from step 4 with two batches that older weights have written."""
    server, model = Stub(tmp_path / "toy", seeded=True), str(tmp_path / "toy")
    load_tokenizer(ARITHMETIC["model"]).save_pretrained(model)
    options = (
        TOY
        | options
        | {
            "model": model,
            "from_scratch": False,
            "generate_with": (server.url,),
            "max_staleness": 2,
        }
    )
    options |= {"steps": 7, "save_every": 2, "eval_limit": 2, "lr": 1e-3}
    whole, out = tmp_path / "whole", tmp_path / "run"
    launch(recipe.Config(**options, out=str(whole)))
    with pytest.raises(KilledError):
        launch(recipe.Config(**options, out=str(out)), killed_after(5))
    began = len(server.asked)
    resume(out)
    server.close()
    assert [x["sampling/staleness"] for x in lines(out, "metrics.jsonl")] == [0, 1, 2, 2, 2, 2, 2]
    asked = [x for x in server.asked[began:] if x["sampling_params"]["max_tokens"] > 1]
    assert len(asked) == 8 + 2  # of step 7, and to evaluate
    for run in (whole, out):
        own = [
            {key: x for key, x in line.items() if not key.startswith("servers/")}
            for line in lines(run, "metrics.jsonl")
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    same(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "where"), [(0, "the start"), (2, "step 2")])
def test_without_a_server_in_an_evaluation_it_says_from_where_it_goes_on(
    toy, tmp_path, monkeypatch, every, where
):
    """The weights have moved by then, so that the beginning of the step can't be saved any more."""
    impatient(monkeypatch, 0.5)
    out, options = (
        tmp_path / "run",
        dict(TOY, steps=4, eval_every=4, eval_limit=2, save_every=every),
    )
    toy[0].fault(*[""] * 4 * 8, "die")
    with pytest.raises(
        InputError, match=f"; stopped in step 4; to continue from {where}: trivet resume"
    ):
        launch(grpo.Config(**options, generate_with=(toy[0].url,), out=str(out)))
    begun = []
    resume(out, lambda launched, step, metrics: begun.append(step), generate_with=[toy[1].url])
    assert begun == [0, *range(every + 1, 5)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_generation_overlaps_training(toy, tmp_path, monkeypatch, ahead):
    """While a batch is trained on, its reward here, servers are asked for the next one, or not: benchmarks/overlap.py for the time."""
    seen = list[bool]()

    def asked() -> int:
        return sum(
            body["sampling_params"]["max_tokens"] > 1 for body in toy[0].asked
        )  # the others are probes

    def reward(prompts, completions, **_):
        batch, end = len(seen) + 1, time.monotonic() + (60 if ahead else 0.3)
        while asked() <= 8 * batch and batch < 5 and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(asked() > 8 * batch)
        return [float(len(x)) for x in completions]

    monkeypatch.setitem(sys.modules, "waiting", SimpleNamespace(reward=reward))
    options = dict(TOY, steps=5, reward=("waiting:reward",), eval_data="", eval_fraction=0.0)
    launch(
        grpo.Config(
            **options, generate_with=(toy[0].url,), out=str(tmp_path / "run"), max_staleness=ahead
        )
    )
    assert seen == [bool(ahead)] * 4 + [False]
    assert asked() == 5 * 8


@pytest.mark.slow
def test_arithmetic_climbs_with_rollouts_a_step_old(toy, tmp_path, monkeypatch):
    """Two processes: this one trains, the stub's samples."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    server = LocalServer(Path(sys.executable), tmp_path / "log", [], module="stub_vllm")
    server.start(str(tmp_path / "toy"))
    options = {
        **grpo.PRESETS["arithmetic"],
        "generate_with": (f"http://127.0.0.1:{server.port}",),
        "max_staleness": 1,
    }
    try:
        metrics = lines(
            launch(grpo.Config(**options | {"steps": 60}, out=str(tmp_path / "run"))),
            "metrics.jsonl",
        )
    finally:
        server.stop()
    assert metrics[0]["reward"] < 0.1
    assert sum(x["reward"] for x in metrics[-10:]) / 10 > 0.2
    assert all(x["sampling/staleness"] == 1 for x in metrics[1:])
    assert 0.9 < metrics[50]["sampling/importance_sampling_ratio/mean"] < 1.1


class Late:
    """The engine, a step late: samples by the weights of the step before, as servers do at --max-staleness 1."""

    def __init__(self, engine):
        self.engine, self.temperature, self.cache_bytes, self.before = (
            engine,
            engine.temperature,
            0,
            None,
        )

    def generate(self, policy, prompts, group_size):
        if group_size == 1:  # an evaluation
            return self.engine.generate(policy, prompts, group_size)
        now = copy.deepcopy(policy)
        self.before, late = now, self.before or now
        rollouts = self.engine.generate(late, prompts, group_size)
        return replace(rollouts, versions=[0] * len(rollouts.texts))


@pytest.mark.slow
def test_arithmetic_is_learned_a_step_late():
    launched = Launch(
        grpo.Config(**{**grpo.PRESETS["arithmetic"], "lr": 5e-4, "steps": 500})
    )  # seeds 0, 1, 2: 0.98, 1.0, 0.93
    launched.run.servers = SimpleNamespace(engine=Late, ahead=iter)
    assert list(stepwise(launched))[-1]["eval/reward"] >= 0.9


# Options and weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-staleness", "1"], "--max-staleness needs servers that generate ahead of training"),
        (["--generate-with", "localhost:8000"], "expected a URL like http://127.0.0.1:8000"),
        (["--vllm"], "TRIVET_VLLM_PYTHON is /nowhere/python, which does not exist"),
    ],
)
def test_options_that_can_not_work_say_so(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.setenv("TRIVET_VLLM_PYTHON", "/nowhere/python")
    assert (
        main(
            [
                "grpo",
                "--preset",
                "arithmetic",
                "--steps",
                "1",
                "--out",
                str(tmp_path / "run"),
                *words,
            ]
        )
        == 2
    )
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_importance_weights_make_the_gradient_that_of_the_learner():
    """Over all tokens of a small vocabulary: E_sampler[w A grad log pi] = E_pi[A grad log pi], as long as the cap is not met."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    sampler, advantage = (
        torch.randn(7, dtype=torch.float64).log_softmax(0),
        torch.randn(7, dtype=torch.float64),
    )
    logprobs = logits.log_softmax(0)

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(
            (weight * advantage * logprobs).sum(), logits, retain_graph=True
        )[0]

    weights = truncated_importance_weights(logprobs, sampler, cap=1e9)
    assert not weights.requires_grad
    torch.testing.assert_close(gradient(sampler.exp() * weights), gradient(logprobs.exp().detach()))
    capped = truncated_importance_weights(logprobs, sampler, cap=1.1)
    assert capped.max() == 1.1
    assert torch.equal(capped[weights < 1.1], weights[weights < 1.1])


@pytest.mark.slow
def test_the_cap_acts_in_grpo_and_ppo(toy, tmp_path):
    """With rollouts that are two steps old a cap near 0 leaves the weights where they were; without servers it does nothing."""
    for recipe in (grpo, ppo):
        moved = {}
        for cap in (1e-12, 2.0):
            options = dict(TOY, steps=2, importance_cap=cap, generate_with=(toy[0].url,))
            out = launch(recipe.Config(**options, out=str(tmp_path / f"{recipe.__name__}{cap}")))
            moved[cap] = lines(out, "metrics.jsonl")[0]["grad_norm"]
        assert moved[1e-12] < 1e-6 * moved[2.0]
