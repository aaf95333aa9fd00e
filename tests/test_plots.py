"""trivet plot: what is drawn stands in the SVG as text and paths; what can't be drawn is one sentence."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from runs import write_run
from trivet.cli.main import main
from trivet.report import plots
from trivet.store.reading import method_of, read_metrics

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def two(tmp_path):
    """The directories of a PPO and a GRPO run."""
    return [write_run(tmp_path / method, method, 20) for method in ("ppo", "grpo")]


def texts(path: Path) -> list[str]:
    """What stands in an SVG as text."""
    return ["".join(node.itertext()) for node in ElementTree.parse(path).iter(f"{SVG}text")]


def lines_of(path: Path) -> list[tuple[str, str, int]]:
    """Color, dashes and number of points of each smoothed line in an SVG."""
    found = []
    for node in ElementTree.parse(path).iter(f"{SVG}path"):
        style = node.get("style", "")
        if "stroke-width: 1.5" in style and node.get("clip-path"):
            color, dashes = (
                re.search(rf"{key}: ([^;]+)", style) for key in ("stroke", "stroke-dasharray")
            )
            found.append(
                (
                    color[1].upper(),
                    dashes[1] if dashes else "",
                    len(re.findall("[ML]", node.get("d"))),
                )
            )
    return found


def test_panels_lines_labels_and_both_files(two, tmp_path, capsys):
    assert main(["plot", *map(str, two), "--y", "reward", "--y", "kl"]) == 0
    png, svg = tmp_path / "plot-reward-kl.png", tmp_path / "plot-reward-kl.svg"
    assert capsys.readouterr().out == f"{png}  ·  {svg}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    said = texts(svg)
    assert {"ppo", "grpo", "reward", "step", "KL to the reference", "(nats per completion)"} <= set(
        said
    )
    assert said.count("mean of the last 5 steps; faint: each step") == 2
    drawn = lines_of(svg)
    assert [color for color, _, _ in drawn] == [plots.COLORS["ppo"], plots.COLORS["grpo"]] * 2
    assert len({dashes for _, dashes, _ in drawn}) == 2
    assert {count for _, _, count in drawn} == {20}


def test_one_metric_against_another_unsmoothed_to_a_file_of_ones_own(two, tmp_path, capsys):
    out = tmp_path / "deep" / "frontier.v1"
    assert (
        main(
            [
                "plot",
                str(two[0]),
                "--y",
                "rewards/gold/mean",
                "--x=kl",
                "--smooth=1",
                "--out",
                f"{out}.svg",
            ]
        )
        == 0
    )
    assert {"as measured", "reward: gold", "KL to the reference (nats per completion)"} <= set(
        texts(Path(f"{out}.svg"))
    )
    assert Path(f"{out}.png").exists()
    again = Path(f"{out}.svg").read_bytes()
    assert (
        main(
            [
                "plot",
                str(two[0]),
                "--y",
                "rewards/gold/mean",
                "--x=kl",
                "--smooth=1",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert Path(f"{out}.svg").read_bytes() == again


def test_held_out_numbers_are_joined_over_the_steps_between_and_not_smoothed(two):
    assert main(["plot", str(two[0]), "--y", "eval/reward"]) == 0
    svg = two[0] / "plot-eval-reward.svg"
    assert {"held-out reward", "as measured"} <= set(texts(svg))
    assert [count for *_, count in lines_of(svg)] == [4]


def test_nulls_are_gaps_and_a_half_written_line_is_left_out(tmp_path):
    run = write_run(tmp_path / "grpo", "grpo", 9)
    rows = read_metrics(run)
    rows[4]["kl"] = None
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "kl": 3.'
    )
    assert len(read_metrics(run)) == 9
    points = plots.points(read_metrics(run), "step", "kl")
    assert [x for x, y in points if math.isnan(y)] == [5]
    assert plots.smooth([1.0, math.nan, 3.0], 2) == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert main(["plot", str(run), "--y", "kl", "--smooth", "1"]) == 0
    ((_, _, count),) = lines_of(run / "plot-kl.svg")
    assert count == 8
    drawn = next(
        node
        for node in (run / "plot-kl.svg").read_text().split("<path")
        if "stroke-width: 1.5" in node
    )
    assert drawn.count("M ") == 2


def test_runs_of_one_method_and_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / seed / "grpo", "grpo", 6) for seed in ("a", "b", "c")]
    assert main(["plot", *map(str, runs), "--y", "reward"]) == 0
    svg = tmp_path / "plot-reward-a-grpo-b-grpo-c-grpo.svg"
    assert len({(color, dashes) for color, dashes, _ in lines_of(svg)}) == 3
    assert len({color for color, *_ in lines_of(svg)}) == 3
    assert {f"{seed}/grpo (grpo)" for seed in "abc"} <= set(texts(svg))


def test_runs_named_from_here_are_drawn_beside_them_and_said_so(two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(two[0].parent)
    (tmp_path / "inside").mkdir()
    for here, runs, out in (
        (tmp_path, ("ppo", "grpo"), ""),
        (tmp_path / "inside", ("../ppo", "../grpo"), "../"),
    ):
        monkeypatch.chdir(here)
        assert main(["plot", *runs, "--y", "kl"]) == 0
        assert capsys.readouterr().out == f"{out}plot-kl.png  ·  {out}plot-kl.svg\n"


def test_names_are_not_read_as_formulas(tmp_path):
    run = write_run(tmp_path / "_a $x_2$ <b>", "grpo", 6)
    assert main(["plot", str(run), "--y", "reward", "--out", str(tmp_path / "out")]) == 0
    assert "_a $x_2$ <b> (grpo)" in texts(tmp_path / "out.svg")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--y", "rewrd"], "unknown metric 'rewrd'; choose from reward"),
        (["--y", "gold"], "rewards/gold/mean"),
        (["--y", "KL"], "unknown metric 'KL'; choose from kl, eval/kl"),
        (
            ["--y", "nonsense"],
            "entropy, eval/completions/clipped_ratio",
        ),  # none is near: all of them
        (["--y", "nonsense"], "kl, lr"),
        (["--y", "reward", "--x", "stp"], "unknown metric 'stp'; choose from step"),
        (["--y", "eval/reward", "--x", "notes"], "unknown metric 'notes'"),
        (["--y", "rare", "--x", "eval/kl"], "no step has both rare and eval/kl"),
        ([], "--y reward"),
        (["--y", "reward", "--smooth", "0"], "--smooth is 0"),
        (["--yy", "reward"], "--y"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(arguments, named, tmp_path, capsys):
    run = write_run(tmp_path / "ppo", "ppo", 6)
    rows = read_metrics(run)
    rows[0]["rare"] = 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(run.rglob("*"))  # beside it the cache of fonts may be made
    assert main(["plot", str(run), *arguments]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_what_is_no_run_and_what_has_no_line_yet(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text('{"method": "dpo"')
    for run, said in (
        ("nope", "it does not exist"),
        ("empty", "not a run directory"),
        ("begun", "no lines yet"),
    ):
        assert main(["plot", str(tmp_path / run), "--y", "loss"]) == 2
        assert said in capsys.readouterr().err
    assert main(["plot", "--y", "loss"]) == 2
    assert "name a run directory first" in capsys.readouterr().err


def test_a_metric_that_some_runs_lack_is_drawn_for_the_others(tmp_path, capsys):
    runs = [write_run(tmp_path / method, method, 6) for method in ("sft", "ppo")]
    assert main(["plot", *map(str, runs), "--y", "kl"]) == 0
    assert f"{runs[0]} has no steps with both kl" in capsys.readouterr().err
    assert "sft" not in texts(tmp_path / "plot-kl.svg")


def test_a_folder_of_runs(tmp_path):
    for method in ("dpo", "sft"):
        write_run(tmp_path / method, method, 6)
    assert main(["plot", str(tmp_path), "--y", "loss", "--x", "seconds"]) == 0
    assert {"sft", "dpo", "wall time (s)"} <= set(texts(tmp_path / "plot-loss-by-seconds.svg"))


def test_a_picture_of_some_runs_leaves_that_of_all(tmp_path, capsys):
    for method in ("dpo", "sft", "grpo"):
        write_run(tmp_path / method, method, 6)
    assert main(["plot", str(tmp_path), "--y", "kl"]) == 0
    assert main(["plot", str(tmp_path / "grpo"), str(tmp_path / "dpo"), "--y", "kl"]) == 0
    assert {path.name for path in tmp_path.glob("*.svg")} == {"plot-kl.svg", "plot-kl-grpo-dpo.svg"}


def test_a_run_from_before_run_json(tmp_path):
    run = write_run(tmp_path / "old", "dpo", 6, run_json=False)
    assert method_of(run) == "dpo"
    assert main(["plot", str(run), "--y", "loss"]) == 0
    assert "old (dpo)" in texts(run / "plot-loss.svg")


def test_a_line_that_was_edited_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "ppo", "ppo", 6)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]))
    assert main(["plot", str(run), "--y", "reward"]) == 2
    assert "metrics.jsonl, line 2: not JSON" in capsys.readouterr().err
