"""From logits to a token: the cuts against brute force, the draw against its distribution function."""

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from trivet.generation import sampling
from trivet.generation.sampling import warp

torch.set_num_threads(1)
some = settings(max_examples=100, deadline=None, derandomize=True, database=None)
INF = math.inf
logit_rows = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=9, unique=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masses(*numbers: float) -> Tensor:
    """Logits of one row with these probabilities."""
    return torch.tensor([numbers]).log()


def kept(logprobs: Tensor) -> list[int]:
    return logprobs[0].isfinite().nonzero()[:, 0].tolist()


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The cut distribution, one token at a time: temperature, then the top_k, then top_p of what is left."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    total, nucleus, held = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if held >= top_p:
            break
        nucleus.append(i)
        held += weights[i] / total
        assume(abs(held - top_p) > 1e-4)  # a tie to rounding may fall on either side
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


# The distribution that is sampled -----------------------------------------------------------------------------------


@some
@given(logit_rows, st.floats(0.3, 3), st.integers(0, 10), st.floats(0.05, 0.99) | st.just(2.0))
def test_warp_is_temperature_then_top_k_then_top_p(logits, temperature, top_k, top_p):
    found = warp(torch.tensor([logits]), temperature=temperature, top_k=top_k, top_p=top_p)
    ordered = sorted(logits)
    assume(all(b - a > 1e-3 for a, b in itertools.pairwise(ordered)))  # a tie has no one answer
    assert_close(
        found.exp(),
        torch.tensor([brute_force(logits, temperature, top_k, top_p)]),
        rtol=1e-4,
        atol=1e-6,
    )


def test_with_no_cut_it_is_the_log_softmax_of_logits_over_temperature():
    logits = torch.randn(3, 7, generator=generator())
    assert_close(warp(logits, temperature=0.7), (logits / 0.7).log_softmax(-1))


