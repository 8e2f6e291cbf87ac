"""The calls that make a run again, as code: `labkit/runs/calls.py`.

Used by pytest.
"""

from __future__ import annotations

import ast
import json

import numpy as np
import pytest

import labkit
from labkit.runs.calls import calls, from_record
from labkit.runs.record import RunRecord
from tests.helpers import SEED, ended, net, problem
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


def test_what_the_record_does_not_hold_is_given_again_to_replay_it(tmp_path):
    """The model of a script; the rules of one, of which the settings alone are made up here, and a GPU."""
    given = problem(lambda shape, n: net(shape, n))
    with labkit.connect("threads", 2) as lab:
        run = ended(labkit.train(given, lab, partition="udpa", update="sgwu", passes=1, runs=tmp_path))
    code = f"import labkit\n{from_record(run)}"
    made = {"problem": given}
    exec(code.replace("labkit.replay", "again = labkit.replay"), made)
    assert "labkit.replay(run)" in code and np.array_equal(made["again"].flat(), run.flat())
    assert "was written in a notebook or a script" in calls(run)
    assert "labkit.replay(" in calls(made["again"]) and f"labkit.load_run({str(run.path)!r}, problem=problem)" in calls(
        made["again"]
    )
    plain = run.config.replace(problem={"kind": "labkit:Classifier", "model": "lenet"})
    run.config = plain.replace(update={"name": {"by_value": "Mine"}})
    assert "With update as it was given" in from_record(run) and "labkit.replay(run, update=update)" in from_record(run)
    run.config = plain.replace(workers=[{**worker, "device": "cuda:0"} for worker in run.config.workers])
    assert "# No labkit.replay(run): it was computed on cuda" in from_record(run) and "\nlabkit.replay" not in from_record(run)


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
