"""A small number of cases of each target of fuzz.py."""

import pytest

from fuzz import targets


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", ["files", "TOML", "flags", "rewards", "judges", "checkpoints", "directories"]
)
def test_anything_is_taken_or_refused_in_a_sentence(target):
    targets(cases=150)[target]()
