"""The objectives, in float64: enumeration of tiny worlds, definitions written out slowly, limits, identities, gradients."""

import importlib
import inspect
import itertools
import math
import pkgutil
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import trivet.optimization
from trivet.optimization.advantages import (
    group_advantages,
    leave_one_out_advantages,
    scale_by_batch,
)
from trivet.optimization.control import adapted_beta
from trivet.optimization.kl import k1, k2, k3
from trivet.optimization.normalize import scale_to_unit_variance, whiten
from trivet.optimization.policy import clipped_surrogate_loss, is_clipped, policy_gradient_loss
from trivet.optimization.preference import (
    bradley_terry_loss,
    centering_loss,
    dpo_loss,
    implicit_reward,
    pairwise_group_loss,
    ranked_pairs,
)
from trivet.optimization.preference_variants import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    robust_loss,
    simpo_loss,
)
from trivet.optimization.ratio import cispo_loss, gspo_loss, weighted_kl
from trivet.optimization.reduce import sequence_mean, sequence_sum, token_mean
from trivet.optimization.supervised import nll_loss
from trivet.optimization.value import clipped_value_loss, explained_variance, gae

torch.set_num_threads(1)
some = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 10_000)
EXACT = {"rtol": 0.0, "atol": 0.0}
LOG2 = math.log(2)
NAN, INF = math.nan, math.inf
EPS = {"clip_low": 0.2, "clip_high": 0.3}  # unequal, so that mixing them up shows
REAL = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1],  # full
        [1, 1, 1, 0, 0, 0],  # ragged
        [0, 1, 1, 0, 1, 0],  # holes, where a tool spoke
        [0, 0, 0, 0, 0, 0],  # nothing
    ],
    dtype=torch.bool,
)  # (B, T)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(True)


