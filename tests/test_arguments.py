"""Every argument of a public call, in each form that a YAML file, a slider or an array gives it: taken as the plain type, or refused.

The calls are made up to the point where they begin (`DOORS`); what they would begin with is compared. A call that was refused
has written nothing. (The checks themselves: tests/test_errors.py.)

Used by pytest.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import labkit
from labkit import chaos, plots, updates
from labkit.cluster import connect
from labkit.experiments import search, sweep
from labkit.runs import analysis, checkpoints
from labkit.runs.record import RunRecord
from labkit.simulation import simulate
from labkit.subnets import result
from labkit.subnets import train as subnets
from labkit.training import run, train
from labkit.training.run import Run
from tests.helpers import problem, settings

NOT_NUMBERS = [True, np.True_, torch.tensor(True), "3", [3], math.nan]
FORMS = {  # of a good value, by kind
    int: [np.int64, np.float32, float, np.array, torch.tensor, lambda n: torch.tensor(float(n))],
    float: [np.float64, np.array, lambda x: torch.tensor(x, dtype=torch.float64)],
    Path: [str, np.str_, Path],
    list: [tuple, np.array, torch.tensor, iter],
    str: [np.str_, np.array],
    bool: [np.bool_, int, torch.tensor],
}
BAD = {  # by kind
    int: [*NOT_NUMBERS, 2.5, math.inf, -3, 10**400],
    float: [*NOT_NUMBERS, -3.0, 10**400],
    Path: [3, True, b"x", ["x"], "a\0b"],
    list: ["12", 12, {1: 2}, [True], ["1"], [math.nan], [-5], [10**400]],
    str: [3, True, ["x"], b"x"],
    bool: ["false", None, 2, [True]],
}


class Begun(Exception):
    """A call would begin now."""


@pytest.fixture(scope="module")
def threads():
    with labkit.connect("threads", 2) as lab:
        yield lab


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, cache):
    """An empty folder, which is also the user's home."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def caught(call):
    """The local names of the function that would begin now."""
    with pytest.raises(Begun) as begun:
        call()
    return begun.value.args[0]


def begin(*_, **__):
    raise Begun(dict(inspect.currentframe().f_back.f_locals))


def of_train(monkeypatch, lab, **given):
    monkeypatch.setattr(train, "under_name", begin)
    monkeypatch.setattr(PROBLEM, "check", lambda *_, **__: None)
    found = caught(lambda: labkit.train(PROBLEM, lab, **{"update": "agwu"} | given))
    return found | dict(found["config"]) | {"runs": found["runs"], "workers": found["workers"]}


def of_connect(monkeypatch, lab, **given):
    backend = type("Backend", (), {"check": begin})
    monkeypatch.setattr(connect.importlib, "import_module", lambda _: backend)
    found = caught(lambda: labkit.connect("dask", **{"n_workers": None if "slowdown" in given else 2} | given))["request"]
    return vars(found) | {"threads_per_worker": found.threads}


def of_subnets(monkeypatch, lab, **given):
    monkeypatch.setattr(subnets, "_check_subnets", lambda *_: 0)
    monkeypatch.setattr(subnets, "under_name", begin)
    return caught(lambda: labkit.train_subnets(PROBLEM, lab, (2, 2), **given))


def of_sweep(monkeypatch, lab, **given):
    monkeypatch.setattr(sweep, "_jobs", begin)
    found = caught(lambda: labkit.sweep(**{"notebook": "n.ipynb", "grid": {}} | given))
    return found | {"notebook": found["path"], "out": found["folder"]}


def of_search(monkeypatch, lab, **given):
    monkeypatch.setattr(search, "_claimed", begin)
    return caught(
        lambda: labkit.search(PROBLEM, {"lr": [0.1]}, lab, **{"folds": 2 if given.get("prune") == "wilcoxon" else None} | given)
    )


def of_simulate(monkeypatch, lab, **given):
    monkeypatch.setattr(simulate, "Ledger", begin)
    found = caught(lambda: labkit.simulate([100.0, 50.0], **given))
    config = found["config"]
    json.dumps(config.scenario)
    own = {"slowdown": [worker["slowdown"] for worker in config.workers], "samples": config.n_train, "runs": found["folder"]}
    return found | dict(config) | config.scenario | own | {"name": found["name"]}


class Follower:
    lab = None
    state = "running"

    def wait(self, timeout):
        raise Begun({"timeout": timeout})

    stop = wait


