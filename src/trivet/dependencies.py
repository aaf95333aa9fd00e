"""Check that the libraries Trivet needs are installed, in versions it was tested with.

The ranges are those of pyproject.toml, read from the installed package's metadata. `make
test-bounds` tests both ends of each.
"""

import os
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from trivet.errors import InputError

ANY_VERSION = "TRIVET_ANY_VERSION"  # environment variable; 1 allows versions that were not tested


@cache
def require_tested_versions() -> None:
    """Raise InputError if a library that every run needs has a version outside its tested range,
    naming both.
    """
    for needed in _requirements():
        if outside := _outside(needed):
            raise InputError(outside)


def require_extra(extra: str, job: str) -> None:
    """Raise InputError if a package of this extra is missing or outside its tested range. job: what
    needs it.
    """
    for needed in _requirements(extra):
        try:
            version(needed.name)
        except PackageNotFoundError:
            raise InputError(
                f"{job} needs the package {needed.name}, which is not installed; run pip install "
                f'"trivet[{extra}]"'
            ) from None
        if outside := _outside(needed):
            raise InputError(outside)


def _requirements(extra: str = "") -> Iterator[Requirement]:
    """The requirements of every run, or only those of this extra."""
    try:
        lines = requires("trivet") or []
    except PackageNotFoundError:  # run from source without being installed: no metadata
        lines = []
    for needed in map(Requirement, lines):
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if (
            always
            if not extra
            else not always and needed.marker and needed.marker.evaluate({"extra": extra})
        ):
            yield needed


def _outside(needed: Requirement) -> str:
    """The error message if the installed version is outside this range; '' if it is inside or the
    package is missing.
    """
    try:
        installed = version(needed.name)
    except PackageNotFoundError:
        return ""
    if os.environ.get(ANY_VERSION) == "1" or needed.specifier.contains(installed, prereleases=True):
        return ""
    tested = f"{needed.name}{needed.specifier}"
    return (
        f"{needed.name} {installed} is installed, but Trivet was tested with {tested}; run pip "
        f"install '{tested}', or set {ANY_VERSION}=1 to try this version anyway"
    )
