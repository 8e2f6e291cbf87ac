"""The record of a run: read from its directory alone, without the packages that train; and several side by side (`compare.py`)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest

from labkit.errors import RunError
from labkit.runs import checkpoints, metrics, record
from labkit.runs.compare import compare
from labkit.runs.events import Recorder
from labkit.runs.files import write_json
from labkit.runs.record import RunRecord
from tests.helpers import settings


@pytest.fixture
def run(tmp_path):
    (tmp_path / "a").mkdir()
    settings([0, 1], name="kept").save(tmp_path / "a")
    recorder = Recorder(tmp_path / "a")
    recorder.event("start")
    recorder.event("allocate", worker=0, samples=7, total=7, **{"pass": 1})
    recorder.close()
    return RunRecord(tmp_path / "a")


def test_a_directory_holds_how_its_run_ended(run):
    assert run.state == "failed" and "cut off; labkit.resume(" in run.status()["reason"]
    write_json(run.path / "status.json", {"state": "stopped", "reason": "", "samples": 5})
    assert run.state == "stopped" and repr(run).startswith("<Run kept: ") and "5 of" in repr(run)


def test_what_goes_on_with_a_run_is_told_by_where_it_is_now(run):
    reason = "its kernel is gone; labkit.resume('/somewhere/else') continues it."
    write_json(run.path / "status.json", {"state": "failed", "reason": reason, "samples": 5})
    moved = run.path.rename(run.path.with_name("it's moved"))
    assert RunRecord(moved).status()["reason"] == f"its kernel is gone; labkit.resume({str(moved)!r}) continues it."
    write_json(moved / "status.json", {"state": "failed", "reason": f"labkit.resume({str(moved)!r}) continues it", "samples": 5})
    again = moved.rename(moved.with_name("again"))
    assert RunRecord(again).status()["reason"] == f"labkit.resume({str(again)!r}) continues it"


def test_events_are_read_again_when_there_are_more(run):
    assert list(run.allocations().itertuples(index=False, name=None)) == [(0, 1, 7, 7)] and len(run.events) == 2
    recorder = Recorder(run.path)
    recorder.event("stop")
    recorder.close()
    assert list(run.events.kind) == ["start", "allocate", "stop"]


def test_a_renamed_directory_is_followed(run, tmp_path):
    path, again = run.path, RunRecord(run.path)
    path.rename(tmp_path / "a.1")
    assert run.path == tmp_path / "a.1" and len(run.events) == 2
    path.mkdir()
    run.config.replace(id="another").save(path)  # by another kernel
    assert again.path == tmp_path / "a.1" and len(again.events) == 2
    with pytest.raises(RunError, match="a holds another run now, and run kept is not beside it"):
        shutil.rmtree(again.path)
        again = RunRecord(path)
        run.config.replace(id="a third").save(path)
        again.flat()


def test_threads_find_a_run_that_was_set_aside_at_once(run, tmp_path, monkeypatch):
    """One has just seen that another run is in its place when the other one has found it."""
    path, looked, seen, found = run.path, record._id, threading.Event(), threading.Event()

    def look(folder):
        id = looked(folder)
        if threading.current_thread() is not threading.main_thread() and folder == path:
            seen.set()
            assert found.wait(20)
        return id

    path.rename(tmp_path / "a.1")
    path.mkdir()
    run.config.replace(id="another").save(path)
    monkeypatch.setattr(record, "_id", look)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(lambda: run.path)
        try:
            assert seen.wait(20) and run.path == tmp_path / "a.1"
        finally:
            found.set()
        assert late.result(20) == tmp_path / "a.1"


def test_a_run_that_is_resumed_while_it_is_read_is_not_damaged(run, monkeypatch):
    write_json(run.path / "status.json", {"state": "stopped", "reason": "", "events": 2})
    versions = checkpoints.versions

    def resumed(path):
        if (path / "status.json").exists():
            (path / "status.json").unlink()
            recorder = Recorder(path)
            recorder.event("resume", version=0)
            recorder.close()
        return versions(path)

    monkeypatch.setattr(checkpoints, "versions", resumed)
    assert list(run.events.kind) == ["start", "allocate", "resume"]
    write_json(run.path / "status.json", {"state": "stopped", "reason": "", "events": 9})
    monkeypatch.undo()
    with pytest.raises(RunError, match="holds 3 of 9 events"):
        run.events  # noqa: B018


def test_the_newest_version_is_read_of_a_run_that_ends_just_then(run, monkeypatch):
    checkpoints.Layout(("w",), ((3,),), 3, 0).save(run.path, run.config.id)
    (run.path / checkpoints.FOLDER).mkdir()
    checkpoints.write(run.path, 1, np.full(3, 1, np.float32))
    versions = checkpoints.versions

    def ends(path):
        there = versions(path)
        if not (path / "status.json").exists():
            checkpoints.write(path, 2, np.full(3, 2, np.float32))
            write_json(path / "status.json", {"state": "stopped", "reason": "", "version": 2, "samples": 7})
        return there

    monkeypatch.setattr(checkpoints, "versions", ends)
    assert run.flat().tolist() == [2, 2, 2]
    checkpoints.file_of(run.path, 2).unlink()
    with pytest.raises(RunError, match=r"is missing, the last version of run kept.*newest that is there is version 1"):
        run.flat()


def test_a_run_whose_place_another_has_taken_is_named_by_its_number(run, tmp_path):
    (tmp_path / "kept").mkdir()
    run.config.save(tmp_path / "kept")
    other = RunRecord(tmp_path / "kept")
    (tmp_path / "kept").rename(tmp_path / "kept.1")
    (tmp_path / "kept").mkdir()
    run.config.replace(id="another").save(tmp_path / "kept")
    assert [one.name for one in (run, other, RunRecord(tmp_path / "kept.1"), RunRecord(tmp_path / "kept"))] == [
        "kept",  # in a folder of another name
        "kept.1",
        "kept.1",
        "kept",
    ]


def test_what_is_missing_is_an_error(run):
    with pytest.raises(RunError, match="is not measured yet"):
        run.curve()
    with pytest.raises(RunError, match="has no weights"):
        run.flat()
    assert compare([]).empty


def test_scores_that_are_not_measured_are_said_in_one_line(run, capsys):
    compare([])
    assert capsys.readouterr().out == "No runs were given to compare: the table is empty.\n"
    for n in (1, 2, 7):
        compare([run] * n)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and run.name in said[0] and "labkit.load_run(" in said[0] and (n == 1 or f"of {n} runs" in said[0])


def test_one_run_is_compared_as_a_list_of_it_is_and_what_is_no_run_is_refused(run):
    whole = compare([run])
    for one in (run, run.path, str(run.path), np.array([str(run.path)])):
        assert compare(one).equals(whole)
    for bad in (3, None, [run, 3], [run, None], [[run]], {"a": run}, b"ab"):
        with pytest.raises(TypeError, match="runs="):
            compare(bad)


def test_what_came_out_are_the_first_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    table = compare([run])
    assert [*table.columns[:4]] == ["score", "loss", "seconds", "state"] and table.columns.is_unique
    (run.path / "events.jsonl").write_text("{}\n")
    table = compare([run.path])
    assert "damaged" in repr(table) and table.reason.notna().all() and "reason" in repr(table)


def test_figures_of_a_record_load_nothing_that_trains(run):
    code = "import sys; from labkit.runs.record import RunRecord; from labkit.plots import timeline\n"
    code += f"assert timeline and RunRecord({str(run.path)!r}).timeline().empty\n"
    code += "assert not {'torch', 'distributed', 'labkit.training.run'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_curve_may_hold_what_steps_return_too(run):
    """A problem that measures an entry `train_loss` of its own: it stays that of the curve."""
    recorder = Recorder(run.path)
    recorder.event("push", worker=0, samples=4, loss=2.0, metrics={"mine": 3.0}, **{"pass": 1})
    recorder.close()
    curve = pd.DataFrame(
        {"seconds": [0.0, 9.0], "samples": [0, 4], "version": [0, 1], "loss": 1.0, "score": 0.5, "train_loss": 7.0}
    )
    metrics.write(run.path, run.config.id, curve)
    read = run.curve()
    assert read.train_loss.tolist() == [7.0, 7.0] and "train_mine" in read
