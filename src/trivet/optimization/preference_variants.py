"""Other losses for learning from comparisons: hinge, smoothed and robust labels, IPO, SimPO, ORPO;
and KTO, from single labels.
"""

import torch
from torch import Tensor

from trivet.optimization.preference import bradley_terry_loss, implicit_reward


def hinge_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """A hinge in place of Bradley-Terry's log-sigmoid: no gradient once the winner leads by 1.

        max(0, 1 - (r(y_w) - r(y_l)))

    chosen, rejected: (B,) rewards, for SLiC implicit ones. Returns (B,). Equal rewards give 1.
    Source: SLiC-HF (Zhao et al. 2023); on implicit rewards: RSO (Liu et al. 2024).
    """
    return (1 - (chosen - rejected)).relu()


def conservative_loss(chosen: Tensor, rejected: Tensor, *, label_smoothing: float) -> Tensor:
    """Bradley-Terry with a smoothed label, for when a share of the labels may be flipped:
    cross-entropy against that label.

        -(1 - eps) log sigmoid(d) - eps log sigmoid(-d),  d = r(y_w) - r(y_l)

    chosen, rejected: (B,) rewards. label_smoothing: eps in [0, 0.5). Returns (B,). Minimal at d =
    log((1 - eps) / eps); eps = 0 is bradley_terry_loss. Source: conservative DPO (Mitchell 2023, "A
    note on DPO with noisy preferences").
    """
    return (1 - label_smoothing) * bradley_terry_loss(
        chosen, rejected
    ) + label_smoothing * bradley_terry_loss(rejected, chosen)


def robust_loss(chosen: Tensor, rejected: Tensor, *, label_smoothing: float) -> Tensor:
    """Bradley-Terry corrected to be unbiased when labels are flipped with a known probability.

        (-(1 - eps) log sigmoid(d) + eps log sigmoid(-d)) / (1 - 2 eps),  d = r(y_w) - r(y_l)

    chosen, rejected: (B,) rewards. label_smoothing: eps in [0, 0.5), the probability of a flip; in
    expectation over flips the result equals bradley_terry_loss of the true labels. Returns (B,).
    Source: robust DPO (Chowdhury et al. 2024).
    """
    correct, flipped = bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen)
    return ((1 - label_smoothing) * correct - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """Identity preference optimization: regress the log-ratio margin to 1 / (2 beta) instead of
    pushing it to infinity.

        ([(log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))] - 1 / (2 beta))^2

    chosen, rejected, ref_chosen, ref_rejected: (B,) log-probabilities of whole completions, or
    their means over tokens. beta: the paper's tau, per nat. Returns (B,). At pi = pi_ref it is 1 /
    (4 beta^2). Source: Azar et al. 2023, eq. 17.
    """
    return ((chosen - rejected) - (ref_chosen - ref_rejected) - 1 / (2 * beta)).square()


def simpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Simple preference optimization: Bradley-Terry on mean log-probabilities, without a reference.

        -log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)

    chosen, rejected: (B,) mean log-probability per token of each completion. gamma: target margin
    of the rewards. Returns (B,). Source: Meng et al. 2024, eq. 6.
    """
    return bradley_terry_loss(beta * chosen, beta * rejected, margin=gamma)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPO's comparison: the odds of the chosen completion against those of the rejected one.

        -log sigmoid(log odds(y_w) - log odds(y_l)),  odds = p / (1 - p),  p = exp(log pi(y) / |y|)

    chosen, rejected: (B,) mean log-probability per token of each completion, below 0. Returns (B,).
    It is added to the supervised loss of the chosen completion. Source: Hong et al. 2024, eq. 4 and
    7.
    """
    return bradley_terry_loss(chosen - _log1mexp(chosen), rejected - _log1mexp(rejected))


def kto_loss(
    logprob: Tensor, ref_logprob: Tensor, desirable: Tensor, kl: Tensor, *, beta: float
) -> Tensor:
    """Kahneman-Tversky optimization: each completion is judged good or bad on its own, relative to
    a reference point.

        1 - sigmoid(beta (log pi/pi_ref - z))  where desirable
        1 - sigmoid(beta (z - log pi/pi_ref))  elsewhere

    logprob, ref_logprob: (B,) log-probabilities of whole completions. desirable: (B,) bool. kl:
    scalar z, an estimate of KL(pi || pi_ref) from mismatched completions, at least 0, without
    gradient. Returns (B,). Source: Ethayarajh et al. 2024, eq. 7.
    """
    lead = implicit_reward(logprob, ref_logprob + kl.detach(), beta=beta)
    return torch.where(desirable, -lead, lead).sigmoid()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without losing precision at either end; at 0, its value just below
    0.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.693, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))
