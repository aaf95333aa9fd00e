"""Bad input is one sentence that names the file, row or key, exit code 2, and nothing written; degenerate rows are counted."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from trivet.cli.main import main
from trivet.errors import InputError
from trivet.recipes import grpo
from trivet.runner.prepare import Launch
from trivet.toy import ARITHMETIC

MODEL = Path(ARITHMETIC["model"])
PRESET = ["--preset", "arithmetic", "--steps=1", "--prompts-per-step=4"]
BARE = ["--model", str(MODEL), "--from-scratch", "--steps", "1", "--max-completion-tokens", "2"]
GOOD = {"prompt": "0+0=", "completion": "0"}
PAIR = {"prompt": "0+0=", "chosen": "0", "rejected": "1"}
USER, ANSWER = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that must be refused; returns what it says."""

    def run(*args: object, out: Path | None = None) -> str:
        out = out or tmp_path / "run"
        before = sorted(out.rglob("*")) if out.is_dir() else None
        assert main([*map(str, args), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert said.endswith("\n")
        assert said.startswith(f"trivet {args[0]}: ")
        assert "Traceback" not in said
        assert (sorted(out.rglob("*")) if out.is_dir() else None) == before
        return said

    return run


@pytest.fixture
def counted(tmp_path):
    """Run a command that goes on; returns the counts of its data report."""

    def run(*args: object) -> dict[str, int]:
        assert main([*map(str, args), "--out", str(tmp_path / "run")]) == 0
        return json.loads((tmp_path / "run" / "summary.json").read_text())["data"]

    return run


def lines(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("method", "flags", "named"),
    [
        ("grpo", "--grup-size 2", "--group-size"),
        ("grpo", "--lr abc", "--lr is 'abc'; expected float"),
        ("grpo", "--eval-every 1.5", "--eval-every is '1.5'; expected int"),
        ("grpo", "--lr", "--lr has no value"),
        ("grpo", "--lr 1 2", "--lr was given 1 2"),
        ("dpo", "--length-normalize yes", "--length-normalize was given yes"),
        (
            "dpo",
            "--label-smoothing 0.1",
            "--label-smoothing has no effect with --loss sigmoid; drop it, or choose a --loss that uses it: conservative",
        ),
        ("dpo", "--loss robust", "--loss robust needs --label-smoothing above 0 and below 0.5"),
        ("dpo", "--loss conservative --label-smoothing 0.5", "below 0.5"),
        (
            "dpo",
            "--loss simpo --length-normalize",
            "--length-normalize has no effect with --loss simpo",
        ),
        ("dpo", "--loss orpo", "set --sft-weight too"),
        ("dpo", "--loss cosine", "--loss is 'cosine'; expected one of sigmoid"),
        ("grpo", "--loss gspo", "--epochs-per-batch of 2 or more"),
        ("grpo", "--clip-dual 3", "--epochs-per-batch of 2 or more"),
        ("grpo", "--clip-dual 1.1 --epochs-per-batch 2", "above 1 + --clip-high"),
        ("grpo", "--kl-in reward --kl-estimator k3", "--kl-in reward subtracts k1"),
        (
            "grpo",
            "--baseline batch --scale-rewards group",
            "--scale-rewards group needs --baseline group",
        ),
        ("grpo", "--lr 1 --lr 2", "--lr was given twice"),
        ("grpo", "--lr-decay --no-lr-decay", "--no-lr-decay was given twice"),
        ("grpo", "--precision foo", "one of float32, bfloat16"),
        ("ppo", "--kl-in foo", "one of reward, loss"),
        ("grpo", "--group-size 0", "--group-size"),
        ("grpo", "--group-size 1", "--group-size"),
        ("pairwise-grpo", "--group-size 1", "--group-size"),
        ("ppo", "--group-size 0", "--group-size"),
        ("grpo", "--temperature 0", "--temperature"),
        ("grpo", "--temperature -1", "--temperature"),
        ("grpo", "--temperature nan", "--temperature"),
        ("grpo", "--epochs-per-batch 0", "--epochs-per-batch"),
        ("ppo", "--minibatches 0", "--minibatches"),
        ("ppo", "--lam 2", "--lam"),
        ("ppo", "--gamma -1", "--gamma"),
        ("grpo", "--beta -1", "--beta"),
        ("grpo", "--lr inf", "--lr"),
        ("grpo", "--lr -1", "--lr"),
        ("grpo", "--epochs nan", "--epochs"),
        ("grpo", "--epochs 0", "--epochs"),
        ("grpo", "--max-grad-norm 0", "--max-grad-norm"),
        ("grpo", "--seed -1", "--seed"),
        ("grpo", "--seed 99999999999999999999", "--seed"),
        ("grpo", "--eval-limit -1", "--eval-limit"),
        ("grpo", "--save-every -1", "--save-every"),
        ("grpo", "--eval-fraction 1", "--eval-fraction"),
        ("grpo", "--eval-fraction -0.1", "--eval-fraction"),
        ("grpo", "--microbatch-tokens -1", "--microbatch-tokens"),
        ("grpo", "--max-completion-tokens 99", "16 tokens"),
        ("grpo", "--device nonsense", "--device nonsense"),
        ("grpo", "--reward-weights 1 2", "2 numbers for 1 rewards"),
        ("grpo", "--reward-weights 0", "not all 0"),
        ("grpo", "--reward-weights nan", "--reward-weights"),
        ("grpo", "--reward", "no reward was named"),
        ("grpo", "--reward brevty", "brevity"),
        ("grpo", "--reward nofile.py:f", "no file nofile.py"),
        ("grpo", "--reward nomodule:f", "no module nomodule"),
        ("grpo", "--reward trivet.rewards.rules:brevty", "brevity"),
        ("grpo", f"--reward {MODEL}", "not a reward model"),
        ("grpo", "--chat-template nope.jinja", "nope.jinja"),
        ("grpo", "--model /nope/x", "/nope/x"),
        ("grpo", "--data /nope/x.jsonl", "/nope/x.jsonl: no such file"),
        ("grpo", "--eval-data /nope/y.jsonl", "/nope/y.jsonl"),
        ("grpo", "--config /nope/z.toml", "/nope/z.toml"),
    ],
)
def test_options(refused, method, flags, named):
    assert named in refused(method, *PRESET, *flags.split())


def test_steps_presets_commands_and_stray_words(refused):
    assert "--steps is -1" in refused("sft", "--preset", "arithmetic", "--steps", "-1")
    assert "toy, arithmetic" in refused("sft", "--preset", "nonsense")
    assert "'foo' belongs to no option" in refused("sft", "foo")
    assert "no model was named" in refused("sft")
    assert "--prompts-per-step of at least 2" in refused(
        "dpo", "--preset", "arithmetic", "--loss", "kto", "--prompts-per-step", "1"
    )
    assert "'grpo'" in refused("gpro")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_cuda(refused):
    assert "--device cuda" in refused("grpo", *PRESET, "--device", "cuda")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("grup_size = 2", "'group_size'"),
        ("lr = ", "not valid TOML"),
        ("lr = '1'", "lr is '1'; expected float"),
        ("prompts_per_step = 1.0", "prompts_per_step is 1.0; expected int"),
        ("lr_decay = 1", "lr_decay is 1; expected bool"),
        ("eval_every = true", "eval_every is True; expected int"),
        ("learning_rate = 1e-3", "'lr'"),
        ("num_generations = 4", "'group_size'"),
        ("reward = 1", "expected a list of str"),
        ("reward = [1]", "expected a list of str"),
        ("reward_weights = ['a']", "expected a list of float"),
        ("precision = 'foo'", "one of float32, bfloat16"),
        ("[model]\nname = 'x'", "model is {'name': 'x'}"),
        ("lr = nan", "--lr is nan"),
        ("# é".encode("latin-1"), "not valid TOML"),
    ],
)
def test_toml(refused, tmp_path, text, named):
    file = tmp_path / "options.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused("grpo", "--preset", "arithmetic", "--steps", "1", "--config", file)
    assert named in said
    assert "options.toml" in said or "--lr" in said


