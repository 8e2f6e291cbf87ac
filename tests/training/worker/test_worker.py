"""The samples of one worker: orders and batches."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.training.worker.sampler import Shard, batches, pass_order

# -- which samples, in which order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 31, 33, 49])
def test_batches_cover_everything_in_order_and_none_is_a_lone_sample(n, batch_size):
    parts = batches(np.arange(n), batch_size)
    assert np.array_equal(np.concatenate([*parts, np.arange(0)]), np.arange(n))
    assert all(len(part) == batch_size for part in parts[:-1])
    if n > 1 and batch_size > 1:
        assert all(1 < len(part) <= batch_size + 1 for part in parts)
    assert len(parts) <= -(-n // batch_size)
    if n % batch_size == 0:
        assert len(parts) == n // batch_size  # local_steps is the number of optimiser steps


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
        taken = np.concatenate([shard.take(n) for n in sizes])
        assert len(taken) == sum(sizes)
        for epoch in range(len(taken) // 17):
            mine = taken[17 * epoch : 17 * (epoch + 1)]
            assert sorted(mine) == list(range(17))
            assert np.array_equal(mine, pass_order(np.arange(17), 1, 2, epoch))


def test_taking_nothing_and_adding_nothing():
    shard = Shard(0, 0)
    shard.add(np.empty(0, np.int64))
    assert shard.take(0).dtype == np.int64 and len(shard.take(0)) == 0
    shard.add(np.arange(3))
    assert len(shard.take(0)) == 0 and len(shard.take(3)) == 3


def test_samples_that_are_added_come_with_the_next_pass():
    shard = Shard(0, 0)
    shard.add(np.arange(5))
    first = shard.take(5)
    shard.add(np.arange(5, 9))
    assert sorted(first) == list(range(5)) and sorted(shard.take(9)) == list(range(9))
