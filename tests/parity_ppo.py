"""PPO against TRL 1.12.0, the last release that had it; run by parity.py in a process that finds that release first.

Their train() runs as it is, on given completions, scores and sampling log-probabilities, up to its first backward. Known
deviations, each stated where it is undone:
- the score: theirs is paid one token after EOS, ours on EOS. Completions without EOS have no such token and agree as they are;
  those with one agree once our mask is given that token too.
- whitening rewards: theirs puts the mean back unscaled, so the unit of the reward matters; ours only scales.
"""

import copy
import json
import math
import sys
import tempfile
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoTokenizer

from parity import POLICY as MODEL
from parity import REFERENCE, difference, moved, scorer
from steps import gradient, recipe_step, rollouts_of
from trivet.batch import Example, collate
from trivet.model.forward import token_logprobs
from trivet.model.scalar import values
from trivet.optimization import (
    clipped_surrogate_loss,
    clipped_value_loss,
    gae,
    k1,
    k3,
    token_mean,
    whiten,
)
from trivet.recipes import ppo, ppo_parts
from trivet.rewards.shaping import kl_charged_rewards
from trivet.toy import STORIES

TOKENIZER = AutoTokenizer.from_pretrained(STORIES["model"])
TOKENIZER.padding_side = "left"
PAD, EOS = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
OLD, CRITIC = moved(MODEL, 4, 0.05), scorer()
ROWS, LENGTH = 8, 6
DRAW = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(5, 60, (n,), generator=DRAW).tolist() for n in (3, 5, 2, 4, 6, 3, 1, 5)]
WHOLE = torch.randint(5, 60, (ROWS, LENGTH), generator=DRAW).tolist()
ENDED = [[*ids[:n], EOS] for ids, n in zip(WHOLE, (2, 4, 3, 1, 4, 2, 3, 4), strict=True)]
SCORES = torch.randn(ROWS, generator=DRAW)


class Stop(Exception):  # noqa: N818
    """Their loop has made its first loss."""