def recorded(folder):
    settings().save(folder)
    return folder


def of_run(method):
    def door(monkeypatch, lab, **given):
        folder = Path(os.environ["HOME"]).parent / "run"
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(analysis, "crossing", begin)
        monkeypatch.setattr(checkpoints, "read_weights", begin)
        monkeypatch.setattr(RunRecord, "curve", lambda _: pd.DataFrame({"seconds": [], "score": []}))
        monkeypatch.setattr(RunRecord, "layout", checkpoints.Layout((), (), 1, 0))
        return caught(lambda: getattr(Run(recorded(folder), follower=Follower()), method)(**given))

    return door


def of_path(function, module, name="read_json"):
    def door(monkeypatch, lab, **given):
        monkeypatch.setattr(module, name, begin)
        monkeypatch.setattr(Path, "is_dir", lambda path: True)
        found = caught(lambda: function(*given.values()))
        return {name: found[name] for name in given}

    return door


def of_figure(draw, first="labkit.plots.style.extension"):
    def door(monkeypatch, lab, **given):
        monkeypatch.setattr(first, begin)
        return caught(lambda: draw(**given))

    return door


def of_storm(monkeypatch, lab, **given):
    monkeypatch.setattr(chaos, "draw", begin)
    run = type("Live", (), {"state": "running", "name": "r"})()
    return caught(lambda: chaos.Storm(run, lab, **{"faults": ["drop"]} | given))


def made(cls, **common):
    """Something whose constructor stores each argument under its name."""
    return lambda monkeypatch, lab, **given: vars(cls(**common | given))


def of_lab(monkeypatch, lab, **given):
    monkeypatch.setattr(lab._backend, "add", begin)
    return caught(lambda: lab.add(**given))


