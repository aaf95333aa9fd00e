"""The quickstart runs end to end at a small scale, keeps what is finished, and leaves tables, pictures and samples."""

import json

import pytest

from test_page import CHROMIUM, EMPTY_CHARTS, TITLES, browser, show  # noqa: F401  fixtures
from trivet.cli.main import main
from trivet.report.compare import runs_in


def page_of(out, show):  # noqa: F811
    """In a browser every chart has marks, nothing complains, and the tokens are those of samples.jsonl."""
    tab = show(runs_in(out))
    assert tab.evaluate(EMPTY_CHARTS) == []
    assert {"What the reward costs in KL", "Where the time goes", "What fills the memory"} <= set(
        tab.evaluate(TITLES)
    )
    recorded = [
        json.loads(line) for line in (out / "grpo" / "samples.jsonl").read_text().splitlines()
    ]
    last = [line for line in recorded if "tokens" in line][-8:]
    tab.locator("#tokens select").first.select_option(label="grpo")
    said = tab.locator("#tokens .tokens").all_inner_texts()
    assert [text.replace("\n", "").replace(" ", "") for text in said] == [
        "".join(line["tokens"]).replace(" ", "") for line in last
    ]


@pytest.mark.slow
def test_quickstart_end_to_end_and_rerun(tmp_path, capfd, request):
    out = tmp_path / "quick"
    arguments = ["quickstart", "--out", str(out), "--scale", "0.03"]
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert str(out / "report.html") in printed.replace("\n", "")
    assert 5e5 < (out / "report.html").stat().st_size < 5e6
    for method in ("sft", "reward-model", "dpo", "ppo", "grpo", "pairwise-grpo"):
        assert method in printed
        evaluation = json.loads((out / method / "summary.json").read_text())["eval"]
        assert ("eval/accuracy" if method == "reward-model" else "eval/gold") in evaluation
    assert "pairwise-grpo (gold" in (out / "samples.md").read_text()

    if CHROMIUM:
        page_of(out, request.getfixturevalue("show"))

    finished = (out / "sft" / "metrics.jsonl").stat().st_mtime_ns
    (out / "grpo" / "summary.json").unlink()  # as a kill would leave it
    assert main(arguments) == 0
    assert (out / "sft" / "metrics.jsonl").stat().st_mtime_ns == finished
    assert (out / "grpo" / "summary.json").exists()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "another seed" in capfd.readouterr().err

    assert main(["compare", str(out / "sft"), str(out / "dpo")]) == 0
    assert "win rate" in capfd.readouterr().out
