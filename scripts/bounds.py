"""Do the ends of the ranges in pyproject.toml hold? A short part of the tests with other versions than those of requirements.lock.

    python scripts/bounds.py lowest                  # the lowest versions that pyproject.toml allows
    python scripts/bounds.py newest                  # the newest there are, whatever pyproject.toml allows
    python scripts/bounds.py newest --torch torch==2.13.0   # but this torch, whose own ends are some 3 GB each

Makes an environment of its own in .venv-lowest or .venv-newest. Where tests fail, each library that is not at the version of the lock
is moved alone, beside the others as locked, and the tests that failed are run again: so the library that broke them is named.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
UV = [str(Path(sys.executable).with_name("uv")), "pip"]
EXTRAS = ("hub", "plot", "watch", "test")
OWN_BUILD = re.compile(
    "torch|triton|cuda-.*|nvidia-.*"
)  # what belongs to a build of torch is pinned by torch itself
# fmt: off
TESTS = (
    "forward", "engine", "sampling", "lean", "lora", "recipes", "record", "data", "rows", "rewards", "plots", "watch",
    "bad_input", "commands", "dependencies", "layouts", "safe",
)
# fmt: on


def main() -> None:
    """Resolve, install, test, and name what broke."""
    parser = argparse.ArgumentParser()
    parser.add_argument("end", choices=("lowest", "newest"))
    parser.add_argument(
        "--torch", default="", help="what to install for torch, in place of its own end"
    )
    given = parser.parse_args()
    direct, locked = direct_requirements(), read_lock()
    moved = resolved(direct, given.end)
    torch = given.torch or f"torch=={moved['torch']}"
    python = environment(ROOT / f".venv-{given.end}", torch, moved)
    differ = [name for name in direct if name != "torch" and moved[name] != locked.get(name)]
    said = [f"{name} {moved[name]} (locked: {locked.get(name)})" for name in differ]
    print(f"{given.end}: {', '.join([torch, *said])}", flush=True)
    failed = failing(python, [f"tests/test_{name}.py" for name in TESTS])
    if not failed:
        print(f"{given.end}: all passed")
        return
    print(f"{given.end}: {len(failed)} tests failed; which library broke them?", flush=True)
    for name in (
        "",
        *differ,
    ):  # first none: what fails then fails by torch, which is not moved back
        pinned = {
            other: Requirement(f"{other}=={locked[other]}")
            for other in direct
            if other not in ("torch", name)
        }
        pinned |= {name: Requirement(f"{name}=={moved[name]}")} if name else {}
        what = f"{name} {moved[name]}" if name else torch
        try:
            install(python, resolved(pinned, "newest"))
        except subprocess.CalledProcessError:
            print(
                f"  {what}: does not go with the others as locked, so not tried alone", flush=True
            )
            continue
        broken = failing(python, failed, quiet=True)
        print(
            f"  {what}: {f'breaks {len(broken)}, first {broken[0]}' if broken else 'breaks none'}",
            flush=True,
        )
        failed = [test for test in failed if name or test not in broken]
    sys.exit(1)


def read_lock() -> dict[str, str]:
    """The pinned version of each library on this machine, torch's too, by its normalized name."""
    text, found = (ROOT / "requirements.lock").read_text(), {}
    found["torch"] = re.findall(r"TORCH_VERSION := (\S+)", (ROOT / "Makefile").read_text())[0]
    for line in text.splitlines():
        if not line.startswith("#"):
            pinned = Requirement(line)
            if pinned.marker is None or pinned.marker.evaluate():
                found[pinned.name] = str(pinned.specifier).removeprefix("==")
    return found


def direct_requirements() -> dict[str, Requirement]:
    """What pyproject.toml names itself, without and with EXTRAS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for extra in EXTRAS for line in project["optional-dependencies"][extra]),
    ]
    return {
        needed.name: needed for needed in map(Requirement, lines) if needed.name != project["name"]
    }


def resolved(direct: dict[str, Requirement], end: str) -> dict[str, str]:
    """The versions of these libraries at one end, the lowest allowed or the newest there is, and of all that they need the newest."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(at_end(needed, end) for needed in direct.values()))
        file.flush()
        command = [
            *UV,
            "compile",
            file.name,
            "--python",
            sys.executable,
            "--no-annotate",
            "--no-header",
            "--quiet",
        ]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(line.split("==") for line in said.splitlines() if "==" in line)


def at_end(needed: Requirement, end: str) -> str:
    """This requirement at one end of its range; one of a single version stays."""
    versions = {specifier.operator: specifier.version for specifier in needed.specifier}
    exact = versions.get("==") or (versions[">="] if end == "lowest" else "")
    return f"{needed.name}=={exact}" if exact else needed.name


def environment(folder: Path, torch: str, versions: dict[str, str]) -> str:
    """An environment with this torch and these versions; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = str(folder / "bin" / "python")
    subprocess.run([*UV, "install", "--python", python, "--quiet", *torch.split()], check=True)
    install(python, versions)
    subprocess.run(
        [*UV, "install", "--python", python, "--quiet", "--no-deps", "--editable", str(ROOT)],
        check=True,
    )
    return python


def install(python: str, versions: dict[str, str]) -> None:
    """Put these versions there; torch and what belongs to its build stay."""
    lines = [
        f"{name}=={version}" for name, version in versions.items() if not OWN_BUILD.fullmatch(name)
    ]
    subprocess.run([*UV, "install", "--python", python, "--quiet", "--no-deps", *lines], check=True)


def failing(python: str, which: Sequence[str], quiet: bool = False) -> list[str]:
    """Run these tests, warnings allowed; returns those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            python,
            "-m",
            "pytest",
            "-n",
            "2",
            "-o",
            "filterwarnings=",
            "--disable-warnings",
            "--tb=line",
            "--limit=0",
        ]
        subprocess.run(
            [*command, f"--junit-xml={report}", *which],
            check=False,
            cwd=ROOT,
            env=os.environ | {"TRIVET_ANY_VERSION": "1"},
            stdout=subprocess.DEVNULL if quiet else None,
        )
        if not report.exists():
            return list(which)
        return list(failures(xml.etree.ElementTree.parse(report).iter("testcase")))


def failures(cases: Iterable[xml.etree.ElementTree.Element]) -> Iterable[str]:
    """The tests that failed, as pytest wants them named."""
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            file = case.get("classname", "").replace(".", "/") + ".py"
            yield f"{file}::{case.get('name')}" if (ROOT / file).exists() else f"tests/{file}"


if __name__ == "__main__":
    main()
