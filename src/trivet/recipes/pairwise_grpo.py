"""Pairwise GRPO: every ranked pair of a group is a preference.

reward signal   any reward, used only as a ranking: its scale is of no importance
generation      G completions per prompt, from the policy itself
optimization    Bradley-Terry on the implicit reward beta log pi/pi_ref, over all pairs that the reward tells apart

    pairs = {(i, j): R_i > R_j}
    L = mean over groups of  -1/|pairs| sum log sigmoid(beta [(log pi(y_i) - log pi(y_j)) - (log pi_ref(y_i) - log pi_ref(y_j))])

With G = 2 it is DPO on the pair just sampled. Ties give no pair; a group without pairs gives no gradient, and does not count in
the mean. There is no separate KL term: beta ties the policy to the reference as in DPO.

    trivet pairwise-grpo --model Qwen/Qwen3-0.6B --data questions.jsonl --reward last_number
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trivet.batch import microbatches
from trivet.generation.engine import Engine
from trivet.model.copies import frozen_copy
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.optimization.preference import pairwise_group_loss, ranked_pairs
from trivet.optimization.reduce import sequence_sum
from trivet.recipes.on_policy import evaluate, policy_metrics, rollout_metrics
from trivet.run.loop import Metrics, Optimizer, Run, reduced
from trivet.run.options import SamplingOptions
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "prompts", "policy"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Pairwise GRPO: Bradley-Terry over all ranked pairs of each sampled group."""

    group_size: int = 8
    """Completions per prompt."""
    beta: float = 0.1
    """Strength of the tie to the reference, per nat."""


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the policy is run.model."""
    policy, reward = run.model, run.reward
    reference = frozen_copy(policy)
    engine = run.engine(Engine(run.decode, run.stops, config.max_completion_tokens, config.temperature, run.generator))
    optimizer = Optimizer(policy, config, run.steps)
    run.holds(reference=reference, optimizer=optimizer, engine=engine)
    budget, temperature = config.microbatch_tokens, config.temperature

    for step, prompts in run.batches():
        rollouts = engine.generate(policy, prompts, config.group_size)
        groups, old_logprobs = rollouts.groups, rollouts.logprobs  # (B, T)
        rewards = reward(rollouts)  # (B,)
        pairs = ranked_pairs(rewards, config.group_size)  # (P, G, G)
        ref_logprobs = in_microbatches(token_logprobs, reference, groups, budget, temperature=temperature)  # (B, T)
        ref_logprob = sequence_sum(ref_logprobs, groups.mask)  # (B,)

        teaches = pairs.any(2).any(1)  # (P,) the others have no pair
        learner = old_logprobs.clone()  # (B, T) what the learner says of the same tokens, before it moves
        gradient = learner.new_zeros(learner.shape)  # (B, T) of the loss by log pi
        run.shares(learner, gradient)
        for rows, part in microbatches(groups, budget, whole=True, only=teaches):
            logprobs = token_logprobs(policy, part, temperature=temperature)  # (b, T)
            logprob = sequence_sum(logprobs, part.mask)  # (b,)
            loss = pairwise_group_loss(
                logprob, ref_logprob[rows], rewards[rows], config.group_size, beta=config.beta
            )  # (p,)
            logprobs.retain_grad()
            (loss.sum() / teaches.sum()).backward()
            learner[rows], gradient[rows] = logprobs.detach(), logprobs.grad  # type: ignore[assignment]
        update = optimizer.step()

        metrics = (
            rollout_metrics(rollouts, rewards, reward)
            | policy_metrics(rollouts, learner, ref_logprobs, teaches)
            | update
        )
        metrics |= {"pairs": pairs.sum(), "tokens/trained": groups.lengths[teaches].sum()}
        implied = config.beta * (learner - ref_logprobs)  # (B, T)
        by_token = {"logprob": learner, "ref_logprob": ref_logprobs, "implicit_reward": implied}
        run.keep(step, rollouts, reward=rewards, gradient=-gradient, **by_token)
        if run.evaluates(step):
            metrics |= evaluate(run, policy, reference, reward, engine, step)
        yield reduced(metrics)


PRESETS = {
    "toy": STORIES | {"reward": ("trivet.toy.stories:gold",), "prompts_per_step": 16, "lr": 4e-4, "steps": 40},
    "arithmetic": ARITHMETIC | {"reward": ("exact_match",), "group_size": 16, "beta": 0.03, "lr": 2e-3, "steps": 450},
}
