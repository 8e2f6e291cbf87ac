"""A back end in one file: threads of this process, one for each worker.

Registered, and trained on, by `tests.cluster.test_backend`.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

from labkit.cluster.backend import describe
from labkit.errors import ClusterError


def check(request):
    if request.joins:
        raise ClusterError("there are no threads of others to join.")
    request.refuse_job()


def open(request):
    return Threads(request.n_workers)


class Threads:
    client, dashboard, keeps_names = None, "", False

    def __init__(self, n):
        self.pools, self.numbers = {}, itertools.count()
        self.add(n)

    def alive(self):
        return {id: str(id) for id in self.pools}

    def describe(self, id):
        with ThreadPoolExecutor(1) as beside:  # also while a task is at work
            return beside.submit(describe)

    def submit(self, id, pid, fn, args):
        future = self.pools[id].submit(fn, *args)
        future.release = future.cancel
        return future

    def add(self, n):
        self.pools |= {id: ThreadPoolExecutor(1) for id in itertools.islice(self.numbers, n)}

    def lease(self, ids, holder, name, path=""):
        return {}  # no other notebook sees these workers

    def release(self, holder):
        pass

    def trouble(self):
        return ""

    def close(self):
        pools, self.pools = self.pools, {}
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