def grad(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


# Worlds small enough to enumerate -----------------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two tables of log-probabilities, over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def expectation(logprobs: Tensor, x: Tensor) -> Tensor:
    """E_{a ~ pi} x(a), where the sampling itself is not differentiated, as in training."""
    return (logprobs.detach().exp() * x).sum(-1)


@pytest.fixture
def one_token() -> tuple[Tensor, Tensor]:
    """A policy's logits (a leaf) and the log-probabilities of a reference, over a vocabulary of 5."""
    return leaf(numbers(5, seed=1)), numbers(5, seed=2).log_softmax(-1)


def two_tokens(logits: Tensor) -> Tensor:
    """(9, 2) log-probability of both tokens of every text "ab" over a vocabulary of 3. logits: (4, 3), the first row for
    a, row 1 + a for b after a."""
    table = logits.log_softmax(-1)
    return torch.stack(
        [torch.stack([table[0, a], table[1 + a, b]]) for a in range(3) for b in range(3)]
    )


# KL: what each estimator measures and teaches -----------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_average_to_the_kl(one_token, estimator):
    policy, reference = one_token[0].log_softmax(-1), one_token[1]
    assert_close(expectation(policy, estimator(policy, reference)), kl(policy, reference))


def test_k2_averages_to_the_kl_up_to_third_order(one_token):
    reference, direction = one_token[1], numbers(5, seed=3)

    def bias(step: float) -> float:
        policy = (reference + step * direction).log_softmax(-1)
        return float(expectation(policy, k2(policy, reference)) - kl(policy, reference))

    assert bias(1e-2) != 0
    assert bias(2e-2) / bias(1e-2) == pytest.approx(8, rel=0.05)


def test_k2_and_k3_are_never_negative_and_k1_has_both_signs(one_token):
    policy, reference = one_token[0].log_softmax(-1), one_token[1]
    assert (k2(policy, reference) > 0).all()
    assert (k3(policy, reference) > 0).all()
    assert (k1(policy, reference) > 0).any()
    assert (k1(policy, reference) < 0).any()


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_kl_of_a_policy_to_itself_is_exactly_zero(one_token, estimator):
    policy = one_token[0].log_softmax(-1)
    assert_close(estimator(policy, policy), torch.zeros_like(policy), **EXACT)


def test_k3_keeps_its_digits_close_to_the_reference():
    near = torch.full((1,), 1e-3)  # in float32, where exp(-d) - 1 + d as it is written is 2% off
    assert_close(k3(near, torch.zeros(1)), torch.full((1,), 4.998334e-07), rtol=1e-3, atol=0)


def test_k1_in_a_loss_teaches_nothing(one_token):
    logits, reference = one_token
    policy = logits.log_softmax(-1)
    assert_close(grad(expectation(policy, k1(policy, reference)), logits), torch.zeros_like(logits))


def test_k2_in_a_loss_has_the_gradient_of_kl_from_policy_to_reference(one_token):
    logits, reference = one_token
    policy = logits.log_softmax(-1)
    found = grad(expectation(policy, k2(policy, reference)), logits)
    assert_close(found, grad(kl(logits.log_softmax(-1), reference), logits))


def test_k3_in_a_loss_has_the_gradient_of_the_other_direction(one_token):
    logits, reference = one_token
    policy = logits.log_softmax(-1)
    found = grad(expectation(policy, k3(policy, reference)), logits)
    assert_close(found, grad(kl(reference, logits.log_softmax(-1)), logits))
    assert (found - grad(kl(logits.log_softmax(-1), reference), logits)).abs().max() > 0.05


def test_over_texts_k1_as_a_cost_to_come_has_the_whole_gradient_of_the_kl():
    logits, reference = leaf(numbers(4, 3, seed=4)), two_tokens(numbers(4, 3, seed=5))  # (9, 2)
    policy = two_tokens(logits)
    weight = policy.detach().sum(1).exp()  # (9,) pi(y)
    assert_close(weight.sum(), f64(1.0))
    charge = k1(policy, reference)  # (9, 2)
    to_come = charge.flip(1).cumsum(1).flip(1)
    found = grad(weight @ policy_gradient_loss(policy, -to_come), logits)
    whole = two_tokens(logits).sum(1)
    assert_close(found, grad(kl(whole, reference.sum(1)), logits))


def test_over_texts_k2_per_token_is_the_kl_of_each_state_with_the_visits_held_fixed():
    logits, reference = leaf(numbers(4, 3, seed=4)), numbers(4, 3, seed=5)
    policy = two_tokens(logits)
    weight = policy.detach().sum(1).exp()  # (9,)
    found = grad(weight @ k2(policy, two_tokens(reference)), logits)
    visits = torch.cat([torch.ones(1), logits[0].softmax(-1)]).detach()  # (4,) of the start, of a
    assert_close(
        found, grad(visits @ kl(logits.log_softmax(-1), reference.log_softmax(-1)), logits)
    )


# The policy gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "a number", "of the state"])
def test_policy_gradient_theorem(baseline):
    logits, reward = leaf(numbers(4, 3, seed=6)), numbers(9, seed=7)
    policy = two_tokens(logits)  # (9, 2)
    ascent = grad(
        policy.sum(1).exp() @ reward, logits
    )  # of the expected reward, all nine texts written out
    of_state = torch.cat(
        [numbers(1, seed=8).expand(9, 1), numbers(3, seed=9).repeat_interleave(3)[:, None]], 1
    )  # (9, 2)
    subtracted = {"none": f64(0.0), "a number": f64(3.7), "of the state": of_state}[baseline]
    policy = two_tokens(logits)
    loss = policy_gradient_loss(policy, reward[:, None] - subtracted)
    assert_close(grad(policy.detach().sum(1).exp() @ loss, logits), -ascent)


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_is_unbiased_and_the_group_mean_shrinks_the_gradient(group_size):
    logits, reward = leaf(numbers(3, seed=10)), numbers(3, seed=11)
    ascent = grad(logits.softmax(-1) @ reward, logits)
    groups = torch.tensor(
        list(itertools.product(range(3), repeat=group_size))
    )  # every group there can be
    policy = logits.log_softmax(-1)[groups]  # (3^G, G)
    weight = policy.detach().sum(1).exp()

    def descent(advantages: Tensor) -> Tensor:
        loss = policy_gradient_loss(policy, advantages.view_as(groups)).mean(1)
        return torch.autograd.grad(weight @ loss, logits, retain_graph=True)[0]

    rewards = reward[groups].flatten()
    assert_close(descent(leave_one_out_advantages(rewards, group_size)), -ascent)
    assert_close(
        descent(group_advantages(rewards, group_size)), -ascent * (group_size - 1) / group_size
    )


def test_policy_gradient_loss_is_minus_advantage_times_logprob():
    logprobs, advantages = numbers(2, 3), numbers(2, 3, seed=1)
    assert_close(policy_gradient_loss(logprobs, advantages), -advantages * logprobs)


@pytest.mark.parametrize(
    "loss", [policy_gradient_loss, lambda x, a: clipped_surrogate_loss(x, x.detach(), a, **EPS)]
)
def test_advantages_carry_no_gradient(loss):
    logprobs, advantages = leaf(numbers(3)), leaf(numbers(3))
    loss(logprobs, advantages * 2).sum().backward()
    assert logprobs.grad is not None
    assert advantages.grad is None


def test_the_sampling_policy_carries_no_gradient():
    logprobs, old_logprobs = leaf(numbers(3)), leaf(numbers(3))
    clipped_surrogate_loss(logprobs, old_logprobs * 1, numbers(3), **EPS).sum().backward()
    assert old_logprobs.grad is None


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),  # slope: of the loss in log pi
    [
        (0.5, 2.0, -1.0, -1.0),  # below, good: pull it back up
        (0.5, -2.0, 1.6, 0.0),  # below, bad: has fallen enough
        (0.9, 2.0, -1.8, -1.8),
        (0.9, -2.0, 1.8, 1.8),
        (1.25, 2.0, -2.5, -2.5),  # inside, as 1.25 < 1.3
        (1.25, -2.0, 2.5, 2.5),
        (2.0, 2.0, -2.6, 0.0),  # above, good: has risen enough
        (2.0, -2.0, 4.0, 4.0),  # above, bad: pull it back down
        (2.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_below_inside_and_above(ratio, advantage, loss, slope):
    old = f64([-1.3])
    logprobs = leaf(old + math.log(ratio))
    found = clipped_surrogate_loss(logprobs, old, f64([advantage]), **EPS)
    assert_close(found, f64([loss]))
    assert_close(grad(found, logprobs), f64([slope]))
    clipped = is_clipped(logprobs.detach(), old, f64([advantage]), **EPS)
    assert clipped.tolist() == [slope == 0.0 and advantage != 0.0]


@some
@given(seeds)
def test_clipped_surrogate_is_its_definition(seed):
    old, logprobs, advantages = (
        numbers(3, 4, seed=seed),
        numbers(3, 4, seed=seed + 1),
        numbers(3, 4, seed=seed + 2),
    )
    found = clipped_surrogate_loss(logprobs, old, advantages, **EPS)
    for index in itertools.product(range(3), range(4)):
        rho, a = math.exp(logprobs[index] - old[index]), float(advantages[index])
        assert float(found[index]) == pytest.approx(-min(rho * a, max(0.8, min(1.3, rho)) * a))


@some
@given(seeds)
def test_is_clipped_where_the_surrogate_has_no_gradient(seed):
    old, logprobs, advantages = (
        numbers(40, seed=seed),
        leaf(numbers(40, seed=seed + 1)),
        numbers(40, seed=seed + 2),
    )
    slope = grad(clipped_surrogate_loss(logprobs, old, advantages, **EPS), logprobs)
    assert_close(is_clipped(logprobs.detach(), old, advantages, **EPS), slope == 0)


def test_on_policy_the_surrogate_is_the_policy_gradient():
    logprobs, advantages = leaf(numbers(4, 5)), numbers(4, 5, seed=1)
    surrogate = clipped_surrogate_loss(logprobs, logprobs.detach(), advantages, **EPS)
    assert_close(surrogate.detach(), -advantages)
    assert_close(
        grad(surrogate, logprobs),
        grad(policy_gradient_loss(logprobs, advantages), logprobs),
        **EXACT,
    )


def test_without_a_clip_the_surrogate_is_importance_sampling(one_token):
    logits, reward = one_token[0], numbers(5, seed=12)
    sampler = numbers(5, seed=13).log_softmax(-1)
    loss = clipped_surrogate_loss(
        logits.log_softmax(-1), sampler, reward, clip_low=1.0, clip_high=INF
    )
    assert_close(
        grad(expectation(sampler, loss), logits), -grad(logits.softmax(-1) @ reward, logits)
    )


# Advantages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@some
@given(
    constants=st.lists(
        st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=3
    ),
    group_size=st.integers(1, 9),
    unknown=st.sets(st.integers(0, 26)),
)
@example(constants=[-0.1, 1000.1], group_size=8, unknown={0, 15})
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(
    normalize, constants, group_size, unknown
):
    rewards = torch.tensor(constants).repeat_interleave(group_size)
    zeros = [0.0] * len(rewards)
    assert group_advantages(rewards, group_size, normalize=normalize).tolist() == zeros
    if group_size > 1:
        assert leave_one_out_advantages(rewards, group_size).tolist() == zeros
    rewards[[i for i in unknown if i < len(rewards)]] = NAN
    assert group_advantages(rewards, group_size, normalize=normalize).tolist() == zeros


def test_group_advantages_subtract_the_mean_of_their_own_group():
    rewards = f64([1.0, 2.0, 6.0, -10.0, -10.0, -7.0])
    assert_close(group_advantages(rewards, 3), f64([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]))


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_normalized_advantages_divide_by_unbiased_deviation_plus_1e_4(scale):
    rewards = scale * numbers(12)
    for group, found in zip(
        rewards.view(3, 4), group_advantages(rewards, 4, normalize=True).view(3, 4), strict=True
    ):
        assert_close(found, (group - group.mean()) / (group.std() + 1e-4))


@pytest.mark.parametrize("normalize", [False, True])
@some
@given(seeds, st.sets(st.integers(0, 4), max_size=5))
def test_a_completion_without_a_reward_leaves_its_group_as_if_it_were_not_there(
    normalize, seed, unknown
):
    rewards, known = numbers(5, seed=seed), [i for i in range(5) if i not in unknown]
    expected = torch.zeros(5, dtype=torch.float64)
    if known:
        expected[known] = group_advantages(rewards[known], len(known), normalize=normalize)
    rewards[list(unknown)] = NAN
    assert_close(group_advantages(rewards, 5, normalize=normalize), expected)


def test_one_group_with_unknown_rewards_by_hand():
    assert (
        group_advantages(f64([1.0, NAN, 3.0, NAN, NAN, NAN, NAN, 5.0, NAN]), 3).tolist()
        == [-1, 0, 1] + [0] * 6
    )


@some
@given(seeds, st.integers(2, 6))
def test_leave_one_out_is_reward_minus_the_mean_of_the_others(seed, group_size):
    rewards = numbers(3 * group_size, seed=seed)
    expected = [
        reward - (sum(group) - reward) / (group_size - 1)
        for group in rewards.view(3, group_size).tolist()
        for reward in group
    ]
    assert_close(leave_one_out_advantages(rewards, group_size), f64(expected))
    scaled = group_size / (group_size - 1) * group_advantages(rewards, group_size)
    assert_close(leave_one_out_advantages(rewards, group_size), scaled)


def gae_by_definition(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, one completion at a time, over nothing but its real tokens."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        real = mask[b].nonzero()[:, 0].tolist()
        r, v = rewards[b, real].tolist(), [*values[b, real].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(real))]
        for t, column in enumerate(real):
            advantages[b, column] = sum(
                (gamma * lam) ** n * delta[t + n] for n in range(len(real) - t)
            )
    return advantages


@some
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_definition_on_ragged_masks_and_masks_with_holes(seed, gamma, lam):
    mask = torch.cat([REAL, numbers(4, 6, seed=seed) > 0])
    rewards, values = numbers(8, 6, seed=seed + 1), numbers(8, 6, seed=seed + 2)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = gae_by_definition(rewards, values, mask, gamma, lam)
    assert_close(advantages, expected)
    assert_close(returns, torch.where(mask, expected + values, 0.0))


def test_gae_at_lambda_zero_is_the_one_step_advantage():
    rewards, values, mask = numbers(2, 5), numbers(2, 5, seed=1), torch.ones(2, 5, dtype=torch.bool)
    after = torch.cat([values[:, 1:], torch.zeros(2, 1)], 1)
    assert_close(gae(rewards, values, mask, gamma=0.9, lam=0.0)[0], rewards + 0.9 * after - values)


def test_gae_at_lambda_one_is_the_monte_carlo_return_minus_the_value():
    rewards, values, mask = numbers(2, 5), numbers(2, 5, seed=1), torch.ones(2, 5, dtype=torch.bool)
    to_come = torch.stack(
        [rewards[:, t:] @ (0.9 ** torch.arange(5.0 - t).double()) for t in range(5)], 1
    )
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    assert_close(advantages, to_come - values)
    assert_close(returns, to_come)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_gae_expects_nothing_after_the_last_real_token(lam):
    rewards, values = numbers(4, 6), numbers(4, 6, seed=1)
    advantages = gae(rewards, values, REAL, gamma=1.0, lam=lam)[0]
    for b, last in ((0, 5), (1, 2), (2, 4)):
        assert_close(advantages[b, last], rewards[b, last] - values[b, last])


def test_a_perfect_critic_leaves_no_advantage():
    rewards = numbers(1, 6)
    values = rewards.flip(1).cumsum(1).flip(1)
    full = REAL[:1]
    advantages, returns = gae(rewards, values, full, gamma=1.0, lam=0.95)
    assert_close(advantages, torch.zeros_like(values))
    assert_close(returns, values)


# Preferences --------------------------------------------------------------------------------------------------------


@some
@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(-5, 5))
def test_bradley_terry_is_minus_the_log_of_a_sigmoid(chosen, rejected, margin):
    expected = -math.log(1 / (1 + math.exp(-(chosen - rejected - margin))))
    for given_margin in (margin, f64([margin])):
        found = bradley_terry_loss(f64([chosen]), f64([rejected]), margin=given_margin)
        assert_close(found, f64([expected]), rtol=1e-6, atol=1e-12)


def test_one_of_the_two_wins():
    a, b = numbers(9), numbers(9, seed=1)
    wins = (-bradley_terry_loss(a, b)).exp() + (-bradley_terry_loss(b, a)).exp()
    assert_close(wins, torch.ones_like(wins))


def test_bradley_terry_stays_finite_and_straight_far_out():
    scores = leaf(f64([-1e6, 1e6]))
    loss = bradley_terry_loss(scores, torch.zeros(2, dtype=torch.float64))
    assert_close(loss.detach(), f64([1e6, 0.0]))
    assert_close(grad(loss, scores), f64([-1.0, 0.0]))


def test_equal_scores_cost_log_2():
    assert_close(bradley_terry_loss(numbers(4), numbers(4)), torch.full((4,), LOG2).double())


def test_implicit_reward_of_the_best_policy_is_the_reward_up_to_a_constant():
    reward, reference, beta = numbers(5), numbers(5, seed=1).log_softmax(-1), 0.3
    best = (reference + reward / beta).log_softmax(
        -1
    )  # argmax E[r] - beta KL(pi || ref): Rafailov et al. 2023, eq. 4
    log_z = (reference + reward / beta).logsumexp(-1)
    assert_close(implicit_reward(best, reference, beta=beta), reward - beta * log_z)


def test_dpo_is_at_rest_where_policy_explains_the_preferences():
    reward, reference, beta = numbers(4), numbers(4, seed=1).log_softmax(-1), 0.3
    logits = leaf(reference + reward / beta)
    policy = logits.log_softmax(-1)
    winner, loser = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    prefers = torch.sigmoid(reward[winner] - reward[loser])
    loss = prefers @ dpo_loss(
        policy[winner], policy[loser], reference[winner], reference[loser], beta=beta
    )
    assert_close(grad(loss, logits), torch.zeros_like(logits))


def test_dpo_is_bradley_terry_on_implicit_rewards():
    w, l_, ref_w, ref_l = numbers(4, 7)
    rewards = implicit_reward(w, ref_w, beta=0.7), implicit_reward(l_, ref_l, beta=0.7)
    assert_close(dpo_loss(w, l_, ref_w, ref_l, beta=0.7), bradley_terry_loss(*rewards), **EXACT)


def test_dpo_value_and_gradient_written_out():
    policy, ref, beta = leaf(numbers(2, 6)), numbers(2, 6, seed=1), 0.7
    margin = beta * ((policy[0] - policy[1]) - (ref[0] - ref[1]))
    loss = dpo_loss(policy[0], policy[1], ref[0], ref[1], beta=beta)
    assert_close(loss, torch.log1p((-margin).exp()))
    weight = -beta * torch.sigmoid(
        -margin.detach()
    )  # wrong pairs teach most: Rafailov et al. 2023, section 4
    assert_close(grad(loss, policy), torch.stack([weight, -weight]))


def test_dpo_at_the_reference_and_at_beta_zero_is_log_2():
    w, l_, ref_w, ref_l = numbers(4, 7)
    log2 = torch.full((7,), LOG2).double()
    assert_close(dpo_loss(w, l_, w, l_, beta=0.7), log2)
    assert_close(dpo_loss(w, l_, ref_w, ref_l, beta=0.0), log2)
    assert_close(dpo_loss(w, l_, ref_w, ref_l, beta=1e-9), log2)


def pairwise_by_definition(
    logprob: Tensor, ref: Tensor, rewards: Tensor, group_size: int, beta: float
) -> Tensor:
    """A double loop over each group."""
    losses = []
    for first in range(0, len(rewards), group_size):
        rows = range(first, first + group_size)
        pairs = [(i, j) for i in rows for j in rows if rewards[i] > rewards[j]]
        terms = [
            -torch.sigmoid(beta * (logprob[i] - logprob[j] - (ref[i] - ref[j]))).log()
            for i, j in pairs
        ]
        losses.append(sum(terms) / len(terms) if terms else 0.0 * logprob[first])
    return torch.stack(losses)


@some
@given(st.data(), seeds, st.integers(1, 5))
def test_pairwise_loss_and_gradient_are_a_double_loop_for_any_group_size_and_ties(
    data, seed, group_size
):
    rows = 3 * group_size
    rewards = f64(
        data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, NAN]), min_size=rows, max_size=rows))
    )
    logprob, ref = leaf(numbers(rows, seed=seed)), numbers(rows, seed=seed + 1)
    found = pairwise_group_loss(logprob, ref, rewards, group_size, beta=0.7)
    expected = pairwise_by_definition(logprob, ref, rewards, group_size, 0.7)
    assert_close(found, expected)
    upstream = numbers(3, seed=seed + 2)
    assert_close(grad(upstream * found, logprob), grad(upstream * expected, logprob))


