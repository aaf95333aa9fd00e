"""What a recipe's loop finds around it: the examples, the model, a random generator, the optimizer."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example, Rollouts
from trivet.errors import InputError
from trivet.run.options import Options

Metrics = dict[str, float]


@dataclass(kw_only=True)
class Run:
    """One run in memory; run.launch makes it from a Config, and keeps its record on disk."""

    config: Options
    model: Any  # what is trained, and saved at the end: a policy, or a reward model
    decode: Callable[[Sequence[int], Sequence[int]], str]  # (prompt ids, completion ids) -> the completion's text
    stops: Sequence[int]  # ids that end a completion
    train: list[Example]
    heldout: list[Example]
    reward: Any = None  # rewards.reward.WeightedSum, where the recipe samples
    steps: int
    device: str
    generator: torch.Generator
    note: Callable[[str], None] = lambda text: None  # a line for whoever watches
    samples: list[dict[str, Any]] = field(default_factory=list)  # for samples.jsonl

    def batches(self) -> Iterator[tuple[int, list[Example]]]:
        """(step, examples) for every step from 1, in an order shuffled anew each epoch; the same at every call."""
        order = random.Random(self.config.seed)
        queue: list[Example] = []
        for step in range(1, self.steps + 1):
            while len(queue) < self.config.prompts_per_step:
                queue += order.sample(self.train, len(self.train))
            yield step, queue[: self.config.prompts_per_step]
            del queue[: self.config.prompts_per_step]

    def evaluates(self, step: int) -> bool:
        """Whether this step ends with an evaluation: the last one does, and every eval_every-th."""
        every = self.config.eval_every
        return bool(self.heldout) and (step == self.steps or (every > 0 and step % every == 0))

    def keep_samples(self, step: int, rollouts: Rollouts, rewards: Tensor, most: int = 4) -> None:
        """Note the first few completions of a step."""
        size = rollouts.groups.group_size
        for b, text in enumerate(rollouts.texts[:most]):
            kept = {"step": step, "prompt": rollouts.rows[b // size].get("prompt"), "completion": text}
            self.samples.append(kept | {"reward": float(rewards[b]), "finished": bool(rollouts.finished[b])})


class Optimizer:
    """AdamW with warm-up, linear decay if asked for, and a limit on the gradient's norm."""

    def __init__(self, model: Any, config: Options, steps: int, lr: float | None = None):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        lr = config.lr if lr is None else lr
        self.adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)
        self.max_grad_norm, warmup = config.max_grad_norm, config.warmup_steps

        def scale(done: int) -> float:
            fall = max(0.0, 1 - done / steps) if config.lr_decay else 1.0
            return min(1.0, (done + 1) / (warmup + 1)) * fall

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, scale)

    def step(self) -> Metrics:
        """Take the step, clear the gradients; returns the gradient's norm before clipping, and the learning rate."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        if not math.isfinite(norm):
            raise InputError("the gradient is not finite: lower --lr, or check the weights of --model and the rewards")
        lr = float(self.schedule.get_last_lr()[0])
        self.adamw.step()
        torch.autograd.graph.increment_version(self.parameters)  # the fused step forgets; casts are kept by version
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": lr}
