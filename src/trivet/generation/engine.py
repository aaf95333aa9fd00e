"""The in-process engine: samples from the learner's own weights and prefills each prompt once for
its whole group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from trivet.batch import Example, Groups, Rollouts, collate
from trivet.errors import InputError
from trivet.generation.sampling import sample
from trivet.model.attention import Layout, attend_dense, hide
from trivet.model.forward import autocast, shares_prefix, token_logprobs, trunk
from trivet.timing import timed

STRETCH = 64  # columns that the cache grows by


@dataclass
class Engine:
    """Samples groups of completions, with a random generator of its own so that a seed reproduces
    them.
    """

    # (prompt ids, completion ids) -> the completion's text
    decode: Callable[[Sequence[int], Sequence[int]], str]
    stops: Sequence[int]  # all ids that end a completion
    max_completion_tokens: int
    temperature: float
    generator: torch.Generator
    # 0 means no cut. With a cut, log-probabilities are those of the cut distribution; the learner's
    # are not cut.
    top_k: int = 0
    top_p: float = 1.0
    cache_bytes: int = 0  # largest size of a cache so far

    @timed("generation")
    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Sample group_size completions of every prompt from the policy's current weights."""
        bare = collate([prompt.prompt for prompt in prompts], [[]] * len(prompts)).to(policy.device)
        run = _decode if shares_prefix(policy) else _transformers_generate
        with torch.no_grad(), autocast(policy):
            completions, present, logprobs = run(self, policy, bare, group_size)
        if not logprobs.isfinite().all():
            raise InputError(
                "the policy's probabilities are NaN or infinite; lower --lr or inspect its weights"
            )
        groups = replace(
            bare, completions=completions, mask=present, present=present, group_size=group_size
        )
        last = present.sum(1) - 1
        finished = torch.isin(
            completions.gather(1, last[:, None])[:, 0], completions.new_tensor(self.stops)
        )
        lengths, tokens = (last + 1 - finished.long()).tolist(), completions.tolist()
        texts = [
            self.decode(prompts[b // group_size].prompt, tokens[b][:length])
            for b, length in enumerate(lengths)
        ]
        return Rollouts(
            groups=groups,
            logprobs=logprobs,
            finished=finished,
            texts=texts,
            rows=[p.row for p in prompts],
        )

    def noise(self, rows: Tensor) -> Tensor:
        """Draw a uniform number for each of these rows. (R,) -> (R, 1)"""
        return torch.rand((len(rows), 1), generator=self.generator, device=rows.device)


def _decode(
    engine: Engine, model: Any, bare: Groups, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return completions (B, T), which of their tokens are present (B, T), and the log-probability
    of each as sampled (B, T).
    """
    room, device, layout = engine.max_completion_tokens, bare.prompts.device, Layout(bare)
    cache, head = Cache(layout, bare.prompt_mask, group_size), model.get_output_embeddings()
    hidden = trunk(model, layout.ids, layout.positions, cache)[0, layout.last]  # (P, D)
    logits = head(hidden).repeat_interleave(group_size, 0)  # (B, V)
    # Numbers of the rows in the cache.
    alive = torch.arange(len(logits), device=device)
    # False for rows that have ended but are still in the cache.
    writing = torch.ones(len(logits), dtype=torch.bool, device=device)
    completions = torch.zeros(len(logits), room, dtype=torch.int64, device=device)
    logprobs, present = completions.float(), completions.bool()
    stops = torch.tensor(engine.stops, device=device)
    cut: dict[str, Any] = {
        "temperature": engine.temperature,
        "top_k": engine.top_k,
        "top_p": engine.top_p,
    }
    for t in range(room):
        tokens, chosen = sample(logits, engine.noise(alive), **cut)  # (R,), (R,)
        completions[alive, t] = torch.where(writing, tokens, 0)
        logprobs[alive, t] = torch.where(writing, chosen, 0.0)
        present[alive, t] = writing
        writing = writing & ~torch.isin(tokens, stops)
        left = int(writing.sum())
        if left == 0 or t + 1 == room:
            break
        # Removing rows copies the cache, so a few ended ones stay in it.
        if left <= 0.75 * len(alive):
            alive, tokens = alive[writing], tokens[writing]
            cache.keep_rows(writing)
            writing = writing[writing]
        hidden = trunk(model, tokens[:, None], (cache.start + t)[:, None], cache)[:, 0]  # (R, D)
        logits = head(hidden)
    engine.cache_bytes, longest = max(engine.cache_bytes, cache.most), int(present.sum(1).max())
    return (
        completions[:, :longest].clone(),
        present[:, :longest].clone(),
        logprobs[:, :longest].clone(),
    )


class Cache:
    """Keys and values of every row being generated: [prompt, right-aligned | completion], one pair
    of tensors per layer.

    The first pass goes through the layout of the prompts and stores their keys and values; later
    passes add a column. The tensors grow by STRETCH columns and are used whole, with unused columns
    masked: a product with a slice would copy it.
    """

    def __init__(self, prefill: Layout, prompt_mask: Tensor, group_size: int):
        self.prefill = prefill
        lengths = prompt_mask.sum(1)
        self.width = self.used = int(lengths.max())
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        self.column = (
            row * self.width
            + (self.width - lengths).repeat_interleave(lengths)
            + prefill.positions[0]
        )
        self.group_size, self.prompts = group_size, len(lengths)
        # (R,) position of the first completion token
        self.start = lengths.repeat_interleave(group_size)
        # layer -> keys and values, (R, kv heads, columns, d) each
        self.stores: dict[int, list[Tensor]] = {}
        self.most = 0  # largest size in bytes so far
        self.biases: dict[int | None, Tensor] = {}  # for the newest column, by window

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Attend (R, heads, 1, d) -> (R, 1, heads, d), or over the packed prompts at prefill."""
        if layer not in self.stores:
            self.stores[layer] = [self._store(k.to(v.dtype)), self._store(v)]
            return self.prefill.attend(layer, q, k, v, scale, window)
        if layer == next(iter(self.stores)):  # the first layer opens the next column
            self.used += 1
            self.biases.clear()
        store = self.stores[layer]
        for i, new in enumerate((k, v)):
            if store[i].shape[2] < self.used:
                store[i] = pad(store[i], (0, 0, 0, STRETCH))
                self.most = max(
                    self.most, sum(x.nbytes for pair in self.stores.values() for x in pair)
                )
            store[i][:, :, self.used - 1] = new[:, :, 0]
        if window not in self.biases:
            column = torch.arange(store[0].shape[2], device=q.device)
            # (R, columns)
            hidden = (column < self.width - self.start[:, None]) | (column >= self.used)
            hidden |= column < self.used - (window or self.used)
            self.biases[window] = hide(hidden, v.dtype)
        q, keys, values = (x.transpose(1, 2).to(v.dtype) for x in (q, *store))
        return attend_dense(q, keys, values, self.biases[window][:, None], scale)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows, (R,) bool."""
        self.start = self.start[rows]
        self.stores = {layer: [x[rows] for x in store] for layer, store in self.stores.items()}

    def _store(self, x: Tensor) -> Tensor:
        """Unpack (1, heads, N, d) of the packed prompts -> (B, heads, width, d)."""
        grid = x.new_zeros(self.prompts * self.width, x.shape[1], x.shape[3])
        grid = grid.index_copy(0, self.column, x[0].transpose(0, 1)).view(
            self.prompts, self.width, *grid.shape[1:]
        )
        return grid.transpose(1, 2).repeat_interleave(self.group_size, 0)


def _transformers_generate(
    engine: Engine, model: Any, bare: Groups, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with transformers' generate, for models that can't share a prefix, followed by one
    pass for log-probabilities (of the distribution before any cut).
    """
    prompts, prompt_mask = (
        x.repeat_interleave(group_size, 0) for x in (bare.prompts, bare.prompt_mask)
    )
    order = prompt_mask.long().argsort(dim=1, stable=True)  # padding first
    ids, attention = prompts.gather(1, order), prompt_mask.gather(1, order)
    torch.manual_seed(
        int(torch.randint(2**31, (), generator=engine.generator, device=engine.generator.device))
    )
    temperature, saved = engine.temperature, model.generation_config
    # only the engine's settings, none of the model's
    model.generation_config = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=engine.top_k,
        top_p=engine.top_p,
        max_new_tokens=engine.max_completion_tokens,
        eos_token_id=list(engine.stops),
        pad_token_id=engine.stops[0],
    )
    try:
        sampled = model.generate(ids, attention_mask=attention.long())
    finally:
        model.generation_config = saved
    completions = sampled[:, ids.shape[1] :]
    ended = torch.isin(completions, completions.new_tensor(engine.stops)).long()
    present = ended.cumsum(1) - ended == 0  # up to and including the first stop
    groups = replace(
        bare, completions=completions, mask=present, present=present, group_size=group_size
    )
    return completions, present, token_logprobs(model, groups, temperature=temperature or 1.0)
