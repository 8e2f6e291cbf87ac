"""An error that nobody expected, raised in each function of server, supervisor and worker in turn: the run ends with it, soon, and
leaves nothing behind. The functions are found by looking, so that a new one is tried too.

All three work in this process, in threads: the server as its process would run it.
"""

from __future__ import annotations

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
from labkit.errors import LabError
from labkit.training import supervisor
from labkit.training.server import coordinator, grants, membership, server
from labkit.training.wire import transport
from labkit.training.worker import heartbeat, replica, worker
from tests.helpers import SEED, problem, until

PLACES = (server, coordinator, grants, membership, supervisor, worker, heartbeat, replica)
CALLED_BY_USERS = {("Supervisor", name) for name in ("status", "wait", "stop", "raise_error")}  # to whom they raise
GUARDS = {("Server", "_guarded"), ("Supervisor", "_follow"), ("Heartbeat", "_run")}  # they catch what the others raise
# Not called in a run that goes well: failures, ends that are asked for, resumed runs, all-reduces; and the process around the server.
ELSEWHERE = {
    "Coordinator": ["_fail", "_restore", "_settle", "_settled", "refuse", "regroup", "stop"],
    "Grants": ["restore", "settle"],
    "Ranks": ["form"],
    "Share": ["_asdict", "_make", "_replace"],
    "Server": ["_lost_process", "_unwritable", "fail", "serve", "stop"],  # serve is the process itself
    "Supervisor": ["_end_early", "_fail", "_failed_here", "_try_worker"],
    "WorkerConnection": ["_expired", "_serve_expired"],
    "_Log": ["write"],
    "_Worker": ["_connect_again", "close", "notify_failure"],  # the others may be done by then: the status says so
    "Replica": ["_settle"],
    "grants": ["by_speed"],
    "server": ["_notify", "main"],
    "supervisor": ["_end", "_lost_server", "_message", "_start_server"],
    "worker": ["_failure", "run_worker"],  # the latter travels to the workers by value
}
# Of these the outcome depends on nothing else. Of the others a few in a hundred lose a race with the end of the run, here in threads.
STEADY = ["Server._admit", "Server._save_versions", "WorkerConnection._receive", "Coordinator.push", "Grants.make", "Losses.pause"]
STEADY += ["Supervisor._request", "Supervisor._finish", "_Worker._exchange", "Heartbeat._beat", "Replica.local_pass"]


def handlers():
    for place in PLACES:
        for _, kind in inspect.getmembers(place, inspect.isclass):
            if kind.__module__ == place.__name__ and not issubclass(kind, BaseException):
                for name, member in vars(kind).items():
                    plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
                    if inspect.isfunction(plain) and not name.startswith("__") and (kind.__name__, name) not in CALLED_BY_USERS:
                        yield kind, name
        for name, member in inspect.getmembers(place, inspect.isfunction):
            if member.__module__ == place.__name__:
                yield place, name


def cases():
    for where, name in handlers():
        short = where.__name__.split(".")[-1]
        if (short, name) not in GUARDS and name not in ELSEWHERE.get(short, []):
            title = f"{short}.{name}"
            if title in STEADY:
                yield pytest.param(where, name, id=title)


class InThread:
    """A server in a thread, as the supervisor sees its process."""

    stdin = returncode = None

    def __init__(self, spec, path):
        self.stdout, self.path = io.BytesIO(), path
        self.server = server.Server(cloudpickle.loads(cloudpickle.dumps(spec)))
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
def in_threads(monkeypatch):
    def start(spec, path, *_):
        process = InThread(spec, path)
        return process, process.server.address

    monkeypatch.setattr(supervisor, "_start_server", start)


def cut_once(monkeypatch):
    """Worker 1 loses its link once."""
    push, cut = worker._Worker._push_and_pull, []

    def lossy(self, *arguments):
        if self.spec.index == 1 and self.version and not cut:
            cut.append(self.connection.close())
        return push(self, *arguments)

    monkeypatch.setattr(worker._Worker, "_push_and_pull", lossy)


def a_run(lab, path):
    return labkit.train(
        problem(), lab, update="fedbuff", partition="idpa", passes=3, local_steps=3, overlap=1, exchange="bfloat16",
        runs=path, name="r", seed=SEED, checkpoints=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


def test_the_run_in_which_errors_are_raised_goes_well_without_them(lab, in_threads, cache, tmp_path, monkeypatch):
    cut_once(monkeypatch)
    run = a_run(lab, tmp_path).wait(60)
    assert run.state == "done" and set(run.events.kind) >= {"score", "merge", "allocate", "reclaim", "hold", "leave"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sockets of which the caller never came to know
@pytest.mark.parametrize(("where", "name"), list(cases()))
def test_an_error_that_nobody_expected_ends_the_run_with_its_traceback(where, name, lab, in_threads, cache, tmp_path, monkeypatch):
    raised = []

    def sabotaged(*arguments, **_):
        raised.append(time.monotonic())
        for argument in arguments:
            if isinstance(argument, socket.socket):  # nobody else would
                argument.close()
        raise ZeroDivisionError("sabotage")

    cut_once(monkeypatch)
    monkeypatch.setattr(where, name, sabotaged)
    if vars(supervisor).get(name):  # imported there
        monkeypatch.setattr(supervisor, name, sabotaged)
    threads, run = threading.active_count(), None
    with pytest.raises((LabError, ZeroDivisionError)) as caught:
        run = a_run(lab, tmp_path)
        run.wait(30)
    assert raised, "never called: name it in ELSEWHERE, or make the run call it"
    assert time.monotonic() - raised[0] < 10
    text = "".join(traceback.format_exception(caught.value))
    assert "sabotage" in text and ", in sabotaged" in text
    if run:
        assert run.state == "failed" and "sabotage" in str(caught.value), caught.value
    until(lambda: lab.free() == [0, 1] and threading.active_count() <= threads)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.suffix in (".log", ".jsonl")) < 1e6
