"""The server, driven by clients made by hand: who is let in, what is merged, and that every way out is an end."""

from __future__ import annotations

import errno
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from labkit.errors import WireError
from labkit.partition import IDPA, UDPA
from labkit.runs import checkpoints
from labkit.runs.checkpoints import Layout
from labkit.runs.events import read_events
from labkit.runs.files import read_json
from labkit.training import supervisor
from labkit.training.server import membership
from labkit.training.server import server as server_module
from labkit.training.server.coordinator import NO_ROOM
from labkit.training.server.grants import Grants
from labkit.training.server.server import Server, ServerSpec
from labkit.training.wire import compression, transport
from labkit.updates import AGWU, SGWU, AllReduce, LocalSGD
from tests.helpers import settings, until

SECRET = b"x" * 32
SIZE = 5


def spec(path, update=None, workers=(0, 1), partition=None, weights=None, n_buffers=2, **options):
    return ServerSpec(
        config=settings(workers, **{"heartbeat_timeout": 60.0} | options),  # clients made by hand send a heartbeat now and then
        path=str(path),
        secret=SECRET,
        update=update or AGWU(),
        partition=partition or UDPA(),
        weights=np.zeros(SIZE, np.float32) if weights is None else weights,
        layout=Layout((), (), SIZE - n_buffers, n_buffers),
    )


class Client:
    """A worker made by hand."""

    def __init__(self, address, index, secret=SECRET, size=SIZE, dtype=np.float32, **hello):
        self.connection = transport.connect(address, secret, timeout=60)
        self.index, self.weights, self.holds, self.n_indices = index, np.empty(size, dtype), 0, 0
        self.connection.send({"op": "join", "worker": index, "seconds_per_sample": 0.01, **hello})

    def pull(self, holds=100):
        """The next message that is not "hold"; None after so many holds."""
        while True:
            header, _ = self.connection.receive(self._buffers)
            if header["op"] != "hold":
                self.message = header
                return header
            self.connection.send({"op": "heartbeat"})
            self.holds += 1
            if self.holds >= holds:
                return None

    def _buffers(self, header, n):
        self.indices = np.empty(header["n_indices"], np.int64)
        self.n_indices += len(self.indices)
        return [memoryview(self.weights), memoryview(self.indices)]

    def push(self, weights=None, **changes):
        weights = self.weights + np.float32(1) if weights is None else weights
        header = {"op": "push", "version": self.message["version"], "samples": self.message["samples"], "score": 0.5, "loss": 1.0}
        header |= {"compute_s": 0.1, "score_s": 0.01, "wait_s": 0.0, "send_s": 0.0}
        self.connection.send({**header, **changes}, memoryview(weights))

    def train(self):
        """Push at every grant until the end; returns the last message."""
        while self.message["op"] == "grant":
            self.push()
            self.pull()
        self.leave()
        return self.message

    def leave(self):
        self.connection.send({"op": "leave"})
        self.connection.close()


@contextmanager
def serving(a_spec, change=lambda server: None):
    """The server in a thread of this process; afterwards everything is closed, and it must have ended within seconds."""
    server, result = Server(a_spec), {}
    change(server)
    serve, server.detectors = server_module.WorkerConnection.serve, {}
    patch = pytest.MonkeyPatch()
    patch.setattr(
        server_module.WorkerConnection,
        "serve",
        lambda it: (server.detectors.update({it.join["worker"]: it.detector}), serve(it))[1],
    )
    thread = threading.Thread(target=lambda: result.update(server.serve()), daemon=True)
    thread.start()
    server.clients = []
    try:
        yield server, result, thread
    finally:
        for client in server.clients:
            client.connection.close()
        with server.lock:
            server.stop("stopped", "the test is over")
        thread.join(60)
        patch.undo()
        assert not thread.is_alive(), "the server does not end"
        assert read_json(server.recorder.path / "status.json", "") == {**result, "events": server.recorder.events}


def silence(server, client, seconds=1.0):
    """From now on this one is taken to be gone when it is silent for so long; the others have a minute, however busy the machine."""
    server.detectors[client.index].constant = seconds
    client.connection.send({"op": "heartbeat"})


def join(server, *indices, **options):
    clients = [Client(server.address, index, **options) for index in indices]
    server.clients += clients
    for client in clients:
        client.pull()
    return clients


def ask(server, **request):
    with transport.connect(server.address, SECRET, timeout=60) as connection:
        connection.send({"op": "watch"})
        connection.send({"op": "status", **request})
        return connection.receive()[0]


def events(server, kind):
    table = read_events(server.recorder.path)
    return table[table.kind == kind]


