"""Adaptive control of the KL weight from step to step."""

from torch import Tensor


def adapted_beta(beta: Tensor | float, kl: Tensor, *, target: float, rate: float = 0.1) -> Tensor:
    """Return the KL weight for the next step, which steers the KL toward a target.

        beta (1 + rate clip((kl - target) / target, -0.2, 0.2))

    beta: the current weight. kl: scalar, in nats per completion, as is target. Returns a scalar. At
    the target the weight stays; one step never changes it by more than a fifth of rate. Source:
    Ziegler et al. 2019, section 2.2.
    """
    return beta * (1 + rate * ((kl - target) / target).clamp(-0.2, 0.2))
