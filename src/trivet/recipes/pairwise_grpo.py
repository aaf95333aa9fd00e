"""Pairwise GRPO: every ranked pair of a group is a preference.

reward signal   any reward, used only as a ranking: its scale does not matter
generation      G completions per prompt, from the policy itself
optimization    Bradley-Terry on the implicit reward beta log pi/pi_ref, over all ranked pairs

    pairs = {(i, j): R_i > R_j}
    h_i = log pi(y_i) - log pi_ref(y_i)
    L = mean over groups of  -1/|pairs| sum over pairs of  log sigmoid(beta (h_i - h_j))

With G = 2 it is DPO on the pair just sampled. Ties form no pair; a group without pairs has no
gradient and does not count in the mean. There is no separate KL term: beta ties the policy to the
reference, as in DPO.

    trivet pairwise-grpo --model Qwen/Qwen3-0.6B --data questions.jsonl --reward last_number
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trivet.optimization.preference import pairwise_group_loss, ranked_pairs
from trivet.optimization.reduce import sequence_sum
from trivet.recipes.on_policy import evaluate as evaluate  # launch calls it on held-out prompts
from trivet.recipes.on_policy import sampled_result
from trivet.step.options import SamplingOptions
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "prompts", "policy"  # the kind of rows, and the kind of model that is trained


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Pairwise GRPO: Bradley-Terry over all ranked pairs of each sampled group."""

    group_size: int = 8
    """Completions per prompt."""
    beta: float = 0.1
    """Strength of the tie to the reference, per nat."""


def train(config: Config, run: Run) -> Iterator[Result]:
    """Train run.model, one step at a time."""
    policy, reward, engine = run.model, run.reward, run.engine()
    reference = run.reference()
    optimizer = run.optimizer(policy)
    size, beta = config.group_size, config.beta

    for _, prompts in run.batches():
        rollouts = engine.generate(policy, prompts, size)  # what does the policy say?
        rewards = reward(rollouts)  # (B,) what is good?
        ref_logprobs = run.logprobs(reference, rollouts)  # (B, T)
        ref_logprob = sequence_sum(ref_logprobs, rollouts.groups.mask)  # (B,)
        pairs = ranked_pairs(rewards, size)  # (P, G, G)
        teaches = pairs.any(2).any(1)  # (P,) groups that have a pair

        trace = run.trace(rollouts)  # how does the policy change?
        for rows, part in trace.microbatches(only=teaches, whole=True):
            logprobs, _ = trace.logprobs(policy, rows, part)  # (b, T)
            logprob = sequence_sum(logprobs, part.mask)  # (b,)
            # (p,)
            loss = pairwise_group_loss(logprob, ref_logprob[rows], rewards[rows], size, beta=beta)
            (loss.sum() / teaches.sum()).backward()
        optimizer.step()

        extra = {
            "metrics": {"pairs": pairs.sum()},
            "implicit_reward": beta * (trace.first - ref_logprobs),
        }
        yield sampled_result(rollouts, rewards, reward, ref_logprobs, trace, **extra)


PRESETS = {
    "toy": STORIES
    | {"reward": ("trivet.toy.stories:gold",), "prompts_per_step": 16, "lr": 4e-4, "steps": 40},
    "arithmetic": ARITHMETIC
    | {"reward": ("exact_match",), "group_size": 16, "beta": 0.03, "lr": 2e-3, "steps": 450},
}