@pytest.mark.parametrize("rewards", [[5.0, 1.0], [1.0, 5.0]])
def test_pairwise_loss_of_two_is_dpo_on_the_ordered_pair(rewards):
    logprob, ref = numbers(2), numbers(2, seed=1)
    w, l_ = (0, 1) if rewards[0] > rewards[1] else (1, 0)
    expected = dpo_loss(logprob[[w]], logprob[[l_]], ref[[w]], ref[[l_]], beta=0.7)
    assert_close(pairwise_group_loss(logprob, ref, f64(rewards), 2, beta=0.7), expected, **EXACT)


def test_pairwise_loss_sees_only_the_ranking():
    logprob, ref, rewards = numbers(12), numbers(12, seed=1), numbers(12, seed=2)
    losses = [
        pairwise_group_loss(logprob, ref, r, 4, beta=0.7)
        for r in (rewards, rewards.exp() * 1e6 - 3)
    ]
    assert_close(*losses, **EXACT)


def test_pairwise_loss_does_not_depend_on_the_order_within_a_group():
    logprob, ref, rewards, order = (
        numbers(5),
        numbers(5, seed=1),
        f64([1, 0, 2, 0, 1]),
        [3, 0, 4, 2, 1],
    )
    losses = [
        pairwise_group_loss(logprob[o], ref[o], rewards[o], 5, beta=0.7)
        for o in (list(range(5)), order)
    ]
    assert_close(*losses)


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [NAN, 1.0, NAN], [NAN, NAN, NAN]])
def test_a_group_without_pairs_costs_nothing_and_teaches_nothing(rewards):
    logprob = leaf(numbers(3))
    loss = pairwise_group_loss(logprob, numbers(3, seed=1), f64(rewards), 3, beta=0.7)
    assert loss.tolist() == [0.0]
    assert grad(loss, logprob).tolist() == [0.0] * 3


