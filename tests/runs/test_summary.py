"""The cost card of each run that has ended, as a file for other programs: `labkit/runs/summary.py`.

Used by pytest.
"""

from __future__ import annotations

import json
import math

import pytest

import labkit
from labkit.errors import LabError, RunError
from labkit.runs import summary
from labkit.runs.files import read_json
from tests.helpers import SEED, ended, poisoned, problem

pytestmark = pytest.mark.usefixtures("cache")


def stored(run):
    return read_json(run.path / "summary.json", run.config.id)


def said(run):
    """As JSON has it: keys are text."""
    return json.loads(json.dumps({**run.summary(), "reason": run.status()["reason"]}))


def test_each_run_that_has_ended_has_its_summary_in_a_file(tmp_path):
    with labkit.connect("threads", 2) as lab:
        run = ended(labkit.train(problem(), lab, passes=2, seed=SEED, runs=tmp_path))
        assert stored(run) == said(run) and stored(run)["score"] == run.test_score
        for made in (labkit.replay(run), labkit.simulate(run)):
            made.curve()  # of a replay it is measured when it is asked for
            assert stored(made) == said(made) and stored(made)["origin"] == made.origin
        for file in ("metrics.parquet", "summary.json"):
            (run.path / file).unlink()
        again = labkit.load_run(run.path, problem=problem())
        again.curve()
        assert stored(again) == said(again)
        failed = labkit.train(poisoned(0), lab, passes=2, seed=SEED, update="sgwu", partition="udpa", runs=tmp_path, name="failed")
        with pytest.raises(LabError):
            failed.wait(60)
    assert (stored(failed)["state"], stored(failed)["score"]) == ("failed", None) and "poisoned" in stored(failed)["reason"]


def test_a_summary_that_cannot_be_written_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "write_json", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with labkit.connect("threads", 1) as lab:
        run = ended(labkit.train(problem(), lab, passes=1, runs=tmp_path))
    assert not (run.path / "summary.json").exists() and run.summary()["score"] is not None


def test_what_is_no_number_is_null():
    assert summary.plain({"a": math.nan, "b": {"0": math.inf, "1": 0.5}, "c": "x"}) == {
        "a": None,
        "b": {"0": None, "1": 0.5},
        "c": "x",
    }


def test_a_summary_of_another_run_is_seen(tmp_path):
    with labkit.connect("threads", 1) as lab:
        a, b = (ended(labkit.train(problem(), lab, passes=1, runs=tmp_path, name=name)) for name in "ab")
    (a.path / "summary.json").write_bytes((b.path / "summary.json").read_bytes())
    with pytest.raises(RunError, match="belongs to another run"):
        stored(a)
