"""What a run says on the screen: the data report, one live line (plain lines where there is no terminal), the last numbers."""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trivet.run.launch import Launch
from trivet.run.loop import Metrics

SHOWN = {
    "reward": "reward",
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "kl": "KL",
    "completions/mean_length": "length",
}


class Terminal:
    """Follows one run; give it to launch. brief: the progress line only."""

    def __init__(self, *, brief: bool = False) -> None:
        self.brief = brief
        self.console = Console(highlight=False)
        self.progress: Progress | None = None
        self.spoken = 0.0
        self.tokens, self.first = 0.0, 0.0

    def __call__(self, launched: Launch, step: int, metrics: Metrics) -> None:
        if step == 0:
            self._begin(launched)
            return
        run = launched.run
        line = "  ".join(f"{name} {metrics[key]:.3g}" for key, name in SHOWN.items() if key in metrics)
        left = ""
        if step == 1:  # it carries what is done once, a reference pass for one, and tells nothing of the speed
            self.first = metrics["seconds"]
        else:
            self.tokens += metrics.get("tokens/generated", 0) + metrics.get("tokens/trained", 0)
            spent = max(1e-9, metrics["seconds"] - self.first)
            line += f"  {self.tokens / spent:,.0f} tokens/s"
            left = f"  {_clock((run.steps - step) * spent / (step - 1))} left"
        if self.progress:
            self.progress.update(self.progress.task_ids[0], completed=step, numbers=line)
        elif step == run.steps or time.monotonic() - self.spoken > 5:
            self.console.print(f"step {step}/{run.steps}  {line}{left}", soft_wrap=True)
            self.spoken = time.monotonic()
        heldout = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if step == run.steps:
            self.close()
            if heldout and not self.brief:
                self.console.print(_numbers(f"held-out, after step {step}", heldout))

    def close(self) -> None:
        """End the live line, also of a run that failed."""
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
            self.progress = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=self.console)
            self.progress.add_task(launched.method, total=run.steps, numbers="")
            self.progress.start()

    def _report(self, launched: Launch) -> None:
        self.console.print(
            f"[bold]{launched.method}[/bold]  {escape(launched.start_from)}  on {launched.run.device}, {launched.run.steps} steps"
        )
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 2))
        for reason, count in launched.counts.items():
            table.add_row(reason, f"{count:,}")
        self.console.print(table)
        self.console.print("  one example, [dim]given[/dim] and [green]learned[/green]:")
        self.console.print("  " + _example(launched).replace("\n", "\n  "), soft_wrap=True)


def _example(launched: Launch, most: int = 120) -> str:
    """The first training example, decoded: the prompt dim, learned tokens green."""
    example = launched.run.train[0]

    def text(ids: list[int]) -> str:
        return escape(launched.tokenizer.decode(ids))

    prompt = text(example.prompt[-most:])
    lines = [f"[dim]{'…' if len(example.prompt) > most else ''}{prompt}[/dim]"]
    for ids, learned in zip(example.completions, example.learned, strict=True):
        spans: list[tuple[bool, list[int]]] = []
        for token, flag in list(zip(ids, learned, strict=True))[:most]:
            if not spans or spans[-1][0] != flag:
                spans.append((flag, []))
            spans[-1][1].append(token)
        styled = [f"[{'green' if flag else 'dim'}]{text(span)}[/]" for flag, span in spans]
        lines.append("→ " + "".join(styled) + ("…" if len(ids) > most else ""))
    return "\n".join(lines)


def _numbers(title: str, metrics: dict[str, Any]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", box=None, padding=(0, 2, 0, 2), min_width=40)
    for key, value in metrics.items():
        table.add_row(key.removeprefix("eval/"), f"{value:.4g}")
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
