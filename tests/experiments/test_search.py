"""`labkit.search`: trials on blocks of workers, what fails in them, and a search that goes on. Runs are stand-ins but in the first
test, and in slow ones."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import labkit
from labkit import locks
from labkit.errors import ClusterError, RunError
from labkit.experiments import search as search_module
from labkit.experiments.search import Maker, _Blocks
from labkit.experiments.space import Space
from labkit.training import blocks, supervisor
from tests.helpers import data, net, until

ROOT = Path(__file__).parents[2]

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
            run = SimpleNamespace(state=state, config=config_of(problem), name=str(number), status=dict, stop=lambda: None)
            run.wait = lambda timeout: run
            return run

        monkeypatch.setattr(_Blocks, "_launch", launch)
        return launched

    return install


def test_a_trial_is_a_run_of_its_point_and_the_search_is_read_back(search, problem, capsys):
    space = {"lr": (1e-2, 0.5, "log"), "width": (3, 9, "int"), "update": ["sgwu"], "partition": ["udpa"]}
    found = search(problem, space, method="random", trials=2, passes=1, seed=4, progress=True)
    table = found.table()
    assert list(table.columns) == ["trial", "lr", "width", "update", "partition", "score", "state", "error", "seconds", "workers"]
    assert found.state == "done" and list(table.state) == ["done"] * 2 and (table.seconds > 0).all() and table.workers[0] == [0, 1]
    assert "trial 1 of 2: lr 0." in (said := capsys.readouterr().out) and "(the best so far)" in said
    best = found.run()
    assert best.config["update"]["name"] == "sgwu" and best.config["problem"]["model_args"] == {"width": found.best.width}
    measured = found.problem().measure(best.model().network, best.problem().score_indices())
    assert found.best.score == pytest.approx(measured["score"], abs=1e-6)
    assert found.problem().lr == found.best.lr and found.training()["update"] == "sgwu"
    read = labkit.load_search(found.path)
    assert read.table().equals(table) and read.state == "done" and read.replay().points == found.points == found.replay().points
    assert read.training()["update"] == "sgwu" and read.run(0).name == "0" and "2 of 2 trials, best" in repr(read)
    assert set(found.timeline().columns) >= {"trial", "worker", "start", "end"} and len(found.timeline()) == 4


@pytest.mark.slow
def test_folds_are_trained_as_train_does_and_their_scores_are_averaged(search, problem, lab, tmp_path):
    found = search(problem, {"lr": [0.1]}, method="grid", folds=2, passes=1, workers_per_trial=1)
    made, seed = found.run(0, 1), found.run(0, 1).config["seed"]
    settings = found.training() | {"seed": seed, "workers": made.config.indices, "runs": tmp_path / "again"}
    again = labkit.train(found.problem().fold(1, 2), lab, **settings).wait()
    np.testing.assert_array_equal(again.flat(), made.flat())
    measured = again.problem().measure(again.model().network, again.problem().score_indices())["score"]
    assert found.timeline().score[found.timeline().fold == 1].item() == pytest.approx(measured, abs=1e-6)
    held = [set(found.run(0, fold).problem().score_indices()) for fold in range(2)]
    assert not held[0] & held[1] and len(held[0] | held[1]) == problem.dataset.n_train
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
    space, reached = {"lr": (0.1, 0.9), "momentum": (0.0, 0.9)}, threading.Event()
    stand_ins()
    whole = search(problem, space, method=method, trials=14, name="whole")
    launched = stand_ins(before=lambda number: number == 8 and (reached.set(), stopped.wait(10)))
    stopped = threading.Event()
    found = search(problem, space, method=method, trials=14, name="cut", wait=False)
    assert reached.wait(20) and found.state == "running" and len(found.table()) == 9
    found._blocks._stop.set()
    stopped.set()
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


def test_a_trial_that_ended_the_kernel_twice_has_failed(search, problem, stand_ins, monkeypatch):
    stand_ins(before=lambda number: exec("raise SystemExit"))
    monkeypatch.setattr("labkit.experiments.study.Study.leave", lambda *which: None)  # as where the process is gone at once
    for _ in range(2):
        with pytest.raises(RunError, match="SystemExit"):
            search(problem, {"lr": (0.1, 0.2)}, method="random", trials=2)
    stand_ins()
    table = search(problem, {"lr": (0.1, 0.2)}, method="random", trials=2).table()
    assert list(table.state) == ["failed", "done"] and "cut off 2 times" in table.error[0]


@pytest.mark.parametrize(("prune", "steps"), [("asha", 9), pytest.param("extrapolate", 12, marks=pytest.mark.slow)])
def test_trials_that_do_badly_end_early_and_the_best_is_found(search, problem, monkeypatch, tmp_path, prune, steps):
    def launch(self, problem, settings, number, fold, workers):
        self.measured[number, fold] = {}
        return Going(problem, self.measured[number, fold], steps, str(number))

    monkeypatch.setattr(_Blocks, "_launch", launch)
    lr = [float(value) for value in np.random.default_rng(1).permutation(np.linspace(0.1, 0.9, 17))]
    found = search(problem, {"lr": lr}, method="grid", prune=prune)
    table = found.table()
    assert set(table.state) == {"done", "pruned"} and found.best.lr == 0.9 and not table.error.any()
    assert (table.score <= 0.96 * table.lr).all() and table.score[table.state == "done"].equals(
        (table.lr * (1 - 0.5 / steps))[table.state == "done"]
    )
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
    plain = _Blocks._launch

    def launch(self, problem, settings, number, fold, workers):
        run = plain(self, problem, settings, number, fold, workers)
        if number == 0 and workers == [0]:
            lost.append(0)
            run.state, run.stop = "running", lambda: setattr(run, "state", "stopped")
        if number == 2:
            raise ClusterError("a worker is gone")
        return run

    monkeypatch.setattr(_Blocks, "_launch", launch)
    monkeypatch.setattr(lab, "lost", lambda: lost)
    found = search(problem, {"lr": [0.1, 0.2, 0.3, 0.4]}, method="grid", workers_per_trial=1)
    assert list(found.table().state) == ["done", "done", "failed", "done"] and found.table().error[2] == "a worker is gone"
    assert [workers for number, _, workers, *_ in launched if number == 0] == [(0,), (1,)] and found.replay().points == found.points
    lost.append(1)
    with pytest.raises(ClusterError, match="lost"):
        search(problem, {"lr": [0.1, 0.2, 0.3, 0.4, 0.5]}, method="grid", name="other", workers=[0, 1])


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
    until(lambda: not any(locks.held(path) for path in (tmp_path / "search").glob("trials/*")), 60)
    again = search(more["problem"], more["space"], method="tpe", trials=7, passes=1, workers_per_trial=1, workers=[0])
    after = [json.loads(line) for line in log.read_text().splitlines()]
    assert after[: len(before)] == before and [line["tell"] for line in after if "tell" in line] == list(range(7))
    assert again.points == whole.points == again.replay().points and again.table().score.tolist() == whole.table().score.tolist()


@pytest.mark.slow
def test_a_real_run_is_stopped_by_its_scores(search, problem):
    found = search(problem, {"lr": [0.05, 1e-5, 2e-5, 3e-5]}, method="grid", prune="asha", passes=16)
    state = found.table().set_index("trial").state
    pruned = state.index[state == "pruned"]  # one may end before anybody has looked at it
    assert state[0] == "done" and len(pruned) and found.best.lr == 0.05
    assert found.timeline().groupby("trial").passes.first()[pruned].max() < 16 and found.run(int(pruned[0])).state == "stopped"


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