def test_pairwise_loss_at_the_reference_is_log_2():
    logprob = numbers(8)
    losses = pairwise_group_loss(logprob, logprob, numbers(8, seed=1), 4, beta=0.7)
    assert_close(losses, torch.full((2,), LOG2).double())


def test_ranked_pairs_of_a_group_with_a_tie_and_an_unknown():
    wins = ranked_pairs(f64([2.0, 1.0, 2.0, NAN]), 4)
    assert wins.shape == (1, 4, 4)
    assert wins[0].nonzero().tolist() == [[0, 1], [2, 1]]


# Supervised and value -----------------------------------------------------------------------------------------------


def test_nll_is_minus_the_logprob_and_log_v_at_a_uniform_policy():
    logprobs = numbers(2, 3)
    assert_close(nll_loss(logprobs), -logprobs, **EXACT)
    assert_close(nll_loss(torch.zeros(7).log_softmax(-1)), torch.full((7,), math.log(7)))


def test_nll_gradient_is_the_policy_minus_the_answer(one_token):
    logits = one_token[0]
    answer = f64([0, 0, 1, 0, 0])
    assert_close(
        grad(nll_loss(logits.log_softmax(-1)[2]), logits), logits.detach().softmax(-1) - answer
    )


@some
@given(seeds, st.floats(0, 2))
def test_clipped_value_loss_is_its_definition(seed, clip):
    values, old, returns = (
        numbers(3, 4, seed=seed),
        numbers(3, 4, seed=seed + 1),
        numbers(3, 4, seed=seed + 2),
    )
    found = clipped_value_loss(values, old, returns, clip=clip)
    for i in itertools.product(range(3), range(4)):
        v, v_old, target = float(values[i]), float(old[i]), float(returns[i])
        limited = max(v_old - clip, min(v_old + clip, v))
        assert float(found[i]) == pytest.approx(
            max((v - target) ** 2, (limited - target) ** 2) / 2, abs=1e-12
        )


