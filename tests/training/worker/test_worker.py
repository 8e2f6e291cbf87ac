"""The buffers in which a worker's weights travel; and what a worker does when messages come in a rare order, with a server made by
hand. The loop itself is tested where runs are: `tests/training/test_train.py`, with a server and a lab."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from labkit.training.wire import transport
from labkit.training.wire.protocol import Grant
from labkit.training.worker.replica import Replica
from labkit.training.worker.worker import WeightBuffers, WorkerSpec, run_worker
from tests.helpers import Settling, problem, settings

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


def test_a_milestone_is_settled_although_the_group_before_it_broke(tmp_path):
    """The message that a rank is gone overtakes the weights that are to be settled: no pass in a group is given up for it."""
    a_problem, listener = problem(kind=Settling), transport.listen()
    config = settings(one_process=True, n_train=len(a_problem.train_indices()))
    spec = WorkerSpec(config, 0, listener.getsockname()[:2], b"s" * 32, meeting=str(tmp_path / "ranks"))
    weights = Replica(a_problem, 5, 0, 400).flat.numpy()

    def received(connection):
        while (message := connection.receive(lambda _, n: [bytearray(n)])[0])["op"] == "heartbeat":
            pass
        return message["op"]

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(run_worker, a_problem, spec)
        try:
            with transport.accept(listener.accept()[0], spec.secret, timeout=60, max_body=weights.nbytes) as connection:
                assert received(connection) == "join"
                connection.send({"op": "regroup", "group": 1})
                connection.send({"op": "grant", **vars(Grant(version=3, done=17, settle=1))}, memoryview(weights))
                assert received(connection) == "push"
                connection.send({"op": "stop", "reason": "enough", "wait_s": 0.0})
                assert received(connection) == "leave"
        finally:
            transport.shut(listener)
        ended.result(60)
