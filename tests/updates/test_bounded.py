"""Asynchronous rules with an eye on who is late, against numbers worked by hand, and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.updates import SSP, Downpour, LocalSGD, Rescaled, Ringmaster
from tests.updates.test_base import push, started


def test_ssp_by_hand():
    """bound 1: worker 0 may be one push ahead of worker 1, not two. Each push counts half: (1, 2) + (2, 0)/2 = (2, 2), ..."""
    rule = started(SSP(1))
    (reply,) = push(rule, 0, (3, 2))
    assert (reply.worker, reply.weights.tolist()) == (0, [2, 2])
    assert push(rule, 0, (4, 2)) == [] and rule.weights.tolist() == [3, 2] and rule.version == 2  # merged, and held
    replies = push(rule, 1, (1, 6))  # (3, 2) + (0, 4)/2
    assert [(r.worker, r.version, r.weights.tolist()) for r in replies] == [(0, 3, [3, 4]), (1, 3, [3, 4])]
    assert rule.merges[0].staleness == 2


def test_ssp_with_bound_0_is_local_sgd():
    """Its rounds end in the mean of all weights, in as many versions as there are workers; nobody goes on before."""
    ssp, mean, rng = started(SSP(0), workers=[0, 1, 2]), started(LocalSGD(), workers=[0, 1, 2]), np.random.default_rng(0)
    for number in range(1, 6):
        for worker in rng.permutation(3):
            weights = rng.normal(size=2)
            released = [[r.worker for r in push(rule, int(worker), weights, rng.random())] for rule in (ssp, mean)]
        assert released == [[*released[0]], [0, 1, 2]] and sorted(released[0]) == [0, 1, 2]
        assert ssp.weights == pytest.approx(mean.weights, abs=1e-6) and (ssp.version, mean.version) == (3 * number, number)


def test_ssp_without_a_bound_that_matters_is_downpour():
    rules, rng = [started(SSP(100)), started(Downpour())], np.random.default_rng(0)
    for _ in range(20):
        worker, weights = int(rng.integers(2)), rng.normal(size=2)
        assert [len(push(rule, worker, weights)) for rule in rules] == [1, 1]
    assert rules[0].weights.tobytes() == rules[1].weights.tobytes()


def test_ssp_releases_who_waited_for_the_one_that_is_gone_and_waits_for_no_newcomer():
    rule = started(SSP(0), workers=[0, 1])
    push(rule, 0, (3, 2))
    assert [r.worker for r in rule.leave(1)] == [0]
    for _ in range(5):
        push(rule, 0, (3, 2))
    assert [r.worker for r in rule.join(4)] == [4] and rule.clocks == {0: 6, 4: 6}
    assert push(rule, 0, (3, 2)) == [] and len(push(rule, 4, (3, 2))) == 2


def test_ringmaster_drops_what_is_too_late():
    """limit 2: worker 1 is at staleness 2 when it comes, and begins anew from version 2, where it counts half again."""
    rule = started(Ringmaster(2))
    push(rule, 0, (3, 2)), push(rule, 0, (4, 2))
    assert rule.weights.tolist() == [3, 2]
    (reply,) = push(rule, 1, (9, 9), samples=7)
    assert (reply.worker, reply.version, rule.version, rule.merges) == (1, 2, 2, [])
    assert [(m.worker, m.version, m.coefficient, m.staleness, m.samples) for m in rule.drops] == [(1, 2, 0.0, 2, 7)]
    push(rule, 1, (3, 6))
    assert rule.weights.tolist() == [3, 4] and rule.drops == []


def test_ringmaster_s_limit_goes_by_the_number_of_workers():
    rule = started(Ringmaster(), workers=[0, 1])
    for _ in range(8):
        push(rule, 0, (1, 2))
    push(rule, 1, (1, 2))
    assert len(rule.drops) == 1 and rule.drops[0].staleness == 8


def test_rescaled_by_hand():
    """Two workers: c = (tau + 1) / 4. Worker 0 at once: 1/4 of (4, 0). Worker 1 then, tau = 1: 1/2 of (0, 4)."""
    rule = started(Rescaled())
    push(rule, 0, (5, 2))
    assert rule.weights.tolist() == [2, 2] and rule.merges[0].coefficient == 0.25
    push(rule, 1, (1, 6))
    assert rule.weights.tolist() == [2, 4] and rule.merges[0].coefficient == 0.5
    for _ in range(9):
        push(rule, 0, (2, 4))
    push(rule, 1, (3, 4))
    assert rule.merges[0].staleness == 9 and rule.merges[0].coefficient == 1.0  # 10/4, limited


def test_rescaled_gives_each_worker_the_same_weight_in_the_end():
    """Speeds 1 : 2 : 5: after a common multiple of their times each has the same sum of coefficients, exactly."""
    rule, sums = started(Rescaled(most=100.0), workers=[0, 1, 2]), {0: 0.0, 1: 0.0, 2: 0.0}
    for now in range(1, 101):
        for worker, time in {0: 10, 1: 5, 2: 2}.items():
            if now % time == 0:
                push(rule, worker, (1, 2))
                sums[worker] += rule.merges[0].coefficient
    assert min(sums.values()) == pytest.approx(max(sums.values()), rel=0.03)  # up to who came last in the last moment
    assert sum(sums.values()) == pytest.approx(rule.version / 3, rel=0.02)  # a push counts 1/m on average
