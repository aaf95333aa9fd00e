"""Print a run's progress: the data report, one live line (plain lines without a terminal), and a
table at the end.
"""

import os
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trivet.errors import InputError
from trivet.report.warnings import warnings
from trivet.runner.memory import peak_memory
from trivet.runner.prepare import Launch
from trivet.step import Metrics
from trivet.store.reading import read_metrics

# a tie counts as wrong in these; before anything is learned, all pairs are tied
ACCURACIES = ("accuracy", "rewards/accuracies")
LIVE_METRICS = {
    "reward": "reward",
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "kl": "KL",
    "completions/mean_length": "length",
}
# shown in the table at the end: at the first step, at the last, and held out
SUMMARY_METRICS = (*LIVE_METRICS, "rewards/margins", "margin", "entropy", "grad_norm")


class Screen(Console):
    """Stops printing when stdout is gone (closed terminal, `| head`, full disk) instead of ending
    the run.
    """

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Discard all further output to stdout, by anyone; rich would end the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class Terminal:
    """Follows one run; pass it to launch. brief: print only the progress line."""

    def __init__(self, *, brief: bool = False) -> None:
        self.brief = brief
        self.console = Screen(
            highlight=False, force_terminal=False if os.environ.get("CI") else None
        )
        self.progress: Progress | None = None
        self.last_print, self.tokens, self.evaluating = 0.0, 0.0, 0.0
        self.first = Metrics()

    def __call__(self, launched: Launch, step: int, metrics: Metrics) -> None:
        if step == 0:
            self._begin(launched)
            return
        run = launched.run
        line = "  ".join(
            f"{name} {metrics[key]:.3g}" for key, name in LIVE_METRICS.items() if key in metrics
        )
        left = ""
        # the first step includes one-time work such as a reference pass, so it has no speed
        if not self.first:
            self.first = metrics
        else:
            self.tokens += metrics.get("tokens/generated", 0) + metrics.get("tokens/trained", 0)
            self.evaluating += metrics.get("time/evaluation", 0)
            spent = max(1e-9, metrics["seconds"] - self.first["seconds"])
            line += f"  {self.tokens / max(1e-9, spent - self.evaluating):,.0f} tokens/s"
            remaining = (run.steps - step) * spent / (step - self.first["step"])
            left = f"  {_minutes(remaining)} left"
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=step, numbers=line)
        elif step == run.steps or time.monotonic() - self.last_print > 5:
            self.console.print(f"step {step}/{run.steps}  {line}{left}", soft_wrap=True)
            self.last_print = time.monotonic()
        if step == run.steps:
            self.close()
            if not self.brief:
                rows: list[dict[str, Any]] = [dict(self.first)]
                # an edited metrics.jsonl must not keep the model from being saved
                with suppress(InputError, OSError):
                    rows = read_metrics(launched.out) or rows
                self.console.print(_summary(rows[0], metrics))
                peak = f"peak memory {peak_memory(run.device) / 2**20:,.0f} MiB"
                duration = _minutes(metrics["seconds"])
                self.console.print(f"  {run.steps} steps in {duration} · {peak}")
                for warning in warnings(asdict(launched.config), rows):
                    line = f"  [yellow]{escape(warning.what)}[/yellow]: "
                    line += f"{escape(warning.reason)}; {escape(warning.help)}"
                    self.console.print(line, soft_wrap=True)

    def close(self) -> None:
        """End the live line, even if the run failed."""
        if self.progress:
            self.progress.stop()

    def _begin(self, launched: Launch) -> None:
        run = launched.run
        run.note = lambda text: self.console.print(f"[dim]{escape(text)} …[/dim]")
        if not self.brief:
            self._report(launched)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self.progress = Progress(
                *columns, TimeRemainingColumn(), TextColumn("left"), console=self.console
            )
            self.progress.add_task(launched.method, total=run.steps, numbers="")
            self.progress.start()

    def _report(self, launched: Launch) -> None:
        self.console.print(
            f"[bold]{launched.method}[/bold]  {escape(launched.start_from)}  on "
            f"{launched.run.device}, {launched.run.steps} steps"
        )
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
        for reason, count in launched.counts.items():
            table.add_row(reason, f"{count:,}")
        self.console.print(table)
        example = launched.example()
        shown = (
            "one example, [dim]prompt[/dim] and [green]learned tokens[/green]"
            if example["completions"]
            else "one prompt"
        )
        self.console.print(
            f"  {shown}:\n  " + _example(example).replace("\n", "\n  "), soft_wrap=True
        )


def _example(example: dict[str, Any]) -> str:
    """Format an example from Launch.example: the prompt dim, learned tokens green."""
    spans = (
        "".join(
            f"[{'green' if learned else 'dim'}]{escape(text)}[/]" for text, learned in completion
        )
        for completion in example["completions"]
    )
    return "\n".join(
        [f"[dim]{escape(example['prompt'])}[/dim]", *(f"→ {completion}" for completion in spans)]
    )


def _summary(first: dict[str, Any], last: Metrics) -> Table:
    """The main metrics at the first and the last step, and the held-out ones, including those
    measured only there.
    """
    # no pair is right and the mean margin is zero
    tied = not any(first.get(key) for key in (*ACCURACIES, "margin", "rewards/margins"))
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    for title in ("", "first step", "last step", "held out"):
        table.add_column(title, justify="right" if title else "left")
    heldout = {
        key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")
    }
    for key in dict.fromkeys(
        key for key in (*SUMMARY_METRICS, *heldout) if key in last or key in heldout
    ):
        cells = [
            f"{x:.4g}" if (x := numbers.get(key)) is not None else ""
            for numbers in (first, last, heldout)
        ]
        cells[0] += " (all tied)" if tied and key in ACCURACIES and cells[0] else ""
        table.add_row(key, *cells)
    return table


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
