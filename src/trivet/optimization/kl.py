"""Estimators of KL(pi || pi_ref) from tokens sampled by pi (Schulman 2020, "Approximating KL divergence").

With d = log pi - log pi_ref at the sampled token:

         value                 in expectation      gradient when used as a loss term, on-policy
    k1   d                     KL                  zero in expectation: it teaches nothing
    k2   d^2 / 2               close to KL         the gradient of KL(pi || pi_ref)  <- use this one in a loss
    k3   exp(-d) - 1 + d       KL, never negative  the gradient of KL(pi_ref || pi), the other direction

Of a text, summed over its tokens, k2 gives the gradient of the KL at each visited state with the visits held fixed; what an
early token does to later states is in k1 charged in the reward, where nothing is differentiated. All shapes are (B, T).
"""

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log pi - log pi_ref. Unbiased, of either sign, large variance. (B, T) each; returns (B, T)."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = (log pi - log pi_ref)^2 / 2. Agrees with the KL to second order; its gradient d * grad log pi is that of the KL.

    (B, T) each; returns (B, T).
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = pi_ref / pi - 1 - log(pi_ref / pi). Unbiased, never negative. (B, T) each; returns (B, T)."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def adapted_beta(beta: Tensor | float, kl: Tensor, *, target: float, rate: float = 0.1) -> Tensor:
    """The weight of the KL for the next step, so that the KL is led to a target.

        beta (1 + rate clip((kl - target) / target, -0.2, 0.2))

    beta: the weight now. kl: scalar, and target, in nats per completion. Returns a scalar. At the target it stays; one step
    never changes it by more than a fifth of rate. Source: Ziegler et al. 2019, section 2.2.
    """
    return beta * (1 + rate * ((kl - target) / target).clamp(-0.2, 0.2))
