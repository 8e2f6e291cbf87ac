"""The sampler of one worker: orders, batches, and the steps of an all-reduce."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.errors import WorkerError
from labkit.problems.splits import batches
from labkit.training.worker.sampler import Shard, pass_order, steps


def test_orders_derive_from_seed_worker_and_pass():
    shard = np.arange(100, 117)
    orders = {(s, w, e): tuple(pass_order(shard, s, w, e)) for s in range(3) for w in range(3) for e in range(3)}
    assert len(set(orders.values())) == 27
    assert all(sorted(order) == list(shard) for order in orders.values())
    assert tuple(pass_order(shard, 1, 2, 0)) == orders[1, 2, 0]


def test_a_pass_covers_each_sample_once_whatever_is_taken_at_a_time():
    for sizes in ([17], [5] * 17, [1] * 17, [3, 30, 1, 17]):
        shard = Shard(seed=1, worker=2)
        shard.add(np.arange(10))
        shard.add(np.arange(10, 17))
        taken = np.concatenate([shard.draw(n) for n in sizes])
        assert len(taken) == sum(sizes)
        for epoch in range(len(taken) // 17):
            mine = taken[17 * epoch : 17 * (epoch + 1)]
            assert sorted(mine) == list(range(17))
            assert np.array_equal(mine, pass_order(np.arange(17), 1, 2, epoch))


def test_taking_nothing_and_adding_nothing():
    shard = Shard(0, 0)
    shard.add(np.empty(0, np.int64))
    assert shard.draw(0).dtype == np.int64 and len(shard.draw(0)) == 0
    shard.add(np.arange(3))
    assert len(shard.draw(0)) == 0 and len(shard.draw(3)) == 3


def test_samples_that_are_added_come_with_the_next_pass():
    shard = Shard(0, 0)
    shard.add(np.arange(5))
    first = shard.draw(5)
    shard.add(np.arange(5, 9))
    assert sorted(first) == list(range(5)) and sorted(shard.draw(9)) == list(range(9))


def test_of_what_is_given_back_nothing_is_drawn_any_more():
    shard = Shard(0, 0)
    shard.add(np.arange(7))
    first = shard.draw(3)
    shard.retain(4)
    assert len(shard) == 4 and sorted(set(shard.draw(8).tolist()) | set(first[first < 4].tolist())) == list(range(4))
    shard.retain(4)
    assert len(shard) == 4


def test_a_shard_that_holds_too_little_says_so():
    shard = Shard(0, 3)
    with pytest.raises(WorkerError, match="worker 3 was asked to train on 2 samples and holds none"):
        shard.draw(2)
    with pytest.raises(WorkerError, match="worker 3 cannot retain 2 samples: it holds 0"):
        shard.retain(2)


# -- the steps of an all-reduce ----------------------------------------------------------------------------------------

GRANTS = [[17], [16, 16], [17, 16], [5, 50], [2, 40], [1, 30], [3, 3, 3], [100, 7, 31], [64, 64, 65], [1, 1], [187]]


@pytest.mark.parametrize("grants", GRANTS)
@pytest.mark.parametrize("batch_size", [1, 2, 8, 16, 64])
def test_steps_are_as_many_everywhere_and_cover_every_sample(grants, batch_size):
    plans = [steps(grants, rank, batch_size) for rank in range(len(grants))]
    sizes, weights = np.array([plan[0] for plan in plans]), np.array([plan[1] for plan in plans])
    assert sizes.shape == weights.shape == (len(grants), len(plans[0][0]))
    assert sizes.sum(axis=1).tolist() == grants
    before = [0, *np.cumsum(sizes.sum(axis=0))[:-1].tolist()]
    assert all(plan[2] == before for plan in plans)  # the clock of all ranks
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    np.testing.assert_allclose(weights, sizes / sizes.sum(axis=0))
    assert sizes.min() >= min(2, batch_size, *grants)  # BatchNorm cannot train on one sample
    share = np.array(grants) / sum(grants)
    assert (np.abs(sizes - share[:, None] * sizes.sum(axis=0)) < 2).all()  # in proportion to the shards


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 33, 187])
def test_one_rank_takes_the_batches_of_plain_training(n):
    assert steps([n], 0, 16)[0] == [len(part) for part in batches(np.arange(n), 16)]


def test_the_number_of_steps_is_that_of_the_joint_batch():
    assert steps([64, 64], 0, 16) == ([16] * 4, [0.5] * 4, [0, 32, 64, 96])
    sizes = [steps([96, 32], rank, 16)[0] for rank in (0, 1)]
    assert sizes == [[24] * 4, [8] * 4]


def test_a_pass_over_units_reads_each_once_in_a_new_order():
    units = np.array([0, 10, 20, 35, 50])
    shard = Shard(0, 1, units=units)
    shard.add(np.concatenate([np.arange(20, 35), np.arange(10), np.arange(35, 50)]))
    passes = [shard.draw(40) for _ in range(6)]
    for order in passes:
        assert sorted(order) == [*range(10), *range(20, 50)]
        assert np.count_nonzero(np.diff(np.searchsorted(units, order, "right"))) == 2
        assert (np.diff(order) != 1).sum() > 20  # shuffled within each
    assert len({tuple(order) for order in passes}) == 6
    shard.retain(15)
    assert sorted(shard.draw(15)) == list(range(20, 35))
