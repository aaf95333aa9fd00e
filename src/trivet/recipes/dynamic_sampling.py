"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so other prompts take their place."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trivet.batch import Example, Rollouts, collate
from trivet.recipes.on_policy import rollout_metrics
from trivet.step.metrics import Tally

Group = tuple[Rollouts, Tensor, int]  # rollouts, their rewards (B,), and the number of one prompt in them


class Refilling:
    """An engine and a reward in one, since what is sampled depends on what was rewarded.

    generate() samples, scores, and samples other prompts up to `rounds` times for the groups that teach nothing; called with those
    rollouts it returns the rewards that they have got. draw: the random numbers of the step that is being taken.
    """

    def __init__(
        self, engine: Any, reward: Any, prompts: Sequence[Example], rounds: int, draw: Callable[[], random.Random]
    ):
        self.engine, self.reward, self.prompts, self.rounds, self.draw = engine, reward, prompts, rounds, draw
        self.tally, self.rewards = Tally(), torch.empty(0)

    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Rollouts of as many prompts, useful groups first."""
        rollouts, draw, rounds = self.engine.generate(policy, prompts, group_size), self.draw(), self.rounds
        rewards = self.reward(rollouts)  # (B,)
        self.tally = rollout_metrics(rollouts, rewards, self.reward)  # of the prompts as they came
        useful, useless = _apart(rollouts, rewards)
        while useless and rounds:
            others = self.engine.generate(policy, draw.choices(self.prompts, k=len(useless)), group_size)
            self.tally["tokens/generated"] += others.groups.present.sum()
            found = _apart(others, self.reward(others))[0][: len(useless)]
            useful, useless, rounds = useful + found, useless[len(found) :], rounds - 1
        self.tally["dynamic_sampling/useful"] = len(useful) / len(rollouts.rows)
        rollouts, self.rewards = _together(useful + useless)
        return rollouts

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """The rewards of what generate() has just returned. (B,)"""
        return self.rewards

    def metrics(self) -> Tally:
        """Of the prompts as they came, before others took the place of some; tokens/generated counts all."""
        return self.tally


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
