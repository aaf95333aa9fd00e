"""From logits to a token: pure functions on (R, V) logits."""

import torch
from torch import Tensor


def warp(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Log-probabilities (R, V) of the distribution that is sampled: logits / temperature, cut to the top_k most likely
    tokens (0: all) and to the smallest set that holds top_p of the mass. temperature 0 leaves only the most likely one."""
    logprobs = (logits.float() if temperature == 0 else logits.float() / temperature).log_softmax(-1)
    if temperature == 0:
        top_k = 1
    if top_k:
        keep = logprobs.topk(min(top_k, logprobs.shape[-1])).indices
        logprobs = torch.full_like(logprobs, -torch.inf).scatter(-1, keep, logprobs.gather(-1, keep)).log_softmax(-1)
    if top_p < 1:
        ordered, order = logprobs.sort(descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the more likely tokens
        logprobs = (
            ordered.masked_fill((before >= top_p) & (before > 0), -torch.inf)
            .gather(-1, order.argsort(-1))
            .log_softmax(-1)
        )
    return logprobs


def draw(logprobs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One token per row by the inverse of the distribution function, with its log-probability. (R, V) -> (R,), (R,)."""
    mass = logprobs.exp().cumsum(-1)  # (R, V)
    total = mass[:, -1:]
    level = torch.rand(total.shape, generator=generator, device=total.device) * total
    level = torch.minimum(level, total * (1 - 2**-23))  # rounding up to the total would pick a token of no mass
    tokens = torch.searchsorted(mass, level, right=True).clamp(max=mass.shape[-1] - 1)  # (R, 1)
    possible = logprobs.gather(-1, tokens) > -torch.inf  # sums made in parallel are not quite monotone on a GPU
    tokens = torch.where(possible, tokens, logprobs.argmax(-1, keepdim=True))
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
