"""Find what in a run's metrics needs attention, why, and which option helps. These are pure
functions from options and lines of metrics to sentences.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 10  # steps to average over; a single step is too noisy


@dataclass(frozen=True)
class Warning:
    """What is wrong, the numbers that show it, and what to do about it (with the option's name)."""

    what: str
    reason: str
    help: str


def warnings(options: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> list[Warning]:
    """The warnings that apply at the end of these lines of metrics. "Now" is the mean of the last
    10 steps that have the metric.

    - KL running away: now above 0.5 nats per token, or above 10 nats per completion and over twice
      the 10 steps before.
    - Entropy collapsed: now below a fifth of the first 10 steps' entropy.
    - Equal groups: now over 0.8 of the groups have rewards that are all equal.
    - Cut completions: now over 0.25 of the completions end at the length limit.
    - Held-out reward: of at least 4 evaluations, the last two are, on average, lower than the best
      two in a row by over a tenth of the rewards' standard deviation, while the training reward has
      risen since by as much.
    - Clipping: now over half of the tokens have a clipped ratio.
    - Critic: now explains less than 0.1 of the returns' variance, and at most 0.05 more than in the
      first 10 steps.
    - Sampler: now differs from the learner by over 0.05 nats per token.
    - Skipped updates: any update whose gradient was not finite.
    """
    result: list[Warning] = []

    def add(what: str, reason: str, help: str) -> None:
        result.append(Warning(what, reason, help))

    kl, before = _now(metrics, "kl"), _mean(_values(metrics, "kl")[-2 * WINDOW : -WINDOW])
    length = _now(metrics, "completions/mean_length")
    leash = (
        "a larger --beta, or a smaller --lr"
        if options.get("beta")
        else "--beta above 0, or a smaller --lr"
    )
    if length > 0 and kl / length > 0.5:
        add(
            "KL is running away",
            f"{kl:.3g} nats per completion, {kl / length:.2f} per token (over 0.5)",
            leash,
        )
    elif kl > 10 and kl > 2 * before:
        add(
            "KL is running away",
            f"{kl:.3g} nats per completion; {before:.3g} in the {WINDOW} steps before",
            leash,
        )

    entropy, first = _now(metrics, "entropy"), _first(metrics, "entropy")
    if entropy < first / 5:
        reason = f"{entropy:.3g} nats per token, {first:.3g} in the first {WINDOW} steps: nearly "
        reason += "every sample is the same"
        add("Entropy has collapsed", reason, leash)

    equal = _now(metrics, "frac_reward_zero_std")
    if equal > 0.8:
        help = "a larger --group-size, or prompts that are neither always nor never solved"
        help += "; --dynamic-sampling replaces such groups" if "dynamic_sampling" in options else ""
        add(
            "Nearly all groups teach nothing",
            f"{equal:.0%} of the groups have rewards that are all equal",
            help,
        )

    cut = _now(metrics, "completions/clipped_ratio")
    if cut > 0.25:
        help = "a larger --max-completion-tokens"
        help += "; --overlong-buffer penalizes length" if "overlong_buffer" in options else ""
        add(
            "Completions are cut",
            f"{cut:.0%} of them end at the length limit, not with a stop token",
            help,
        )

    if reason := _heldout_falls(metrics):
        add(
            "Held-out reward falls while the training reward rises",
            reason,
            f"fewer --steps, or {leash}",
        )

    clipped = _now(metrics, "clip_ratio")
    if clipped > 0.5:
        help = "a smaller --lr, or fewer --epochs-per-batch"
        add(
            "Most tokens are clipped",
            f"{clipped:.0%} of the tokens have a clipped ratio and so no gradient",
            help,
        )

    explained, first = (
        _now(metrics, "value/explained_variance"),
        _first(metrics, "value/explained_variance"),
    )
    if explained < 0.1 and explained <= first + 0.05:
        reason = f"it explains {explained:.2f} of the returns' variance, {first:.2f} in the first "
        reason += f"{WINDOW} steps"
        add(
            "The critic does not learn",
            reason,
            "another --critic-lr (usually a larger one), or more --epochs-per-batch",
        )

    apart = _now(metrics, "sampling/logprob_difference/mean")
    if apart > 0.05:
        reason = f"log-probabilities of the same tokens differ by {apart:.2g} nats on average"
        elsewhere = options.get("generate_with") or options.get("vllm")
        causes = (
            "the server's --dtype and --logprobs-mode, a smaller --max-staleness, a smaller --lr"
        )
        add("Sampler and learner disagree", reason, causes if elsewhere else "--precision float32")

    if skipped := [line for line in metrics if line.get("skipped_updates")]:
        reason = f"the gradient was not finite in {len(skipped)} of {len(metrics)} steps, last in "
        reason += f"step {skipped[-1].get('step')}"
        add(
            "Updates were skipped",
            reason,
            "run trivet replay RUN/skipped/step-N to see where; then try a smaller --lr",
        )
    return result


def _values(metrics: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The numbers under this key, in order, without missing, null or non-finite ones."""
    values = (line.get(key) for line in metrics)
    return [
        float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)
    ]


def _mean(values: Sequence[float]) -> float:
    """The mean; NaN, for which every comparison is false, if there are no values."""
    return sum(values) / len(values) if values else math.nan


def _now(metrics: Sequence[dict[str, Any]], key: str) -> float:
    values = _values(metrics, key)
    return _mean(values[-WINDOW:]) if len(values) >= WINDOW else math.nan


def _first(metrics: Sequence[dict[str, Any]], key: str) -> float:
    values = _values(metrics, key)
    return _mean(values[:WINDOW]) if len(values) >= 2 * WINDOW else math.nan


def _heldout_falls(metrics: Sequence[dict[str, Any]]) -> str:
    """The reason, if held-out reward falls while the training reward rises; else ''."""
    at = [index for index, line in enumerate(metrics) if _values([line], "eval/reward")]
    held = _values(metrics, "eval/reward")
    if len(held) < 4:
        return ""
    pairs = [(a + b) / 2 for a, b in itertools.pairwise(held)]
    best = max(range(len(pairs)), key=pairs.__getitem__)
    then = _mean(_values(metrics[: at[best + 1] + 1], "reward")[-WINDOW:])
    fall, rise, scale = (
        pairs[best] - pairs[-1],
        _now(metrics, "reward") - then,
        _now(metrics, "reward_std") / 10,
    )
    if not (fall > scale and rise > scale):
        return ""
    step = metrics[at[best + 1]].get("step", at[best + 1] + 1)
    return (
        f"held-out {pairs[best]:.3g} around step {step}, now {pairs[-1]:.3g}; training reward "
        f"{then:.3g}, now {then + rise:.3g}"
    )