@pytest.mark.parametrize("update", [SGWU, AGWU, AllReduce])
def test_a_whole_run(update, tmp_path):
    with serving(spec(tmp_path, update())) as (server, result, thread):
        first, second = join(server, 0, 1)
        assert sorted([first.n_indices, second.n_indices]) == [8, 9] and (first.weights == 0).all()
        ends = []
        threads = [threading.Thread(target=lambda c=c: ends.append(c.train())) for c in (first, second)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        thread.join(60)
        assert [message["op"] for message in ends] == ["stop", "stop"] and not thread.is_alive()
    assert (result["state"], result["samples"]) == ("done", 34)
    assert events(server, "merge").samples.sum() == 34
    versions = checkpoints.versions(tmp_path)
    assert versions[0] == 0 and versions[-1] == result["version"]
    assert events(server, "push").bytes.tolist() == [4 * SIZE] * len(events(server, "push"))


def test_nobody_begins_before_everyone_is_there(tmp_path):
    with serving(spec(tmp_path)) as (server, *_):
        first = Client(server.address, 0)
        server.clients.append(first)
        assert first.pull(holds=2) is None  # held, and sent "hold"
        assert not ask(server)["started"]
        (second,) = join(server, 1)
        assert first.pull()["op"] == second.message["op"] == "grant"
        assert first.message["wait_s"] == 0.0 and ask(server)["started"]


def test_strangers_change_nothing(tmp_path, monkeypatch):
    """A wrong secret, foreign bytes, a silent one, and members who claim too much: each is dropped, the run goes on."""
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        with pytest.raises(WireError, match="closed the connection"):
            Client(server.address, 0, secret=b"y" * 32)
        with socket.create_connection(server.address, timeout=60) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
            assert drained(stranger)
        with monkeypatch.context() as short:
            short.setattr(transport, "HANDSHAKE_S", 0.3)
            with socket.create_connection(server.address, timeout=60) as silent:
                assert drained(silent)
        for prefix in (transport.PREFIX.pack(1 << 31, 0), transport.PREFIX.pack(10, 1 << 60), transport.PREFIX.pack(3, 0) + b"[1]"):
            with transport.connect(server.address, SECRET, timeout=60) as member:
                member.sock.sendall(prefix)
                with pytest.raises(WireError):
                    member.receive()
        with transport.connect(server.address, SECRET, timeout=60) as member:
            member.send({"op": "no such thing"})
            with pytest.raises(WireError):
                member.receive()
        (worker,) = join(server, 0)
        worker.train()
        thread.join(60)
    assert result["state"] == "done" and (events(server, "join").worker == 0).all()


def drained(sock):
    """Did the other side close within the time limit of the socket?"""
    try:
        while sock.recv(1000):
            pass
    except ConnectionError:
        pass
    return True


def test_who_comes_again_replaces_its_earlier_self(tmp_path):
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        (first,) = join(server, 0)
        (second,) = join(server, 0)
        assert second.message["op"] == "grant" and second.n_indices == 17
        with pytest.raises(WireError):  # its connection is closed
            first.push()
            first.pull()
        assert second.train()["op"] == "stop"
        thread.join(60)
    assert result["state"] == "done" and result["samples"] == 34 == events(server, "merge").samples.sum()
    assert events(server, "merge").incarnation.isna().all() and (events(server, "push").incarnation == 1).all()


@pytest.mark.parametrize("update", [SGWU, AGWU])
def test_a_push_that_is_overtaken_by_a_new_self_changes_nothing(update, tmp_path):
    with serving(spec(tmp_path, update(), workers=(0,))) as (server, result, thread):
        (first,) = join(server, 0)
        link = server.connections[0]
        before = link.received
        with server.lock:  # its push has come and waits for its turn, when it comes again
            first.push()
            until(lambda: link.received > before + first.weights.nbytes)
            time.sleep(0.05)  # and its thread stands at the lock
            server.course.join(0)
        (second,) = join(server, 0)
        assert second.train()["op"] == "stop"
        thread.join(60)
    assert (result["state"], result["samples"], events(server, "merge").samples.sum()) == ("done", 34, 34)
    assert set(events(server, "push").incarnation) == {2}


def test_a_task_that_was_started_before_another_one_is_sent_away(tmp_path):
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        (second,) = join(server, 0, generation=1)
        (first,) = join(server, 0, generation=0)
        assert first.message == {"op": "stop", "reason": "worker 0 has been started again elsewhere.", "wait_s": 0.0}
        assert second.train()["op"] == "stop"
        thread.join(60)
    assert result["state"] == "done"


def test_a_worker_that_comes_late_is_sent_that_the_run_has_ended(tmp_path):
    with serving(spec(tmp_path)) as (server, *_):
        (first,) = [Client(server.address, 0)]
        server.clients.append(first)
        until(lambda: len(ask(server)["workers"]) == 1)
        assert ask(server, op="stop", reason="enough")["state"] == "stopped"
        assert first.pull()["reason"] == "enough"
        (late,) = join(server, 1)
        assert late.message["op"] == "stop" and late.message["reason"] == "the run has ended."


BAD_PUSHES = {
    "NaN": ({"weights": np.array([0, 1, np.nan, 0, 0], np.float32)}, "hold NaN or infinity. Lower the learning rate"),
    "infinite": ({"weights": np.array([0, 1, np.inf, 0, 0], np.float32)}, "hold NaN or infinity"),
    "short": ({"weights": np.zeros(3, np.float32)}, "a push of 12 bytes, which are not the 5 weights of this model"),
    "score": ({"score": 1.5}, r"its score is 1.5, but Q lies in \[0, 1\]"),
    "score NaN": ({"score": float("nan")}, "its score is nan"),
    "version": ({"version": 3}, "it was last given version 0"),
    "samples": ({"samples": 10_000}, r"a push of 10000 samples, but [89] were granted"),
}


@pytest.mark.parametrize("what", BAD_PUSHES)
def test_a_bad_push_costs_its_worker_its_membership_and_nobody_else_anything(what, tmp_path):
    """The others of the barrier do not wait for it; it may join anew."""
    changes, words = BAD_PUSHES[what]
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        held, bad = join(server, 0, 1)
        held.push()
        until(lambda: len(events(server, "hold")) == 1)
        bad.push(**changes)
        assert held.pull()["op"] == "grant" and bad.pull()["op"] == "rejoin"
        assert re.search(words, bad.message["reason"]), bad.message
        bad.connection.send({"op": "join", "worker": 1, "seconds_per_sample": 0.01})
        until(lambda: len(events(server, "join")) == 3)
        threads = [threading.Thread(target=client.train) for client in (held,)]
        [t.start() for t in threads]
        if bad.pull()["op"] == "grant":
            bad.train()
        [t.join(60) for t in threads]
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)
    assert events(server, "leave").message.iloc[0] == bad_reason(server, words) and len(events(server, "error")) == 0
    assert (
        events(server, "merge").samples.sum() == 34
        and np.isfinite(checkpoints.read_weights(tmp_path, result["version"], SIZE)[1]).all()
    )


