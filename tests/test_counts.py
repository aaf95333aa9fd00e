"""What a step computes, counted against its closed form: a guard of speed that no busy machine can disturb."""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import ragged, tiny
from steps import examples, recipe_step, rollouts_of
from trivet.batch import Example
from trivet.generation import engine as generation
from trivet.generation.engine import Engine
from trivet.model import forward
from trivet.model.forward import shares_prefix, token_logprobs
from trivet.model.scalar import with_scalar_head
from trivet.recipes import dpo, grpo, pairwise_grpo, ppo, sft

POLICY = tiny()


class Counts:
    """Tokens through the trunk and rows through the head, with gradient and without."""

    def __init__(self) -> None:
        self.trunk = {True: 0, False: 0}
        self.head = {True: 0, False: 0}

    def __enter__(self) -> "Counts":
        trunk, head = forward.trunk, forward.selected_logprobs

        def counted_trunk(model, ids, *rest):
            self.trunk[torch.is_grad_enabled()] += ids.numel()
            return trunk(model, ids, *rest)

        def counted_head(hidden, *rest):
            self.head[torch.is_grad_enabled()] += len(hidden)
            return head(hidden, *rest)

        token_logprobs(POLICY, ragged())  # whether it can share a prefix is tried once
        self.patches = [
            patch.object(forward, "trunk", counted_trunk),
            patch.object(forward, "selected_logprobs", counted_head),
        ]
        for patched in self.patches:
            patched.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patched in self.patches:
            patched.stop()


@pytest.mark.parametrize("budget", [40, 10_000])
def test_supervised_and_preference_steps_see_every_token_once(budget):
    singles, pairs = ragged(6, 1), ragged(5, 2)
    with Counts() as counts:
        recipe_step(sft, POLICY, examples(singles), microbatch_tokens=budget)
    assert counts.trunk == {True: int(singles.lengths.sum()), False: 0}
    assert counts.head == {True: int(singles.mask.sum()), False: 0}
    with Counts() as counts:
        recipe_step(dpo, POLICY, examples(pairs), microbatch_tokens=budget)
    once = int(
        pairs.lengths.sum()
    )  # a prompt once for both completions; the reference pass comes before the first step
    assert counts.trunk == {True: once, False: once}
    assert counts.head == {True: int(pairs.mask.sum()), False: int(pairs.mask.sum())}


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_a_loss_without_a_reference_takes_no_reference_pass(name):
    pairs = ragged(5, 2)
    with Counts() as counts:
        recipe_step(dpo, POLICY, examples(pairs), **dpo.PRESETS[name])
    assert counts.trunk == {True: int(pairs.lengths.sum()), False: 0}


@pytest.mark.parametrize(("beta", "equal"), [(0.0, 2), (0.0, 4), (0.1, 2)])
def test_grpo_trains_on_groups_that_teach_and_has_no_reference_at_beta_0(beta, equal):
    groups = ragged(4, 4)
    rewards = torch.arange(16.0)
    rewards[: 4 * equal] = 1.0  # these groups teach nothing
    given = {
        "rollouts": rollouts_of(groups, token_logprobs(POLICY, groups)),
        "rewards": rewards,
        "group_size": 4,
    }
    with Counts() as counts:
        recipe_step(grpo, POLICY, examples(groups), beta=beta, **given)
    taught = groups.lengths if beta else groups.lengths[equal:]
    tokens = groups.mask if beta else groups.mask[4 * equal :]
    everything = int(groups.lengths.sum()) if beta else 0
    assert counts.trunk == {True: int(taught.sum()), False: everything}
    assert counts.head[True] == int(tokens.sum())


def test_pairwise_and_ppo_take_one_reference_pass_and_no_pass_of_the_old_policy():
    groups, rewards = ragged(3, 4), torch.arange(12.0)
    given = {
        "rollouts": rollouts_of(groups, token_logprobs(POLICY, groups)),
        "rewards": rewards,
        "group_size": 4,
    }
    once = int(groups.lengths.sum())
    with Counts() as counts:
        recipe_step(pairwise_grpo, POLICY, examples(groups), **given)
    assert counts.trunk == {True: once, False: once}
    with Counts() as counts:
        recipe_step(
            ppo,
            POLICY,
            examples(groups),
            critic=with_scalar_head(POLICY),
            epochs_per_batch=1,
            **given,
        )
    assert counts.head == {
        True: int(groups.mask.sum()),
        False: int(groups.mask.sum()),
    }  # the critic has no such head