@pytest.mark.parametrize(
    ("value", "slope"),  # old value 0, return 1, clip 0.5
    [(-0.7, -1.7), (-0.2, -1.2), (0.3, -0.7), (0.6, 0.0), (1.2, 0.0), (1.6, 0.6)],
)
def test_clipped_value_loss_stops_teaching_once_the_value_has_moved_far_enough(value, slope):
    values = leaf(f64([value]))
    loss = clipped_value_loss(values, f64([0.0]), f64([1.0]), clip=0.5)
    assert_close(grad(loss, values), f64([slope]))


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    values, old, returns = numbers(3, 9)
    assert_close(
        clipped_value_loss(values, old, returns, clip=INF), (values - returns).square() / 2
    )


# Reductions ---------------------------------------------------------------------------------------------------------


@some
@given(seeds)
def test_reductions_are_their_definitions(seed):
    x, mask = numbers(5, 6, seed=seed), numbers(5, 6, seed=seed + 1) > 0
    rows = [[float(v) for v, real in zip(x[b], mask[b], strict=True) if real] for b in range(5)]
    tokens = [v for row in rows for v in row]
    assert_close(sequence_sum(x, mask), f64([sum(row) for row in rows]))
    assert_close(sequence_mean(x, mask), f64([sum(row) / len(row) if row else 0.0 for row in rows]))
    assert_close(token_mean(x, mask), f64(sum(tokens) / len(tokens)))