def bad_reason(server, words):
    (reason,) = [text for text in events(server, "leave").message if re.search(words, text)]
    assert reason.startswith("worker 1 at version ")
    return reason


@pytest.mark.parametrize("update", [SGWU, AGWU, AllReduce])
def test_weights_that_become_nan_everywhere_fail_the_run_at_once(update, tmp_path):
    with serving(spec(tmp_path, update())) as (server, result, thread):
        first, second = join(server, 0, 1)
        first.push(np.full(SIZE, np.nan, np.float32))
        assert first.pull()["op"] == "rejoin"
        second.push(np.full(SIZE, np.nan, np.float32))
        while second.pull()["op"] != "stop":
            pass
        thread.join(60)
    assert result["state"] == "failed" and result["samples"] == 0 and len(events(server, "join")) == 2
    assert re.fullmatch(
        r"worker 1 at version 0: .*NaN or infinity\. Lower the learning rate\. So it is with every worker\.", result["reason"]
    )
    assert list(events(server, "error").message) == [result["reason"]] and checkpoints.versions(tmp_path) == [0]


def test_a_worker_that_is_lost_or_dropped_again_and_again_is_not_let_in_again(tmp_path, monkeypatch):
    """It pauses longer each time; the others make the run, and its record and status say why and how often."""
    monkeypatch.setattr(membership, "PAUSE_S", 0.02)
    with serving(spec(tmp_path, AGWU())) as (server, result, thread):
        there = Client(server.address, 0)
        server.clients.append(there)
        for n in range(membership.LOSSES):
            bad = Client(server.address, 1)
            server.clients.append(bad)
            assert bad.pull()["op"] == "grant"
            there.pull() if n == 0 else None
            bad.push(score=7.0) if n % 2 else bad.connection.close()
            until(lambda n=n: len(events(server, "leave")) == n + 1)
        (bad,) = join(server, 1)
        assert bad.message["op"] == "stop" and "5 times in a row without a push that counts" in bad.message["reason"]
        assert list(ask(server)["dropped"]) == ["1"]
        there.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34) and "5 times in a row" in result["dropped"]["1"]
    left = events(server, "leave").query("worker == 1").message.tolist()
    assert [re.search(r"(\d) times", text)[1] for text in left[1:]] == ["2", "3", "4", "5"]


def test_a_run_of_which_no_worker_is_left_fails_with_what_was_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(membership, "PAUSE_S", 0.01)
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        for _ in range(membership.LOSSES):
            (bad,) = join(server, 0)
            bad.push(np.zeros(3, np.float32))
            assert bad.pull()["op"] in ("rejoin", "stop")
            bad.connection.close()
        thread.join(60)
    assert result["state"] == "failed" and "no worker is left" in result["reason"] and "a push of 12 bytes" in result["reason"]
    assert len(events(server, "join")) == membership.LOSSES


def test_processes_that_end_before_they_join_are_counted_too(tmp_path):
    with serving(spec(tmp_path)) as (server, result, thread):
        there = Client(server.address, 0)
        server.clients.append(there)
        for n in range(membership.LOSSES):
            dropped = ask(server, op="lost", worker=1, generation=n, reason="its process ended")["dropped"]
        assert "its process ended (5 times in a row" in dropped["1"]
        assert there.pull()["op"] == "grant"  # nobody waits for it any longer
        there.train()
        thread.join(60)
    assert result["state"] == "done" and len(events(server, "refuse")) == membership.LOSSES


def test_scores_and_regroups_that_nobody_asked_for_do_not_fill_the_record(tmp_path):
    for number, message in enumerate(({"op": "score", "score": 0.5, "score_s": 0.0}, {"op": "regroup"})):
        (tmp_path / str(number)).mkdir()
        with serving(spec(tmp_path / str(number), LocalSGD())) as (server, result, thread):
            bad, there = join(server, 0, 1)
            bad.connection.send(message)
            there.train()
            thread.join(60)
        assert result["state"] == "done" and len(events(server, "score")) == len(events(server, "regroup")) == 0


def test_a_late_worker_that_goes_on_pushing_does_not_fill_the_record(tmp_path):
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        bad, there = join(server, 0, 1)
        grant = bad.message
        bad.push(score=None)
        assert bad.pull()["op"] == "rejoin"
        bad.message = grant
        with pytest.raises(WireError):
            for _ in range(10_000):
                bad.push()
        there.train()
        thread.join(60)
    assert result["state"] == "done" and len(events(server, "refuse")) <= 3


