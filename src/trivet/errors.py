"""The one exception that a person is meant to read: bad input, said in a sentence with the way out."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Names the file, row or key, what was expected and what to do; the command line prints it and exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of what another library says, its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like this one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
