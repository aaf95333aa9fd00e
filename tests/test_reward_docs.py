"""docs/rewards.md names every setting of every reward, with its default."""

import dataclasses
import re
from pathlib import Path

import pytest

from trivet.rewards.code import CodeReward
from trivet.rewards.functions import FunctionReward
from trivet.rewards.judge import Judge

DOCS = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()


@pytest.mark.parametrize(
    ("title", "kind"), [("Functions", FunctionReward), ("Code", CodeReward), ("Judges", Judge)]
)
def test_every_setting_is_in_the_documents(title, kind):
    section = DOCS.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    own = {"function", "spec", "url", "name", "note"}  # not a person's to set
    assert documented == {field.name for field in dataclasses.fields(kind) if field.init} - own
    for field in dataclasses.fields(kind):
        if (
            field.name in documented
            and isinstance(field.default, int | float)
            and not isinstance(field.default, bool)
        ):
            row = next(row for row in rows if f"`{field.name}`" in row.split("|")[1])
            assert f"{field.default:g}" in row.split("|")[2], field.name
