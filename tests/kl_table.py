"""Which estimator of KL(pi || pi_ref), put where, teaches the gradient of the KL: exact, by enumeration of all texts.

    python tests/kl_table.py

prints the table of docs/kl.md. A vocabulary of 3, texts of one token and of two; policy, reference and (off-policy) the policy
that sampled have random logits, in float64. Expectations are sums over all texts; sampling itself is not differentiated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trivet.optimization import (
    clipped_surrogate_loss,
    k1,
    k2,
    k3,
    policy_gradient_loss,
    weighted_kl,
)

VOCABULARY = 3


def logits(seed: int) -> Tensor:
    """(4, 3): the first row for the first token, row 1 + a for the second one after a."""
    return torch.randn(
        1 + VOCABULARY,
        VOCABULARY,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )


POLICY, REFERENCE = logits(1), 1.5 * logits(4)
SAMPLER = POLICY + 0.2 * logits(3)  # off-policy: some steps behind


def texts(table: Tensor, length: int) -> Tensor:
    """Log-probability of every token of every text of that length, (3^length, length)."""
    table = table.log_softmax(-1)
    if length == 1:
        return table[0][:, None]
    return torch.stack(
        [
            torch.stack([table[0, a], table[1 + a, b]])
            for a in range(VOCABULARY)
            for b in range(VOCABULARY)
        ]
    )


def gradient(objective: Callable[[Tensor], Tensor]) -> Tensor:
    parameters = POLICY.clone().requires_grad_(True)
    return torch.autograd.grad(objective(parameters), parameters, allow_unused=True)[0]


def kl_gradient(length: int) -> Tensor:
    """The gradient of KL(pi || pi_ref) over whole texts."""

    def kl(parameters: Tensor) -> Tensor:
        policy, reference = texts(parameters, length).sum(1), texts(REFERENCE, length).sum(1)
        return (policy.exp() * (policy - reference)).sum()

    return gradient(kl)


def in_loss(
    estimator: Callable[[Tensor, Tensor, Tensor], Tensor], length: int, sampler: Tensor
) -> Tensor:
    """Expected gradient of the estimator as a term of the loss, summed over the tokens of a text."""
    old, reference = texts(sampler, length), texts(REFERENCE, length)
    chance = old.sum(1).exp()  # of each text
    return gradient(
        lambda parameters: chance @ estimator(texts(parameters, length), old, reference).sum(1)
    )


def in_reward(
    estimator: Callable[[Tensor, Tensor], Tensor], length: int, sampler: Tensor
) -> Tensor:
    """Expected gradient where the estimator, of the policy that sampled, is charged per token in the reward."""
    old, reference = texts(sampler, length), texts(REFERENCE, length)
    chance, charge = old.sum(1).exp(), estimator(old, reference)
    to_come = charge.flip(1).cumsum(1).flip(1)  # what each token is held responsible for

    def objective(parameters: Tensor) -> Tensor:
        logprobs = texts(parameters, length)
        if sampler is POLICY:
            return chance @ policy_gradient_loss(logprobs, -to_come).sum(1)
        return chance @ clipped_surrogate_loss(
            logprobs, old, -to_come, clip_low=1.0, clip_high=torch.inf
        ).sum(1)

    return gradient(objective)


LOSSES = {
    "k1": lambda new, old, ref: k1(new, ref),
    "k2": lambda new, old, ref: k2(new, ref),
    "k3": lambda new, old, ref: k3(new, ref),
    "ratio x k1": lambda new, old, ref: weighted_kl(k1(new, ref), new, old),
    "ratio x k3": lambda new, old, ref: weighted_kl(k3(new, ref), new, old),
}


def miss(found: Tensor, length: int) -> float:
    """How far from the gradient of the KL, relative to its norm. 1 is what a gradient of zero misses."""
    wanted = kl_gradient(length)
    return float((found - wanted).norm() / wanted.norm())


def table() -> dict[tuple[str, str], list[float]]:
    """(where, estimator) -> miss on-policy of one token, of two; off-policy of one, of two."""
    rows: dict[tuple[str, str], list[float]] = {}
    cases = [(length, sampler) for sampler in (POLICY, SAMPLER) for length in (1, 2)]
    for name, estimator in LOSSES.items():
        rows["loss", name] = [
            miss(in_loss(estimator, length, sampler), length) for length, sampler in cases
        ]
    for name, estimator in (("k1", k1), ("k2", k2), ("k3", k3)):
        rows["reward", name] = [
            miss(in_reward(estimator, length, sampler), length) for length, sampler in cases
        ]
    return rows


def lines() -> list[str]:
    """The table as Markdown."""
    result = [
        "| where | estimator | on-policy, one token | two tokens | off-policy, one token | two tokens |",
        "|---|---|---|---|---|---|",
    ]
    for (where, name), row in table().items():
        cells = ["**exact**" if x < 1e-12 else f"{100 * x:.0f} %" for x in row]
        result.append(f"| in the {where} | {name} | {' | '.join(cells)} |")
    return result


if __name__ == "__main__":
    print("\n".join(lines()))
