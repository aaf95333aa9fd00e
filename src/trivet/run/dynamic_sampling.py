"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so other prompts take their place."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trivet.batch import Rollouts, collate
from trivet.generation.engine import Engine
from trivet.run.loop import Run, Tally

Group = tuple[Rollouts, Tensor, int]  # rollouts, their rewards (B,), and the number of one prompt in them


def refill(
    run: Run, rollouts: Rollouts, rewards: Tensor, step: int, engine: Engine, rounds: int, metrics: Tally
) -> tuple[Rollouts, Tensor]:
    """Rollouts and rewards of as many prompts, with groups that teach in place of groups that do not, as far as `rounds`
    more samplings find them. The prompts drawn depend on seed, step and round alone. Adds to metrics what it cost."""
    size, draw = rollouts.groups.group_size, random.Random(f"{run.config.seed} {step}")
    useful, useless = _apart(rollouts, rewards)
    while useless and rounds:
        others, rounds = engine.generate(run.model, draw.choices(run.train, k=len(useless)), size), rounds - 1
        metrics["tokens/generated"] += others.groups.present.sum()
        found = _apart(others, run.reward(others))[0][: len(useless)]
        useful, useless = useful + found, useless[len(found) :]
    metrics["dynamic_sampling/useful"] = len(useful) / len(rollouts.rows)
    return _together(useful + useless)


def _apart(rollouts: Rollouts, rewards: Tensor) -> tuple[list[Group], list[Group]]:
    """Groups in which two known rewards differ, and the others."""
    grouped, sides = rewards.view(len(rollouts.rows), -1), (list[Group](), list[Group]())
    differ = grouped.nan_to_num(-torch.inf).amax(1) > grouped.nan_to_num(torch.inf).amin(1)
    for p, informative in enumerate(differ.tolist()):
        sides[not informative].append((rollouts, rewards, p))
    return sides


def _together(groups: Sequence[Group]) -> tuple[Rollouts, Tensor]:
    """These groups, whose tokens are all learned, as one."""
    size, device = groups[0][0].groups.group_size, groups[0][0].logprobs.device
    of_row = [(rollouts, rewards, p * size + i) for rollouts, rewards, p in groups for i in range(size)]
    prompts = [r.groups.prompts[p][r.groups.prompt_mask[p]].tolist() for r, _, p in groups]
    completions = [r.groups.completions[b][r.groups.present[b]].tolist() for r, _, b in of_row]
    rollouts = Rollouts(
        groups=collate(prompts, completions).to(device),
        logprobs=pad_sequence([r.logprobs[b][r.groups.present[b]] for r, _, b in of_row], batch_first=True),
        finished=torch.stack([r.finished[b] for r, _, b in of_row]),
        texts=[r.texts[b] for r, _, b in of_row],
        rows=[r.rows[p] for r, _, p in groups],
        versions=[r.versions[b] for r, _, b in of_row if r.versions],
    )
    return rollouts, torch.stack([rewards[b] for _, rewards, b in of_row])
