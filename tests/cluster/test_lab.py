"""The lab: connect, four things to do, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import psutil
import pytest

import labkit
from labkit.cluster import connect as connecting
from labkit.cluster import lab as lab_module
from labkit.cluster.dask_backend import DaskWorkers, quiet
from labkit.cluster.emulation import Unevenness
from labkit.cluster.ipyparallel_local import mpiexec
from labkit.cluster.lab import Lab
from labkit.errors import ClusterError
from tests.cluster.test_backends import PLACES, skip_without


@pytest.fixture(autouse=True)
def _closed():
    yield
    if connecting._current:
        connecting._current[1].close()


def until(condition, limit=20.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.02)


def connected():
    return connecting._current is not None and not connecting._current[1].closed


def where():
    return threading.current_thread().name


def boom(x=0):
    raise ZeroDivisionError(f"no {x}")


def test_map_tells_who_works_and_what_is_done():
    told = []
    with labkit.connect("threads", 2, slowdown=[1, 3]) as lab:
        places = lab.map(
            lambda item, worker: (item, worker.index, worker.slowdown), range(5), placed=True, each=lambda *row: told.append(row)
        )
        assert [item for item, *_ in places] == list(range(5)) and {row[1:] for row in places} <= {(0, 1), (1, 3)}
        assert sorted(told) == list(enumerate(places))


def test_four_things(capfd):
    with labkit.connect("threads", 3, slowdown=[1, 2, 4]) as lab:
        assert [w.index for w in lab.workers] == [0, 1, 2] and len(lab) == 3
        assert [w.slowdown for w in lab.workers] == [1, 2, 4] and lab.emulated
        assert {w.pid for w in lab.workers} == {os.getpid()} and lab.one_process
        tasks = [lab.start(index, time.sleep, 0.3) for index in (0, 1, 2)]
        begun = time.monotonic()
        assert [task.result(10) for task in tasks] == [None] * 3
        assert time.monotonic() - begun < 0.8, "the tasks did not run side by side"
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


def test_a_task_runs_on_its_worker_and_errors_come_back():
    with labkit.connect("threads", 2) as lab:
        names = [{lab.start(index, where).result(10) for _ in range(3)} for index in (0, 1)]
        assert not names[0] & names[1]
        with pytest.raises(ZeroDivisionError, match="no 0"):
            lab.start(1, boom).result(10)
        with pytest.raises(ZeroDivisionError, match="no 3"):
            lab.map(boom, [3])
        task = lab.start(0, time.sleep, 1.0)
        with pytest.raises(ClusterError, match=r"worker 0 did not finish within 0\.1 s"):
            task.result(0.1)
        assert not task.done
        with pytest.raises(ClusterError, match=r"2 of 2 tasks were not done within 0\.1 s; they were cancelled"):
            lab.map(time.sleep, [1.0, 1.0], timeout=0.1)
        with pytest.raises(ClusterError, match=r"there is no worker 2; this lab has workers 0 to 1"):
            lab.start(2, where)
        with pytest.raises(ClusterError, match="there is no worker -1"):
            lab.start(-1, where)


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


REQUESTS = {
    "unknown kind 'thread'. Known: threads, dask, ipyparallel, slurm. Did you mean 'threads'?": {"kind": "thread"},
    "unknown kind 'mpi'. Known: threads, dask, ipyparallel, slurm.": {"kind": "mpi"},
    "n_workers=0: a lab needs at least one worker.": {"n_workers": 0},
    "n_workers=1.5: a lab needs": {"n_workers": 1.5},
    "threads_per_worker=0: at least one thread": {"threads_per_worker": 0},
    "jitter=-1 must not be negative": {"jitter": -1},
    "slowdown has 3 entries for 2 workers. Give one factor for each worker.": {"slowdown": [1, 2, 3]},
    "slowdown=[1, 0.5]: a factor below 1 would be a speed-up": {"slowdown": [1, 0.5]},
    "jitter=nan must be finite": {"jitter": float("nan")},
    "drift=-5 must not be negative": {"slowdown": [1, 4], "drift": -5},
    "drift=9 moves each worker to the slowdown of the one at the other end of the list, and [1.0] is the same": {"drift": 9},
    "and [4, 4] is the same from both ends. Give uneven ones": {"slowdown": [4, 4], "drift": 9},
    "stalls=(5, 0): give (every, seconds), such as (20, 1)": {"stalls": (5, 0)},
    "slowdown=[1, nan]": {"slowdown": [1, float("nan")]},
    "give address or client, not both.": {"kind": "dask", "address": "tcp://x:1", "client": object()},
    "unknown engines 'mip'. Known: local, mpi. Did you mean 'mpi'?": {"kind": "ipyparallel", "engines": "mip"},
    "profile, engines and an ipyparallel Client go with kind='ipyparallel', not with 'dask'.": {"kind": "dask", "profile": "x"},
    "kind='ipyparallel' finds a running cluster by profile": {"kind": "ipyparallel", "address": "tcp://x:1"},
    "security goes with address": {"kind": "dask", "security": object()},
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
    with pytest.raises(ClusterError, match=r"2 of 5 workers arrived in 0\.3 s\. Try connect\(n_workers=1, kind='threads'\)"):
        labkit.connect("dask", 5, client=cluster, timeout=0.3)
    assert cluster.scheduler.workers and not connected()


def test_scratch_folders_go_with_the_lab(monkeypatch, tmp_path):
    monkeypatch.setattr(connecting.tempfile, "tempdir", str(tmp_path))
    with labkit.connect("threads", 1):
        assert [path.name.startswith("labkit-") for path in tmp_path.iterdir()] == [True]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(connecting, "start_local", boom_client)
    with pytest.raises(ZeroDivisionError):
        labkit.connect("threads", 1)
    assert not list(tmp_path.iterdir())


def boom_client(*args, **options):
    raise ZeroDivisionError


@pytest.fixture
def cluster():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as made:
        yield made


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
        assert client.status == "running" and client.submit(abs, -3).result(10) == 3
        with pytest.raises(ClusterError, match=r"2 of 3 workers arrived in 0\.3 s"):
            labkit.connect(client=client, slowdown=[1, 1, 1], timeout=0.3)
        with pytest.raises(ClusterError, match="slowdown has 1 entries for 2 workers"):
            labkit.connect(client=client, slowdown=[1])


def test_a_scheduler_by_its_address(cluster):
    with labkit.connect("dask", 1, address=cluster.scheduler_address) as lab:
        assert len(lab) == 1 and lab.map(abs, [-2, -3]) == [2, 3]
    with labkit.connect(address=cluster.scheduler_address) as lab:
        assert lab.lost() == []
    assert cluster.status.name == "running"


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

    def lease(self, ids, holder):
        return {id: self.held[id] for id in ids if id in self.held}

    def release(self, holder):
        pass

    def trouble(self):
        return ""

    def close(self):
        pass


def about(pid, gpus=0, visible="", host="here"):
    return host, pid, gpus, visible, 0


def a_lab(backend, slowdown=None, limit=None, drift=0.0):
    lab = Lab("fake", backend, limit=limit, drift=drift)
    lab.admit(len(backend.workers), slowdown, timeout=1)
    return lab


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


def test_newcomers_that_are_frozen_or_die_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(lab_module, "DESCRIBE_S", 0.1)
    backend = FakeWorkers(a=("0", about(1)))
    lab = a_lab(backend)
    backend.workers |= {"frozen": ("1", None), "dies": ("2", OSError("gone")), "well": ("3", about(4))}
    begun = time.monotonic()
    assert lab.refresh() == [1] and lab.workers[1].pid == 4 and time.monotonic() - begun < 1
    begun = time.monotonic()
    for _ in range(5):
        assert lab.refresh() == []
    assert time.monotonic() - begun < 0.3  # who did not answer is not waited for again
    assert backend.asked.count("frozen") == 1 and backend.asked.count("dies") > 1
    backend.workers["frozen"] = ("1", about(8))
    lab._asked["frozen"].set_result(about(8))  # it thaws
    del backend.workers["dies"]
    assert lab.refresh() == [2] and lab.workers[2].pid == 8


def test_on_a_cluster_of_others_a_lab_stays_as_large_as_it_was_asked_for():
    backend = FakeWorkers(a=("0", about(1)), b=("1", about(2)), spare=("2", about(3)))
    lab = Lab("fake", backend, limit=2)
    lab.admit(2, None, timeout=1)
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


SCRIPT = """
import os, signal, sys, time
import labkit

