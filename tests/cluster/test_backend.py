"""The same promises of a lab, on every back end: threads, Dask, ipyparallel, ipyparallel under MPI, and one written here."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import dask
import numpy as np
import psutil
import pytest
from torch import nn

import labkit
from labkit import chaos
from labkit.cluster import connect as connecting
from labkit.cluster.backend import quiet
from labkit.errors import ClusterError, WorkerError
from labkit.runs import checkpoints
from tests.cluster.work import boom, odd, slow, together, where, work, worker_error

PLACES = {
    "threads": {"kind": "threads"},
    "dask": {"kind": "dask"},
    "ipyparallel": {"kind": "ipyparallel"},
    "mpi": {"kind": "ipyparallel", "engines": "mpi"},
}


def skip_without(place):
    if place == "mpi":
        if not (shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")):
            pytest.skip("needs mpiexec (pip install labkit[mpi]), and there is none")
        if not find_spec("mpi4py"):
            pytest.skip("needs mpi4py (pip install labkit[mpi]), which is not installed")


real, rare = pytest.mark.cluster, (pytest.mark.cluster, pytest.mark.slow)  # engines are engines, however they were started


@pytest.fixture(
    scope="module",
    params=["threads", pytest.param("dask", marks=real), pytest.param("ipyparallel", marks=real), pytest.param("mpi", marks=rare)],
)
def lab(request):
    skip_without(request.param)
    with labkit.connect(n_workers=2, slowdown=[1, 4], **PLACES[request.param]) as lab:
        yield lab


def until(condition, limit=90.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.02)


def has_begun(path):
    """Has `work` begun, and said so to the end of the line?"""
    return path.exists() and path.read_text().endswith("\n")


def test_workers_are_listed(lab):
    assert [w.index for w in lab.workers] == [0, 1] and [w.slowdown for w in lab.workers] == [1, 4] and lab.emulated
    assert lab.lost() == lab.refresh() == [] and lab.free() == [0, 1] and lab.client is not None
    assert lab.one_process == (lab.kind == "threads") and len({w.pid for w in lab.workers}) == (1 if lab.one_process else 2)
    assert "2 workers" in repr(lab) and len(lab.table()) == 2


def test_a_task_stays_on_its_worker(lab):
    places = [{lab.start(index, where).result(60) for _ in range(3)} for index in (0, 1)]
    assert len(places[0]) == len(places[1]) == 1 and places[0] != places[1]
    if not lab.one_process:
        assert [lab.start(index, os.getpid).result(60) for index in (1, 0)] == [lab.workers[1].pid, lab.workers[0].pid]
        assert lab.map(os.getenv, ["OMP_NUM_THREADS"]) == ["1"]


def test_tasks_of_several_workers_run_side_by_side_and_those_of_one_after_the_other(lab, tmp_path):
    lab.map(abs, [1, 2])
    tasks = [lab.start(0, together, str(tmp_path), 0)]
    assert not tasks[0].done and tasks[0].error() is None
    tasks.append(lab.start(1, together, str(tmp_path), 1))
    assert [task.result(90) for task in tasks] == [True, True] and all(task.done for task in tasks)
    first, second = lab.start(0, slow, 1), lab.start(0, slow, 1)
    assert first.result(60)[1] <= second.result(60)[0]


def test_errors_come_back_as_themselves_with_the_traceback_from_there(lab):
    task = lab.start(1, boom)
    with pytest.raises(ZeroDivisionError, match="no 0") as caught:
        task.result(60)
    assert task.done and isinstance(task.error(), ZeroDivisionError)
    shown = "".join([*map(str, caught.traceback), *getattr(caught.value, "__notes__", [])])
    assert "in boom" in shown or "boom" in shown
    with pytest.raises(ZeroDivisionError, match="no 3"):
        lab.map(boom, [3])
    with pytest.raises(WorkerError, match="worker 3 failed") as caught:
        lab.start(0, worker_error).result(60)
    assert caught.value.worker == 3 and "over there" in str(caught.value)


def lock(_):
    return threading.Lock()


class Unloadable:
    def __reduce__(self):
        return int, ("x",)


def test_what_cannot_be_sent_is_one_error_on_every_back_end(lab):
    for fn, item, words in (
        (
            abs,
            threading.Lock(),
            r"abs\(\) or what it is given cannot be sent to a worker \(TypeError: cannot pickle '_thread.lock' object\)",
        ),
        (abs, (i for i in (1,)), r"cannot pickle 'generator' object"),
        (lambda _: len(lab), 1, r"cannot be sent to a worker \(TypeError: a lab holds connections .* n = len\(lab\)\)"),
        (lambda _, held=threading.Lock(): held, 1, "cannot be sent to a worker"),  # noqa: B008
        (abs, Unloadable(), r"abs\(\) or what it is given cannot be loaded on a worker \(ValueError"),
    ):
        with pytest.raises(ClusterError, match=words):
            lab.map(fn, [item])
    with pytest.raises(WorkerError, match=r"odd\(\) failed: Odd: 1"):
        lab.start(0, odd).result(60)
    if lab.workers[0].here:
        assert type(lab.map(lock, [1])[0]) is type(threading.Lock())
    else:
        with pytest.raises(ClusterError, match=r"what lock\(\) returned cannot be sent back"):
            lab.map(lock, [1])
    for call, words in ((lambda: lab.map(5, [1]), "fn=5 must be"), (lambda: lab.map(abs, 5), "items=5 must be a list")):
        with pytest.raises(TypeError, match=words):
            call()
    assert lab.map(abs, [-1, -2]) == [1, 2]


def test_map_keeps_the_order_and_arrays_travel(lab):
    assert lab.map(abs, range(-7, 0)) == [7, 6, 5, 4, 3, 2, 1] and lab.map(abs, []) == []
    arrays = lab.map(np.sqrt, [np.full(50_000, 4.0), np.full(3, 9.0)])
    assert arrays[0].sum() == 100_000 and arrays[1].tolist() == [3.0] * 3
    offset = 5
    assert lab.map(lambda x: x + offset, [1, 2, 3]) == [6, 7, 8]
    places = [{place} for place in lab.map(lambda _: where(), range(4), workers=[1])]
    assert all(place == places[0] for place in places)


EDITED = """
import numpy as np
from torch import nn
import labkit

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x):
        return self.layer(x * FACTOR)

