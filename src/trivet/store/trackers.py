"""Metrics to TensorBoard, Weights & Biases, trackio or MLflow as well: one way for all, the same names everywhere.

metrics.jsonl is written in any case. A tracker is a generator that is sent (step, metrics) after each step and None at the end;
closed without that None, it records a run that failed. A resumed run opens the same run of the tracker again, by an identifier that
run.json keeps, and sends it the whole record once more: each tracker leaves out the steps that it has, and asks whoever keeps them which
these are. So no step stands there twice, and what a kill took on its way there comes after all.
"""

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from trivet.errors import InputError, first_line
from trivet.step import Metrics
from trivet.store.reading import read_metrics

Line = tuple[int, Metrics] | None
Tracker = Generator[None, Line, None]
Trackers = dict[str, Tracker]
T = TypeVar("T")

QUIET = {  # nothing about us to the makers of these libraries, unless the environment says otherwise
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def require(names: Sequence[str]) -> None:
    """InputError for a tracker that nobody knows, or whose package is not installed."""
    for name in names:
        if name not in OPEN:
            raise InputError(f"--track {name}: there is {', '.join(OPEN)}")
        found = importlib.util.find_spec(name)
        if (
            found is None or found.origin is None
        ):  # no origin: only a folder of that name, which some of them leave behind
            raise InputError(f'--track {name} needs a package that is not installed: pip install "trivet[{name}]"')


def trackers(names: Sequence[str], out: Path, config: dict[str, Any], identifier: str) -> Trackers:
    """The trackers of these names, opened for the run in this directory and told what is recorded of it. identifier: its own, and no other run's."""
    if not names:
        return {}
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    out.mkdir(parents=True, exist_ok=True)
    recorded = read_metrics(out)
    done = recorded[-1]["step"] if recorded else 0
    opened = {name: OPEN[name](out, config, identifier, done) for name in names}
    _each(opened, next)
    for metrics in recorded:
        send(opened, metrics["step"], metrics)
    return opened


def send(opened: Trackers, step: int, metrics: Metrics) -> None:
    """One step to all of them, without the numbers that are not known."""
    known = {key: value for key, value in metrics.items() if key != "step" and value is not None and value == value}
    _each(opened, lambda tracker: tracker.send((step, known)))


def until_end(opened: Trackers, steps: Iterable[T]) -> Iterator[T]:
    """The steps as they come. After the last one the trackers end; where the loop over them ends early, as failed runs."""
    try:
        yield from steps
        _each(opened, lambda tracker: tracker.send(None))
    finally:
        _each(opened, lambda tracker: tracker.close())


def _each(opened: Trackers, act: Callable[[Tracker], None]) -> None:
    """A tracker that fails never ends a run: it is named once, and left out from there."""
    for name, tracker in list(opened.items()):
        try:
            act(tracker)
        except StopIteration:  # it was sent its None
            del opened[name]
        except Exception as error:
            del opened[name]
            said = f"{type(error).__name__}: {first_line(error)}"
            with suppress(OSError):  # nobody may be there to read it
                print(f"trivet: --track {name} failed and is left out from here: {said}", file=sys.stderr)


def _tensorboard(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """Event files in OUT/tensorboard: tensorboard --logdir OUT, or the folder of several runs. Later steps in the files there are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    known = done if list(folder.glob("events.*")) else 0
    with SummaryWriter(str(folder), purge_step=done + 1) as writer:
        options = "\n".join(f"    {key} = {json.dumps(value)}" for key, value in config.items())
        writer.add_text("options", options, done)  # indented: Markdown for code
        while line := (yield):
            if line[0] > known:
                for key, value in line[1].items():
                    writer.add_scalar(key, value, line[0])
                writer.flush()


def _wandb(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """A run of the project WANDB_PROJECT (default trivet), files in OUT/wandb; WANDB_MODE=offline keeps it on this machine.

    Offline, a kill leaves a file that wandb sync can't read, and nobody to ask: the file of a resumed run has all steps, and takes its place.
    """
    import wandb

    lives = list((out / "wandb").glob(f"*run-*-{identifier}*"))
    unsent = [life for life in lives if life.name.startswith("offline-") and not list(life.glob("*.synced"))]
    if wandb.setup().settings.mode in ("offline", "dryrun") and (sent := len(lives) - len(unsent)):
        identifier += f"-{sent}"  # wandb sync would add all steps to those that are there
    project, settings = os.environ.get("WANDB_PROJECT", "trivet"), wandb.Settings(console="off")  # our terminal is ours
    known: dict[str, Any] = {"id": identifier, "resume": "allow", "name": out.name, "config": config, "dir": str(out)}
    with wandb.init(project=project, settings=settings, **known) as run:
        for life in () if run.disabled else unsent:
            shutil.rmtree(life)
        while line := (yield):
            if line[0] >= run.starting_step:  # one more than the last that the server has
                run.log(line[1], step=line[0])


def _trackio(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """A run of the project TRACKIO_PROJECT (default trivet), where trackio keeps its own: trackio show. It knows runs by name only."""
    import trackio

    project, name = os.environ.get("TRACKIO_PROJECT", "trivet"), f"{out.name}-{identifier}"
    run = trackio.init(project, name=name, config=config, resume="allow")
    following = run._next_step
    try:
        while line := (yield):
            if line[0] >= following:
                run.log(line[1], step=line[0])
    finally:
        run.finish()


def _mlflow(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (default trivet) at MLFLOW_TRACKING_URI, else in OUT/mlflow.db."""
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient(None if mlflow.is_tracking_uri_set() else f"sqlite:///{out.absolute()}/mlflow.db")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trivet")
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    if found := client.search_runs([experiment], f"tags.trivet = '{identifier}'"):
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
    else:
        run = client.create_run(experiment, run_name=out.name, tags={"trivet": identifier}).info.run_id
        client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in config.items()])
    last = max((metric.step for metric in client.get_metric_history(run, "seconds")), default=0)  # every step has them
    status = "FAILED"
    try:
        while line := (yield):
            if line[0] > last:
                now = round(time.time() * 1000)
                client.log_batch(run, [Metric(key, value, now, line[0]) for key, value in line[1].items()])
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
