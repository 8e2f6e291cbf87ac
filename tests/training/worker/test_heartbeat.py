"""The heartbeat of a worker comes whatever it does; what cannot wait is received during a local pass and only then."""

from __future__ import annotations

import threading

import pytest

from labkit.training.wire import transport
from labkit.training.worker.heartbeat import Heartbeat
from tests.helpers import until

SECRET = b"s" * 32


@pytest.fixture
def ends(monkeypatch):
    """The server's end, and a heartbeat on the worker's."""
    monkeypatch.setattr("labkit.training.worker.heartbeat.HEARTBEAT_S", 0.02)
    listener, box = transport.listen(), []

    def accept():
        box.append(transport.accept(listener.accept()[0], SECRET, timeout=60, max_body=100))

    thread = threading.Thread(target=accept)
    thread.start()
    client = transport.connect(listener.getsockname()[:2], SECRET, timeout=60)
    thread.join(60)
    heartbeat = Heartbeat()
    heartbeat.start(client)
    yield box[0], client, heartbeat
    client.close()
    heartbeat.stop()
    heartbeat.stop()  # twice is fine
    box[0].close()
    transport.shut(listener)


def test_heartbeats_carry_the_progress(ends):
    server, _, heartbeat = ends
    assert server.receive()[0] == {"op": "heartbeat"}
    with heartbeat.local_pass():
        heartbeat.progress = {"samples": 7, "loss": 0.5}
        until(lambda: server.receive()[0] == {"op": "heartbeat", "samples": 7, "loss": 0.5})
    until(lambda: server.receive()[0] == {"op": "heartbeat"})


def test_a_message_is_received_during_a_local_pass(ends):
    server, _, heartbeat = ends
    alarms = []
    heartbeat.on_interrupt = lambda: alarms.append(1)
    with heartbeat.local_pass():
        server.send({"op": "stop", "reason": "enough"})
        until(lambda: heartbeat.interrupt is not None and alarms)
    assert heartbeat.pop_interrupt() == {"op": "stop", "reason": "enough"} and heartbeat.pop_interrupt() is None


def test_a_group_that_is_left_already_cannot_be_broken_any_more(ends):
    server, _, heartbeat = ends
    with heartbeat.local_pass(group=3):
        server.send({"op": "regroup", "group": 2})
        for _ in range(3):
            server.receive()  # it has had the time
        assert heartbeat.interrupt is None
        server.send({"op": "regroup", "group": 3})
        until(lambda: heartbeat.interrupt is not None)
    assert heartbeat.pop_interrupt() == {"op": "regroup", "group": 3}


def test_between_two_passes_messages_are_for_the_worker(ends):
    server, client, heartbeat = ends
    server.send({"op": "grant"})
    for _ in range(3):
        server.receive()  # it has had the time
    assert heartbeat.interrupt is None and client.receive()[0] == {"op": "grant"}


def test_a_connection_that_breaks_is_noticed_also_when_it_broke_before_the_pass(ends):
    server, _, heartbeat = ends
    server.close()
    until(lambda: heartbeat.interrupt is not None)
    with heartbeat.local_pass():
        assert heartbeat.interrupt["op"] == "lost"
    assert heartbeat.pop_interrupt()["op"] == "lost"


def test_a_message_ends_a_local_pass_when_it_comes_and_not_with_the_next_heartbeat(ends, monkeypatch):
    """So that who waits for a lost rank is released at once; that heartbeat comes in an hour."""
    server, client, heartbeat = ends
    heartbeat.stop()
    monkeypatch.setattr("labkit.training.worker.heartbeat.HEARTBEAT_S", 3600.0)
    heartbeat.start(client)
    for _ in range(2):
        with heartbeat.local_pass(group=3):
            server.send({"op": "regroup", "group": 3})
            until(lambda: heartbeat.interrupt is not None)
        assert heartbeat.pop_interrupt() == {"op": "regroup", "group": 3}
        server.send({"op": "grant"})  # what comes between two passes is for the worker, as before
        assert client.receive()[0] == {"op": "grant"}
    heartbeat.stop()
    assert not any(thread.name == "labkit-heartbeat" for thread in threading.enumerate())