PROBLEM = problem()
FINE = [("score", -3.0), ("overlap", 12)]
DOORS = {  # of each call: how far it goes, and (argument, kind, a good value)
    "train": (of_train, [("passes", float, 2.0), ("local_steps", int, 3), ("seed", int, 3), ("checkpoints", int, 3),
              ("workers", list, [0, 1]), ("overlap", int, 3), ("heartbeat_timeout", float, 2.0), ("join_timeout", float, 2.0),
              ("exchange", str, "bfloat16"), ("name", str, "mine"), ("runs", Path, "~/there"), ("target", float, 0.5),
              ("patience", int, 3)]),
    "connect": (of_connect, [("n_workers", int, 3), ("threads_per_worker", int, 3), ("slowdown", list, [1.0, 4.0]),
                ("jitter", float, 0.5), ("timeout", float, 2.0), ("profile", str, "mine"), ("address", str, "tcp://a:1"),
                ("stalls", list, [20.0, 1.0]), ("name", str, "second")]),
    "train_subnets": (of_subnets, [("epochs", int, 3), ("patience", int, 3), ("hidden", list, [5, 7]), ("dropout", float, 0.5),
                      ("seed", int, 3), ("name", str, "mine"), ("runs", Path, "~/there"), ("workers", list, [0, 1]),
                      ("batched", int, 3), ("timeout", float, 2.0), ("stacking", str, "same-split"), ("inputs", str, "logits"),
                      ("width_rule", str, "same"), ("progress", bool, True)]),
    "sweep": (of_sweep, [("out", Path, "~/there"), ("notebook", Path, "~/there"), ("parallel", int, 3), ("timeout", float, 2.0),
              ("retry_failed", bool, True), ("fresh", bool, True), ("progress", bool, True), ("kernel_name", str, "python3")]),
    "search": (of_search, [("method", str, "tpe"), ("trials", int, 3), ("workers_per_trial", int, 2), ("folds", int, 3),
               ("prune", str, "asha"), ("passes", float, 2.0), ("local_steps", int, 3), ("exchange", str, "bfloat16"),
               ("overlap", int, 3), ("seed", int, 3), ("name", str, "mine"), ("runs", Path, "~/there"), ("workers", list, [0, 1]),
               ("fresh", bool, True), ("wait", bool, True), ("progress", bool, True)]),
    "load_search": (of_path(labkit.load_search, search), [("path", Path, "~/there")]),
    "plots.search_history": (of_figure(lambda **given: plots.search_history([], **given)), [("x", str, "seconds")]),
    "simulate": (of_simulate, [("n_workers", int, 3), ("slowdown", list, [1.0, 4.0]), ("jitter", float, 0.5), ("drift", float, 0.0),
                 ("bandwidth", float, 2.0), ("latency", float, 2.0), ("servers", int, 3), ("passes", float, 2.0),
                 ("local_steps", int, 3), ("samples", int, 300), ("n_weights", int, 3), ("overlap", int, 3), ("seed", int, 3),
                 ("runs", Path, "~/there"), ("name", str, "mine"), ("stalls", list, [20.0, 1.0]), ("exchange", str, "bfloat16"),
                 ("numerics", bool, False)]),
    "Run.wait": (of_run("wait"), [("timeout", float, 2.0)]),
    "Run.stop": (of_run("stop"), [("timeout", float, 2.0)]),
    "Run.time_to": (of_run("time_to"), [("score", float, 0.5)]),
    "Run.flat": (of_run("flat"), [("version", int, 3)]),
    "Lab.add": (of_lab, [("n", int, 3), ("timeout", float, 2.0)]),
    "load_run": (of_path(labkit.load_run, run, "Run"), [("path", Path, "~/there")]),
    "load_subnets": (of_path(labkit.load_subnets, result), [("path", Path, "~/there")]),
    "summary": (of_path(labkit.summary, sweep, "find_json"), [("out", Path, "~/there")]),
    "plots.curves": (of_figure(lambda **given: plots.curves([], **given), "labkit.plots.runs._tables"), [("target", float, 0.5), ("x", str, "samples"), ("y", str, "loss")]),
    "plots.errors": (of_figure(lambda **given: plots.errors(None, **given)), [("bar", float, 0.5)]),
    "plots.save": (of_figure(lambda **given: plots.save(None, **given)), [("path", Path, "~/there.png")]),
    "chaos.Storm": (of_storm, [("every", float, 2.0), ("most", int, 3), ("most_joins", int, 3), ("seed", int, 3)]),
    "Classifier": (made(labkit.Classifier, data="digits"), [("batch_size", int, 3), ("lr", float, 0.5), ("momentum", float, 0.5),
                   ("weight_decay", float, 0.5), ("train_samples", int, 3), ("test_samples", int, 3), ("score_samples", int, 3),
                   ("optimiser", str, "adam"), ("schedule", str, "cosine"), ("precision", str, "bfloat16"),
                   ("channels_last", bool, True), ("accumulate", int, 3), ("clip_norm", float, 0.5), ("ema", float, 0.5)]),
    "Decomposition": (made(labkit.Decomposition, grid=(2, 2)), [("grid", list, [2, 3]), ("overlap", list, [2, 3])]),
    "UDPA": (made(labkit.UDPA), [("stratified", bool, True)]),
    "IDPA": (made(labkit.IDPA), [("batches", int, 3), ("smoothing", int, 3), ("stratified", bool, True), ("speeds", list, [1.0, 2.0])]),
}  # fmt: skip
for _rule in updates.RULES:
    _found = []
    for _name, _parameter in inspect.signature(_rule).parameters.items():
        _kinds = {"int": (int, 3), "float": (float, 0.5), "bool": (bool, True), "str": (str, _parameter.default)}
        _text = (
            _parameter.annotation
            if isinstance(_parameter.annotation, str)
            else getattr(_parameter.annotation, "__name__", str(_parameter.annotation))
        )
        _found.append((_name, *_kinds[_text.partition(" ")[0]]))
    DOORS[_rule.__name__] = made(_rule), _found
NOT_PLAIN = (
    "partition update problem lab team decomposition client security resources job grid failures model data model_args augment "
)
NOT_PLAIN += "y inner loss metrics on_version source run runs figure frame note faults space objective constraints searches"  # objects, and dicts of what is in the table
ELSEWHERE = "engines drift kind baselines path border x target"  # in the tests of their modules: they depend on others


@pytest.mark.parametrize("call", DOORS)
def test_every_form_is_taken_as_the_plain_type(call, threads, home):
    for name, kind, good in DOORS[call][1]:
        wanted = home / good[2:] if kind is Path else good
        for form in FORMS[kind]:
            with pytest.MonkeyPatch.context() as monkeypatch:
                found = DOORS[call][0](monkeypatch, threads, **{name: form(good)})[name]
            found = list(found) if isinstance(found, tuple) else found
            assert found == wanted and type(found) is type(wanted), (name, form)
            if kind is list:
                assert [type(each) for each in found] == [type(each) for each in good], (name, form)
    assert os.listdir(home) == []


