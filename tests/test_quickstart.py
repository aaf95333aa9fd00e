"""The quickstart runs end to end at a small scale, keeps what is finished, and leaves tables, pictures and samples."""

import json

from trivet.cli import main


def test_quickstart_end_to_end_and_rerun(tmp_path, capfd):
    out = tmp_path / "quick"
    arguments = ["quickstart", "--out", str(out), "--scale", "0.03"]
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    for method in ("sft", "reward-model", "dpo", "ppo", "grpo", "pairwise-grpo"):
        assert method in printed
        evaluation = json.loads((out / method / "summary.json").read_text())["eval"]
        assert ("eval/accuracy" if method == "reward-model" else "eval/gold") in evaluation
    for picture in ("frontier.png", "training.png", "cost.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "pairwise-grpo (gold" in (out / "samples.md").read_text()

    finished = (out / "sft" / "metrics.jsonl").stat().st_mtime_ns
    (out / "grpo" / "summary.json").unlink()  # as a kill would leave it
    assert main(arguments) == 0
    assert (out / "sft" / "metrics.jsonl").stat().st_mtime_ns == finished
    assert (out / "grpo" / "summary.json").exists()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "another seed" in capfd.readouterr().err

    assert main(["compare", str(out / "sft"), str(out / "dpo")]) == 0
    assert "win rate" in capfd.readouterr().out
