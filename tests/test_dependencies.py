"""The libraries: missing ones and untried versions cost a sentence, and what is installed is what the lock says."""

import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trivet import dependencies
from trivet.cli.main import main
from trivet.dependencies import require_extra, require_tested_versions
from trivet.errors import InputError

ROOT = Path(__file__).parent.parent
ANOTHER = (
    os.environ.get("TRIVET_ANY_VERSION") == "1"
)  # an environment made to be another than the locked one


@pytest.fixture
def installed(monkeypatch):
    """Says of some packages that they are installed in another version, or (None) not at all."""
    monkeypatch.delenv("TRIVET_ANY_VERSION", raising=False)
    other = dict[str, str | None]()

    def told(name: str) -> str:
        if (found := other.get(name, "as it is")) is None:
            raise PackageNotFoundError(name)
        return version(name) if found == "as it is" else found

    monkeypatch.setattr(dependencies, "version", told)
    require_tested_versions.cache_clear()
    yield other
    require_tested_versions.cache_clear()


@pytest.mark.skipif(ANOTHER, reason="other versions are being tried")
def test_the_installed_versions_are_tried_ones(installed):
    require_tested_versions()


@pytest.mark.parametrize("found", ["4.57.1", "6.0.0", "99.1"])
def test_an_untried_version_costs_one_sentence_with_both_versions(installed, monkeypatch, found):
    installed["transformers"] = found
    with pytest.raises(
        InputError,
        match=rf"transformers {found} is installed.* tested with transformers<5\.\d+,>=5\.",
    ) as told:
        require_tested_versions()
    assert "\n" not in str(told.value)
    assert "pip install" in str(told.value)
    monkeypatch.setenv("TRIVET_ANY_VERSION", "1")
    require_tested_versions.cache_clear()
    require_tested_versions()


def test_builds_and_nightlies_of_a_tried_version_are_tried(installed):
    for build in ("2.13.0+cpu", "2.13.0+cu130", "2.14.1.post2", "2.15.0.dev20260801+cpu"):
        installed["torch"] = build
        require_tested_versions.cache_clear()
        require_tested_versions()


def test_a_missing_extra_is_named_with_the_command_that_brings_it(installed, tmp_path, capsys):
    for extra, package in (("hub", "datasets"), ("plot", "matplotlib"), ("watch", "uvicorn")):
        installed[package] = None
        with pytest.raises(
            InputError, match=rf'needs the package {package}.*pip install "trivet\[{extra}\]"'
        ):
            require_extra(extra, "this")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for command in (
        ["watch", str(tmp_path)],
        ["plot", str(tmp_path), "--y", "loss"],
        [
            "sft",
            "--preset",
            "toy",
            "--data",
            str(tmp_path / "rows.parquet"),
            "--out",
            str(tmp_path / "run"),
        ],
        ["sft", "--preset", "toy", "--data", "somebody/something", "--out", str(tmp_path / "run")],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert 'pip install "trivet[' in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_old_package_of_an_extra_costs_a_sentence(installed):
    installed["datasets"] = "2.0.0"
    with pytest.raises(InputError, match=r"datasets 2\.0\.0 is installed.*datasets>="):
        require_extra("hub", "this")


def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('# trivet grpo --config config.toml\nmodel = "x"\n')
    (tmp_path / "bad.toml").write_text("lr = [")
    wrong = {  # command: what is said of it
        "grpo --lrr 1": "nearest known one is --lr",
        "grpo --lr high": "expected float",
        "grpo": "no model was named",
        "dpo --model /no/such/folder --data x.jsonl": "no config.json there",
        "dpo --preset toy --data nothing.jsonl": "nothing.jsonl: no such file",
        "dpo --model org/name": "no data was named",
        "ppo --preset toy --reward nothing.py:f": "no file nothing.py",
        "ppo --preset toy --chat-template nothing.jinja": "no file nothing.jinja",
        f"sft --config {tmp_path}/nothing.toml": "No such file",
        f"sft --config {tmp_path}/bad.toml": "not valid TOML",
        "grpo --preset toyy": "unknown preset 'toyy'",
        f"grpo --preset toy --out {run}": "already holds a run",
        "grpo --preset toy --track wandbb": "--track wandbb",
        "grpo --preset toy --group-size 1": "at least 2",
        "resume nothing": "not a run directory",
        f"resume {run} --lrr 1": "nearest known one is --lr",
        "generate --modell x": "nearest known one is --model",
        "score --rewards x": "nearest known one is --reward",
        "plan --modell x": "nearest known one is --model",
        "plot x --yy loss": "nearest known one is --y",
        "watch x --prot 1": "nearest known one is --port",
        "quickstart --sede 1": "nearest known one is --seed",
        "grppo": "nearest known one is 'grpo'",
    }
    code = "import sys; from trivet.cli.main import main\nfor line in sys.stdin: print(main(line.split()), file=sys.stderr)\n"
    code += "assert not {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'starlette'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(wrong), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said[1::2] == ["2"] * len(wrong)
    for (command, expected), line in zip(wrong.items(), said[::2], strict=True):
        assert expected in line, f"{command}: {line}"


@pytest.mark.skipif(ANOTHER, reason="other versions are being tried")
def test_what_is_installed_is_what_the_lock_says():
    bounds = runpy.run_path(str(ROOT / "scripts" / "bounds.py"))
    lock, own_build = bounds["read_lock"](), bounds["OWN_BUILD"]
    seen, left = set[str](), [("trivet", "dev"), ("hatchling", ""), ("editables", "")]
    while left:
        name, extra = left.pop()
        if f"{name}[{extra}]" in seen:
            continue
        seen.add(f"{name}[{extra}]")
        found = distribution(name)
        if name != "trivet" and not own_build.fullmatch(name):
            assert found.version == lock[name], (
                "another version than requirements.lock says; run `make install`"
            )
        for needed in map(Requirement, found.requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                left += [(_normal(needed.name), other) for other in ("", *needed.extras)]
    assert {"transformers[]", "peft[]", "datasets[]", "pytest[]", "trl[]", "hatchling[]"} <= seen
    assert distribution("torch").version.split("+")[0] == lock["torch"]


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()