@pytest.mark.parametrize("call", DOORS)
def test_what_makes_no_sense_is_refused_by_its_name(call, threads, home):
    for name, kind, _ in DOORS[call][1]:
        for bad in BAD[kind]:
            if (name, bad) in FINE:
                continue
            with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises((ValueError, TypeError, labkit.LabError)) as refused:
                found = DOORS[call][0](monkeypatch, threads, **{name: bad})
                pytest.fail(f"{name}={bad!r} was taken as {found[name]!r}")
            assert name in str(refused.value), (name, bad, refused.value)
    assert os.listdir(home) == []


def test_no_argument_is_forgotten():
    """Each argument of a public call that is a number, a string, a path, a list or a flag stands in the table above."""
    for call, (_, arguments) in DOORS.items():
        function = labkit
        for part in call.split("."):
            function = getattr(function, part, None) or getattr(updates, part)
        names = {name for name in inspect.signature(function).parameters if name != "self"}
        left = names - {name for name, *_ in arguments} - {*NOT_PLAIN.split(), *ELSEWHERE.split()}
        assert not left, f"{call} has new arguments {left}: give each a line in DOORS"


def test_a_lab_a_run_a_dict_of_another_kind(threads, home):
    for call in (
        lambda: labkit.train(PROBLEM, "threads"),
        lambda: labkit.train_subnets(PROBLEM, None, (2, 2)),
        lambda: labkit.train_subnets(PROBLEM, threads, (2, 2), team=["n_workers"]),
        lambda: labkit.replay(3),
        lambda: labkit.simulate(3),
        lambda: labkit.connect("dask", 2, resources=["GPU"]),
        lambda: labkit.connect("dask", 2, resources=0),
        lambda: labkit.Classifier(model_args=3),
    ):
        with pytest.raises((TypeError, labkit.LabError), match=r"(lab|team|run|source|resources|model_args)=.* must be a "):
            call()
    for call, error in (
        (lambda: labkit.connect("dask", 2, resources={1: 2}), "resources=1 must be a string"),
        (lambda: labkit.sweep("n.ipynb", {"seed": 1}, lab="threads"), "lab is a str; give one of labkit.connect"),
        (lambda: labkit.train(PROBLEM, threads, passes=1e308), "passes=1e.308 must be above 0"),
        (lambda: labkit.simulate([1.0], passes=1e308), "passes=1e.308 must be above 0"),
        (lambda: labkit.simulate([1.0], samples=10**400), "samples=1000"),
        (lambda: labkit.simulate([1e-320]), "speed=.* must be at least"),
        (lambda: labkit.connect("threads", 2, timeout=1e300), "timeout=1e.300 must be above 0 and at most 2e.06"),
        (lambda: labkit.train(PROBLEM, threads, heartbeat_timeout=1e9), "heartbeat_timeout=1e.09 must be at most"),
        (lambda: labkit.train_subnets(PROBLEM, threads, (2, 2), hidden=[10**9]), "the coarse network would have .* weights"),
        (lambda: labkit.train_subnets(PROBLEM, threads, (10**9, 10**9)), "makes 1000000000000000000 subdomains"),
        (lambda: labkit.train_subnets(PROBLEM, threads, (10**4, 2)), "10000 subdomains along axis 0, which has"),
        (
            lambda: labkit.train_subnets(PROBLEM, threads, {"gird": (2, 2)}),
            "decomposition=.gird. is not known.*Did you mean .grid.*",
        ),
        (lambda: threads.start(0, abs, -1).result("x"), "timeout=.x. must be a number"),
        (lambda: labkit.load_run("x" * 300), "there is no run at xxx"),
        (lambda: labkit.summary("x" * 300), "there is no folder .*xxx"),
    ):
        with pytest.raises((TypeError, ValueError, labkit.LabError), match=error):
            call()
    assert os.listdir(home) == []


def test_data_do_not_go_into_the_cache_of_a_problem_that_is_refused(home, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(home / "cache"))
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 2
    for bad in ({"batch_size": 2.5}, {"precision": "half"}, {"channels_last": "no"}, {"lr": -1}, {"model_args": 3}):
        with pytest.raises((TypeError, ValueError)):
            labkit.Classifier(data=(x, y), **bad)
    with pytest.raises(ValueError, match="part=9"):
        labkit.Subnet(data=(x, y), decomposition=(2, 2), part=9)
    assert os.listdir(home) == []
