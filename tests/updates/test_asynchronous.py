"""Rules in which nobody waits, against numbers worked by hand, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labkit.updates import AGWU, Downpour, FedAsync, FedBuff
from tests.updates.test_base import push, started


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
    assert rule.attenuation(0) / rule.attenuation(1) == pytest.approx(math.e)  # bases 1 and 0 at version 1
    for _ in range(3):
        push(rule, 0, (1, 2))
    assert rule.attenuation(0) / rule.attenuation(1) == pytest.approx(math.e)  # 4 and 0 at version 4
    push(rule, 2, (1, 2))
    assert rule.attenuation(0) / rule.attenuation(1) == pytest.approx(math.exp(4 / 5))  # bases 4, 0 and 5 at version 5
    assert started(AGWU(), workers=[0]).attenuation(0) == 1


def test_agwu_raw_with_one_worker_is_plain_training_within_rounding():
    rule, rng = started(AGWU(quality="raw"), workers=[0]), np.random.default_rng(0)
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


# -- Downpour ----------------------------------------------------------------------------------------------------------


def test_downpour_sgd_by_hand():
    """lr=1, as published: (1, 2) + (2, 0) = (3, 2), and worker 1, still from (1, 2), adds its (0, 4): (3, 6)."""
    rule = started(Downpour(lr=1.0))
    push(rule, 0, (3, 2))
    assert rule.weights.tolist() == [3, 2] and rule.merges[0].coefficient == 1.0
    push(rule, 1, (1, 6))
    assert rule.weights.tolist() == [3, 6] and rule.merges[0].staleness == 1
    push(rule := started(Downpour()), 0, (3, 2))  # by default half of it, for two workers
    assert rule.weights.tolist() == [2, 2]


def test_downpour_momentum_by_hand():
    """momentum 1/2, lr 1: v = -(2, 0), W = (3, 2); then v = -(1, 0) - (0, 4) = -(1, 4), W = (4, 6)."""
    rule = started(Downpour("momentum", lr=1.0, momentum=0.5))
    push(rule, 0, (3, 2)), push(rule, 1, (1, 6))
    assert rule.weights.tolist() == [4, 6]
    push(rule := started(Downpour("momentum", momentum=0.5)), 0, (3, 2))  # lr = (1 - 1/2) / 2
    assert rule.weights.tolist() == [1.5, 2]


def test_downpour_adam_by_hand():
    """beta1 = 1/2, beta2 = 3/4, lr = 0.1, in the first weight. -u = 2: p = 1, q = 1; p' = 1 / (1/2) = 2, q' = 1 / (1/4) = 4: a
    step of 0.1 * 2 / 2. Then -u = -2: p = 1/2 - 1 = -1/2, q = 3/4 + 1 = 7/4; p' = -1/2 / (3/4), q' = 7/4 / (7/16) = 4: -0.1 / 3."""
    rule = started(Downpour("adam", 0.1, beta1=0.5, beta2=0.75), workers=[0])
    push(rule, 0, (3, 2))
    assert rule.weights == pytest.approx([1.1, 2.0])
    push(rule, 0, (-0.9, 2))
    assert rule.weights == pytest.approx([1.1 - 0.1 / 3, 2.0], abs=1e-6)


def test_downpour_s_momentum_does_not_touch_buffers():
    rule = started(Downpour("momentum", lr=5.0), (0.0, 1.0), n_buffers=1)
    for value in (0.5, 0.1, 0.01):
        before = rule.weights[1]
        push(rule, 0, (1.0, value))
        assert rule.weights[1] == pytest.approx((before + value) / 2)


# -- FedAsync, FedBuff -------------------------------------------------------------------------------------------------


def test_fedasync_by_hand():
    """alpha = 1/2, constant: (1, 2)/2 + (3, 6)/2 = (2, 4); then worker 1, late or not: (2, 4)/2 + (4, 0)/2 = (3, 2)."""
    rule = started(FedAsync(0.5, "constant"))
    push(rule, 0, (3, 6))
    assert rule.weights.tolist() == [2, 4]
    push(rule, 1, (4, 0))
    assert rule.weights.tolist() == [3, 2] and (rule.merges[0].staleness, rule.merges[0].coefficient) == (1, 0.5)


def test_fedasync_fades_with_staleness():
    """Polynomial, power 1/2: 1, 1/sqrt(2), 1/2 at tau = 0, 1, 3. Hinge, slope 2, free 1: 1, 1, then 1/(2 (3-1) + 1) = 1/5."""
    polynomial, hinge = FedAsync(0.6, power=0.5), FedAsync(0.6, "hinge", slope=2, free=1)
    assert [polynomial.share(tau) for tau in (0, 1, 3)] == pytest.approx([0.6, 0.6 / math.sqrt(2), 0.3])
    assert [hinge.share(tau) for tau in (0, 1, 3)] == pytest.approx([0.6, 0.6, 0.12])
    rule = started(FedAsync(0.5, power=1))  # tau = 1: alpha 1/4
    push(rule, 0, (3, 6)), push(rule, 1, (6, 0))
    assert rule.weights.tolist() == [3, 3]


def test_fedbuff_by_hand():
    """K = 2, lr = 1, fresh: (1, 2) + ((2, 0) + (0, 4)) / 2 = (2, 4), and both have been answered at once."""
    rule = started(FedBuff(2), workers=[0, 1, 2])
    (reply,) = push(rule, 0, (3, 2))
    assert (reply.worker, reply.version, rule.merges) == (0, 0, [])
    (reply,) = push(rule, 1, (1, 6))
    assert (reply.worker, reply.version) == (1, 1) and rule.weights.tolist() == [2, 4]
    assert [(m.worker, m.version, m.coefficient, m.staleness) for m in rule.merges] == [(0, 1, 0.5, 0), (1, 1, 0.5, 0)]
    # Worker 0 is one version late: it counts 1/sqrt(2) of (2, 0), with 2 the (4, 4) of a fresh push: (4 + sqrt(2), 4) / 2.
    push(rule, 0, (3, 2)), push(rule, 1, (6, 8))
    assert rule.weights == pytest.approx([2 + (4 + math.sqrt(2)) / 2, 4 + 2])
    assert [(m.worker, m.staleness) for m in rule.merges] == [(0, 1), (1, 0)]


def test_fedbuff_mixes_buffers_by_the_weights_of_the_pushes():
    """K = 2: (0.2 + 0.6) / 2 = 0.4 replaces the old; with lr = 1/2 it is half of it."""
    for lr, expected in ((1.0, 0.4), (0.5, 0.7), (3.0, 0.4)):
        rule = started(FedBuff(2, lr), (0.0, 1.0), n_buffers=1)
        push(rule, 0, (1.0, 0.2)), push(rule, 1, (1.0, 0.6))
        assert rule.weights[1] == pytest.approx(expected) and rule.weights[0] == pytest.approx(lr)


def test_fedbuff_with_one_push_is_downpour_and_without_staleness_fedasync():
    """K=1, no fading: W + lr (W_j - W(k)) is Downpour with that lr, whatever the order; FedAsync, constant, has W where Downpour
    has W(k), so it is the same as long as pushes are fresh, as those of one worker are."""
    rng = np.random.default_rng(0)
    for workers, other in (([0, 1, 2], Downpour(lr=0.25)), ([0], FedAsync(0.25, "constant"))):
        rules = [started(FedBuff(1, 0.25, power=0), workers=workers), started(other, workers=workers)]
        for _ in range(20):
            worker, change = int(rng.choice(workers)), rng.normal(size=2)
            for rule in rules:
                push(rule, worker, change)
            assert rules[0].weights == pytest.approx(rules[1].weights, abs=1e-5)
        assert rules[0].version == rules[1].version == 20


def test_fedbuff_keeps_the_push_of_who_has_left_and_merges_the_rest_at_the_end():
    rule = started(FedBuff(3), workers=[0, 1])
    push(rule, 0, (4, 2)), rule.leave(0), push(rule, 1, (1, 5))
    assert rule.version == 0
    rule.finish()
    assert rule.version == 1 and rule.weights == pytest.approx([2.5, 3.5]) and [m.worker for m in rule.merges] == [0, 1]


def test_a_buffer_as_large_as_the_lab_is_full_when_the_lab_shrinks():
    rule = started(FedBuff(), workers=[0, 1, 2])
    push(rule, 0, (3, 2)), push(rule, 1, (1, 6))
    assert rule.version == 0 and rule.leave(2) == [] and rule.version == 1 and len(rule.merges) == 2


def test_a_buffer_that_is_not_full_is_no_part_of_a_checkpoint():
    """Its samples count only when they are merged, so after a resume they are trained on again."""
    rule = started(FedBuff(3))
    push(rule, 0, (4, 2))
    again = FedBuff(3)
    again.go_on(rule.weights, [0, 1], 0, rule.lasting())
    again.finish()
    assert again.version == 0 and not again.total.any()
