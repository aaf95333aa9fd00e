"""docs/kl.md holds the table that enumeration gives, and what the text draws from it is so."""

from pathlib import Path

from kl_table import lines, table

ROOT = Path(__file__).parent.parent


def test_the_document_shows_the_table_as_it_is_computed():
    document = (ROOT / "docs" / "kl.md").read_text()
    assert "\n".join(lines()) in document


def test_who_teaches_the_gradient_of_the_kl():
    rows, exact = table(), 1e-12
    assert max(rows["reward", "k1"][:2]) < exact  # the only one that is right for whole texts
    assert min(row[1] for key, row in rows.items() if key != ("reward", "k1")) > 0.01
    for name in ("k2", "ratio x k1", "ratio x k3"):
        assert rows["loss", name][0] < exact
    for name in ("ratio x k1", "ratio x k3"):
        assert rows["loss", name][2] < exact  # and nothing else is right off-policy
    assert min(row[2] for key, row in rows.items() if "ratio" not in key[1]) > 0.01
    assert abs(rows["loss", "k1"][0] - 1) < exact  # nothing at all
    assert abs(rows["loss", "k1"][1] - 1) < exact
    assert rows["loss", "k3"][0] > 0.5
    assert rows["reward", "k3"][0] > 0.5
