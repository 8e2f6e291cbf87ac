"""Of large pushes that come at once the server takes only some into memory; nobody waits long for one that stalls."""

from __future__ import annotations

import json
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from labkit.training.server import backpressure
from labkit.training.server import server as server_module
from labkit.training.server.backpressure import Backpressure
from labkit.training.wire import compression, transport
from labkit.updates import AGWU, FedAsync, LocalSGD
from tests.helpers import until
from tests.training.server.test_server import SIZE, Client, again, events, serving, spec

LARGE = 2_000_000  # weights


@pytest.fixture
def patient(monkeypatch):
    """Every push is a large one, and nobody stalls or waits too long."""
    monkeypatch.setattr(server_module, "LARGE", 0)
    monkeypatch.setattr(backpressure, "STALL_S", 60.0)
    monkeypatch.setattr(backpressure, "LONGEST_S", 60.0)
    return monkeypatch


@pytest.fixture
def waiting(patient):
    """How often a push has come to where it may have to wait."""
    begin, came = Backpressure.begin, []
    patient.setattr(Backpressure, "begin", lambda pushes, link: (came.append(link), begin(pushes, link)))
    return came


@pytest.fixture
def course(patient):
    """ "buffer" whenever memory is taken for a push, and "merge" whenever one is merged."""
    steps, buffer, merge = [], compression.buffer, AGWU._merge
    patient.setattr(compression, "buffer", lambda *size: (steps.append("buffer"), buffer(*size))[1])
    patient.setattr(AGWU, "_merge", lambda rule, push: (steps.append("merge"), merge(rule, push))[1])
    return steps


def joined(server, n, size=SIZE):
    clients = [Client(server.address, index, size=size) for index in range(n)]
    server.clients += clients
    for client in clients:
        client.pull()
    return clients


def half(client):
    """Begin a push; returns the rest of it."""
    header = {"op": "push", "version": client.message["version"], "samples": client.message["samples"], "score": 0.5, "loss": 1.0}
    header |= {"compute_s": 0.1, "score_s": 0.01, "wait_s": 0.0, "send_s": 0.0}
    text, body = json.dumps(header).encode(), client.weights.tobytes()
    client.connection.sock.sendall(transport.PREFIX.pack(len(text), len(body)) + text + body[: len(body) // 2])
    return body[len(body) // 2 :]


def test_a_large_push_is_received_when_the_one_before_is_merged(tmp_path, waiting, course):
    with serving(spec(tmp_path)) as (server, *_):
        first, second = joined(server, 2)
        rest = half(first)
        until(lambda: len(course) == 1)
        second.push(second.weights)
        until(lambda: len(waiting) == 2)
        assert course == ["buffer"] and server.course.update.version == 0
        first.connection.sock.sendall(rest)
        assert [first.pull()["op"], second.pull()["op"]] == ["grant", "grant"] and course == ["buffer", "merge"] * 2


def test_the_server_of_two_workers_holds_three_times_the_weights(tmp_path, waiting):
    """The newest version, the one that the other worker has, and a push."""
    weights = np.zeros(LARGE, np.float32)
    with serving(spec(tmp_path, weights=weights, n_buffers=0, budget=17 * 6, checkpoints=1)) as (server, *_):
        first, second = joined(server, 2, LARGE)
        until(lambda: not server.unsaved)
        first.push(first.weights)
        first.pull()
        held = {id(array): array.nbytes for array in (server.course.update.weights, *server.course.update.base_weights.values())}
        assert sum(held.values()) == 2 * weights.nbytes
        tracemalloc.start()
        try:
            rest = half(first)
            other = threading.Thread(target=second.push, args=(second.weights,))
            other.start()
            until(lambda: len(waiting) == 3)
            first.connection.sock.sendall(rest)
            first.pull()
            second.pull()
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        other.join(60)
        assert not other.is_alive() and most < (2 + 0.6) * weights.nbytes  # of them, half a push as this test sends it


def test_half_of_the_members_push_at_a_time(tmp_path, waiting, course):
    with serving(spec(tmp_path, workers=range(4), budget=17 * 4)) as (server, *_):
        clients = joined(server, 4)
        rests = [half(client) for client in clients[:2]]
        until(lambda: len(course) == 2)
        clients[2].push()
        until(lambda: len(waiting) == 3)
        assert course == ["buffer"] * 2
        clients[1].connection.sock.sendall(rests[1])
        assert [clients[1].pull()["op"], clients[2].pull()["op"]] == ["grant", "grant"] and course.count("merge") == 2


@pytest.mark.parametrize("limit", ["STALL_S", "LONGEST_S"])
def test_a_sender_that_stops_in_mid_push_holds_nobody_up(limit, tmp_path, waiting, patient):
    """And is no worse off when it goes on."""
    with serving(spec(tmp_path, budget=17 * 6)) as (server, *_):
        first, second = joined(server, 2)
        rest = half(first)
        until(lambda: len(waiting) == 1)
        patient.setattr(backpressure, limit, 0.02)
        for _ in range(3):
            second.push()
            assert second.pull()["op"] == "grant"
        assert set(server.course.members) == {0, 1} and server.course.update.version == 3
        first.connection.sock.sendall(rest)
        assert first.pull()["op"] == "grant" and server.course.update.version == 4


def test_a_sender_that_goes_on_slowly_does_not_stall(tmp_path, waiting):
    with serving(spec(tmp_path)) as (server, *_):
        first, _ = joined(server, 2)
        link = server.connections[0]
        rest = half(first)
        until(lambda: len(waiting) == 1)
        for byte in rest[:-1]:
            before = link.came_at
            first.connection.sock.sendall(bytes([byte]))
            until(lambda before=before: link.came_at > before)


@pytest.mark.parametrize("dies", ["receiving", "waiting"])
def test_a_sender_that_is_killed_in_mid_push_lets_the_others_go_on(dies, tmp_path, waiting):
    with serving(spec(tmp_path, budget=17 * 6)) as (server, *_):
        first, second = joined(server, 2)
        rest = half(first)
        until(lambda: len(waiting) == 1)
        if dies == "receiving":
            second.push()
            until(lambda: len(waiting) == 2)
            first.connection.close()
            left = second
        else:
            half(second)
            until(lambda: len(waiting) == 2)
            second.connection.close()
            if sys.platform == "linux":  # which tells it while there is something to read
                until(lambda: set(server.course.members) == {first.index})
            first.connection.sock.sendall(rest)
            left = first
        assert left.pull()["op"] == "grant"
        until(lambda: set(server.course.members) == {left.index})
        left.push()
        assert left.pull()["op"] == "grant"


def test_a_push_that_is_refused_makes_room_for_the_next(tmp_path, waiting):
    with serving(spec(tmp_path, budget=17 * 6)) as (server, *_):
        first, second = joined(server, 2)
        rest = half(first)
        until(lambda: len(waiting) == 1)
        second.push(np.full(SIZE, np.nan, np.float32))
        until(lambda: len(waiting) == 2)
        first.connection.sock.sendall(rest)
        assert first.pull()["op"] == "grant" and second.pull()["op"] == "rejoin"
        again(second)
        for client in (second, first):
            client.push()
            assert client.pull()["op"] == "grant"


@pytest.mark.parametrize(("update", "large"), [(LocalSGD, 0), (FedAsync, server_module.LARGE)])
def test_pushes_of_a_round_and_small_ones_wait_for_nobody(update, large, tmp_path, waiting, monkeypatch):
    monkeypatch.setattr(server_module, "LARGE", large)
    with serving(spec(tmp_path, update())) as (server, *_):
        first, second = joined(server, 2)
        half(first)
        second.push()
        until(lambda: len(events(server, "push")) == 1)
        assert not waiting
