"""Adapters on many processes: the numbers of one process, one base in shards below all roles, the same folders.

python tests/test_ranks_lora.py [METHOD ...] prints the largest differences over 20 steps, for docs/experiments.md.
"""

import gc
import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from test_ranks import (
    RECIPES,
    SMALL,
    config,
    differences,
    folder,
    killed_after,
    on_ranks,
    ragged,
    same,
    sampled_lengths_are_ragged,  # noqa: F401  a fixture
    trained,
)
from trivet.cli.main import main
from trivet.distributed.checkpoints import ShardedCheckpoints
from trivet.runner.launch import launch
from trivet.runner.resume import resume

pytestmark = pytest.mark.slow  # processes in numbers

LORA = {"lora": 4, "lr": 3e-3}
CONTINUED = {"model": "sft", "lr": 3e-3}


@cache
def start(method: str) -> str:
    """An adapter that has moved, of a policy or a reward model over the same base."""
    out = Path(tempfile.mkdtemp(prefix="trivet-ranks-lora-")) / method
    return str(launch(config(method, out, lora=4, lr=1e-2)))


def options_of(method: str, options: dict) -> dict:
    """With the names of runs and models in place of short ones; what rewards is an adapter too."""
    names = {name: start(name) for name in ("sft", "reward-model")} | {
        "scorer": str(folder() / "scorer")
    }
    options = ({"reward": ("reward-model",)} if method in SMALL else {}) | options
    options |= {"critic_lr": 3e-3} if method == "ppo" else {}
    options = {key: names.get(x, x) if isinstance(x, str) else x for key, x in options.items()}
    return options | {
        key: tuple(names.get(name, name) for name in options[key])
        for key in options
        if key == "reward"
    }


def compared(
    method: str, tmp_path: Path, one: int, other: int, rounding: float = 2e-5, **options
) -> list[Path]:
    """Two runs, on so many processes, that must be the same; 0 is one that torchrun has not started."""
    runs = [
        trained(method, tmp_path / f"on {n}", n, **options_of(method, options))
        for n in (one, other)
    ]
    same(*runs, rounding)
    facts = [json.loads((run / "run.json").read_text()) for run in runs]
    assert facts[0]["start"] == facts[1]["start"]
    files = [sorted(path.name for path in (run / "model").iterdir()) for run in runs]
    assert files[0] == files[1]
    if not options.get("merge") and "adapter_config.json" in files[0]:
        texts = [(run / "model" / "adapter_config.json").read_text() for run in runs]
        assert texts[0] == texts[1]
    return runs


@pytest.mark.parametrize("method", RECIPES)
def test_an_adapter_is_trained_as_in_one_process(tmp_path, method):
    alone = (
        {"max_completion_tokens": 1} if method in SMALL else {}
    )  # both draw for all rows as long as all are written
    compared(method, tmp_path, 0, 4, **LORA, steps=3, **alone)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ppo", LORA),
        ("ppo", CONTINUED),
        ("grpo", CONTINUED),
        (
            "ppo",
            LORA | {"reward": ("scorer",)},
        ),  # the critic is an adapter over the reward model's weights
        (
            "ppo",
            {"reward": ("reward-model",)},
        ),  # a policy of all weights; the reward model is merged
        (
            "ppo",
            LORA
            | {"reward": ("trivet.toy.stories:gold",), "lora_targets": ("q_proj", "down_proj")},
        ),
        ("ppo", LORA | {"shared_critic": True}),
    ],
)
def test_neither_does_the_number_of_processes_matter_to_its_roles(tmp_path, method, options):
    """Of three ranks one has no group, and no tensor falls into three equal parts."""
    compared(method, tmp_path, 1, 3, steps=2, prompts_per_step=2, **options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("reward-model", {"model": "reward-model", "lr": 3e-3}),
        ("reward-model", LORA | {"model": "sft", "lora": 0, "merge": True}),
        ("dpo", CONTINUED),
        ("grpo", CONTINUED | {"max_completion_tokens": 1}),
        ("dpo", LORA | {"gradient_checkpointing": True, "offload_optimizer": True}),
        ("sft", LORA | {"precision": "bfloat16"}),
    ],
)
def test_nor_to_one_that_is_gone_on_with(tmp_path, method, options):
    compared(method, tmp_path, 0, 2, 2e-3 if "precision" in options else 2e-5, steps=2, **options)