def test_decoding_prefills_a_prompt_once_and_lets_few_ended_rows_ride_along():
    prompts = [Example(prompt=[5, 6, 7] * n, completions=[], learned=[], row={}) for n in (1, 2, 3)]
    sampler = Engine(
        lambda prompt, ids: "", (0, 1, 2, 3), 40, 1.0, torch.Generator().manual_seed(0)
    )
    steps: list[int] = []
    trunk = generation.trunk

    def counted(model, ids, *rest):
        steps.append(ids.numel())
        return trunk(model, ids, *rest)

    with patch.object(generation, "trunk", counted):
        rollouts = sampler.generate(POLICY, prompts, 16)
    lengths = rollouts.groups.present.sum(1)
    assert steps[0] == sum(len(prompt.prompt) for prompt in prompts)
    assert len(steps) == int(lengths.max())
    needed = int((lengths - 1).sum())  # the last token of a row goes through nothing
    assert needed <= sum(steps[1:]) <= needed / 0.75


class Watch(TorchDispatchMode):
    """Reads of the device (each would make a GPU wait), and fresh tensors of more than `large` bytes."""

    def __init__(self, large: int = 1 << 60):
        super().__init__()
        self.reads, self.allocations, self.large = 0, list[tuple[int, ...]](), large

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                size = x.untyped_storage().nbytes()
                self.allocations += [tuple(x.shape)] if size > self.large else []
        chosen = (
            args[1]
            if op in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
            else ()
        )
        by_mask = any(x is not None and x.dtype == torch.bool for x in chosen)
        self.reads += by_mask or op in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        return result

    def __enter__(self):
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.reads += 1
            return tolist(tensor)

        self.patched = patch.object(
            torch.Tensor, "tolist", counted
        )  # the one read that is no operation
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patched.stop()
        return super().__exit__(*error)


def test_reads_of_the_device_do_not_grow_with_the_tokens_of_a_microbatch():
    shares_prefix(POLICY)
    reads = []
    for prompts, size, longest in ((2, 2, 5), (9, 8, 40)):
        groups = ragged(prompts, size, longest)
        with Watch() as watch:
            token_logprobs(POLICY, groups).sum().backward()
        reads.append(watch.reads)
    assert reads[0] == reads[1] <= 10


def test_one_read_of_the_device_for_each_token_that_is_decoded():
    shares_prefix(POLICY)
    prompts = [Example(prompt=[5, 6, 7], completions=[], learned=[], row={})] * 2
    reads = []
    for room in (4, 9):
        sampler = Engine(
            lambda prompt, ids: "", (10**6,), room, 1.0, torch.Generator().manual_seed(0)
        )
        with Watch() as watch:
            sampler.generate(POLICY, prompts, 3)
        reads.append(watch.reads)
    assert reads[1] - reads[0] == 5


@pytest.mark.parametrize("precision", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_the_only_large_allocations_are_the_gradients_of_a_tied_embedding(precision):
    model = tiny(vocab_size=8192, hidden_size=256, tie_word_embeddings=True)
    model.compute_dtype = precision
    shares_prefix(model)
    groups, weight = ragged(40, 2, 11), model.get_output_embeddings().weight
    assert int(groups.mask.sum()) * 8192 * 4 > 10e6  # what all logits at once would take
    with Watch(large=weight.nbytes - 1) as watch, torch.no_grad():
        token_logprobs(model, groups)
    assert watch.allocations == []
    with Watch(large=weight.nbytes - 1) as watch:
        token_logprobs(model, groups).sum().backward()
    assert watch.allocations == [tuple(weight.shape)] * 3  # as head, as embedding, and their sum
