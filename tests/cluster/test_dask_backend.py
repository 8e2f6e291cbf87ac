"""Dask as a back end: what it alone promises (`test_backend` has what all do)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import dask
import numpy as np
import psutil
import pytest

import labkit
from labkit.cluster.backend import quiet
from labkit.cluster.dask_backend import DaskWorkers
from labkit.cluster.ipyparallel_local import mpiexec
from labkit.errors import ClusterError
from tests.cluster.test_backend import has_begun, skip_without, until
from tests.cluster.work import work

pytestmark = pytest.mark.usefixtures("closed")


def test_who_is_there_can_be_asked_while_a_worker_is_removed(monkeypatch):
    """The scheduler does so in a thread of its own: at the worst when the address has been read, and the worker not yet."""
    with labkit.connect("threads", 3) as lab:
        scheduler = lab.client.cluster.scheduler

        class Losing(type(scheduler.workers)):
            def __getitem__(self, address):
                if threading.current_thread() is threading.main_thread() and len(self) == 3:
                    del self[address]
                return super().__getitem__(address)

        monkeypatch.setattr(scheduler, "workers", Losing(scheduler.workers))
        assert lab.lost() == []
        monkeypatch.undo()


SCRIPT = """
import os, signal, sys, time
import labkit

if __name__ == "__main__":
    lab = labkit.connect("dask", 2)
    try:
        print(*(worker.pid for worker in lab.workers), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", lab.map(abs, [-1, -2], timeout=60), lab.lost(), flush=True)
    # no close: the end of the process has to do
"""


@pytest.mark.slow
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
            n_workers=1,
            threads_per_worker=1,
            security=security,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            resources={"GPU": 1},
            protocol="tls://",
        ) as cluster,
    ):
        address = cluster.scheduler_address
        assert address.startswith("tls://")
        with pytest.raises(ClusterError, match=r"uses TLS\. Give connect\(\) its certificates"):
            labkit.connect(address=address, timeout=1)
        with pytest.raises(ClusterError, match="0 of 1 workers arrived"):
            labkit.connect(address=address, security=security, resources={"GPU": 2}, timeout=3)
        file = tmp_path / "scheduler.json"
        with pytest.raises(ClusterError, match=r"no scheduler file appeared at .* in 0\.1 s"):
            labkit.connect(address=str(file), security=security, timeout=0.1)
        file.write_text(json.dumps({"address": address}))
        with Client(address, security=security, set_as_default=False) as theirs:
            other = theirs.submit(time.sleep, 0.5)
            with labkit.connect(address=str(file), security=security, resources={"GPU": 1}) as lab:
                assert len(lab) == 1 and lab.start(0, abs, -3).result(60) == 3 and other.result(60) is None
                with pytest.raises(ClusterError, match="did not start its cluster"):
                    lab.add()
                lab.lease([0], "1a", "mine")
                stranger = DaskWorkers(theirs)  # as in another notebook
                held = stranger.lease(stranger.alive(), "2b", "theirs")
                assert list(map(repr, held.values())) == [
                    f"'mine' (another notebook, process {os.getpid()} on {socket.gethostname()})"
                ]
                lab.release("1a")
                assert stranger.lease(stranger.alive(), "2b", "theirs") == {}
                with pytest.raises(ClusterError, match=r"worker 0 by 'theirs' \(another notebook"):
                    lab.lease([0], "1a", "mine")
                assert lab.free() == [0]  # nobody here holds it
                stranger.release("2b")
                lab.lease([0], "1a", "mine")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_worker_that_comes_back_at_its_old_address_is_another_one(tmp_path):
    """Dask gives it the task again; a long task with effects must not run twice."""
    from distributed import LocalCluster

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        quiet(),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            worker_port=port,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
        ) as cluster,
        labkit.connect(address=cluster.scheduler_address) as lab,
    ):
        task, pid = lab.start(0, work, tmp_path / "begun", 60), lab.workers[0].pid
        until(lambda: has_begun(tmp_path / "begun"))
        os.kill(pid, signal.SIGKILL)
        until(lambda: lab.refresh() == [0])
        assert lab.workers[0].pid != pid and [*cluster.scheduler_info["workers"]] == [f"tcp://127.0.0.1:{port}"]
        assert lab.start(0, abs, -1).result(60) == 1  # in turn: by now Dask has tried
        assert task.lost and task.done and task.error() is None and (tmp_path / "begun").read_text() == f"{pid}\n"
        with pytest.raises(ClusterError, match="was lost while its task ran"):
            task.result(60)


@pytest.mark.cluster
def test_the_client_says_why_what_it_is_given_waits_beside_a_run(capsys):
    lab = labkit.connect("threads", 2)
    lab.client.gather(lab.client.map(abs, [-1]))
    assert capsys.readouterr().out == ""
    lab.lease([0, 1], "id", "first-run")
    assert lab.client.submit(abs, -2).result(60) == 2 and lab.map(abs, [-3]) == [3]
    said = capsys.readouterr().out
    assert "'first-run' holds workers" in said and "waits until that has ended" in said
    lab.client.gather(lab.client.map(abs, [-4]))
    assert capsys.readouterr().out == ""  # once for a run
    lab.release("id")
    assert lab.client.submit(abs, -5).result(60) == 5 and capsys.readouterr().out == ""


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
            assert lab.map(os.getenv, ["PMI_SIZE"] * 2, timeout=60) == ["3", "3"]
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
    lab.lease([0], "2b", "theirs")
    print("leased", flush=True)
    time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_the_leases_of_a_notebook_that_died_end_by_themselves(tmp_path):
    from distributed import LocalCluster

    (tmp_path / "script.py").write_text(HOLDER)
    with (
        quiet(),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"}
        ) as cluster,
    ):
        command = [sys.executable, str(tmp_path / "script.py"), cluster.scheduler_address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "leased\n"
            with labkit.connect(address=cluster.scheduler_address) as lab:
                with pytest.raises(ClusterError, match=r"worker 0 by 'theirs' \(another notebook, process \d+ on "):
                    lab.lease([0, 1], "ours")
                lab.lease([1], "ours")
                process.kill()

                def ours():
                    with contextlib.suppress(ClusterError):
                        lab.lease([0, 1], "ours")
                    return lab.free() == []

                until(ours)


def test_a_script_without_a_guard_is_refused_before_a_process_starts(tmp_path):
    start = "from labkit.cluster import dask_backend as D\nfrom labkit.cluster.backend import Request\nREQUEST\nprint('went on')\n"
    request = 'D.check(Request("dask", 2))'
    (tmp_path / "beside.py").write_text(start.replace("REQUEST", request))
    scripts = {
        "plain": start.replace("REQUEST", request),
        "function": start.replace("REQUEST", f"def main():\n    {request}\nmain()"),
        "import": "import beside\n",
        "other": start.replace("REQUEST", f"import sys\nif len(sys.argv) < 2:\n    {request}"),
        "guard": start.replace("REQUEST", f"def main():\n    {request}\nif __name__ == '__main__':\n    main()"),
        "left": start.replace("REQUEST", f"if __name__ != '__main__':\n    raise SystemExit\n{request}"),
        "threads": start.replace("REQUEST", 'D.check(Request("threads", 2))'),
        "reset": start.replace("REQUEST", f"if __name__ == '__main__':\n    del __spec__  # as %reset does\n    {request}"),
    }
    children = {}
    for name, script in scripts.items():
        (tmp_path / f"{name}_.py").write_text(script)
        children[name] = subprocess.Popen(
            [sys.executable, tmp_path / f"{name}_.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
    printed = {name: child.communicate(timeout=110)[0].splitlines() for name, child in children.items()}
    for name, (*_, last) in printed.items():
        if name in ("guard", "left", "threads", "reset"):
            assert last == "went on"
        else:
            assert re.fullmatch(rf"labkit.errors.ClusterError: line \d starts .* imports {name}_.py .*__main__.*", last), last


def begun_with():
    return "torch" in sys.modules, float(np.random.rand()), os.environ.get("LABKIT_TEST")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_a_worker_that_is_started_again_has_its_imports_the_environment_and_random_numbers_of_its_own(monkeypatch):
    with labkit.connect("dask", 2) as lab:
        first = [lab.start(index, begun_with).result(60) for index in (0, 1)]
        before = lab.workers[1].pid
        os.kill(before, signal.SIGKILL)
        until(lambda: (lab.refresh(), lab.workers[1].pid != before)[1])
        again = lab.start(1, begun_with).result(60)
    monkeypatch.setenv("LABKIT_TEST", "set between two labs")
    with labkit.connect("dask", 1) as lab:
        later = lab.start(0, begun_with).result(60)
    answers = [*first, again, later]
    assert all(loaded for loaded, *_ in answers) and len({number for _, number, _ in answers}) == 4
    assert [text for *_, text in answers] == [None, None, None, "set between two labs"]


def test_labs_that_are_closed_in_any_order_leave_the_settings_of_dask_as_they_were():
    before = dask.config.get("distributed.deploy.lost-worker-timeout")
    first, second = labkit.connect("threads", 1), labkit.connect("threads", 1, name="second")
    during = dask.config.get("distributed.deploy.lost-worker-timeout")
    first.close()
    assert dask.config.get("distributed.deploy.lost-worker-timeout") == during != before, "the second lab needs them"
    second.close()
    assert dask.config.get("distributed.deploy.lost-worker-timeout") == before


def surroundings(_: int) -> tuple:
    import torch

    return os.environ.get("LABKIT_TEST_GONE"), os.getcwd(), torch.get_num_threads()


@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_forked_workers_have_what_their_lab_has_now_and_nothing_of_one_before(monkeypatch, tmp_path):
    """The process from which they are forked may have been started for another lab."""
    monkeypatch.setenv("LABKIT_TEST_GONE", "1")
    first = labkit.connect("dask", 1)
    assert first.map(surroundings, [0]) == [("1", os.getcwd(), 1)]
    first.close()
    monkeypatch.delenv("LABKIT_TEST_GONE")
    monkeypatch.chdir(tmp_path)
    with labkit.connect("dask", 1, threads_per_worker=2) as second:
        assert second.map(surroundings, [0]) == [(None, str(tmp_path), 2)]
