"""The losses that DPO's options choose from: which numbers of the two sides are compared, and how.
`config` is a dpo.Config.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trivet.errors import InputError
from trivet.optimization.preference import dpo_loss, implicit_reward
from trivet.optimization.preference_variants import (
    conservative_loss,
    hinge_loss,
    ipo_loss,
    odds_ratio_loss,
    robust_loss,
    simpo_loss,
)

VARIANTS: dict[str, dict[str, Any]] = {  # presets: published variants with their papers' numbers
    "ipo": {"loss": "ipo", "length_normalize": True},
    "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
    "orpo": {"loss": "orpo", "sft_weight": 1.0},
    "kto": {"loss": "kto"},
}
REFERENCE_FREE = ("simpo", "orpo")
LOSSES_WITH = {  # option: the losses that use it
    "label_smoothing": ("conservative", "robust"),
    "length_normalize": ("sigmoid", "conservative", "robust", "hinge", "ipo"),
    "gamma": ("simpo",),
    "sft_weight": ("sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


def check(config: Any) -> None:
    """Raise an InputError if the chosen loss would ignore an option, or lacks one that it needs."""
    for option, losses in LOSSES_WITH.items():
        if getattr(config, option) != getattr(type(config), option) and config.loss not in losses:
            flag = option.replace("_", "-")
            raise InputError(
                f"--{flag} has no effect with --loss {config.loss}; drop it, or choose a --loss "
                f"that uses it: {', '.join(losses)}"
            )
    if config.loss in LOSSES_WITH["label_smoothing"] and not 0 < config.label_smoothing < 0.5:
        raise InputError(
            f"--loss {config.loss} needs --label-smoothing above 0 and below 0.5: the share of "
            "labels that are wrong"
        )
    if config.loss == "orpo" and not config.sft_weight:
        raise InputError(
            "--loss orpo is an addition to the supervised loss; set --sft-weight too (1 in the "
            "paper)"
        )
    if config.loss == "kto" and config.prompts_per_step < 2:
        raise InputError(
            "--loss kto needs --prompts-per-step of at least 2: it estimates its KL from "
            "mismatched completions"
        )


# (logprob, ref_logprob, tokens), (b,) each -> the loss of each pair, (p,)
Comparison = Callable[[Tensor, Tensor, Tensor], Tensor]


def comparison_of(config: Any) -> Comparison:
    """Return the loss that --loss names, a function of log pi and log pi_ref of whole completions
    and of their lengths.
    """
    beta, smoothing = config.beta, {"label_smoothing": config.label_smoothing}

    def on_rewards(loss: Callable[..., Tensor], **options: float) -> Callable[..., Tensor]:
        """A loss on the implicit rewards of the two sides."""
        return lambda chosen, rejected, ref_chosen, ref_rejected: loss(
            implicit_reward(chosen, ref_chosen, beta=beta),
            implicit_reward(rejected, ref_rejected, beta=beta),
            **options,
        )

    losses: dict[str, Callable[..., Tensor]] = {
        "sigmoid": lambda *sides: dpo_loss(*sides, beta=beta),
        "conservative": on_rewards(conservative_loss, **smoothing),
        "robust": on_rewards(robust_loss, **smoothing),
        "hinge": on_rewards(hinge_loss),
        "ipo": lambda *sides: ipo_loss(*sides, beta=beta),
        "simpo": lambda chosen, rejected, *_: simpo_loss(
            chosen, rejected, beta=beta, gamma=config.gamma
        ),
        "orpo": lambda chosen, rejected, *_: beta * odds_ratio_loss(chosen, rejected),
    }
    loss, by_token = losses[config.loss], config.length_normalize or config.loss in REFERENCE_FREE

    def comparison(logprob: Tensor, ref_logprob: Tensor, tokens: Tensor) -> Tensor:
        if by_token:
            logprob, ref_logprob = logprob / tokens, ref_logprob / tokens
        return loss(*logprob.view(-1, 2).unbind(1), *ref_logprob.view(-1, 2).unbind(1))

    return comparison


def implied_rewards(config: Any, logprob: Tensor, ref_logprob: Tensor, tokens: Tensor) -> Tensor:
    """The reward that the loss implies for the policy's completions, (b,) each -> (b,): per token
    in simpo and orpo, which have no reference.
    """
    if config.loss in REFERENCE_FREE:
        return config.beta * logprob / tokens
    return implicit_reward(logprob, ref_logprob, beta=config.beta)
