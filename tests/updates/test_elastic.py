"""EASGD and GEM, against numbers worked by hand; their fixed points."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.updates import EASGD, GEM
from tests.updates.test_base import push, started, vector


def test_easgd_by_hand():
    """beta = 1/2 of 2 workers: alpha = 1/4. W_0 = (5, 2): W_0 - W = (4, 0); the worker goes to (4, 2), the centre to (2, 2)."""
    rule = started(EASGD(0.5))
    (reply,) = push(rule, 0, (5, 2))
    assert (reply.worker, reply.version, reply.weights.tolist()) == (0, 1, [4, 2]) and not reply.weights.flags.writeable
    assert rule.weights.tolist() == [2, 2] and rule.merges[0].coefficient == 0.25
    (reply,) = push(rule, 1, (2, 6))  # W_1 - W = (0, 4)
    assert reply.weights.tolist() == [2, 5] and rule.weights.tolist() == [2, 3] and rule.merges[0].staleness == 1


def test_easgd_s_alpha_goes_by_the_number_of_workers():
    rule = started(EASGD(0.9), workers=[0, 1, 2])
    for alpha, change in ((0.3, lambda: None), (0.45, lambda: rule.leave(2)), (0.3, lambda: rule.join(7)), (0.9, lambda: rule)):
        if alpha == 0.9:
            rule.leave(7), rule.leave(1)
        change()
        push(rule, 0, (5, 2))
        assert rule.merges[0].coefficient == pytest.approx(alpha)


def test_easgd_keeps_the_sum_and_rests_where_both_are_equal():
    """One worker at rest, alpha = 1/2: both meet half-way at once. Otherwise their difference shrinks by 1 - 2 alpha each time."""
    for beta in (0.1, 0.5, 0.9):
        rule, own = started(EASGD(beta), workers=[0]), vector(7, -2)
        for k in range(1, 12):
            own = push(rule, 0, own)[0].weights
            assert own + rule.weights == pytest.approx([8, 0], abs=1e-5)
            assert own - rule.weights == pytest.approx((1 - 2 * beta) ** k * np.array([6, -4]), abs=1e-5)
    rule = started(EASGD())
    (reply,) = push(rule, 0, (1, 2))
    assert rule.weights.tolist() == reply.weights.tolist() == [1, 2]


def test_who_joins_easgd_begins_at_the_centre():
    rule = started(EASGD(0.5))
    push(rule, 0, (5, 2))
    for worker in (0, 7):
        (reply,) = rule.join(worker)
        assert reply.weights is rule.weights and reply.version == 1


def test_gem_by_hand():
    """lr = 1, momentum 1/2, kappa 2, one worker. First d = 2: v = 2, c = 0: pi = 2*2/2 = 2, W = 1 + 4 = 5.
    Then, from 5, d = 1: v = 1 + 1 = 2, c = 5 - 1 = 4: pi = (2*2 - 4) / 1 = 0, and the weight stays.
    Then d = -1: v = 1 - 1 = 0, c = 5 - 5 = 0 (s was 5): pi = 0. Then d = 3: v = 3, c = 0: pi = 2*3/3 = 2, W = 5 + 6 = 11."""
    rule, seen = started(GEM(1.0, momentum=0.5), (1.0,), workers=[0]), []
    for d in (2, 1, -1, 3):
        push(rule, 0, rule.weights + d)
        seen.append((float(rule.weights[0]), rule.merges[0].coefficient))
    assert seen == [(5, 2), (5, 0), (5, 0), (11, 2)]


def test_gem_scales_each_weight_by_itself_and_never_turns_a_step_round():
    """kappa 4: at first 4 of what a worker has done, 5 at most (kappa 9), and nothing where it has done nothing."""
    for kappa, scale in ((4, 4), (9, 5)):
        rule = started(GEM(1.0, kappa=kappa), (1.0, 2.0, 3.0))
        push(rule, 0, (2.0, 2.0, 1.0))
        assert rule.weights.tolist() == [1 + scale, 2, 3 - 2 * scale] and rule.merges[0].coefficient == pytest.approx(2 * scale / 3)


def test_gem_s_steps_together_do_not_outrun_its_momentum():
    """Many workers that all go the same way: the centre moves between two visits of one by about kappa |v| at most."""
    rule = started(GEM(1.0), (0.0,), workers=range(20))
    for _ in range(30):
        for worker in range(20):
            push(rule, worker, rule.base_weights[worker] + 0.01)
    before = float(rule.weights[0])
    for worker in range(20):
        push(rule, worker, rule.base_weights[worker] + 0.01)
    assert 0 < rule.weights[0] - before <= 2 * 0.01 / (1 - 0.9) * 1.05  # 20 plain pushes would be 0.2, too; with pi = 5 each 1.0


def test_gem_by_default_adds_no_more_than_a_mean():
    rule = started(GEM(), (0.0, 0.0), workers=[0, 1])
    push(rule, 0, (1.0, -1.0))
    assert np.abs(rule.weights).max() <= 0.5 + 1e-6


def test_who_comes_back_to_gem_has_no_speed():
    rule = started(GEM(1.0), (1.0,), workers=[0, 1])
    push(rule, 0, (2.0,))
    rule.leave(0)
    assert not rule.speeds and not rule.seen
    rule.join(0)
    push(rule, 0, rule.weights + 1)
    assert rule.speeds[0].tolist() == [1.0]
