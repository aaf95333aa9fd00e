"""The types that flow through a step: Example (a row of data), Groups (prompts and completions) and
Rollouts (groups that the policy sampled).

P prompts with G completions each make B = P G rows; row b answers prompt b // G. S is the padded
length of the prompts, T that of the completions. Column t of every (B, T) tensor describes
completion token t.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Prompts, each with G completions. SFT has G = 1, a preference G = 2 (chosen, rejected), GRPO
    any G.

    Two prompts with two completions each, padded with 0 (the ids in padding don't matter):

        prompts         [[5, 6, 7], [8, 9, 0]]
        prompt_mask     [[1, 1, 1], [1, 1, 0]]
        completions     [[3, 1], [4, 0], [3, 3], [1, 0]]
        mask = present  [[1, 1], [1, 0], [1, 1], [1, 0]]
    """

    prompts: Tensor  # (P, S) int64
    prompt_mask: Tensor  # (P, S) bool   real tokens
    completions: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool   tokens the policy is trained on, its final EOS included
    present: Tensor  # (B, T) bool   real tokens; differs from mask where a tool or a user speaks
    group_size: int

    @property
    def lengths(self) -> Tensor:
        """Number of tokens the trunk sees for each group, counting its prompt once. (P,)"""
        return self.prompt_mask.sum(1) + self.present.reshape(len(self.prompts), -1).sum(1)

    def select(self, prompts: Tensor) -> "Groups":
        """The groups of these prompts, in this order. prompts: (K,) int64 indices."""
        rows, size = group_rows(prompts, self.group_size), self.group_size
        by_prompt = (self.prompts, self.prompt_mask)
        by_row = (self.completions, self.mask, self.present)
        return _groups(
            *(x[prompts] for x in by_prompt), *(x[rows] for x in by_row), group_size=size
        )

    def regroup(self, group_size: int) -> "Groups":
        """The same rows in smaller groups, each with its own copy of the prompt. group_size must
        divide the current one.
        """
        copies = self.group_size // group_size
        prompts, prompt_mask = (
            x.repeat_interleave(copies, 0) for x in (self.prompts, self.prompt_mask)
        )
        return replace(self, prompts=prompts, prompt_mask=prompt_mask, group_size=group_size)

    def to(self, device: torch.device | str) -> "Groups":
        """The same groups on another device."""
        tensors = (self.prompts, self.prompt_mask, self.completions, self.mask, self.present)
        return _groups(*(x.to(device) for x in tensors), group_size=self.group_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """Groups that the policy sampled. Made once by generation, then only read."""

    groups: Groups
    logprobs: Tensor  # (B, T) log pi_old(token) as sampled
    finished: Tensor  # (B,) bool     ended with a stop token; False = cut at the length limit
    texts: Sequence[str]  # B
    rows: Sequence[Mapping[str, Any]]  # P source rows, every column kept, for rewards
    # B, how many steps behind the learner the weights were that sampled each; empty: not at all
    versions: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row of data as token ids: a prompt and the completions that come with it (none, one, or
    chosen and rejected).
    """

    prompt: list[int]
    completions: list[list[int]]
    learned: list[list[bool]]  # per completion token, whether the policy learns it
    row: Mapping[str, Any]  # the source row, every column kept
    index: int | tuple[int, int] = -1  # its number in the run (step/run.py), a key for tables


def group_rows(prompts: Tensor, group_size: int) -> Tensor:
    """Row numbers p G ... p G + G - 1 of these prompts, in order. (K,) -> (K G,)"""
    return (
        prompts[:, None] * group_size + torch.arange(group_size, device=prompts.device)
    ).flatten()


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad ragged token ids into an (N, L) int64 tensor; also return its (N, L) bool mask."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(max(1, int(lengths.max())))[None, :] < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.int64)
    padded[mask] = torch.tensor(
        [token for sequence in sequences for token in sequence], dtype=torch.int64
    )
    return padded, mask


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    trained: Sequence[Sequence[bool]] | None = None,
) -> Groups:
    """Build Groups from token ids: P prompts and P G completions, ordered by prompt.

    trained: per completion token, whether the policy learns it; None trains on all.
    """
    (prompt_ids, prompt_mask), (completion_ids, present) = pad(prompts), pad(completions)
    mask = present.clone()
    if trained is not None:
        mask[present] = torch.tensor(
            [flag for flags in trained for flag in flags], dtype=torch.bool
        )
    return _groups(
        prompt_ids,
        prompt_mask,
        completion_ids,
        mask,
        present,
        group_size=len(completions) // len(prompts),
    )


def _groups(*tensors: Tensor, group_size: int) -> Groups:
    names = ("prompts", "prompt_mask", "completions", "mask", "present")
    return Groups(**dict(zip(names, tensors, strict=True)), group_size=group_size)


def microbatches(
    groups: Groups, budget: int, *, whole: bool = False, only: Tensor | None = None
) -> Iterator[tuple[Tensor, Groups]]:
    """Split a step into parts of at most `budget` trunk tokens, longest groups first, to bound
    memory.

    whole: keep a group that exceeds the budget in one part, as losses that compare completions
    need; otherwise it is split by rows, unless its prompt would be the larger half of its part.
    only: (P,) bool, the groups to visit (the others can't change the gradient). Yields (rows,
    part): rows are the (b,) row numbers of part in `groups`, so `advantages[rows]` matches part.
    """
    size, first = (
        groups.group_size,
        torch.arange(len(groups.completions), device=groups.completions.device),
    )
    if only is not None:
        chosen = only.nonzero().squeeze(1)
        groups, first = groups.select(chosen), group_rows(chosen, size)
    if not len(groups.prompts):
        return
    while (
        not whole
        and size > 1
        and (groups.lengths > (2 * groups.prompt_mask.sum(1)).clamp(min=budget)).any()
    ):
        size = next(smaller for smaller in range(size - 1, 0, -1) if size % smaller == 0)
        groups = groups.regroup(size)
    lengths: list[int] = groups.lengths.tolist()  # type: ignore[no-untyped-call]  one read of the device for the step
    part, used = list[int](), 0
    order = sorted(range(len(lengths)), key=lambda p: -lengths[p])
    for p in [*order, None]:
        if part and (p is None or used + lengths[p] > budget):
            index = torch.tensor(part, device=first.device)
            yield first[group_rows(index, size)], groups.select(index)
            part, used = [], 0
        if p is not None:
            part.append(p)
            used += lengths[p]
