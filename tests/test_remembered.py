"""The reference pass is taken once for the same weights and tokens, and again as soon as either differs."""

import dataclasses
from pathlib import Path

import pytest
import torch

from conftest import ragged, tiny
from steps import examples
from trivet.step.reference_cache import load_or_compute


def table(model, rows, calls: list[str]) -> torch.Tensor:
    def compute() -> torch.Tensor:
        calls.append("computed")
        return torch.arange(float(len(rows)))

    return load_or_compute(model, rows, compute, calls.append)


@pytest.fixture
def rows():
    return examples(ragged(3, 2))


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "trivet" / "reference").iterdir())


def test_the_second_run_reads_what_the_first_one_wrote(rows, tmp_path):
    calls: list[str] = []
    first, second = table(tiny(), rows, calls), table(tiny(), rows, calls)
    assert torch.equal(first, second)
    (path,) = cached(tmp_path)
    assert calls == [
        "computed",
        f"using the reference log-probabilities of an earlier run, from {path.parent}",
    ]


def test_other_weights_precision_tokens_or_masks_are_computed_anew(rows, tmp_path):
    calls: list[str] = []
    model = tiny()
    table(model, rows, calls)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1e-6
    table(model, rows, calls)
    model.compute_dtype = torch.bfloat16
    table(model, rows, calls)
    for change in (
        {"prompt": [*rows[0].prompt, 1]},
        {"completions": rows[0].completions[::-1]},
        {"learned": [[not flag for flag in flags] for flags in rows[0].learned]},
    ):
        table(model, [dataclasses.replace(rows[0], **change), *rows[1:]], calls)
    table(model, rows[::-1], calls)
    assert calls == ["computed"] * 7
    assert len(cached(tmp_path)) == 7


def test_a_damaged_file_is_computed_anew_and_mended(rows, tmp_path):
    calls: list[str] = []
    table(tiny(), rows, calls)
    (path,) = cached(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    table(tiny(), rows, calls)
    assert calls == ["computed"] * 2
    assert table(tiny(), rows, calls).tolist() == [0, 1, 2]
    assert calls[2].startswith("using the reference")


def test_a_folder_that_cannot_be_written_is_no_error(rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    calls: list[str] = []
    assert table(tiny(), rows, calls).tolist() == [0, 1, 2]
    assert calls == ["computed"]
