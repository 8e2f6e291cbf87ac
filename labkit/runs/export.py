"""A run in the tracker that its user has: MLflow, TensorBoard, Weights & Biases or Trackio; copied from the record, which stays the truth.

What is copied, the samples that all workers have trained on being the step of each point:

    test/loss, test/score, ...     of the global weights on the test set, with version and seconds: `Run.curve`
    train/loss, ...                what the steps of training returned, means since the row before
    worker_0/loss, ...             of each push: loss, held_out_score and staleness; coefficient of each merge
    cost/samples_per_s, ...        the numbers of the cost card, at the last step
    settings                       those of `config.json`, nested ones as problem.lr; its id says which run it is

An export that is made again takes the place of the one before. Each library is imported when it is asked for.

Used by `labkit.training.run` for `Run.export`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.errors import RunError, known, text
from labkit.runs import config, metrics, summary
from labkit.runs.events import VERSIONS, effective

if TYPE_CHECKING:
    import pandas as pd

    from labkit.runs.record import RunRecord

FILES = (config.FILE, "environment.json", metrics.FILE, summary.FILE)  # that travel along, where a tracker keeps files
LEFT_OUT = ("format", "workers", "units", "sources", "resumed")  # of the settings: of any length
COST = ("seconds", "samples_per_s", "wait_share", "send_share", "load_share", "staleness_p50", "staleness_p95", "balance")
COST += ("versions", "bytes")


@dataclass(frozen=True)
class Row:
    """What is known of a run at one step."""

    step: int  # samples that all workers have trained on
    time: float  # Unix seconds
    values: dict[str, float]


def export(run: RunRecord, tracker: str, where: Any = None, project: str = "labkit") -> str:
    """See `labkit.training.run.Run.export`."""
    write, project = TRACKERS[known("tracker", tracker, TRACKERS)], text("project", project)
    where = None if where is None else str(where)
    if run.state == "running":
        raise RunError(f"run {run.name} is still running; it is exported from its record. Use run.wait() first.")
    try:
        return write(run, list(rows(run)), {**settings(run), "id": _id(run)}, where, project)
    except ImportError as error:
        raise RunError(f"run.export({tracker!r}) needs {error.name}, which is not here. pip install 'labkit[{tracker}]'") from error


def settings(run: RunRecord) -> dict[str, Any]:
    """The settings of a run, flat: {"seed": 0, "problem.lr": 0.05, "update.name": "agwu", ...}; lists as JSON."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                add(f"{name}.{key}", part)
        elif value is not None:
            found[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)

    for name, value in run.config.items():
        if name not in LEFT_OUT:
            add(name, value)
    return found


def rows(run: RunRecord) -> Iterator[Row]:
    """All points of a run by step; what comes at one step of one worker twice is there twice."""
    curve, events = run.curve(), run.events
    counted = effective(events)
    found = [*_of_workers(counted), *_of_curve(curve, events, counted)]
    yield from (row for row in sorted(found, key=lambda row: row.step) if row.values)
    last = max((row.step for row in found), default=0)
    cost = {name: value for name in COST if (value := run.card(run.state, curve)[name]) is not None}
    yield Row(last, float(events.time.max()), _numbers({f"cost/{name}": value for name, value in cost.items()}))


def _of_curve(curve: pd.DataFrame, events: pd.DataFrame, counted: pd.DataFrame) -> Iterator[Row]:
    made = counted[counted.kind.isin(VERSIONS)].groupby("version").time.max()
    began = events.time[events.kind == "start"].min()
    for row in curve.to_dict("records"):
        about = {name: row.pop(name) for name in ("version", "seconds")}
        step = int(row.pop("samples"))
        values = {
            f"train/{name.removeprefix('train_')}" if name.startswith("train_") else f"test/{name}": value
            for name, value in row.items()
        }
        yield Row(step, float(made.get(about["version"], began)), _numbers({**values, **about}))


