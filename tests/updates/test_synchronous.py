"""Rules with a barrier, against numbers worked by hand; who is waited for, and for how long."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.errors import UpdateError
from labkit.updates import SGWU, AllReduce, LocalSGD, Push, make_update
from tests.updates.test_base import push, started

BARRIERS = ["sgwu", "localsgd", "allreduce", "diloco"]


def pushed_of(replies):
    return [(reply.worker, reply.version) for reply in replies]


def test_sgwu_by_hand():
    """Q = 0.2 and 0.6: factors 1/4 and 3/4; (4, 0)/4 + (8, 4)*3/4 = (7, 3)."""
    rule = started(SGWU())
    assert push(rule, 0, (4, 0), 0.2) == []
    replies = push(rule, 1, (8, 4), 0.6)
    assert pushed_of(replies) == [(0, 1), (1, 1)]
    assert replies[0].weights.tolist() == [7, 3]
    assert [(m.worker, round(m.coefficient, 6), m.staleness) for m in rule.merges] == [(0, 0.25, 0), (1, 0.75, 0)]


def test_sgwu_does_not_depend_on_who_comes_first():
    one, two = started(SGWU()), started(SGWU())
    a, b = (0.1, 0.7), (0.3, -5.0)
    push(one, 0, a, 0.31), push(one, 1, b, 0.87)
    push(two, 1, b, 0.87), push(two, 0, a, 0.31)
    assert one.weights.tobytes() == two.weights.tobytes()


def test_sgwu_counts_equally_while_all_scores_are_zero():
    rule = started(SGWU())
    push(rule, 0, (2, 2), 0.0), push(rule, 1, (4, 6), 0.0)
    assert rule.weights.tolist() == [3, 4]


def test_sgwu_goes_on_when_the_worker_it_waits_for_leaves():
    rule = started(SGWU(), workers=[0, 1, 2])
    push(rule, 0, (2, 2)), push(rule, 2, (4, 4))
    replies = rule.leave(1)
    assert sorted(r.worker for r in replies) == [0, 2] and rule.weights.tolist() == [3, 3]


# -- quorum and grace --------------------------------------------------------------------------------------------------


def test_a_quorum_is_enough_and_who_comes_later_is_thrown_away():
    """ceil(0.6 * 3) = 2 of 3: the mean of (2, 2) and (4, 4) is (3, 3); worker 1 begins anew and takes part in the next round."""
    rule = started(SGWU(quorum=0.6), workers=[0, 1, 2])
    assert rule.deadline is None and push(rule, 0, (2, 2)) == [] and rule.deadline is None
    assert pushed_of(push(rule, 2, (4, 4))) == [(0, 1), (2, 1)] and rule.weights.tolist() == [3, 3]
    replies = push(rule, 1, (9, 9), samples=7)
    assert pushed_of(replies) == [(1, 1)] and replies[0].weights.tolist() == [3, 3] and rule.version == 1 and rule.merges == []
    assert [(m.worker, m.version, m.coefficient, m.staleness, m.samples) for m in rule.drops] == [(1, 1, 0.0, 1, 7)]
    assert push(rule, 1, (5, 5)) == [] and rule.drops == []
    assert pushed_of(push(rule, 0, (7, 7))) == [(0, 2), (1, 2)] and rule.weights.tolist() == [6, 6]


def test_the_grace_time_runs_from_the_first_push_and_a_late_quorum_closes_at_once():
    rule = started(SGWU(quorum=0.5, grace=2.0), workers=[0, 1, 2, 3])
    assert rule.deadline is None and rule.expire() == []  # nobody has pushed: there is no time that could be over
    push(rule, 0, (2, 2))
    assert rule.deadline == 2.0
    assert rule.expire() == [] and rule.deadline is None  # the time is over, but one of four is no quorum
    assert pushed_of(push(rule, 1, (4, 4))) == [(0, 1), (1, 1)] and rule.weights.tolist() == [3, 3]
    push(rule, 2, (9, 9)), push(rule, 3, (9, 9))  # too late for that round
    push(rule, 0, (5, 5)), push(rule, 1, (7, 7))
    assert rule.deadline == 2.0 and rule.version == 1  # a quorum, but the others have time
    assert pushed_of(rule.expire()) == [(0, 2), (1, 2)] and rule.weights.tolist() == [6, 6]


def test_within_the_grace_time_all_count():
    rule = started(SGWU(quorum=0.5, grace=2.0), workers=[0, 1])
    push(rule, 0, (2, 2))
    assert rule.deadline == 2.0
    assert pushed_of(push(rule, 1, (4, 4))) == [(0, 1), (1, 1)] and rule.weights.tolist() == [3, 3] and rule.deadline is None


def test_who_is_late_anyhow_is_not_waited_for():
    """3 of 4 close a round; of the next one only 0 and 1 are left, and worker 3 works for the last one still."""
    rule = started(SGWU(quorum=0.75), workers=[0, 1, 2, 3])
    for worker in (0, 1, 2):
        push(rule, worker, (3, 3))
    assert rule.version == 1 and rule.leave(2) == []
    push(rule, 0, (4, 4))
    assert pushed_of(push(rule, 1, (6, 6))) == [(0, 2), (1, 2)] and rule.weights.tolist() == [5, 5]


def test_an_expired_time_does_not_shorten_the_next_round():
    rule = started(SGWU(quorum=0.5, grace=1.0), workers=[0, 1, 2, 3])
    push(rule, 0, (2, 2))
    rule.expire()
    rule.leave(0)
    push(rule, 1, (2, 2))
    assert rule.deadline == 1.0 and push(rule, 2, (2, 2)) == []


def test_a_quorum_of_all_is_plain_sgwu():
    rule = started(SGWU(grace=1.0))
    push(rule, 0, (2, 2))
    assert rule.deadline is None and rule.expire() == [] and rule.version == 0


# -- local SGD, all-reduce ---------------------------------------------------------------------------------------------


def test_localsgd_by_hand():
    """Equal: ((2, 8) + (6, 0)) / 2 = (4, 4). By samples 30 and 10: 3/4 (2, 8) + 1/4 (6, 0) = (3, 6)."""
    for weighting, expected, factors in (("equal", [4, 4], [0.5, 0.5]), ("samples", [3, 6], [0.75, 0.25])):
        rule = started(LocalSGD(weighting))
        push(rule, 0, (2, 8), samples=30), push(rule, 1, (6, 0), samples=10)
        assert rule.weights.tolist() == expected and [m.coefficient for m in rule.merges] == factors


def test_localsgd_is_sgwu_with_equal_scores():
    rules, rng = [started(LocalSGD()), started(SGWU())], np.random.default_rng(0)
    for _ in range(5):
        for worker in (1, 0):
            weights = rng.normal(size=2)
            for rule in rules:
                push(rule, worker, weights, 0.7)
    assert rules[0].weights == pytest.approx(rules[1].weights, abs=1e-6)


def test_allreduce_takes_the_common_weights_and_refuses_replicas_that_drift_apart():
    rule = started(AllReduce())
    push(rule, 0, (3, 4), samples=30)
    replies = push(rule, 1, (3, 4), samples=10)
    assert len(replies) == 2 and rule.weights.tolist() == [3, 4]
    assert [m.coefficient for m in rule.merges] == [0.75, 0.25]
    push(rule, 0, (3, 4))
    with pytest.raises(UpdateError, match="differ by"):
        push(rule, 1, (3, 5))
    rule = started(AllReduce(tolerance=0))
    push(rule, 0, (3, 4))
    with pytest.raises(UpdateError, match="differ by"):
        push(rule, 1, np.nextafter(np.float32([3, 4]), np.float32(9)))


def test_allreduce_reduces_running_statistics_by_samples():
    for buffers, wanted in (("mean", [3, 4, 2]), ("first", [3, 4, 1])):
        rule = AllReduce(buffers)
        rule.start(np.zeros(3, np.float32), [0, 1], n_buffers=1)
        push(rule, 0, (3, 4, 1), samples=30)
        push(rule, 1, (3, 4, 5), samples=10)
        assert rule.weights.tolist() == wanted


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BARRIERS)
def test_who_joins_when_no_round_is_under_way_is_released_at_once(name):
    rule = started(make_update(name), workers=[0, 1])
    rule.leave(0)
    rule.leave(1)
    assert [r.worker for r in rule.join(4)] == [4]


@pytest.mark.parametrize("name", BARRIERS)
def test_who_gives_up_a_round_is_not_waited_for(name):
    rule = started(make_update(name), workers=[0, 1])
    assert rule.join(0) == []  # begins anew
    assert pushed_of(push(rule, 1, (5, 5))) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("name", BARRIERS)
def test_at_the_end_those_who_have_pushed_are_merged(name):
    rule = started(make_update(name), workers=[0, 1])
    push(rule, 1, (5, 5))
    rule.finish()
    assert rule.version == 1 and [m.worker for m in rule.merges] == [1]
    rule.finish()
    assert rule.version == 1 and rule.merges == []


@pytest.mark.parametrize("name", BARRIERS)
def test_a_state_with_pushes_that_wait_holds_no_objects(name):
    rule = started(make_update(name), workers=[0, 1])
    push(rule, 1, (5, 5), 0.25, 9)
    state = rule.state_dict()
    (waits,) = state["pending"].values()
    assert waits.pop("weights").tolist() == [5, 5] and waits == {"worker": 1, "base_version": 0, "score": 0.25, "samples": 9}
    state = rule.state_dict()
    other = make_update(rule.config())
    other.load_state_dict(state)
    assert isinstance(other.pending[1], Push) and other.pending[1].weights.tolist() == [5, 5]