def their_step(completions: list[list[int]], **options: Any) -> dict[str, Any]:
    """What their train() computes up to its first backward: advantages before whitening, both losses, both gradients."""
    from accelerate import Accelerator
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy, critic = copy.deepcopy(MODEL), copy.deepcopy(CRITIC)
    args = PPOConfig(
        output_dir=tempfile.gettempdir() + "/trivet-parity", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        per_device_train_batch_size=ROWS, num_mini_batches=1, total_episodes=ROWS, num_ppo_epochs=1, response_length=LENGTH,
        temperature=1.0, vf_coef=1.0, num_sample_generations=0, local_rollout_forward_batch_size=ROWS,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    data = Dataset.from_list([{"input_ids": ids} for ids in PROMPTS])
    judge = scorer()
    trainer = PPOTrainer(
        args=args, processing_class=TOKENIZER, model=policy, ref_model=copy.deepcopy(REFERENCE), reward_model=judge,
        train_dataset=data, value_model=critic,
    )  # fmt: skip
    seen: dict[str, Any] = {"means": []}
    get_reward, masked_whiten, masked_mean = (
        ppo_trainer.get_reward,
        ppo_trainer.masked_whiten,
        ppo_trainer.masked_mean,
    )

    def order(queries: Tensor) -> list[int]:
        return [PROMPTS.index([t for t in row if t != PAD]) for row in queries.tolist()]

    def generate(model: Any, queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen["order"] = order(queries)
        rows = [completions[i] + [PAD] * (LENGTH - len(completions[i])) for i in seen["order"]]
        whole = torch.cat([queries, torch.tensor(rows)], 1)
        attention = whole != PAD
        positions = attention.cumsum(1) - attention.long()
        ids = whole.masked_fill(~attention, 0)
        logits = OLD(ids, attention_mask=attention.long(), position_ids=positions).logits
        return whole, logits[:, queries.shape[1] - 1 : -1]

    def reward(model: Any, whole: Tensor, pad: int, context: int) -> Any:
        if model is judge:
            return None, SCORES[seen["order"]].clone(), None
        seen["values"] = get_reward(model, whole, pad, context)[0][:, context - 1 : -1, 0]
        return get_reward(model, whole, pad, context)

    def record_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        if shift_mean:
            seen["advantages"] = x.clone()
        return masked_whiten(x, mask, shift_mean)

    def record_mean(x: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
        mean = masked_mean(x, mask, axis)
        if x.requires_grad:
            seen["means"].append(float(mean.detach()))
        return mean

    def backward(accelerator: Any, loss: Tensor) -> None:
        loss.backward()
        raise Stop

    with (
        patch.object(ppo_trainer, "batch_generation", generate), patch.object(ppo_trainer, "get_reward", reward),
        patch.object(ppo_trainer, "masked_whiten", record_whiten), patch.object(ppo_trainer, "masked_mean", record_mean),
        patch.object(Accelerator, "backward", backward),
        suppress(Stop),
    ):  # fmt: skip
        trainer.train()
    value_loss, policy_loss = 0.5 * seen["means"][0], seen["means"][1]
    back = torch.tensor(seen["order"]).argsort()
    return {
        "policy": (policy_loss, gradient(policy)),
        "value": (value_loss, gradient(critic)),
        "advantages": seen["advantages"][back],
        "values": seen["values"][back],
    }


def our_step(completions: list[list[int]], finished: bool, **options: Any) -> dict[str, Any]:
    """Our recipe's own loop up to its first optimizer steps."""
    groups, seen = collate(PROMPTS, completions), dict[str, Any]()

    def whitened(x: Tensor, mask: Tensor) -> Tensor:
        seen["advantages"] = x
        return whiten(x, mask)

    rows = [Example(prompt=ids, completions=[], learned=[], row={}) for ids in PROMPTS]
    with patch.object(ppo_parts, "whiten", whitened):
        seen["policy"], seen["value"] = recipe_step(
            ppo, MODEL, rows, reference=REFERENCE, critic=CRITIC, rewards=SCORES, group_size=1, epochs_per_batch=1,
            rollouts=rollouts_of(groups, token_logprobs(OLD, groups), finished=finished), **{"beta": 0.05, **options},
        )  # fmt: skip
    return seen


def with_the_mean_put_back(x: Tensor, mask: Tensor) -> Tensor:
    """Their whitening of rewards, made of ours."""
    return torch.where(mask, whiten(x, mask) + token_mean(x, mask), 0.0)


def compare(name: str, mine: dict[str, Any], their: dict[str, Any]) -> list[Any]:
    gap = float((mine["advantages"] - their["advantages"]).norm() / their["advantages"].norm())
    rows: list[Any] = [
        (
            "ppo",
            f"{name}: GAE",
            float(mine["advantages"].mean()),
            float(their["advantages"].mean()),
            gap,
            0.0,
        )
    ]
    for part in ("policy", "value"):
        rows.append(
            (
                "ppo",
                f"{name}: {part}",
                mine[part][0],
                their[part][0],
                *difference(mine[part], their[part]),
            )
        )
    return rows


def one_token_late() -> list[Any]:
    """Completions that end by themselves. Given the token after EOS, where they pay the score, our functions give their
    advantages and losses; without it, on EOS itself, other ones."""
    their, groups = their_step(ENDED, stop_token="eos", kl_coef=0.05), collate(PROMPTS, ENDED)
    wide = collate(
        PROMPTS, [[*ids, PAD] for ids in ENDED]
    )  # one token more; which one the value before it can't see
    policy, critic, late = copy.deepcopy(MODEL), copy.deepcopy(CRITIC), wide.mask

    def placed(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, late.shape[1] - x.shape[1]))

    own = placed(groups.mask)

    old, ref = (placed(token_logprobs(model, groups).detach()) for model in (OLD, REFERENCE))
    old_values = values(critic, wide).detach()
    rewards = kl_charged_rewards(SCORES, k1(old, ref), late, beta=0.05)
    advantages, returns = gae(rewards, old_values, late, gamma=1.0, lam=0.95)
    on_eos, _ = gae(
        kl_charged_rewards(SCORES, k1(old, ref), own, beta=0.05),
        old_values,
        own,
        gamma=1.0,
        lam=0.95,
    )
    their["advantages"] = their["advantages"][:, : late.shape[1]]
    assert (on_eos - their["advantages"]).abs()[own].max() > 1e-2, (
        "then there is no deviation to state"
    )
    logprobs = placed(token_logprobs(policy, groups))
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    policy_loss = token_mean(
        clipped_surrogate_loss(logprobs, old, whiten(advantages, own), **clip), own
    )
    policy_loss.backward()
    value_loss = token_mean(
        clipped_value_loss(values(critic, wide), old_values, returns, clip=0.2), late
    )
    value_loss.backward()
    mine = {
        "advantages": advantages,
        "policy": (float(policy_loss.detach()), gradient(policy)),
        "value": (float(value_loss.detach()), gradient(critic)),
    }
    return compare("score after EOS", mine, their)


def table() -> list[Any]:
    """(method, variant, our loss, theirs, relative difference of loss, of gradient) of every variant."""
    rows = compare("k1", our_step(WHOLE, True), their_step(WHOLE, kl_coef=0.05))
    with patch.object(ppo, "k1", k3):
        rows += compare(
            "k3", our_step(WHOLE, True), their_step(WHOLE, kl_coef=0.05, kl_estimator="k3")
        )
    tight = {"gamma": 0.9, "lam": 0.7, "clip_low": 0.05, "clip_high": 0.05, "value_clip": 0.01}
    theirs = {"gamma": 0.9, "lam": 0.7, "cliprange": 0.05, "cliprange_value": 0.01, "kl_coef": 0.05}
    rows += compare("tight clips", our_step(WHOLE, True, **tight), their_step(WHOLE, **theirs))
    theirs = {"missing_eos_penalty": 1.5, "kl_coef": 0.05}
    rows += compare(
        "missing EOS", our_step(WHOLE, False, missing_eos_penalty=1.5), their_step(WHOLE, **theirs)
    )
    with patch.object(ppo_parts, "scale_to_unit_variance", with_the_mean_put_back):
        mine = our_step(WHOLE, True, whiten_rewards=True)
    rows += compare("whitened rewards", mine, their_step(WHOLE, kl_coef=0.05, whiten_rewards=True))
    return rows + one_token_late()


if __name__ == "__main__":
    import trl

    assert trl.__version__ == "1.12.0", trl.__version__
    sys.stdout, real = sys.stderr, sys.stdout
    rows = table()
    assert all(math.isfinite(x) for row in rows for x in row[2:])
    print(json.dumps(rows), file=real)
