"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so they are replaced
by groups of other prompts.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trivet.batch import Example, Rollouts, collate
from trivet.recipes.on_policy import rollout_metrics
from trivet.step.metrics import Tally

Group = tuple[Rollouts, Tensor, int]  # rollouts, their rewards (B,), the index of one prompt


class Refilling:
    """An engine and a reward in one, since what is sampled next depends on the rewards so far.

    generate() samples, scores, and up to `rounds` times samples other prompts to replace the groups
    that teach nothing; calling the object on those rollouts returns the rewards that they got.
    draw: returns the current step's random number generator.
    """

    def __init__(
        self,
        engine: Any,
        reward: Any,
        prompts: Sequence[Example],
        rounds: int,
        draw: Callable[[], random.Random],
    ):
        self.engine, self.reward = engine, reward
        self.prompts, self.rounds, self.draw = prompts, rounds, draw
        self.tally, self.rewards = Tally(), torch.empty(0)

    def generate(self, policy: Any, prompts: Sequence[Example], group_size: int) -> Rollouts:
        """Return rollouts of as many prompts as given, useful groups first."""
        rollouts = self.engine.generate(policy, prompts, group_size)
        draw, rounds = self.draw(), self.rounds
        rewards = self.reward(rollouts)  # (B,)
        self.tally = rollout_metrics(rollouts, rewards, self.reward)  # before any replacement
        useful, useless = _split_by_use(rollouts, rewards)
        while useless and rounds:
            others = self.engine.generate(
                policy, draw.choices(self.prompts, k=len(useless)), group_size
            )
            self.tally["tokens/generated"] += others.groups.present.sum()
            new = _split_by_use(others, self.reward(others))[0][: len(useless)]
            useful, useless, rounds = useful + new, useless[len(new) :], rounds - 1
        self.tally["dynamic_sampling/useful"] = len(useful) / len(rollouts.rows)
        rollouts, self.rewards = _concatenate(useful + useless)
        return rollouts

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """The rewards of the rollouts that generate() has just returned. (B,)"""
        return self.rewards

    def metrics(self) -> Tally:
        """The metrics of the prompts as given, before any were replaced; tokens/generated counts
        the replacements too.
        """
        return self.tally


def _split_by_use(rollouts: Rollouts, rewards: Tensor) -> tuple[list[Group], list[Group]]:
    """The groups in which two known rewards differ, and the others."""
    grouped, sides = rewards.view(len(rollouts.rows), -1), (list[Group](), list[Group]())
    differ = grouped.nan_to_num(-torch.inf).amax(1) > grouped.nan_to_num(torch.inf).amin(1)
    for p, informative in enumerate(differ.tolist()):
        sides[not informative].append((rollouts, rewards, p))
    return sides


def _concatenate(groups: Sequence[Group]) -> tuple[Rollouts, Tensor]:
    """Join these groups, whose tokens are all learned, into one Rollouts, with its rewards."""
    size, device = groups[0][0].groups.group_size, groups[0][0].logprobs.device
    of_row = [
        (rollouts, rewards, p * size + i) for rollouts, rewards, p in groups for i in range(size)
    ]
    prompts = [r.groups.prompts[p][r.groups.prompt_mask[p]].tolist() for r, _, p in groups]
    completions = [r.groups.completions[b][r.groups.present[b]].tolist() for r, _, b in of_row]
    rollouts = Rollouts(
        groups=collate(prompts, completions).to(device),
        logprobs=pad_sequence(
            [r.logprobs[b][r.groups.present[b]] for r, _, b in of_row], batch_first=True
        ),
        finished=torch.stack([r.finished[b] for r, _, b in of_row]),
        texts=[r.texts[b] for r, _, b in of_row],
        rows=[r.rows[p] for r, _, p in groups],
        versions=[r.versions[b] for r, _, b in of_row if r.versions],
    )
    return rollouts, torch.stack([rewards[b] for _, rewards, b in of_row])
