"""Metrics to TensorBoard, Weights & Biases, trackio or MLflow as well: one way for all, the same names everywhere.

metrics.jsonl is written in any case. A tracker is a generator that is sent (step, metrics) after each step and None at the end;
closed without that None, it records a run that failed.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trivet.errors import InputError, first_line
from trivet.run.loop import Metrics

Line = tuple[int, Metrics] | None
Tracker = Generator[None, Line, None]
Trackers = dict[str, Tracker]

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


def trackers(names: Sequence[str], out: Path, config: dict[str, Any]) -> Trackers:
    """The trackers of these names, opened for the run in this directory."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    opened = {name: OPEN[name](out, config) for name in names}
    if opened:
        out.mkdir(parents=True, exist_ok=True)
    _each(opened, next)
    return opened


def send(opened: Trackers, step: int, metrics: Metrics) -> None:
    """One step to all of them, without the numbers that are not known."""
    known = {key: value for key, value in metrics.items() if key != "step" and value is not None and value == value}
    _each(opened, lambda tracker: tracker.send((step, known)))


def until_end(opened: Trackers, steps: Iterable[Metrics]) -> Iterator[Metrics]:
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
            print(f"trivet: --track {name} failed and is left out from here: {said}", file=sys.stderr)


def _tensorboard(out: Path, config: dict[str, Any]) -> Tracker:
    """Event files in OUT/tensorboard: tensorboard --logdir OUT, or the folder of several runs."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:
        options = "\n".join(f"    {key} = {json.dumps(value)}" for key, value in config.items())
        writer.add_text("options", options)  # indented: Markdown for code
        while line := (yield):
            for key, value in line[1].items():
                writer.add_scalar(key, value, line[0])
            writer.flush()


def _wandb(out: Path, config: dict[str, Any]) -> Tracker:
    """A run of the project WANDB_PROJECT (default trivet), files in OUT/wandb; WANDB_MODE=offline keeps it on this machine."""
    import wandb

    settings = wandb.Settings(console="off")  # our terminal line is none of its business
    project = os.environ.get("WANDB_PROJECT", "trivet")
    with wandb.init(project=project, name=out.name, config=config, dir=str(out), settings=settings) as run:
        while line := (yield):
            run.log(line[1], step=line[0])


def _trackio(out: Path, config: dict[str, Any]) -> Tracker:
    """A run of the project TRACKIO_PROJECT (default trivet), where trackio keeps its own: trackio show."""
    import trackio

    run = trackio.init(os.environ.get("TRACKIO_PROJECT", "trivet"), name=out.name, config=config)
    try:
        while line := (yield):
            run.log(line[1], step=line[0])
    finally:
        run.finish()


def _mlflow(out: Path, config: dict[str, Any]) -> Tracker:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (default trivet) at MLFLOW_TRACKING_URI, else in OUT/mlflow.db."""
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient(None if mlflow.is_tracking_uri_set() else f"sqlite:///{out.absolute()}/mlflow.db")
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trivet")
    experiment = client.get_experiment_by_name(name)
    identifier = experiment.experiment_id if experiment else client.create_experiment(name)
    run, status = client.create_run(identifier, run_name=out.name).info.run_id, "FAILED"
    try:
        client.log_batch(run, params=[Param(key, str(value)[:500]) for key, value in config.items()])
        while line := (yield):
            now = round(time.time() * 1000)
            client.log_batch(run, [Metric(key, value, now, line[0]) for key, value in line[1].items()])
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
