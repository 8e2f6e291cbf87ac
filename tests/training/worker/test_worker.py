"""The buffers in which a worker's weights travel. The loop itself is tested where runs are: `tests/training/test_train.py`, with a
server and a lab."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.training.worker.replica import Replica
from labkit.training.worker.worker import WeightBuffers
from tests.helpers import problem

pytestmark = pytest.mark.usefixtures("cache")


def test_in_the_plain_case_nothing_is_copied():
    one = Replica(problem(), 5, 0, 400)
    buffers = WeightBuffers(one, "float32", apart=False)
    assert np.shares_memory(np.frombuffer(buffers.received, np.uint8), one.flat.numpy())
    assert np.shares_memory(np.frombuffer(buffers.pack(), np.uint8), one.flat.numpy())


def test_a_push_that_is_under_way_stays_as_it_was_while_the_replica_trains_on():
    one = Replica(problem(), 5, 0, 400)
    buffers = WeightBuffers(one, "float32", apart=True)
    sent = buffers.pack()
    before = bytes(sent)
    one.flat += 1
    assert bytes(sent) == before != one.flat.numpy().tobytes()
    buffers.received[:] = bytes(len(before))
    assert one.flat.any()
    buffers.unpack(0)
    assert not one.flat.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_half_as_much_travels_and_both_ends_have_the_same(dtype):
    one = Replica(problem(), 5, 0, 400)
    buffers = WeightBuffers(one, dtype, apart=False)
    assert buffers.received.nbytes == buffers.pack().nbytes == 2 * len(one.flat)
    buffers.pulled[:] = 0
    buffers.unpack(0)
    assert not one.flat.any()
    one.flat[0] = 2.0**-20
    buffers.pack()
    assert torch.count_nonzero(one.flat) == np.count_nonzero(buffers.pushed) == 1
