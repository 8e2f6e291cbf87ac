"""`labkit.Inner`: what it takes, what it refuses, and how the record holds it."""

import os
import warnings

import numpy as np
import pytest

import labkit
from labkit.problems.problem import problem_from_config


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": True}, "threads"),
        ({"threads": 1.5}, "threads"),
        ({"split": "sample"}, "samples"),
        ({"split": 3}, "split"),
        ({"block": 0}, "block"),
        ({"block": float("nan")}, "block"),
        ({"whole": "conv1"}, "list of names"),
        ({"whole": 1}, "list of names"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(settings, error):
    with pytest.raises((TypeError, ValueError), match=error):
        labkit.Inner(**settings)


def test_threads_beyond_the_cores_are_a_warning_with_both_numbers():
    cores = os.cpu_count()
    with pytest.warns(UserWarning, match=rf"threads={cores + 5} .* {cores} cores"):
        labkit.Inner(threads=cores + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labkit.Inner(threads=1)


@pytest.mark.filterwarnings("ignore:threads=")
@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (labkit.Inner(), {}),
        (1, {"threads": 1}),
        (np.int64(2), {"threads": 2}),
        ({"threads": 2.0, "split": "samples", "whole": ["a"]}, {"threads": 2, "split": "samples", "whole": ["a"]}),
        (labkit.Inner(whole=True), {"whole": True}),
    ],
)
def test_a_problem_takes_it_and_the_record_gives_it_back(given, settings):
    problem = labkit.Classifier("lenet", "digits", inner=given)
    assert problem.config()["inner"] == settings
    assert problem_from_config(problem.config()).inner == problem.inner


def test_without_it_the_record_is_as_before():
    assert "inner" not in labkit.Classifier("lenet").config()
    for wrong in ("two", True, 1.5, [2]):
        with pytest.raises(TypeError, match="inner="):
            labkit.Classifier("lenet", "digits", inner=wrong)