def test_token_mean_and_mean_of_sequence_means_weigh_lengths_differently():
    x, mask = f64([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    assert float(token_mean(x, mask)) == 2.0
    assert float(sequence_mean(x, mask).mean()) == 3.0


@some
@given(seeds, st.lists(st.integers(0, 2), min_size=9, max_size=9))
def test_token_mean_with_a_total_does_not_depend_on_the_split_into_microbatches(seed, part):
    x, mask, part = (
        leaf(numbers(9, 6, seed=seed)),
        numbers(9, 6, seed=seed + 1) > 0,
        torch.tensor(part),
    )
    total = mask.sum()
    for given_total in (total, int(total), float(total)):
        pieces = [token_mean(x[part == n], mask[part == n], total=given_total) for n in range(3)]
        assert_close(sum(pieces), token_mean(x, mask))
        assert_close(grad(sum(pieces), x), grad(token_mean(x, mask), x))


def test_nothing_real_reduces_to_zero():
    x, none = numbers(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert float(token_mean(x, none)) == 0.0
    assert float(token_mean(x, none, total=5)) == 0.0
    assert sequence_mean(x, none).tolist() == [0.0, 0.0]
    assert whiten(x, none).tolist() == torch.zeros(2, 3).tolist()


def test_whiten_has_mean_0_and_unbiased_variance_1_over_real_tokens():
    white = whiten(3 * numbers(4, 6) + 7, REAL)
    assert float(white[REAL].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white[REAL].var()) == pytest.approx(1, rel=1e-8)
    assert (white[~REAL] == 0).all()


def test_whiten_shifts_and_scales_and_does_nothing_else():
    x = numbers(4, 6)
    assert_close(
        whiten(x, REAL),
        torch.where(REAL, (x - x[REAL].mean()) / (x[REAL].var() + 1e-8).sqrt(), 0.0),
    )
    small = 1e-5 * x  # where the 1e-8 under the root is felt
    assert_close(
        whiten(small, REAL)[REAL],
        (small[REAL] - small[REAL].mean()) / (small[REAL].var() + 1e-8).sqrt(),
    )


def test_whiten_of_two_tokens():
    mask = torch.tensor([[True, True, False]])
    assert_close(
        whiten(f64([[4.0, 8.0, NAN]]), mask), f64([[-math.sqrt(0.5), math.sqrt(0.5), 0.0]])
    )


def test_whiten_of_one_token_only_takes_the_mean_away():
    x = leaf(f64([[4.0, 9.0, NAN]]))
    white = whiten(x, torch.tensor([[False, True, False]]))
    assert white.tolist() == [[0.0, 0.0, 0.0]]
    assert grad(white, x).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("constant", [1000.1, 123.456])
def test_whiten_of_equal_numbers_is_zero_rounding_included(constant):
    assert (whiten(torch.full((3, 7), constant), torch.ones(3, 7, dtype=torch.bool)) == 0).all()


# Variants of the comparison -----------------------------------------------------------------------------------------


@some
@given(seeds)
def test_hinge_is_its_definition_and_stops_at_a_lead_of_1(seed):
    chosen, rejected = leaf(numbers(9, seed=seed)), numbers(9, seed=seed + 1)
    loss = hinge_loss(chosen, rejected)
    assert loss.tolist() == pytest.approx(
        [max(0.0, 1 - c + r) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    )
    assert_close(grad(loss, chosen), -(chosen - rejected < 1).double())
    assert_close(hinge_loss(rejected, rejected), torch.ones(9).double())


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_conservative_is_the_cross_entropy_with_the_smoothed_label(eps):
    chosen, rejected = numbers(9), numbers(9, seed=1)
    wins = torch.sigmoid(chosen - rejected)
    expected = -(1 - eps) * wins.log() - eps * (1 - wins).log()
    assert_close(conservative_loss(chosen, rejected, label_smoothing=eps), expected)
    if eps:
        best = leaf(f64([math.log((1 - eps) / eps)]))  # the lead that the label allows
        assert_close(
            grad(conservative_loss(best, f64([0.0]), label_smoothing=eps), best), f64([0.0])
        )


@pytest.mark.parametrize("loss", [conservative_loss, robust_loss])
def test_without_smoothing_it_is_bradley_terry_and_with_it_is_not(loss):
    chosen, rejected = numbers(9), numbers(9, seed=1)
    plain = bradley_terry_loss(chosen, rejected)
    assert_close(loss(chosen, rejected, label_smoothing=0.0), plain)
    assert (loss(chosen, rejected, label_smoothing=0.1) - plain).abs().min() > 1e-3


@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_robust_is_unbiased_under_flips_of_that_probability_and_conservative_is_not(eps):
    chosen, rejected = numbers(9), numbers(9, seed=1)

    def expected(loss) -> Tensor:
        right, flipped = (
            loss(chosen, rejected, label_smoothing=eps),
            loss(rejected, chosen, label_smoothing=eps),
        )
        return (1 - eps) * right + eps * flipped

    assert_close(expected(robust_loss), bradley_terry_loss(chosen, rejected))
    assert (expected(conservative_loss) - bradley_terry_loss(chosen, rejected)).abs().max() > 0.05


def test_ipo_regresses_the_log_ratio_margin_to_one_over_two_beta():
    policy, ref, beta = leaf(numbers(2, 6)), numbers(2, 6, seed=1), 0.7
    margin = (policy[0] - ref[0]) - (policy[1] - ref[1])
    loss = ipo_loss(policy[0], policy[1], ref[0], ref[1], beta=beta)
    assert_close(loss, (margin - 1 / (2 * beta)) ** 2)
    slope = 2 * (margin.detach() - 1 / (2 * beta))
    assert_close(grad(loss, policy), torch.stack([slope, -slope]))
    assert_close(
        ipo_loss(ref[0], ref[1], ref[0], ref[1], beta=beta),
        torch.full((6,), 1 / (4 * beta**2)).double(),
    )


def test_simpo_is_bradley_terry_on_mean_logprobs_with_a_target_margin():
    chosen, rejected = numbers(6), numbers(6, seed=1)
    found = simpo_loss(chosen, rejected, beta=2.0, gamma=0.5)
    assert_close(found, -torch.log(torch.sigmoid(2.0 * chosen - 2.0 * rejected - 0.5)))


@some
@given(st.floats(-20, -1e-6), st.floats(-20, -1e-6))
def test_odds_ratio_is_its_definition(chosen, rejected):
    p, q = math.exp(chosen), math.exp(rejected)
    ratio = (p / -math.expm1(chosen)) / (q / -math.expm1(rejected))
    found = float(odds_ratio_loss(f64([chosen]), f64([rejected])))
    assert found == pytest.approx(math.log1p(1 / ratio), rel=1e-6)


def test_odds_ratio_keeps_its_digits_where_a_completion_is_almost_certain():
    found = odds_ratio_loss(torch.tensor([-1e-5]), torch.tensor([-1.0]))  # in float32
    assert float(found) == pytest.approx(
        float(odds_ratio_loss(f64([-1e-5]), f64([-1.0]))), rel=1e-4
    )


def test_odds_ratio_stays_finite_at_both_ends():
    chosen = leaf(torch.tensor([0.0, -1e-9, -1e4], dtype=torch.float32))
    loss = odds_ratio_loss(chosen, torch.tensor([-1.0, -1.0, -1.0]))
    assert loss.isfinite().all()
    assert grad(loss, chosen).isfinite().all()


def test_kto_is_its_definition_for_both_labels():
    policy, ref, kl, beta = leaf(numbers(6)), numbers(6, seed=1), leaf(f64(0.3)), 0.7
    desirable = torch.tensor([True, True, True, False, False, False])
    loss = kto_loss(policy, ref, desirable, kl * 1, beta=beta)
    lead = beta * (policy - ref - 0.3)
    expected = torch.where(desirable, 1 - torch.sigmoid(lead), 1 - torch.sigmoid(-lead))
    assert_close(loss, expected)
    slope = grad(loss, policy)
    assert (slope[:3] < 0).all()  # a good one is made likelier
    assert (slope[3:] > 0).all()
    assert torch.autograd.grad(loss.sum(), kl, allow_unused=True)[0] is None
    assert_close(kto_loss(ref, ref, desirable, f64(0.0), beta=beta), torch.full((6,), 0.5).double())


def test_centering_is_least_where_the_scores_are_each_others_negative():
    chosen, rejected = leaf(f64([1.0, -2.0])), f64([-1.0, 3.0])
    loss = centering_loss(chosen, rejected)
    assert_close(loss, f64([0.0, 1.0]))
    assert_close(grad(loss, chosen), f64([0.0, 2.0]))


# Variants of the policy gradient --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (2.0, -2.0, 4.0, 4.0),
        (5.0, -2.0, 6.0, 0.0),
        (5.0, 2.0, -2.6, 0.0),
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (0.2, 2.0, -0.4, -0.4),
    ],
)
def test_dual_clip_bounds_the_loss_of_a_bad_token_that_has_become_likely(
    ratio, advantage, loss, slope
):
    old = f64([-1.3])
    logprobs = leaf(old + math.log(ratio))
    found = clipped_surrogate_loss(logprobs, old, f64([advantage]), **EPS, clip_dual=3.0)
    assert_close(found, f64([loss]))
    assert_close(grad(found, logprobs), f64([slope]))


def gspo_by_definition(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> list[float]:
    """One loss a completion, written out."""
    result = []
    for b in range(len(mask)):
        real = mask[b].nonzero()[:, 0].tolist()
        s = math.exp(sum(float(logprobs[b, t] - old[b, t]) for t in real) / max(1, len(real)))
        a = float(advantages[b])
        result.append(-min(s * a, max(0.8, min(1.3, s)) * a))
    return result


@some
@given(seeds)
def test_gspo_is_its_definition_and_one_number_a_completion(seed):
    logprobs, old, advantages = (
        numbers(4, 6, seed=seed),
        numbers(4, 6, seed=seed + 1),
        numbers(4, seed=seed + 2),
    )
    loss = gspo_loss(logprobs, old, advantages[:, None].expand(4, 6), REAL, **EPS)
    assert loss.shape == (4, 6)
    expected = gspo_by_definition(logprobs, old, advantages, REAL)
    assert sequence_mean(loss, REAL)[:3].tolist() == pytest.approx(expected[:3])


def test_gspo_on_policy_has_the_gradient_of_the_policy_gradient_under_sequence_mean():
    logprobs, advantages = leaf(numbers(4, 6)), numbers(4, 1, seed=1).expand(4, 6)
    found = sequence_mean(gspo_loss(logprobs, logprobs.detach(), advantages, REAL, **EPS), REAL)
    expected = sequence_mean(policy_gradient_loss(logprobs, advantages), REAL)
    assert_close(grad(found, logprobs), grad(expected, logprobs))


@some
@given(seeds)
def test_cispo_weighs_by_the_limited_ratio_and_never_stops_learning(seed):
    logprobs, old, advantages = (
        leaf(numbers(40, seed=seed)),
        numbers(40, seed=seed + 1),
        numbers(40, seed=seed + 2),
    )
    loss = cispo_loss(logprobs, old, advantages, **EPS)
    weight = (logprobs - old).exp().detach().clamp(0.8, 1.3)
    assert_close(loss, -weight * advantages * logprobs)
    assert_close(grad(loss, logprobs), -weight * advantages)
    free = cispo_loss(logprobs, old, advantages, clip_low=1.0, clip_high=1e9)
    assert_close(grad(free, logprobs), -(logprobs - old).exp().detach() * advantages)
    at_one = cispo_loss(logprobs, logprobs.detach(), advantages, **EPS)
    assert_close(at_one, policy_gradient_loss(logprobs, advantages))


def test_weighted_kl_off_policy_averages_to_the_kl_and_has_its_gradient(one_token):
    logits, reference = one_token
    sampler = numbers(5, seed=14).log_softmax(-1)
    for estimator in (k1, k3):
        policy = logits.log_softmax(-1)
        found = expectation(sampler, weighted_kl(estimator(policy, reference), policy, sampler))
        assert_close(found, kl(policy, reference))
        assert_close(grad(found, logits), grad(kl(logits.log_softmax(-1), reference), logits))


def test_weighted_kl_does_not_differentiate_the_sampling_policy():
    logprobs, old = leaf(numbers(3)), leaf(numbers(3, seed=1))
    weighted_kl(k3(logprobs, numbers(3, seed=2)), logprobs, old * 1).sum().backward()
    assert old.grad is None


def test_scale_by_batch_divides_by_the_unbiased_deviation_of_all_known_rewards():
    rewards = numbers(12)
    advantages = group_advantages(rewards, 4)
    assert_close(scale_by_batch(advantages, rewards), advantages / (rewards.std() + 1e-4))
    rewards[5] = NAN
    known = rewards[~rewards.isnan()]
    assert_close(scale_by_batch(advantages, rewards), advantages / (known.std() + 1e-4))


def test_batch_baseline_with_batch_scale_is_whitening_of_the_rewards():
    rewards = 100 * numbers(12)
    found = scale_by_batch(group_advantages(rewards, 12), rewards)
    assert_close(found, (rewards - rewards.mean()) / rewards.std(), rtol=1e-5, atol=1e-5)


def test_scale_by_batch_of_equal_rewards_is_zero_rounding_included():
    rewards = torch.full((8,), 1000.1)
    assert scale_by_batch(group_advantages(rewards, 4), rewards).tolist() == [0.0] * 8


@some
@given(seeds, st.sets(st.integers(0, 4), max_size=5))
def test_leave_one_out_leaves_out_what_is_not_known(seed, unknown):
    rewards, known = numbers(5, seed=seed), [i for i in range(5) if i not in unknown]
    expected = torch.zeros(5, dtype=torch.float64)
    for i in known:
        others = [float(rewards[j]) for j in known if j != i]
        expected[i] = float(rewards[i]) - sum(others) / len(others) if others else 0.0
    rewards[list(unknown)] = NAN
    assert_close(leave_one_out_advantages(rewards, 5), expected)


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98)]
)
def test_adapted_beta_rises_above_the_target_falls_below_it_and_never_leaps(kl, factor):
    assert float(adapted_beta(0.05, f64(kl), target=6.0)) == pytest.approx(0.05 * factor)


