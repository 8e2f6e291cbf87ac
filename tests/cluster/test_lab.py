"""The lab: who is there, who comes, who holds whom, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

import labkit
from labkit.cluster import lab as lab_module
from labkit.cluster.backend import About, Request
from labkit.cluster.emulation import Unevenness
from labkit.cluster.lab import Lab
from labkit.errors import ClusterError

pytestmark = pytest.mark.usefixtures("closed")


THREE = threading.Barrier(3)


def side_by_side():
    return THREE.wait(60)


def test_four_things(capfd):
    with labkit.connect("threads", 3, slowdown=[1, 2, 4]) as lab:
        assert [w.index for w in lab.workers] == [0, 1, 2] and len(lab) == 3
        assert [w.slowdown for w in lab.workers] == [1, 2, 4] and lab.emulated
        assert {w.pid for w in lab.workers} == {os.getpid()} and lab.one_process
        tasks = [lab.start(index, side_by_side) for index in (0, 1, 2)]
        assert len({task.result(100) for task in tasks}) == 3, "the tasks did not run side by side"
        assert lab.map(abs, range(-7, 0)) == [7, 6, 5, 4, 3, 2, 1] and lab.map(abs, []) == []
        assert lab.lost() == []
        table = lab.table()
        assert [*table.columns] == ["name", "host", "device", "threads", "pid", "slowdown", "drifts_to"] and len(table) == 3
        text = repr(lab)
        assert "3 workers (threads)" in text and "worker 2" in text and "emulated 4x slower" in text
        assert "127.0.0.1" in lab.dashboard or lab.dashboard == ""
    assert repr(lab) == "<Lab threads, closed>" and lab.lost() == [0, 1, 2] and lab.dashboard == ""
    assert capfd.readouterr() == ("", "")


def test_uneven_in_every_way():
    with labkit.connect("threads", 3, slowdown=[1, 2, 4], jitter=0.2, drift=30, stalls=[20, 1]) as lab:
        ways = {"jitter": 0.2, "drift": 30, "stalls": (20.0, 1.0)}
        assert lab.emulated and lab.unevenness(0) == Unevenness(1, drifts_to=4, **ways)
        assert [worker.drifts_to for worker in lab.workers] == [4, 2, 1] and lab.unevenness(1).drifting is False
        text = repr(lab)
        assert "  emulated: jitter 0.2, drift with a period of 30 s, stalls of 1 s every 20 s\n" in text
        assert "emulated 1x slower, drifting to 4x" in text and "emulated 2x slower\n" in text
    for ways in ({"jitter": 0.1}, {"stalls": (9, 1)}):
        with labkit.connect("threads", 2, **ways) as lab:
            assert lab.emulated and lab.workers[1].slowdown == lab.workers[1].drifts_to == 1
    with labkit.connect("threads", 2) as lab:
        assert not lab.emulated and "emulated" not in repr(lab)


class FakeWorkers:
    """A back end whose workers come, freeze and go as a test says: id -> (name, what it says of itself; None: nothing, yet)."""

    client, dashboard = None, ""

    def __init__(self, keeps_names=False, **workers):
        self.keeps_names, self.workers, self.held, self.asked = keeps_names, workers, {}, []

    def alive(self):
        return {id: name for id, (name, _) in self.workers.items()}

    def describe(self, id):
        self.asked.append(id)
        future = Future()
        if isinstance(about := self.workers[id][1], Exception):
            future.set_exception(about)
        elif about is not None:
            future.set_result(about)
        return future

    def lease(self, ids, holder, name, path=""):
        return {id: self.held[id] for id in ids if id in self.held}

    def release(self, holder):
        pass

    def trouble(self):
        return ""

    def close(self):
        pass


def about(pid, gpus=0, visible="", host="here"):
    return About(host, pid, gpus, visible, 0)


def a_lab(backend, slowdown=None, limit=None, drift=0.0):
    there = {"address": "of others"} if limit else {}
    request = Request("fake", limit or len(backend.workers), slowdown=tuple(slowdown or ()), drift=drift, timeout=1, **there)
    lab = Lab(request, backend)
    lab.admit(request)
    return lab


def test_workers_are_in_the_order_of_their_names_and_numbers_in_them_by_value():
    for names in (["2", "10", "node-3", "node-10-1", "node²"], ["a10", "b2"]):
        backend = FakeWorkers(**{name: (name, about(number)) for number, name in enumerate(reversed(names))})
        assert [worker.name for worker in a_lab(backend).workers] == names


def test_who_comes_takes_the_place_of_its_name_or_of_the_first_that_was_lost():
    for keeps_names, place in ((True, 2), (False, 0)):
        backend = FakeWorkers(keeps_names, a=("0", about(1)), b=("1", about(2)))
        lab = a_lab(backend, slowdown=[3, 4], drift=9.0)
        backend.workers = {"b": ("1", about(2))}
        assert lab.lost() == [0] and lab.refresh() == []
        backend.workers["new"] = ("9", about(5))
        assert lab.refresh() == [place] and lab.refresh() == [] and lab.workers[place].pid == 5
        assert lab.workers[place].slowdown == (1 if keeps_names else 3) and lab.lost() == ([0] if keeps_names else [])
        backend.workers["again"] = ("1", about(7))
        del backend.workers["b"]
        assert lab.refresh() == [1] and (lab.workers[1].pid, lab.workers[1].slowdown) == (7, 4)
        assert lab.workers[1].drifts_to == 3 and lab.workers[2 * keeps_names].drifts_to == (1 if keeps_names else 4)


def test_who_comes_back_while_another_one_is_added_is_not_the_new_one():
    backend = FakeWorkers(True, a=("0", about(1)), b=("1", about(2)))
    lab = a_lab(backend)
    del backend.workers["a"]

    def add(n):
        backend.workers["again"] = ("0", about(5))
        threading.Timer(0.3, backend.workers.update, [{"new": ("2", about(6))}]).start()

    backend.add = add
    assert lab.add(1, timeout=10) == [2] and lab.workers[0].pid == 5 and lab.lost() == []


def test_two_threads_that_add_a_worker_each_have_one_each():
    """As two newcomers of a storm of faults."""
    backend, both = FakeWorkers(True, a=("0", about(1))), threading.Barrier(2)
    lab, asked = a_lab(backend), []

    def add(n):
        asked.append(n)
        if len(asked) == 2:  # the first one comes when both wait
            backend.workers["b"] = ("1", about(2))
            threading.Timer(0.3, backend.workers.update, [{"c": ("2", about(3))}]).start()

    def begin():
        both.wait(20)
        return lab.add(1, timeout=10)

    backend.add = add
    with ThreadPoolExecutor(2) as pool:
        came = [one.result(20) for one in [pool.submit(begin) for _ in range(2)]]
    assert sorted(came) == [[1], [2]] and len(lab) == 3


def test_newcomers_that_are_frozen_or_die_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(lab_module, "DESCRIBE_S", 0.1)
    backend = FakeWorkers(a=("0", about(1)))
    lab = a_lab(backend)
    backend.workers |= {"frozen": ("1", None), "dies": ("2", OSError("gone")), "well": ("3", about(4))}
    assert lab.refresh() == [1] and lab.workers[1].pid == 4
    monkeypatch.setattr(lab_module, "DESCRIBE_S", 60.0)
    begun = time.monotonic()
    for _ in range(5):
        assert lab.refresh() == []
    assert time.monotonic() - begun < 50  # who did not answer is not waited for again
    assert backend.asked.count("frozen") == 1 and backend.asked.count("dies") > 1
    backend.workers["frozen"] = ("1", about(8))
    lab._asked["frozen"].set_result(about(8))  # it thaws
    del backend.workers["dies"]
    assert lab.refresh() == [2] and lab.workers[2].pid == 8


def test_on_a_cluster_of_others_a_lab_stays_as_large_as_it_was_asked_for():
    backend = FakeWorkers(a=("0", about(1)), b=("1", about(2)), spare=("2", about(3)))
    lab = a_lab(backend, limit=2)
    assert len(lab) == 2 and lab.refresh() == []
    del backend.workers["b"]
    assert lab.refresh() == [1] and lab.workers[1].pid == 3 and len(lab) == 2


def test_each_holder_hears_of_those_who_come_that_are_free_or_its_own():
    backend = FakeWorkers(a=("0", about(1)), b=("1", about(2)))
    lab = a_lab(backend)
    lab.lease([0], "one")
    lab.lease([1], "two")
    backend.workers = {"c": ("0", about(3)), "b": ("1", about(2)), "d": ("5", about(4))}
    assert lab.refresh("two") == [2] and lab.refresh("one") == [0, 2] and lab.refresh() == [2]
    lab.lease([2], "one")
    del backend.workers["d"]
    backend.workers["e"] = ("6", about(5))
    backend.held["e"] = "somebody"  # another notebook was quicker
    assert lab.refresh("one") == lab.refresh("two") == [] and lab.lost() == [2]
    backend.held.clear()
    assert lab.refresh("two") == [] and lab.refresh("one") == [2] and lab.free() == []


def test_leases_are_told_apart_by_their_holder_and_called_by_their_name():
    lab = a_lab(FakeWorkers(a=("0", about(1)), b=("1", about(2)), c=("2", about(3))))
    lab.lease([0], "1a", "same")
    lab.lease([1], "2b", "same")
    assert lab.free("1a") == [0, 2] and lab.free("2b") == [1, 2] and lab.free() == lab.free("same") == [2]
    for workers in ([0, 2], [0, 1]):
        with pytest.raises(ClusterError, match=r"^workers are held: worker 0 by 'same'\. Wait for that run"):
            lab.lease(workers, "2b", "same")
    assert lab.free() == [2]
    lab.lease([2], "2b")  # a newcomer
    with pytest.raises(ClusterError, match=r"worker 0 by 'same', worker 2 by 'same'\."):
        lab.lease([0, 2], "3c", "other")
    lab.release("1a")
    assert lab.free() == [0]


def test_workers_of_a_host_share_its_gpus():
    backend = FakeWorkers(
        a=("0", about(1, 2)), b=("1", about(2, 2)), c=("2", about(3, 2)), d=("3", about(4, 2, host="there")), e=("4", about(5, 0))
    )
    lab = a_lab(backend)
    assert [worker.device for worker in lab.workers] == ["cuda:0", "cuda:1", "cuda:0", "cuda:0", "cpu"]
    del backend.workers["b"]
    backend.workers["again"] = ("1", about(9, 2))
    assert lab.refresh() == [1] and lab.workers[1].device == "cuda:1"
    lab = a_lab(FakeWorkers(a=("0", about(1, 2, "0,1")), b=("1", about(2, 2, "1,0"))))  # each was given its own first one
    assert [worker.device for worker in lab.workers] == ["cuda:0", "cuda:0"]