def _of_workers(events: pd.DataFrame) -> Iterator[Row]:
    pushes = events[events.kind.isin(["push", "merge"])].copy()
    total = pushes.total.where(pushes.kind == "merge")
    # A push has the step of its merge; one that was dropped, that of the next of its worker.
    pushes["step"] = total.groupby(pushes.worker).bfill().fillna(total.max()).fillna(0)
    for row in pushes.to_dict("records"):
        push = {"loss": row["loss"], "held_out_score": row["score"], "staleness": row["staleness"]}
        values = push if row["kind"] == "push" else {"coefficient": row["coefficient"]}
        name = f"worker_{row['worker']:.0f}"
        yield Row(int(row["step"]), float(row["time"]), _numbers({f"{name}/{key}": value for key, value in values.items()}))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are there, under names that every tracker takes."""
    numbers = {re.sub(r"[^\w\-. /]", "_", name): float(value) for name, value in values.items() if value is not None}
    return {name: value for name, value in numbers.items() if value == value}


def _id(run: RunRecord) -> str:
    return run.config.id or run.name  # the first format had none


# -- the trackers ------------------------------------------------------------------------------------------------------


def _mlflow(run: RunRecord, points: list[Row], about: dict[str, Any], where: str | None, project: str) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunStatus

    client, tag = MlflowClient(where), "labkit.run"
    experiment = client.get_experiment_by_name(project)
    number = client.create_experiment(project) if experiment is None else experiment.experiment_id
    for earlier in client.search_runs([number], f"tags.`{tag}` = '{_id(run)}'"):
        client.delete_run(earlier.info.run_id)
    times = [int(1000 * row.time) for row in points]
    made = client.create_run(number, min(times), tags={tag: _id(run)}, run_name=run.name).info.run_id
    params = [Param(name, str(value)[:6000]) for name, value in about.items()]  # as long as MLflow takes them
    for at in range(0, len(params), 100):
        client.log_batch(made, params=params[at : at + 100])
    logged = [
        Metric(name, value, time, row.step) for row, time in zip(points, times, strict=True) for name, value in row.values.items()
    ]
    for at in range(0, len(logged), 1000):
        client.log_batch(made, metrics=logged[at : at + 1000])
    for name in FILES:
        if (run.path / name).exists():
            client.log_artifact(made, str(run.path / name))
    client.set_terminated(made, RunStatus.to_string(RunStatus.FAILED if run.state == "failed" else RunStatus.FINISHED), max(times))
    return made


def _tensorboard(run: RunRecord, points: list[Row], about: dict[str, Any], where: str | None, project: str) -> str:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder, ending = Path(where) / run.name if where else run.path / "tensorboard", f".labkit-{_id(run)}"
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"events.out.tfevents.*{ending}"):
        earlier.unlink()
    writer = EventFileWriter(str(folder), filename_suffix=ending)
    try:
        began = min(row.time for row in points)
        writer.add_event(Event(wall_time=began, summary=hparams_pb(about, trial_id=_id(run), start_time_secs=began)))
        for row in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in row.values.items()]
            writer.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))
    finally:
        writer.close()
    return str(folder)


def _wandb(run: RunRecord, points: list[Row], about: dict[str, Any], where: str | None, project: str) -> str:
    import wandb

    # A run whose id is there already is overwritten.
    made = wandb.init(
        project=project, name=run.name, id=_id(run), dir=where, config=about, reinit="create_new",
        settings=wandb.Settings(x_disable_stats=True, console="off"),
    )  # fmt: skip
    try:
        for row in points:
            made.log({**row.values, "_timestamp": row.time}, step=row.step)
    finally:
        made.finish(exit_code=int(run.state == "failed"))
    return made.id


def _trackio(run: RunRecord, points: list[Row], about: dict[str, Any], where: str | None, project: str) -> str:
    import trackio

    if where is not None:
        raise RunError(f"where={where!r}: Trackio's folder is the environment variable TRACKIO_DIR, set before it is imported.")
    with contextlib.suppress(ValueError):  # no such project yet
        for earlier in trackio.Api().runs(project):
            if (earlier.config or {}).get("id") == about["id"]:
                earlier.delete()
    with contextlib.redirect_stdout(io.StringIO()):  # how to open it, at length
        made = trackio.init(project, name=run.name, config=about, embed=False, auto_log_gpu=False, auto_log_cpu=False)
        for row in points:
            made.log(row.values, step=row.step)
        made.finish()
    return made.name


TRACKERS = {"mlflow": _mlflow, "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