def test_a_list_of_one_may_be_given_as_one_and_a_path_as_such(tmp_path):
    given = grpo.PRESETS["arithmetic"] | {"reward": "brevity", "out": tmp_path / "run", "steps": 1}
    launched = Launch(grpo.Config(**given | {"model": Path(given["model"])}))
    assert list(launched.run.reward.rewards) == ["brevity"]
    assert launched.config.reward == ("brevity",)
    assert (launched.config.model, launched.config.out) == (given["model"], str(tmp_path / "run"))
    with pytest.raises(InputError, match="steps is '1'; expected int"):
        Launch(grpo.Config(**given | {"steps": "1"}))


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(
    refused, tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr("trivet.model.adapters.find_adapter_config_file", asked.append)
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda name, **options: asked.append(name)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "runs/sfft: no config.json there" in refused("sft", "--model", "runs/sfft")
    for name, said in (
        ("runs/sfft", "no config.json there"),
        ("Qwen3-06B", "the nearest known one is Qwen3-0.6B"),
    ):
        assert main(["plan", "--model", name]) == 2
        assert said in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize(
    ("method", "name", "content", "named"),
    [
        ("sft", "a.jsonl", b"", "empty"),
        ("sft", "a.jsonl", b"\n \n", "empty"),
        ("sft", "a.json", b"[]", "empty"),
        ("sft", "a.csv", b"prompt,completion\n", "empty"),
        ("sft", "a.txt", b"hello", "unknown file type"),
        (
            "sft",
            "a.jsonl",
            lines([GOOD, {"question": "x", "answer": "y"}]),
            "line 2: needs text, messages",
        ),
        ("sft", "a.jsonl", lines([{}]), "no columns"),
        (
            "reward-model",
            "a.jsonl",
            lines([GOOD]),
            "line 1: needs chosen and rejected; it has prompt, completion",
        ),
        ("dpo", "a.jsonl", lines([GOOD]), "completion and label); it has prompt, completion"),
        (
            "dpo",
            "a.jsonl",
            lines([GOOD | {"label": "yes"}]),
            "line 1: label is 'yes'; expected true",
        ),
        (
            "dpo",
            "a.jsonl",
            lines([GOOD | {"label": True}]),
            "labeled rows, not pairs; --loss kto takes either kind",
        ),
        ("grpo", "a.jsonl", lines([{"question": "x"}]), "line 1: needs prompt; it has question"),
        ("sft", "a.jsonl", lines([GOOD]) + b'{"prompt": \n', "line 2: can't be read as .jsonl"),
        ("sft", "a.jsonl", b"[1, 2]\n", "line 1: can't be read as .jsonl: not an object"),
        ("sft", "a.jsonl", b"[" * 100000, "line 1: can't be read as .jsonl: nested too deeply"),
        ("sft", "a.json", b'[{"prompt": 1},', "can't be read as .json"),
        ("sft", "a.json", b'["a"]', "not an object"),
        ("sft", "a.json", b'{"prompt": ["0"], "completion": ["1"]}', "prompt is ['0']"),
        ("sft", "a.csv", b'prompt,completion\n"0+0=,0\n', "row 1: can't be read as .csv"),
        (
            "sft",
            "a.csv",
            b"prompt,completion\n0+0=,0,5\n",
            "row 1: can't be read as .csv: more cells",
        ),
        ("sft", "a.csv", b"prompt,completion\n0+0=,0\n1+1=\n", "row 2: needs"),
        ("sft", "a.parquet", b"hello", "can't be read as .parquet"),
        ("sft", "a.jsonl.gz", b"hello", "can't be read as .jsonl"),
        (
            "sft",
            "a.jsonl.gz",
            gzip.compress(lines([GOOD] * 500), mtime=0)[:60],
            "can't be read as .jsonl",
        ),
        (
            "sft",
            "a.jsonl",
            '{"prompt": "0", "completion": "é"}\n'.encode("latin-1"),
            "line 1: can't be read",
        ),
        ("sft", "a.csv", "prompt,completion\n0,é\n".encode("latin-1"), "row 1: can't be read"),
        (
            "sft",
            "a.jsonl",
            b'{"prompt": "\\ud800", "completion": "0"}\n',
            "line 1: can't be read as .jsonl: its text is not valid Unicode",
        ),
        ("sft", "a.jsonl", lines([{"prompt": None, "completion": "0"}]), "prompt (null)"),
        ("dpo", "a.jsonl", lines([PAIR | {"rejected": None}]), "rejected (null)"),
        ("sft", "a.jsonl", lines([{"prompt": 5, "completion": "0"}]), "line 1: prompt is 5"),
        ("sft", "a.jsonl", lines([GOOD | {"completion": 5}]), "line 1: completion is 5"),
        ("sft", "a.jsonl", lines([{"text": {"a": 1}}]), "line 1: text is {'a': 1}"),
        ("sft", "a.jsonl", lines([{"messages": "hello"}]), "line 1: messages is 'hello'"),
        ("dpo", "a.jsonl", lines([PAIR | {"chosen": [1]}]), "line 1: chosen is [1]"),
        ("dpo", "a.jsonl", lines([{"chosen": 1, "rejected": 1}]), "line 1: chosen is 1"),
        (
            "dpo",
            "a.jsonl",
            lines([PAIR | {"chosen": [ANSWER]}]),
            "line 1: one of chosen and rejected is a string",
        ),
        ("grpo", "a.jsonl", lines([{"prompt": True}]), "line 1: prompt is True"),
        (
            "dpo",
            "a.jsonl",
            lines([PAIR | {"rejected": "0"}] * 2),
            "2 left out: chosen equals rejected",
        ),
        ("dpo", "a.jsonl", lines([PAIR | {"rejected": ""}]), "1 left out: empty completion"),
        (
            "dpo",
            "a.jsonl",
            lines([PAIR | {"chosen": "1234", "rejected": "1256"}]),
            "chosen equals rejected once cut",
        ),
        ("grpo", "a.jsonl", lines([{"prompt": ""}]), "1 left out: empty prompt"),
        ("grpo", "a.jsonl", lines([{"prompt": "1" * 99}]), "1 left out: prompt over 14 tokens"),
        (
            "sft",
            "a.jsonl",
            lines([{"messages": [USER, ANSWER]}]),
            "line 1: the data holds conversations",
        ),
        (
            "sft",
            "a.jsonl",
            lines([{"messages": [{"from": "human", "value": "a"}]}]),
            "line 1: messages is [{'from'",
        ),
        (
            "sft",
            "a.jsonl",
            lines([{"messages": [{"role": "user"}, ANSWER]}]),
            "line 1: messages is [{'role'",
        ),
        (
            "sft",
            "a.jsonl",
            lines([{"messages": [{"content": "a"}, ANSWER]}]),
            "line 1: messages is [{'content'",
        ),
        (
            "sft",
            "a.jsonl",
            lines([{"messages": [USER, {"role": "assistant", "content": None}]}]),
            "line 1: messages is",
        ),
        (
            "sft",
            "a.jsonl",
            lines([{"prompt": [USER, "x"], "completion": [ANSWER]}]),
            "line 1: prompt is",
        ),
        (
            "grpo",
            "a.jsonl",
            lines([{"prompt": [{"role": 3, "content": "a"}]}]),
            "line 1: prompt is",
        ),
    ],
)
def test_data(refused, tmp_path, method, name, content, named):
    (tmp_path / name).write_bytes(content)
    reward = ["--reward", "brevity"] if method == "grpo" else []
    said = refused(method, *BARE, *reward, "--data", tmp_path / name)
    assert str(tmp_path / name) in said
    assert named in said


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            "{{ raise_exception('only user\nand assistant') if messages[0].role == 'alien' }}",
            "roles alien: only user",
        ),
        ("{% for x in %}", "line 1: the chat template fails"),
        ("{{ messages[0].foo.bar }}", "line 1: the chat template fails"),
        ("é".encode("latin-1"), "--chat-template takes"),
    ],
)
def test_chat_templates(refused, tmp_path, template, named):
    (tmp_path / "t.jinja").write_bytes(
        template if isinstance(template, bytes) else template.encode()
    )
    (tmp_path / "a.jsonl").write_bytes(lines([{"messages": [USER | {"role": "alien"}, ANSWER]}]))
    assert named in refused(
        "sft", *BARE, "--data", tmp_path / "a.jsonl", "--chat-template", tmp_path / "t.jinja"
    )


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (
            "def r(completions, **k):\n    raise ValueError('a\\nb')",
            "raised ValueError in its line 2: a b",
        ),
        ("def r(completions, **k):\n    return k['solution']", "raised KeyError in its line 2"),
        ("import sys\ndef r(completions, **k):\n    sys.exit(3)", "raised SystemExit"),
        ("def r(completions, **k):\n    return [1.0]", "returned 1 values; expected a list of 64"),
        ("def r(completions, **k):\n    pass", "returned NoneType"),
        (
            "def r(completions, **k):\n    return [float('nan')] * len(completions)",
            "returned nan for completion 0",
        ),
        ("def r(completions, **k):\n    return [1e39] * len(completions)", "returned 1e+39"),
        ("def r(completions, **k):\n    return [10**400] * len(completions)", "for completion 0"),
        (
            "def r(completions, **k):\n    return ['1'] * len(completions)",
            "returned '1' for completion 0",
        ),
        ("def r(completions, solution):\n    return 0", "asks for column 'solution'"),
        ("def r(completions, solution, **k):\n    return 0", "asks for column 'solution'"),
        (
            "def r(log_metric, completions, **k):\n    log_metric('x', 'abc')",
            "raised ValueError in its line 2",
        ),
        ("def q():\n    pass", "has no function r; it has q"),
        ("r = 3", "has no function r"),
        ("def r(:", "can't be imported: SyntaxError"),
        ("import not_there", "can't be imported: ModuleNotFoundError"),
        ("raise SystemExit(1)", "can't be imported: SystemExit"),
    ],
)
def test_rewards(refused, tmp_path, source, named):
    (tmp_path / "mine.py").write_text(source)
    said = refused("grpo", *PRESET, "--reward", f"{tmp_path / 'mine.py'}:r")
    assert named in said
    assert "mine.py:r" in said


