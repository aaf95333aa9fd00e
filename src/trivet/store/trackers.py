"""Metrics for TensorBoard, Weights & Biases, trackio or MLflow: one interface, and the same names
everywhere.

metrics.jsonl is always written too. A tracker is a generator that is sent (step, metrics) after
each step and None at the end; if it is closed without that None, it records a failed run. A resumed
run reopens the same run of the tracker, by an identifier kept in run.json, and sends it the whole
record again: each tracker asks its backend which steps it has, and skips those. So no step is
recorded twice, and steps that a kill lost on the way are sent after all.
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

# turn off the telemetry of these libraries, unless the environment says otherwise
QUIET = {
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
}


def require(names: Sequence[str]) -> None:
    """Raise an InputError for an unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in OPEN:
            raise InputError(f"unknown --track {name}; choose from {', '.join(OPEN)}")
        spec = importlib.util.find_spec(name)
        # no origin: only a folder of that name, which some of them leave behind
        if spec is None or spec.origin is None:
            raise InputError(
                f"--track {name} needs a package that is not installed: pip install "
                f'"trivet[{name}]"'
            )


def trackers(names: Sequence[str], out: Path, config: dict[str, Any], identifier: str) -> Trackers:
    """Open the trackers of these names for the run in this directory, and send them its record.
    identifier: unique to the run.
    """
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
    """Send a step to all trackers, without missing or NaN values."""
    values = {
        key: value
        for key, value in metrics.items()
        if key != "step" and value is not None and value == value
    }
    _each(opened, lambda tracker: tracker.send((step, values)))


def until_end(opened: Trackers, steps: Iterable[T]) -> Iterator[T]:
    """Yield the steps. After the last one, end the trackers; if the loop ends early, they record a
    failed run.
    """
    try:
        yield from steps
        _each(opened, lambda tracker: tracker.send(None))
    finally:
        _each(opened, lambda tracker: tracker.close())


def _each(opened: Trackers, act: Callable[[Tracker], None]) -> None:
    """Call `act` on each tracker. A failing one never ends a run: it is reported and dropped."""
    for name, tracker in list(opened.items()):
        try:
            act(tracker)
        except StopIteration:  # it was sent None and has ended
            del opened[name]
        except Exception as error:
            del opened[name]
            message = f"{type(error).__name__}: {first_line(error)}"
            with suppress(OSError):  # stderr may be closed
                print(
                    f"trivet: --track {name} failed and is now off: {message}",
                    file=sys.stderr,
                )


def _tensorboard(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """Write event files to OUT/tensorboard: tensorboard --logdir OUT, or the folder of several
    runs. Existing events of later steps are hidden.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = out / "tensorboard"
    known = done if list(folder.glob("events.*")) else 0
    with SummaryWriter(str(folder), purge_step=done + 1) as writer:
        options = "\n".join(f"    {key} = {json.dumps(value)}" for key, value in config.items())
        writer.add_text("options", options, done)  # indented, so Markdown shows it as code
        while line := (yield):
            if line[0] > known:
                for key, value in line[1].items():
                    writer.add_scalar(key, value, line[0])
                writer.flush()


def _wandb(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """A run of the project WANDB_PROJECT (default trivet), files in OUT/wandb; WANDB_MODE=offline
    keeps it on this machine.

    Offline, a kill leaves a file that wandb sync can't read, and there is no server to ask which
    steps it has: the file of a resumed run holds all steps and replaces it.
    """
    import wandb

    lives = list((out / "wandb").glob(f"*run-*-{identifier}*"))
    unsent = [
        life
        for life in lives
        if life.name.startswith("offline-") and not list(life.glob("*.synced"))
    ]
    if wandb.setup().settings.mode in ("offline", "dryrun") and (sent := len(lives) - len(unsent)):
        identifier += f"-{sent}"  # wandb sync would add all steps to the existing ones
    project = os.environ.get("WANDB_PROJECT", "trivet")
    settings = wandb.Settings(console="off")  # wandb must not capture our terminal output
    options: dict[str, Any] = {
        "id": identifier,
        "resume": "allow",
        "name": out.name,
        "config": config,
        "dir": str(out),
    }
    with wandb.init(project=project, settings=settings, **options) as run:
        for life in () if run.disabled else unsent:
            shutil.rmtree(life)
        while line := (yield):
            if line[0] >= run.starting_step:  # one more than the server's last step
                run.log(line[1], step=line[0])


def _trackio(out: Path, config: dict[str, Any], identifier: str, done: int) -> Tracker:
    """A run of the project TRACKIO_PROJECT (default trivet), in trackio's own folder: trackio show.
    trackio identifies runs only by name.
    """
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
    """A run of the experiment MLFLOW_EXPERIMENT_NAME (default trivet) at MLFLOW_TRACKING_URI, else
    in OUT/mlflow.db.
    """
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient(
        None if mlflow.is_tracking_uri_set() else f"sqlite:///{out.absolute()}/mlflow.db"
    )
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "trivet")
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    if found := client.search_runs([experiment], f"tags.trivet = '{identifier}'"):
        run = found[0].info.run_id
        client.update_run(run, status="RUNNING")
    else:
        run = client.create_run(
            experiment, run_name=out.name, tags={"trivet": identifier}
        ).info.run_id
        client.log_batch(
            run, params=[Param(key, str(value)[:500]) for key, value in config.items()]
        )
    history = client.get_metric_history(run, "seconds")  # which every step has
    last = max((metric.step for metric in history), default=0)
    status = "FAILED"
    try:
        while line := (yield):
            if line[0] > last:
                now = round(time.time() * 1000)
                client.log_batch(
                    run, [Metric(key, value, now, line[0]) for key, value in line[1].items()]
                )
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}
