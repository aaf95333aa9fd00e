"""Trivet's side: the recipe's own loop on a Run made by hand, so that both sides see the same ids in the same order."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import workloads
from torch import Tensor

from trivet.batch import Example, Rollouts
from trivet.generation.engine import Engine
from trivet.model.load import load_policy, load_scorer
from trivet.model.text import decode_completion, load_tokenizer
from trivet.recipes.offline import ReferenceTable
from trivet.rewards.reward import WeightedSum
from trivet.runner.prepare import microbatch_that_fits
from trivet.step import run as step_run
from trivet.step import trace
from trivet.step.optimizer import Optimizer
from trivet.step.run import Run

Step = dict[
    str, Any
]  # seconds, lengths of the sampled completions where there are any, and seconds of each part


def steps(
    method: str, size: str, lengths: str, count: int, precision: str, microbatch: int
) -> Iterator[tuple[Step, list[workloads.Row]]]:
    """Take `count` steps; yield each as it is done, with its rows."""
    recipe = import_module(f"trivet.recipes.{method.replace('-', '_')}")
    folder, sampling = str(workloads.model_folder(size)), method in ("grpo", "ppo")
    options: dict[str, Any] = {
        "prompts_per_step": workloads.EXAMPLES,
        "precision": precision,
        "lr": 1e-5,
    }
    options["microbatch_tokens"] = microbatch or microbatch_that_fits(workloads.DEVICE)
    if sampling:
        options |= {
            "group_size": workloads.COMPLETIONS,
            "max_completion_tokens": workloads.ROOM[size],
            "beta": workloads.BETA,
        }
    if method == "ppo":
        options |= {"epochs_per_batch": 1, "minibatches": 1}
    config = recipe.Config(**options)
    model = (load_scorer if method == "reward-model" else load_policy)(
        folder, device=workloads.DEVICE, precision=precision
    )
    if sampling:
        workloads.set_lengths(model, lengths)
    tokenizer = load_tokenizer(folder)
    data = workloads.load_rows(method, tokenizer, count * workloads.EXAMPLES, size)
    examples = [replace(as_example(row), index=number) for number, row in enumerate(data)]
    reward = LetterReward(workloads.letter_table(tokenizer, model.config.vocab_size))
    run = Run(
        config=config,
        model=model,
        decode=partial(decode_completion, tokenizer),
        stops=[workloads.EOS],
        train=examples,
        heldout=[],
        reward=WeightedSum({"letters": reward}, [1.0]) if sampling else None,
        steps=count,
        device=workloads.DEVICE,
        generator=torch.Generator(workloads.DEVICE).manual_seed(0),
    )
    batches = [(k + 1, examples[8 * k : 8 * k + 8]) for k in range(count)]
    run.order = lambda done=0: iter(batches)  # type: ignore[method-assign]  in this order
    spent: dict[str, float] = {}
    with (
        timed_parts(recipe, spent),
        TemporaryDirectory() as fresh,
        patch.dict(os.environ, XDG_CACHE_HOME=fresh),
    ):
        began = time.perf_counter()
        for k, _ in enumerate(recipe.train(config, run)):
            workloads.wait()
            step = {
                "seconds": time.perf_counter() - began,
                "lengths": reward.lengths,
                "parts": dict(spent),
            }
            yield step, data[8 * k : 8 * k + 8]
            spent.clear()
            began = time.perf_counter()


def as_example(row: workloads.Row) -> Example:
    """The row in ids, every completion token learned."""
    completions = [list(ids) for ids in row.completion_ids]
    learned = [[True] * len(ids) for ids in completions]
    return Example(
        prompt=row.prompt_ids, completions=completions, learned=learned, row={"prompt": row.prompt}
    )


class LetterReward:
    """Share of the completion's tokens that hold the letter e, of 128. Remembers how long the completions were."""

    def __init__(self, table: Tensor):
        self.table, self.lengths = table, None

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """(B,) float32."""
        groups = rollouts.groups
        self.lengths = groups.present.sum(1).tolist()
        return (self.table[groups.completions] * groups.present).sum(1)


def timed_parts(recipe: Any, spent: dict[str, float]) -> ExitStack:
    """Within it, the seconds of each part of a step add up in `spent`; a part inside another one counts as that one."""
    inside = list[str]()

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if inside:
                return function(*arguments, **options)
            began = time.perf_counter()
            inside.append(name)
            result = function(*arguments, **options)
            inside.pop()
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    parts = [
        ("backward", Tensor, "backward"),
        ("optimizer", Optimizer, "step"),
        ("reward", WeightedSum, "__call__"),
    ]
    parts += [("generation", Engine, "generate"), ("no-grad passes", step_run, "in_microbatches")]
    parts += [("forward", trace, name) for name in ("token_logprobs", "scores")]
    parts += [("forward", recipe, "values")] if hasattr(recipe, "values") else []  # of PPO's critic
    parts += [("reference table", ReferenceTable, "__init__")]
    stack = ExitStack()
    for name, owner, attribute in parts:
        stack.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
    return stack