def factor(x):
    return FACTOR * x

class Shifted(labkit.updates.LocalSGD):
    def _publish(self, weights, merges):
        super()._publish(weights + np.float32(SHIFT), merges)
"""


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A module of the user's own, written with these numbers and loaded (again)."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(factor, shift=0.0):
        (tmp_path / "edited_net.py").write_text(EDITED.replace("FACTOR", str(factor)).replace("SHIFT", str(shift)))
        importlib.invalidate_caches()
        return importlib.reload(sys.modules["edited_net"]) if "edited_net" in sys.modules else importlib.import_module("edited_net")

    yield write
    sys.modules.pop("edited_net", None)


def test_a_module_that_was_edited_and_reloaded_is_what_workers_run(lab, edited):
    assert lab.map(edited(1.0).factor, [2, 3]) == [2.0, 3.0]
    assert lab.map(edited(4.0).factor, [2, 3]) == [8.0, 12.0]


@pytest.mark.slow
def test_a_module_that_was_edited_and_reloaded_is_what_is_trained(lab, edited, tmp_path):
    x, y = np.random.default_rng(0).normal(size=(60, 12)).astype("f4"), np.arange(60) % 3

    def trained(*numbers):
        mine = edited(*numbers)
        problem = labkit.Classifier(mine.Net, data=(x, y), batch_size=8)
        run = labkit.train(problem, lab, partition="udpa", update=mine.Shifted(), passes=1, runs=tmp_path / "runs").wait(100)
        return run, run.weights()["layer.weight"] - run.weights(0)["layer.weight"]

    run, moved = trained(1.0, 0.0)
    assert 0 < np.abs(moved).max() < 1
    assert list(run.config.sources) == ["edited_net"]
    run, moved = trained(0.0, 1.0)  # no gradient, and the server shifts every version by one
    np.testing.assert_allclose(moved, run.events.version.max(), rtol=1e-5)
    assert run.curve().version.iloc[-1] == run.events.version.max()


def test_waits_have_limits(lab):
    task = lab.start(0, time.sleep, 2.0)
    with pytest.raises(ClusterError, match=r"worker 0 did not finish within 0\.1 s"):
        task.result(0.1)
    assert not task.done
    with pytest.raises(ClusterError, match=r"2 of 2 tasks were not done within 0\.1 s; they were cancelled"):
        lab.map(time.sleep, [1.0, 1.0], timeout=0.1)
    for worker in (2, -1):
        with pytest.raises(ClusterError, match=rf"there is no worker {worker}; this lab has workers 0 to 1"):
            lab.start(worker, where)
    assert lab.map(abs, [-1, -2], timeout=60) == [1, 2]


def test_leases_are_all_or_nothing(lab):
    lab.lease([1], "first")
    assert lab.free() == [0] and lab.free("first") == [0, 1]
    with pytest.raises(ClusterError, match=r"worker 1 by 'first'"):
        lab.lease([0, 1], "second")
    assert lab.free() == [0]
    lab.lease([1, 0], "first")
    assert lab.free() == []
    with pytest.raises(ClusterError, match=r"worker 0 by 'first', worker 1 by 'first'"):
        lab.lease([0, 1], "second")
    assert lab.map(abs, [-1]) == [1]  # where every worker is held, others' tasks wait their turn
    lab.release("first")
    lab.release("first")
    lab.lease([0, 1], "second")
    lab.release("second")
    with pytest.raises(ClusterError, match="there is no worker 2"):
        lab.lease([2], "third")
    assert lab.free() == [0, 1]


def test_two_that_want_the_same_workers_never_wait_for_each_other(lab):
    got, barrier = [], threading.Barrier(4)

    def want(number):
        barrier.wait(100)
        for _ in range(20):
            try:
                lab.lease([0, 1] if number % 2 else [1, 0], f"run {number}")
            except ClusterError:
                continue
            got.append(number)
            assert lab.free() == []
            lab.release(f"run {number}")

    threads = [threading.Thread(target=want, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and got and lab.free() == [0, 1]


def test_several_threads_use_a_lab_at_once(lab):
    results = {}

    def use(number):
        results[number] = [lab.start(number % 2, abs, -number).result(60) for _ in range(5)] + lab.map(abs, [-number, number])

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert lab.lost() == lab.refresh() == []
        time.sleep(0.02)
    assert results == {number: [number] * 7 for number in range(1, 5)}


def test_a_back_end_is_a_file_and_a_line(monkeypatch, tmp_path, cache):
    """`tests/cluster/one_file.py` is all that it takes: it is found by its kind, checks its requests, and runs train on it."""
    monkeypatch.setitem(connecting.BACKENDS, "one-file", "tests.cluster.one_file")
    with pytest.raises(ClusterError, match="no threads of others"):
        labkit.connect("one-file", address="tcp://x:1")
    with pytest.raises(TypeError, match=r"connect\(\) has no argument 'queue'"):
        labkit.connect("one-file", queue="long")
    with labkit.connect("one-file", 2, slowdown=[1, 3]) as lab:
        assert labkit.connect("one-file", 2, slowdown=[1, 3]) is lab and lab.kind == "one-file" and lab.one_process
        assert lab.map(abs, range(-7, 0)) == [7, 6, 5, 4, 3, 2, 1]
        run = labkit.train(problem(), lab, update="sgwu", partition="udpa", passes=5, runs=tmp_path, name="r").wait(100)
        assert run.state == "done" and run.config["kind"] == "one-file" and set(run.events.worker.dropna()) == {0, 1}
        np.testing.assert_array_equal(run.flat(), WEIGHTS.setdefault("sgwu", run.flat()))
        assert lab.add() == [2] and lab.free() == [0, 1, 2]
        with pytest.raises(ZeroDivisionError, match="no 0"):
            lab.start(2, boom).result(60)
        task = lab.start(0, time.sleep, 0.2)
    assert lab.lost() == [0, 1, 2] and task.lost


# -- runs --------------------------------------------------------------------------------------------------------------

WEIGHTS = {}  # of the first back end: the others must make the same ones


def net(shape, n_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 7), nn.ReLU(), nn.Linear(7, n_classes))


def problem(kind=labkit.Classifier, n=231):
    generator = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = generator.normal(size=(n, 1, 6, 6)).astype(np.float32)
    x[np.arange(n), 0, y] += 2
    return kind(net, (x, y), batch_size=16, score_samples=20, lr=0.1)


class Slow(labkit.Classifier):
    """Leaves time to disturb it."""

    def step(self, *args):
        time.sleep(0.01)
        return super().step(*args)


@pytest.mark.parametrize(("update", "partition"), [("sgwu", "udpa"), ("agwu", "idpa"), ("allreduce", "idpa")])
def test_a_run_is_the_same_everywhere(lab, update, partition, tmp_path, cache):
    passes = 5 if update == "sgwu" else 15  # what is learnt of the others depends on who is quicker
    run = labkit.train(problem(), lab, update=update, partition=partition, passes=passes, runs=tmp_path, name="r").wait(100)
    merges, budget = run.events.query("kind == 'merge'"), run.config["budget"]
    assert run.state == "done" and merges.samples.sum() == run.summary()["samples"] and budget - 2 < merges.samples.sum() <= budget
    assert set(merges.worker) == {0, 1} and run.events.seq.tolist() == list(range(len(run.events)))
    assert run.curve().score.iloc[-1] > 0.6 and run.curve().version.is_unique
    state = checkpoints.read_state(run.path, checkpoints.newest(run.path)[0])[1]
    held = np.concatenate([state["partition"]["pool"], *state["partition"]["shards"].values()])
    assert sorted(held.tolist()) == list(range(run.config["n_train"]))
    if update == "sgwu":  # nothing in it depends on time
        flat = run.flat()
        np.testing.assert_array_equal(flat, WEIGHTS.setdefault(update, flat))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("place", "updates"), [("dask", ["sgwu", "allreduce"]), ("ipyparallel", ["agwu"]), ("mpi", ["allreduce"])])
def test_a_worker_is_killed_in_mid_run(place, updates, tmp_path, cache):
    """Under every update the others go on, with its samples. Dask starts it again; engines are added by hand."""
    skip_without(place)
    with labkit.connect(n_workers=3, **PLACES[place]) as lab:
        for update in updates:
            there = lab.free()
            settings = {"local_steps": 4, "passes": 20, "runs": tmp_path, "name": update, "workers": there}
            run = labkit.train(problem(Slow), lab, update=update, **settings)
            until(lambda run=run: run.status()["version"] >= 3)
            chaos.kill(lab, there[-1])
            run.wait(200)
            merges, left = run.events.query("kind == 'merge'"), run.events.query("kind == 'leave' and message != ''")
            assert run.state == "done" and left.worker.iloc[0] == there[-1]
            assert run.config["budget"] - 3 < merges.samples.sum() <= run.config["budget"]
            assert (merges.seq > left.seq.iloc[0]).any()
            if update != updates[-1]:
                if place != "dask":
                    lab.add(1)
                until(lambda: len(lab.free()) == 3)


@pytest.mark.cluster
@pytest.mark.parametrize("place", ["dask", *(pytest.param(place, marks=pytest.mark.slow) for place in ("ipyparallel", "mpi"))])
def test_real_processes(place, capfd, monkeypatch, tmp_path):
    """Killed, back, joined by another, frozen, closed: no wait without a limit, nothing run twice, nothing left, not a word."""
    skip_without(place)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    request = {"n_workers": 2, "slowdown": [1, 4], **PLACES[place]}
    deploy = dask.config.get("distributed.deploy")  # no process starts in 1 ms, and Dask would give it up
    monkeypatch.setitem(deploy, "lost-worker-timeout", "1ms")
    lab = labkit.connect(**request)
    pids = [worker.pid for worker in lab.workers]
    assert len({*pids, os.getpid()}) == 3 and labkit.connect(**request) is lab
    lab.lease([0, 1], "run")

    task, begun = lab.start(1, work, tmp_path / "begun", 60), time.monotonic()
    until(lambda: has_begun(tmp_path / "begun"))
    os.kill(pids[1], signal.SIGKILL)
    until(lambda: lab.lost() == [1])
    with pytest.raises(ClusterError, match=r"worker 1 was lost while its task ran"):
        task.result(60)
    assert task.done and task.lost and task.error() is None
    with pytest.raises(ClusterError, match=r"worker 1 was lost\. connect\(\) again"):
        lab.start(1, os.getpid)
    assert lab.map(os.getenv, ["HOME"], timeout=60) == [os.getenv("HOME")]
    assert time.monotonic() - begun < 55  # its task lasts for a minute

    if place == "dask":  # its nanny starts a new process under the old name
        until(lambda: lab.refresh("run") == [1])
    else:
        assert lab.add() == [1] and lab.refresh("run") == [1]
    assert lab.lost() == lab.refresh("run") == lab.free() == [] and lab.workers[1].slowdown == 4
    assert lab.start(1, os.getpid).result(60) == lab.workers[1].pid != pids[1] and task.lost
    assert lab.add() == [2] and lab.refresh("run") == lab.free() == [2] and lab.workers[2].slowdown == 1
    assert lab.start(2, os.getpid).result(60) == lab.workers[2].pid
    assert (tmp_path / "begun").read_text() == f"{pids[1]}\n"  # and never again

    labkit.chaos.freeze(lab, 0)
    begun = time.monotonic()
    assert lab.lost() == [] and lab.refresh() == [2]  # who asks under no name hears of those that are free
    with pytest.raises(ClusterError, match=r"worker 0 did not finish within 0\.2 s"):
        lab.start(0, os.getpid).result(0.2)
    assert time.monotonic() - begun < 20
    pids += [worker.pid for worker in lab.workers]
    lab.close()
    lab.close()
    assert deploy["lost-worker-timeout"] == "1ms"
    assert time.monotonic() - begun < 60
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert not list(scratch.iterdir()) and capfd.readouterr() == ("", "")


def test_loggers_are_as_before_also_after_several_threads_were_quiet_at_once():
    """One waits for a worker that it has added while another one closes a lab."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "tornado", "distributed.scheduler")]
    before, first, second = [logger.level for logger in loggers], quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert {logger.level for logger in loggers} == {logging.CRITICAL + 1}, "the other one is still inside"
    second.__exit__(None, None, None)
    assert [logger.level for logger in loggers] == before
