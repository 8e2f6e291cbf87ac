"""ipyparallel as a back end: what it alone promises (`test_backend` has what all do)."""

from __future__ import annotations

import os
import signal

import pytest

import labkit
from labkit.cluster import ipyparallel_backend
from labkit.cluster.backend import Request
from labkit.cluster.ipyparallel_backend import _Task
from labkit.errors import ClusterError
from tests.cluster.test_backend import until

pytestmark = pytest.mark.usefixtures("closed")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_running_ipyparallel_cluster_and_its_client_stay_as_they_were():
    engines = ipyparallel_backend.open(Request("ipyparallel", 2))
    try:
        client = engines.client
        until(lambda: len(client.ids) == 2)
        with labkit.connect(client=client) as lab:
            assert lab.kind == "ipyparallel" and len(lab) == 2 and lab.client is client and lab.map(abs, [-1, -2]) == [1, 2]
            with pytest.raises(ClusterError, match="did not start its engines"):
                lab.add()
            os.kill(lab.workers[0].pid, signal.SIGKILL)
            until(lambda: lab.lost() == [0])
            engines.add(1)
            until(lambda: lab.refresh() == [0])
        assert not client._closed and len(client.ids) == 2 and client[:].apply_sync(os.getpid)
        with pytest.raises(ClusterError, match="2 of 3 workers"):
            labkit.connect(client=client, n_workers=3, timeout=0.5)
    finally:
        engines.close()


def test_a_task_whose_engine_dies_before_it_has_answered_is_lost_and_not_failed():
    from ipyparallel.error import RemoteError

    class Dies:
        """What ipyparallel's client answers in the place of an engine that is gone."""

        def ask(self, *args):
            return self

        def ready(self):
            return True

        def get(self, timeout):
            raise RemoteError("EngineError", "Engine 1 died while running task", "", {})

    task = _Task(Dies(), 1, abs, (-1,))
    assert not task.done() and not task.done()
