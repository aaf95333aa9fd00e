"""In a notebook a run shows its progress, and what it returns displays itself."""

import sys
from types import ModuleType
from xml.etree import ElementTree

from conftest import few_rows
from trivet import launch
from trivet.recipes import sft


def test_a_run_says_what_it_does_in_a_notebook_and_shows_itself_after(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    options = sft.PRESETS["toy"] | {
        "data": few_rows(),
        "steps": 2,
        "eval_limit": 2,
        "prompts_per_step": 4,
    }
    run = launch(sft.Config(**options, out=str(tmp_path / "a <b>")))
    assert "step 2/2" in capsys.readouterr().out
    assert (run / "summary.json").exists()
    shown = run._repr_html_()
    assert "held-out loss" in shown
    assert "a &lt;b&gt;" in shown
    assert ElementTree.fromstring(shown[shown.index("<svg") :]).tag.endswith("svg")
