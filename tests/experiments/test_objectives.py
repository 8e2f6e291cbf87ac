"""`labkit/experiments/objectives.py`: what is measured by which name, and in which sense."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pandas as pd
import pytest

from labkit.errors import RunError
from labkit.experiments.objectives import Goals, merit


def run(lower=False):
    about = {"config": SimpleNamespace(lower_is_better=lower), "layout": SimpleNamespace(n_params=50)}
    return SimpleNamespace(events=pd.DataFrame({"seconds": [math.nan, 2.5, 1.0]}), **about)


def depth(run):
    return 3


def test_each_name_is_measured_in_its_sense():
    goals = Goals(["score", "loss", "time", "size", "auc", depth])
    values = {"score": 0.5, "loss": 2.0, "auc": 0.7}
    assert goals.measure(run(), values) == {"score": 0.5, "loss": 2.0, "time": 2.5, "size": 50.0, "auc": 0.7, "depth": 3.0}
    assert goals.signs(run()) == [1, -1, -1, -1, 1, 1] and goals.signs(run(lower=True)) == [-1, -1, -1, -1, 1, -1]
    assert Goals({"auc": "min", "loss": "max"}).signs(run()) == [-1, 1] and not goals.plain and goals.n == 6
    for lower, sign in ((False, 1), (True, -1)):  # without a score the loss is what is less, in either sense
        assert Goals().measure(run(lower), {"loss": 2.0}) == {"score": -2.0 * sign} and merit({"loss": 2.0}, sign) == -2.0
    assert Goals().plain and Goals("score").plain and not Goals(depth).plain and not Goals(constraints={"size": 3}).plain


def test_a_constraint_is_broken_by_what_is_missing():
    goals = Goals(constraints={"size": (10, 40), "time": 3, "auc": (0.5, None)})
    assert goals.names == ["score", "size", "time", "auc"] and goals.n == 1
    violations = goals.violations({"size": 50.0, "time": 2.5, "auc": 0.75})
    assert violations == {"size <= 40": 10.0, "size >= 10": -40.0, "time <= 3": -0.5, "auc >= 0.5": -0.25}
    constraints = {"size": [10, 40], "time": [None, 3], "auc": [0.5, None]}
    assert goals.config() == {"objectives": None, "constraints": constraints, "sense": "as of the score"}
    two = {"objectives": [["loss", -1], ["score", None]], "constraints": None, "sense": "min, as of the score"}
    assert Goals(["loss", "score"]).config() == two and Goals({"score": "max"}).config()["sense"] == "max"
    assert Goals(depth).config()["objectives"] is None  # as in records that knew no others


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": 3}, "objective=3"),
        ({"objective": []}, "objective is empty"),
        ({"objective": ["loss", "loss"]}, "'loss' twice"),
        ({"objective": {"loss": "least"}}, "Known: max, min"),
        ({"constraints": ["size"]}, "constraints="),
        ({"constraints": {"size": None}}, "bounds nothing"),
        ({"constraints": {"size": (4, 3)}}, "cannot be kept"),
        ({"constraints": {"size": "small"}}, "must be a number"),
        ({"constraints": {3: 3}}, "constraints has the name 3"),
    ],
)
def test_what_makes_no_sense_is_refused(given, said):
    with pytest.raises((TypeError, ValueError), match=said):
        Goals(**given)


def test_what_is_no_number_or_not_there_is_an_error_of_the_trial():
    with pytest.raises(RunError, match="its score is nan"):
        Goals().measure(run(), {"score": math.nan})
    with pytest.raises(RunError, match="its auc is inf"):
        Goals(["score", "auc"]).measure(run(), {"score": 0.5, "auc": math.inf})
    with pytest.raises(RunError, match=r"'acu' is nothing that was measured\. Did you mean 'auc'"):
        Goals("acu").measure(run(), {"auc": 0.5})
    with pytest.raises(RunError, match="ZeroDivisionError"):
        Goals(lambda run: 1 / 0).measure(run(), {})
