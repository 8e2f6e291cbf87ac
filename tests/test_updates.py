import math

import numpy as np
import pytest

from labkit.errors import UpdateError
from labkit.updates import AGWU, SGWU, UPDATES, AllReduce, Push, make_update


def vector(*values):
    return np.array(values, np.float32)


def started(rule, weights=(1.0, 2.0), workers=(0, 1), n_buffers=0):
    rule.start(vector(*weights), workers, n_buffers)
    return rule


def push(rule, worker, weights, score=0.5, samples=10):
    return rule.push(Push(worker, rule.bases[worker], vector(*weights), score, samples))


def test_sgwu_by_hand():
    """Q = 0.2 and 0.6: factors 1/4 and 3/4; (4, 0)/4 + (8, 4)*3/4 = (7, 3)."""
    rule = started(SGWU())
    assert push(rule, 0, (4, 0), 0.2) == []
    replies = push(rule, 1, (8, 4), 0.6)
    assert [(r.worker, r.version) for r in replies] == [(0, 1), (1, 1)]
    assert replies[0].weights.tolist() == [7, 3]
    assert [(m.worker, round(m.coefficient, 6), m.staleness) for m in rule.merges] == [(0, 0.25, 0), (1, 0.75, 0)]


def test_sgwu_does_not_depend_on_who_comes_first():
    one, two = started(SGWU()), started(SGWU())
    a, b = (0.1, 0.7), (0.3, -5.0)
    push(one, 0, a, 0.31), push(one, 1, b, 0.87)
    push(two, 1, b, 0.87), push(two, 0, a, 0.31)
    assert one.weights.tobytes() == two.weights.tobytes()


def test_sgwu_with_one_worker_is_that_worker_bit_for_bit():
    rule, values = started(SGWU(), workers=[0]), np.random.default_rng(0).standard_normal(2)
    push(rule, 0, values, 0.123)
    assert rule.weights.tobytes() == values.astype(np.float32).tobytes()


def test_sgwu_counts_equally_while_all_scores_are_zero():
    rule = started(SGWU())
    push(rule, 0, (2, 2), 0.0), push(rule, 1, (4, 6), 0.0)
    assert rule.weights.tolist() == [3, 4]


def test_sgwu_goes_on_when_the_worker_it_waits_for_leaves():
    rule = started(SGWU(), workers=[0, 1, 2])
    push(rule, 0, (2, 2)), push(rule, 2, (4, 4))
    replies = rule.leave(1)
    assert sorted(r.worker for r in replies) == [0, 2] and rule.weights.tolist() == [3, 3]


def test_agwu_raw_by_hand():
    """First update: i-1 = 0 counts as 1, all bases 0, so gamma = 1/2; W = (1,2) + 1/2 * 0.4 * ((3,2) - (1,2)) = (1.4, 2)."""
    rule = started(AGWU(quality="raw"))
    (reply,) = push(rule, 0, (3, 2), 0.4)
    assert (reply.worker, reply.version) == (0, 1)
    assert reply.weights == pytest.approx([1.4, 2.0])
    # Worker 1 still works from 0, worker 0 from 1: gamma_1 = e^0 / (e^0 + e^1); its change is (0, 6) on top of version 1.
    (reply,) = push(rule, 1, (1, 8), 0.5)
    gamma = 1 / (1 + math.e)
    assert reply.weights == pytest.approx([1.4, 2 + gamma * 0.5 * 6])
    assert rule.merges[0].staleness == 1 and rule.merges[0].coefficient == pytest.approx(gamma * 0.5)


def test_agwu_normalised_by_hand():
    """Scores 0.2 then 0.6: q_0 = 0.2/0.2 = 1 (nobody else has one yet); q_1 = 0.6 / mean(0.2, 0.6) = 1.5."""
    rule = started(AGWU())
    push(rule, 0, (3, 2), 0.2)
    assert rule.weights == pytest.approx([2, 2])
    push(rule, 1, (1, 4), 0.6)
    assert rule.weights == pytest.approx([2, 2 + 1.5 / (1 + math.e) * 2])


def test_agwu_attenuation():
    rule = started(AGWU(), workers=[0, 1, 2])
    assert rule.attenuation(0) == pytest.approx(1 / 3)  # equal bases: 1/m
    push(rule, 0, (1, 2))
    assert sum(rule.attenuation(w) for w in range(3)) == pytest.approx(1)
    assert rule.attenuation(0) > rule.attenuation(1)  # fresh counts more than stale
    assert rule.attenuation(0) / rule.attenuation(1) <= math.e + 1e-9
    assert started(AGWU(), workers=[0]).attenuation(0) == 1


@pytest.mark.parametrize("quality", ["normalised", "raw"])
def test_agwu_with_one_worker_is_plain_training_within_rounding(quality):
    rule, rng = started(AGWU(quality=quality), workers=[0]), np.random.default_rng(0)
    for _ in range(20):
        values = rng.standard_normal(2).astype(np.float32)
        push(rule, 0, values, 1.0)
        assert rule.weights == pytest.approx(values, abs=1e-6)


