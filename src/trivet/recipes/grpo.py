"""GRPO: group relative policy optimization (Shao et al. 2024, DeepSeekMath), and the variants that are one change away.

reward signal   any reward, one number per completion
generation      G completions per prompt, from the policy itself
optimization    policy gradient on the reward minus its group's mean, and a KL tie to the reference

    A_i = R_i - mean_j R_j        L = mean over tokens of  -A_i log pi(a_t|s_t) + beta KL(pi || pi_ref)

With --epochs-per-batch above 1 the first term is the clipped surrogate -min(rho A, clip(rho, 1-eps, 1+eps) A) of the paper;
at one epoch rho = 1 and the two have the same gradient. Differs from the paper: no division by the group's standard deviation
unless asked (Dr. GRPO shows its bias), the mean is over all tokens of the step (DAPO), and the KL term is k2, whose gradient is
that of KL(pi || pi_ref); the paper's k3 has the gradient of the other direction. The paper itself is --preset deepseekmath;
RLOO, REINFORCE++, Dr. GRPO, DAPO, GSPO and CISPO are presets too (docs/methods.md).

    trivet grpo --model Qwen/Qwen3-0.6B --data questions.jsonl --reward last_number
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trivet.batch import microbatches
from trivet.generation.engine import Engine
from trivet.model.copies import frozen_copy
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.optimization.policy import is_clipped, policy_gradient_loss, truncated_importance_weights
from trivet.recipes.grpo_variants import VARIANTS, centered, check, kl_term, shaped, step_mean, surrogate
from trivet.recipes.on_policy import evaluate, policy_metrics, rollout_metrics
from trivet.run.loop import Metrics, Optimizer, Run, mean, reduced
from trivet.run.options import SamplingOptions
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "prompts", "policy"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Group relative policy optimization: policy gradient on the reward minus the mean of its group."""

    group_size: int = 8
    """Completions per prompt."""
    beta: float = 0.04
    """Weight of KL(pi || pi_ref); 0 keeps no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """A term of the loss, or (RLOO, REINFORCE++) subtracted from the reward of each completion."""
    kl_estimator: Literal["k2", "k3", "weighted-k3"] = "k2"
    """The term in the loss: k2 has the gradient of the KL, k3 (the paper) another, k3 times the ratio the KL's again."""
    baseline: Literal["group", "leave-one-out", "batch"] = "group"
    """What is subtracted from a reward: the mean of its group, of the others in it (RLOO), of the step (REINFORCE++)."""
    scale_rewards: Literal["none", "group", "batch"] = "none"
    """Divide advantages by the standard deviation of the rewards in their group (the paper), or in the step."""
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """With several epochs per batch: clip each token's ratio, the completion's (GSPO), or weigh by the ratio (CISPO)."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Mean over the tokens of the step, over those of each completion first (the paper), or a fixed length (Dr. GRPO)."""
    epochs_per_batch: int = 1
    """Optimizer steps on each batch of completions; above 1 the ratio to the policy before the first of them is clipped."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    clip_dual: float = 0.0
    """Cut the ratio here also where the advantage is negative (dual clip; 3 in the paper); 0 does not."""
    dynamic_sampling: int = 0
    """Sample so many times again, of other prompts, to replace groups whose rewards are all equal (DAPO)."""
    overlong_buffer: int = 0
    """Charge up to 1 of reward, linearly, over the last so many tokens before --max-completion-tokens (DAPO)."""

    def __post_init__(self) -> None:
        check(self)


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the policy is run.model."""
    policy, reward = run.model, run.reward
    reference = frozen_copy(policy) if config.beta else None
    engine = run.engine(Engine(run.decode, run.stops, config.max_completion_tokens, config.temperature, run.generator))
    optimizer = Optimizer(policy, config, run.steps * config.epochs_per_batch)
    run.holds(reference=reference, optimizer=optimizer, engine=engine)
    budget, temperature = config.microbatch_tokens, config.temperature

    for step, prompts in run.batches():
        rollouts = engine.generate(policy, prompts, config.group_size)
        rewards = reward(rollouts)  # (B,)
        metrics = rollout_metrics(rollouts, rewards, reward)
        if config.dynamic_sampling:
            rollouts, rewards = run.refill(rollouts, rewards, step, engine, config.dynamic_sampling, metrics)
        groups, old_logprobs = rollouts.groups, rollouts.logprobs  # (B, T)
        ref_logprobs = old_logprobs  # (B, T)
        if reference is not None:
            ref_logprobs = in_microbatches(token_logprobs, reference, groups, budget, temperature=temperature)
            if config.kl_in == "reward":  # by the same forward, so that what is charged is exactly 0 at first
                old_logprobs = in_microbatches(token_logprobs, policy, groups, budget, temperature=temperature)
        advantages = centered(shaped(rewards, old_logprobs, ref_logprobs, groups.mask, config), config)  # (B,)

        in_loss = config.beta if config.kl_in == "loss" else 0.0
        teaches = advantages.view(-1, config.group_size).any(1) | (in_loss > 0)  # (P,) the others have no gradient
        learner, latest = old_logprobs.clone(), old_logprobs.clone()  # (B, T) before the learner moves, as it moves on
        gradient = latest.new_zeros(latest.shape)  # (B, T) of the loss by log pi
        run.shares(latest, gradient)
        for epoch in range(config.epochs_per_batch):
            for rows, part in microbatches(groups, budget, only=teaches):
                logprobs = token_logprobs(policy, part, temperature=temperature)  # (b, T)
                old = learner[rows] if epoch else logprobs.detach()  # (b, T) so rho is exactly 1 at first
                advantage = advantages[rows, None].expand_as(logprobs)  # (b, T)
                if config.epochs_per_batch == 1:
                    loss = policy_gradient_loss(logprobs, advantage)  # (b, T)
                else:
                    loss = surrogate(logprobs, old, advantage, part.mask, config)  # (b, T)
                loss = loss + in_loss * kl_term(logprobs, old, ref_logprobs[rows], config)
                if config.importance_cap and rollouts.versions:  # another engine, or earlier weights, wrote them
                    cap = config.importance_cap
                    loss = loss * truncated_importance_weights(old, rollouts.logprobs[rows], cap=cap)
                logprobs.retain_grad()
                step_mean(loss, part.mask, groups.mask, config).backward()
                latest[rows], gradient[rows] = logprobs.detach(), logprobs.grad  # type: ignore[assignment]
            learner = latest.clone() if epoch == 0 else learner
            metrics |= optimizer.step()

        metrics |= policy_metrics(rollouts, learner, ref_logprobs, teaches)
        metrics["tokens/trained"] = groups.lengths[teaches].sum() * config.epochs_per_batch
        clipped = is_clipped(latest, learner, advantages[:, None], clip_low=config.clip_low, clip_high=config.clip_high)
        if config.epochs_per_batch > 1:
            metrics["clip_ratio"] = mean(clipped, groups.mask)
        by_token = {"logprob": latest, "old_logprob": learner, "ref_logprob": ref_logprobs, "clipped": clipped}
        run.keep(step, rollouts, reward=rewards, advantage=advantages, gradient=-gradient, **by_token)
        if run.evaluates(step):
            metrics |= evaluate(run, policy, reference, reward, engine, step)
        yield reduced(metrics)


PRESETS = {
    "toy": STORIES | {"reward": ("trivet.toy.stories:gold",), "prompts_per_step": 16, "lr": 1e-3, "steps": 40},
    "arithmetic": ARITHMETIC | {"reward": ("exact_match",), "group_size": 16, "beta": 0.03, "lr": 1e-3, "steps": 450},
    **VARIANTS,
}
