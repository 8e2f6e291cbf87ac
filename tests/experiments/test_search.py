"""`labkit.search`: trials on blocks of workers, what fails in them, and a search that goes on; with `labkit/experiments/trials.py` and
`labkit/experiments/coordinator.py`. Runs are stand-ins but in the first test, and in slow ones."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import runpy
import socket
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import labkit
from labkit.errors import ClusterError, RunError, SweepError
from labkit.experiments import coordinator, trials
from labkit.experiments import search as search_module
from labkit.experiments.coordinator import Coordinator
from labkit.experiments.executor import state
from labkit.experiments.objectives import Goals
from labkit.experiments.space import Space
from labkit.experiments.study import Study
from labkit.experiments.trials import Maker, Notebook
from labkit.runs.events import Recorder
from labkit.runs.files import write_json
from labkit.training import blocks, supervisor
from tests.experiments.helpers import write
from tests.helpers import Slow, data, net, until
from tests.test_cards import card_of

ROOT = Path(__file__).parents[2]

about_before = search_module._about
TRAINING = {
    "partition": labkit.IDPA(),
    "update": labkit.AGWU(),
    "passes": 1,
    "local_steps": None,
    "exchange": "float32",
    "overlap": 0,
}


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


@pytest.fixture
def problem():
    return labkit.Classifier(net, data(), batch_size=16, score_samples=40)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    monkeypatch.setattr(blocks, "POLL_S", 0.002)
    for module in (coordinator, blocks):
        monkeypatch.setattr(module, "LOST_S" if module is coordinator else "RETURN_S", 0.0)
    monkeypatch.setattr(search_module, "write_sqlite", lambda *what: None)  # test_copies.py has it


@pytest.fixture
def search(lab, tmp_path):
    return lambda problem, space, **more: labkit.search(problem, space, lab, **{"runs": tmp_path, "progress": False} | more)


def config_of(problem):
    return SimpleNamespace(lower_is_better=problem.lower_is_better, n_train=100)


class Going:
    """A run that comes a step further at each look, up to the score of its problem, or is stopped."""

    def __init__(self, problem, measured, steps, name):
        self.problem, self.measured, self.steps, self.name = problem, measured, steps, name
        self.step, self.is_stopped, self.config = 0, False, config_of(problem)

    @property
    def state(self):
        if self.is_stopped or self.step == self.steps:
            return "stopped" if self.is_stopped else "done"
        self.step += 1
        self.measured[self.step] = self.step, {"score": self.problem.lr * (1 - 0.5 / self.step), "loss": 1.0}
        return "running"

    def status(self):
        return {"samples": 100 * self.step / self.steps}

    def wait(self, timeout):
        return self

    def stop(self):
        self.is_stopped = True


@pytest.fixture
def stand_ins(monkeypatch):
    """Runs that end at once with the score `of(problem)`; what was launched."""
    launched = []

    def install(of=lambda problem: problem.lr, state="done", before=lambda number: None):
        def launch(self, problem, settings, number, fold, workers):
            before(number)
            launched.append((number, fold, tuple(workers), settings, self.study.seed_of(number)))
            self.measured[number, fold] = {0: (0, {"score": 9.0, "loss": 1}), 5: (1, {"score": of(problem), "loss": 1})}
            run = SimpleNamespace(config=config_of(problem), name=str(number), status=dict, stop=lambda: None)
            run.state = state(number) if callable(state) else state
            run.wait = lambda timeout: run
            return run

        monkeypatch.setattr(Coordinator, "_launch", launch)
        return launched

    return install


def test_a_search_is_pickled_by_its_directory(search, problem, stand_ins):
    stand_ins()
    found = search(problem, {"lr": (0.01, 0.1)}, method="random", trials=2, workers_per_trial=1)
    for one in (found, labkit.load_search(found.path)):
        again = pickle.loads(pickle.dumps(one))
        assert again.table().equals(found.table()) and again.state == "done" and again.path == found.path
    pickled = pickle.dumps(found)
    assert pickle.loads(pickled).problem(1).lr == copy.deepcopy(found).problem(1).lr == found.points[1]["lr"]
    search(problem, {"lr": (0.01, 0.1)}, method="random", trials=1, workers_per_trial=1, fresh=True)
    with pytest.raises(RunError, match="holds another search now"):
        pickle.loads(pickled)


def test_a_trial_is_a_run_of_its_point_and_the_search_is_read_back(search, problem, capsys):
    space = {"lr": (1e-2, 0.5, "log"), "width": (3, 9, "int"), "update": ["sgwu"], "partition": ["udpa"]}
    found = search(problem, space, method="random", trials=2, passes=1, seed=4, progress=True)
    table = found.table()
    assert list(table.columns) == ["trial", "lr", "width", "update", "partition", "score", "state", "error", "seconds", "workers"]
    assert found.state == "done" and list(table.state) == ["done"] * 2 and (table.seconds > 0).all() and table.workers[0] == [0, 1]
    said = capsys.readouterr().out
    assert "trial 0 (1 of 2): lr 0." in said and "(the best so far)" in said
    line = said.splitlines()[-1]
    assert line.startswith(
        f"Search search: best held-out score {table.score.max():.4g}, trial {found.best.trial}. As the best of 2"
    )
    assert "it is optimistic: labkit.train(found.problem(), lab, **found.training()) measures the test score." in line
    assert f"best held-out score {table.score.max():.4g}" in repr(found)
    best = found.run()
    assert best.config["update"]["name"] == "sgwu" and best.config["problem"]["model_args"] == {"width": found.best.width}
    measured = found.problem().measure(best.model().network, best.problem().score_indices())
    assert found.best.score == pytest.approx(measured["score"], abs=1e-6)
    assert found.problem().lr == found.problem(found.front().iloc[0]).lr == found.best.lr and found.training()["update"] == "sgwu"
    assert not any(found.path.glob("trials/*/metrics.parquet"))  # no trial has seen the test set
    read = labkit.load_search(found.path)
    assert read.table().equals(table) and read.state == "done" and read.replay().points == found.points == found.replay().points
    assert read.training()["update"] == "sgwu" and read.run(0).name == "0" and "2 of 2 trials, best" in repr(read)
    assert set(found.timeline().columns) >= {"trial", "worker", "start", "end"} and len(found.timeline()) == 4
    assert {"seconds", "trials", "best"} <= set(found.history()) and found.history().best.iloc[-1] == found.best.score


@pytest.mark.slow
def test_folds_are_trained_as_train_does_and_their_scores_are_averaged(search, problem, lab, tmp_path):
    found = search(problem, {"lr": [0.1]}, method="grid", folds=2, passes=1, workers_per_trial=1)
    for fold in range(2):
        made = found.run(0, fold)
        settings = found.training() | {"seed": made.config["seed"], "workers": made.config.indices, "runs": tmp_path / "again"}
        its = found.problem().fold(fold, 2)
        again = labkit.train(its, lab, **settings).wait()
        np.testing.assert_array_equal(again.flat(), made.flat())
        measured = its.measure(again.model().network, its.score_indices())["score"]
        assert found.timeline().score[found.timeline().fold == fold].item() == measured
        indices = [set(of.train_indices()) for of in (its, made.problem())]
        assert indices[0] == indices[1] and indices[0] == set(range(problem.dataset.n_train)) - set(its.score_indices())
    held = [set(found.run(0, fold).problem().score_indices()) for fold in range(2)]
    assert not held[0] & held[1] and len(held[0] | held[1]) == problem.dataset.n_train
    assert all(set(problem.labels(np.array(sorted(fold))).tolist()) == {0, 1, 2} for fold in held)
    assert sorted(found.timeline().fold) == [0, 1] and found.best.score == pytest.approx(found.timeline().score.mean())
    assert found.run(0, 1).config["problem"]["cross_validation"]["fold"] == 1 and found.problem()._fold is None
    with pytest.raises(RunError, match="has no run of fold 2"):
        found.run(0, 2)


def test_a_problem_a_class_or_a_function_is_made_of_a_point(problem):
    space = Space({"lr": [0.25], "width": [4], "passes": [3], "update": ["sgwu"]})
    class_ = Space({"lr": [0.25], "data": [problem.dataset], "model": {net: {"width": [4]}}, "passes": [3], "update": ["sgwu"]})
    for given, its in (
        (problem, space),
        (labkit.Classifier, class_),
        (lambda lr, width: labkit.Classifier(net, data(), lr=lr, model_args={"width": width}), space),
    ):
        made, training = Maker(given, its, TRAINING)(its.walk(lambda _, parameter: parameter.distribution.choices[0]))
        assert made.lr == 0.25 and made.model_args == {"width": 4} and (training["passes"], training["update"]) == (3, "sgwu")
    assert problem.lr == 0.05 and problem.model_args == {}
    a_fold = Maker(problem.fold(1, 3), Space({"lr": [0.1]}), TRAINING)({"lr": 0.1})[0]
    assert a_fold._fold == (1, 3, 0) and a_fold.lr == 0.1


def test_what_cannot_be_meant_is_refused_before_anything_begins(search, problem, tmp_path):
    def make(lr, depth, kind="a"):
        pass

    for given, space, said in (
        (problem, {"widht": [1]}, "Did you mean 'width'"),
        (problem, {"momentun": [1]}, "Did you mean 'momentum'"),
        (labkit.Classifier, {"passs": [1]}, "Did you mean 'passes'"),
        (make, {"lr": [1], "dept": [1]}, "Did you mean 'depth'"),
        (make, {"lr": [1]}, "needs 'depth'"),
        (make, {"lr": [1], "kind": {"a": {"depth": [1]}, "b": {}}}, "needs 'depth'"),
        (problem, {"lr": (1.0, 0.1)}, "range is empty"),
        (lambda score: problem, {"score": [1]}, "a column of this name"),
    ):
        with pytest.raises(ValueError, match=said):
            search(given, space)
    with pytest.raises(TypeError, match="problem is a int"):
        search(3, {"lr": [1]})
    with pytest.raises(ValueError, match="Did you mean 'gp'"):
        search(problem, {"lr": [1]}, method="gpp")
    with pytest.raises(ValueError, match="a grid needs single values"):
        search(problem, {"lr": (0.1, 0.2)}, method="grid")
    with pytest.raises(ClusterError, match="workers_per_trial=3, and there are 2 workers"):
        search(problem, {"lr": [0.1]}, workers_per_trial=3)
    with pytest.raises(ValueError, match="Did you mean 'agwu'"):
        search(problem, {"lr": [0.1]}, update="agwuu")
    assert not list(tmp_path.iterdir())


def test_trials_that_fail_are_rows_with_their_errors(search, problem, stand_ins, capsys):
    stand_ins(lambda problem: float("nan") if problem.model_args["width"] == 2 else problem.model_args["width"])

    def make(width, lr):
        if width == 3:
            raise KeyError("no such width")
        return labkit.Classifier(net, problem.dataset, lr=lr, model_args={"width": width})

    found = search(make, {"width": [1, 2, 3, 4], "lr": [0.1, -1.0]}, method="grid", workers_per_trial=1, progress=True)
    table = found.table()
    assert list(table.state) == ["done", "failed", "failed", "failed", "failed", "failed", "done", "failed"]
    assert "its score is nan" in table.error[2] and "KeyError" in table.error[4] and "lr=-1" in table.error[1]
    assert found.best.width == 4 and table.score.notna().sum() == 2 and "its score is nan" in capsys.readouterr().out
    assert found.replay().points == found.points
    text = " ".join(card_of(found).split())
    assert "best held-out score 4, of 2 trials" in text and "at width: 4, lr: 0.1" in text and "trials 8 of 8" in text
    assert "labkit.train(found.problem(), lab, **found.training())" in text


def test_a_model_that_does_not_build_is_a_row(search, problem):
    found = search(problem, {"width": [0.5, "x"]}, method="grid")
    assert list(found.table().state) == ["failed"] * 2 and found.table().error.str.len().all()
    with pytest.raises(RunError, match=r"no trial of search search has a score\. Trial 0: "):
        assert found.best is None


def test_blocks_are_as_many_as_there_are_workers_for_and_seeds_come_from_the_number(search, problem, stand_ins):
    launched = stand_ins()
    search(problem, {"lr": (0.1, 0.2)}, method="random", trials=6, workers_per_trial=1, name="a")
    assert {workers for _, _, workers, *_ in launched} == {(0,), (1,)} and sorted(number for number, *_ in launched) == list(
        range(6)
    )
    seeds = {number: seed for number, *_, seed in launched}
    launched.clear()
    search(problem, {"lr": (0.1, 0.2)}, method="random", trials=6, name="b")
    assert {workers for _, _, workers, *_ in launched} == {(0, 1)} and {number: seed for number, *_, seed in launched} == seeds
    assert len(set(seeds.values())) == 6


@pytest.mark.parametrize("method", ["tpe", pytest.param("evolution", marks=pytest.mark.slow)])
def test_a_search_that_was_stopped_goes_on_and_nothing_is_lost_or_doubled(search, problem, stand_ins, tmp_path, method):
    space = {"lr": (0.1, 0.9), "momentum": (0.0, 0.9)}
    stand_ins()
    whole = search(problem, space, method=method, trials=14, name="whole")
    launched = stand_ins(state=lambda number: "running" if number == 8 else "done")
    launched.clear()
    found = search(problem, space, method=method, trials=14, name="cut", wait=False)
    until(lambda: len(launched) == 9)
    assert found.state == "running" and len(found.table()) == 9
    assert found.stop().state == "stopped" and found.wait() is found and found.points == whole.points[:9]
    launched.clear()
    cut = labkit.load_search(tmp_path / "cut")
    assert cut.state == "stopped" and list(cut.table().state)[-1] == "running"
    stand_ins()
    again = search(problem, space, method=method, trials=14, name="cut")
    assert [number for number, *_ in launched] == [8, 9, 10, 11, 12, 13] and again.points == whole.points
    assert again.table().score.tolist() == whole.table().score.tolist() and again.replay().points == whole.points
    launched.clear()
    assert search(problem, space, method=method, trials=14, name="cut").points == whole.points and not launched
    assert len(search(problem, space, method=method, trials=16, name="cut").points) == 16 and len(launched) == 2
    with pytest.raises(RunError, match="is another search: its seed is 0, not 1"):
        search(problem, space, method=method, trials=14, name="cut", seed=1)
    with pytest.raises(RunError, match="is another search: its space is"):
        search(problem, space | {"lr": (0.1, 0.8)}, method=method, trials=14, name="cut")
    assert len(search(problem, space, method=method, trials=2, name="cut", seed=1, fresh=True).points) == 2
    assert (tmp_path / "cut.1" / search_module.FILE).exists()


def test_an_interrupt_stops_a_search_and_says_how_it_goes_on(search, problem, stand_ins, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    launched = stand_ins(state=lambda number: "running" if number == 2 else "done")
    found = search(problem, {"lr": (0.1, 0.9)}, method="random", trials=4, name="cut", wait=False)
    until(lambda: len(launched) == 3)
    over, presses = found._coordinator._over, iter([KeyboardInterrupt])
    wait = over.wait

    def interrupted(timeout):
        for press in presses:
            raise press
        return wait(timeout)

    monkeypatch.setattr(over, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^search cut has stopped\. The same call of labkit\.search goes on with it\.$"):
        found.wait()
    assert found.state == "stopped"


CELL = """
import labkit
from tests.helpers import data, net

