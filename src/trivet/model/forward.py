"""Forward passes over groups: token_logprobs of a Hugging Face model, and the hidden states for
scalar heads (scalar.py).

The only place with the next-token shift (Layout.predictor, and `_plain_rows` for models that can't
share a prefix).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Groups, collate, microbatches
from trivet.model.attention import NAME, Layout, UnshareableError
from trivet.model.logprobs import selected_logprobs
from trivet.model.weights import holder_of, with_weights
from trivet.timing import timed


@timed("forward")
@with_weights
def token_logprobs(model: Any, groups: Groups, *, temperature: float = 1.0) -> Tensor:
    """Return log pi(token | prompt, earlier tokens) of every trained completion token, at the
    sampling temperature.

    model: a transformers causal language model. Returns (B, T) in float32 (float64 for a float64
    model), 0 outside groups.mask. Logits exist one vocabulary chunk at a time, and only at
    positions that predict a trained token.
    """
    with autocast(model):
        function = _shared_token_logprobs if shares_prefix(model) else _plain_token_logprobs
        return function(model, groups, temperature)


@timed("forward")
@torch.no_grad()
def in_microbatches(
    function: Callable[..., Tensor], model: Any, groups: Groups, budget: int, **options: Any
) -> Tensor:
    """Compute token_logprobs, values or scores of all groups without gradients, at most `budget`
    trunk tokens at a time.
    """
    if (holder := holder_of(model)) is not None:
        return holder.in_microbatches(function, model, groups, budget, **options)
    parts = [
        (rows, function(model, part, **options)) for rows, part in microbatches(groups, budget)
    ]
    rows, results = zip(*parts, strict=True)
    return torch.cat(results)[torch.cat(rows).argsort()]


def autocast(model: Any) -> AbstractContextManager[Any]:
    """Return the autocast context of the model's precision: float32 weights, matrix products in
    model.compute_dtype.
    """
    dtype = getattr(model, "compute_dtype", None)
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype=dtype)


def shares_prefix(model: Any) -> bool:
    """Return whether this model can share prompts, tested once on a small batch against its plain
    forward.
    """
    cached = getattr(model, "_shares_prefix", None)
    if cached is None:
        model._shares_prefix = cached = _try_sharing(model)
    return cached


def _try_sharing(model: Any) -> bool:
    original = model.config._attn_implementation
    if getattr(model, "_is_stateful", False) or not getattr(
        model, "_supports_attention_backend", False
    ):
        return False
    top = model.get_input_embeddings().num_embeddings - 1
    ids = [
        [min(7 * i + 3 * j, top) for j in range(length)]
        for i, length in enumerate((5, 3, 2, 4, 1, 3))
    ]
    probe = collate(ids[:2], ids[2:]).to(model.device)

    def numbers(shared: bool) -> Tensor:
        if model.get_output_embeddings() is not None:
            return (_shared_token_logprobs if shared else _plain_token_logprobs)(model, probe, 1.0)
        hidden, _, last = states(model, probe, shared=shared)
        return hidden[last]

    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            plain = numbers(shared=False)
            model.set_attn_implementation(NAME)
            shared = numbers(shared=True)
        rounding = (64 if model.dtype.itemsize > 2 else 4) * torch.finfo(model.dtype).eps
        agrees = torch.allclose(shared, plain, rtol=rounding, atol=rounding)
    except (
        UnshareableError,
        TypeError,
        ValueError,
        AttributeError,
        KeyError,
        RuntimeError,
        IndexError,
    ):
        agrees = False
    if not agrees:
        model.set_attn_implementation(original)
    return agrees


def trunk(model: Any, ids: Tensor, positions: Tensor, layout: Any) -> Tensor:
    """Return the last hidden states (R, L, D) of ids and positions (R, L); layout.attend computes
    the attention.
    """
    # The layout does all masking.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    out = model.base_model(
        ids, attention_mask=no_mask, position_ids=positions, use_cache=False, layout=layout
    )
    return out.last_hidden_state


def states(model: Any, groups: Groups, *, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the trunk's hidden states (N, D), the indices of those that predict a trained token
    (M,), and the index of each sequence's last real token (B,).
    """
    if shared:
        layout = Layout(groups)
        hidden = trunk(model, layout.ids, layout.positions, layout)[0]
        return hidden, layout.predictor[groups.mask], layout.last
    ids, attention, before, last = _plain_rows(groups)
    out = model.base_model(ids, attention_mask=attention, use_cache=False)
    return out.last_hidden_state.flatten(0, 1), before, last


def _shared_token_logprobs(model: Any, groups: Groups, temperature: float) -> Tensor:
    hidden, before, _ = states(model, groups, shared=True)
    # index_select, since hidden[before] would sum gradients in an arbitrary order.
    hidden = hidden.index_select(0, before)  # (M, D)
    head, targets = model.get_output_embeddings(), groups.completions[groups.mask]  # (M,)
    return place(
        selected_logprobs(hidden, head.weight, head.bias, targets, temperature), groups.mask
    )


def _plain_token_logprobs(model: Any, groups: Groups, temperature: float) -> Tensor:
    """The model's own forward over padded rows, with the prompt repeated per completion; the shared
    forward must match it.
    """
    ids, attention, before, _ = _plain_rows(groups)
    logits = (
        model(ids, attention_mask=attention, use_cache=False)
        .logits.flatten(0, 1)
        .index_select(0, before)
    )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    picked = logits.log_softmax(-1).gather(1, groups.completions[groups.mask][:, None])[:, 0]
    return place(picked, groups.mask)


def _plain_rows(groups: Groups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one right-padded row per completion: ids and attention mask (B, L); and, as flat
    indices, the position before each trained token (M,) and that of each row's last token (B,).
    """
    size, completion_column = groups.group_size, groups.present.cumsum(1) - 1  # (B, T)
    real = torch.cat([groups.prompt_mask.repeat_interleave(size, 0), groups.present], 1)  # (B, L)
    order = (~real).long().argsort(dim=1, stable=True)  # real tokens first
    ids = torch.cat([groups.prompts.repeat_interleave(size, 0), groups.completions], 1).gather(
        1, order
    )
    start = torch.arange(len(ids), device=ids.device) * ids.shape[1]
    prompt = groups.prompt_mask.sum(1).repeat_interleave(size)
    before = (start + prompt)[:, None] + completion_column - 1  # (B, T)
    return ids, real.gather(1, order).long(), before[groups.mask], start + real.sum(1) - 1


def place(x: Tensor, mask: Tensor) -> Tensor:
    """Put values of the masked tokens at their positions in (B, T), 0 elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)