@pytest.mark.parametrize(
    "where",
    [
        "update.merge",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("partition.allocate", "update.join", "update.leave", "update.finish", "partition.leave")
        ),
    ],
)
def test_what_goes_wrong_in_the_users_own_rules_is_the_reason_with_its_traceback(where, tmp_path, monkeypatch):
    object, name = where.split(".")

    def slip(*_):
        raise KeyError("learning_rate")

    with serving(spec(tmp_path, SGWU(), budget=17 if name == "finish" else 34)) as (server, result, thread):
        gone, there = join(server, 0, 1)
        monkeypatch.setattr(type(getattr(server.course, object)), name, slip)
        if name in ("join", "leave"):
            gone.connection.close()
        if name == "join":
            until(lambda: len(events(server, "leave")) == 1)
            join(server, 0)
        else:
            clients = [gone, there] if name != "leave" else [there]
            [client.push() for client in clients]
        thread.join(60)
        assert not thread.is_alive()
    assert result["state"] == "failed" and "KeyError" in result["reason"] and "learning_rate" in result["reason"]
    assert "in slip" in result["traceback"]


@pytest.mark.parametrize("limit", [server_module.LEAVING_S, 0.0])
@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_workers_that_do_not_leave_in_time_change_nothing_of_how_the_run_ended(state, limit, tmp_path, monkeypatch):
    """Their links are closed; a thread that finds that out when the record is closed has nothing to say any more."""
    leave = Server.leave
    monkeypatch.setattr(server_module, "ENDING_S", 0.1)
    monkeypatch.setattr(server_module, "LEAVING_S", limit)
    monkeypatch.setattr(Server, "leave", lambda *given, **how: (time.sleep(0.3), leave(*given, **how)))
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        join(server, 0, 1)
        assert ask(server, op="stop", state=state, reason="enough")["state"] == state
        thread.join(60)
        until(lambda: not server.course.members)
    assert (result["state"], result["reason"], server.failure) == (state, "enough", {}) and "traceback" not in result
    assert len(events(server, "leave")) == 2 or not limit


def test_an_exception_of_a_worker_is_the_reason(tmp_path):
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        held, raising = join(server, 0, 1)
        held.push()
        raising.connection.send({"op": "fail", "reason": "worker 1 failed: no luck"})
        raising.connection.close()
        assert held.pull()["reason"] == "worker 1 failed: no luck"
        held.leave()
        thread.join(60)
    assert (result["state"], result["reason"]) == ("failed", "worker 1 failed: no luck")


@pytest.mark.parametrize("pushed", [True, False])
@pytest.mark.parametrize("update", [SGWU, AGWU])
def test_a_worker_that_disappears_leaves_the_run_going(update, pushed, tmp_path):
    """While it is held, or in the middle of a pass: its samples go to the other, and the budget is met all the same."""
    with serving(spec(tmp_path, update())) as (server, result, thread):
        gone, there = join(server, 0, 1)
        if pushed:
            gone.push()
            until(lambda: len(events(server, "push")) == 1)
        gone.connection.close()
        until(lambda: len(events(server, "leave")) == 1)
        there.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)
    assert events(server, "merge").samples.sum() == 34
    assert there.n_indices == 17
    assert "closed" in events(server, "leave").message.iloc[0] or "broke" in events(server, "leave").message.iloc[0]


def test_the_last_pass_of_a_lost_worker_is_made_by_those_who_had_nothing_left_to_do(tmp_path):
    with serving(spec(tmp_path, budget=17)) as (server, result, thread):
        lost, idle = join(server, 0, 1)
        idle.push()
        assert idle.pull(holds=2) is None  # no samples are left, but the other one is under way
        lost.connection.close()
        assert idle.pull()["op"] == "grant" and idle.message["samples"] == lost.message["samples"]
        idle.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 17)


def test_who_is_lost_breaks_its_own_group_and_none_after_it(tmp_path):
    """It dies while it scores: the others have pushed, and are in a new group then."""
    with serving(spec(tmp_path, AllReduce(), workers=(0, 1, 2), budget=170)) as (server, *_):
        clients = [Client(server.address, index) for index in range(3)]
        server.clients += clients
        assert {client.pull()["group"] for client in clients} == {1}
        for client in clients[:2]:
            client.push()
        until(lambda: len(events(server, "push")) == 2)
        clients[2].connection.close()
        assert [(client.pull()["group"], client.message["ranks"]) for client in clients[:2]] == [(2, [0, 1])] * 2
        clients[1].connection.close()
        assert clients[0].pull() == {"op": "regroup", "group": 2}
        clients[0].connection.send({"op": "regroup", "reason": "it is gone"})
        assert clients[0].pull()["ranks"] == [0]


def test_a_rank_that_asks_for_another_group_for_ever_is_dropped_and_the_others_make_the_run(tmp_path):
    with serving(spec(tmp_path, AllReduce(), workers=(0, 1, 2))) as (server, result, thread):
        clients = [Client(server.address, index) for index in range(3)]
        server.clients += clients
        bad, *others = clients
        [client.pull() for client in clients]
        for _ in range(membership.LOSSES):
            bad.connection.send({"op": "regroup", "reason": "once more"})
            for other in others:
                assert other.pull()["op"] == "regroup"
                other.connection.send({"op": "regroup", "reason": "the server says so"})
            [other.pull() for other in others]
            if bad.pull()["op"] == "rejoin":
                break
        assert "of which nobody was gone: once more" in bad.message["reason"]
        bad.connection.send({"op": "join", "worker": 0, "seconds_per_sample": 0.01})
        assert bad.pull()["op"] == "stop" and "5 times in a row" in bad.message["reason"]
        threads = [threading.Thread(target=other.train) for other in others]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        thread.join(60)
    assert (result["state"], list(result["dropped"])) == ("done", ["0"]) and others[0].message["op"] == "stop"


