"""What goes wrong while a run is followed: errors and losses of workers, a server that dies or cannot start, real processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from torch import nn

import labkit
from labkit import locks
from labkit.errors import LabError, RunError, WireError, WorkerError
from labkit.training import supervisor
from labkit.training import train as training
from labkit.training.wire import transport
from tests.helpers import SEED, Slow, cut_off, ended, net_with_statistics, poisoned, problem, until

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.slow
def test_a_process_that_ends_without_closing_leaves_nothing(tmp_path, cache):
    """Exit while a run goes: no traceback, no process, and the record says how it ended."""
    script = f"""
import labkit, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import tests.helpers as t
lab = labkit.connect("threads", 2)
run = labkit.train(t.problem(kind=t.Slow), lab, passes=1000, runs={str(tmp_path)!r}, name="left", update="sgwu")
t.until(lambda: run.status()["version"] >= 1)
print(run._follower.server.pid)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (0, "")
    until(lambda: not psutil.pid_exists(int(done.stdout)))
    assert labkit.load_run(tmp_path / "left").state in ("stopped", "failed")


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
@pytest.mark.parametrize("worker", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_step_that_raises_ends_the_run_with_the_first_error_and_its_traceback(update, worker, train):
    a_problem = poisoned(worker)
    run = train(a_problem, update=update, passes=50)
    with pytest.raises(WorkerError) as caught:
        run.wait(100)
    text = str(caught.value)
    assert caught.value.worker == worker
    assert f"worker {worker} (cpu) failed at version 0: RuntimeError: this sample is poisoned" in text
    assert "Traceback" in text and "in step" in text and "helpers.py" in text
    assert run.state == "failed" and f"worker {worker}" in run.status()["reason"]
    errors = run.events.query("kind == 'error'")
    assert len(errors) == 1 and "poisoned" in errors.message.iloc[0]
    assert labkit.load_run(run.path).state == "failed"
    ended(train(problem(), update=update, passes=1, name="after"))  # the lab is as good as before


def test_a_worker_in_the_middle_of_a_long_pass_is_interrupted_when_the_run_fails(train, lab):
    """A pass of 10,000 steps of 0.01 s each: nobody would wait for it."""
    run = train(poisoned(1), update="agwu", passes=2000, local_steps=10_000)
    with pytest.raises(WorkerError, match="poisoned"):
        run.wait(100)
    assert not (run.events.kind == "push").any()
    until(lambda: len(lab.free()) == 2)


def test_weights_that_become_nan_fail_the_run(train):
    for update in ("sgwu", "agwu", "allreduce"):
        run = train(problem(lr=1e9), update=update, passes=3, name=update)
        with pytest.raises(LabError, match=r"worker [01] at version \d+: .*NaN or infinity\. Lower the learning rate") as caught:
            run.wait(100)
        assert "failed" in str(caught.value) and run.state == "failed"
        assert np.isfinite(run.flat()).all()  # what came before is kept, and is good


def test_a_model_that_fails_on_one_worker_before_the_start_frees_the_others(train, monkeypatch):
    from labkit.training.worker.worker import _Worker

    probe = _Worker._probe
    monkeypatch.setattr(_Worker, "_probe", lambda self: 1 / 0 if self.spec.index == 1 else probe(self))
    for update in ("sgwu", "allreduce"):
        run = train(problem(), update=update, name=update)
        with pytest.raises(WorkerError, match=r"worker 1 \(cpu\) failed at version 0: ZeroDivisionError"):
            run.wait(100)


@pytest.mark.parametrize("update", ["sgwu", "agwu"])
def test_a_worker_that_loses_the_server_does_not_end_the_run(update, train, monkeypatch):
    """As one that was frozen for too long and comes back: the others have gone on without it."""
    cut_off(monkeypatch)
    a_problem = problem(kind=Slow)  # so that both have their turns
    run = ended(train(a_problem, update=update, passes=6))
    events = run.events
    merges = events[events.kind == "merge"]
    assert merges.samples.sum() == 6 * len(a_problem.train_indices())
    assert events.query("kind == 'leave' and worker == 1").message.iloc[0] != ""
    assert run.allocations().query("worker == 0").total.max() == len(a_problem.train_indices())  # nothing is lost


def test_a_server_that_dies_fails_the_run(train):
    run = train(problem(kind=Slow), passes=1000)
    until(lambda: run.status()["version"] >= 1)
    run._follower.server.kill()
    with pytest.raises(RunError, match=r"the server of run .* ended with code -9"):
        run.wait(100)
    assert run.state == "failed" and labkit.load_run(run.path).state == "failed"
    ended(train(problem(), passes=1, name="after"))


def test_a_connection_to_the_server_that_breaks_is_made_again(train, monkeypatch):
    """The kernel's own connection: a pause of the kernel must not end a healthy run."""
    asked, watch = [], supervisor.watch

    @contextlib.contextmanager
    def flaky(*server, **options):
        with watch(*server, **options) as ask:

            def ask_flaky(**request):
                asked.append(1)
                if len(asked) == 2:
                    raise WireError("as after a long pause")
                return ask(**request)

            yield ask_flaky

    monkeypatch.setattr(supervisor, "watch", flaky)
    monkeypatch.setattr(supervisor, "RETRY_S", 0.1)
    ended(train(problem(kind=Slow), passes=15))
    assert len(asked) > 2


def test_a_worker_whose_first_connection_is_broken_off_comes_again(train, monkeypatch):
    """As strangers may do it, who take all places at the door; its task goes on."""
    connect, tried = transport.connect, []

    def pushed_out(*server, **options):
        if options.get("check") and len(tried) < 3:
            tried.append(1)
            raise WireError("the other side closed the connection.")
        return connect(*server, **options)

    monkeypatch.setattr(transport, "connect", pushed_out)
    monkeypatch.setattr(supervisor, "ATTEMPTS", 0)  # it is not started anew for that
    run = ended(train(problem(), passes=1))
    assert len(tried) == 3 and "refuse" not in set(run.events.kind) and (run.events.kind == "join").sum() == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("update", ["sgwu", "agwu"])
def test_a_full_disk_fails_the_run_and_says_so(update, train, monkeypatch):
    begin = training.begin

    def on_a_full_disk(path, *rest):
        (path / "events.jsonl").symlink_to("/dev/full")
        return begin(path, *rest)

    monkeypatch.setattr(training, "begin", on_a_full_disk)
    run = train(problem(), update=update, passes=2)
    with pytest.raises(LabError, match=r"cannot be written: .*No space left on device"):
        run.wait(100)
    assert run.state == "failed"
    monkeypatch.undo()


def test_a_server_that_cannot_start_leaves_the_lab_free(train, monkeypatch, lab, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(supervisor.sys, "executable", str(broken))
    with pytest.raises(RunError, match="the server did not start"):
        train(problem())
    monkeypatch.undo()
    assert lab.runs == [] and lab.free() == [0, 1]
    ended(train(problem(), passes=1))


class OfTheProcess(nn.Module):
    """Its inputs are in an order that each process draws for itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.order = nn.Linear(36, 3), np.random.default_rng(os.getpid()).permutation(36).tolist()

    def forward(self, x):
        return self.layer(x.flatten(1)[:, self.order])


@pytest.mark.slow
@pytest.mark.cluster
def test_real_processes(tmp_path):
    """Both ways of exchange end well; a poisoned step is reported, and a network that is another one in each process."""
    with labkit.connect("dask", 2) as lab:
        options = {"lab": lab, "runs": tmp_path, "seed": SEED}
        n = len(problem().train_indices())
        for update, partition in (("agwu", "idpa"), ("allreduce", "udpa")):
            run = ended(
                labkit.train(problem(net_with_statistics), update=update, partition=partition, passes=2, **options), timeout=90
            )
            assert run.events.query("kind == 'merge'").samples.sum() >= 2 * n - 1
            assert len({worker["pid"] for worker in run.config["workers"]} | {os.getpid()}) == 3
        run = labkit.train(poisoned(1), update="allreduce", partition="udpa", passes=50, **options)
        with pytest.raises(WorkerError, match=r"worker 1 .* poisoned"):
            run.wait(100)
        run = labkit.train(problem(OfTheProcess), passes=50, **options)
        with pytest.raises(WorkerError, match=r"worker . .*another network in this process than in the kernel.*'order' differ"):
            run.wait(100)


@pytest.mark.slow
@pytest.mark.cluster
def test_an_asynchronous_run_ends_without_a_process_that_is_frozen_or_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "ENDING_S", 0.5)
    n = len(problem().train_indices())
    with labkit.connect("dask", 2) as lab:
        options = {"lab": lab, "runs": tmp_path, "seed": SEED, "update": "agwu", "passes": 15}
        run = labkit.train(problem(kind=Slow), partition="udpa", heartbeat_timeout=2.0, name="frozen", **options)
        until(lambda: run.status()["version"] >= 3, 60)
        os.kill(lab.workers[1].pid, signal.SIGSTOP)
        try:
            ended(run, timeout=60)
            assert len(run.curve()) > 1 and not run.status()["reason"]  # measured, and not by the frozen one
            assert run.events.query("kind == 'leave' and worker == 1").message.iloc[0].startswith("no sign of life")
        finally:
            os.kill(lab.workers[1].pid, signal.SIGCONT)

        run = labkit.train(problem(kind=Slow), partition="idpa", name="killed", heartbeat_timeout=60.0, **options)
        until(lambda: run.status()["version"] >= 3, 60)
        os.kill(lab.workers[1].pid, signal.SIGKILL)
        ended(run)  # decided: the run goes on with the others and ends as "done"
        assert run.events.query("kind == 'merge'").samples.sum() == 15 * n
        assert run.events.query("kind == 'leave'").worker.iloc[0] == 1
        assert run.allocations().query("worker == 0").total.max() == n
        until(lambda: not lab.refresh() and not lab.lost())  # Dask has started it again, under its old index
        run = ended(labkit.train(problem(), lab, passes=1, runs=tmp_path, seed=SEED), timeout=90)
        assert {*run.events.query("kind == 'join'").worker} == {0, 1}


class Pausing(labkit.Classifier):
    """A step that takes longer than the silence after which a worker is taken to be gone."""

    def step(self, module, batch, optimisers, clock):
        time.sleep(6.0 if 60 <= clock.samples < 80 else 0.0)
        return super().step(module, batch, optimisers, clock)


@pytest.mark.slow
def test_a_worker_that_is_slow_to_answer_is_not_taken_to_be_gone(train):
    run = train(problem(kind=Pausing), update="sgwu", partition="udpa", passes=2, heartbeat_timeout=4.0).wait(100)
    assert run.state == "done" and run.events.query("kind == 'push'").compute_s.max() > 6
    assert set(run.events.query("kind == 'leave'").message) == {""} and run.events.query("kind == 'join'").incarnation.max() == 0


class Fatal(labkit.Classifier):
    """A step takes its process with it, as what is out of memory does."""

    def step(self, module, batch, optimisers, clock):
        if clock.total > 1 and multiprocessing.parent_process():  # on a worker, from the first step on
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(module, batch, optimisers, clock)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_step_that_ends_its_process_every_time_ends_the_run_with_that_reason(tmp_path):
    with labkit.connect("dask", 1) as lab:
        run = labkit.train(problem(kind=Fatal), lab, passes=2, runs=tmp_path, name="r", join_timeout=20.0)
        with pytest.raises(LabError, match=r"its process \d+ is gone: killed, out of memory, or ended by what it ran \(\d+ times"):
            run.wait(100)
    assert run.state == "failed" and sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()) < 1e6


KERNEL = """
import sys, time
import labkit, tests.helpers as t
if __name__ == "__main__":
    where, runs = sys.argv[1:]
    if where == "own":
        from distributed import LocalCluster
        lab = labkit.connect(client=LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None))
    else:
        lab = labkit.connect(address=where) if where.startswith("tcp") else labkit.connect(where, 2)
    run = labkit.train(t.problem(kind=t.Slow), lab, passes=(8 if where.startswith("tcp") else 1000), runs=runs, name="r", update="agwu")
    t.until(lambda: run.status().get("version", 0) >= 2, 60)
    print(run._follower.server.pid, flush=True)
    time.sleep(1000)
"""


def killed(where, tmp_path):
    """A kernel that is killed while it trains on this lab: its server, and all of its processes."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "kernel.py"), where, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    ) as kernel:
        server = psutil.Process(int(kernel.stdout.readline()))
        processes = psutil.Process(kernel.pid).children(recursive=True)
        kernel.kill()
    return server, processes


def going(process):
    """Whoever has adopted an orphan may not have looked after it yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "kind", ["threads", *(pytest.param(kind, marks=[pytest.mark.cluster, pytest.mark.slow]) for kind in ("dask", "ipyparallel"))]
)
def test_a_local_lab_does_not_outlive_a_killed_kernel(kind, tmp_path):
    server, processes = killed(kind, tmp_path)
    assert server in processes
    until(lambda: not any(map(going, processes)), 40)  # its join_timeout is 60 s
    run = labkit.load_run(tmp_path / "r")
    assert run.state == "failed" and "its kernel is gone, and the workers of its local lab with it" in run.status()["reason"]
    (left,) = tmp_path.glob("labkit-*")
    assert locks.held(left) is False  # the next start deletes it: tests/test_locks.py
    with labkit.connect("threads", 2) as lab:
        again = labkit.resume(run.path, lab, problem=problem(kind=Slow))
        until(lambda: again.status()["version"] > 2)
        assert again.stop().state == "stopped"


@pytest.mark.slow
def test_a_cluster_of_the_users_own_that_ends_with_its_kernel_ends_the_run_long_before_its_join_timeout(tmp_path):
    server, _ = killed("own", tmp_path)
    until(lambda: not going(server), 40)
    run = labkit.load_run(tmp_path / "r")
    assert run.state == "failed" and run.config.join_timeout == 60
    assert run.status()["reason"] == f"its kernel is gone, and every worker; labkit.resume({str(run.path)!r}) continues it."


@pytest.mark.slow
@pytest.mark.cluster
def test_an_external_cluster_keeps_its_run_when_the_kernel_is_killed(tmp_path):
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"}
    ) as cluster:
        server, _ = killed(cluster.scheduler_address, tmp_path)
        until(lambda: not going(server), 60)
    assert labkit.load_run(tmp_path / "r").state == "done"