def test_agwu_mixes_buffers_without_leaving_their_range():
    """Parameters move by the change, buffers (here the last entry, a variance) between old and pushed value."""
    rule = started(AGWU(), (0.0, 1.0), n_buffers=1)
    for _ in range(3):
        push(rule, 0, (1.0, 0.1), 1.0)
    base = rule.weights[1]
    push(rule, 1, (5.0, 0.01), 1.0)
    assert 0.01 <= rule.weights[1] <= base


def test_a_version_that_was_handed_out_is_never_written():
    rule = started(AGWU())
    (reply,) = push(rule, 0, (3, 3))
    before = reply.weights.copy()
    for _ in range(5):
        push(rule, 1, (9, 9))
    assert (reply.weights == before).all() and not reply.weights.flags.writeable


def test_allreduce_takes_the_common_weights_and_refuses_replicas_that_drift_apart():
    rule = started(AllReduce())
    push(rule, 0, (3, 4), samples=30)
    replies = push(rule, 1, (3, 4), samples=10)
    assert len(replies) == 2 and rule.weights.tolist() == [3, 4]
    assert [m.coefficient for m in rule.merges] == [0.75, 0.25]
    push(rule, 0, (3, 4))
    with pytest.raises(UpdateError, match="differ by"):
        push(rule, 1, (3, 5))


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize(
    ("worker", "weights", "score", "message"),
    [
        (0, [math.nan, 1], 0.5, "NaN or infinity"),
        (0, [math.inf, 1], 0.5, "NaN or infinity"),
        (0, [1, 2, 3], 0.5, r"shape \(3,\)"),
        (0, [1, 2], 1.5, "score is 1.5"),
        (0, [1, 2], math.nan, "score is nan"),
        (7, [1, 2], 0.5, "not a member"),
    ],
)
def test_a_bad_push_is_refused_and_changes_nothing(name, worker, weights, score, message):
    rule = started(make_update(name))
    before = rule.weights.tobytes(), rule.version, dict(rule.bases)
    with pytest.raises(UpdateError, match=message):
        rule.push(Push(worker, 0, vector(*weights), score, 10))
    assert (rule.weights.tobytes(), rule.version, dict(rule.bases)) == before


@pytest.mark.parametrize("name", UPDATES)
def test_a_push_from_another_version_or_of_another_type_is_refused(name):
    rule = started(make_update(name))
    with pytest.raises(UpdateError, match="last given version 0"):
        rule.push(Push(0, 3, vector(1, 2), 0.5, 10))
    with pytest.raises(UpdateError, match="float64"):
        rule.push(Push(0, 0, np.zeros(2), 0.5, 10))


@pytest.mark.parametrize("name", UPDATES)
def test_state_saved_half_way_has_the_same_future(name):
    rule = started(make_update(name), workers=[0, 1, 2])
    course = [(0, (1.0, 3.0), 0.3), (1, (1.0, 3.0), 0.4), (2, (1.0, 3.0), 0.5), (1, (2.0, 1.0), 0.9), (0, (2.0, 1.0), 0.6)]
    for item in course[:4]:
        push(rule, *item)
    copy = make_update(rule.config())
    copy.load_state_dict(rule.state_dict())
    for each in (rule, copy):
        push(each, *course[4])
        push(each, 2, (2.0, 1.0), 0.8)
    assert rule.weights.tobytes() == copy.weights.tobytes() and rule.version == copy.version


@pytest.mark.parametrize("name", UPDATES)
def test_who_joins_gets_the_current_version_and_may_push(name):
    rule = started(make_update(name), workers=[0])
    push(rule, 0, (5, 5))
    replies = rule.join(1)
    if name != "agwu":  # at a barrier: with the next round, which begins when the one under way is over
        assert replies == []
        with pytest.raises(UpdateError, match="it begins with the next round"):
            push(rule, 1, (5, 5))
        replies = push(rule, 0, (5, 5))
        assert [r.worker for r in replies] == [0, 1]
    assert replies[-1].version == rule.version and replies[-1].weights.tolist() == rule.weights.tolist()
    version = rule.version
    push(rule, 1, (5, 5)), push(rule, 0, (5, 5))
    assert rule.version > version


@pytest.mark.parametrize("name", ["sgwu", "allreduce"])
def test_who_joins_when_no_round_is_under_way_is_released_at_once(name):
    rule = started(make_update(name), workers=[0, 1])
    rule.leave(0)
    rule.leave(1)
    assert [r.worker for r in rule.join(4)] == [4]


@pytest.mark.parametrize("name", ["sgwu", "allreduce"])
def test_who_gives_up_a_round_is_not_waited_for(name):
    rule = started(make_update(name), workers=[0, 1])
    assert rule.join(0) == []  # begins anew
    assert [(r.worker, r.version) for r in push(rule, 1, (5, 5))] == [(0, 1), (1, 1)]


def test_names():
    assert isinstance(make_update("AGWU"), AGWU)
    assert make_update({"name": "agwu", "quality": "raw"}).quality == "raw"
    with pytest.raises(ValueError, match=r"unknown update 'sgwo'\. Known: sgwu, agwu, allreduce\. Did you mean 'sgwu'"):
        make_update("sgwo")
    with pytest.raises(ValueError, match="no quality 'best'"):
        AGWU(quality="best")