def test_who_settles_a_milestone_is_in_no_group_that_could_break(tmp_path):
    """Its `regroup` would be a wait for itself."""
    with serving(spec(tmp_path, AllReduce(), workers=(0, 1, 2), milestones=[17])) as (server, *_):
        clients = [Client(server.address, index) for index in range(3)]
        server.clients += clients
        for client in clients:
            client.pull()
            client.push()
        assert clients[0].pull()["settle"]
        clients[0].connection.close()
        assert clients[1].pull()["settle"]  # no word of the group that is over
        clients[1].connection.send({"op": "regroup", "reason": "somebody is gone"})
        assert clients[2].pull()["settle"]
        assert "is in no group" in events(server, "leave").message.iloc[-1]
        clients[2].push(samples=0)
        assert clients[2].pull()["ranks"] == [2] and len(events(server, "settle")) == 1


def test_who_is_silent_for_too_long_is_taken_to_be_gone(tmp_path):
    """The others go on; when it sends again, that is refused and recorded, and it may join anew."""
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        frozen, there = join(server, 0, 1)
        there.push()
        until(lambda: len(events(server, "hold")) == 1)
        detector = server.detectors[0]
        silence(server, frozen)
        there.pull()
        assert there.message["op"] == "grant" and there.message["wait_s"] > 0.3
        frozen.push(samples=3)
        assert frozen.pull() == {"op": "rejoin"}
        detector.constant = 60.0
        frozen.connection.send({"op": "join", "worker": 0, "seconds_per_sample": 0.01})
        until(lambda: len(events(server, "join")) == 3)
        there.push()
        assert frozen.pull()["op"] == "grant" and frozen.message["incarnation"] == 1 and there.pull()["op"] == "grant"
        threads = [threading.Thread(target=c.train) for c in (frozen, there)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)
    assert events(server, "leave").message.iloc[0] == "no sign of life for 1 s"
    (refused,) = events(server, "refuse").itertuples()
    assert (refused.worker, refused.incarnation, refused.samples) == (0, 0, 3)
    assert refused.message == "a late push of 3 samples, from a worker that was taken to be gone"


@pytest.mark.parametrize("part", ["half of the length", "the header", "half of the weights"])
def test_who_falls_silent_in_the_middle_of_a_message_is_taken_to_be_gone(tmp_path, part):
    """As one that is silent between two messages; it may connect and join anew."""
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        frozen, there = join(server, 0, 1)
        there.push()
        until(lambda: len(events(server, "hold")) == 1)
        silence(server, frozen)
        text, body = b'{"op": "heartbeat"}', b"" if part == "half of the length" else bytes(frozen.weights.nbytes)
        message = transport.PREFIX.pack(len(text), len(body)) + text + body
        end = {"half of the length": 3, "the header": -len(body), "half of the weights": -len(body) // 2}[part]
        frozen.connection.sock.sendall(message[:end])
        assert there.pull()["op"] == "grant" and there.message["wait_s"] > 0.3
        assert events(server, "leave").message.iloc[0] == "no sign of life for 1 s"
        again = Client(server.address, 0)
        server.clients.append(again)
        until(lambda: len(events(server, "join")) == 3)
        there.push()
        assert again.pull()["op"] == "grant" and again.message["incarnation"] == 1 and there.pull()["op"] == "grant"
        threads = [threading.Thread(target=c.train) for c in (again, there)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)


@pytest.mark.parametrize("update", [SGWU, LocalSGD, AllReduce])
def test_who_waits_for_a_killed_worker_is_released_when_its_connection_ends_and_not_by_a_timeout(update, tmp_path):
    """That would be in an hour: at the barrier of a round, and in the middle of a step of an all-reduce."""
    with serving(spec(tmp_path, update(), workers=(0, 1, 2), budget=170, heartbeat_timeout=3600.0)) as (server, *_):
        killed, held, busy = join(server, 0, 1, 2)
        held.push()
        until(lambda: len(events(server, "push")) == 1)
        killed.connection.sock.close()  # by the kernel of the machine, without a word
        if update is AllReduce:
            assert busy.pull() == {"op": "regroup", "group": 1}
            busy.connection.send({"op": "regroup", "reason": "it is gone"})
            assert held.pull()["ranks"] == busy.pull()["ranks"] == [1, 2]
        else:
            busy.push()
            assert held.pull()["op"] == busy.pull()["op"] == "grant" and held.message["version"] == 1


def test_by_default_a_worker_that_came_again_after_it_was_taken_to_be_gone_is_given_more_time(tmp_path, monkeypatch):
    monkeypatch.setattr(membership, "SILENCE_S", (0.3, 10.0))
    monkeypatch.setattr(membership, "FIRST_SILENCE_S", 0.3)
    with serving(spec(tmp_path, workers=(0,), heartbeat_timeout=None)) as (server, *_):
        (frozen,) = join(server, 0)
        until(lambda: len(events(server, "leave")) == 1)
        frozen.push()
        assert frozen.pull() == {"op": "rejoin"}
        frozen.connection.send({"op": "join", "worker": 0, "seconds_per_sample": 0.01})
        assert frozen.pull()["incarnation"] == 1
        until(lambda: len(events(server, "leave")) == 2)
    first, second = (float(re.match(r"no sign of life for ([\d.]+) s", text)[1]) for text in events(server, "leave").message)
    assert first == 0.3 and second > 1.0


def test_who_is_silent_while_it_is_held_is_not_waited_for(tmp_path):
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        frozen, there = join(server, 0, 1)
        frozen.push()
        server.detectors[0].constant = 1.0
        until(lambda: len(events(server, "leave")) == 1)
        assert events(server, "leave").worker.iloc[0] == 0
        there.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34) and (events(server, "merge").worker == 1).all()


