"""The calls that make a run again, as code: `labkit/runs/calls.py`.

Used by pytest.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re

import numpy as np
import pytest

import labkit
from labkit import SGWU, UDPA
from labkit.errors import RunError
from labkit.runs import unfinished
from labkit.runs.calls import calls, from_record
from labkit.runs.record import RunRecord
from tests.helpers import SEED, Slow, ended, net, problem, until
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


@pytest.mark.parametrize("rules", [{}, {"update": SGWU}, {"partition": UDPA}])
@pytest.mark.parametrize("by_name", [True, False])
def test_wherever_a_run_is_gone_on_with_the_call_has_what_the_record_does_not_hold(by_name, rules, tmp_path, monkeypatch):
    """Its card, its line in a new kernel, what an interrupt says, its status, its code, and what says that something was missing."""
    given = problem((lambda shape, n: net(shape, n)) if by_name else "tests.helpers:net", kind=Slow)
    made = {what: type("Mine", (rule,), {"name": "mine"})() for what, rule in rules.items()}
    with labkit.connect("threads", 2) as lab:
        run = labkit.train(given, lab, passes=1000, runs=tmp_path, **made)
        until(lambda: run.status().get("version", 0) >= 1)
        said = [str(run._interrupted()), run._ended_with_script()]
        run.stop()
        there = labkit.load_run(run.path)
        said += [" ".join(there._card().calls), from_record(there)]
        with pytest.raises(RunError, match=r"Make .* again") if by_name or made else contextlib.nullcontext():
            try:
                labkit.resume(run.path, lab).stop()
            except RunError as error:
                said.append(str(error))
                raise
        (run.path / "status.json").unlink()  # as of a power cut
        monkeypatch.setattr("labkit.runs.status.anew", lambda *_: None)
        cut = labkit.load_run(run.path)
        said += [cut.status()["reason"], unfinished.look(run.path, run.config).text]
        written = {call.replace(", lab", "") for text in said for call in re.findall(r"labkit\.resume\([^)]*\)", text)}
        (call,) = written
        again = eval(call.replace(")", ", lab=lab)"), {"labkit": labkit, "lab": lab, "problem": given, **made})
        assert again.stop().state == "stopped"


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
