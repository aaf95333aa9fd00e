"""PPO: proximal policy optimization with a learned value baseline (Schulman et al. 2017; Ouyang et
al. 2022).

reward signal   a reward model (or any reward) on the last token, minus a KL charge on every token
generation      completions from the policy itself
optimization    clipped surrogate on advantages from GAE; a separate critic learns the returns

    r_t = [t is last] R - beta (log pi_old - log pi_ref)
    A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}),  R_t = A_t + V_t
    L_policy = -min(rho A, clip(rho, 1-eps, 1+eps) A),  rho = pi / pi_old
    L_value = 1/2 max((V - R_t)^2, (clip(V) - R_t)^2)

The critic is a second model: a copy of the reward model, if there is one with the policy's tokens,
else the policy's trunk with a zero head; with --shared-critic it is such a head on the policy's own
trunk. --kl-in loss puts beta KL(pi || pi_ref) (k2) into the loss instead of the reward. Differs
from InstructGPT: no pretraining term, and V is not normalized.

    trivet ppo --model Qwen/Qwen3-0.6B --data questions.jsonl --reward runs/reward-model
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trivet.batch import Rollouts
from trivet.model.scalar import values
from trivet.optimization.kl import k1, k2
from trivet.optimization.policy import clipped_surrogate_loss, is_clipped
from trivet.optimization.reduce import sequence_sum, token_mean
from trivet.recipes.on_policy import evaluate as evaluate  # launch calls it on held-out prompts
from trivet.recipes.on_policy import sampled_result
from trivet.recipes.ppo_parts import (
    AdaptiveKL,
    Critic,
    advantages_of,
    average_where_unscored,
    step_metrics,
    token_rewards_of,
)
from trivet.step.options import SamplingOptions
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "prompts", "policy"  # the kind of rows, and the kind of model that is trained


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Proximal policy optimization: clipped surrogate, learned value baseline, KL to the
    reference.
    """

    group_size: int = 4
    """Completions per prompt; they share only the computation of the prompt."""
    beta: float = 0.05
    """Charge for KL(pi || pi_ref), in reward per nat."""
    kl_target: float = 0.0
    """Adapt beta so that the KL approaches this many nats per completion; 0 keeps beta fixed."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Charge the KL in the reward of each token, or as a term of the loss."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda: 0 trusts the critic, 1 the sampled return."""
    epochs_per_batch: int = 2
    """Passes over each batch of completions."""
    minibatches: int = 1
    """Optimizer steps in each pass."""
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    value_clip: float = 0.2
    """How far a value may move from its old value on one batch before the loss is clipped; 0 sets
    no limit.
    """
    critic_lr: float = 1e-5
    """Learning rate of the critic."""
    shared_critic: bool = False
    """Make the critic a scalar head on the policy's own trunk: half the memory, and value gradients
    in the policy.
    """
    value_coef: float = 0.1
    """Weight of the value loss with --shared-critic; a separate critic has its own learning
    rate.
    """
    whiten_advantages: bool = True
    """Shift and scale the advantages of a batch to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Scale the rewards of a batch, charges included, to variance 1, without changing signs."""
    missing_eos_penalty: float = 0.0
    """Subtract this from the reward of a completion that was cut off at the length limit."""


def train(config: Config, run: Run) -> Iterator[Result]:
    """Train run.model and a critic, one step at a time."""
    policy, reward, engine = run.model, run.reward, run.engine()
    reference, critic = run.reference(), Critic(config, run)
    updates = config.epochs_per_batch * config.minibatches
    optimizer = run.optimizer(policy, updates=updates)
    critic_optimizer = run.optimizer(
        critic.trained, updates=updates, lr=config.critic_lr, name="critic_optimizer"
    )
    kl_weight = run.holds(beta=AdaptiveKL(config))
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}

    for _, prompts in run.batches():
        rollouts = engine.generate(policy, prompts, config.group_size)  # what does the policy say?
        rewards = average_where_unscored(reward(rollouts))  # (B,) what is good?
        mask, ref_logprobs = rollouts.groups.mask, run.logprobs(reference, rollouts)  # (B, T)
        trace = run.trace(rollouts, by=learner_of(config, policy, rollouts))
        old_logprobs = trace.start  # (B, T)
        old_values = run.passes(values, critic.model, rollouts)  # (B, T)
        kl = k1(old_logprobs, ref_logprobs)  # (B, T)
        token_rewards = token_rewards_of(config, rollouts, rewards, kl, kl_weight.charge)  # (B, T)
        advantages, returns = advantages_of(config, token_rewards, old_values, mask)  # (B, T) each

        for chosen in minibatches(mask, len(prompts), config):  # (P,) how does the policy change?
            total = mask.view(len(prompts), -1)[chosen].sum()  # tokens
            for rows, part in trace.microbatches(only=chosen):
                logprobs, _ = trace.logprobs(policy, rows, part)  # (b, T)
                old = old_logprobs[rows]  # (b, T)
                loss = clipped_surrogate_loss(logprobs, old, advantages[rows], **clip)  # (b, T)
                loss = loss + kl_weight.in_loss * k2(logprobs, ref_logprobs[rows])
                token_mean(trace.weights(rows, old) * loss, part.mask, total=total).backward()
                value_loss = critic.loss(part, old_values[rows], returns[rows])  # (b, T)
                (critic.loss_weight * token_mean(value_loss, part.mask, total=total)).backward()
            optimizer.step()
            critic_optimizer.step()

        clipped = is_clipped(trace.latest, old_logprobs, advantages, **clip)  # (B, T)
        own = step_metrics(clipped, token_rewards, old_values, returns, mask)
        own |= {"value/grad_norm": critic_optimizer.metrics["grad_norm"]}
        own |= {"tokens/trained": 2 * trace.tokens}  # by the policy and by the critic
        own |= kl_weight.update(sequence_sum(kl, mask).mean())
        numbers = {"old_logprob": old_logprobs, "clipped": clipped, "advantage": advantages}
        numbers |= {"value": old_values, "return": returns, "token_reward": token_rewards}
        yield sampled_result(rollouts, rewards, reward, ref_logprobs, trace, metrics=own, **numbers)


def learner_of(config: Config, policy: Any, rollouts: Rollouts) -> Any:
    """The policy, if it must compute pi_old itself because another engine or earlier weights
    sampled; else None.
    """
    return policy if config.importance_cap and rollouts.versions else None


def minibatches(mask: torch.Tensor, prompts: int, config: Config) -> Iterator[torch.Tensor]:
    """Yield the prompts of each update, (P,) bool on the device of mask: every prompt once per
    epoch, each epoch in a new random order.
    """
    for _ in range(config.epochs_per_batch):
        for chosen in torch.randperm(prompts).tensor_split(config.minibatches):
            yield mask.new_zeros(prompts).index_fill(0, chosen.to(mask.device), True)


LEARN = {"reward": ("trivet.toy.stories:gold",), "lr": 1e-3, "critic_lr": 1e-3}
PRESETS = {
    "toy": STORIES | LEARN | {"prompts_per_step": 16, "group_size": 8, "steps": 40},
    "arithmetic": ARITHMETIC
    | LEARN
    | {"reward": ("exact_match",), "group_size": 16, "beta": 0.03, "steps": 300},
}
