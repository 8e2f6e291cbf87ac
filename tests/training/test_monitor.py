"""A run that ends when its versions are good enough or no longer get better, and what is called for each of them."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

import labkit
from labkit import plots
from labkit.errors import LabError, ProblemError
from labkit.training.monitor import Monitor
from tests.helpers import problem, settings
from tests.plots.helpers import title


class Slow(labkit.Classifier):
    def step(self, *args):
        time.sleep(0.003)
        return super().step(*args)


@pytest.mark.parametrize(
    ("scores", "limits", "ends"),
    [
        ([0.2, 0.5, 0.91], {"target": 0.9}, "version 2 has score 0.91 on the score set, and the target is 0.9"),
        ([0.2, 0.5, 0.4, 0.5], {"patience": 2}, "2 retained versions up to 3 were no better than score 0.5"),
        ([0.2, 0.1, 0.3, 0.2, 0.31], {"patience": 2}, ""),
        ([0.5, 0.4, 0.95], {"patience": 3, "target": 0.9}, "version 2 has score 0.95"),
        (
            [9.0, 5.0, 2.4],
            {"target": 2.5, "lower_is_better": True},
            "version 2 has score 2.4 on the score set, and the target is 2.5",
        ),
        (
            [5.0, 3.0, 4.0, 3.0],
            {"patience": 2, "lower_is_better": True},
            "2 retained versions up to 3 were no better than score 3 ",
        ),
        ([5.0, 3.0, math.nan, 2.9, 3.0], {"patience": 2, "lower_is_better": True}, ""),
    ],
)
def test_when_it_ends(scores, limits, ends):
    monitor = Monitor(problem(), settings(**limits))
    said = [monitor.verdict(version, {"loss": 1.0, "score": score}) for version, score in enumerate(scores)]
    assert not any(said[:-1]) and said[-1].startswith(ends) and bool(said[-1]) == bool(ends)


def test_a_run_ends_at_its_target_and_every_version_was_shown(train):
    seen = []
    run = train(
        problem(kind=Slow), passes=200, checkpoints=400, target=0.6, on_version=lambda run, *what: seen.append((run.name, *what))
    ).wait(100)
    assert run.state == "stopped" and run.status()["samples"] < run.config.budget
    assert "the target is 0.6" in run.status()["reason"] and run.config["target"] == 0.6 and "patience" not in run.config
    versions = [version for _, version, _ in seen]
    assert versions == sorted(set(versions)) and {name for name, *_ in seen} == {run.name}
    assert seen[-1][2]["score"] >= 0.6 > max([measured["score"] for *_, measured in seen[:-1]], default=0)
    assert f"version {versions[-1]} has" in run.status()["reason"] and versions[-1] in run.curve().version.tolist()
    for version, measured in ((version, measured) for _, version, measured in seen):
        assert problem().measure(run.model(version).network, problem().score_indices()) == pytest.approx(measured)
    assert labkit.load_run(run.path).state == "stopped"
    again = labkit.resume(run.path, problem=problem(kind=Slow))  # only what comes now is judged
    assert again.config.target == 0.6 and again.wait(100).state in ("stopped", "done")


def test_it_ends_when_nothing_gets_better(train):
    run = train(problem(kind=Slow, lr=1e-9), passes=600, checkpoints=1200, patience=3).wait(100)
    assert run.state == "stopped" and run.status()["reason"].startswith("3 retained versions up to")
    assert labkit.replay(run).flat().tobytes() == run.flat().tobytes()


def test_the_best_version_is_that_of_the_score_set(train):
    a_problem = problem(lr=0.02)
    run = train(a_problem, passes=6, checkpoints=6).wait(100)
    scores = {
        version: a_problem.measure(run.model(version).network, a_problem.score_indices())["score"]
        for version in run.curve().version.tolist()
    }
    best = max(scores, key=scores.get)
    np.testing.assert_array_equal(run.flat("best"), run.flat(best))
    assert run.weights("best").keys() == run.weights().keys()
    assert a_problem.measure(run.model("best").network, a_problem.score_indices())["score"] == scores[best]


class Distance(Slow):
    """Its score is an error, beyond 1 at the beginning."""

    lower_is_better = True

    def evaluate(self, module, batch):
        measured = super().evaluate(module, batch)
        return {"loss": measured["loss"], "score": 10 * measured["loss"]}


def test_where_lower_is_better_target_best_and_curve_follow(train):
    a_problem = problem(kind=Distance)
    for update in ("agwu", "sgwu"):
        with pytest.raises(ProblemError, match=rf"of which less is better, and {update} weighs pushes by a score"):
            train(a_problem, update=update)
    run = train(a_problem, update="fedasync", passes=400, checkpoints=800, target=8.0).wait(100)
    assert run.state == "stopped" and "the target is 8" in run.status()["reason"] and run.events.score.isna().all()
    curve, again = run.curve(), labkit.load_run(run.path)
    assert curve.score[0] > 8 and run.config.lower_is_better and again.config.lower_is_better
    assert 0 < again.time_to(9.0) < curve.seconds.max() and again.time_to(1e-9) is None
    run.flat("best")
    scores = {v: a_problem.measure(run.model(v).network, a_problem.score_indices())["score"] for v in curve.version}
    np.testing.assert_array_equal(run.flat("best"), run.flat(min(scores, key=scores.get)))
    assert labkit.compare([run]).lower_is_better.tolist() == [True]
    figure = plots.curves([run], target=9.0)
    assert "reaches score 9 after" in title(figure)
    with pytest.raises(ProblemError, match="sgwu weighs pushes"):
        labkit.replay(run, update="sgwu")


def test_what_the_callback_raises_fails_the_run_and_is_raised(train):
    def callback(run, version, measured):
        raise ZeroDivisionError("no log today")

    run = train(problem(kind=Slow), passes=400, on_version=callback)
    with pytest.raises(LabError, match=r"on_version=.*callback at version 0 raised ZeroDivisionError: no log today") as caught:
        run.wait(100)
    assert run.state == "failed" and isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_callback_may_stop_the_run(train):
    run = train(problem(kind=Slow), passes=400, on_version=lambda run, *what: run.stop()).wait(100)
    assert run.state == "stopped" and run.status()["samples"] < run.config.budget


def test_a_slow_callback_is_called_for_every_version_and_what_it_raises_at_the_end_is_raised(train):
    def callback(run, version, measured):
        seen.append(version)
        time.sleep(0.1)
        if version == last:
            raise ZeroDivisionError("not the last one")

    seen, last = [], None
    run = train(problem(), update="sgwu", passes=5, checkpoints=5, on_version=callback).wait(100)
    assert seen == run.curve().version.tolist() and run.state == "done" and seen[-1] == run.status()["version"]
    seen, last = [], seen[-1]
    run = train(problem(), update="sgwu", passes=5, checkpoints=5, on_version=callback, name="again")
    with pytest.raises(LabError, match=r"after the end: .*at version 5 raised ZeroDivisionError: not the last one"):
        run.wait(100)
    assert run.state == "done" and seen[-1] == last and labkit.load_run(run.path).state == "done"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": 1.5}, "target=1.5"),
        ({"target": 0}, "target=0"),
        ({"patience": 0}, "patience=0"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"on_version": "print"}, r"on_version='print' must be a Callable, on_version\(run, version, measured\)"),
    ],
)
def test_limits_that_make_no_sense_start_nothing(train, tmp_path, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(problem(), **wrong)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
