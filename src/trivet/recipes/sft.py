"""SFT: supervised fine-tuning.

reward signal   the answer itself, taken as good
generation      none
optimization    negative log-likelihood of its tokens

    L = mean over completion tokens of  -log pi(y_t | x, y_<t)

Only the answer is learned, its EOS included, never the prompt (of a conversation: the assistant's turns). Preference rows are
read too: their chosen side is the answer.

    trivet sft --model Qwen/Qwen3-0.6B --data conversations.jsonl
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trivet.batch import Example, microbatches
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.optimization.reduce import token_mean
from trivet.optimization.supervised import nll_loss
from trivet.recipes.offline import to_groups
from trivet.run.loop import Metrics, Optimizer, Run, Tally, mean, reduced
from trivet.run.options import Options
from trivet.timing import timed
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "supervised", "policy"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Supervised fine-tuning: maximize the likelihood of the given answers."""


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the policy is run.model."""
    policy = run.model
    optimizer = Optimizer(policy, config, run.steps)
    run.holds(optimizer=optimizer)

    for step, examples in run.batches():
        groups = to_groups(examples, run.device)
        total, latest = groups.mask.sum(), torch.zeros(groups.mask.shape, device=run.device)  # (B, T)
        run.shares(latest)
        for rows, part in microbatches(groups, config.microbatch_tokens):
            logprobs = token_logprobs(policy, part)  # (b, T)
            loss = token_mean(nll_loss(logprobs), part.mask, total=total)
            loss.backward()
            latest[rows] = logprobs.detach()
        metrics = {
            "loss": mean(nll_loss(latest), groups.mask),
            "tokens/trained": groups.lengths.sum(),
        } | optimizer.step()
        run.keep(step, groups, rows=[example.row for example in examples], logprob=latest)
        if run.evaluates(step):
            metrics |= evaluate(policy, run.heldout, config, run.device)
        yield reduced(metrics)


@timed("evaluation")
def evaluate(policy: Any, examples: Sequence[Example], config: Config, device: str) -> Tally:
    """Mean negative log-likelihood per token of the held-out answers."""
    groups = to_groups(examples, device)
    logprobs = in_microbatches(token_logprobs, policy, groups, config.microbatch_tokens)  # (B, T)
    return {"eval/loss": mean(nll_loss(logprobs), groups.mask)}


PRESETS = {
    "toy": STORIES | {"prompts_per_step": 32, "steps": 60, "lr": 3e-4, "lr_decay": True},
    "arithmetic": ARITHMETIC | {"steps": 150, "lr": 3e-3},
}
