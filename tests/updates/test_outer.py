"""Rules with a momentum of the server, against numbers worked by hand, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labkit.updates import DelayedNesterov, DiLoCo, HeLoCo, LocalSGD
from tests.updates.test_base import push, started


def test_diloco_by_hand():
    """lr = 1/2, momentum 1/2. D = (4, 4) - (1, 2) = (3, 2) = v: W = (1, 2) + ((3, 2) + (3, 2)/2)/2 = (3.25, 3.5).
    Then all stay: D = 0, v = (1.5, 1), W = (3.25, 3.5) + (0.75, 0.5)/2 = (3.625, 3.75)."""
    rule = started(DiLoCo(0.5, 0.5))
    push(rule, 0, (2, 8)), push(rule, 1, (6, 0))
    assert rule.weights.tolist() == [3.25, 3.5] and [m.coefficient for m in rule.merges] == [0.25, 0.25]
    push(rule, 0, rule.weights), push(rule, 1, rule.weights)
    assert rule.weights.tolist() == [3.625, 3.75]


def test_diloco_counts_by_samples_where_it_is_asked_to():
    """3/4 (2, 8) + 1/4 (6, 0) = (3, 6); lr = 1, no momentum."""
    rule = started(DiLoCo(1.0, 0.0, weighting="samples"))
    push(rule, 0, (2, 8), samples=30), push(rule, 1, (6, 0), samples=10)
    assert rule.weights.tolist() == [3, 6]


@pytest.mark.parametrize("weighting", ["equal", "samples"])
def test_diloco_with_lr_1_and_no_momentum_is_local_sgd(weighting):
    rules, rng = [started(DiLoCo(1.0, 0.0, weighting=weighting)), started(LocalSGD(weighting))], np.random.default_rng(0)
    for _ in range(10):
        for worker in (1, 0):
            weights, samples = rng.normal(size=2), int(rng.integers(1, 9))
            for rule in rules:
                push(rule, worker, weights, samples=samples)
        assert rules[0].weights == pytest.approx(rules[1].weights, abs=1e-6)


def test_momentum_does_not_touch_buffers():
    """They are the mean of what is pushed (DiLoCo), or half-way to it with two workers."""
    rule = started(DiLoCo(), (0.0, 1.0), n_buffers=1)
    for value in (0.5, 0.1, 0.01):
        push(rule, 0, (9.0, value)), push(rule, 1, (9.0, value))
        assert rule.weights[1] == pytest.approx(value)
    for rule in (DelayedNesterov(), HeLoCo()):
        started(rule, (0.0, 1.0), n_buffers=1)
        for value in (0.5, 0.1, 0.01):
            before = rule.weights[1]
            push(rule, 0, (9.0, value))
            assert rule.weights[1] == pytest.approx((before + value) / 2)


def test_delayed_nesterov_by_hand():
    """lr = 1, momentum 1/2, n = 2. Worker 0 adds half of (4, 0): (3, 2). Worker 1, from (1, 2), half of (0, 4), and now the
    momentum v = (2, 2), of which half: (3, 2) + (0, 2) + (1, 1) = (4, 5). A third push is plain again: + (2, 0)/2 = (5, 5)."""
    rule = started(DelayedNesterov(1.0, 0.5))
    push(rule, 0, (5, 2))
    assert rule.weights.tolist() == [3, 2] and rule.merges[0].coefficient == 0.5
    push(rule, 1, (1, 6))
    assert rule.weights.tolist() == [4, 5]
    push(rule, 1, (6, 5))
    assert rule.weights.tolist() == [5, 5]
    push(rule, 1, (5, 5))  # stays: mean of (2, 0) and 0 is (1, 0); v = (1, 1) + (1, 0) = (2, 1), of which half
    assert rule.weights.tolist() == [6, 5.5]


def test_delayed_nesterov_with_one_worker_is_diloco():
    rules, rng = [started(DelayedNesterov(), workers=[0]), started(DiLoCo(), workers=[0])], np.random.default_rng(0)
    for _ in range(10):
        change = rng.normal(size=2)
        for rule in rules:
            push(rule, 0, rule.weights + change)
        assert rules[0].weights == pytest.approx(rules[1].weights, rel=1e-5, abs=1e-5)


def test_delayed_nesterov_moves_in_n_pushes_as_nesterov_in_one():
    """n fresh pushes of which each is D: the step of DiLoCo with that D."""
    late, sync = started(DelayedNesterov(period=5), workers=range(5)), started(DiLoCo(), workers=[0])
    for worker in range(5):
        push(late, worker, (2, 4))
    push(sync, 0, (2, 4))
    assert late.weights == pytest.approx(sync.weights, abs=1e-5)


def test_local_passes_by_speed_can_be_switched_off():
    assert DelayedNesterov().paced and not DelayedNesterov(dynamic=False).paced and not DiLoCo().paced


def test_heloco_without_correction_by_hand():
    """Two workers, lr = 1, momentum 1/2: G = (2, 0), v = (1, 0), W = (1, 2) + (2, 0) + (1, 0)/2."""
    rule = started(HeLoCo(1.0, 0.5, keep=-1.0))
    push(rule, 0, (5, 2))
    assert rule.weights.tolist() == [3.5, 2] and rule.velocity.tolist() == [1, 0]
    push(rule, 1, (-3, 2))  # opposed, and kept: G = (-2, 0), v = (-0.5, 0)
    assert rule.weights.tolist() == [3.5 - 2 - 0.25, 2]


def test_heloco_takes_away_what_opposes_the_momentum():
    """One worker, lr = 1, momentum 1/2, kappa 0 (conf = 1). v = (1, 0) after D = (2, 0). D = (-1, 1): c = -1/sqrt(2), so that
    b = 1/sqrt(2): D - b c |D| v/|v| = (-1, 1) + 1/2 * sqrt(2) * (1, 0) = (-0.293, 1). With shrink=9, most=1: (0, 1)."""
    for shrink, expected in ((1.0, -1 + math.sqrt(0.5)), (9.0, 0.0)):
        rule = started(HeLoCo(1.0, 0.5, shrink=shrink, kappa=0.0), (0.0, 0.0), workers=[0])
        push(rule, 0, (2, 0))
        before = rule.weights.copy()
        push(rule, 0, before + np.float32([-1, 1]))
        v = np.array([0.5 + 0.5 * expected, 0.5])
        assert rule.velocity == pytest.approx(v, abs=1e-6)
        assert rule.weights == pytest.approx(before + [expected, 1] + 0.5 * v, abs=1e-6)


def test_heloco_turns_what_is_nearly_across_and_keeps_its_length():
    """c = 0, turn = 1/2, conf = 1: l = 1/2, direction (1, 1)/sqrt(2). At c >= keep nothing is done."""
    rule = started(HeLoCo(1.0, 0.5, kappa=0.0), (0.0, 0.0), workers=[0])
    push(rule, 0, (2, 0))
    before = rule.weights.copy()
    push(rule, 0, before + np.float32([0, 3]))
    step = np.array([3, 3]) / math.sqrt(2)
    assert rule.velocity == pytest.approx(np.array([0.5, 0]) + 0.5 * step, abs=1e-5)
    assert rule.correction(0.2, 1.0, 2.0) == (1.0, 0.0) and rule.correction(0.19, 1.0, 2.0) != (1.0, 0.0)


def test_heloco_looks_at_each_tensor_by_itself():
    """The first tensor goes on, the second turns back: only the second is corrected."""

    def second(blocks):
        rule = HeLoCo(1.0, 0.5, kappa=0.0, shrink=9.0)
        rule.start(np.zeros(4), [0], 0, blocks)
        push(rule, 0, (9, 9, 1, 1))
        before = rule.weights.copy()
        push(rule, 0, before + np.float32([9, 9, -1, -1]))
        return (rule.weights - before - 0.5 * rule.velocity).tolist()

    assert second([2, 2]) == pytest.approx([9, 9, 0, 0], abs=1e-4)
    assert second([]) == pytest.approx([9, 9, -1, -1], abs=1e-4)  # as one, it goes on


def test_scalar_products_are_whole():
    from labkit.updates.base import CHUNK
    from labkit.updates.outer import _product

    rng = np.random.default_rng(0)
    a, b = rng.uniform(size=(2, 2 * CHUNK + 3)).astype(np.float32)
    assert _product(a, b) == pytest.approx(np.dot(a.astype(np.float64), b.astype(np.float64)), rel=1e-4)
