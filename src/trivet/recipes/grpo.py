"""GRPO: group relative policy optimization (Shao et al. 2024, DeepSeekMath), and its close
variants.

reward signal   any reward, one number per completion
generation      G completions per prompt, from the policy itself
optimization    policy gradient on the reward minus its group's mean, and a KL tie to the reference

    A_i = R_i - mean_j R_j
    L = mean over tokens of  -min(rho A_i, clip(rho, 1-eps, 1+eps) A_i) + beta KL(pi || pi_ref)

In the first epoch on a batch rho = pi / pi_old is 1, so the gradient is that of -A_i log pi; the
clip acts only with --epochs-per-batch above 1. Differs from the paper: no division by the group's
standard deviation unless asked (Dr. GRPO shows its bias), the mean is over all tokens of the step
(DAPO), and the KL term is k2, whose gradient is that of KL(pi || pi_ref); the paper's k3 has the
gradient of the other direction. The paper's own version is --preset deepseekmath; RLOO,
REINFORCE++, Dr. GRPO, DAPO, GSPO and CISPO are presets too (docs/methods.md).

    trivet grpo --model Qwen/Qwen3-0.6B --data questions.jsonl --reward last_number
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trivet.recipes.dynamic_sampling import Refilling
from trivet.recipes.grpo_variants import VARIANTS, check, objective_of, step_metrics
from trivet.recipes.objective import Objective
from trivet.recipes.on_policy import evaluate as evaluate  # launch calls it on held-out prompts
from trivet.recipes.on_policy import sampled_result
from trivet.step.options import SamplingOptions
from trivet.step.result import Result
from trivet.step.run import Run
from trivet.toy import ARITHMETIC, STORIES

ROWS, TRAINS = "prompts", "policy"  # the kind of rows, and the kind of model that is trained


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions):
    """Group relative policy optimization: policy gradient on the reward minus the mean of its
    group.
    """

    group_size: int = 8
    """Completions per prompt."""
    beta: float = 0.04
    """Weight of KL(pi || pi_ref); 0 keeps no reference."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Put the KL into the loss, or (RLOO, REINFORCE++) subtract it from each completion's
    reward.
    """
    kl_estimator: Literal["k2", "k3", "weighted-k3"] = "k2"
    """The KL term of the loss: k2 has the gradient of the KL, k3 (the paper) another one, and k3
    times the ratio again that of the KL.
    """
    baseline: Literal["group", "leave-one-out", "batch"] = "group"
    """What is subtracted from a reward: the mean of its group, of the others in its group (RLOO),
    or of the step (REINFORCE++).
    """
    scale_rewards: Literal["none", "group", "batch"] = "none"
    """Divide advantages by the standard deviation of the rewards in their group (the paper), or in
    the step.
    """
    loss: Literal["clip", "gspo", "cispo"] = "clip"
    """With several epochs per batch: clip each token's ratio, clip the completion's ratio (GSPO),
    or weight by the ratio (CISPO).
    """
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Average over the tokens of the step, over those of each completion first (the paper), or over
    a fixed length (Dr. GRPO).
    """
    epochs_per_batch: int = 1
    """Optimizer steps on each batch of completions; above 1, the ratio to the policy before the
    first of them is clipped.
    """
    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    clip_dual: float = 0.0
    """Clip the ratio at this value where the advantage is negative (dual clip; 3 in the paper); 0
    turns it off.
    """
    dynamic_sampling: int = 0
    """Rounds of sampling other prompts to replace groups whose rewards are all equal (DAPO)."""
    overlong_buffer: int = 0
    """Subtract up to 1 from the reward, rising linearly over this many tokens before
    --max-completion-tokens (DAPO).
    """

    def __post_init__(self) -> None:
        check(self)


def train(config: Config, run: Run, objective: Objective | None = None) -> Iterator[Result]:
    """Train run.model, one step at a time. objective: your own, in place of the one that the
    options choose.
    """
    policy, reward, engine = run.model, run.reward, run.engine()
    reference = run.reference() if config.beta else None
    optimizer = run.optimizer(policy, updates=config.epochs_per_batch)
    objective = objective or objective_of(config)
    if config.dynamic_sampling:
        engine = reward = Refilling(engine, reward, run.train, config.dynamic_sampling, run.draw)

    for _, prompts in run.batches():
        rollouts = engine.generate(policy, prompts, config.group_size)  # what does the policy say?
        rewards, mask = reward(rollouts), rollouts.groups.mask  # (B,) what is good?
        ref_logprobs = run.logprobs(reference, rollouts)  # (B, T)
        trace = run.trace(rollouts, by=policy if objective.charges_kl else None)
        advantages = objective.advantages(rewards, trace.start, ref_logprobs, mask)  # (B,)
        teaches = objective.teaches(advantages, config.group_size)  # (P,) groups with a gradient

        for _ in range(config.epochs_per_batch):  # how does the policy change?
            for rows, part in trace.microbatches(only=teaches):
                logprobs, old = trace.logprobs(policy, rows, part)  # (b, T) now, before updates
                loss = objective.policy_loss(logprobs, old, advantages[rows], part.mask)  # (b, T)
                loss = loss + objective.beta * objective.kl(logprobs, old, ref_logprobs[rows])
                objective.mean(trace.weights(rows, old) * loss, part.mask, mask).backward()
            optimizer.step()

        extra = step_metrics(config, trace, advantages, mask)
        yield sampled_result(rollouts, rewards, reward, ref_logprobs, trace, **extra)


PRESETS = {
    "toy": STORIES
    | {"reward": ("trivet.toy.stories:gold",), "prompts_per_step": 16, "lr": 1e-3, "steps": 40},
    "arithmetic": ARITHMETIC
    | {"reward": ("exact_match",), "group_size": 16, "beta": 0.03, "lr": 1e-3, "steps": 450},
    **VARIANTS,
}
