"""The shared-prefix forward gives the numbers and gradients of the plain one, however a batch is laid out."""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from conftest import SMALL, ragged, tiny
from trivet.batch import Groups, collate, microbatches
from trivet.model.forward import in_microbatches, shares_prefix, token_logprobs
from trivet.model.logprobs import selected_logprobs
from trivet.model.scalar import scores, values

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def by_hand(model, groups: Groups, temperature: float = 1.0) -> Tensor:
    """One unpadded sequence at a time through the model's own forward."""
    result = torch.zeros(groups.completions.shape)
    for b in range(len(groups.completions)):
        p = b // groups.group_size
        prompt, completion = (
            groups.prompts[p][groups.prompt_mask[p]],
            groups.completions[b][groups.present[b]],
        )
        logits = model(torch.cat([prompt, completion])[None]).logits[0] / temperature
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None])[:, 0]
        result[b, : len(completion)] = picked
    return torch.where(groups.mask, result, 0.0)


def gradients(model, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_same_logprobs_and_gradients_as_one_sequence_at_a_time(model, group_size):
    groups = ragged(group_size=group_size)
    assert shares_prefix(model)
    ours, plain = token_logprobs(model, groups, temperature=0.7), by_hand(model, groups, 0.7)
    torch.testing.assert_close(ours, plain, **CLOSE)
    weights = torch.rand(ours.shape)
    torch.testing.assert_close(
        gradients(model, (weights * ours).sum()), gradients(model, (weights * plain).sum()), **CLOSE
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MambaConfig, {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}),
        (Gemma2Config, SMALL),
    ],
    ids=["mamba", "gemma2 with softcap"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_cannot_share_take_the_plain_way(kind, options):
    model = (
        tiny(kind, **{**SMALL, **options}) if kind is Gemma2Config else tiny_plain(kind, options)
    )
    groups = ragged()
    assert not shares_prefix(model)
    for temperature in (1.0, 0.7):
        found = token_logprobs(model, groups, temperature=temperature)
        torch.testing.assert_close(found, by_hand(model, groups, temperature), rtol=1e-4, atol=1e-4)


def tiny_plain(kind, options):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**options)).eval()


