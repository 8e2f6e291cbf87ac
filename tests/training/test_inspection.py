"""A worker is inspected while it trains, measures its score or waits; a frozen one is answered by what its server knows. A version is
saved when it is asked for, and a worker is made slower, which is recorded.

Also of `labkit/training/page.py`: what its buttons ask for.
"""

from __future__ import annotations

import os
import re
import threading

import pytest

import labkit
from labkit.errors import ClusterError, RunError
from labkit.plots import style
from labkit.runs import checkpoints
from labkit.training.page import order
from labkit.training.wire import transport
from tests.helpers import Slow, problem, until
from tests.training.test_attach import SECRET, going

pytestmark = pytest.mark.usefixtures("cache")


class Waits(labkit.Classifier):
    """Measuring a score waits until it is let go."""

    measuring, go_on = threading.Event(), threading.Event()

    def measure(self, *args, **options):
        Waits.measuring.set()
        Waits.go_on.wait(30)
        return super().measure(*args, **options)


def test_a_worker_shows_where_it_is_and_a_version_is_saved_now(train):
    run = train(problem(kind=Slow), update="agwu", passes=1000)
    until(lambda: run.status()["version"] >= 3)
    seen = run.inspect(1)
    assert (seen.worker, seen.pid, seen.device) == (1, os.getpid(), "cpu") and seen.memory["rss"] > 1e6
    assert "run_worker" in seen.stacks["worker"] and str(seen).startswith("Worker 1: process ")
    assert all("labkit" in stack.splitlines()[0] for stack in seen.stacks.values())  # not what called it
    assert seen.exchange["bytes"] > 0 and 0 <= seen.samples <= seen.granted
    version = run.checkpoint()
    assert version >= 3 and version in checkpoints.versions(run.path)
    with pytest.raises(ClusterError, match=r"worker 7 is not in the run; workers \[0, 1\] are"):
        run.inspect(7)
    assert "Worker 0: process" in order(run, "inspect", worker=0, within=60.0)
    saved = re.fullmatch(r"Version (\d+) is saved\.", order(run, "checkpoint", within=60.0))
    assert int(saved[1]) >= version
    with pytest.raises(ClusterError, match="threads of their kernel"):
        run.kill(1)
    for ask in (run.kill, lambda worker: run.slow_down(worker, 2)):
        with pytest.raises(ClusterError, match=r"worker 7 is not in run .*; workers \[0, 1\] are"):
            ask(7)
    run.stop()
    for ask in (run.checkpoint, lambda: run.inspect(0), lambda: run.slow_down(0, 2), lambda: run.kill(0)):
        with pytest.raises(RunError, match="is not running"):
            ask()


def test_a_worker_is_made_slower_and_the_record_and_figures_say_so(train, lab):
    run = train(problem(kind=Slow), update="agwu", passes=1000)
    until(lambda: run.status()["version"] >= 2)
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        run.slow_down(1, 0.5)
    assert run.slow_down(1, 5) is run and "closed" in order(run, "slow", worker=1, factor=0.5)
    until(lambda: "after" in run.inspect(1).stacks["worker"])  # the sleep behind a step
    run.slow_down(0, 3).slow_down(0, 1)
    changed = "worker 0 set to 1x again in mid-run, worker 1 set from 1x to 5x in mid-run"
    until(lambda: style.caption([run]) == changed)  # as the server says, which may be late with an answer
    run.stop()
    assert run.events.query("kind == 'slow'")[["worker", "message"]].values.tolist() == [
        [worker, f"{factor} times as slow as its machine, in all"] for worker, factor in ((1, 5), (0, 3), (0, 1))
    ]
    assert changed in style.caption([labkit.load_run(run.path)])
    ticks = str(labkit.plots.timeline(run).opts.get().kwargs["yticks"])
    assert "worker 0 (1x again)" in ticks and "worker 1 (1x, then 5x)" in ticks
    again = labkit.resume(run.path, lab, problem=problem(kind=Slow))  # with workers at their own speed
    until(lambda: again.status().get("started"))
    assert not again.status()["slowed"] and style.caption([again]) == ""
    again.stop()


