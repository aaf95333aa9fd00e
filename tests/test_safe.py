"""Loading is safe: no code and no pickles of a stranger, templates in their sandbox, no connection that nobody asked for."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trivet.cli.main import main
from trivet.toy import ARITHMETIC, STORIES

CODE = """
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "strange"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch, tmp_path):
    """What a test trusts is forgotten after it."""
    monkeypatch.setenv("TRIVET_TRUST_REMOTE_CODE", "0")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", [*sys.path])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_code(path: Path, mark: Path) -> Path:
    """The story model as a kind that only its own file knows, which leaves a mark where it runs."""
    shutil.copytree(STORIES["model"], path)
    edit(
        path / "config.json",
        model_type="strange",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (path / "own.py").write_text(CODE.format(mark=str(mark)))
    return path


def train(path: Path, *flags: str) -> int:
    return main(
        [
            "sft",
            "--preset",
            "toy",
            "--steps",
            "1",
            "--model",
            str(path),
            "--out",
            f"{path}-run",
            *flags,
        ]
    )


@pytest.mark.parametrize("flags", [[], ["--from-scratch"]])
def test_a_model_with_code_of_its_own_is_refused_in_a_sentence(tmp_path, capsys, flags):
    path = with_code(tmp_path / "model", tmp_path / "mark")
    assert train(path, *flags) == 2
    said = capsys.readouterr()
    assert (
        "it needs Python code of its own; inspect its files and, if you trust them, pass --trust-remote-code"
        in said.err
    )
    assert said.err.count("\n") == 1
    assert "[y/N]" not in said.out  # transformers would ask
    assert not (tmp_path / "mark").exists()


def test_it_runs_where_the_command_line_says_so_and_nowhere_else(tmp_path, capsys):
    path = with_code(tmp_path / "model", tmp_path / "mark")
    (tmp_path / "a.toml").write_text("trust_remote_code = true")
    assert train(path, "--config", str(tmp_path / "a.toml")) == 2
    assert "unknown key 'trust_remote_code'" in capsys.readouterr().err
    assert train(path, "--trust-remote-code") == 0
    assert (tmp_path / "mark").exists()


def test_code_beside_a_known_kind_of_model_is_not_run(tmp_path):
    path = with_code(tmp_path / "model", tmp_path / "mark")
    edit(path / "config.json", model_type="llama")
    assert train(path) == 0
    assert not (tmp_path / "mark").exists()


def test_a_tokenizer_with_code_of_its_own(tmp_path, capsys):
    path = shutil.copytree(STORIES["model"], tmp_path / "model")
    (path / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    edit(
        path / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Config", None]},
    )
    assert train(path) == 2
    assert f"tokenizer of {path}: it needs Python code of its own" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


@pytest.mark.slow
def test_weights_that_are_pickles_wait_for_trust(tmp_path, capsys):
    path = shutil.copytree(STORIES["model"], tmp_path / "model")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert train(path) == 2
    assert "its weights are not in safetensors" in capsys.readouterr().err
    assert train(path, "--trust-remote-code") == 0
    assert (Path(f"{path}-run") / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch mark') }}",
        "{{ messages.append(messages[0]) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 12) %}{{ i }}{% endfor %}",
    ],
)
def test_chat_templates_stay_in_their_sandbox(tmp_path, capsys, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jinja").write_text(template)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns}))
    options = [
        "--model",
        ARITHMETIC["model"],
        "--from-scratch",
        "--steps",
        "1",
        "--max-completion-tokens",
        "2",
    ]
    options += ["--data", "a.jsonl", "--chat-template", "a.jinja", "--out", "run"]
    assert main(["sft", *options]) == 2
    assert "a.jsonl line 1: the chat template fails" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()


WATCHED = """
import sys
reached = []
def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        reached.append((event, args[1:] if event.startswith("socket.s") or event == "socket.connect" else args))
sys.addaudithook(hook)
from trivet.cli.main import main
code = main(sys.argv[1:])
assert not reached, reached
sys.exit(code)
"""


def watched(*args: str) -> subprocess.CompletedProcess:
    """A command in a process of its own, which fails if it looks for anybody."""
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *args], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft --preset toy", "grpo --preset arithmetic"])
def test_a_run_opens_no_connection(tmp_path, command):
    done = watched(*command.split(), "--steps", "1", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    done = watched("report", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_connection_would_be_seen(tmp_path):
    body = "import socket\ndef r(completions, **k):\n    socket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    (tmp_path / "mine.py").write_text(body)
    command = [
        "grpo",
        "--preset",
        "arithmetic",
        "--steps",
        "1",
        "--reward",
        f"{tmp_path / 'mine.py'}:r",
    ]
    assert (
        "AssertionError: [('socket.connect'"
        in watched(*command, "--out", str(tmp_path / "run")).stderr
    )
