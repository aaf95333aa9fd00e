"""Reward model: a scalar head that ranks completions as people (or a program) did.

reward signal   preference pairs
generation      none
optimization    Bradley-Terry on the scores of the two sides

    L = mean over pairs of  -log sigmoid(r(x, y_w) - r(x, y_l) - margin) + center (r(x, y_w) + r(x, y_l))^2

The score is read at the last real token, EOS included. The head starts at zero, so the first loss is log 2. Saved as a
sequence-classification model that transformers loads and that --reward takes.

    trivet reward-model --model Qwen/Qwen3-0.6B --data preferences.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example, microbatches
from trivet.errors import InputError
from trivet.model.forward import in_microbatches
from trivet.model.scalar import scores
from trivet.optimization.preference import bradley_terry_loss, centering_loss
from trivet.recipes.offline import to_groups
from trivet.run.loop import Metrics, Optimizer, Run, Tally, mean, reduced
from trivet.run.options import Options
from trivet.timing import timed
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "preference", "scorer"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Reward model: Bradley-Terry on preference pairs."""

    margin: float = 0.0
    """How far apart the two scores should be; added to the column `margin` of a row that has one."""
    center: float = 0.0
    """Weight of the squared sum of the two scores, which keeps them around 0; 0.01 in the literature."""


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the reward model is run.model."""
    model = run.model
    optimizer = Optimizer(model, config, run.steps)
    run.holds(optimizer=optimizer)

    for step, examples in run.batches():
        groups = to_groups(examples, run.device)
        margin = margins(examples, config, run.device)  # (P,)
        result = torch.zeros(2 * len(examples), device=run.device)  # (B,)
        run.shares(result)
        for rows, part in microbatches(groups, config.microbatch_tokens, whole=True):
            score = scores(model, part)  # (b,)
            chosen, rejected = score.view(-1, 2).unbind(1)
            loss = bradley_terry_loss(chosen, rejected, margin=margin[rows[::2] // 2])  # (p,)
            loss = loss + config.center * centering_loss(chosen, rejected)
            (loss.sum() / len(examples)).backward()
            result[rows] = score.detach()
        metrics = pair_metrics(result, margin, config) | {"tokens/trained": groups.lengths.sum()} | optimizer.step()
        run.keep(step, groups, rows=[example.row for example in examples], reward=result)
        if run.evaluates(step):
            metrics |= evaluate(model, run.heldout, config, run.device)
        yield reduced(metrics)


def margins(examples: Sequence[Example], config: Config, device: str) -> Tensor:
    """(P,): --margin and each row's own."""
    own = [example.row.get("margin") or 0.0 for example in examples]
    try:
        return torch.tensor([config.margin + float(margin) for margin in own], device=device)
    except (TypeError, ValueError):
        raise InputError(f"{config.data}: column margin holds something other than numbers: {own!r:.80}") from None


def pair_metrics(score: Tensor, margin: Tensor, config: Config) -> Tally:
    """Loss, how often the chosen one scores higher, and by how much."""
    chosen, rejected = score.view(-1, 2).unbind(1)
    loss = bradley_terry_loss(chosen, rejected, margin=margin) + config.center * centering_loss(chosen, rejected)
    return {
        "loss": mean(loss),
        "accuracy": mean(chosen > rejected),
        "margin": mean(chosen - rejected),
        "mean_reward": mean(score),
    }


@timed("evaluation")
def evaluate(model: Any, examples: Sequence[Example], config: Config, device: str) -> Tally:
    """The same on the held-out pairs."""
    score = in_microbatches(scores, model, to_groups(examples, device), config.microbatch_tokens)  # (B,)
    return {
        f"eval/{key}": value for key, value in pair_metrics(score, margins(examples, config, device), config).items()
    }


PRESETS = {
    "toy": STORIES | {"prompts_per_step": 32, "epochs": 1.0, "lr": 1e-3, "lr_decay": True},
    "arithmetic": ARITHMETIC | {"steps": 200, "lr": 1e-3},
}
