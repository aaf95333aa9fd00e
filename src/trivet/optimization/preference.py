"""Losses for learning from comparisons: Bradley-Terry on scores, on implicit rewards, and on every
pair of a ranked group.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor | float = 0.0) -> Tensor:
    """Negative log-likelihood that the chosen completion wins.

        -log sigmoid(r(y_w) - r(y_l) - margin)

    chosen, rejected: (B,) scores r of the preferred completion and the other. margin: how far apart
    they should be, a number or (B,). Returns (B,). Equal scores give log 2. Source: Bradley & Terry
    1952; Ouyang et al. 2022, eq. 1; the margin from Llama 2 (Touvron et al. 2023), eq. 2.
    """
    return -logsigmoid(chosen - rejected - margin)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Fix what Bradley-Terry leaves open, the zero of the scores: (r(y_w) + r(y_l))^2.

    chosen, rejected: (B,) scores. Returns (B,). Source: Eisenstein et al. 2023, section 2.
    """
    return (chosen + rejected).square()


def implicit_reward(logprob: Tensor, ref_logprob: Tensor, *, beta: float) -> Tensor:
    """The reward that a policy implies, up to a term that depends only on the prompt.

        r(x, y) = beta (log pi(y|x) - log pi_ref(y|x))

    logprob, ref_logprob: (B,) log-probabilities of whole completions. beta: strength of the tie to
    the reference, per nat. Returns (B,); 0 where policy and reference agree. Source: Rafailov et
    al. 2023, eq. 5.
    """
    return beta * (logprob - ref_logprob)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """Direct preference optimization: Bradley-Terry on the implicit rewards.

        -log sigmoid(beta [(log pi(y_w) - log pi(y_l)) - (log pi_ref(y_w) - log pi_ref(y_l))])

    chosen, rejected, ref_chosen, ref_rejected: (B,) log-probabilities of whole completions under
    the policy and under the reference. beta: strength of the tie to the reference, per nat. Returns
    (B,). At pi = pi_ref it is log 2. Source: Rafailov et al. 2023, eq. 7.
    """
    return bradley_terry_loss(
        implicit_reward(chosen, ref_chosen, beta=beta),
        implicit_reward(rejected, ref_rejected, beta=beta),
    )


def ranked_pairs(rewards: Tensor, group_size: int) -> Tensor:
    """Which completion beats which inside each group: wins[p, i, j] = r(y_i) > r(y_j).

    rewards: (B,), NaN where a completion has no reward. Ties and NaN win nothing. Returns (P, G, G)
    bool.
    """
    grouped = rewards.view(-1, group_size)  # (P, G)
    return grouped[:, :, None] > grouped[:, None, :]


def pairwise_group_loss(
    logprob: Tensor, ref_logprob: Tensor, rewards: Tensor, group_size: int, *, beta: float
) -> Tensor:
    """Bradley-Terry on implicit rewards, averaged over every ranked pair (i beats j) of a group.

        -1/|pairs| sum_{(i,j)} log sigmoid(beta (h_i - h_j)),  h = log pi - log pi_ref

    logprob, ref_logprob: (B,) log-probabilities of whole completions. rewards: (B,), used only as a
    ranking. group_size: G; rows p G ... p G + G - 1 are one group. Returns (P,), one mean per
    group. Ties form no pair; a group without pairs gives 0 and no gradient. With G = 2 it is
    dpo_loss on the sampled pair.
    """
    implicit = implicit_reward(logprob, ref_logprob, beta=beta).view(-1, group_size)  # (P, G)
    pairs = ranked_pairs(rewards, group_size)  # (P, G, G)
    losses = bradley_terry_loss(implicit[:, :, None], implicit[:, None, :])  # (P, G, G)
    return torch.where(pairs, losses, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
