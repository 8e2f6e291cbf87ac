"""A run in other programs' trackers, each read back with its own library where that is installed: `labkit/runs/export.py`.

Used by pytest.
"""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path

import pytest

import labkit
from labkit.errors import RunError
from labkit.runs import export
from tests.runs.test_old_records import FOLDER


@pytest.fixture
def run(tmp_path):
    """Two workers under AGWU; six versions were measured."""
    return labkit.load_run(shutil.copytree(FOLDER / "format-2-agwu", tmp_path / "run"))


def of(points, name):
    """(step, value) of one series."""
    return [(row.step, row.values[name]) for row in points if name in row.values]


def expected(run):
    """What every tracker must say of a run: its settings, and its series by name."""
    curve, points = run.curve(), list(export.rows(run))
    names = dict.fromkeys(name for row in points for name in row.values)
    series = {name: [(step, pytest.approx(value, rel=1e-6)) for step, value in of(points, name)] for name in names}
    assert series["test/loss"] == list(zip(curve.samples, curve.loss, strict=True))
    return export.settings(run), series


def test_the_points_are_those_of_the_curve_the_events_and_the_cost_card(run):
    curve, events, points = run.curve(), run.events, list(export.rows(run))
    assert of(points, "test/score") == list(zip(curve.samples, curve.score, strict=True))
    assert of(points, "seconds") == list(zip(curve.samples, curve.seconds, strict=True))
    for worker in (0, 1):
        own = events[events.worker == worker]
        merges, pushes = own[own.kind == "merge"], own[own.kind == "push"]
        assert of(points, f"worker_{worker}/loss") == list(zip(merges.total, pushes.loss, strict=True))
        assert of(points, f"worker_{worker}/held_out_score") == list(zip(merges.total, pushes.score, strict=True))
        assert of(points, f"worker_{worker}/coefficient") == list(zip(merges.total, merges.coefficient, strict=True))
    assert of(points, "cost/samples_per_s") == [(1200, run.summary()["samples_per_s"])]
    assert "cost/load_share" not in points[-1].values  # was not recorded
    assert [row.step for row in points] == sorted(row.step for row in points)
    measured = {row.step: row.time for row in points if "test/loss" in row.values}
    assert measured[0] == events.time[events.kind == "start"].min() and measured[1200] == events.time[events.kind == "merge"].max()


def test_the_settings_are_flat(run):
    settings = export.settings(run)
    assert (settings["seed"], settings["problem.lr"], settings["update.name"], settings["problem.model_args.width"]) == (
        3,
        0.05,
        "agwu",
        0.08,
    )
    assert not {"workers", "sources"} & set(settings) and all(
        isinstance(value, bool | int | float | str) for value in settings.values()
    )


def test_what_cannot_be_exported_is_said(run, monkeypatch):
    with pytest.raises(ValueError, match=r"tracker='tensorbord' is not known. Known: mlflow, .*Did you mean 'tensorboard'"):
        run.export("tensorbord")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RunError, match=r"needs mlflow, which is not here. pip install 'labkit\[mlflow\]'"):
        run.export("mlflow")
    (run.path / "status.json").unlink()
    monkeypatch.setattr(type(run), "state", "running")
    with pytest.raises(RunError, match=r"is still running.*run.wait\(\) first"):
        run.export("tensorboard")


def test_tensorboard_reads_it(run):
    pytest.importorskip("tensorboard", reason="pip install 'labkit[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    settings, series = expected(run)
    folder = Path(run.export("tensorboard"))
    assert run.export("tensorboard") == str(folder) == str(run.path / "tensorboard") and len(list(folder.iterdir())) == 1
    read = EventAccumulator(str(folder)).Reload()
    found = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert found == series
    assert read.Scalars("test/loss")[0].wall_time == pytest.approx(run.events.time[run.events.kind == "start"].min())
    (content,) = read.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.ListFields()[1:]
    stored = metadata.parse_session_start_info_plugin_data(content[1]).hparams
    assert stored["problem.lr"].number_value == 0.05 and set(stored) == set(settings)
    elsewhere = run.export("tensorboard", run.path.parent / "logs")
    assert elsewhere == str(run.path.parent / "logs" / run.name)


@pytest.mark.slow  # its import
@pytest.mark.filterwarnings("ignore")  # the library's own
def test_mlflow_reads_it(run, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install 'labkit[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow keeps files
    settings, series = expected(run)
    where = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first, number = run.export("mlflow", where, project="uneven"), run.export("mlflow", where, project="uneven")
    client = MlflowClient(where)
    (experiment,) = client.search_experiments(filter_string="name = 'uneven'")
    (stored,) = client.search_runs([experiment.experiment_id])  # the first one is in the bin
    assert stored.info.run_id == number != first and stored.info.status == "FINISHED" and stored.info.run_name == run.name
    assert stored.data.params == {**{name: str(value) for name, value in settings.items()}}
    found = {name: [(m.step, m.value) for m in client.get_metric_history(number, name)] for name in stored.data.metrics}
    assert found == series
    assert {file.path for file in client.list_artifacts(number)} >= {"config.json", "environment.json", "metrics.parquet"}


@pytest.mark.slow  # its import
@pytest.mark.filterwarnings("ignore")
def test_wandb_reads_it(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'labkit[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": tmp_path,
        "WANDB_CACHE_DIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    settings, series = expected(run)
    try:
        number = run.export("wandb", tmp_path)
    finally:
        wandb.teardown()
    (log,) = tmp_path.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb")
    records = []
    for content in of_log(log.read_bytes()):
        records.append(Record())
        records[-1].ParseFromString(content)
    found = {name: [] for name in series}
    for record in records:
        items = {(item.key or item.nested_key[0]): float(item.value_json) for item in record.history.item}
        for name in series.keys() & items.keys():
            found[name].append((items["_step"], items[name]))
    assert found == series
    (begun,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name, begun.run_id) == ("labkit", run.name, run.config.id)
    assert {update.key for update in begun.config.update} >= set(settings)


def of_log(content):
    """The records of a file of wandb: 7 bytes, then LevelDB's format, blocks of 32 KiB with pieces of records."""
    at, piece = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        piece += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece of one
            yield piece
            piece = b""


@pytest.mark.slow  # its import
@pytest.mark.filterwarnings("ignore")
def test_trackio_reads_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="pip install 'labkit[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    settings, series = expected(run)
    assert run.export("trackio") == run.export("trackio") == run.name
    (stored,) = trackio.Api().runs("labkit")
    assert stored.name == run.name and settings.items() <= stored.config.items()
    logs = SQLiteStorage.get_logs("labkit", stored.name, run_id=stored.id)
    assert {name: [(row["step"], row[name]) for row in logs if name in row] for name in series} == series
    with pytest.raises(RunError, match="TRACKIO_DIR"):
        run.export("trackio", tmp_path)
