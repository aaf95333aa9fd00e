"""Estimators of KL(pi || pi_ref) from tokens sampled by pi (Schulman 2020, "Approximating KL
divergence").

With d = log pi - log pi_ref at the sampled token. docs/kl.md shows which of them has the gradient
of the KL, in the loss and in the reward (k2 in a loss, k1 in the reward). All shapes are (B, T).
"""

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log pi - log pi_ref. Unbiased, of either sign, large variance.

    (B, T) each; returns (B, T).
    """
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = (log pi - log pi_ref)^2 / 2. Agrees with the KL to second order; its gradient d * grad
    log pi is that of the KL.

    (B, T) each; returns (B, T).
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = pi_ref / pi - 1 - log(pi_ref / pi). Unbiased, never negative.

    (B, T) each; returns (B, T).
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio
