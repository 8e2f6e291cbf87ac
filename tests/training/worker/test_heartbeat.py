"""The pulse of a worker: beats come whatever it does, and what cannot wait is heard during a local pass and only then."""

from __future__ import annotations

import threading
import time

import pytest

from labkit.training.wire import transport as wire
from labkit.training.worker import heartbeat as pulse_module
from labkit.training.worker.heartbeat import Pulse

SECRET = b"s" * 32


@pytest.fixture
def ends(monkeypatch):
    """The server's end, and a pulse on the worker's."""
    monkeypatch.setattr(pulse_module, "BEAT_S", 0.02)
    listener, box = wire.listen(), []

    def accept():
        box.append(wire.accept(listener.accept()[0], SECRET, timeout=5, max_body=100))

    thread = threading.Thread(target=accept)
    thread.start()
    client = wire.connect(listener.getsockname()[:2], SECRET, timeout=5)
    thread.join(5)
    beats = Pulse()
    beats.start(client)
    yield box[0], client, beats
    client.close()
    beats.stop()
    beats.stop()  # twice is fine
    box[0].close()
    wire.shut(listener)


def until(condition, limit=5.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.005)


def test_beats_tell_the_progress(ends):
    server, _, beats = ends
    assert server.receive()[0] == {"op": "beat"}
    with beats.listening():
        beats.progress = {"samples": 7, "loss": 0.5}
        until(lambda: server.receive()[0] == {"op": "beat", "samples": 7, "loss": 0.5})
    until(lambda: server.receive()[0] == {"op": "beat"})


def test_a_word_is_heard_during_a_local_pass(ends):
    server, _, beats = ends
    alarms = []
    beats.alarm = lambda: alarms.append(1)
    with beats.listening():
        server.send({"op": "stop", "reason": "enough"})
        until(lambda: beats.told is not None and alarms)
    assert beats.heard() == {"op": "stop", "reason": "enough"} and beats.heard() is None


def test_a_group_that_is_left_already_cannot_be_broken_any_more(ends):
    server, _, beats = ends
    with beats.listening(group=3):
        server.send({"op": "regroup", "group": 2})
        for _ in range(3):
            server.receive()  # it has had the time
        assert beats.told is None
        server.send({"op": "regroup", "group": 3})
        until(lambda: beats.told is not None)
    assert beats.heard() == {"op": "regroup", "group": 3}


def test_between_two_passes_the_words_are_for_the_worker(ends):
    server, client, beats = ends
    server.send({"op": "go"})
    for _ in range(3):
        server.receive()  # it has had the time
    assert beats.told is None and client.receive()[0] == {"op": "go"}


def test_a_connection_that_breaks_is_heard_also_when_it_broke_before_the_pass(ends):
    server, _, beats = ends
    server.close()
    until(lambda: beats.told is not None)
    with beats.listening():
        assert beats.told["op"] == "lost"
    assert beats.heard()["op"] == "lost"