def test_all_roles_have_one_base_in_shards(tmp_path):
    """Counted over every tensor that lives in a process, FSDP's own included."""

    def living() -> int:
        gc.collect()
        tensors = [
            x
            for x in gc.get_objects()
            if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
        ]
        return sum(
            {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
        )

    def work() -> None:
        held, base = (
            [],
            sum(x.nbytes for x in load_file(folder() / "policy" / "model.safetensors").values()),
        )
        begin, before = ShardedCheckpoints.begin, living()  # of earlier tests

        def count(self) -> None:
            begin(self)
            held.append(living() - before)

        with patch.object(ShardedCheckpoints, "begin", count):
            launch(given)
        # four adapters of rank 1, heads, and buffers beside it
        assert base / 2 < held[0] < 1.5 * base, (
            held,
            base,
        )  # a base for each role would be 2 base and more

    given = config("ppo", tmp_path / "run", **options_of("ppo", LORA | {"lora": 1, "steps": 1}))
    assert on_ranks(2, work) == [0, 0]
    parts = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert (
        "reference" not in parts
    )  # under a new adapter it is the base, and has nothing of its own


@pytest.mark.parametrize("size", [0, 2])
def test_a_checkpoint_is_the_adapters_and_any_number_goes_on_from_it(tmp_path, size):
    given = options_of("ppo", LORA | {"steps": 3, "save_every": 2, "max_completion_tokens": 1})
    whole = trained("ppo", tmp_path / "whole", size, **given)
    first = config("ppo", tmp_path / "first", **given)
    killed_after(3, first) if not size else on_ranks(size, lambda: killed_after(3, first))
    saved = (tmp_path / "first" / "checkpoints" / "step-2").rglob("*.safetensors")
    names = [name for path in saved for name in load_file(path)]
    assert any("lora_A" in name for name in names)
    assert not any(name.endswith(("embed_tokens.weight", "base_layer.weight")) for name in names)
    for other in (0, 1, 2, 4) if size else (2,):
        out = tmp_path / f"on {other}"
        shutil.copytree(tmp_path / "first", out)
        if other:
            assert on_ranks(other, lambda out=out: resume(out) and 0) == [0] * other
        else:
            resume(out)
        same(whole, out, 2e-5 if other != size else 1e-30)


def test_a_quantized_base_is_refused_in_a_sentence(tmp_path, capfd):
    flags = [
        "--model",
        str(folder() / "policy"),
        "--data",
        str(folder() / "few.jsonl"),
        "--out",
        str(tmp_path / "run"),
    ]
    codes = on_ranks(
        2, lambda: main(["sft", *flags, "--lora", "4", "--quantize", "8bit", "--quiet"])
    )
    assert codes == [2, 2]
    assert capfd.readouterr().err.count("--quantize 8bit: quantized weights can't be sharded") == 1


if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        with tempfile.TemporaryDirectory() as scratch, ragged():
            os.environ["XDG_CACHE_HOME"] = scratch
            for continued in (False, True):
                begun = (
                    {"model": "reward-model" if name == "reward-model" else "sft", "lr": 3e-3}
                    if continued
                    else LORA
                )
                options = options_of(name, begun | {"steps": 20, "prompts_per_step": 6})
                alone = options | ({"max_completion_tokens": 1} if name in SMALL else {})
                for a, b, given in ((1, 2, options), (1, 4, options), (0, 2, alone)):
                    runs = {n: Path(scratch) / f"{continued} {n} {given == alone}" for n in (a, b)}
                    for n, run in runs.items():
                        if not run.exists():
                            trained(name, run, n, **given)
                    weights, metric, which = differences(*runs.values())
                    told = f"{name:14} {'continued' if continued else 'new':9} {a} against {b}"
                    print(
                        f"{told}: weights {weights:.1e}, metrics {metric:.1e} ({which})", flush=True
                    )
