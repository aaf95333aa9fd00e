"""What a recipe's loop finds around it: the examples, the model, a random generator, the optimizer."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trivet.batch import Example
from trivet.run import Metrics
from trivet.run.options import Options
from trivet.timing import timed

Pair = tuple[Tensor, Tensor]  # (sum, count) of a mean: parts of a step, and ranks, are added up before the division
Tally = dict[str, Any]  # metrics before that: numbers, scalar tensors, pairs


def mean(x: Tensor, mask: Tensor | None = None) -> Pair:
    """The pair of a mean over the entries that the mask keeps and that are known (not NaN)."""
    counted = ~x.isnan() if mask is None else mask & ~x.isnan()
    return torch.where(counted, x, 0).sum(), counted.sum()


def reduced(metrics: Mapping[str, Any]) -> Metrics:
    """Numbers from numbers, scalar tensors and pairs; a pair without entries is NaN. Reads the device once."""
    parts = {name: value if isinstance(value, tuple) else (value,) for name, value in metrics.items()}
    tensors = [x.detach().reshape(1) for part in parts.values() for x in part if isinstance(x, Tensor)]
    read: Iterator[float] = iter(torch.cat(tensors).tolist() if tensors else ())
    known = {name: [next(read) if isinstance(x, Tensor) else x for x in part] for name, part in parts.items()}
    return {name: part[0] / (part[1] or math.nan) if part[1:] else part[0] for name, part in known.items()}


@dataclass(kw_only=True)
class Run:
    """One run in memory; run.launch makes it from a Config, and keeps its record on disk."""

    config: Options
    model: Any  # what is trained, and saved at the end: a policy, or a reward model
    decode: Callable[[Sequence[int], Sequence[int]], str]  # (prompt ids, completion ids) -> the completion's text
    stops: Sequence[int]  # ids that end a completion
    train: Sequence[Example]
    heldout: list[Example]
    reward: Any = None  # rewards.reward.WeightedSum, where the recipe samples
    steps: int
    device: str
    generator: torch.Generator
    note: Callable[[str], None] = lambda text: None  # a line for whoever watches
    keep: Callable[..., None] = lambda *args, **kwargs: None  # run.record.Record.keep: completions, for whoever looks
    keeps: Callable[[int], bool] = lambda step: False  # whether this step's tokens are kept too
    engine: Callable[[Any], Any] = lambda engine: engine  # run.servers: what generates in its place
    refill: Any = None  # run.dynamic_sampling.refill: other prompts for groups that teach nothing
    shares: Callable[..., None] = lambda *filled: None  # run.ranks: what a loop over microbatches fills by row
    holds: Callable[..., None] = lambda **parts: None  # run.checkpoints: what the recipe has made for its loop, by name
    done: int = 0  # steps that an earlier process has taken

    def batches(self) -> Iterator[tuple[int, list[Example]]]:
        """(step, examples) for every step that is left, in an order shuffled anew each epoch; the same at every call."""
        rows = shuffled(len(self.train), random.Random(self.config.seed).randrange)
        for step in range(1, self.steps + 1):
            numbers = [next(rows) for _ in range(self.config.prompts_per_step)]
            if step > self.done:
                yield step, [self.train[number] for number in numbers]

    def evaluates(self, step: int) -> bool:
        """Whether this step ends with an evaluation: the last one does, and every eval_every-th."""
        return bool(self.heldout) and (step == self.steps or step % (self.config.eval_every or self.steps) == 0)


def shuffled(n: int, draw: Callable[[int], int]) -> Iterator[int]:
    """Every number below n once, in an order drawn as it goes (Fisher-Yates, holding only what was moved); then anew."""
    for moved in iter(dict[int, int], None):  # an epoch
        for last in range(n - 1, -1, -1):
            yield moved.get(i := draw(last + 1), i)
            moved[i] = moved.pop(last, last)


class Optimizer:
    """AdamW with warm-up, linear decay if asked for, and a limit on the gradient's norm."""

    def __init__(self, model: Any, config: Options, steps: int, lr: float | None = None):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.parameters, lr=config.lr if lr is None else lr, weight_decay=0, fused=True)
        self.max_grad_norm, warmup = config.max_grad_norm, config.warmup_steps

        def scale(done: int) -> float:
            fall = max(0.0, 1 - done / steps) if config.lr_decay else 1.0
            return min(1.0, (done + 1) / (warmup + 1)) * fall

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, scale)
        self.skipped = 0  # steps that were not taken

    @timed("optimizer")
    def step(self) -> Metrics:
        """Take the step if the gradient is finite, clear it; returns its norm before clipping, and the learning rate."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        lr = float(self.schedule.get_last_lr()[0])
        if math.isfinite(norm):
            self.adamw.step()
            torch.autograd.graph.increment_version(self.parameters)  # the fused step forgets; casts are kept by version
            self.schedule.step()
        self.skipped += not math.isfinite(norm)
        self.adamw.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": lr}