def test_temperature_goes_from_greedy_to_uniform():
    logits = masses(0.2, 0.5, 0.3)
    assert_close(warp(logits, temperature=1e-3).exp(), torch.tensor([[0.0, 1.0, 0.0]]))
    assert_close(warp(logits, temperature=1e6).exp(), torch.full((1, 3), 1 / 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_temperature_zero_leaves_the_most_likely_token_alone(options):
    logits = torch.tensor([[1.0, 4.0, 3.0], [1e30, -1e30, 0.0], [2.0, 2.0, 2.0]])
    found = warp(logits, temperature=0.0, **options)
    assert found[:2].tolist() == [[-INF, 0.0, -INF], [0.0, -INF, -INF]]
    assert sorted(found[2].tolist()) == [-INF, -INF, 0.0]


@pytest.mark.parametrize(
    ("top_k", "tokens"),
    [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (99, [0, 1, 2, 3])],
)
def test_top_k_keeps_k(top_k, tokens):
    found = warp(masses(0.1, 0.4, 0.2, 0.3), temperature=1.0, top_k=top_k)
    assert kept(found) == tokens
    assert float(found.exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 2]),
        (0.74, [1, 2]),
        (0.76, [1, 2, 3]),
        (0.87, [1, 2, 3]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_holds_p_of_the_mass(top_p, tokens):
    found = warp(masses(0.0625, 0.5, 0.25, 0.125, 0.0625), temperature=1.0, top_p=top_p)
    assert kept(found) == tokens
    assert float(found.exp().sum()) == pytest.approx(1)


def test_a_set_that_holds_exactly_p_of_the_mass_is_enough():
    assert len(kept(warp(torch.zeros(1, 4), temperature=1.0, top_p=0.5))) == 2


def test_top_p_counts_the_mass_that_top_k_left():
    left = warp(
        masses(0.4, 0.3, 0.2, 0.1), temperature=1.0, top_k=2, top_p=0.5
    )  # 4/7 and 3/7 are left
    assert kept(left) == [0]


def test_rows_are_cut_each_by_itself():
    logits = torch.randn(5, 8, generator=generator())
    options = {"temperature": 0.8, "top_k": 5, "top_p": 0.7}
    together, alone = (
        warp(logits, **options),
        torch.cat([warp(row[None], **options) for row in logits]),
    )
    assert_close(together, alone)
    assert len({tuple(row) for row in together.isfinite().tolist()}) > 1


def test_tokens_ruled_out_beforehand_stay_out():
    logits = torch.tensor([[-INF, 1.0, -INF, 0.5]])
    for options in ({}, {"top_k": 3}, {"top_p": 0.99}, {"top_k": 3, "top_p": 0.99}):
        assert kept(warp(logits, temperature=0.5, **options)) == [1, 3]


def test_half_precision_logits_are_normalized_in_float32():
    logits = torch.randn(2, 500, generator=generator()).bfloat16()
    found = warp(logits, temperature=0.7, top_k=400, top_p=0.9)
    assert found.dtype == torch.float32
    assert_close(found.exp().sum(-1), torch.ones(2))


def test_top_p_zero_keeps_the_most_likely_token():
    assert kept(warp(masses(0.2, 0.5, 0.3), temperature=1.0, top_p=0.0)) == [1]


# The draw -----------------------------------------------------------------------------------------------------------


def draw(logits, generator):
    """With the levels that the engine would draw."""
    return sampling.draw(logits, torch.rand((len(logits), 1), generator=generator))


@pytest.mark.parametrize("shape", [(200, 5), (50, 3000)])
def test_draw_inverts_the_distribution_function(shape):
    logprobs = torch.randn(shape, generator=generator()).log_softmax(-1)
    tokens, _ = draw(logprobs, generator(1))
    levels = torch.rand(shape[0], 1, generator=generator(1)).double()
    below = logprobs.double().exp().cumsum(-1) / logprobs.double().exp().sum(-1, keepdim=True)
    assert tokens.tolist() == [
        sum(c <= u for c in row) for row, (u,) in zip(below.tolist(), levels.tolist(), strict=True)
    ]


def test_draw_has_the_frequencies_of_its_distribution():
    mass, rows = torch.tensor([0.5, 0.0, 0.25, 0.01, 0.24]), 100_000
    tokens, _ = draw(mass.log().expand(rows, 5), generator())
    counts, expected = torch.bincount(tokens, minlength=5), mass * rows
    assert counts[1] == 0
    chi_square = ((counts - expected).square() / expected)[mass > 0].sum()
    assert float(chi_square) < 16.3  # three degrees of freedom: one in a thousand is above


def test_draw_gives_the_logprob_of_the_token_it_drew():
    logprobs = warp(torch.randn(50, 9, generator=generator()), temperature=0.7, top_k=4)
    tokens, chosen = draw(logprobs, generator())
    assert tokens.shape == chosen.shape == (50,)
    assert_close(chosen, logprobs.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    assert len(set(tokens.tolist())) > 1


def test_draw_repeats_with_its_generator_and_with_nothing_else():
    logprobs = torch.zeros(20, 50).log_softmax(-1)
    first, second = generator(3), generator(3)
    once, again = draw(logprobs, first)[0], draw(logprobs, second)[0]
    assert once.tolist() == again.tolist()
    assert draw(logprobs, first)[0].tolist() != once.tolist()  # it goes on from where it was
    assert draw(logprobs, generator(4))[0].tolist() != once.tolist()


extreme = st.lists(
    st.sampled_from([-INF, -1e30, -200.0, -104.0, -88.0, -17.0, 0.0, 1e-7, 3.0, 1e30]),
    min_size=1,
    max_size=12,
)


@some
@given(
    st.lists(extreme, min_size=1, max_size=4),
    st.sampled_from([0.0, 2**-24, 0.5, 1 - 2**-24]),
    st.floats(0.1, 2),
)
def test_draw_never_returns_a_token_of_no_mass_not_even_at_the_ends_of_the_unit_interval(
    rows, level, temperature
):
    for row in rows:
        assume(max(row) > -INF)
        logprobs = warp(torch.tensor([row]), temperature=temperature)
        with patch("torch.rand", lambda shape, **_: torch.full(shape, level)):
            tokens, chosen = draw(logprobs, generator())
        assert 0 <= int(tokens[0]) < len(row)
        assert float(chosen[0].exp()) > 0


@some
@given(st.integers(0, 10_000), st.floats(0.05, 3), st.integers(0, 40), st.floats(0.1, 1.0))
def test_draw_from_a_cut_distribution_stays_inside_the_cut(seed, temperature, top_k, top_p):
    logits = 10 * torch.randn(64, 40, generator=generator(seed))
    tokens, chosen = draw(
        warp(logits, temperature=temperature, top_k=top_k, top_p=top_p), generator(seed)
    )
    assert chosen.isfinite().all()
    rank = (logits > logits.gather(1, tokens[:, None])).sum(1)
    assert int(rank.max()) < (top_k or 40)


@pytest.mark.parametrize(("level", "token"), [(0.0, 1), (1 - 2**-24, 3999)])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_with_mass(level, token):
    for seed in range(20):
        logprobs = torch.randn(8, 4001, generator=generator(seed)).log_softmax(-1)
        logprobs[:, [0, -1]] = -INF
        with patch("torch.rand", lambda shape, **_: torch.full(shape, level)):
            assert draw(logprobs, generator())[0].tolist() == [token] * 8


@pytest.mark.parametrize(
    "cut", [{}, {"temperature": 0.7}, {"top_k": 3}, {"temperature": 0.5, "top_p": 0.9}]
)
def test_a_few_rows_at_a_time_are_all_rows(monkeypatch, cut):
    monkeypatch.setitem(sampling.CELLS, "cpu", 3 * 7)
    logits, levels = (
        torch.randn(10, 7, generator=generator()),
        torch.rand(10, 1, generator=generator(1)),
    )
    cut = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | cut
    logprobs = warp(logits, **cut)
    tokens, own = sampling.sample(logits, levels, **cut)
    assert tokens.tolist() == sampling.draw(logprobs, levels)[0].tolist()
    assert_close(own, logprobs.gather(-1, tokens[:, None])[:, 0])
