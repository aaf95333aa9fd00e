"""Loss and gradient of every method and variant agree with TRL's, to 1e-5; `python tests/parity.py` prints the table."""

import importlib.util

import pytest

from parity import PPO_PEER, TOLERANCE, ppo_table, table


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL 1.16: pip install -e .[dev]")
def test_loss_and_gradient_are_those_of_trl():
    rows = table()
    assert len(rows) == 33
    assert [row for row in rows if not max(row[4:]) <= TOLERANCE] == []


@pytest.mark.skipif(not PPO_PEER.exists(), reason="needs TRL 1.12.0 beside the environment, as make test sets it up")
def test_ppo_is_that_of_the_last_release_that_had_it():
    rows = ppo_table()
    assert len(rows) == 18
    assert [row for row in rows if not max(row[4:]) <= TOLERANCE] == []
