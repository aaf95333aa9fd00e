"""The ways that speed takes, each made to happen at a small size, give the numbers of the plain one."""

from unittest.mock import patch

import pytest
import torch
from torch.testing import assert_close

from conftest import ragged, tiny
from test_engine import PROMPTS, engine
from test_forward import CLOSE, by_hand, gradients
from trivet.generation import engine as engine_module
from trivet.model import attention, logprobs
from trivet.model.forward import shares_prefix, token_logprobs
from trivet.recipes import sft
from trivet.step.optimizer import Optimizer


@pytest.mark.parametrize(
    "limits",
    [{"SMALL": 0}, {"BLOCK": {"cpu": 1}}, {"BLOCK": {"cpu": 300}}, {"ROUND": 1}, {"ROUND": 3}],
)
def test_blocks_of_any_size_and_the_fused_kernel(model, limits):
    assert shares_prefix(model)
    groups = ragged()
    plain = by_hand(model, groups, 0.7)
    with patch.multiple(attention, **limits):
        ours = token_logprobs(model, groups, temperature=0.7)
        weights = torch.rand(ours.shape)
        found = gradients(model, (weights * ours).sum())
    assert_close(ours, plain, **CLOSE)
    assert_close(found, gradients(model, (weights * plain).sum()), **CLOSE)


@pytest.mark.parametrize("kept", [0, 15_000, 1 << 27])
def test_logits_kept_or_made_again(kept):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).double().requires_grad_() for shape in ((7, 4), (700, 4))]
    targets = torch.randint(700, (7,))
    with patch.multiple(logprobs, KEPT=kept, CHUNK={"cpu": 1}):
        ours = logprobs.selected_logprobs(*inputs, None, targets, 0.6)
        found = torch.autograd.grad(ours.sum(), inputs)
    plain = (inputs[0] @ inputs[1].T / 0.6).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    for ours_grad, plain_grad in zip(found, torch.autograd.grad(plain.sum(), inputs), strict=True):
        assert_close(ours_grad, plain_grad)


def test_a_cache_that_grows_several_times(model):
    with patch.object(engine_module, "STRETCH", 3):
        rollouts = engine(stops=(60,)).generate(model, PROMPTS, 3)
    assert_close(rollouts.logprobs, token_logprobs(model, rollouts.groups), rtol=0, atol=1e-5)


def test_the_heads_cast_is_made_again_after_an_optimizer_step():
    model, groups = tiny(), ragged()
    model.compute_dtype = torch.bfloat16
    optimizer = Optimizer(model, sft.Config(lr=0.01), 10)
    token_logprobs(model, groups).sum().backward()
    optimizer.step()
    fresh = tiny()
    fresh.load_state_dict(model.state_dict())
    fresh.compute_dtype = torch.bfloat16
    assert torch.equal(token_logprobs(model, groups), token_logprobs(fresh, groups))