def test_a_link_that_is_dropped_on_request(tmp_path):
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        (worker,) = join(server, 0)
        ask(server, op="drop", workers=[0, 5])
        with pytest.raises(WireError):
            worker.push()
            worker.pull()
        (again,) = join(server, 0)
        again.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)


@pytest.mark.slow
def test_a_member_who_does_not_speak_labkit_is_put_out_and_the_run_goes_on(tmp_path):
    nonsense = [{"op": "push"}, {"op": "push", "samples": "x"}, {"op": "no such thing"}, {"op": "heartbeat"}]
    joins = [{"worker": "x"}, {"worker": -1}, {"worker": 10**30}, {"worker": None}, {"seconds_per_sample": "fast"}]
    with serving(spec(tmp_path, workers=(0,), budget=170)) as (server, result, thread):
        (worker,) = join(server, 0)
        for changes in joins:
            with transport.connect(server.address, SECRET, timeout=60) as member:
                member.send({"op": "join", "worker": 0, "seconds_per_sample": 0.1, **changes})
                with pytest.raises(WireError):
                    member.receive()
        for number, words in enumerate(nonsense, 1):
            worker.connection.send(words)
            until(lambda number=number: len(events(server, "leave")) == number)
            (worker,) = join(server, 0)
        worker.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 170)


def test_a_heartbeat_is_a_sign_of_life_and_of_progress(tmp_path):
    with serving(spec(tmp_path, workers=(0,), heartbeat_timeout=3.0)) as (server, *_):
        (worker,) = join(server, 0)
        for samples in (3, 5, 9):
            worker.connection.send({"op": "heartbeat", "samples": samples, "loss": 0.7})
            until(lambda samples=samples: ask(server)["samples"] == samples)
            time.sleep(1.1)
        assert ask(server)["workers"]["0"] == {"loss": 0.7, "score": None, "passes": 0, "host": "", "pid": None}
        worker.push()
        assert worker.pull()["op"] == "grant"


def test_all_workers_lost_is_an_end(tmp_path):
    with serving(spec(tmp_path)) as (server, result, thread):
        clients = join(server, 0, 1)
        server.config = server.config.replace(join_timeout=0.3)
        for client in clients:
            client.connection.close()
        thread.join(60)
    reason = "every worker was lost after 0 of 34 samples, and none came back within 0.3 s."
    lost = "".join(f" Worker {index}: the other side closed the connection (1 times)." for index in (0, 1))
    assert (result["state"], result["reason"]) == ("failed", reason + lost)


def test_the_run_begins_without_a_worker_that_does_not_come_and_takes_it_when_it_does(tmp_path):
    with serving(spec(tmp_path, SGWU(), budget=170, join_timeout=2.0)) as (server, result, thread):
        (there,) = join(server, 0)
        assert there.message["op"] == "grant" and there.n_indices == 17
        late = Client(server.address, 1)
        server.clients.append(late)
        until(lambda: len(events(server, "join")) == 2)
        there.push()
        assert there.pull()["op"] == late.pull()["op"] == "grant" and there.message["retain"] < 17
        threads = [threading.Thread(target=c.train) for c in (there, late)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 170)


def test_no_worker_comes(tmp_path):
    with serving(spec(tmp_path, join_timeout=0.3)) as (_, result, thread):
        thread.join(60)
    assert (result["state"], result["reason"]) == ("failed", "no worker joined within 0.3 s.")


