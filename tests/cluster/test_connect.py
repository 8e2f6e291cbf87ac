"""connect(): one lab in a process, requests that make no sense, clusters that are there already."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace

import pytest

import labkit
from labkit.cluster import connect as connecting
from labkit.cluster import dask_backend
from labkit.errors import ClusterError
from tests.cluster.work import where

pytestmark = pytest.mark.usefixtures("closed")


def connected():
    return connecting.current() is not None


def test_the_same_request_gives_the_same_lab_and_a_changed_one_closes_it():
    first = labkit.connect("threads", 2)
    assert labkit.connect("threads", 2) is first and labkit.connect("threads", 2, slowdown=None) is first
    second = labkit.connect("threads", 2, slowdown=[1, 3])
    assert second is not first and first.closed and not second.closed
    assert labkit.connect("threads", 2, slowdown=(1, 3)) is second
    second.close()
    second.close()
    third = labkit.connect("threads", 2, slowdown=[1, 3])
    assert third is not second and second.closed
    unsteady = {"slowdown": [1, 3], "jitter": 0.1, "drift": 20, "stalls": (20, 1)}
    for change in ({"jitter": 0.2}, {"drift": 30}, {"stalls": (20, 2)}, {"stalls": None}):
        fourth = labkit.connect("threads", 2, **unsteady)
        assert labkit.connect("threads", 2, **{**unsteady, "stalls": [20, 1]}) is fourth and not fourth.closed
        assert labkit.connect("threads", 2, **{**unsteady, **change}) is not fourth and fourth.closed
    connecting.current().close()
    for use in (lambda: third.start(0, where), lambda: third.map(abs, [1])):
        with pytest.raises(ClusterError, match=r"this lab is closed\. Run the cell with connect\(\) again"):
            use()


def test_a_lab_that_trains_is_not_closed_by_another_request():
    lab = labkit.connect("threads", 2)
    lab.lease([1], "id", "first-run")
    with pytest.raises(ClusterError, match=r"'first-run' trains on the lab of this kernel.*run\.stop\(\).*name='second'"):
        labkit.connect("threads", 1)
    assert not lab.closed and labkit.connect("threads", 2) is lab
    lab.release("id")
    assert labkit.connect("threads", 1) is not lab and lab.closed


def test_two_labs_side_by_side():
    first, second = labkit.connect("threads", 1), labkit.connect("threads", 2, name="second")
    assert len(first) == 1 and len(second) == 2 and not first.closed and connecting.current() is second
    assert labkit.connect("threads", 1) is first and connecting.current() is first
    assert labkit.connect("threads", 2, name="second") is second
    third = labkit.connect("threads", 1, name="second")
    assert second.closed and not third.closed and not first.closed
    assert first.map(abs, [-1]) == third.map(abs, [-1]) == [1]
    third.close()
    assert connecting.current() is first
    with pytest.raises(ClusterError, match="name=3 must be a string"):
        labkit.connect("threads", 1, name=3)


def test_labs_in_their_with_blocks_stay_open():
    with labkit.connect("threads", 1) as outer, labkit.connect("threads", 2) as inner:
        assert not outer.closed and not inner.closed and outer.map(abs, [-1]) == inner.map(abs, [-1])
    assert outer.closed and inner.closed and connecting.current() is None


def test_a_run_goes_on_where_a_worker_of_its_lab_was_lost(monkeypatch, capsys):
    lab = labkit.connect("threads", 2)
    lab.lease([0], "id", "first-run")
    monkeypatch.setattr(lab, "lost", lambda: [1])
    assert labkit.connect("threads", 2) is lab and "'first-run' goes on" in capsys.readouterr().out
    lab.release("id")
    assert labkit.connect("threads", 2) is not lab and lab.closed


REQUESTS = {
    "kind='thread' is not known. Known: threads, dask, ipyparallel, slurm. Did you mean 'threads'?": {"kind": "thread"},
    "kind=2 is not known. Known: threads, dask, ipyparallel, slurm. Did you mean connect(n_workers=2)?": {"kind": 2},
    "kind='mpi' is not known. Known: threads, dask, ipyparallel, slurm.": {"kind": "mpi"},
    "n_workers=0 must be at least 1.": {"n_workers": 0},
    "must be at most 65536": {"n_workers": 10**30},
    "n_workers=1.5 must be a whole number": {"n_workers": 1.5},
    "threads_per_worker=0 must be at least 1": {"threads_per_worker": 0},
    "jitter=-1 must be at least 0 and at most 10": {"jitter": -1},
    "slowdown has 3 entries for 2 workers. Give one factor for each worker.": {"slowdown": [1, 2, 3]},
    "slowdown=0.5 must be at least 1": {"slowdown": [1, 0.5]},
    "slowdown=1e+300 must be at least 1 and at most 1e+06": {"slowdown": [1, 1e300]},
    "stalls=(1e-300, 1): give (every, seconds)": {"stalls": (1e-300, 1)},
    "jitter=nan must be at least 0 and at most 10": {"jitter": float("nan")},
    "drift=-5 must be at least 0": {"slowdown": [1, 4], "drift": -5},
    "drift=9 moves each worker to the slowdown of the one at the other end of the list, and [1.0] is the same": {"drift": 9},
    "and [4.0, 4.0] is the same from both ends. Give uneven ones": {"slowdown": [4, 4], "drift": 9},
    "stalls=(5, 0): give (every, seconds), such as (20, 1)": {"stalls": (5, 0)},
    "slowdown=nan must be at least 1": {"slowdown": [1, float("nan")]},
    "give address or client, not both.": {"kind": "dask", "address": "tcp://x:1", "client": object()},
    "engines='mip' is not known. Known: local, mpi. Did you mean 'mpi'?": {"kind": "ipyparallel", "engines": "mip"},
    "profile, engines and an ipyparallel Client go with kind='ipyparallel', not with 'dask'.": {"kind": "dask", "profile": "x"},
    "kind='ipyparallel' finds a running cluster by profile": {"kind": "ipyparallel", "address": "tcp://x:1"},
    "security goes with address": {"kind": "dask", "security": object()},
    "client=5 must be a Dask Client or cluster object, not int": {"client": 5},
    "client='tcp://x:1' must be a Dask Client or cluster object, not str. The address": {"client": "tcp://x:1", "kind": "dask"},
    "finds a running cluster by profile='...', or by an ipyparallel Client: client=... (not a int)": {
        "kind": "ipyparallel",
        "client": 5,
    },
    "security=5 must be a distributed.Security, not int": {"kind": "dask", "address": "tls://x:1", "security": 5},
    "engines have no resources": {"kind": "ipyparallel", "resources": {"GPU": 1}},
}


@pytest.mark.parametrize("message", REQUESTS)
def test_bad_requests_start_nothing(message):
    request = {"kind": "threads", "n_workers": None if "client" in REQUESTS[message] else 2, **REQUESTS[message]}
    with pytest.raises(ClusterError) as caught:
        labkit.connect(**request)
    assert message in str(caught.value) and not connected()


def test_a_bad_request_leaves_the_lab_that_is_there():
    lab = labkit.connect("threads", 1)
    with pytest.raises(ClusterError):
        labkit.connect("threads", 0)
    assert not lab.closed and labkit.connect("threads", 1) is lab


def test_an_address_where_nobody_answers():
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        labkit.connect("dask", address="tcp://127.0.0.1:9", timeout=0.5)


def test_workers_that_do_not_come(cluster):
    with pytest.raises(ClusterError, match=r"2 of 5 workers arrived in 3 s\. Try connect\(n_workers=1, kind='threads'\)"):
        labkit.connect("dask", 5, client=cluster, timeout=3)
    assert cluster.scheduler.workers and not connected()


def test_scratch_folders_go_with_the_lab(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with labkit.connect("threads", 1):
        assert [path.name.startswith("labkit-") for path in tmp_path.iterdir()] == [True]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(dask_backend, "_client_class", lambda: boom_client)
    with pytest.raises(ZeroDivisionError):
        labkit.connect("threads", 1)
    assert not list(tmp_path.iterdir())


def boom_client(*args, **options):
    raise ZeroDivisionError


def test_a_cluster_and_a_client_that_are_handed_in_stay_open(cluster):
    from distributed import Client

    with labkit.connect(client=cluster, slowdown=[2, 1]) as lab:
        assert lab.kind == "dask" and len(lab) == 2 and lab.map(abs, [-1]) == [1] and lab.emulated
        mine = lab.client
    assert mine.status == "closed" and cluster.status.name == "running"
    with Client(cluster, set_as_default=False) as client:
        with labkit.connect(client=client) as lab:
            assert lab.client is client and labkit.connect(client=client) is lab and len(lab) == 2
            assert lab.lost() == []
        assert client.status == "running" and client.submit(abs, -3).result(60) == 3
        with pytest.raises(ClusterError, match=r"2 of 3 workers arrived in 3 s"):
            labkit.connect(client=client, slowdown=[1, 1, 1], timeout=3)
        with pytest.raises(ClusterError, match="slowdown has 1 entries for 2 workers"):
            labkit.connect(client=client, slowdown=[1])


def test_a_scheduler_by_its_address(cluster):
    with labkit.connect("dask", 1, address=cluster.scheduler_address) as lab:
        assert len(lab) == 1 and lab.map(abs, [-2, -3]) == [2, 3]
    with labkit.connect(address=cluster.scheduler_address) as lab:
        assert lab.lost() == []
    assert cluster.status.name == "running"


def test_the_lab_of_this_kernel_can_be_asked_for_while_another_one_is_connected(monkeypatch):
    class Closed:
        @property
        def closed(self):  # when it is looked at, another thread has one more
            labs.setdefault("third", (None, SimpleNamespace(closed=False, close=lambda: None)))
            return True

    labs = {"first": (None, SimpleNamespace(closed=False, close=lambda: None)), "second": (None, Closed())}
    monkeypatch.setattr(connecting, "_labs", labs)
    assert connecting.current() is labs["first"][1] and connecting.current() is labs["third"][1]