@pytest.mark.slow
@pytest.mark.cluster
def test_an_engine_of_ipyparallel_shows_where_it_is(tmp_path):
    pytest.importorskip("ipyparallel")
    with labkit.connect("ipyparallel", 2) as lab:
        run = labkit.train(problem(kind=Slow), lab, update="agwu", passes=5000, runs=tmp_path)
        until(lambda: run.status()["version"] >= 3, 60)
        seen = run.inspect(1)
        assert (seen.worker, seen.pid) == (1, lab.workers[1].pid) and seen.pid != os.getpid() and seen.memory["rss"] > 1e6
        assert "run_worker" in seen.stacks["worker"] and seen.exchange["bytes"] > 0
        run.stop()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_process_that_is_frozen_says_nothing_and_one_that_is_killed_comes_back(tmp_path):
    with labkit.connect("dask", 2) as lab:
        run = labkit.train(problem(kind=Slow), lab, update="agwu", passes=5000, runs=tmp_path, heartbeat_timeout=30.0)
        until(lambda: run.status()["version"] >= 3, 60)
        pid = run.inspect(1).pid
        assert pid == lab.workers[1].pid != os.getpid()
        labkit.chaos.freeze(lab, 1)
        try:
            with pytest.raises(ClusterError, match=f"worker 1 \\(process {pid} on .* did not answer within 2 s"):
                run.inspect(1, timeout=2)
        finally:
            labkit.chaos.thaw(lab, 1)
        assert run.inspect(1).pid == pid == run.kill(1)
        until(lambda: (run.status()["workers"].get("1") or {}).get("pid") not in (None, pid), 60)
        run.stop()


def test_a_worker_that_measures_its_score_answers_too(train):
    Waits.measuring.clear()
    Waits.go_on.clear()
    try:
        run = train(problem(kind=Waits), update="agwu", passes=1000)
        assert Waits.measuring.wait(90)
        until(lambda: run.inspect(0).doing == "measuring its score")
        assert "in measure" in run.inspect(0).stacks["worker"]
    finally:
        Waits.go_on.set()
    until(lambda: run.status()["version"] >= 2)


def test_one_that_is_silent_is_answered_by_what_is_known_of_it(tmp_path):
    with going(tmp_path) as server, transport.connect(server.address, SECRET, timeout=60) as worker:
        run = labkit.load_run(tmp_path)
        with pytest.raises(RunError, match=r"Call run\.attach\(\) first"):
            run.inspect(0)
        run.attach()
        with pytest.raises(ClusterError, match=r"worker 0 is not in run far; none is now: run\.status\(\)\.get\('started'\) says"):
            run.slow_down(0, 2)
        worker.send({"op": "join", "worker": 0, "seconds_per_sample": 0.01, "pid": 7, "host": "far"})
        worker.receive(lambda header, n: [bytearray(n)])
        worker.send({"op": "heartbeat", "samples": 5, "loss": 0.25})
        until(lambda: run.status()["samples"] == 5)
        with pytest.raises(
            ClusterError, match=r"worker 0 \(process 7 on far\) did not answer within 0.05 s.*'heartbeat'.*5 of 17 samples.*0.25"
        ):
            run.inspect(0, timeout=0.05)
        with pytest.raises(ClusterError, match="is on far, not here"):
            run.kill(0)


def test_what_a_worker_answers_is_text_of_some_length_and_of_no_other_worker(tmp_path):
    report = {"version": 0, "threads": 1, "doing": "x", "device": "cpu", "memory": {"rss": 1.0}, "exchange": {}}
    with going(tmp_path) as server, transport.connect(server.address, SECRET, timeout=60) as worker:
        run = labkit.load_run(tmp_path).attach()
        worker.send({"op": "join", "worker": 0, "seconds_per_sample": 0.01, "pid": 7, "host": "far"})
        worker.receive(lambda header, n: [bytearray(n)])

        def answer():
            asked, _ = worker.receive()
            for number in (asked["number"] + 1, asked["number"]):  # what nobody has asked for is dropped
                text = f"\033[2Jhello {number - asked['number']}\nthere"
                worker.send({"op": "inspected", "number": number, "stacks": {"worker": text}, **report})

        thread = threading.Thread(target=answer)
        thread.start()
        seen = run.inspect(0)
        thread.join(60)
        assert seen.stacks == {"worker": "?[2Jhello 0\nthere"}
        worker.send({"op": "inspected", "number": 0, "stacks": {"worker": "x" * 10_000}, **report})
        until(lambda: "stacks" in str(run.events.message.tolist()))
        assert "must be a table of at most" in run.events.query("kind == 'leave'").message.iloc[0]
