"""Schedules: their curves, and what is refused, with the moment."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.errors import ProblemError
from labkit.problems import Clock
from labkit.problems.schedules import make_schedule


def at(schedule, *shares):
    factor = make_schedule(schedule)
    return [factor(Clock(round(1000 * share), 1000, 3 * share)) for share in shares]


def test_the_curves_are_those_of_torch():
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=101)
    optimiser.step()
    rates = [theirs.get_last_lr()[0]]
    for _ in range(100):
        theirs.step()
        rates.append(theirs.get_last_lr()[0])
    ours = at("one-cycle", *(step / 100 for step in range(101)))
    assert ours[:3] == pytest.approx(rates[:3], rel=0.05) and ours[-1] == pytest.approx(rates[-1]) == 4e-6
    assert max(abs(a - b) for a, b in zip(ours, rates, strict=True)) < 0.06  # theirs turns a step earlier
    assert at("cosine", 0, 0.5, 1, 1.2) == pytest.approx([1, 0.5, 0, 0])


def test_warm_up_goes_on_with_another_one():
    warm = {"name": "warm-up", "share": 0.2, "start": 0.1}
    assert at(warm, 0, 0.1, 0.2, 0.7) == pytest.approx([0.1, 0.55, 1, 1])
    assert at({**warm, "then": "cosine"}, 0.1, 0.2, 0.6, 1) == pytest.approx([0.55, 1, 0.5, 0])
    assert at({**warm, "then": {"name": "step", "at": [0.5]}}, 0.5, 0.61) == pytest.approx([1, 0.1])
    assert at("WarmUp", 0.5) == [1]


def test_steps_go_down_at_their_shares():
    assert at("step", 0.49, 0.5, 0.75, 1) == pytest.approx([1, 0.1, 0.01, 0.01])
    assert at({"name": "step", "at": [0.3], "factor": 0.5}, 0.2, 0.3) == [1, 0.5]
    assert make_schedule("constant") is None


def test_a_function_of_the_clock():
    assert at(lambda clock: 1 / (1 + clock.passes), 0, 1) == [1, 0.25]
    assert at(lambda clock: torch.tensor(0.5), 0) == [0.5]
    assert at({"name": "tests.problems.test_schedules:halved", "every": 0.25}, 0, 0.5) == [1, 0.25]


def halved(clock, every=0.5):
    return 0.5 ** int(clock.samples / clock.total / every)


@pytest.mark.parametrize("given", [-0.1, math.nan, math.inf, None, "1", True])
def test_a_rate_that_cannot_be_is_refused_with_the_moment(given):
    with pytest.raises(ProblemError, match=r"schedule .*gave .* after 500 of 1,000 samples \(pass 1.5\).*at least 0"):
        at(lambda clock: given, 0.5)


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("one-cicle", ValueError, r"Did you mean 'one-cycle'\?"),
        (
            {"name": "one-cycle", "warmup": 0.1},
            ValueError,
            r"schedule 'one-cycle' has no setting 'warmup'. .*Did you mean 'warm'\?",
        ),
        ({"name": "cosine", "p": 0.1}, ValueError, "has no setting 'p'. It has: none"),
        ({"name": "warm-up", "share": 1.5}, ValueError, "share=1.5 must be"),
        ({"name": "warm-up", "then": "cosin"}, ValueError, r"Did you mean 'cosine'\?"),
        ({"name": "step", "at": [2]}, ValueError, "at=2 must be"),
        ({"name": "step", "factor": -1}, ValueError, "factor=-1"),
        (0.1, TypeError, "schedule=0.1 must be a name"),
        ("no_module:f", ValueError, "no module 'no_module'"),
    ],
)
def test_what_is_no_schedule_is_refused_at_once(schedule, error, message):
    with pytest.raises(error, match=message):
        make_schedule(schedule)
