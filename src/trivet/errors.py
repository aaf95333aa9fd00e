"""The one exception meant for users: a sentence that says what was wrong with their input and how
to fix it.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message names the file, row or key, what was expected and what to do; the
    command line prints it and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the error's class name if it is
    empty.
    """
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most similar to this one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
