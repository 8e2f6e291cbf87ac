"""`labkit.step_times`: what is in its table; how long a step takes is for notebooks."""

import pytest

import labkit
from labkit.inner.precision import Precision
from labkit.problems import step_times as module


@pytest.mark.usefixtures("cache")
def test_each_problem_at_each_size_is_a_row(monkeypatch):
    monkeypatch.setattr(module, "SETTLING", 2)
    half = Precision("bfloat16", True, {"conv2": "Conv2d: slow"}, "quick")
    monkeypatch.setattr("labkit.problems.problem.choose", lambda *_: half)
    problems = {
        "torch": labkit.Classifier("lenet", "digits"),
        "one": labkit.Classifier("lenet", "digits", inner=labkit.Inner(threads=1)),
        "two": labkit.Classifier("lenet", "digits", inner=labkit.Inner(threads=2, split="samples", block=4)),
        "half": labkit.Classifier("lenet", "digits", precision="auto"),
    }
    table = labkit.step_times(problems, [8, 60], steps=3)
    assert table[["problem", "batch_size"]].values.tolist() == [[name, size] for size in (8, 60) for name in problems]
    assert (table.ms_low <= table.ms).all() and (table.ms <= table.ms_high).all() and (table.speedup > 0).all()
    assert (table.speedup[table.problem == "torch"] == 1).all()
    assert table.computed.tolist() == ["", "none 1", "samples 2x4", "; ".join(half.lines())] * 2
    assert table.attrs["cores"] >= 1 and "thread(s)" in table.attrs["host"]
    assert len(labkit.step_times({"torch": problems["torch"]}, steps=3)) == 1


@pytest.mark.parametrize(
    ("problems", "options"),
    [
        ({}, {}),
        ([1], {}),
        ({"a": "lenet"}, {}),
        (None, {}),
        ({"a": labkit.Classifier("lenet", "digits")}, {"steps": 2}),
        ({"a": labkit.Classifier("lenet", "digits")}, {"batch_sizes": [0]}),
        ({"a": labkit.Classifier("lenet", "digits")}, {"batch_sizes": 3}),
    ],
)
def test_bad_arguments_are_refused(problems, options):
    with pytest.raises((TypeError, ValueError), match=r"problems|steps|batch_sizes"):
        labkit.step_times(problems, **options)
