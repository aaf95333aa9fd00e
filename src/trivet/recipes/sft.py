"""SFT: supervised fine-tuning.

reward signal   the answer itself, assumed to be good
generation      none
optimization    negative log-likelihood of its tokens

    L = mean over completion tokens of  -log pi(y_t | x, y_<t)

Only the answer is learned, including its EOS, never the prompt (in a conversation, only the
assistant's turns). Preference rows work too: their chosen side is the answer.

    trivet sft --model Qwen/Qwen3-0.6B --data conversations.jsonl
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trivet.model.forward import token_logprobs
from trivet.optimization.reduce import token_mean
from trivet.optimization.supervised import nll_loss
from trivet.recipes.offline import rows_of, to_groups
from trivet.step.metrics import mean
from trivet.step.options import Options
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.timing import timed
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "supervised", "policy"  # the kind of rows, and the kind of model that is trained


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Supervised fine-tuning: maximize the likelihood of the given answers."""


def train(config: Config, run: Run) -> Iterator[Result]:
    """Train run.model, one step at a time."""
    policy, optimizer = run.model, run.optimizer(run.model)

    for _, examples in run.batches():
        groups = to_groups(examples, run.device)
        total = groups.mask.sum()  # tokens of all answers

        trace = run.trace(groups)
        for rows, part in trace.microbatches():
            logprobs, _ = trace.logprobs(policy, rows, part)  # (b, T)
            token_mean(nll_loss(logprobs), part.mask, total=total).backward()
        optimizer.step()

        metrics = {
            "loss": mean(nll_loss(trace.latest), groups.mask),
            "tokens/trained": trace.tokens,
        }
        numbers = {"logprob": trace.latest}
        yield Result(metrics=metrics, completions=groups, rows=rows_of(examples), numbers=numbers)


@timed("evaluation")
def evaluate(run: Run) -> Result:
    """Mean negative log-likelihood per token of the held-out answers."""
    groups = to_groups(run.heldout, run.device)
    logprobs = run.passes(token_logprobs, run.model, groups)  # (B, T)
    return Result(metrics={"loss": mean(nll_loss(logprobs), groups.mask)})


PRESETS = {
    "toy": STORIES | {"prompts_per_step": 32, "steps": 60, "lr": 3e-4, "lr_decay": True},
    "arithmetic": ARITHMETIC | {"steps": 150, "lr": 3e-3},
}
