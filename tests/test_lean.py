"""Modules that keep less for the backward pass: the numbers of the model's own, gradients up to rounding, fewer bytes kept."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from conftest import ragged, tiny
from test_forward import gradients
from trivet.model.forward import shares_prefix, token_logprobs
from trivet.model.lean import make_lean

KINDS = [LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, OlmoConfig, GPT2Config]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_the_same_numbers_and_gradients(kind, precision):
    plain, groups = tiny(kind), ragged()
    kept_less = make_lean(copy.deepcopy(plain))
    outs = []
    for model in (plain, kept_less):
        model.compute_dtype = precision
        shares_prefix(model)
        outs.append(token_logprobs(model, groups))
    assert torch.equal(*outs)
    with torch.no_grad():
        assert torch.equal(outs[0], token_logprobs(kept_less, groups))
    weights = torch.rand(outs[0].shape)
    one, other = (
        gradients(m, (weights * x).sum()) for m, x in zip((plain, kept_less), outs, strict=True)
    )
    assert (one - other).norm() <= (1e-5 if precision is None else 2e-2) * one.norm()


def test_a_copy_has_weights_of_its_own():
    kept_less = make_lean(tiny(LlamaConfig))
    twin = copy.deepcopy(kept_less)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    groups = ragged()
    assert not torch.equal(token_logprobs(kept_less, groups), token_logprobs(twin, groups))


def test_a_norm_that_only_looks_alike_keeps_its_own_forward():
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model = torch.nn.Sequential(OddRMSNorm(8))
    x = torch.randn(1, 3, 8)
    before = model(x)
    assert torch.equal(make_lean(model)(x), before)


def kept_bytes(model, groups) -> int:
    """Bytes that the graph keeps beyond the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = (
            x.untyped_storage()
        )  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(model, groups)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def test_what_a_token_and_layer_no_longer_keep():
    hidden, wide, groups = 32, 64, ragged(30, 1, 40)
    less = []
    for layers in (1, 3):
        model = tiny(
            LlamaConfig, num_hidden_layers=layers, hidden_size=hidden, intermediate_size=wide
        )
        model.compute_dtype = torch.bfloat16
        shares_prefix(model)
        less.append(kept_bytes(model, groups) - kept_bytes(make_lean(model), groups))
    normed, casts, gated = (
        2 * 4 * hidden,
        3 * 2 * hidden,
        2 * 2 * wide,
    )  # of two norms; of k, v, up; silu, and times up
    weights = 2 * sum(
        x.numel() for x in model.model.layers[0].parameters() if x.dim() == 2
    )  # in bfloat16
    assert less[1] - less[0] == 2 * (int(groups.lengths.sum()) * (normed + casts + gated) + weights)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_several_sequences(bias):
    plain = torch.nn.Linear(4, 5, bias=bias)
    lean = make_lean(torch.nn.Sequential(copy.deepcopy(plain)))[0]
    x = torch.randn(2, 3, 4)
    found = []
    for layer in (plain, lean):
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(own)
        out.float().square().sum().backward()
        found.append([out.float(), own.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