WIDTHS = [2, 3]

def make(lr):
    return labkit.Classifier(net, data(), lr=lr, model_args={"width": WIDTHS[0]})

def depth(run):
    return 3.0 * run.config.n_train

objective = lambda run: run.config.n_train + 1
about = {"objective": ["score", depth], "constraints": {"depth": (1, None)}}
space = {"lr": [0.1, 0.2], "update": [labkit.AGWU()]}
"""


def test_another_objective_model_or_sense_is_another_search_and_the_same_code_in_a_new_kernel_is_the_same(search, stand_ins):
    def cell(old="", new="", before=""):
        found = {"__name__": "__main__"}
        exec(compile(before + CELL.replace(old, new), "cell", "exec"), found)
        return found

    launched = stand_ins()
    first, again = cell(), cell(before="\n# further down\n")
    search(first["make"], first["space"], method="grid", **first["about"])
    assert (
        launched and search(again["make"], again["space"], method="grid", **again["about"]).state == "done" and len(launched) == 2
    )
    for old, new, said in (
        ("3.0 *", "3.5 *", "the code of its objective is another one, in 'depth'"),
        ("[2, 3]", "[4, 3]", "the code of its problem is another one, in 'make: WIDTHS'"),
        ('"depth": (1, None)', '"depth": (2, None)', "its constraints is"),
    ):
        assert CELL.count(old) == 1
        other = cell(old, new)
        with pytest.raises(RunError, match=f"is another search: {said}.*fresh=True to begin anew"):
            search(other["make"], other["space"], method="grid", **other["about"])
    about = {"method": "grid", "name": "single"}
    search(first["make"], first["space"], objective=first["objective"], **about)
    search(again["make"], again["space"], objective=again["objective"], **about)
    edited = cell("n_train + 1", "n_train + 2")["objective"]
    for objective, said in (
        (edited, "the code of its objective is another one, in '<lambda>'"),
        (None, "the code of its objective is another one, in '<lambda>'"),
        ({"score": "min"}, "its sense is 'as of the score', not 'min'"),
    ):
        with pytest.raises(RunError, match=re.escape(f"is another search: {said}")):
            search(first["make"], first["space"], objective=objective, **about)


def test_a_record_that_counts_constants_goes_on_so(search, problem, stand_ins, monkeypatch):
    stand_ins()
    space, about = {"lr": (0.1, 0.9), "momentum": (0.0, 0.9), "width": [3]}, {"method": "evolution", "trials": 12}
    now = search(problem, space, **about, name="now")
    with monkeypatch.context() as patch:
        patch.setattr(search_module, "_about", lambda config: about_before(config) | {"counts_constants": True})
        before = search(problem, space, **about | {"trials": 10})
    config = {name: value for name, value in before.config.items() if name != "counts_constants"}
    write_json(before.path / search_module.FILE, config, run=before.config["id"])
    again = search(problem, space, **about)
    assert again.points[:10] == before.points and again.points[:10] != now.points[:10] and len(again.points) == 12
    assert labkit.load_search(again.path).replay().points == again.points


def test_a_record_that_knows_no_code_goes_on_and_has_it_from_then_on(search, problem, stand_ins):
    launched = stand_ins()
    found = search(problem, {"lr": [0.1, 0.2]}, method="grid", trials=1, objective=lambda run: 1.0)
    config = {name: value for name, value in found.config.items() if name not in ("code", "sense")}
    write_json(found.path / search_module.FILE, config, run=found.config["id"])
    assert search(problem, {"lr": [0.1, 0.2]}, method="grid", objective=lambda run: 2.0).table().score.tolist() == [1.0, 2.0]
    assert len(launched) == 2
    with pytest.raises(RunError, match="the code of its objective is another one"):
        search(problem, {"lr": [0.1, 0.2]}, method="grid", objective=lambda run: 3.0)


@pytest.fixture
def killed(search, problem, stand_ins, monkeypatch):
    """A search whose kernel is killed when so many of its trials are under way, after some seconds of each."""
    leave = Study.leave
    monkeypatch.setattr(Study, "leave", lambda self, *run, cut=None: cut and leave(self, *run, cut=cut))  # nothing more is logged

    def kill(space, seconds, n=1, **more):
        launched = stand_ins(state="running")
        launched.clear()
        found = search(problem, space, **more, wait=False)
        until(lambda: len(launched) == n)
        found.stop()
        write_json(found.path / coordinator.ALIVE, dict.fromkeys(map(str, range(n)), seconds))

    return kill


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((5, 90, 30, 31, 300), ""),
        ((400, 31, 30.5, 32), r"3 times in a row, each time after 30 to 32 s and alone"),
        ((1, 10, 100) * 3 + (1,), "10 times, while nothing else was trained"),
    ],
)
def test_kills_of_the_kernel_cost_no_trial_and_one_that_ends_it_each_time_has_failed(
    search, problem, stand_ins, killed, seconds, said
):
    space, about = {"lr": (0.1, 0.2)}, {"method": "random", "trials": 2}
    for after in seconds:
        killed(space, after, **about)
    stand_ins()
    found = search(problem, space, **about)
    assert list(found.table().state) == ["failed" if said else "done", "done"] and found.table().error.str.contains(said)[0]
    assert found.replay().points == found.points and labkit.load_search(found.path).table().equals(found.table())


def test_runs_that_two_ends_of_the_kernel_have_met_are_made_again_one_at_a_time(search, problem, stand_ins, killed):
    space, about = {"lr": (0.1, 0.2)}, {"method": "random", "trials": 6, "workers_per_trial": 1}
    for _ in range(2):
        killed(space, 7, n=2, **about)
    beside, searches = {}, []

    def look(number):
        until(lambda: searches)
        beside[number] = [job for job in searches[0].current if job[0] != number]

    launched = stand_ins(before=look)
    launched.clear()
    begin = Coordinator.start

    def start(self):
        searches.append(self)
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coordinator, "start", start)
        found = search(problem, space, **about)
    assert beside[0] == beside[1] == [] and sorted(number for number, *_ in launched) == list(range(6))
    assert found._study.trials[0]["cuts"] == {None: [[7, 1], [7, 1]]} and set(found.table().state) == {"done"}


@pytest.mark.parametrize(
    ("prune", "steps"), [("asha", 9), ("hyperband", 9), pytest.param("extrapolate", 12, marks=pytest.mark.slow)]
)
def test_trials_that_do_badly_end_early_and_the_best_is_found(search, problem, monkeypatch, tmp_path, prune, steps):
    def launch(self, problem, settings, number, fold, workers):
        self.measured[number, fold] = {}
        return Going(problem, self.measured[number, fold], steps, str(number))

    monkeypatch.setattr(Coordinator, "_launch", launch)
    lr = [float(value) for value in np.random.default_rng(1).permutation(np.linspace(0.1, 0.9, 17))]
    found = search(problem, {"lr": lr}, method="grid", prune=prune)
    table = found.table()
    assert set(table.state) == {"done", "pruned"} and found.best.lr == 0.9 and not table.error.any()
    assert (table.score <= 0.96 * table.lr).all() and table.score[table.state == "done"].equals(
        (table.lr * (1 - 0.5 / steps))[table.state == "done"]
    )
    if prune != "extrapolate":
        least = search(problem, {"lr": lr}, method="grid", prune=prune, objective={"score": "min"}, name="least")
        assert least.best.lr == 0.1 and set(least.table().state) == {"done", "pruned"}, "less is better, also of trials under way"
    spent = found.timeline().groupby("trial").passes.first()
    assert spent[table.state == "done"].eq(1).all() and spent.sum() < (0.6 if prune == "asha" else 0.8) * 17
    read = labkit.load_search(found.path)
    assert read.table().equals(table) and [one["worse"] for one in read._study.trials] == [
        one["worse"] for one in found._study.trials
    ]
    assert found.replay().table().state.tolist() == table.state.tolist()


def test_folds_that_are_worse_are_not_all_trained(search, problem, stand_ins):
    launched = stand_ins(lambda problem: problem.lr + 0.01 * problem._fold[0])
    found = search(problem, {"lr": [0.5, 0.1, 0.6]}, method="grid", folds=6, prune="wilcoxon")
    assert list(found.table().state) == ["done", "pruned", "done"] and found.best.lr == 0.6
    assert [fold for number, fold, *_ in launched if number == 1] == [0, 1, 2, 3] and found.table().score[1] == pytest.approx(0.115)
    for more, said in (
        ({"prune": "wilcoxon"}, "compares folds"),
        ({"prune": "asha", "folds": 3}, "goes by the passes of one run"),
        ({"prune": "ashaa"}, "Did you mean 'asha'"),
        ({"prune": "asha", "objective": len}, "objective= is known only in the end"),
    ):
        with pytest.raises(ValueError, match=said):
            search(problem, {"lr": [0.5]}, name="other", **more)


def test_a_run_whose_block_is_lost_is_made_again_on_another_once(search, problem, lab, stand_ins, monkeypatch):
    lost, launched = [], stand_ins()
    plain = Coordinator._launch

    def launch(self, problem, settings, number, fold, workers):
        run = plain(self, problem, settings, number, fold, workers)
        if number == 0 and workers == [0]:
            lost.append(0)
            run.state, run.stop = "running", lambda: setattr(run, "state", "stopped")
        if number == 2:
            raise ClusterError("a worker is gone")
        return run

    monkeypatch.setattr(Coordinator, "_launch", launch)
    monkeypatch.setattr(lab, "lost", lambda: lost)
    found = search(problem, {"lr": [0.1, 0.2, 0.3, 0.4]}, method="grid", workers_per_trial=1)
    assert list(found.table().state) == ["done", "done", "failed", "done"] and found.table().error[2] == "a worker is gone, 2 times"
    assert [workers for number, _, workers, *_ in launched if number == 0] == [(0,), (1,)] and found.replay().points == found.points
    lost.append(1)
    with pytest.raises(ClusterError, match="lost"):
        search(problem, {"lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, method="grid", name="other", workers=[0, 1])


def test_a_run_that_is_stopped_as_its_block_is_lost_is_made_again_also_where_that_is_back_by_then(
    search, problem, lab, stand_ins, monkeypatch
):
    lost, launched = [], stand_ins()
    plain = Coordinator._launch

    def launch(self, *what):
        run = plain(self, *what)
        if len(launched) == 1:
            lost.append(0)
            run.state = "running"

            def stop():
                lost.clear()
                run.state = "stopped"

            run.stop = stop
        elif what[2] == 1:
            run.state = "stopped"  # by somebody else
        return run

    monkeypatch.setattr(Coordinator, "_launch", launch)
    monkeypatch.setattr(lab, "lost", lambda: list(lost))
    table = search(problem, {"lr": [0.1, 0.2]}, method="grid", workers_per_trial=1, workers=[0]).table()
    assert [number for number, *_ in launched] == [0, 0, 1] and list(table.state) == ["done", "failed"]
    assert table.error[1] == "run 1 was stopped, and not by this search"


def test_runs_of_several_blocks_are_started_side_by_side_and_points_are_made_one_at_a_time(search, problem, stand_ins):
    both, inside = threading.Barrier(2), []

    def make(lr):
        inside.append(lr)
        assert inside == [lr]
        inside.remove(lr)
        return labkit.Classifier(net, problem.dataset, lr=lr)

    stand_ins(before=lambda number: both.wait(90))
    table = search(make, {"lr": (0.1, 0.2)}, method="random", trials=4, workers_per_trial=1).table()
    assert list(table.state) == ["done"] * 4


def test_an_exit_in_what_a_user_gave_is_the_end_of_that_trial_alone(search, problem, stand_ins):
    def make(lr):
        return labkit.Classifier(net, problem.dataset, lr=lr) if lr < 0.4 else sys.exit("no such lr")

    stand_ins()
    found = search(make, {"lr": [0.1, 0.2, 0.5]}, method="grid", objective=lambda run: sys.exit("oh") if run.name == "1" else 1.0)
    assert list(found.table().state) == ["done", "failed", "failed"]
    assert "oh" in found.table().error[1] and "no such lr" in found.table().error[2]


KILLED = """
import sys, labkit
from tests.helpers import data, net

