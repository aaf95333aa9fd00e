"""PPO: proximal policy optimization with a learned value baseline (Schulman et al. 2017; Ouyang et al. 2022).

reward signal   a reward model (or any reward) on the last token, minus a KL charge on every token
generation      completions from the policy itself
optimization    clipped surrogate on advantages from GAE; a critic of its own learns the returns

    r_t = [t is last] R - beta (log pi_old - log pi_ref)        A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l})
    L_policy = -min(rho A, clip(rho, 1-eps, 1+eps) A)            L_value = 1/2 max((V - R)^2, (clip(V) - R)^2)

The critic is a second model: a copy of the reward model where one that shares the policy's tokens is given, else the policy's
trunk with a zero head; or, with --shared-critic, that head on the policy's own trunk. --kl-in loss puts beta KL(pi || pi_ref)
(k2) into the loss instead of the reward. Differs from InstructGPT: no pretraining term, and V is not normalized.

    trivet ppo --model Qwen/Qwen3-0.6B --data questions.jsonl --reward runs/reward-model
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trivet.batch import microbatches
from trivet.generation.engine import Engine
from trivet.model.copies import frozen_copy
from trivet.model.forward import in_microbatches, token_logprobs
from trivet.model.scalar import values, with_scalar_head
from trivet.optimization.control import adapted_beta
from trivet.optimization.kl import k1, k2
from trivet.optimization.normalize import scale_to_unit_variance, whiten
from trivet.optimization.policy import clipped_surrogate_loss, is_clipped, truncated_importance_weights
from trivet.optimization.reduce import sequence_sum, token_mean
from trivet.optimization.value import clipped_value_loss, explained_variance, gae
from trivet.recipes.on_policy import evaluate, policy_metrics, rollout_metrics
from trivet.rewards.reward import WeightedSum
from trivet.rewards.shaping import kl_charged_rewards
from trivet.run.loop import Metrics, Optimizer, Run, mean, reduced
from trivet.run.options import SamplingOptions
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "prompts", "policy"  # what the data must hold, and what kind of model is trained


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Proximal policy optimization: clipped surrogate, learned value baseline, KL to the reference."""

    group_size: int = 4
    """Completions per prompt; they share the prompt's computation, nothing else."""
    beta: float = 0.05
    """Charge for KL(pi || pi_ref), reward per nat."""
    kl_target: float = 0.0
    """Adapt beta so that the KL is led to so many nats per completion; 0 leaves beta as it is."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Charge the KL per token in the reward, or as a term of the loss."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda: 0 trusts the critic, 1 the sampled return."""
    epochs_per_batch: int = 2
    """Passes over each batch of completions."""
    minibatches: int = 1
    """Optimizer steps in each of these passes."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    value_clip: float = 0.2
    """How far a value may usefully move from its old value on one batch; 0 does not limit it."""
    critic_lr: float = 1e-5
    """Learning rate of the critic."""
    shared_critic: bool = False
    """The critic is a scalar head on the policy's own trunk: half the memory, and value gradients in the policy."""
    value_coef: float = 0.1
    """Weight of the value loss where the critic is shared; a separate one has a learning rate of its own."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a batch to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale the rewards of a batch, charges included, to variance 1; their signs stay."""
    missing_eos_penalty: float = 0.0
    """Take this from the reward of a completion that was cut at the length limit."""