def test_unit_variance_keeps_signs_and_zeros_and_forgets_the_unit():
    x = numbers(4, 6)
    x[0, 0] = 0.0
    found = scale_to_unit_variance(x, REAL)
    assert_close(found[REAL].var(), f64(1.0), rtol=1e-5, atol=1e-5)
    assert (found.sign() == torch.where(REAL, x, 0.0).sign()).all()
    assert_close(scale_to_unit_variance(1000 * x, REAL), found, rtol=1e-5, atol=1e-5)
    assert (
        found[REAL].mean() - x[REAL].mean() / x[REAL].std()
    ).abs() < 1e-6  # the mean shrinks with the rest


# Diagnostics --------------------------------------------------------------------------------------------------------


def test_one_advantage_for_a_completion_is_that_of_each_of_its_tokens():
    """(B,) in place of (B, T), also where B = T."""
    logprobs, old, mask, advantages = (
        -numbers(3, 3).abs(),
        -numbers(3, 3, seed=1).abs(),
        torch.ones(3, 3, dtype=torch.bool),
        numbers(3, seed=2),
    )
    each, clip = advantages[:, None].expand(3, 3), {"clip_low": 0.2, "clip_high": 0.2}
    assert_close(policy_gradient_loss(logprobs, advantages), policy_gradient_loss(logprobs, each))
    for loss in (clipped_surrogate_loss, is_clipped, cispo_loss):
        assert_close(loss(logprobs, old, advantages, **clip), loss(logprobs, old, each, **clip))
    assert_close(
        gspo_loss(logprobs, old, advantages, mask, **clip),
        gspo_loss(logprobs, old, each, mask, **clip),
    )


def test_explained_variance_is_1_of_a_perfect_critic_0_of_a_constant_and_less_of_a_bad_one():
    returns = numbers(4, 6)
    assert_close(
        explained_variance(returns + 3, returns, REAL), f64(1.0)
    )  # a shift is not variance
    assert_close(explained_variance(torch.full_like(returns, 2.0), returns, REAL), f64(0.0))
    assert_close(explained_variance(-returns, returns, REAL), f64(-3.0))
    assert_close(explained_variance(returns / 2, returns, REAL), f64(0.75))


@pytest.mark.parametrize(
    "constant",
    [
        0.5,
        0.1,
    ],
)
def test_explained_variance_is_0_where_returns_do_not_vary(constant):
    returns = torch.full((3, 7), constant)
    assert (
        float(explained_variance(torch.rand(3, 7), returns, torch.ones(3, 7, dtype=torch.bool)))
        == 0.0
    )


# Padding ------------------------------------------------------------------------------------------------------------

REDUCED = {  # everything that takes a mask
    "token_mean": token_mean,
    "token_mean with a total": lambda x, mask: token_mean(x, mask, total=11),
    "sequence_sum": sequence_sum,
    "sequence_mean": sequence_mean,
    "whiten": whiten,
    "scale_to_unit_variance": scale_to_unit_variance,
    "gae of rewards": lambda x, mask: torch.stack(
        gae(x, numbers(4, 6, seed=1), mask, gamma=0.9, lam=0.8)
    ),
    "gae of values": lambda x, mask: torch.stack(
        gae(numbers(4, 6, seed=1), x, mask, gamma=0.9, lam=0.8)
    ),
    "explained_variance of values": lambda x, mask: explained_variance(
        x, numbers(4, 6, seed=1), mask
    ),
    "explained_variance of returns": lambda x, mask: explained_variance(
        numbers(4, 6, seed=1), x, mask
    ),
}


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e9])
@pytest.mark.parametrize("name", REDUCED)
def test_no_value_and_no_gradient_depends_on_masked_positions(name, garbage):
    clean = leaf(numbers(4, 6))
    dirty = leaf(clean.masked_fill(~REAL, garbage))
    results = [REDUCED[name](x, REAL) for x in (clean, dirty)]
    assert_close(*results, **EXACT)
    upstream = numbers(*results[0].shape, seed=2)
    gradients = [
        grad(upstream * result, x) for x, result in zip((clean, dirty), results, strict=True)
    ]
    assert_close(*gradients, **EXACT)
    assert (gradients[0][~REAL] == 0).all()
    assert (gradients[0][REAL] != 0).any()


