"""What the options of DPO choose from: which numbers of the two sides are compared, and how. `config` is a dpo.Config."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example
from trivet.errors import InputError
from trivet.optimization.preference import dpo_loss, implicit_reward
from trivet.optimization.preference_variants import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    robust_loss,
    simpo_loss,
)
from trivet.recipes.offline import to_groups
from trivet.run.loop import Run

VARIANTS: dict[str, dict[str, Any]] = {  # published ones with their papers' numbers, as presets
    "ipo": {"loss": "ipo", "length_normalize": True},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
    "orpo": {"loss": "orpo", "sft_weight": 1.0},
    "kto": {"loss": "kto"},
}
REFERENCE_FREE = ("simpo", "orpo")
BELONGS = {  # options that only some losses have
    "label_smoothing": ("conservative", "robust"),
    "length_normalize": ("sigmoid", "conservative", "robust", "hinge", "ipo"),
    "gamma": ("simpo",),
    "sft_weight": ("sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def check(config: Any) -> None:
    """InputError for an option that the chosen loss would ignore, or one that it can't do without."""
    for option, losses in BELONGS.items():
        if getattr(config, option) != getattr(type(config), option) and config.loss not in losses:
            flag = option.replace("_", "-")
            raise InputError(f"--{flag} does nothing with --loss {config.loss}; it belongs to {', '.join(losses)}")
    if config.loss in BELONGS["label_smoothing"] and not 0 < config.label_smoothing < 0.5:
        raise InputError(
            f"--loss {config.loss} needs --label-smoothing above 0 and below 0.5, the share of wrong labels"
        )
    if config.loss == "orpo" and not config.sft_weight:
        raise InputError("--loss orpo stands beside the supervised loss; give --sft-weight too (1 in the paper)")
    if config.loss == "kto" and config.prompts_per_step < 2:
        raise InputError("--loss kto needs --prompts-per-step of at least 2: its KL comes from exchanged completions")


def group_loss(
    config: Any, logprob: Tensor, ref_logprob: Tensor, tokens: Tensor, good: Tensor, kl: Tensor, group_size: int
) -> Tensor:
    """One loss for each row of data, (b,) -> (p,): a pair's, or in kto the mean over the completions of the row.

    logprob, ref_logprob: (b,) of whole completions; tokens: (b,) their lengths; good: (b,) bool; kl: scalar (kto).
    """
    beta = config.beta
    if config.loss == "kto":
        weight = torch.where(good, config.desirable_weight, config.undesirable_weight)  # (b,)
        each = weight * kto_loss(logprob, ref_logprob, good, kl, beta=beta)
        return each.view(-1, group_size).mean(1)
    if config.length_normalize or config.loss in REFERENCE_FREE:
        logprob, ref_logprob = logprob / tokens, ref_logprob / tokens
    chosen, rejected = logprob.view(-1, 2).unbind(1)  # (p,) each
    ref_chosen, ref_rejected = ref_logprob.view(-1, 2).unbind(1)
    rewards = implicit_reward(chosen, ref_chosen, beta=beta), implicit_reward(rejected, ref_rejected, beta=beta)
    match config.loss:
        case "sigmoid":
            return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        case "conservative":
            return conservative_loss(*rewards, label_smoothing=config.label_smoothing)
        case "robust":
            return robust_loss(*rewards, label_smoothing=config.label_smoothing)
        case "hinge":
            return hinge_loss(*rewards)
        case "ipo":
            return ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        case "simpo":
            return simpo_loss(chosen, rejected, beta=beta, gamma=config.gamma)
        case _:  # orpo
            return beta * odds_ratio_loss(chosen, rejected)


def implied_rewards(config: Any, logprob: Tensor, ref_logprob: Tensor, tokens: Tensor) -> Tensor:
    """The reward that the loss reads off the policy, (b,) each -> (b,): per token in simpo and orpo, which have no reference."""
    if config.loss in REFERENCE_FREE:
        return config.beta * logprob / tokens
    return implicit_reward(logprob, ref_logprob, beta=config.beta)


def desirable(examples: Sequence[Example], device: str) -> Tensor:
    """Which completions are good: the chosen ones of pairs, those labelled so of single ones. (B,) bool"""
    labels = [(True, False) if len(example.completions) == 2 else (example.row["label"],) for example in examples]
    return torch.tensor([label for row in labels for label in row], dtype=torch.bool, device=device)


def exchanged(examples: Sequence[Example]) -> list[Example]:
    """Each prompt with the completions of the row before it: samples that are nobody's answer, for the KL of kto."""
    before = [examples[-1], *examples[:-1]]
    return [replace(a, completions=b.completions, learned=b.learned) for a, b in zip(examples, before, strict=True)]


def show(
    run: Run, config: Any, step: int, examples: Sequence[Example], logprobs: Tensor, ref_logprobs: Tensor, kl: Tensor
) -> None:
    """Keep the tokens of these examples, the same at every kept step, with the gradient that the loss has there."""
    groups, good = to_groups(examples, run.device), desirable(examples, run.device)
    logprobs = logprobs.requires_grad_()  # (b, T)
    ref_logprob, logprob, tokens = ref_logprobs.sum(1), logprobs.sum(1), groups.mask.sum(1)  # (b,) each
    loss = group_loss(config, logprob, ref_logprob, tokens, good, kl, groups.group_size)
    (gradient,) = torch.autograd.grad(loss.mean(), logprobs)  # (b, T)
    kept = {"logprob": logprobs.detach(), "gradient": -gradient, "chosen": good}
    if config.loss not in REFERENCE_FREE:
        kept |= {"ref_logprob": ref_logprobs, "implicit_reward": config.beta * (logprobs.detach() - ref_logprobs)}
    kept["reward"] = implied_rewards(config, logprob.detach(), ref_logprob, tokens)
    run.keep(step, groups, rows=[example.row for example in examples], heldout=bool(run.heldout), **kept)