if __name__ == "__main__":
    lab = labkit.connect("dask", 2)
    try:
        print(*(worker.pid for worker in lab.workers), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", lab.map(abs, [-1, -2], timeout=20), lab.lost(), flush=True)
    # no close: the end of the process has to do
"""


@pytest.mark.cluster
def test_an_interrupt_of_the_whole_group_is_for_the_kernel_alone(tmp_path):
    """As Jupyter sends it; and a process that ends without close() leaves nothing, and says nothing."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (out, err, process.returncode) == ("interrupted [1, 2] []\n", "", 0)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def work(path, seconds):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)


@pytest.mark.cluster
@pytest.mark.parametrize("place", ["dask", "ipyparallel", "mpi"])
def test_real_processes(place, capfd, monkeypatch, tmp_path):
    """Killed, back, joined by another, frozen, closed: no wait without a limit, nothing run twice, nothing left, not a word."""
    skip_without(place)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(connecting.tempfile, "tempdir", str(scratch))
    request = {"n_workers": 2, "slowdown": [1, 4], **PLACES[place]}
    lab = labkit.connect(**request)
    pids = [worker.pid for worker in lab.workers]
    assert len({*pids, os.getpid()}) == 3 and labkit.connect(**request) is lab
    lab.lease([0, 1], "run")

    task, begun = lab.start(1, work, tmp_path / "begun", 60), time.monotonic()
    until((tmp_path / "begun").exists)
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: lab.lost() == [1])
    with pytest.raises(ClusterError, match=r"worker 1 was lost while its task ran"):
        task.result(20)
    assert task.done and task.lost and task.error() is None
    with pytest.raises(ClusterError, match=r"worker 1 was lost\. connect\(\) again"):
        lab.start(1, os.getpid)
    assert lab.map(os.getenv, ["HOME"], timeout=20) == [os.getenv("HOME")]
    assert time.monotonic() - begun < 30

    if place == "dask":  # its nanny starts a new process under the old name
        until(lambda: lab.refresh("run") == [1], 30)
    else:
        assert lab.add() == [1] and lab.refresh("run") == [1]
    assert lab.lost() == lab.refresh("run") == lab.free() == [] and lab.workers[1].slowdown == 4
    assert lab.start(1, os.getpid).result(20) == lab.workers[1].pid != pids[1] and task.lost
    assert lab.add() == [2] and lab.refresh("run") == lab.free() == [2] and lab.workers[2].slowdown == 1
    assert lab.start(2, os.getpid).result(20) == lab.workers[2].pid
    assert (tmp_path / "begun").read_text() == f"{pids[1]}\n"  # and never again

    os.kill(lab.workers[0].pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert lab.lost() == [] and lab.refresh() == [2]  # who asks under no name hears of those that are free
    with pytest.raises(ClusterError, match=r"worker 0 did not finish within 0\.2 s"):
        lab.start(0, os.getpid).result(0.2)
    assert time.monotonic() - begun < 5
    pids += [worker.pid for worker in lab.workers]
    lab.close()
    lab.close()
    assert time.monotonic() - begun < 25
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert not list(scratch.iterdir()) and capfd.readouterr() == ("", "")


NOTEBOOK = """
import os, sys, time
from IPython.core.interactiveshell import InteractiveShell
import labkit

shell = InteractiveShell.instance()
lab = labkit.connect("ipyparallel", 2)
task = lab.start(0, time.sleep, 60)
shell.run_cell_magic("px", "", "import os; print('engine', os.getpid())")
assert not task.done
try:
    print(*(worker.pid for worker in lab.workers), *(process.pid for process in lab._backend._local.processes), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", lab.map(abs, [-1], workers=[1], timeout=20), lab.lost(), flush=True)
    time.sleep(60)
"""


@pytest.mark.cluster
def test_engines_beside_a_notebook_that_is_interrupted_and_killed(tmp_path):
    """%%px works while a task runs; an interrupt is for the kernel alone; engines and controller do not outlive it."""
    (tmp_path / "script.py").write_text(NOTEBOOK)
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = []
        while not lines or not lines[-1][:1].isdigit():
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        pids = [int(pid) for pid in lines[-1].split()]
        assert all(any(f"engine {pid}" in line for line in lines) for pid in pids[:2]), lines
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "interrupted [1] []\n"
    finally:
        process.kill()
        process.communicate(timeout=20)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert [file.name for file in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.cluster
def test_a_running_ipyparallel_cluster_and_its_client_stay_as_they_were(tmp_path):
    from labkit.cluster.ipyparallel_backend import start_engines

    engines = start_engines(2, 1, mpi=False, timeout=60, scratch=str(tmp_path / "profile"))
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


def certified(security, folder):
    """What Security.temporary() makes, without the package that it needs."""
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate, and there is none")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=lab"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    roles = {
        f"tls_{role}_{what}": file
        for role in ("client", "scheduler", "worker")
        for what, file in (("cert", certificate), ("key", key))
    }
    return security(tls_ca_file=certificate, require_encryption=True, **roles)


@pytest.mark.cluster
def test_a_dask_cluster_elsewhere(tmp_path):
    """TLS, a scheduler file, resources, leases that two notebooks respect, other people's tasks beside ours."""
    from distributed import Client, LocalCluster
    from distributed.security import Security

    security = certified(Security, tmp_path)
    with (
        quiet(),
        LocalCluster(
            n_workers=1, threads_per_worker=1, security=security, dashboard_address=None, resources={"GPU": 1}, protocol="tls://"
        ) as cluster,
    ):
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        with pytest.raises(ClusterError, match=r"speaks TLS\. Give connect\(\) its certificates"):
            labkit.connect(address=address, timeout=1)
        with pytest.raises(ClusterError, match="0 of 1 workers arrived"):
            labkit.connect(address=address, security=security, resources={"GPU": 2}, timeout=0.5)
        file = tmp_path / "scheduler.json"
        with pytest.raises(ClusterError, match=r"no scheduler file appeared at .* in 0\.1 s"):
            labkit.connect(address=str(file), security=security, timeout=0.1)
        file.write_text(json.dumps({"address": address}))
        with Client(address, security=security, set_as_default=False) as theirs:
            other = theirs.submit(time.sleep, 0.5)
            with labkit.connect(address=str(file), security=security, resources={"GPU": 1}) as lab:
                assert len(lab) == 1 and lab.start(0, abs, -3).result(20) == 3 and other.result(20) is None
                with pytest.raises(ClusterError, match="did not start its cluster"):
                    lab.add()
                lab.lease([0], "mine")
                stranger = DaskWorkers(theirs)  # as in another notebook
                held = stranger.lease(stranger.alive(), "theirs")
                assert list(held.values()) == [f"mine (another notebook, process {os.getpid()} on {socket.gethostname()})"]
                lab.release("mine")
                assert stranger.lease(stranger.alive(), "theirs") == {}
                with pytest.raises(ClusterError, match=r"worker 0 by 'theirs \(another notebook"):
                    lab.lease([0], "mine")
                assert lab.free() == [0]  # nobody here holds it
                stranger.release("theirs")
                lab.lease([0], "mine")


@pytest.mark.cluster
def test_a_worker_that_comes_back_at_its_old_address_is_another_one(tmp_path):
    """Dask gives it the task again; a long task with effects must not run twice."""
    from distributed import LocalCluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        quiet(),
        LocalCluster(n_workers=1, threads_per_worker=1, worker_port=port, dashboard_address=None) as cluster,
        labkit.connect(address=cluster.scheduler_address) as lab,
    ):
        task, pid = lab.start(0, work, tmp_path / "begun", 60), lab.workers[0].pid
        until((tmp_path / "begun").exists)
        os.kill(pid, signal.SIGKILL)
        until(lambda: lab.refresh() == [0])
        assert lab.workers[0].pid != pid and [*cluster.scheduler_info["workers"]] == [f"tcp://127.0.0.1:{port}"]
        assert lab.start(0, abs, -1).result(20) == 1  # in turn: by now Dask has tried
        assert task.lost and task.done and task.error() is None and (tmp_path / "begun").read_text() == f"{pid}\n"
        with pytest.raises(ClusterError, match="was lost while its task ran"):
            task.result(5)


@pytest.mark.cluster
def test_local_workers_with_resources():
    with labkit.connect("threads", 2, resources={"GPU": 1}) as lab:
        assert len(lab) == 2 and lab.map(abs, [-1, -2]) == [1, 2]


@pytest.mark.slow
@pytest.mark.cluster
def test_dask_under_mpi_is_found_by_its_scheduler_file(tmp_path):
    skip_without("mpi")
    pytest.importorskip("dask_mpi", reason="needs dask-mpi, which is not installed")
    file = tmp_path / "scheduler.json"
    service = ["-c", "from dask_mpi.cli import main; main()", "--scheduler-file", str(file), "--scheduler-port", "0"]
    process = subprocess.Popen(
        [*mpiexec(3)[:3], sys.executable, *service, "--interface", "lo", "--worker-class", "distributed.Worker", "--no-dashboard"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        start_new_session=True,
    )
    try:
        with labkit.connect(address=str(file), n_workers=2, slowdown=[1, 2]) as lab:
            assert lab.map(os.getenv, ["PMI_SIZE"] * 2, timeout=20) == ["3", "3"]
            lab.lease([0, 1], "run")
            os.kill(lab.workers[1].pid, signal.SIGSTOP)
            assert lab.lost() == lab.refresh() == []
            os.kill(lab.workers[1].pid, signal.SIGCONT)
            lab.client.shutdown()  # ends all ranks
            until(lambda: lab.lost() == [0, 1], 30)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


HOLDER = """
import sys, time
import labkit

if __name__ == "__main__":
    lab = labkit.connect(address=sys.argv[1])
    lab.lease([0], "theirs")
    print("leased", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_the_leases_of_a_notebook_that_died_end_by_themselves(tmp_path):
    from distributed import LocalCluster

    (tmp_path / "script.py").write_text(HOLDER)
    with quiet(), LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        command = [sys.executable, str(tmp_path / "script.py"), cluster.scheduler_address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "leased\n"
            with labkit.connect(address=cluster.scheduler_address) as lab:
                with pytest.raises(ClusterError, match=r"worker 0 by 'theirs \(another notebook, process \d+ on "):
                    lab.lease([0, 1], "ours")
                lab.lease([1], "ours")
                process.kill()

                def ours():
                    with contextlib.suppress(ClusterError):
                        lab.lease([0, 1], "ours")
                    return lab.free() == []

                until(ours, 60)
