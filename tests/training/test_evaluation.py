"""The learning curve: every retained version on the test set, after the run, on a lab or here."""

from __future__ import annotations

import numpy as np
import pytest

import labkit
from labkit.runs import checkpoints
from labkit.training.evaluation import measure
from tests.helpers import ended, net_with_statistics, problem

pytestmark = pytest.mark.usefixtures("cache")


def test_here_and_on_a_lab_the_curve_is_the_same_and_it_is_that_of_the_weights(train, lab):
    a_problem = problem(net_with_statistics)
    run = ended(train(a_problem, passes=2, checkpoints=4))
    curve = run.curve()
    assert curve.version.tolist() == checkpoints.versions(run.path) and curve.samples.iloc[-1] == run.config.budget
    assert measure(run, a_problem).equals(curve) and measure(run, a_problem, lab, [1]).equals(curve)
    last = a_problem.measure(run.model().network, a_problem.test_indices(), "test")
    np.testing.assert_allclose(curve[["loss", "score"]].iloc[-1], [last["loss"], last["score"]], rtol=1e-6)


def test_a_curve_that_was_not_measured_is_measured_when_it_is_asked_for(train):
    a_problem = problem()
    run = ended(train(a_problem, passes=1))
    curve = run.curve()
    (run.path / "metrics.parquet").unlink()
    assert labkit.load_run(run.path, problem=a_problem).curve().equals(curve) and (run.path / "metrics.parquet").exists()
