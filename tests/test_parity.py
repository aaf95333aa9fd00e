"""Loss and gradient of every method and variant agree with TRL's, to 1e-5; `python tests/parity.py` prints the table."""

import importlib.util

import pytest

from parity import PPO_PEER, TOLERANCE, ppo_table, table


@pytest.fixture(scope="module")
def rows():
    """A row for each case: TRL's objectives are imported and run for it."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs TRL 1.16: pip install -e .[dev]")
    return table()


@pytest.fixture(scope="module")
def ppo_rows():
    """The same by a process that finds the last release that had PPO."""
    if not PPO_PEER.exists():
        pytest.skip("needs TRL 1.12.0 beside the environment, as make test sets it up")
    return ppo_table()


def test_loss_and_gradient_are_those_of_trl(rows):
    assert len(rows) == 33
    assert [row for row in rows if not max(row[4:]) <= TOLERANCE] == []


def test_ppo_is_that_of_the_last_release_that_had_it(ppo_rows):
    assert len(ppo_rows) == 18
    assert [row for row in ppo_rows if not max(row[4:]) <= TOLERANCE] == []
