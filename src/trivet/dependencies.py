"""The libraries that this package stands on: whether they are there, and of a version that was tried with it.

The ranges are those of pyproject.toml, read from the installed package's own metadata. `make test-bounds` tries their ends.
"""

import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from trivet.errors import InputError

ANY_VERSION = "TRIVET_ANY_VERSION"  # set to 1 in the environment: run with versions that were not tried


@cache
def require_tried_versions() -> None:
    """InputError where a library that every run needs is of a version outside the range that was tried, naming both."""
    for needed in _requirements():
        if outside := _outside(needed):
            raise InputError(outside)


def require_extra(extra: str, job: str) -> None:
    """InputError where the packages of an extra are missing, or outside the range that was tried. job: what needs them."""
    for needed in _requirements(extra):
        try:
            version(needed.name)
        except PackageNotFoundError:
            said = f'{job} needs the package {needed.name}, which is not installed: pip install "trivet[{extra}]"'
            raise InputError(said) from None
        if outside := _outside(needed):
            raise InputError(outside)


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """What the package needs always, or with this extra alone."""
    try:
        lines = requires("trivet") or []
    except PackageNotFoundError:  # run from its source, not installed: nobody said what it needs
        lines = []
    for needed in map(Requirement, lines):
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if always if not extra else not always and needed.marker and needed.marker.evaluate({"extra": extra}):
            yield needed


def _outside(needed: Requirement) -> str:
    """What is said of an installed version that this does not allow; '' where it does, or where nothing is installed."""
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return ""
    if os.environ.get(ANY_VERSION) == "1" or needed.specifier.contains(found, prereleases=True):
        return ""
    wanted = f"{needed.name}{needed.specifier}"
    return (
        f"{needed.name} {found} is installed, and Trivet was tried with {wanted}: pip install '{wanted}', "
        f"or set {ANY_VERSION}=1 to try it as it is"
    )