problem = labkit.Classifier(net, data(), batch_size=16, score_samples=40)
space = {"lr": (1e-2, 0.5, "log"), "momentum": (0.0, 0.9)}
if __name__ == "__main__":
    with labkit.connect("threads", 1) as lab:
        labkit.search(problem, space, lab, method="tpe", trials=7, passes=1, runs=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_kernel_leaves_a_search_that_goes_on_as_if_nothing_had_been(search, tmp_path, cache):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    kernel = subprocess.Popen(
        [sys.executable, script, tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "search" / "log.jsonl"
    until(lambda: log.exists() and log.read_text().count('"tell"') == 4, 100)
    kernel.kill()
    kernel.wait()
    before = [json.loads(line) for line in log.read_text().splitlines()]
    more = runpy.run_path(str(script))
    whole = search(more["problem"], more["space"], method="tpe", trials=7, passes=1, name="whole", workers_per_trial=1, workers=[0])
    again = search(more["problem"], more["space"], method="tpe", trials=7, passes=1, workers_per_trial=1, workers=[0])
    after = [json.loads(line) for line in log.read_text().splitlines()]
    assert after[: len(before)] == before and [line["tell"] for line in after if "tell" in line] == list(range(7))
    assert again.points == whole.points == again.replay().points and again.table().score.tolist() == whole.table().score.tolist()


@pytest.mark.slow
def test_a_real_run_is_stopped_by_its_scores(search, problem):
    found = search(problem, {"lr": [0.05, 1e-5, 2e-5, 3e-5]}, method="grid", prune="asha", passes=100)
    state = found.table().set_index("trial").state
    pruned = state.index[state == "pruned"]  # one may end before anybody has looked at it
    assert state[0] == "done" and len(pruned) and found.best.lr == 0.05
    assert found.timeline().groupby("trial").passes.first()[pruned].max() < 100 and found.run(int(pruned[0])).state == "stopped"


def test_folds_that_are_left_of_a_failed_trial_are_not_trained(search, problem, stand_ins):
    launched = stand_ins(lambda problem: float("nan") if problem.lr == 0.1 and problem._fold[0] == 1 else problem._fold[0])
    found = search(problem, {"lr": [0.1, 0.2]}, method="grid", folds=4, workers_per_trial=2)
    assert [(number, fold) for number, fold, *_ in launched] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert list(found.table().state) == ["failed", "done"] and found.best.score == 1.5


def test_an_objective_of_ones_own_and_scores_of_which_less_is_better(search, problem, stand_ins, monkeypatch):
    stand_ins()
    found = search(problem, {"lr": [0.1, 0.4, 0.2]}, method="grid", objective=lambda run: [3, 5, 7][int(run.name)])
    assert found.best.lr == 0.2 and found.table().score.tolist() == [3, 5, 7]
    monkeypatch.setattr(labkit.Classifier, "lower_is_better", True)
    found = search(problem, {"lr": [0.1, 0.4, 0.2]}, method="grid", name="lower")
    assert found.best.lr == 0.1 and found.table().score.tolist() == [0.1, 0.4, 0.2]
    found = search(problem, {"lr": [0.4, 0.2, 0.1, 0.3]}, method="grid", name="target", target=0.2)
    assert found.table().score.tolist() == [0.4, 0.2] and found.state == labkit.load_search(found.path).state == "done"
    with pytest.raises(TypeError, match="objective"):
        search(problem, {"lr": [0.1]}, objective=3)
    with pytest.raises(ValueError, match="one fold of a cross-validation already"):
        search(problem.fold(0, 3), {"lr": [0.1]}, folds=2)


def test_a_gaussian_process_leaves_conditional_spaces_to_tpe(search, problem, stand_ins, capsys):
    stand_ins()
    space = {"lr": (0.1, 0.2), "optimiser": {"sgd": {"momentum": (0.0, 0.9)}, "adam": {}}}
    found = search(problem, space, trials=8)
    assert "'tpe' is taken for 'gp'" in capsys.readouterr().out and found.config["method"] == "tpe"
    table, importance = found.table(), found.importance()
    assert importance.sum() == pytest.approx(1) and set(importance.index) >= {"lr", "optimiser"}
    assert table.momentum.isna().tolist() == (table.optimiser == "adam").tolist() and table.momentum.notna().any()


def test_a_choice_of_none_is_none_in_the_table(search, problem, stand_ins):
    stand_ins()
    space = {"clip_norm": [None, 1.0], "optimiser": {"sgd": {"momentum": [None, 0.5]}, "adam": {}}, "lr": [0.1]}
    table = search(lambda lr, **more: problem, space, method="grid").table()
    assert table.clip_norm.tolist() == [None] * 3 + [1.0] * 3 and table.lr.dtype == float
    assert [value is None for value in table.momentum] == [True, False, False] * 2 and table.momentum.isna().tolist()[2]


# -- what may end a search, and where --------------------------------------------------------------------------------------


def test_a_slow_sampler_makes_a_point_while_all_blocks_train_and_what_ends_meanwhile_comes_after_it(search, problem, monkeypatch):
    ask, met = Study.ask, []

    def launch(self, problem, settings, number, fold, workers):
        measured = self.measured[number, fold] = {}
        return Going(problem, measured, 3, str(number))

    def slow(study):
        if len(study.trials) == 5:  # until the runs of both blocks have ended
            until(lambda: searches[-1].late and len(searches[-1].late) == len(searches[-1].current))
            met.append([job for job, _ in searches[-1].late])
        return ask(study)

    searches, start = [], Coordinator.start

    def ahead(self):  # as with "gp", whose points take longer than a test should
        searches.append(self)
        self.asks_ahead = True
        start(self)

    monkeypatch.setattr(Coordinator, "start", ahead)
    monkeypatch.setattr(Coordinator, "_launch", launch)
    monkeypatch.setattr(Study, "ask", slow)
    found = search(problem, {"lr": (0.1, 0.9), "momentum": (0.0, 0.9)}, method="tpe", trials=8, workers_per_trial=1)
    lines = [json.loads(line) for line in (found.path / "log.jsonl").read_text().splitlines()]
    ended = [line["end"] for line in lines[: next(at for at, line in enumerate(lines) if line.get("ask") == 5)] if "end" in line]
    assert met[0] and not {number for number, _ in met[0]} & set(ended)
    assert found.table().score.tolist() == pytest.approx([point["lr"] * (1 - 0.5 / 3) for point in found.points])
    assert set(found.table().state) == {"done"} and found.replay().points == found.points


def test_wherever_the_kernel_ends_no_trial_is_lost_or_doubled(search, problem, stand_ins, tmp_path):
    """The log is cut behind each of its lines."""
    launched, settings = stand_ins(lambda problem: float("nan") if problem.lr == 0.2 else problem.lr + 0.01 * problem._fold[0]), {}
    settings |= {"method": "grid", "folds": 2, "prune": "wilcoxon"}
    whole = search(problem, {"lr": [0.1, 0.2, 0.15]}, name="whole", **settings)
    lines = (whole.path / "log.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(whole._study.lines) and set(whole.table().state) == {"done", "failed"}
    for n in range(len(lines)):
        cut = tmp_path / f"cut-{n}"
        cut.mkdir()
        for file in ("search.json", "environment.json"):
            (cut / file).write_bytes((whole.path / file).read_bytes())
        (cut / "log.jsonl").write_text("".join(lines[:n]) + lines[n][: len(lines[n]) // 2])
        launched.clear()
        again = search(problem, {"lr": [0.1, 0.2, 0.15]}, name=cut.name, **settings)
        after = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
        assert after[:n] == [json.loads(line) for line in lines[:n]]
        ended = [(line["end"], line["fold"]) for line in after if "end" in line]
        assert len(set(ended)) == len(ended) and sorted(line["tell"] for line in after if "tell" in line) == [0, 1, 2]
        assert again.points == whole.points == again.replay().points and again.state == "done"
        assert again.table()[["score", "state", "error"]].equals(whole.table()[["score", "state", "error"]])
        assert not {(line["end"], line["fold"]) for line in after[:n] if "end" in line} & {job[:2] for job in launched}


@pytest.mark.parametrize("method", ["tpe", "evolution"])
def test_wherever_the_kernel_of_several_blocks_ends_the_log_goes_on_and_is_replayed(search, problem, stand_ins, tmp_path, method):
    """Trials are under way on two blocks when the log is cut; which of them ends first is not the same again."""
    launched, space = stand_ins(), {"lr": (0.1, 0.9), "momentum": (0.0, 0.9)}
    about = {"method": method, "trials": 9, "workers_per_trial": 1}
    whole = search(problem, space, name="whole", **about)
    lines = (whole.path / "log.jsonl").read_text().splitlines(keepends=True)
    n_under_way = []
    for n in range(0, len(lines), 5):
        cut = tmp_path / f"cut-{n}"
        cut.mkdir()
        for file in ("search.json", "environment.json"):
            (cut / file).write_bytes((whole.path / file).read_bytes())
        (cut / "log.jsonl").write_text("".join(lines[:n]))
        before = [json.loads(line) for line in lines[:n]]
        begun, told = ([line[kind] for line in before if kind in line] for kind in ("begin", "tell"))
        n_under_way.append(len(begun) - len(told))
        launched.clear()
        again = search(problem, space, name=cut.name, **about)
        after = [json.loads(line) for line in (cut / "log.jsonl").read_text().splitlines()]
        assert after[:n] == before and again.state == "done"
        assert (
            [line["ask"] for line in after if "ask" in line]
            == sorted(line["tell"] for line in after if "tell" in line)
            == list(range(9))
        )
        ended = [line["end"] for line in before if "end" in line]
        assert sorted(number for number, *_ in launched) == [number for number in range(9) if number not in ended]
        assert again.replay().points == again.points == labkit.load_search(cut).points
    assert max(n_under_way) == 2


def test_the_clock_goes_on_from_what_was_trained_when_the_kernel_ended(search, problem, stand_ins, tmp_path):
    stand_ins()
    about = {"method": "grid", "workers_per_trial": 1, "workers": [0]}
    whole = search(problem, {"lr": [0.1, 0.2]}, **about)
    log, of = whole.path / "log.jsonl", whole.path / "trials" / "1"
    lines = log.read_text().splitlines(keepends=True)
    begun = next(at for at, line in enumerate(lines) if json.loads(line).get("begin") == 1)
    log.write_text("".join(lines[: begun + 1]))
    of.mkdir(parents=True)
    recorder = Recorder(of, clock=lambda: (0.0, 3600.0))
    recorder.event("start")
    recorder.close()
    again = search(problem, {"lr": [0.1, 0.2]}, **about)
    timeline, began = again.timeline(), json.loads(lines[begun])["seconds"]
    assert timeline.start[1] >= began + 3600 and timeline.end[0] < 3600 and timeline.end[1] < began + 3700
    assert again.table().score.tolist() == whole.table().score.tolist()


def test_a_search_that_is_running_elsewhere_is_neither_begun_twice_nor_taken_for_an_old_one(search, problem, stand_ins, tmp_path):
    reached, go_on = threading.Event(), threading.Event()
    stand_ins(before=lambda number: number == 2 and (reached.set(), go_on.wait(90)))
    about = {"method": "random", "trials": 4, "workers": [0], "workers_per_trial": 1}
    found = search(problem, {"lr": (0.1, 0.2)}, **about, wait=False)
    assert reached.wait(90)
    read = labkit.load_search(tmp_path / "search")
    assert read.state == "running" and len(read.points) == 3 and "running" in repr(read)
    for fresh in (False, True):
        with pytest.raises(RunError, match="still running"):
            search(problem, {"lr": (0.1, 0.2)}, **about | {"workers": [1], "fresh": fresh})
    go_on.set()
    assert found.wait().state == "done" and read.state == "done" and read.points == found.points and len(read.points) == 4


def test_the_end_of_a_run_that_was_made_again_is_not_that_of_the_new_one(search, problem, stand_ins):
    stand_ins()
    found = search(problem, {"lr": [0.1]}, method="grid")
    old, new = (SimpleNamespace(state=state, name="0") for state in ("failed", "running"))
    it = found._coordinator
    it.study.begin(0, None, [0])
    it.current[0, None], n = new, len(it.study.lines)
    it._each((0, None), old)
    assert len(it.study.lines) == n


def test_a_fold_that_is_stopped_on_its_way_has_no_score(search, problem, monkeypatch):
    """Of two blocks one is slow; what it has begun when the trial is found to be worse does not count, and is no failure."""

    def launch(self, problem, settings, number, fold, workers):
        measured = self.measured[number, fold] = {}
        slow = number == 1 and fold == 1
        return Going(problem, {} if slow else measured, 10**9 if slow else 1, f"{number}-{fold}")

    monkeypatch.setattr(Coordinator, "_launch", launch)
    found = search(problem, {"lr": [0.5, 0.1]}, method="grid", folds=6, prune="wilcoxon", workers_per_trial=1)
    table, units = found.table(), found._study.trials[1]["units"]
    assert table.state.tolist() == ["done", "pruned"] and table.score[1] == pytest.approx(0.05) and not table.error.any()
    assert all(unit["whole"] == (unit["score"] is not None) for unit in units.values())


# -- objectives, constraints, notebooks ------------------------------------------------------------------------------------


class Unit(dict):
    """A run of a trial; when it is looked at, the thread of the search does something."""

    def __init__(self, unit, does):
        super().__init__(unit)
        self.todo = [does]

    def __getitem__(self, name):
        value = super().__getitem__(name)
        if name in ("ended", "workers") and self.todo:
            self.todo.pop()()
        return value

    def __ior__(self, other):
        self.update(other)
        for look in self.todo:
            look()
        return self


def under_way():
    """A search of which a first run has begun, and its study."""
    study = Study(Space({"lr": (0.01, 0.1)}), "random", 0, 3)
    config = {"method": "random", "trials": 9, "target": None, "folds": None, "problem": {}, "objectives": [["loss", -1]]}
    study.ask()
    study.begin(0, None, [0])
    return search_module.Search(Path("s"), config, study), study


@pytest.mark.parametrize("look", [lambda found: found.table(), lambda found: found._study.frozen(datetime(2026, 11, 30))])
def test_a_search_can_be_looked_at_while_another_fold_begins(look):
    found, study = under_way()
    study.trials[0]["units"][None] = Unit(study.trials[0]["units"][None], lambda: study.begin(0, 1, [1]))
    look(found)
    assert len(study.trials[0]["units"]) == 2 and len(found.table()) == 1


def test_a_score_of_which_less_is_better_is_never_shown_with_another_sign():
    """Who looks in the moment in which the first run has ended, or its trial is told, sees the score as it is, or none yet."""
    found, study = under_way()

    def end():
        study.end(0, None, 0.25, -1)
        study.tell(0, "done", -0.25)

    study.trials[0]["units"][None] = Unit(study.trials[0]["units"][None], end)
    assert found.table().score.isna().all() and found.table().score.tolist() == [0.25]
    found, study = under_way()
    seen, unit = [], study.trials[0]["units"][None]
    study.trials[0]["units"][None] = unit = Unit(unit, lambda: None)
    unit.todo = [lambda: seen.append((dict(unit)["ended"] is not None, found.lower_is_better))]
    study.end(0, None, 0.25, -1)
    assert seen and seen[-1] == (True, True) and (True, False) not in seen


@pytest.mark.parametrize("best", [lambda found: found.best, lambda found: found.front().iloc[0]])
def test_the_best_trial_is_one_that_has_ended_also_where_a_better_one_ends_just_now(best, monkeypatch):
    found, study = under_way()
    study.end(0, None, 0.25, -1)
    study.tell(0, "done", -0.25)
    table = search_module.Search.table

    def tell(found):
        seen = table(found)
        study.begin(study.ask(), None, [0])
        study.end(1, None, 0.125, -1)
        study.tell(1, "done", -0.125)
        return seen

    monkeypatch.setattr(search_module.Search, "table", tell)
    row = best(found)
    assert row.state == "done" and row.score == 0.25


def test_several_objectives_have_a_front_and_constraints_are_kept(search, problem, stand_ins, monkeypatch, capsys):
    stand_ins()
    cost = {0.1: 1.0, 0.2: 2.0, 0.3: 9.0, 0.4: 3.0, 0.5: 30.0}

    def costs(run):
        return -cost[float(run.name)]

    plain = Coordinator._launch

    def launch(self, problem, *more):
        run = plain(self, problem, *more)
        run.name = problem.lr
        return run

    monkeypatch.setattr(Coordinator, "_launch", launch)
    about = {"method": "grid", "objective": ["score", costs], "progress": True}
    found = search(problem, {"lr": list(cost)}, **about)
    table = found.table()
    assert table.columns[:4].tolist() == ["trial", "lr", "score", "costs"] and table.costs.tolist() == [-c for c in cost.values()]
    assert found.front().lr.tolist() == [0.5, 0.4, 0.2, 0.1] and found.best.lr == 0.5
    said = capsys.readouterr().out
    assert found.objectives == ["score", "costs"] and "held-out score 0.1, costs -1" in said
    lines = [line.partition(":")[0] for line in said.splitlines() if "(on the front so far)" in line]
    assert lines == [f"trial {number} ({number + 1} of 5)" for number in range(5)], "also of trial 2, until the next one"
    assert "the best so far" not in said and "best by held-out score 0.5, 4 on the front, trial 4. As the best" in said
    assert "best by held-out score 0.5, 4 on the front" in repr(found) and "best by held-out score" in card_of(found)
    kept = search(problem, {"lr": list(cost)}, **about, name="kept", constraints={"costs": (-10, None), "score": 0.35})
    assert kept.table().feasible.tolist() == [True, True, True, False, False] and kept.front().lr.tolist() == [0.3, 0.2, 0.1]
    assert capsys.readouterr().out.count("(on the front so far)") == 3
    read = labkit.load_search(kept.path)
    assert read.best.lr == 0.3 and read.table().equals(kept.table()) and read.front().equals(kept.front())
    none = search(problem, {"lr": list(cost)}, **about, name="none", constraints={"score": (1, None)})
    assert none.front().empty
    with pytest.raises(RunError, match="keeps the constraints"):
        assert none.best is None
    for method in ("tpe", "evolution"):
        space = {"lr": list(cost), "momentum": (0.0, 0.9)}
        more = {"name": method, "trials": 12, "constraints": {"costs": (-10, None)}, "method": method, "progress": False}
        made = search(problem, space, **about | more)
        assert (
            made.replay().points == made.points
            and set(made.table().state) == {"done"}
            and made.importance().sum() == pytest.approx(1)
        )
    with pytest.raises(RunError, match="is another search: its constraints"):
        search(problem, space, **about | more | {"constraints": {"costs": (-9, None)}})
    with pytest.raises(ValueError, match="goes by one score"):
        search(problem, {"lr": [0.1]}, method="grid", folds=2, prune="wilcoxon", objective=["score", "time"])
    for taken in ({"objective": ["loss", "score"]}, {"objective": "loss", "constraints": {"score": (0.2, None)}}):
        with pytest.raises(ValueError, match=r"'score': the table of a search has a column of this name.*Name it first"):
            search(problem, {"lr": [0.1]}, method="grid", **taken)


@pytest.mark.slow
def test_time_and_size_are_those_of_the_runs(search, problem):
    about = {"method": "grid", "passes": 1, "objective": {"score": "max", "size": "min"}, "constraints": {"time": 100}}
    table = search(problem, {"width": [3, 5]}, **about).table()
    assert table["size"].tolist() == [36 * w + w + 3 * w + 3 for w in (3, 5)] and ((table.time > 0) & (table.time < 100)).all()


def test_a_name_that_nothing_is_measured_by_is_found_before_anything_begins(search, problem, tmp_path):
    class Own(labkit.Classifier):
        def evaluate(self, module, batch):
            return {**super().evaluate(module, batch), "depth": 1.0}

    class Later(Own):
        def milestones(self):
            return (0.5,)

        def settle(self, module, clock):
            pass

    given = labkit.Classifier(net, data(), score_samples=40, metrics=["accuracy"])
    of_two = {"lr": [0.1], "metrics": [["mae"], ["accuracy"]]}
    for of, space, about, said in (
        (
            given,
            {"lr": [0.1]},
            {"objective": "acuracy"},
            r"'acuracy' is .*Did you mean 'accuracy'\?.*time, size, loss, score, accuracy",
        ),
        (given, {"lr": [0.1]}, {"objective": ["score", "los"]}, "'los' is .*Did you mean 'loss'"),
        (given, {"lr": [0.1]}, {"constraints": {"siez": 3}}, "'siez' is .*Did you mean 'size'"),
        (given, of_two, {"objective": {"rmse": "min"}}, "'rmse' is nothing that a trial is measured by"),
        (Own(net, data(), score_samples=40), {"lr": [0.1]}, {"objective": "dept"}, "Did you mean 'depth'"),
        (lambda lr: given, {"lr": [0.1]}, {"objective": "acuracy"}, "Did you mean 'accuracy'"),
    ):
        with pytest.raises(ValueError, match=said):
            search(of, space, method="grid", **about)
    for cells, said in (
        (("labkit.report(run_dir, {'scores': lr})",), "'score' is .*Did you mean 'scores'.*There are time, scores"),
        (("report(run_dir, results=[{'loss': 1}, {'auc': 2}])",), "'auk' is .*Did you mean 'auc'"),
    ):
        objective = "auk" if "auk" in said else None
        with pytest.raises(ValueError, match=said):
            search(write(tmp_path / "of.ipynb", *cells), {"lr": [0.1]}, method="grid", objective=objective)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    goals = Goals("depth")
    for of, there in (
        (Own(net, data(), score_samples=40), True),
        (Later(net, data(), score_samples=40), None),
        (lambda lr: 1 / 0, None),
    ):
        found = Maker(of, Space({"lr": [0.1]}), TRAINING).measured(goals)
        assert found is None if there is None else not goals.missing(found)
    for cell in ("labkit.report(run_dir, found)", "%timeit 1", "mine(run_dir)", "labkit.report(run_dir, {**found, 'a': 1})"):
        assert Notebook(write(tmp_path / "of.ipynb", cell), Space({"lr": [0.1]})).measured(goals) is None


def test_a_notebook_is_a_trial_and_its_results_are_the_scores(search, lab, tmp_path, monkeypatch):
    def execute(job):
        values, folder = job["parameters"], Path(job["folder"])
        folder.mkdir(parents=True)
        assert values["run_dir"] == str(folder) and Path(job["flag"]).exists()
        failed = values.get("strategy") == "none"
        write_json(folder / "params.json", job["record"])
        if not failed:
            write_json(folder / "results.json", [{"score": values["lr"] + row, "name": "a"} for row in (0, 1)])
        write_json(
            folder / "status.json", {"state": "failed" if failed else "done", "seconds": 2.0, "error": "In [2]: no" * failed}
        )
        return state(folder)["state"]

    monkeypatch.setattr(trials, "execute", execute)
    notebook = write(tmp_path / "train.ipynb", "1")
    space = {"lr": [0.1, 0.4], "strategy": ["agwu", "none"]}
    found = search(notebook, space, method="grid", objective=["score", "time"])
    table = found.table()
    assert table.score.tolist()[::2] == pytest.approx([0.6, 0.9]) and table.time.tolist()[::2] == [2.0, 2.0]
    assert table.state.tolist() == ["done", "failed"] * 2 and "In [2]: no" in table.error[1] and found.best.lr == 0.4
    assert found.replay().points == labkit.load_search(found.path).points == found.points
    assert labkit.summary(found.path / "trials").lr.tolist() == [0.1, 0.1, 0.1, 0.4, 0.4, 0.4]  # two rows where it was done
    with pytest.raises(RunError, match=r"is a notebook: .*notebook\.ipynb"):
        found.run()
    table = search(notebook, {"lr": [0.1]}, method="grid", objective="accuracy", name="other").table()
    assert table.error[0] == "'accuracy' is nothing that was measured. There are time, score"
    for space, said in (
        ({"lrr": [0.1]}, "Did you mean 'lr'"),
        ({"run_dir": ["a"]}, "'run_dir' is nothing that is set here"),
        ({"seed": (0.0, 0.5)}, "parameter 'seed' is int"),
        ({"lr": [0.1, "a"]}, "parameter 'lr' is float"),
    ):
        with pytest.raises((ValueError, SweepError), match=said):
            search(notebook, space, name="never")
    with pytest.raises(ValueError, match="executed as a whole"):
        search(notebook, {"lr": [0.1]}, name="never", folds=3)
    with pytest.raises(SweepError, match="there is no notebook"):
        search(tmp_path / "none.ipynb", {"lr": [0.1]}, name="never")


def test_a_notebook_whose_worker_is_lost_is_executed_again_once(search, tmp_path, monkeypatch):
    process = subprocess.Popen(["true"])
    process.wait()
    gone = {"state": "running", "host": socket.gethostname(), "pid": process.pid, "born": 1.0}

    def execute(job):  # the process of the worker has ended with it
        lr, folder = job["parameters"]["lr"], Path(job["folder"])
        is_first = not folder.exists()
        folder.mkdir(exist_ok=True)
        write_json(folder / "results.json", [{"score": lr}])
        write_json(folder / "status.json", gone if is_first or lr == 0.4 else {"state": "done", "seconds": 2.0})

    monkeypatch.setattr(trials, "execute", execute)
    found = search(write(tmp_path / "train.ipynb", "1"), {"lr": [0.1, 0.4]}, method="grid")
    assert list(found.table().state) == ["done", "failed"]
    assert found.table().error[1] == "the workers of its block were lost, 2 times"
    assert sum("leave" in line for line in found._study.lines) == 2
    assert not list((found.path / "trials").glob(".*")) and found.replay().points == found.points


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_notebook_is_executed(search, tmp_path):
    notebook = write(tmp_path / "train.ipynb", "import labkit\nlabkit.report(run_dir, {'score': lr})")
    found = search(notebook, {"lr": [0.1, 0.4]}, method="grid")
    assert found.table().score.tolist() == [0.1, 0.4] and (found.path / "trials" / "1" / "notebook.ipynb").exists()


def happened(found, kind):
    """The events of this kind in the first trial of a search."""
    path = found.path / "trials" / "0" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()[:-1]] if path.exists() else []
    return [event for event in events if event["kind"] == kind]


def test_a_lab_that_is_closed_leaves_the_trials_under_way_to_the_next_call(problem, stand_ins, tmp_path):  # and the others no lab
    launched = stand_ins(state="running")
    about = {"method": "grid", "workers_per_trial": 1, "runs": tmp_path, "progress": False}
    with labkit.connect("threads", 2) as lab:
        found = labkit.search(problem, {"lr": [0.1, 0.2, 0.3]}, lab, **about, wait=False)
        until(lambda: len(launched) == 2)

        def stop():  # a run of it, while the lab is being closed
            for launch in found._coordinator.current.values():
                launch.run.state = "stopped"
            until(lambda: found.state != "running")

        lab.runs.append(SimpleNamespace(stop=stop))
    with pytest.raises(ClusterError, match="the lab was closed"):
        found.wait()
    assert [line["leave"] for line in found._study.lines if "leave" in line] == [0, 1]
    stand_ins()
    with labkit.connect("threads", 2) as lab:
        assert list(labkit.search(problem, {"lr": [0.1, 0.2, 0.3]}, lab, **about).table().state) == ["done"] * 3


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_killed_worker_of_a_block_costs_no_trial(
    tmp_path, monkeypatch, cache
):  # one of the last: it closes the lab of the others
    monkeypatch.setattr(coordinator, "LOST_S", 5.0)
    monkeypatch.setattr(blocks, "RETURN_S", 15.0)
    problem = Slow(net, data(), batch_size=16, score_samples=40)
    with labkit.connect("dask", 2) as lab:
        about = {"method": "random", "trials": 3, "passes": 6, "runs": tmp_path, "progress": False}
        found = labkit.search(problem, {"lr": (0.01, 0.1)}, lab, **about, workers_per_trial=1, wait=False)
        until(lambda: len(found.timeline()) == 2 and any(found.path.glob("trials/0/events.jsonl")), 60)
        victim = lab.workers[int(found.timeline().worker[0])]
        os.kill(victim.pid, 9)
        table = found.wait(200).table()
        assert table.state.tolist() == ["done"] * 3 and found.replay().points == found.points
        told = [line["tell"] for line in found._study.lines if "tell" in line]
        assert sorted(told) == [0, 1, 2]
        # Of two workers of a block one is lost: its run goes on with the other one, or with that which comes back.
        about |= {"trials": 2, "name": "pair"}
        found = labkit.search(problem, {"lr": (0.01, 0.1)}, lab, **about, workers_per_trial=2, wait=False)
        until(lambda: found.timeline().trial.tolist() == [0, 0] and happened(found, "push"), 60)
        os.kill(lab.workers[1].pid, 9)
        assert found.wait(200).table().state.tolist() == ["done"] * 2
        assert [event["worker"] for event in happened(found, "leave") if event.get("message")] == [1]
        assert [line["begin"] for line in found._study.lines if "begin" in line] == [0, 1]
        # A notebook ends with its worker, and is executed again.
        notebook = write(tmp_path / "train.ipynb", "import labkit, time\ntime.sleep(3)\nlabkit.report(run_dir, {'score': lr})")
        about = {"method": "grid", "runs": tmp_path, "progress": False, "name": "notebook", "wait": False}
        found = labkit.search(notebook, {"lr": [0.1, 0.4]}, lab, **about)
        until(lambda: state(found.path / "trials" / "0")["state"] == "running", 60)
        os.kill(lab.workers[int(found.timeline().worker[0])].pid, 9)
        assert found.wait(200).table().score.tolist() == [0.1, 0.4]
        assert [line["leave"] for line in found._study.lines if "leave" in line] == [0]
