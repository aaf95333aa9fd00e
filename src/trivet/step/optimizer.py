"""AdamW with a schedule and gradient clipping; a step whose gradient is not finite is skipped."""

import math
from typing import Any

import torch

from trivet.step import Metrics
from trivet.step.devices import Devices, OneProcess
from trivet.step.options import Options
from trivet.timing import timed


class Optimizer:
    """AdamW with warm-up, optional linear decay, and a limit on the norm of the gradient.

    steps: the length of the schedule. skipped: the number of steps that were skipped because their
    gradient was not finite; `bad` then lists the affected parameters of the last one, (name,
    entries that are not finite, entries).
    """

    def __init__(
        self,
        model: Any,
        config: Options,
        steps: int,
        lr: float | None = None,
        devices: Devices | None = None,
    ):
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named]
        self.devices = devices or OneProcess()
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=config.lr if lr is None else lr, weight_decay=0, fused=True
        )
        self.max_grad_norm, warmup = config.max_grad_norm, config.warmup_steps

        def scale(done: int) -> float:
            fall = max(0.0, 1 - done / steps) if config.lr_decay else 1.0
            return min(1.0, (done + 1) / (warmup + 1)) * fall

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, scale)
        self.skipped = 0
        self.bad = list[tuple[str, int, int]]()
        self.metrics = Metrics()

    @timed("optimizer")
    def step(self) -> Metrics:
        """Take the step if the gradient is finite, and clear the gradient; return its norm before
        clipping, and the learning rate.
        """
        norm = self.devices.clip_grad_norm(self.parameters, self.max_grad_norm).item()
        self.metrics = {"grad_norm": norm, "lr": float(self.schedule.get_last_lr()[0])}
        if math.isfinite(norm):
            self.adamw.step()
            # the fused step does not do this, and cached casts are looked up by version
            torch.autograd.graph.increment_version(self.parameters)
            self.schedule.step()
        else:
            self.skipped += 1
            self.bad = self._not_finite() or self.bad
        self.adamw.zero_grad(set_to_none=True)
        return self.metrics

    def _not_finite(self) -> list[tuple[str, int, int]]:
        named = [(name, p) for name, p in self.named if p.grad is not None]
        counts = self.devices.count_not_finite([p.grad for _, p in named])
        return [(name, n, p.numel()) for (name, p), n in zip(named, counts, strict=True) if n]

    def state(self) -> dict[str, Any]:
        """What a checkpoint saves."""
        return {"adamw": self.adamw.state_dict(), "schedule": self.schedule.state_dict()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.adamw.load_state_dict(state["adamw"])
        self.set_schedule(state["schedule"])

    def set_schedule(self, state: dict[str, Any]) -> None:
        """Restore the position of the schedule, but keep the learning rate of the config, which may
        have been lowered since.
        """
        base = self.schedule.base_lrs
        self.schedule.load_state_dict(state)
        self.schedule.base_lrs = base
        for group, lr, scale in zip(
            self.adamw.param_groups, base, self.schedule.lr_lambdas, strict=True
        ):
            group["initial_lr"], group["lr"] = lr, lr * scale(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in self.adamw.param_groups]
