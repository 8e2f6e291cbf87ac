"""The lab: connect, four things to do, and an end that leaves nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import labkit
from labkit import lab as lab_module
from labkit.errors import ClusterError


@pytest.fixture(autouse=True)
def _closed():
    yield
    if lab_module._current:
        lab_module._current[1].close()


def until(condition, limit=20.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.02)


def where():
    return threading.current_thread().name


def boom(x=0):
    raise ZeroDivisionError(f"no {x}")


def test_four_things(capfd):
    with labkit.connect("threads", 3, slowdown=[1, 2, 4]) as lab:
        assert [w.index for w in lab.workers] == [0, 1, 2] and len(lab) == 3
        assert [w.slowdown for w in lab.workers] == [1, 2, 4] and lab.emulated
        assert {w.pid for w in lab.workers} == {os.getpid()} and lab.one_process and lab.one_host
        tasks = [lab.start(index, time.sleep, 0.3) for index in (0, 1, 2)]
        begun = time.monotonic()
        assert [task.result(10) for task in tasks] == [None] * 3
        assert time.monotonic() - begun < 0.8, "the tasks did not run side by side"
        assert lab.map(abs, range(-7, 0)) == [7, 6, 5, 4, 3, 2, 1] and lab.map(abs, []) == []
        assert lab.lost() == []
        assert list(lab.table().columns) == ["name", "host", "device", "threads", "pid", "slowdown"] and len(lab.table()) == 3
        text = repr(lab)
        assert "3 workers (threads)" in text and "worker 2" in text and "emulated 4x slower" in text
        assert "127.0.0.1" in lab.dashboard or lab.dashboard == ""
    assert repr(lab) == "<Lab threads, closed>" and lab.lost() == [0, 1, 2] and lab.dashboard == ""
    assert capfd.readouterr() == ("", "")


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
    third.close()
    for use in (lambda: third.start(0, where), lambda: third.map(abs, [1])):
        with pytest.raises(ClusterError, match=r"this lab is closed\. Run the cell with connect\(\) again"):
            use()


REQUESTS = {
    "unknown kind 'thread'. Known: threads, dask. Did you mean 'threads'?": {"kind": "thread"},
    "unknown kind 'mpi'. Known: threads, dask.": {"kind": "mpi"},
    "n_workers=0: a lab needs at least one worker.": {"n_workers": 0},
    "n_workers=1.5: a lab needs": {"n_workers": 1.5},
    "threads_per_worker=0: at least one thread": {"threads_per_worker": 0},
    "jitter=-1 must not be negative": {"jitter": -1},
    "slowdown has 3 entries for 2 workers. Give one factor for each worker.": {"slowdown": [1, 2, 3]},
    "slowdown=[1, 0.5]: a factor below 1 would be a speed-up": {"slowdown": [1, 0.5]},
    "slowdown=[1, nan]": {"slowdown": [1, float("nan")]},
    "give address or client, not both.": {"address": "tcp://x:1", "client": object()},
}


@pytest.mark.parametrize("message", REQUESTS)
def test_bad_requests_start_nothing(message):
    request = {"kind": "threads", "n_workers": None if "client" in REQUESTS[message] else 2, **REQUESTS[message]}
    with pytest.raises(ClusterError) as caught:
        labkit.connect(**request)
    assert message in str(caught.value) and lab_module._current is None


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
    assert cluster.scheduler.workers and lab_module._current is None


def test_scratch_folders_go_with_the_lab(monkeypatch, tmp_path):
    monkeypatch.setattr(lab_module.tempfile, "tempdir", str(tmp_path))
    with labkit.connect("threads", 1):
        assert [path.name.startswith("labkit-") for path in tmp_path.iterdir()] == [True]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(lab_module, "start_client", boom_client)
    with pytest.raises(ZeroDivisionError):
        labkit.connect("threads", 1)
    assert not list(tmp_path.iterdir())


def boom_client(*args):
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


def test_libraries_stay_out_until_they_are_needed():
    heavy = "torch", "dask", "distributed", "bokeh", "pandas", "numpy", "matplotlib"
    code = f"import labkit, sys; dir(labkit); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


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


@pytest.mark.cluster
def test_real_processes(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(lab_module.tempfile, "tempdir", str(tmp_path))
    lab = labkit.connect("dask", 2)
    pids = [worker.pid for worker in lab.workers]
    assert len({*pids, os.getpid()}) == 3 and not lab.one_process and lab.one_host
    assert [lab.start(index, os.getpid).result(20) for index in (1, 0, 1)] == [pids[1], pids[0], pids[1]]
    assert lab.map(os.getenv, ["OMP_NUM_THREADS"]) == ["1"]
    assert labkit.connect("dask", 2) is lab

    task = lab.start(1, time.sleep, 60)
    until(lambda: lab.client.processing()[lab._addresses[1]])
    os.kill(pids[1], signal.SIGKILL)  # Dask's nanny starts another process, but that is another worker
    until(lambda: lab.lost() == [1])
    with pytest.raises(ClusterError, match=r"worker 1 was lost while its task ran"):
        task.result(20)
    assert task.done
    with pytest.raises(ClusterError, match=r"worker 1 was lost\. connect\(\) again"):
        lab.start(1, os.getpid)
    assert lab.map(os.getenv, ["HOME"], timeout=20) == [os.getenv("HOME")]

    begun = time.monotonic()
    again = labkit.connect("dask", 2)  # the same request, but that lab is not whole
    assert again is not lab and lab.closed and again.lost() == []
    again.close()
    assert time.monotonic() - begun < 60
    assert not any(psutil.pid_exists(pid) for pid in pids) and not list(Path(tmp_path).iterdir())
    assert capfd.readouterr() == ("", "")
