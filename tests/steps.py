"""One step of a recipe's own loop on given rollouts, rewards, reference and critic: its loss and its gradient."""

import copy
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trivet.batch import Example, Groups, Rollouts
from trivet.model.forward import token_logprobs
from trivet.recipes import offline, ppo_parts
from trivet.rewards.reward import WeightedSum
from trivet.step.optimizer import Optimizer
from trivet.step.run import Run

Gradient = dict[str, Tensor]


def gradient(model: Any) -> Gradient:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def lists(groups: Groups) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions as token ids."""
    prompts = [
        ids[mask].tolist() for ids, mask in zip(groups.prompts, groups.prompt_mask, strict=True)
    ]
    completions = [
        ids[mask].tolist() for ids, mask in zip(groups.completions, groups.present, strict=True)
    ]
    return prompts, completions


def examples(groups: Groups, rows: Sequence[dict[str, Any]] | None = None) -> list[Example]:
    """The groups as rows of data."""
    prompts, completions = lists(groups)
    size = groups.group_size
    parts = [completions[p * size : (p + 1) * size] for p in range(len(prompts))]
    rows = rows or [{} for _ in prompts]
    return [
        Example(
            prompt=prompt, completions=part, learned=[[True] * len(ids) for ids in part], row=row
        )
        for prompt, part, row in zip(prompts, parts, rows, strict=True)
    ]


def rollouts_of(groups: Groups, logprobs: Tensor, *, finished: bool = True) -> Rollouts:
    """The groups as if a policy with these log-probabilities had written them."""
    count = len(groups.completions)
    texts, rows = [""] * count, [{"prompt": ""} for _ in groups.prompts]
    return Rollouts(
        groups=groups,
        logprobs=logprobs.detach(),
        finished=torch.full((count,), finished),
        texts=texts,
        rows=rows,
    )


def recipe_step(
    recipe: Any,
    policy: Any,
    rows: list[Example],
    *,
    reference: Any = None,
    rollouts: Rollouts | None = None,
    rewards: Tensor | None = None,
    critic: Any = None,
    before: Any = None,
    microbatch_tokens: int = 90,
    **options: Any,
) -> list[tuple[float, Gradient]]:
    """[(loss, gradient)] of the first step of train(), the microbatches added up; in ppo the critic's follows the policy's.

    before: where the loop takes several passes over a batch, the policy of the first pass; `policy` is that of the second,
    whose loss and gradient are returned, so that the ratio is not 1.
    """
    config = recipe.Config(
        prompts_per_step=len(rows), microbatch_tokens=microbatch_tokens, **options
    )
    model, critic = copy.deepcopy(before or policy), copy.deepcopy(critic)
    losses, found, passes = list[tuple[float, int]](), list[tuple[float, Gradient]](), [0]
    backward = Tensor.backward

    def record(loss: Tensor) -> None:
        losses.append((float(loss.detach()), len(losses)))
        backward(loss)

    class Noted(Optimizer):
        def step(self) -> dict[str, float]:
            mine = set(map(id, self.parameters))
            trained = next(
                m
                for m in (model, critic)
                if m is not None and any(id(p) in mine for p in m.parameters())
            )
            passes[0] += trained is model
            if passes[0] == (1 if before is None else 2):
                values = [value for value, _ in losses]
                if critic is not None:  # policy and critic take turns
                    values = values[0::2] if trained is model else values[1::2]
                found.append((sum(values), gradient(trained)))
            if trained is model and before is not None:
                model.load_state_dict(policy.state_dict())
                losses.clear()
            trained.zero_grad()
            self.metrics = {"grad_norm": 0.0}
            return self.metrics

    class Given(Run):
        """A run whose rollouts, reference and optimizers are these."""

        def engine(self) -> Any:
            return self.holds(engine=SimpleNamespace(generate=lambda *given: rollouts))

        def reference(self) -> Any:
            return super().reference() if reference is None else self.holds(reference=reference)

        def optimizer(
            self, model: Any, *, updates: int = 1, lr: float | None = None, name: str = "optimizer"
        ) -> Any:
            return self.holds(**{name: Noted(model, self.config, updates, lr)})

        def order(self, done: int = 0) -> Any:  # in the order given
            return iter([(1, [replace(row, index=number) for number, row in enumerate(rows)])])

    run = Given(config=config, model=model, decode=lambda prompt, ids: "", stops=[0], train=rows, heldout=[],
                reward=WeightedSum({"r": lambda rollouts: rewards}, [1.0]), steps=1, device="cpu",
                generator=torch.Generator())  # fmt: skip

    def of_reference(run: Run, examples: Sequence[Example]) -> Tensor:
        return run.passes(
            token_logprobs, reference or run.model, offline.to_groups(examples, "cpu")
        ).sum(1)

    with ExitStack() as stack:
        fresh = stack.enter_context(
            tempfile.TemporaryDirectory()
        )  # no reference pass of an earlier run
        stack.enter_context(patch.dict(os.environ, XDG_CACHE_HOME=fresh))
        stack.enter_context(patch.object(Tensor, "backward", record))
        stack.enter_context(patch.object(offline, "completion_logprob", of_reference))
        stack.enter_context(patch.object(ppo_parts, "critic_from", lambda reward, policy: critic))
        next(recipe.train(config, run))
    return found
