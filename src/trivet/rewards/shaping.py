"""Turn one score per completion into one reward per token."""

import torch
from torch import Tensor


def kl_charged_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: Tensor | float) -> Tensor:
    """The score on the last real token, minus the KL charge on every token.

        r_t = [t is last] score - beta kl_t

    scores: (B,). kl: (B, T), k1 of the policy that sampled against the reference: log pi_old - log
    pi_ref. mask: (B, T). beta: reward per nat. Returns (B, T), 0 outside mask; with k1 its sum over
    t is score - beta log(pi_old/pi_ref)(y|x). Source: Ouyang et al. 2022 (InstructGPT), eq. 2,
    charged per token as in Ziegler et al. 2019.
    """
    column = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, column, -1).amax(1, keepdim=True)  # (B, 1)
    paid = torch.where(column == last, scores[:, None], 0.0)  # (B, T)
    return torch.where(mask, paid - beta * kl, 0.0)