@pytest.mark.parametrize("window", [2, 5])
def test_sliding_windows_are_respected(window):
    model = tiny(MistralConfig, sliding_window=window)
    assert shares_prefix(model)
    for group_size in (1, 3):
        groups = ragged(group_size=group_size)
        torch.testing.assert_close(token_logprobs(model, groups), by_hand(model, groups), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("pad_id", [0, 60])
def test_padding_amount_side_and_id_do_not_matter(model, side, pad_id):
    groups = ragged()
    before, after = (3 if side != "right" else 0), (2 if side != "left" else 0)

    def wider(x: Tensor, fill: int) -> Tensor:
        edges = [x.new_full((len(x), n), fill) for n in (before, after)]
        return torch.cat([edges[0], x, edges[1]], 1)

    padded = dataclasses.replace(
        groups,
        prompts=wider(groups.prompts.masked_fill(~groups.prompt_mask, pad_id), pad_id),
        prompt_mask=wider(groups.prompt_mask, 0),
    )
    torch.testing.assert_close(
        token_logprobs(model, padded), token_logprobs(model, groups), **CLOSE
    )


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
@pytest.mark.parametrize("whole", [False, True])
def test_loss_and_gradient_do_not_depend_on_the_split_into_microbatches(model, budget, whole):
    groups, weights = ragged(prompts=5), torch.rand(20, 11)
    together = gradients(model, (weights * token_logprobs(model, groups)).sum())
    model.zero_grad()
    seen = torch.zeros(20, dtype=torch.int64)
    for rows, part in microbatches(groups, budget, whole=whole):
        (weights[rows] * token_logprobs(model, part)).sum().backward()
        seen[rows] += 1
        assert not whole or part.group_size == 4
    assert (seen == 1).all()
    split = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(split, together, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prompt", "sizes"), [(10, [4, 4]), (39, [4, 4]), (70, [8])])
def test_microbatches_share_a_prompt_among_at_least_as_many_tokens(prompt, sizes):
    groups = collate([[1] * prompt], [[2] * 8] * 8)
    assert [part.group_size for _, part in microbatches(groups, 45)] == sizes


def test_microbatches_of_only_some_groups_visit_their_rows(model):
    groups = ragged(prompts=5)
    only = torch.tensor([True, False, True, False, False])
    rows = torch.cat([rows for rows, _ in microbatches(groups, 30, only=only)])
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert list(microbatches(groups, 30, only=torch.zeros(5, dtype=torch.bool))) == []


def test_tokens_seen_but_not_learned_are_context_and_get_no_number(model):
    groups = ragged()
    mask = groups.mask & (torch.rand(groups.mask.shape) < 0.5)
    partly = dataclasses.replace(groups, mask=mask)
    torch.testing.assert_close(
        token_logprobs(model, partly), torch.where(mask, by_hand(model, groups), 0.0), **CLOSE
    )


def test_scores_and_values_are_those_of_transformers_own_classifier():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        Qwen3Config(**SMALL, num_labels=1, pad_token_id=60)
    ).eval()
    groups = ragged()
    assert shares_prefix(model)
    ours, per_token = scores(model, groups), values(model, groups)
    for b in range(len(groups.completions)):
        p = b // groups.group_size
        prompt, completion = (
            groups.prompts[p][groups.prompt_mask[p]],
            groups.completions[b][groups.present[b]],
        )
        whole = torch.cat([prompt, completion])[None]
        torch.testing.assert_close(
            ours[b], model.score(model.model(whole).last_hidden_state)[0, -1, 0], **CLOSE
        )
        states = model.score(model.model(whole).last_hidden_state)[0, len(prompt) - 1 : -1, 0]
        torch.testing.assert_close(per_token[b, : len(completion)], states, **CLOSE)
    torch.testing.assert_close(in_microbatches(scores, model, groups, 30), ours, **CLOSE)


def test_plain_calls_of_a_model_that_shares_still_honor_their_mask(model):
    assert shares_prefix(model)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    padded = model(ids, attention_mask=mask).logits[1, 1]
    torch.testing.assert_close(padded, model(ids[1:, :2]).logits[0, 1], **CLOSE)


@pytest.mark.parametrize("rows", [1, 7, 20_000])
def test_chunked_logprobs_match_log_softmax_with_bias_in_float64(rows):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(rows, 4).double(),
        torch.randn(700, 4).double(),
        torch.randn(700).double(),
    )
    targets, upstream = torch.randint(700, (rows,)), torch.randn(rows).double()
    inputs = [x.clone().requires_grad_(True) for x in (hidden, weight, bias)]
    ours = selected_logprobs(*inputs, targets, 0.6)
    found = torch.autograd.grad((upstream * ours).sum(), inputs)
    logits = (inputs[0] @ inputs[1].T + inputs[2]) / 0.6
    plain = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, plain)
    for a, b in zip(found, torch.autograd.grad((upstream * plain).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_prompt_is_refused(model):
    groups = ragged()
    empty = dataclasses.replace(
        groups, prompt_mask=groups.prompt_mask & torch.tensor([[True], [False], [True]])
    )
    with pytest.raises(ValueError, match="a prompt without tokens"):
        token_logprobs(model, empty)


def test_bfloat16_compute_keeps_float32_weights_and_gradients():
    model = tiny()
    model.compute_dtype = torch.bfloat16
    groups = ragged()
    logprobs = token_logprobs(model, groups)
    assert shares_prefix(model)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, by_hand(tiny(), groups), rtol=0.1, atol=0.3)
    assert gradients(model, logprobs.sum()).dtype == torch.float32


def test_no_gradient_is_added_up_in_an_order_that_threads_decide(model):
    """index_put adds repeated rows, a prompt's last state for one, as threads come by: the last bits would vary."""
    heads = AutoModelForSequenceClassification.from_config(Qwen3Config(**SMALL, num_labels=1))
    for value in (
        token_logprobs(model, ragged()),
        values(heads.eval(), ragged()),
        scores(heads, ragged()),
    ):
        seen, todo = set(), [value.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [after for after, _ in node.next_functions]
        assert len(seen) > 20
        assert not [
            node.name() for node in seen if node.name().startswith(("IndexBackward", "IndexPut"))
        ]
