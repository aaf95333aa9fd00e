"""Other uses of the ratio pi / pi_old: one ratio per completion (GSPO), as a weight (CISPO), on the
KL term.
"""

from torch import Tensor

from trivet.optimization.policy import clipped_surrogate_loss, policy_gradient_loss
from trivet.optimization.reduce import sequence_mean


def gspo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """The clipped surrogate with one ratio for all tokens of a completion: the geometric mean of
    their ratios.

        -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),  s = (pi(y|x) / pi_old(y|x))^(1/|y|)

    logprobs, old_logprobs, advantages, mask: (B, T), advantages also (B,); the ratio is over the
    tokens in mask. Returns (B, T), equal across a row's columns where its advantages are; take
    sequence_mean of it. At s = 1 the gradient is that of policy_gradient_loss under sequence_mean.
    Source: GSPO (Zheng et al. 2025), eq. 5 and 7.
    """
    mean, old_mean = (
        sequence_mean(x, mask)[:, None].expand_as(x) for x in (logprobs, old_logprobs)
    )
    return clipped_surrogate_loss(
        mean, old_mean, advantages, clip_low=clip_low, clip_high=clip_high
    )


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped importance sampling: the ratio is a clipped weight without gradient, so every token
    keeps its gradient.

        -clip(rho, 1 - clip_low, 1 + clip_high) A log pi,  rho = pi / pi_old not differentiated

    (B, T) each, advantages also (B,); returns (B, T). clip_low >= 1 sets no lower limit, as in the
    paper. At rho = 1 it is policy_gradient_loss. Source: CISPO in MiniMax-M1 (2025).
    """
    weight = (logprobs - old_logprobs).detach().exp().clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    return weight * policy_gradient_loss(logprobs, advantages)


def weighted_kl(kl: Tensor, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """A KL estimate times the ratio, which is differentiated: rho * kl.

    kl: (B, T), k1 or k3 of logprobs. logprobs, old_logprobs: (B, T). Returns (B, T). Its gradient
    is, in expectation over pi_old, that of KL(pi || pi_ref) at each state, on- or off-policy;
    without the ratio, k3 has a different gradient and k1 none. Source: DeepSeek-V3.2 (2025).
    """
    return (logprobs - old_logprobs.detach()).exp() * kl
