"""What trivet plan computes: counts against transformers and peft, operations against torch's counter, memory against saved tensors."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from conftest import SMALL
from trivet.batch import Example, collate, microbatches
from trivet.cli.main import main
from trivet.generation.engine import Engine
from trivet.model.attention import Layout
from trivet.model.forward import token_logprobs
from trivet.model.lean import make_lean
from trivet.model.scalar import scores, values, with_scalar_head
from trivet.plan import formulas
from trivet.plan.command import named_shape
from trivet.plan.options import Config
from trivet.plan.parts import attention_rows, split
from trivet.plan.shapes import CARDS, SHAPES, Machine, card_of, shape_of
from trivet.plan.step import Step, total
from trivet.recipes import METHODS as RECIPES

CPU = Machine("a CPU", True, 64e9, 1e12, 5e11, 5e10, 1e9, 1e9, 4e8)
LENGTHS = {"prompt_tokens": 40, "completion_tokens": 33, "prompts_per_step": 2, "group_size": 4}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
KINDS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SMALL, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SMALL),
    "mixture": Qwen3MoeConfig(**SMALL, **MIXTURE, tie_word_embeddings=True),
}


def shape(kind: str):
    return shape_of(KINDS[kind], kind, "test")


def step(method: str, kind: str = "qwen3", scorer=None, machine: Machine = CPU, **options) -> Step:
    return Step(method, shape(kind), scorer, Config(**{**LENGTHS, **options}), machine)


def groups(prompts: int = 2, size: int = 4, prompt: int = 40, completion: int = 33):
    return collate([[5] * prompt] * prompts, [[7] * completion] * (prompts * size))


# Counts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the models' cards and files have them
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen3-0.6B", 596_049_920),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_named_shapes_have_their_published_size(name, parameters):
    assert named_shape(name).parameters == parameters


def test_active_parameters_of_the_mixtures_are_the_published_ones():
    for name, billions in (("Qwen3-30B-A3B", 3.3), ("DeepSeek-V3", 37)):
        counted = named_shape(name)
        active = counted.parameters - counted.experts + counted.active_experts
        assert active / 1e9 == pytest.approx(billions, rel=0.03), name  # with the embedding
    assert named_shape("DeepSeek-V3").parameters / 1e9 == pytest.approx(671, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_model_itself(kind):
    counted, config = shape(kind), KINDS[kind]
    model = AutoModelForCausalLM.from_config(config)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    scorer = AutoModelForSequenceClassification.from_config(replace_labels(config))
    assert counted.trunk + counted.hidden == sum(p.numel() for p in scorer.parameters())
    assert (
        counted.root + sum(p.numel() for x in model.model.layers for p in x.parameters())
        == counted.parameters
    )
    assert counted.block == max(sum(p.numel() for p in x.parameters()) for x in model.model.layers)
    assert counted.tied == (kind != "untied")
    if kind == "mixture":
        assert counted.experts == 3 * 4 * 3 * 32 * 24  # layers, experts, matrices
        assert counted.active_experts == counted.experts // 2


def replace_labels(config):
    copied = AutoConfig.for_model(**{**config.to_dict(), "num_labels": 1})
    copied.num_labels = 1
    return copied


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mixture"])
def test_adapters_are_counted_as_peft_makes_them(kind):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_config(KINDS[kind])
    linear = [
        name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, target_modules=sorted({n.split(".")[-1] for n in linear})), model
    )
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert step("sft", kind, lora=3).models["weights"].trained == trained


# Operations, to the unit --------------------------------------------------------------------------------------------------


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen3", "gemma3"])
@pytest.mark.parametrize("size", [1, 4])
def test_operations_of_forward_and_backward(kind, size):
    planned = step("grpo", kind, group_size=size, microbatch_tokens=10_000)
    model, part, taken = tiny_of(kind), groups(size=size), {}

    def forward():
        taken["logprobs"] = token_logprobs(model, part)

    assert (
        model._shares_prefix
        if hasattr(model, "_shares_prefix")
        else token_logprobs(model, part) is not None
    )
    assert counted(forward) == total(planned.flops["forward"])
    assert counted(lambda: taken["logprobs"].sum().backward()) == total(planned.flops["backward"])


def tiny_of(kind: str):
    model = AutoModelForCausalLM.from_config(KINDS[kind]).eval()
    with torch.no_grad():
        token_logprobs(model, groups())  # whether prompts can be shared is tried here
    assert model._shares_prefix
    return model


def test_operations_of_logits_that_are_made_again(monkeypatch):
    for name in (
        "trivet.plan.step",
        "trivet.model.logprobs",
    ):  # of 700 columns 256 at a time, of which the first are kept
        monkeypatch.setattr(f"{name}.KEPT", 264 * 4 * 300)
        monkeypatch.setattr(f"{name}.CHUNK", {"cpu": 1})
    config = Qwen3Config(**{**SMALL, "vocab_size": 700}, tie_word_embeddings=True)
    planned = Step("grpo", shape_of(config, "wide", "test"), None, Config(**LENGTHS), CPU)
    model = AutoModelForCausalLM.from_config(config).eval()
    token_logprobs(model, groups())
    logprobs = token_logprobs(model, groups())
    assert planned.head_columns == (256, 256)
    assert counted(lambda: logprobs.sum().backward()) == total(planned.flops["backward"])


def test_operations_of_scalar_heads():
    model = with_scalar_head(tiny_of("qwen3"))
    planned = step("ppo", microbatch_tokens=10_000, epochs_per_batch=1)
    taken = {}
    values(model, groups())
    assert counted(lambda: taken.update(v=values(model, groups()))) == total(
        planned.flops["critic's forward"]
    )
    assert total(planned.flops["old values"]) == total(planned.flops["critic's forward"])
    assert counted(lambda: taken["v"].sum().backward()) == total(planned.flops["critic's backward"])
    planned = step("reward-model", microbatch_tokens=10_000)
    assert counted(lambda: scores(model, groups(size=2))) == total(planned.flops["forward"])


@pytest.mark.slow
def test_operations_and_cache_of_generation():
    model = tiny_of("qwen3")
    engine = Engine(
        lambda prompt, ids: "", [61], 70, 1.0, torch.Generator()
    )  # no token ends a completion
    examples = [Example(prompt=[5] * 40, completions=[], learned=[], row={}) for _ in range(2)]
    planned = step("grpo", completion_tokens=70)
    assert counted(lambda: engine.generate(model, examples, 4)) == total(
        planned.flops["generation"]
    )
    assert engine.cache_bytes == planned.phases["generation"]["cache"].value


def test_epochs_and_microbatches_only_multiply():
    once, apart = step("grpo", microbatch_tokens=10_000), step("grpo", microbatch_tokens=1)
    assert apart.part.number == 4 * once.part.number * 2  # rows by themselves, each with its prompt
    two = step("grpo", epochs_per_batch=2)
    for phase in ("forward", "backward", "optimizer"):
        assert total(two.flops[phase]) == 2 * total(once.flops[phase]) or phase == "optimizer"
    assert total(step("ppo", epochs_per_batch=3).flops["critic's backward"]) == pytest.approx(
        3 * total(step("ppo", epochs_per_batch=1).flops["critic's backward"])
    )


# How a step is split ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("budget", [1, 60, 100, 173, 400, 500, 5000])
@pytest.mark.parametrize(("size", "prompt", "completion"), [(1, 30, 20), (6, 40, 33), (4, 80, 10)])
def test_microbatches_are_those_of_the_recipes(whole, budget, size, prompt, completion):
    made = [
        part for _, part in microbatches(groups(7, size, prompt, completion), budget, whole=whole)
    ]
    planned = split(7, size, prompt, completion, budget, whole)
    assert int(made[0].lengths.sum()) == planned.tokens
    assert len(made[0].completions) == planned.sequences
    assert int(made[0].mask.sum()) == planned.learned
    assert sum(len(part.completions) for part in made) == pytest.approx(
        planned.number * planned.sequences
    )


@pytest.mark.parametrize(
    ("size", "prompt", "completion"), [(1, 30, 20), (1, 5, 9), (4, 40, 33), (3, 8, 3), (2, 64, 32)]
)
def test_rows_of_attention_are_those_of_the_layout(size, prompt, completion):
    layout, rows = (
        Layout(groups(3, size, prompt, completion)),
        attention_rows(3, size, prompt, completion),
    )
    assert rows.queries == sum(block.queries.numel() for block in layout.blocks)
    assert rows.keys == sum(block.keys.numel() for block in layout.blocks)
    assert rows.pairs == sum(block.queries.numel() * block.keys.shape[1] for block in layout.blocks)


# Memory -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "mixture"])
def test_activations_are_what_autograd_keeps(kind, precision):
    config = type(KINDS[kind])(
        **{**KINDS[kind].to_dict(), "hidden_size": 96, "intermediate_size": 256, "head_dim": 24}
    )
    model = make_lean(AutoModelForCausalLM.from_config(config).eval())
    model.compute_dtype = torch.bfloat16 if precision == "bfloat16" else None
    part = groups(2, 4, 60, 60)
    token_logprobs(model, part)
    kept = {}  # by storage

    def keep(x):
        if x.shape[:1] != (int(part.mask.sum()),):  # the rows of the head
            kept[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_logprobs(model, part)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = sum(size for pointer, (size, _) in kept.items() if pointer not in own)
    options = {
        "prompt_tokens": 60,
        "completion_tokens": 60,
        "precision": precision,
        "microbatch_tokens": 10_000,
    }
    planned = Step(
        "grpo", shape_of(config, kind, "test"), None, Config(**{**LENGTHS, **options}), CPU
    )
    assert total(planned.kept(planned.shape)) == pytest.approx(
        saved, rel=0.03 if kind in ("llama", "qwen3") else 0.06
    )


def test_ranks_divide_what_they_share():
    for method in RECIPES:
        alone, shared = step(method), step(method, devices=4, prompts_per_step=8)
        names = ("weights", "reference", "critic", "optimizer")
        for name in names:
            if name in alone.resident:
                assert shared.resident[name].value == alone.resident[name].value / 4, (method, name)
        end = "end of the backward"
        assert shared.phases[end]["gradients"].value == alone.phases[end]["gradients"].value / 4
        assert shared.part == alone.part  # two prompts a rank
        assert "gathered weights" in shared.phases["backward"]


def test_one_device_gathers_and_receives_nothing():
    assert not step("grpo").sent
    assert "gathered weights" not in step("grpo").phases["generation"]
    ranks = step("grpo", devices=4, prompts_per_step=8, microbatch_tokens=10_000)
    parameters = ranks.shape.parameters
    assert total(ranks.sent["forward"]) == 4 * parameters * 3 / 4
    assert (
        total(ranks.sent["backward"]) == 2 * 4 * parameters * 3 / 4
    )  # gathered again, and gradients sent


def test_adapters_need_no_reference_and_next_to_no_optimizer():
    for method in ("dpo", "ppo", "grpo", "pairwise-grpo"):
        full, lora = step(method), step(method, lora=2)
        assert lora.resident["optimizer"].value < full.resident["optimizer"].value / 5
        assert "reference" not in lora.resident or lora.resident["reference"].value == 0
        assert "head's gradient" not in lora.phases["backward"]
    ppo, own = step("ppo", lora=2, scorer=shape("qwen3")), shape("qwen3")
    adapters = 4 * (2 * own.adapted)
    assert ppo.resident["weights"].value == 4 * own.parameters + adapters
    assert (
        ppo.resident["critic"].value
        == ppo.resident["reward model"].value
        == adapters + 4 * own.hidden
    )
    assert ppo.resident["optimizer"].value == 2 * (2 * adapters + 4 * own.hidden)
    other = step("ppo", lora=2, scorer=shape("llama"))  # of another shape: nothing to share
    assert other.resident["reward model"].value == 4 * (shape("llama").trunk + own.hidden)


def test_a_frozen_base_in_few_bits():
    base, plain = step("sft", lora=2, quantize="4bit"), step("sft", lora=2)
    saved = plain.resident["weights"].value - base.resident["weights"].value
    assert saved == base.shape.matrices * (4 - 1 / 2 - 4 / 64)
    assert base.fits
    assert plain.with_options(devices=2).fits
    assert not base.with_options(devices=2).fits  # a run refuses it


def test_which_models_each_method_holds():
    held = {method: list(step(method, scorer=shape("qwen3")).models) for method in RECIPES}
    assert held == {
        "sft": ["weights"],
        "reward-model": ["weights"],
        "dpo": ["weights"],
        "ppo": ["weights", "reference", "critic", "reward model"],
        "grpo": ["weights", "reference", "reward model"],
        "pairwise-grpo": ["weights", "reference", "reward model"],
    }
    assert list(step("grpo", reference=False).models) == ["weights"]
    one = 4 * shape("qwen3").parameters
    full = {method: step(method, scorer=shape("qwen3")) for method in ("ppo", "grpo")}
    scorer = (
        one - 4 * shape("qwen3").head + 4 * shape("qwen3").head
    )  # tied: a scorer keeps the embedding
    assert full["grpo"].resident["optimizer"].value == 2 * one
    assert full["ppo"].resident["optimizer"].value == 2 * one + 2 * (
        scorer + 4 * shape("qwen3").hidden
    )
    assert step("ppo", shared_critic=True).resident["critic"].value == 4 * shape("qwen3").hidden


def test_gradients_are_there_from_the_second_microbatch_on():
    assert "gradients" not in step("grpo", microbatch_tokens=10_000).phases["backward"]
    assert (
        step("grpo", microbatch_tokens=1).phases["backward"]["gradients"].value
        == 4 * shape("qwen3").parameters
    )
    ppo = step("ppo", microbatch_tokens=10_000)
    assert ppo.phases["critic's backward"]["gradients"].value == 4 * shape("qwen3").parameters


def test_checkpointing_keeps_inputs_of_blocks_and_computes_again():
    plain, checked = step("sft"), step("sft", gradient_checkpointing=True)
    kept = total(plain.kept(plain.shape))
    tokens = plain.part.tokens
    assert checked.phases["backward"]["activations"].value == 4 * tokens * 32 * 3 + kept / 3
    trunk = total(plain.flops["forward"]) - plain.flops["forward"]["head"].value
    assert total(checked.flops["backward"]) == total(plain.flops["backward"]) + trunk


def test_offloading_leaves_only_what_is_gathered():
    offloaded = step("ppo", devices=4, prompts_per_step=8, offload_optimizer=True)
    assert list(offloaded.resident) == ["program"]
    assert "gradients" not in offloaded.phases["end of the backward"]


def test_larger_microbatches_never_need_less():
    for method in RECIPES:
        small = step(method, prompts_per_step=8, microbatch_tokens=200)
        assert small.with_options(microbatch_tokens=2000).peak >= small.peak


@pytest.mark.parametrize("method", RECIPES)
def test_the_largest_microbatch_fits_and_the_next_does_not(method):
    loose = step(method, prompts_per_step=8)
    enough, least = (
        loose.with_options(microbatch_tokens=10_000).peak,
        loose.with_options(microbatch_tokens=1).peak,
    )
    room = replace(loose, machine=CPU._replace(memory=(least + enough) / 2))
    best = room.largest_microbatch
    assert room.with_options(microbatch_tokens=best).peak <= room.machine.memory
    each = 40 + room.group * 33
    assert room.with_options(microbatch_tokens=best + each).peak > room.machine.memory
    assert replace(loose, machine=CPU._replace(memory=enough)).largest_microbatch == 8 * each
    assert replace(loose, machine=CPU._replace(memory=least / 2)).largest_microbatch == 0


def test_devices_needed_are_the_fewest():
    big = Step(
        "sft", named_shape("Llama-3-8B"), None, Config(precision="bfloat16"), card_of("h100")
    )
    needed = big.devices_needed
    smallest = big.with_options(microbatch_tokens=1)
    assert needed > 1
    assert smallest.with_options(devices=needed).peak <= big.machine.memory
    assert smallest.with_options(devices=needed // 2).peak > big.machine.memory


def test_servers_take_the_sampling():
    alone, served = step("grpo"), step("grpo", servers=4)
    assert "generation" in alone.phases
    assert "generation" not in served.phases
    assert served.server["weights"].value == 2 * served.shape.parameters / 4
    assert (
        served.server["cache"].value == 2 * 8 * 73 * 3 * 2 * 16 / 4
    )  # rows, columns, layers, kv heads, k and v
    assert total(served.flops["generation"]) == pytest.approx(total(alone.flops["generation"]) / 4)
    assert served.sent["generation"]["weights"].value == 2 * served.shape.parameters
    assert not step("sft", servers=4).server
    assert (
        named_shape("DeepSeek-V3").latent == 576
    )  # a server keeps what keys and values are made of


def test_the_remedy_fits_and_is_the_gentlest():
    cards = card_of("h100")
    for method in ("sft", "grpo"):
        big = Step(
            method,
            named_shape("Llama-3-8B"),
            None,
            Config(precision="bfloat16", prompts_per_step=64),
            cards,
        )
        assert not big.fits
        way = big.remedy()
        assert way["devices"] > 1
        assert big.with_options(**way).fits
        assert not big.with_options(**{**way, "devices": way["devices"] // 2}).fits
    assert step("grpo").fits
    tight = replace(
        step("grpo", prompts_per_step=8),
        machine=CPU._replace(memory=step("grpo", microbatch_tokens=1).peak * 1.001),
    )
    assert list(tight.remedy()) == ["microbatch_tokens"]


def test_one_block_too_large_is_said(capsys):
    flags = "--model DeepSeek-V3 --card h100 --devices 64 --method sft --precision bfloat16"
    assert main(["plan", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert "no option found that makes it fit" in printed
    assert "one block of 11.5 B parameters" in printed


BY_HAND = {  # formula: (what is put in, the result)
    "program": ({"measured": 7}, 7),
    "weights": ({"parameters": 10, "ranks": 2}, 20),
    "quantized_weights": ({"parameters": 100, "matrices": 64, "bits": 4}, 4 * 36 + 32 + 4),
    "gradients": ({"trained": 10, "ranks": 5}, 8),
    "adam": ({"trained": 10, "ranks": 4}, 20),
    "casts": ({"matrices": 3}, 6),
    "head_cast": ({"head": 3}, 6),
    "gathered_weights": ({"block": 10, "root": 3, "size": 2}, 52),
    "gathered_model": ({"parameters": 100, "root": 10, "size": 2}, 220),
    "block_gradients": ({"block": 10, "root": 3, "size": 2}, 72),
    "activations": (
        {"tokens": 2, "inputs": 5, "norms": 3, "size": 2},
        2 * (10 + 12),
    ),
    "expert_activations": (
        {"tokens": 2, "expert_inputs": 5, "expert_gates": 3, "size": 4},
        2 * 4 * 14,
    ),
    "attention_activations": (
        {
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "key_width": 8,
            "value_width": 6,
            "queries": 5,
            "keys": 9,
            "pairs": 45,
            "size": 2,
        },
        4 * (160 + 252 + 180),
    ),
    "fused_attention_activations": (
        {
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "key_width": 8,
            "value_width": 6,
            "queries": 5,
            "keys": 9,
            "size": 2,
        },
        4 * (280 + 252),
    ),
    "checkpointed_activations": ({"tokens": 3, "hidden": 5, "layers": 4, "kept": 100}, 240 + 25),
    "adapter_activations": ({"tokens": 3, "rank": 2, "adapters": 5, "size": 2}, 60),
    "kept_logits": ({"learned": 3, "columns": 5, "size": 2}, 30),
    "head_buffers": ({"learned": 3, "hidden": 5, "chunk": 10, "size": 2}, 60 + 15 * 12),
    "head_gradient": ({"head": 3}, 12),
    "tied_gradients": ({"head": 3}, 24),
    "block_backward": ({"tokens": 2, "hidden": 3, "widest": 5, "size": 2}, 2 * (48 + 30)),
    "forward_activations": ({"tokens": 2, "hidden": 3, "widest": 5, "size": 4}, 2 * (48 + 60)),
    "cache_bytes": (
        {
            "rows": 2,
            "columns": 3,
            "layers": 5,
            "kv_heads": 2,
            "key_width": 4,
            "value_width": 3,
            "size": 2,
        },
        2 * 3 * 5 * 14 * 2,
    ),
    "server_weights": ({"parameters": 10, "servers": 4}, 5),
    "server_cache": ({"rows": 2, "columns": 3, "layers": 5, "numbers": 7, "servers": 3}, 140),
    "sampling": ({"rows": 2, "vocabulary": 5, "size": 2}, 140),
    "kept_by_allocator": ({"working": 10, "share": 0.5}, 5),
    "matrix_flops": ({"active": 5, "tokens": 3}, 30),
    "attention_flops": (
        {"layers": 2, "heads": 3, "key_width": 4, "value_width": 3, "pairs": 5},
        420,
    ),
    "head_flops": ({"head": 5, "learned": 3}, 30),
    "backward_flops": ({"forward": 5, "factors": 2, "again": 3}, 13),
    "logits_again": ({"learned": 3, "hidden": 5, "columns": 7}, 210),
    "adapter_flops": ({"adapters": 5, "tokens": 3}, 30),
    "adamw_flops": ({"trained": 2}, 40),
    "forward_bytes": (
        {"microbatches": 2, "matrices": 5, "kept": 3, "size": 2},
        2 * 5 * (4 + 2 + 2) + 3,
    ),
    "backward_bytes": (
        {"microbatches": 2, "matrices": 5, "kept": 3, "size": 2},
        2 * 5 * (2 + 4 + 4) + 6,
    ),
    "touched_experts": ({"experts": 8, "share": 0.5, "rows": 2}, 6),
    "decode_bytes": ({"steps": 3, "matrices": 5, "cache": 7, "size": 2}, 51),
    "adamw_bytes": ({"trained": 10, "ranks": 4}, 10 * (4 * 4 + 3 * 4 + 3 * 4) / 4),
    "gather_bytes": ({"passes": 3, "parameters": 8, "ranks": 4, "size": 2}, 36),
    "scatter_bytes": ({"passes": 3, "trained": 8, "ranks": 4}, 72),
    "offload_bytes": ({"passes": 3, "parameters": 8, "trained": 4, "ranks": 2}, 56),
    "sync_bytes": ({"parameters": 5}, 10),
    "compute_seconds": ({"flops": 12, "peak": 6, "efficiency": 0.5}, 4),
    "moving_seconds": ({"moved": 12, "bandwidth": 6, "efficiency": 0.5}, 4),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_formula_by_hand(name):
    numbers, result = BY_HAND[name]
    assert getattr(formulas, name)(**numbers) == result


def test_every_formula_is_done_by_hand():
    made = {
        name
        for name, made in vars(formulas).items()
        if getattr(made, "__module__", "") == formulas.__name__
    }
    assert set(BY_HAND) == {name for name in made if not name.startswith("_")} - {"Term", "term"}


# The command --------------------------------------------------------------------------------------------------------------


def test_every_formula_is_shown_as_it_was_computed():
    taken = [step(method, "mixture", shape("mixture"), devices=2, lora=2) for method in RECIPES]
    taken += [
        step(method, "mixture", shape("mixture"), gradient_checkpointing=True) for method in RECIPES
    ]
    used = set()
    for one in taken:
        for terms in (
            one.resident,
            *one.phases.values(),
            *one.flops.values(),
            *one.moved.values(),
            *one.sent.values(),
        ):
            for item in terms.values():
                name, expression, _ = item.text().split(" = ")
                assert eval(expression, {}, dict(item.numbers)) == item.value
                used.add(name)
        for phase, terms in one.times.items():
            assert one.seconds[phase] == max(item.value for item in terms.values())
    assert len(used) > 25


def test_a_formula_with_its_numbers():
    shown = formulas.term(formulas.weights, parameters=1000, ranks=8).text()
    assert shown == "weights = 4 * parameters / ranks = 4 * 1,000 / 8"


def test_all_methods_stand_in_one_table(capsys):
    assert main(["plan", "--model", "Qwen2.5-0.5B", "--card", "h100"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[3:])) <= 110
    for word in (
        "494,032,768",
        "sft",
        "reward",
        "pairwise",
        "weights",
        "optimizer",
        "critic",
        "fits",
        "generation",
    ):
        assert word in printed
    assert "…" not in printed


def test_json_holds_every_number(capsys):
    assert (
        main(
            [
                "plan",
                "--model",
                "Llama-3-70B",
                "--card",
                "h100",
                "--devices",
                "64",
                "--method",
                "grpo",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    grpo = told["methods"]["grpo"]
    assert list(told["methods"]) == ["grpo"]
    assert sum(grpo["memory"].values()) == pytest.approx(grpo["peak_bytes"])
    assert grpo["resident"]["weights"] == 4 * told["shape"]["parameters"] / 64
    assert grpo["seconds"].keys() == grpo["flops"].keys() == grpo["bytes_moved"].keys()


def test_formulas_are_printed(capsys):
    assert (
        main(["plan", "--model", "Qwen3-0.6B", "--card", "h100", "--method", "sft", "--formulas"])
        == 0
    )
    assert "adam = 8 * trained / ranks = 8 * 596,049,920 / 1" in capsys.readouterr().out


@pytest.mark.slow
def test_this_machine_is_measured(capsys, tmp_path):
    KINDS["qwen3"].save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--method", "sft", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert (
        min(machine["rate_16"], machine["rate_32"], machine["bandwidth"], machine["memory"]) > 1e8
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("card", ["rtx-4090", "b200"])
def test_every_shape_on_a_card(name, card, capsys):
    assert main(["plan", "--model", name, "--card", card, "--devices", "8", "--json"]) == 0
    assert card in CARDS
    told = json.loads(capsys.readouterr().out)["methods"]
    assert all(
        step["peak_bytes"] > 0 and sum(step["seconds"].values()) > 0 for step in told.values()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "no model was named"),
        ("--model Qwen3-0.6B --method gpro", "unknown method 'gpro'; choose from sft"),
        ("--model Qwen3-0.6B --card h1000", "unknown card 'h1000'; choose from this, a100-40gb"),
        ("--model /no/such/folder", "/no/such/folder: no config.json"),
        ("--model Qwen3-0.6B --layers 2", "pass only one of the two"),
        ("--layers 2", "needs --layers, --hidden and --heads"),
        ("--layers 2 --hidden 30 --heads 4", "--hidden 30 is not a multiple of --heads 4"),
        (
            "--layers 2 --hidden 32 --heads 4 --kv-heads 3",
            "--heads 4 is not a multiple of --kv-heads 3",
        ),
        ("--layers 2 --hidden 32 --heads 4 --experts 4", "--active-experts is 8; expected 1 to 4"),
        ("--model Qwen3-0.6B --devices 0", "--devices is 0; it must be at least 1"),
        ("--model Qwen3-0.6B --lora -1", "--lora is -1; it must be at least 0"),
        (
            "--model Qwen3-0.6B --efficiency 40",
            "--efficiency is 40.0; it must be above 0 and at most 1",
        ),
        ("--model Qwen3-0.6B --quantize 4bit", "pass --lora RANK too"),
        ("--model Qwen3-0.6B --lora 8 --quantize 4bit --devices 2", "works only on one device"),
        ("--model Qwen3-0.6B --offload-optimizer", "pass --devices of at least 2"),
        (
            "--model Qwen3-0.6B --precision fp8",
            "precision is 'fp8'; expected one of float32, bfloat16",
        ),
    ],
)
def test_bad_input_is_one_sentence(flags, said, capsys):
    assert main(["plan", *re.split(r"\s+", flags)] if flags else ["plan"]) == 2
    error = capsys.readouterr().err
    assert said in error, error
    assert error.count("\n") == 1


def test_a_model_without_layers_under_a_head_is_refused():
    from trivet.errors import InputError

    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=61)
    with pytest.raises(InputError, match="stack of layers"):
        shape_of(config, "gpt2", "test")
