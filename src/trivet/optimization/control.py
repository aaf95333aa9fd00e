"""The weight of the KL as it goes from step to step."""

from torch import Tensor


def adapted_beta(beta: Tensor | float, kl: Tensor, *, target: float, rate: float = 0.1) -> Tensor:
    """The weight of the KL for the next step, so that the KL is led to a target.

        beta (1 + rate clip((kl - target) / target, -0.2, 0.2))

    beta: the weight now. kl: scalar, and target, in nats per completion. Returns a scalar. At the target it stays; one step
    never changes it by more than a fifth of rate. Source: Ziegler et al. 2019, section 2.2.
    """
    return beta * (1 + rate * ((kl - target) / target).clamp(-0.2, 0.2))