def folder(tmp_path: Path, *without: str, **config: object) -> Path:
    """A copy of the arithmetic model's folder, without some files, its config.json changed."""
    path = shutil.copytree(MODEL, tmp_path / "model-folder")
    for name in without:
        (path / name).unlink()
    if config:
        (path / "config.json").write_text(
            json.dumps(json.loads((path / "config.json").read_text()) | config)
        )
    return path


def weights(path: Path, edit=lambda tensors: tensors) -> Path:
    """Give the folder weights, changed by edit."""
    main(["sft", *PRESET, "--out", str(path / "run")])
    tensors = edit(load_file(path / "run" / "model" / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def train_reward_model(tmp_path: Path) -> Path:
    data = Path(ARITHMETIC["data"])
    assert (
        main(["reward-model", *BARE, "--data", str(data), "--out", str(tmp_path / "scorer")]) == 0
    )
    return tmp_path / "scorer"


def truncate(path: Path) -> Path:
    file = weights(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return path


def foreign_tokenizer(path: Path) -> Path:
    text = (path / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    tokenizer["model"]["vocab"]["0"] = 77
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def bert(path: Path) -> Path:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    BertConfig(**sizes, vocab_size=50, architectures=["BertForMaskedLM"]).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "scratch", "named"),
    [
        (
            lambda p: folder(p, "tokenizer.json", "tokenizer_config.json"),
            True,
            "has no tokenizer",
        ),
        (lambda p: folder(p, "config.json"), True, "no config.json there"),
        (lambda p: folder(p, model_type="nonsense"), True, "can't be loaded"),
        (lambda p: folder(p, hidden_size="x"), True, "can't be loaded"),
        (lambda p: folder(p, num_attention_heads=0), True, "can't be loaded"),
        (lambda p: folder(p), False, "can't be loaded"),
        (lambda p: truncate(folder(p)), False, "can't be loaded"),
        (
            lambda p: weights(folder(p), lambda t: dict(list(t.items())[3:])),
            False,
            "missing from its files",
        ),
        (
            lambda p: weights(folder(p), lambda t: {k: v[:5].clone() for k, v in t.items()}),
            False,
            "differ in shape from config.json",
        ),
        (lambda p: foreign_tokenizer(folder(p)), True, "token id 77"),
        (lambda p: bert(folder(p)), True, "a BertForMaskedLM; grpo needs a causal language model"),
        (
            train_reward_model,
            False,
            "a LlamaForSequenceClassification; grpo needs a causal language model",
        ),
    ],
)
def test_models(refused, tmp_path, capsys, make, scratch, named):
    path = make(tmp_path)
    capsys.readouterr()
    options = [
        "--model",
        path,
        "--data",
        ARITHMETIC["data"],
        "--reward",
        "brevity",
        "--max-completion-tokens",
        "2",
    ]
    said = refused("grpo", *options, "--steps", "1", *(["--from-scratch"] if scratch else []))
    assert named in said
    assert str(path) in said


def test_a_reward_model_that_lost_its_head(refused, tmp_path, capsys):
    path = train_reward_model(tmp_path)
    file = path / "model" / "model.safetensors"
    tensors = {key: value for key, value in load_file(file).items() if not key.startswith("score")}
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert "score.weight" in refused("grpo", *PRESET, "--reward", path)


def test_run_directories(refused, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "config.toml").write_text("")
    assert "already holds a run" in refused("sft", *PRESET, out=held)
    assert "not a writable directory" in refused("sft", *PRESET, out=held / "config.toml")
    assert "not a writable directory" in refused("sft", *PRESET, out=held / "config.toml" / "run")
    (tmp_path / "dangling").symlink_to(tmp_path / "not-there" / "run")
    assert "dangling" in refused(
        "sft", *PRESET, out=tmp_path / "dangling"
    )  # found only when it is made


def test_ctrl_c(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def r(completions, **k):\n    raise KeyboardInterrupt")
    assert (
        main(
            [
                "grpo",
                *PRESET,
                "--reward",
                f"{tmp_path / 'mine.py'}:r",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 130
    )
    assert "stopped" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused(refused, tmp_path, capsys):
    path = weights(
        folder(tmp_path), lambda t: {k: torch.full_like(v, torch.nan) for k, v in t.items()}
    )
    capsys.readouterr()
    options = [
        "--model",
        path,
        "--data",
        ARITHMETIC["data"],
        "--max-completion-tokens",
        "2",
        "--steps",
        "1",
    ]
    assert "tensors contain NaN or infinite values" in refused("sft", *options)


def test_a_run_without_a_finite_gradient_is_no_run(tmp_path, capsys):
    path = weights(
        folder(tmp_path),
        lambda t: {k: torch.full_like(v, 3e38) if "norm" in k else v for k, v in t.items()},
    )
    options = [
        "--model",
        str(path),
        "--data",
        str(ARITHMETIC["data"]),
        "--max-completion-tokens",
        "2",
        "--steps",
        "2",
    ]
    assert main(["sft", *options, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "skipped 2 steps in a row, from step 1, because their gradient was not finite" in said
    assert "trivet replay" in said


def test_degenerate_rows_are_counted_and_the_run_goes_on(counted, tmp_path):
    rows = [
        *[PAIR] * 4,
        PAIR | {"rejected": "0"},
        PAIR | {"chosen": ""},
        PAIR | {"prompt": "1" * 50},
        PAIR | {"prompt": ""},
        PAIR | {"chosen": "123"},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    counts = counted(
        "dpo", *BARE, "--data", tmp_path / "a.jsonl", "--eval-data", tmp_path / "a.jsonl"
    )
    assert counts == {
        "rows read": 9,
        "examples": 5,
        "left out: chosen equals rejected": 1,
        "left out: empty completion": 1,
        "left out: prompt over 14 tokens": 1,
        "left out: empty prompt": 1,
        "cut: completion over 2 tokens (its EOS is not learned)": 1,
        "for training": 5,
        "held out": 5,
    } | {
        f"held-out data, {key}": count
        for key, count in counts.items()
        if key.startswith(("left", "cut"))
    }
    assert counts["held-out data, left out: empty prompt"] == 1


@pytest.mark.parametrize("method", ["grpo", "ppo", "pairwise-grpo"])
def test_a_reward_without_an_opinion_is_counted(counted, tmp_path, method):
    body = "return [None if i % 3 else float(i % 2) for i in range(len(completions))]"
    (tmp_path / "mine.py").write_text(f"def r(completions, **k):\n    {body}")
    counted(method, *PRESET, "--reward", f"{tmp_path / 'mine.py'}:r")
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert metrics["rewards/unscored"] == sum(i % 3 > 0 for i in range(64))
    assert metrics["reward"] == metrics["rewards/r/mean"]


def test_a_reward_may_return_an_array(counted, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef r(completions, **k):\n    return torch.ones(len(completions))"
    )
    counted("grpo", *PRESET, "--reward", f"{tmp_path / 'mine.py'}:r")


def test_minibatches_beyond_the_prompts_and_help(counted, capsys):
    counted("ppo", *PRESET, "--minibatches", "99")
    assert main(["ppo", "--help"]) == 0
    assert "[reward | loss; default reward]" in capsys.readouterr().out
