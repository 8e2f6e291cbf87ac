"""An error that nobody expected, raised in each function of server, supervisor and worker in turn: the run ends with it, soon, and
leaves nothing behind. The functions are found by looking, so that a new one is tried too.

All three work in this process, in threads: the server as its process would run it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import inspect
import io
import json
import socket
import threading
import time
import traceback

import cloudpickle
import pytest

import labkit
from labkit.errors import ClusterError, LabError, WireError
from labkit.runs import events
from labkit.training import attach, supervisor
from labkit.training.server import coordinator, grants, membership, server
from labkit.training.wire import transport
from labkit.training.worker import heartbeat, replica, worker
from labkit.updates import FedBuff
from tests.helpers import SEED, Settling, Slow, problem, until

PLACES = (server, coordinator, grants, membership, supervisor, worker, heartbeat, replica)
CALLED_BY_USERS = {("Supervisor", name) for name in ("status", "wait", "stop", "raise_error")}  # to whom they raise
# They catch what the others raise, and end what those have opened; and what is round the threads of this test: the processes.
GUARDS = {("Server", name) for name in ("_guarded", "fail", "serve")} | {("server", "main"), ("_Log", "write")}
GUARDS |= {("Supervisor", name) for name in ("_follow", "_failed_here", "_fail")} | {("supervisor", "_start_server")}
GUARDS |= {("Heartbeat", "_run"), ("worker", "run_worker"), ("_Worker", "close")}
ANSWERED = {("Server", "_inspect"), ("_Worker", "_report")}  # their errors are for who has asked, and end no run
# What a run that goes well does not call, and what makes it do so.
SCENARIOS = {
    "resumed": ["Coordinator._restore", "Grants.restore"],
    "stopped": ["Coordinator.stop", "Server.stop", "server._notify"],
    "target": ["Supervisor._end_early"],
    "watched": ["Supervisor._shown"],
    "all-reduce": ["Coordinator.regroup", "Ranks.form", "Replica.go_on", "Replica.rewind", "WorkerConnection._regroup"],
    "paced": ["grants.by_speed"],
    "silent": ["Coordinator.refuse", "WorkerConnection._expired", "WorkerConnection._serve_expired", "server._drain"],
    "rule raises": ["Coordinator._fail"],
    "step raises": ["_Worker.notify_failure", "worker._failure", "supervisor._message", "supervisor._lost_server"],
    "full disk": ["Server._unwritable"],
    "full memory": ["Coordinator.skipped"],
    "full memory at a merge": ["coordinator.no_room"],
    "asked": ["Server._checkpoint", "Server.inspected", "Server._slow", "Server._tell", "_Worker._aside"],
    "process gone": ["Server._lost_process"],
    "cut off": ["Supervisor._try_worker"],
    "all lost": ["Losses.said"],
}
# One of each kind is tried in every run of the tests.
QUICK = ["Server._admit", "Server._save_versions", "WorkerConnection._receive", "Coordinator.push", "Grants.make", "Losses.pause"]
QUICK += ["Supervisor._request", "Supervisor._finish", "_Worker._exchange", "Heartbeat._beat", "Replica.local_pass"]
ASKED = {"slow": {"worker": 0, "factor": 1.5}, "inspect": {"worker": 0, "within": 10.0}, "checkpoint": {"within": 10.0}}
LIMIT_S = 40.0  # from the error to the end of the run; what waits for a worker in vain waits for a minute


def handlers():
    for place in PLACES:
        for _, kind in inspect.getmembers(place, inspect.isclass):
            if kind.__module__ == place.__name__ and not issubclass(kind, BaseException | tuple):
                for name, member in vars(kind).items():
                    plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                    if inspect.isfunction(plain) and not name.startswith("__") and (kind.__name__, name) not in CALLED_BY_USERS:
                        yield kind, name
        for name, member in inspect.getmembers(place, inspect.isfunction):
            if member.__module__ == place.__name__:
                yield place, name


def cases():
    rare = {title: scenario for scenario, titles in SCENARIOS.items() for title in titles}
    for where, name in handlers():
        short = where.__name__.split(".")[-1]
        if (short, name) not in GUARDS | ANSWERED:
            title = f"{short}.{name}"
            marks = [] if title in QUICK else [pytest.mark.slow]
            yield pytest.param(where, name, rare.pop(title, "plain"), id=title, marks=marks)
    assert not rare, f"no such function: {rare}"


class InThread:
    """A server in a thread, as the supervisor sees its process."""

    stdin = returncode = None

    def __init__(self, spec, path):
        self.stdout, self.path = io.BytesIO(), path
        self.server = server.Server(cloudpickle.loads(cloudpickle.dumps(spec)))
        self.address = self.server.address
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _main(self):
        try:
            self.stdout = io.BytesIO(json.dumps(self.server.serve()).encode())
        except BaseException:
            (self.path / "server.log").write_text(traceback.format_exc())
        self._close()

    def _close(self):
        transport.shut(self.server.listener)
        for connection in list(self.server.connections.values()):
            connection.close()
        self.server.recorder.close()

    def poll(self):
        return None if self.thread.is_alive() else 0

    def wait(self, timeout=None):
        self.thread.join(timeout)

    def kill(self):
        if self.thread.is_alive():
            self.server.over.set()
            self.server.wake_up.set()
            self._close()


@pytest.fixture
def servers(monkeypatch):
    """Those that were started, the latest last."""
    started = []

    def start(spec, path, *_):
        started.append(InThread(dataclasses.replace(spec, kernel=None), path))  # its parent is not that of a process
        return started[-1], started[-1].address

    monkeypatch.setattr(supervisor, "_start_server", start)
    # What is left of its limit when a machine is busy must do for the rest.
    monkeypatch.setattr(server, "ENDING_S", 1.0)
    return started


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab
    gc.collect()  # what servers that did not come to be have opened: its warnings belong here, not to the next test


class Breaking(labkit.Classifier):
    """A step of each worker raises, sooner or later."""

    def step(self, module, batch, optimisers, clock):
        if clock.samples > 64:
            raise ValueError("a step")
        return super().step(module, batch, optimisers, clock)


class Story:
    """What happens in a run, whichever of its threads is quicker. An error in `raised` is not overtaken by the end of the run."""

    def __init__(self, scenario, lab, path, servers, monkeypatch):
        self.scenario, self.lab, self.path, self.servers = scenario, lab, path, servers
        self.raised, self.begins_to_leave, self.is_gone = [], False, False
        self.is_to_be_stopped = scenario == "resumed"
        local_pass, push = replica.Replica.local_pass, worker._Worker._push_and_pull

        def waiting(it, grant, **options):
            if self.is_to_be_stopped and grant.version:
                until(it.halted)
            if scenario == "target" and grant.version:  # the end of the run does not overtake what its score leads to
                until(lambda: it.halted() or self.raised)
            if it.worker == 1 and grant.version and scenario == "all-reduce":
                self._leave(options["group"])
                until(it.halted)
            until(lambda: it.halted() or not (self.raised or (it.worker == 0 and self._holds(grant.done > it.budget // 3))))
            return local_pass(it, grant, **options)

        def leaving(it, *arguments):
            if scenario == "all lost":
                it.connection.close()
            elif it.spec.index == 1 and it.version and scenario not in ("all-reduce", "step raises"):
                self._leave(it)
            return push(it, *arguments)

        monkeypatch.setattr(replica.Replica, "local_pass", waiting)
        monkeypatch.setattr(worker._Worker, "_push_and_pull", leaving)
        if scenario == "all lost":
            monkeypatch.setattr(supervisor.Supervisor, "_try_worker", lambda *_: None)
        if scenario in ("cut off", "all lost"):
            monkeypatch.setattr(worker._Worker, "_connect_again", raising(WireError("nobody answers")))
        if scenario == "step raises":  # the end of the server does not overtake that of the worker's task
            ending = supervisor.Supervisor._ending
            all_done = lambda it: all(task.done for task in it.tasks.values())  # noqa: E731
            monkeypatch.setattr(supervisor.Supervisor, "_ending", lambda it: (until(lambda: all_done(it)), ending(it))[1])
        if scenario == "rule raises":
            monkeypatch.setattr(FedBuff, "_merge", raising(ValueError("a rule")))
        if scenario == "full disk":
            event = events.Recorder.event
            full = raising(OSError("no space left"))
            monkeypatch.setattr(
                events.Recorder, "event", lambda it, kind, **row: (full if kind == "merge" else event)(it, kind, **row)
            )
        if scenario == "full memory":
            lasting, full = FedBuff.lasting, raising(MemoryError())
            monkeypatch.setattr(FedBuff, "lasting", lambda it: full() if it.version else lasting(it))
        if scenario == "full memory at a merge":
            monkeypatch.setattr(FedBuff, "_merge", raising(MemoryError()))
        if scenario == "resumed":
            self.before = self.train()
            until(lambda: self.before.status()["version"])
            self.before.stop()
            self.is_to_be_stopped = False

    @property
    def course(self):
        return self.servers[-1].server.course

    def _holds(self, late):
        """Worker 0 waits for worker 1: that it leaves, and that it comes back when nothing is left for it."""
        return (self._is_all_given() and 1 not in self.course.members) if self.is_gone else late

    def _is_all_given(self):
        course = self.course
        return not len(course.partition.pool) and course.grants.remaining > 0 and not course.settling

    def _leave(self, it):
        """Worker 1, or its group, is lost once."""
        if self.begins_to_leave:
            return
        self.begins_to_leave = True
        if self.scenario == "silent":
            it.heartbeat.stop()
        elif self.scenario not in ("stopped", "asked"):
            it.heartbeat.connection.close()

        def over():
            return self.raised or self.course.state != "running"

        until(lambda: over() or 1 not in self.course.members)
        self.is_gone = True
        if self.scenario == "plain":
            until(lambda: over() or self._is_all_given())
        if self.scenario == "silent":
            it.heartbeat.start(it.connection)

    def train(self):
        options = {"update": "fedbuff", "overlap": 1, "exchange": "bfloat16"}
        options |= {"all-reduce": {"update": "allreduce", "overlap": 0, "exchange": "float32"}}.get(self.scenario, {})
        options |= {
            "paced": {"update": "delayed-nesterov"},
            "target": {"target": 1e-6},
            "watched": {"on_version": lambda *_: None},
        }.get(self.scenario, {})
        options |= {"silent": {"heartbeat_timeout": 1.0}, "all lost": {"join_timeout": 1.0}}.get(self.scenario, {})
        a_problem = problem(kind=Breaking if self.scenario == "step raises" else Settling)
        common = {
            "partition": labkit.IDPA(speeds=[1, 1]),
            "passes": 3000 if self.scenario == "process gone" else 3,  # it must last until that is said
            "local_steps": 3,
            "checkpoints": 2,
            "seed": SEED,
            "name": "r",
            "heartbeat_timeout": 60.0,
        }
        return labkit.train(a_problem, self.lab, runs=self.path, **common | options)

    def begin(self):
        if self.scenario == "resumed":
            return labkit.resume(self.before.path, self.lab, problem=self.before.problem())
        run = self.train()
        if self.scenario in ("stopped", "process gone", "asked"):
            until(lambda: run.status()["version"] or run.state != "running")
        if self.scenario == "asked":
            for op, fields in ASKED.items():
                with contextlib.suppress(LabError):  # the run has ended
                    attach.request(run, op, **fields)
            run.stop()
        if self.scenario == "stopped":
            run.stop()
        if self.scenario == "process gone":
            it = self.servers[-1].server
            with contextlib.suppress(WireError), attach.watch(it.address, it.spec.secret) as ask:
                ask("lost", worker=1, generation=0, reason="its process is gone")
        return run


def raising(error, log=None):
    def sabotaged(*arguments, **_):
        if log is not None:
            log.append(time.monotonic())
        for argument in arguments:
            if isinstance(argument, socket.socket):  # nobody else would
                argument.close()
        raise error

    return sabotaged


def of_runs():
    """Threads of runs. Those of the lab come and go as they like."""
    return {thread for thread in threading.enumerate() if any(part in thread.name for part in ("labkit", "_guarded", "_main"))}


def test_the_run_in_which_errors_are_raised_goes_well_without_them(lab, servers, cache, tmp_path, monkeypatch):
    run = Story("plain", lab, tmp_path, servers, monkeypatch).begin().wait(100)
    kinds = {"score", "merge", "allocate", "hold", "leave", "settle"}
    assert run.state == "done" and set(run.events.kind) >= kinds and (run.events.kind == "join").sum() == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of which the caller never came to know
@pytest.mark.parametrize(("where", "name", "scenario"), list(cases()))
def test_an_error_that_nobody_expected_ends_the_run_with_its_traceback(
    where, name, scenario, lab, servers, cache, tmp_path, monkeypatch, request
):
    story = Story(scenario, lab, tmp_path, servers, monkeypatch)
    sabotaged, run, before = raising(ZeroDivisionError("sabotage"), story.raised), None, of_runs()
    monkeypatch.setattr(where, name, sabotaged)
    stacks = (tmp_path / "stacks.txt").open("w+")  # of all threads, shortly before it is too late
    request.addfinalizer(
        lambda: (faulthandler.cancel_dump_traceback_later(), stacks.close(), until(lambda: lab.free() == [0, 1], 60))
    )
    faulthandler.dump_traceback_later(LIMIT_S - 8, file=stacks)
    if vars(supervisor).get(name):  # imported there
        monkeypatch.setattr(supervisor, name, sabotaged)
    with pytest.raises((LabError, ZeroDivisionError)) as caught:
        run = story.begin()
        run.wait(60)
        assert story.raised, "never called: give it a scenario in which it is"
    assert time.monotonic() - story.raised[0] < LIMIT_S, (tmp_path / "stacks.txt").read_text()
    text = "".join(traceback.format_exception(caught.value))
    assert "sabotage" in text and ", in sabotaged" in text
    if run:
        assert run.state == "failed" and "sabotage" in str(caught.value), caught.value
    until(lambda: lab.free() == [0, 1] and of_runs() <= before)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.suffix in (".log", ".jsonl")) < 1e6


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the tests before: the lab ends with this one
@pytest.mark.parametrize(("place", "name"), [(server.Server, "_inspect"), (worker._Worker, "_report")])
def test_an_inspection_that_fails_is_answered_with_the_error_and_the_run_goes_on(
    place, name, lab, servers, cache, tmp_path, monkeypatch
):
    assert (place.__name__, name) in ANSWERED
    run = labkit.train(problem(kind=Slow), lab, update="agwu", passes=1000, runs=tmp_path, name="r")
    until(lambda: run.status()["version"])
    with monkeypatch.context() as patch:
        patch.setattr(place, name, raising(ZeroDivisionError("sabotage")))
        with pytest.raises(
            ClusterError, match=r"(?s)worker 0 could not be inspected; the run goes on.*in sabotaged.*ZeroDivisionError: sabotage"
        ):
            run.inspect(0)
    assert run.inspect(0).worker == 0
    run.stop()
    assert run.state == "stopped"
