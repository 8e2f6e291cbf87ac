"""Leases of workers: kept by the workers, ended with the run, whoever's kernel dies."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import labkit
from labkit.cluster import leases
from labkit.cluster.backend import Request, quiet
from labkit.cluster.leases import Held, Lease, at_work, give_back, lease_all
from labkit.errors import ClusterError
from labkit.locks import DirectoryLock
from tests.helpers import problem, until

ELSEWHERE = {"machine": "elsewhere", "pid": 1}


class Workers:
    """Workers 0 and 1 of this process, and a frozen one, as a back end asks them."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(leases, "_leases", {})
        self.address = "0"

    def __call__(self, ids, fn, *args):
        answers = {}
        for id in ids:
            self.address = str(id)
            answers[id] = None if id == "frozen" else fn(*args, dask_worker=self)
        return answers


@pytest.fixture
def ask(monkeypatch):
    return Workers(monkeypatch)


def test_workers_are_leased_all_or_none_until_they_are_given_back(ask):
    first, second = Lease("1a", "first", **ELSEWHERE), Lease("2b", "second")
    assert lease_all([1, "frozen"], first, ask) == {} == lease_all([1], first, ask)
    assert lease_all([0, 1, "frozen"], second, ask) == {1: first}
    assert repr(first) == "'first' (another notebook, process 1 on elsewhere)"
    assert lease_all([0], Lease("3c", "third"), ask) == {}  # the second has given it back
    ask([0, 1], give_back, "1a")
    assert lease_all([1], second, ask) == {}


def test_a_lease_ends_with_its_run_also_when_its_kernel_has_died(ask, tmp_path, monkeypatch):
    lock = DirectoryLock(tmp_path, "1a")
    dead, other = Lease("1a", "dead", str(tmp_path)), Lease("2b", "other")
    assert lease_all([0, 1], dead, ask) == {}
    monkeypatch.setattr(leases, "IDLE_S", 0.0)
    assert lease_all([0, 1], other, ask) == {0: dead, 1: dead}  # its server lives
    assert f"run 1a in {tmp_path}; another notebook" in repr(dead)
    lock.release()
    monkeypatch.setattr(leases, "LEAVE_S", 0.2)
    with at_work():
        assert lease_all([0], other, ask) == {0: dead}  # a task of it is still at work there
    assert lease_all([0, 1], other, ask) == {}


def test_what_cannot_be_seen_from_here_ends_when_its_workers_are_idle(ask, tmp_path, monkeypatch):
    DirectoryLock(tmp_path, "1a").release()
    other = Lease("2b", "other")
    for unseen in (Lease("1a", "a", str(tmp_path), **ELSEWHERE), Lease("1a", "a", str(tmp_path / "none")), Lease("1a", "a")):
        lease_all([0], unseen, ask)
        assert lease_all([0], other, ask) == {0: unseen}
        with monkeypatch.context() as soon:
            soon.setattr(leases, "IDLE_S", 0.0)
            assert not Held(unseen, True, 100.0).ended and lease_all([0], other, ask) == {}
        ask([0], give_back, "2b")


KERNEL = """
import sys
from tests.cluster.test_leases import Request, connection
from tests.helpers import problem, until
import labkit

if __name__ == "__main__":
    lab = labkit.connect(**connection(sys.argv[1], sys.argv[2]))
    run = labkit.train(problem(), lab, passes=100000, runs=sys.argv[3], name="dead", join_timeout=60.0)
    until(lambda: run.status().get("started"), 60)
    print("started", flush=True)
    run.wait()
"""


def connection(kind, where):
    if kind == "dask":
        return {"address": where}
    import ipyparallel

    return {"client": ipyparallel.Client(where)}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["dask", "ipyparallel"])
def test_the_next_kernel_hears_which_run_holds_the_workers_and_follows_stops_and_resumes_it(kind, tmp_path, cache):
    from distributed import LocalCluster

    from labkit.cluster import ipyparallel_backend

    (tmp_path / "kernel.py").write_text(KERNEL)
    with quiet():
        if kind == "dask":
            cluster = LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"}
            )
            where = cluster.scheduler_address
        else:
            cluster = ipyparallel_backend.open(Request("ipyparallel", 2))
            where = str(cluster._local.connection)
            until(lambda: len(cluster.client.ids) == 2, 30)
        try:
            command = [sys.executable, str(tmp_path / "kernel.py"), kind, where, str(tmp_path / "runs")]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as kernel:
                assert kernel.stdout.readline() == "started\n"
                kernel.kill()
            dead = labkit.load_run(tmp_path / "runs" / "dead")
            with labkit.connect(**connection(kind, where)) as lab:
                began = time.monotonic()
                with pytest.raises(ClusterError, match=rf"worker 0 by 'dead' \(run {dead.config.id} in .*attach\(\)\.stop\(\)"):
                    labkit.train(problem(), lab, passes=1, runs=tmp_path / "runs", name="next")
                assert time.monotonic() - began < 90 and not (tmp_path / "runs" / "next").exists()
                before = dead.attach().status()["samples"]
                until(lambda: dead.status()["samples"] > before, 60)  # its workers go on without its kernel
                assert dead.stop().state == "stopped"
                pushes = (dead.events.kind == "push").sum()
                again = labkit.resume(dead.path, lab)
                until(lambda: (again.events.kind == "push").sum() > pushes, 60)
                assert again.config.id == dead.config.id and again.stop().state == "stopped"
                run = labkit.train(problem(), lab, passes=1, runs=tmp_path / "runs", name="next").wait(100)
                assert run.state == "done"
        finally:
            cluster.close()