def train(config: Config, run: Run) -> Iterator[Metrics]:
    """Yield the metrics of each step; the policy is run.model."""
    policy, reward = run.model, run.reward
    reference = frozen_copy(policy)
    critic = with_scalar_head(policy, share=True) if config.shared_critic else critic_from(reward, policy)
    value_coef, value_clip = config.value_coef if config.shared_critic else 1.0, config.value_clip or math.inf
    engine = run.engine(Engine(run.decode, run.stops, config.max_completion_tokens, config.temperature, run.generator))
    updates = config.epochs_per_batch * config.minibatches
    optimizer = Optimizer(policy, config, run.steps * updates)
    head_or_all = critic.score if config.shared_critic else critic
    critic_optimizer = Optimizer(head_or_all, config, run.steps * updates, lr=config.critic_lr)
    beta = torch.tensor(config.beta, dtype=torch.float64)
    trained = {"critic": critic, "optimizer": optimizer, "critic_optimizer": critic_optimizer, "beta": beta}
    run.holds(reference=reference, engine=engine, **trained)
    budget, temperature = config.microbatch_tokens, config.temperature
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}

    for step, prompts in run.batches():
        rollouts = engine.generate(policy, prompts, config.group_size)
        groups, mask, old_logprobs = rollouts.groups, rollouts.groups.mask, rollouts.logprobs  # (B, T)
        rewards = reward(rollouts)  # (B,)
        rewards = rewards.where(~rewards.isnan(), rewards.nanmean().nan_to_num())  # unscored ones count as average
        scores = rewards - config.missing_eos_penalty * ~rollouts.finished  # (B,)
        ref_logprobs = in_microbatches(token_logprobs, reference, groups, budget, temperature=temperature)  # (B, T)
        weights = torch.ones_like(old_logprobs)  # (B, T)
        if config.importance_cap and rollouts.versions:  # another engine, or earlier weights, wrote them
            old_logprobs = in_microbatches(token_logprobs, policy, groups, budget, temperature=temperature)  # (B, T)
            weights = truncated_importance_weights(old_logprobs, rollouts.logprobs, cap=config.importance_cap)
        old_values = in_microbatches(values, critic, groups, budget)  # (B, T)
        kl, charge = k1(old_logprobs, ref_logprobs), beta if config.kl_in == "reward" else 0.0  # (B, T)
        token_rewards = kl_charged_rewards(scores, kl, mask, beta=charge)  # (B, T)
        if config.whiten_rewards:
            token_rewards = scale_to_unit_variance(token_rewards, mask)
        advantages, returns = gae(token_rewards, old_values, mask, gamma=config.gamma, lam=config.lam)  # (B, T) each
        if config.whiten_advantages:
            advantages = whiten(advantages, mask)

        learner, latest = old_logprobs.clone(), old_logprobs.clone()  # (B, T) before the policy moves, as it moves on
        gradient, update, critic_update = torch.zeros_like(latest), Metrics(), Metrics()  # (B, T) of the loss by log pi
        run.shares(learner, latest, gradient)
        for chosen in (order := list(minibatches(mask, len(prompts), config))):  # (P,)
            total = mask.view(len(prompts), -1)[chosen].sum()
            for rows, part in microbatches(groups, budget, only=chosen):
                logprobs = token_logprobs(policy, part, temperature=temperature)  # (b, T)
                loss = clipped_surrogate_loss(logprobs, old_logprobs[rows], advantages[rows], **clip)  # (b, T)
                if config.kl_in == "loss":
                    loss = loss + beta * k2(logprobs, ref_logprobs[rows])
                logprobs.retain_grad()
                token_mean(weights[rows] * loss, part.mask, total=total).backward()
                value = values(critic, part)  # (b, T)
                value_loss = clipped_value_loss(value, old_values[rows], returns[rows], clip=value_clip)  # (b, T)
                (value_coef * token_mean(value_loss, part.mask, total=total)).backward()
                latest[rows], gradient[rows] = logprobs.detach(), logprobs.grad  # type: ignore[assignment]
                if not update:
                    learner[rows] = latest[rows]
            update, critic_update = optimizer.step(), critic_optimizer.step()

        metrics = rollout_metrics(rollouts, rewards, reward) | policy_metrics(rollouts, learner, ref_logprobs, order[0])
        clipped = is_clipped(latest, old_logprobs, advantages, **clip)  # (B, T)
        metrics |= update | {
            "clip_ratio": mean(clipped, mask),
            "objective/rlhf_reward": mean(token_rewards.sum(1)),
            "value/explained_variance": explained_variance(old_values, returns, mask),
            "value/grad_norm": critic_update["grad_norm"],
            "tokens/trained": 2 * groups.lengths.sum() * config.epochs_per_batch,
        }
        if config.kl_target:
            metrics["objective/kl_coef"] = float(beta)
            beta.copy_(adapted_beta(beta, sequence_sum(kl, mask).mean(), target=config.kl_target))
        by_token = {"logprob": latest, "old_logprob": old_logprobs, "ref_logprob": ref_logprobs, "clipped": clipped}
        by_token |= {"advantage": advantages, "value": old_values, "return": returns, "token_reward": token_rewards}
        run.keep(step, rollouts, reward=rewards, gradient=-gradient, **by_token)
        if run.evaluates(step):
            metrics |= evaluate(run, policy, reference, reward, engine, step)
        yield reduced(metrics)


def critic_from(reward: WeightedSum, policy: Any) -> Any:
    """A copy of the first reward model that reads the policy's tokens, else the policy's trunk with a zero head."""
    for part in reward.rewards.values():
        if getattr(part, "same_tokens", False):
            return part.critic()  # type: ignore[attr-defined]
    return with_scalar_head(policy)


def minibatches(mask: torch.Tensor, prompts: int, config: Config) -> Iterator[torch.Tensor]:
    """(P,) bool on the device of mask: the prompts of each update, every prompt once an epoch, in a new random order each."""
    for _ in range(config.epochs_per_batch):
        for chosen in torch.randperm(prompts).tensor_split(config.minibatches):
            yield mask.new_zeros(prompts).index_fill(0, chosen.to(mask.device), True)


LEARN = {"reward": ("trivet.toy.stories:gold",), "lr": 1e-3, "critic_lr": 1e-3}
PRESETS = {
    "toy": STORIES | LEARN | {"prompts_per_step": 16, "group_size": 8, "steps": 40},
    "arithmetic": ARITHMETIC | LEARN | {"reward": ("exact_match",), "group_size": 16, "beta": 0.03, "steps": 300},
}