def test_a_worker_may_come_back(tmp_path):
    """Before the start as well as in the middle of the run; it is then incarnation 1."""
    with serving(spec(tmp_path, partition=IDPA(batches=2))) as (server, result, thread):
        early = Client(server.address, 0)
        early.pull(holds=1)
        early.connection.close()
        until(lambda: len(events(server, "leave")) == 1)
        first, second = join(server, 0, 1)
        second.connection.close()
        until(lambda: len(events(server, "leave")) == 2)
        (back,) = join(server, 1)
        assert back.message["op"] == "grant" and back.message["version"] == 0 and back.n_indices > 0
        threads = [threading.Thread(target=c.train) for c in (first, back)]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)
    assert list(events(server, "join").sort_values("worker").incarnation) == [0, 1, 0, 1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("when", ["join", "held"])
def test_a_full_disk_fails_the_run_and_frees_everyone(when, tmp_path):
    def fill(server):
        server.recorder._file.close()
        server.recorder._file = open("/dev/full", "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        if when == "join":
            until(lambda: len(events(server, "checkpoint")) == 1)  # else the run might have failed before anybody came
            fill(server)
            (first,) = join(server, 0)
        else:
            first, second = join(server, 0, 1)
            first.push()
            until(lambda: len(events(server, "hold")) == 1)
            fill(server)
            second.push()
            assert second.pull()["op"] == "stop"
            second.leave()
        assert first.message["op"] == "stop" or first.pull()["op"] == "stop"
        first.leave() if when == "held" else first.connection.close()
        thread.join(60)
        assert not thread.is_alive()
    assert result["state"] == "failed" and "cannot be written: [Errno 28] No space left" in result["reason"]


def test_a_version_that_cannot_be_saved_fails_the_run_even_if_it_is_the_last(tmp_path, monkeypatch):
    write = checkpoints.write

    def full(path, version, weights, state, **run):
        if version >= 2:
            raise OSError(28, "No space left on device")
        return write(path, version, weights, state, **run)

    monkeypatch.setattr(checkpoints, "write", full)
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        (worker,) = join(server, 0)
        worker.train()
        thread.join(60)
    assert result["version"] == 2 and result["state"] == "failed" and "No space left" in result["reason"]


def test_a_version_is_saved_when_files_can_be_opened_again(tmp_path, monkeypatch):
    write, failed = checkpoints.write, []

    def without_files(path, version, weights, state, **run):
        if version and len(failed) < 2:
            failed.append(version)
            raise OSError(errno.EMFILE, "Too many open files")
        return write(path, version, weights, state, **run)

    monkeypatch.setattr(checkpoints, "write", without_files)
    with serving(spec(tmp_path, workers=(0,), budget=17 * 4, checkpoints=10)) as (server, result, thread):
        (worker,) = join(server, 0)
        worker.push()
        worker.pull()
        until(lambda: len(failed) == 2 and 1 in checkpoints.versions(tmp_path))
        worker.train()
        thread.join(60)
    assert result["state"] == "done" and failed == [1, 1] and checkpoints.versions(tmp_path)[-1] == 4


def again(client):
    """A worker that was sent "rejoin" joins anew, and gets its grant."""
    client.connection.send({"op": "join", "worker": client.index, "seconds_per_sample": 0.01})
    client.pull()


@pytest.mark.parametrize(("where", "exchange"), [("received", "float32"), ("merged", "float32"), ("merged", "bfloat16")])
def test_a_push_for_which_there_is_no_memory_ends_no_run(where, exchange, tmp_path, monkeypatch):
    """It is refused more often than a worker may be lost, and the run goes on all the same."""
    lasts, turns = 6, []
    of, name = (compression, "buffer") if where == "received" else (AGWU, "_merge")
    whole = getattr(of, name)

    def short(*arguments):
        turns.append(name)
        if len(turns) <= lasts:
            raise MemoryError
        return whole(*arguments)

    monkeypatch.setattr(server_module, "NO_ROOM_S", 0.0)
    monkeypatch.setattr(of, name, short)
    with serving(spec(tmp_path, workers=(0,), exchange=exchange)) as (server, result, thread):
        client = Client(server.address, 0, dtype=np.uint16 if exchange == "bfloat16" else np.float32)
        server.clients.append(client)
        client.pull()
        for _ in range(lasts):
            client.push(client.weights)
            assert client.pull()["op"] == "rejoin"
            again(client)
        while client.message["op"] == "grant":
            client.push(client.weights)
            client.pull()
        client.leave()
        thread.join(60)
    assert result["state"] == "done" and result["samples"] == 34
    leaves = events(server, "leave").message.dropna()
    assert sum(why.endswith(NO_ROOM) for why in leaves) == lasts and lasts > membership.LOSSES


def test_where_memory_ends_after_a_push_was_merged_nobody_waits_for_ever(tmp_path, monkeypatch):
    """Half of what follows from it is done: the run fails, and everybody is told."""
    share, turns = Grants.share, []

    def short(grants, members):
        turns.append(1)
        if len(turns) == 2:
            raise MemoryError
        return share(grants, members)

    monkeypatch.setattr(Grants, "share", short)
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        first, second = join(server, 0, 1)
        first.push()
        until(lambda: len(events(server, "hold")) == 1)
        second.push()
        assert [first.pull()["op"], second.pull()["op"]] == ["stop", "stop"]
        thread.join(60)
    assert result["state"] == "failed" and "MemoryError" in result["traceback"]


def test_a_worker_is_as_slow_as_was_asked_for_also_when_it_comes_again(tmp_path):
    with serving(spec(tmp_path, workers=(0,))) as (server, *_):
        join(server, 0)
        ask(server, op="slow", worker=0, factor=3.0)
        with transport.connect(server.address, SECRET, timeout=60) as again:  # its process was started again
            again.send({"op": "join", "worker": 0, "generation": 1, "seconds_per_sample": 0.01})
            ops = {}
            while {"slow", "grant"} - ops.keys():
                header, _ = again.receive(lambda _, n: [memoryview(bytearray(n))])
                ops[header["op"]] = header
            assert ops["slow"]["factor"] == 3.0


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_a_version_for_which_there_is_no_memory_is_left_out_and_the_run_goes_on(error, tmp_path, monkeypatch):
    write, failed = checkpoints.write, []

    def short(path, version, weights, state, **run):
        if version and not failed:
            failed.append(version)
            raise error
        return write(path, version, weights, state, **run)

    monkeypatch.setattr(checkpoints, "write", short)
    monkeypatch.setattr(server_module, "PASSING_S", -1.0)
    with serving(spec(tmp_path, workers=(0,), budget=17 * 4, checkpoints=10)) as (server, result, thread):
        (worker,) = join(server, 0)
        worker.push()
        worker.pull()
        until(lambda: len(events(server, "refuse")))
        worker.train()
        thread.join(60)
    assert result["state"] == "done" and 1 not in checkpoints.versions(tmp_path) and checkpoints.versions(tmp_path)[-1] == 4
    assert events(server, "refuse").message.item() == "version 1 was not saved: there was no room for it."


def test_strangers_are_let_in_again_when_there_is_memory(tmp_path, monkeypatch):
    admitted, turns = transport.Handshakes.admitted, []

    def short(handshakes, *arguments):
        turns.append(1)
        if len(turns) < 3:
            raise MemoryError
        return admitted(handshakes, *arguments)

    monkeypatch.setattr(transport.Handshakes, "admitted", short)
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        (worker,) = join(server, 0)
        worker.train()
        thread.join(60)
    assert result["state"] == "done" and len(turns) == 3


def test_a_body_that_nobody_wants_takes_no_memory_of_its_size():
    parts = server_module._drain({}, 3 * server_module.DRAIN + 5)
    assert sum(part.nbytes for part in parts) == 3 * server_module.DRAIN + 5 and len({id(part.obj) for part in parts}) == 1
    assert [part.nbytes for part in server_module._drain({}, 7)] == [7]


def test_versions_that_wait_for_a_slow_disk_are_few(tmp_path, monkeypatch):
    write, go_on, waiting = checkpoints.write, threading.Event(), []

    def slow(path, version, weights, state, **run):
        assert go_on.wait(30)
        return write(path, version, weights, state, **run)

    monkeypatch.setattr(checkpoints, "write", slow)
    with serving(spec(tmp_path, workers=(0,), budget=17 * 60, checkpoints=100)) as (server, result, thread):
        (worker,) = join(server, 0)
        while worker.message["op"] == "grant":
            worker.push()
            worker.pull()
            waiting.append(server.versions.qsize())
            if server.course.update.version == 40:
                go_on.set()
        worker.leave()
        thread.join(60)
    assert max(waiting[:40]) <= 2 and len(waiting) == result["version"] == 60  # nobody has waited for the disk
    saved = checkpoints.versions(tmp_path)
    assert saved[0] == 0 and saved[-1] == 60 and len(saved) < 45 and result["state"] == "done"


def test_a_version_that_is_about_to_be_written_counts_as_one_that_waits(tmp_path):
    """Its thread has taken it, and has come no further."""
    go_on, taken = threading.Event(), []

    class Slow(queue.SimpleQueue):
        def get(self):
            item = super().get()
            taken.append(item)
            assert item is None or go_on.wait(30)
            return item

    def slowed(server):
        first, server.versions = server.versions.get(), Slow()
        server.versions.put(first)

    with serving(spec(tmp_path, workers=(0,), budget=17 * 9, checkpoints=100), slowed) as (server, _, thread):
        (worker,) = join(server, 0)
        until(lambda: taken)
        for _ in range(3):
            worker.push()
            worker.pull()
        waiting = server.versions.qsize()
        go_on.set()
        worker.train()
        thread.join(60)
    assert waiting == 0 and checkpoints.versions(tmp_path)[-1] == 9


def test_the_server_holds_no_copy_of_the_weights_that_it_began_with(tmp_path):
    given = spec(tmp_path, workers=(0,), weights=np.ones(SIZE, np.float32))
    first = weakref.ref(given.weights)
    server = Server(given)
    del given
    assert first() is None and server.size == SIZE and server.course.update.weights.tolist() == [1] * SIZE
    server.stop("stopped", "the test is over")
    assert server.serve()["state"] == "stopped"


def test_importing_the_server_stays_light():
    heavy = "torch", "dask", "distributed", "pandas", "pyarrow", "sklearn", "bokeh"
    code = f"import labkit.training.server.server, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110, check=True)
    assert done.stdout == "[]\n"


def test_the_server_process_is_small_and_ends_by_itself(tmp_path):
    """10 MB of weights, two workers, asynchronous: the rule keeps a base for each."""
    n = 2_500_000
    big = spec(tmp_path, weights=np.zeros(n, np.float32), n_buffers=0, budget=17 * 4, join_timeout=2.0)
    process, address = supervisor._start_server(big, tmp_path)
    try:
        clients = [Client(address, index, size=n) for index in (0, 1)]
        peak = 0
        for client in clients:
            client.pull()
        for _ in range(3):
            for client in clients:
                client.push()
                client.pull()
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        assert peak < 150e6
        for client in clients:
            client.connection.close()
        assert process.wait(60) == 0
        last = json.loads(supervisor._end(process))
    finally:
        supervisor._end(process)
    assert last["state"] in ("done", "failed") and (tmp_path / "server.log").read_text() == ""
    assert checkpoints.read_weights(tmp_path, last["version"], n)[0] == last["version"] or last["version"] > 0


def high_water(pid):
    """The most memory that a process has had, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads what Linux says of a process")
@pytest.mark.parametrize(("update", "workers", "most"), [(AGWU, 1, 3), (SGWU, 1, 3), (SGWU, 2, 4), (AGWU, 2, 4)])
def test_the_server_holds_no_copies_of_the_weights(update, workers, most, tmp_path):
    """Of 60 MB: the newest version and a push each; AGWU with two has a version that the other works from, and one push at a time. One
    version may be being saved."""
    n, peaks = 15_000_000, []
    for size in (SIZE, n):
        path = tmp_path / str(size)
        path.mkdir()
        indices = tuple(range(workers))
        wide = spec(path, update(), indices, weights=np.zeros(size, np.float32), n_buffers=0, budget=17 * 6)
        process, address = supervisor._start_server(wide, path)
        try:
            clients = [Client(address, index, size=size) for index in indices]
            for client in clients:
                client.pull()
            for _ in range(4):
                for client in clients:
                    client.push()
                for client in clients:
                    client.pull()
            peaks.append(high_water(process.pid))
            for client in clients:
                client.connection.close()
        finally:
            supervisor._end(process)
    assert (peaks[1] - peaks[0]) / (4 * n) < most + 0.2


def test_a_server_whose_parent_is_gone_serves_to_the_end(tmp_path):
    process, address = supervisor._start_server(spec(tmp_path, workers=(0,)), tmp_path)
    process.stdout.close()  # the parent reads no more
    client = Client(address, 0)
    client.pull()
    client.train()
    assert process.wait(60) == 0
    assert read_json(tmp_path / "status.json")["state"] == "done"
    assert (tmp_path / "server.log").read_text() == ""
