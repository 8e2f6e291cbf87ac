"""The calls that make a run again, as code: `labkit/runs/calls.py`.

Used by pytest.
"""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest

import labkit
from labkit.runs.calls import calls
from labkit.runs.record import RunRecord
from tests.helpers import SEED, ended, problem
from tests.runs.test_old_records import FOLDER

pytestmark = pytest.mark.usefixtures("cache")


def test_the_code_of_a_run_trains_it_again(tmp_path, monkeypatch):
    """Bit for bit, under a rule whose course does not depend on the clock; the settings are those of the run but for what names it."""
    monkeypatch.chdir(tmp_path)
    with labkit.connect("threads", 2, slowdown=[1, 1.5], jitter=0.1) as lab:
        given = problem("tests.helpers:net").fold(1, 3, seed=2)
        run = ended(labkit.train(given, lab, partition="udpa", update="sgwu", passes=2, seed=SEED, name="first", checkpoints=3))
    made = {}
    exec(calls(run), made)
    with made["lab"]:
        again = ended(made["run"])
    assert again.path != run.path and np.array_equal(again.flat(), run.flat())
    own = ("id", "name", "created", "workers")
    assert {**again.config, **dict.fromkeys(own)} == {**run.config, **dict.fromkeys(own)}


@pytest.mark.slow
def test_the_code_of_what_no_cluster_has_made(tmp_path):
    with labkit.connect("threads", 2) as lab:
        run = ended(labkit.train(problem("tests.helpers:net"), lab, passes=1, seed=SEED, runs=tmp_path))
    asked = {"n_workers": 3, "slowdown": [1, 2, 4], "update": "fedbuff", "latency": 0.01, "seed": 4}
    for one, other in (
        (labkit.replay(run), "rep"),
        (labkit.replay(run, update="sgwu"), "rule"),
        (labkit.simulate(run, **asked), "sim"),
    ):
        made = {}
        exec(calls(one).replace(f"name={one.name!r}", f"name={other!r}"), made)
        own = ("id", "name", "created")
        assert {**made["run"].config, **dict.fromkeys(own)} == {**one.config, **dict.fromkeys(own)}


def test_code_of_a_record_imports_and_runs_nothing_that_it_names(tmp_path):
    """Also where names and settings in it were written to become code."""
    path = tmp_path / "run"
    path.mkdir()
    for file in (FOLDER / "format-2-agwu").glob("*.*"):
        (path / file.name).write_bytes(file.read_bytes())
    stored = json.loads((path / "config.json").read_text())
    stored["problem"] |= {"model": {"by_value": "net'\n__import__('os')"}, "data": "x'\"\n)", "lr=exit()": 1}
    stored["name"] = "x') # "
    for kind, said in (("no_such_module:Mine", "from no_such_module import Mine"), ("labkit:Cl\nassifier", "problem = ...")):
        stored["problem"]["kind"] = kind
        (path / "config.json").write_text(json.dumps(stored))
        code = calls(RunRecord(path))
        tree = ast.parse(code)
        assert said in code and all(type(node) in (ast.Import, ast.ImportFrom, ast.Assign) for node in tree.body)
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert called <= {"Mine", "labkit.connect", "labkit.train"}
    assert "written in a notebook" in code
