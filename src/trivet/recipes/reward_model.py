"""Reward model: a scalar head that ranks completions as people (or a program) ranked them.

reward signal   preference pairs
generation      none
optimization    Bradley-Terry on the scores of the two sides

    L = mean over pairs of  -log sigmoid(r_w - r_l - margin) + center (r_w + r_l)^2
    r_w = r(x, y_w) of the chosen side, r_l = r(x, y_l) of the rejected one

The score is read at the last real token, EOS included. The head starts at zero, so the first loss
is log 2. The model is saved as a sequence classifier that transformers can load and that --reward
accepts.

    trivet reward-model --model Qwen/Qwen3-0.6B --data preferences.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.batch import Example
from trivet.errors import InputError
from trivet.model.scalar import scores
from trivet.optimization.preference import bradley_terry_loss, centering_loss
from trivet.recipes.offline import rows_of, to_groups
from trivet.step.metrics import Tally, mean
from trivet.step.options import Options
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.timing import timed
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "preference", "scorer"  # the kind of rows, and the kind of model that is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Reward model: Bradley-Terry on preference pairs."""

    margin: float = 0.0
    """How far apart the two scores should be; added to a row's column `margin`, if it has one."""
    center: float = 0.0
    """Weight of the squared sum of the two scores, which keeps them near 0; 0.01 in the
    literature.
    """


def train(config: Config, run: Run) -> Iterator[Result]:
    """Train run.model, the reward model, one step at a time."""
    model, optimizer = run.model, run.optimizer(run.model)

    for _, pairs in run.batches():
        groups = to_groups(pairs, run.device)  # rows 2p, 2p + 1: chosen, rejected
        margin = margins(pairs, config, run.device)  # (P,)

        trace = run.trace(groups)
        for rows, part in trace.microbatches(whole=True):  # a pair is never split
            chosen, rejected = trace.scores(model, rows, part).view(-1, 2).unbind(1)  # (p,) each
            loss = bradley_terry_loss(chosen, rejected, margin=margin[rows[::2] // 2])  # (p,)
            loss = loss + config.center * centering_loss(chosen, rejected)
            (loss.sum() / len(pairs)).backward()
        optimizer.step()

        metrics = pair_metrics(trace.score, margin, config) | {"tokens/trained": trace.tokens}
        yield Result(
            metrics=metrics,
            completions=groups,
            rows=rows_of(pairs),
            numbers={"reward": trace.score},
        )


def margins(examples: Sequence[Example], config: Config, device: str) -> Tensor:
    """The margin of each pair: --margin plus that of its row. (P,)"""
    column = [example.row.get("margin") or 0.0 for example in examples]
    try:
        return torch.tensor([config.margin + float(margin) for margin in column], device=device)
    except (TypeError, ValueError):
        raise InputError(
            f"{config.data}: column margin must hold numbers only, but holds {column!r:.80}"
        ) from None


def pair_metrics(score: Tensor, margin: Tensor, config: Config) -> Tally:
    """Loss, how often the chosen side scores higher, and by how much."""
    chosen, rejected = score.view(-1, 2).unbind(1)
    loss = bradley_terry_loss(chosen, rejected, margin=margin) + config.center * centering_loss(
        chosen, rejected
    )
    return {
        "loss": mean(loss),
        "accuracy": mean(chosen > rejected),
        "margin": mean(chosen - rejected),
        "mean_reward": mean(score),
    }


@timed("evaluation")
def evaluate(run: Run) -> Result:
    """The same metrics on the held-out pairs."""
    config: Config = run.config  # type: ignore[assignment]
    score = run.passes(scores, run.model, to_groups(run.heldout, run.device))  # (B,)
    return Result(metrics=pair_metrics(score, margins(run.heldout, config, run.device), config))


PRESETS = {
    "toy": STORIES | {"prompts_per_step": 32, "epochs": 1.0, "lr": 1e-3, "lr_decay": True},
    "arithmetic": ARITHMETIC | {"steps": 200, "lr": 1e-3},
}