LOSSES = {  # (B, T) losses and their arguments; the first is the one that learns
    "nll": (nll_loss, 1),
    "policy gradient": (policy_gradient_loss, 2),
    "clipped surrogate": (lambda *x: clipped_surrogate_loss(*x, **EPS), 3),
    "clipped value": (lambda *x: clipped_value_loss(*x, clip=0.2), 3),
    "k1": (k1, 2),
    "k2": (k2, 2),
    "k3": (k3, 2),
}


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, -7.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_reduced_loss_and_what_real_tokens_learn_do_not_depend_on_masked_positions(name, garbage):
    loss, count = LOSSES[name]
    clean = [leaf(numbers(4, 6, seed=n)) for n in range(count)]
    dirty = [leaf(x.masked_fill(~REAL, garbage)) for x in clean]
    losses = [token_mean(loss(*arguments), REAL) for arguments in (clean, dirty)]
    assert_close(*losses, **EXACT)
    gradients = [grad(value, x[0]) for value, x in zip(losses, (clean, dirty), strict=True)]
    assert_close(gradients[0][REAL], gradients[1][REAL], **EXACT)
    if math.isfinite(garbage):
        assert (gradients[1][~REAL] == 0).all()


# The contract -------------------------------------------------------------------------------------------------------

SIGNATURES = """
nll_loss(logprobs)
bradley_terry_loss(chosen, rejected, *, margin=0.0)
implicit_reward(logprob, ref_logprob, *, beta)
dpo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta)
ranked_pairs(rewards, group_size)
pairwise_group_loss(logprob, ref_logprob, rewards, group_size, *, beta)
policy_gradient_loss(logprobs, advantages)
clipped_surrogate_loss(logprobs, old_logprobs, advantages, *, clip_low, clip_high, clip_dual=inf)
gspo_loss(logprobs, old_logprobs, advantages, mask, *, clip_low, clip_high)
cispo_loss(logprobs, old_logprobs, advantages, *, clip_low, clip_high)
truncated_importance_weights(logprobs, sampler_logprobs, *, cap)
weighted_kl(kl, logprobs, old_logprobs)
hinge_loss(chosen, rejected)
centering_loss(chosen, rejected)
conservative_loss(chosen, rejected, *, label_smoothing)
robust_loss(chosen, rejected, *, label_smoothing)
ipo_loss(chosen, rejected, ref_chosen, ref_rejected, *, beta)
simpo_loss(chosen, rejected, *, beta, gamma)
odds_ratio_loss(chosen, rejected)
kto_loss(logprob, ref_logprob, desirable, kl, *, beta)
scale_by_batch(advantages, rewards)
adapted_beta(beta, kl, *, target, rate=0.1)
scale_to_unit_variance(x, mask)
clipped_value_loss(values, old_values, returns, *, clip)
group_advantages(rewards, group_size, *, normalize=False)
leave_one_out_advantages(rewards, group_size)
gae(rewards, values, mask, *, gamma, lam)
k1(logprobs, ref_logprobs)
k2(logprobs, ref_logprobs)
k3(logprobs, ref_logprobs)
token_mean(x, mask, *, total=None)
sequence_sum(x, mask)
sequence_mean(x, mask)
whiten(x, mask)
is_clipped(logprobs, old_logprobs, advantages, *, clip_low, clip_high)
explained_variance(values, returns, mask)
""".strip().splitlines()
PUBLIC = {
    name: function
    for module in pkgutil.iter_modules(trivet.optimization.__path__, "trivet.optimization.")
    for name, function in vars(importlib.import_module(module.name)).items()
    if inspect.isfunction(function)
    and function.__module__ == module.name
    and not name.startswith("_")
}
B, P, G, T = 6, 2, 3, 4
GIVEN = {
    "beta": 0.1,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "clip": 0.2,
    "gamma": 0.9,
    "lam": 0.8,
    "group_size": G,
}
GIVEN |= {"label_smoothing": 0.1, "target": 6.0}
PER_COMPLETION = (
    *(
        "group_",
        "leave_",
        "scale_by",
        "ranked_",
        "pairwise_",
        "bradley_",
        "centering_",
        "implicit_",
        "dpo_",
        "hinge_",
        "conservative_",
    ),
    *("robust_", "ipo_", "simpo_", "odds_", "kto_"),
)


def call(name: str, device: str = "cpu") -> Tensor | tuple[Tensor, ...]:
    """The function on ones of the shapes that its arguments' names stand for."""
    shape = (B,) if name.startswith(PER_COMPLETION) else (B, T)
    known = {
        **GIVEN,
        **{key: torch.ones(shape, device=device).bool() for key in ("mask", "desirable")},
    }
    if name in ("kto_loss", "adapted_beta"):
        known["kl"] = torch.ones((), device=device)
    arguments = {
        key: known.get(key, torch.ones(shape, device=device))
        for key, parameter in inspect.signature(PUBLIC[name]).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }
    return PUBLIC[name](**arguments)


def test_the_public_functions_and_their_signatures_are_those_of_the_design():
    def plain(name: str) -> str:
        signature = inspect.signature(PUBLIC[name])
        parameters = [
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ]
        return name + str(
            signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
        )

    assert sorted(map(plain, PUBLIC)) == sorted(SIGNATURES)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_docstring_tells_the_shape_that_comes_out(name):
    stated = re.findall(
        r"(?:[Rr]eturns|->)[^()]*?(?:\(([BPGT, ]+)\)|(scalar))", PUBLIC[name].__doc__ or ""
    )
    assert stated, "no shape after 'returns' or '->'"
    letters = [letter for letter in stated[-1][0].replace(" ", "").split(",") if letter]
    results = call(name)
    for result in results if isinstance(results, tuple) else (results,):
        assert result.shape == tuple({"B": B, "P": P, "G": G, "T": T}[letter] for letter in letters)


@pytest.mark.parametrize("name", PUBLIC)
def test_nothing_waits_for_a_device(name):
    results = call(
        name, device="meta"
    )  # where there are shapes and no numbers, so reading one is an error
    for result in results if isinstance(results, tuple) else (results,):
        assert result.is_meta
