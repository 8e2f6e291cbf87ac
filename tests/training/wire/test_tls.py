"""Who stands between a server and its clients, beyond loopback: a relay that watches, one that changes bytes, and ones that speak themselves.

The same relay between a client and a server without TLS shows what it would get.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import labkit
from labkit import chaos
from labkit.errors import RunError, WireError
from labkit.runs import server_file
from labkit.runs.checkpoints import Layout
from labkit.training import resume as resuming
from labkit.training import supervisor
from labkit.training import train as training
from labkit.training.wire import tls, transport
from tests.helpers import SEED, Slow, ended, net, problem, until
from tests.training.server.test_server import SECRET, Client, ask, events, join, serving, spec
from tests.training.test_attach import going

SIZE = 40_000  # weights: a body of many records
EVERYWHERE = "0.0.0.0"  # beyond loopback, on whatever machine the tests are


class Relay:
    """Passes on what comes, both ways, and keeps it. `change(up, position, data)` says what is sent instead."""

    def __init__(self, address, change=lambda up, position, data: data):
        self.server, self.change = ("127.0.0.1", address[1]), change
        self.seen, self.listener, self._socks, self._threads = {True: b"", False: b""}, transport.listen(), [], []
        self.address = (*self.listener.getsockname()[:2], *address[2:])
        self._start(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        transport.shut(self.listener)
        for sock in self._socks:
            transport.shut(sock)
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _start(self, work, *arguments):
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.server, timeout=60)
                server.settimeout(None)
                self._socks += [client, server]
                self._start(self._pass_on, client, server, True)
                self._start(self._pass_on, server, client, False)

    def _pass_on(self, source, target, up):
        position = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen[up] += data
                target.sendall(self.change(up, position, data))
                position += len(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class Flip:
    """One bit, in the middle of the weights, in one direction; of so many connections."""

    def __init__(self, up, times=1, at=100_000):
        self.up, self.left, self.at = up, times, at

    def __call__(self, up, position, data):
        if up != self.up or not self.left or not position <= self.at < position + len(data):
            return data
        self.left -= 1
        changed = bytearray(data)
        changed[self.at - position] ^= 0x20
        return bytes(changed)


def a_spec(path, host, workers=(0,), **options):
    weights = np.random.default_rng(3).normal(size=SIZE).astype(np.float32)
    return replace(spec(path, weights=weights, workers=workers, **options), host=host, layout=Layout((), (), SIZE, 0))


@pytest.fixture(scope="module")
def identity():
    return tls.Identity()


@pytest.fixture(params=["plain", "tls"])
def host(request):
    return EVERYWHERE if request.param == "tls" else "127.0.0.1"


# -- on the way --------------------------------------------------------------------------------------------------------


def test_a_relay_that_watches_sees_no_weights(host, tmp_path):
    with serving(a_spec(tmp_path, host)) as (server, result, thread), Relay(server.address) as relay:
        client = Client(relay.address, 0, size=SIZE)
        server.clients.append(client)
        client.pull()
        pulled = client.weights.copy()
        client.push(pushed := pulled * np.float32(1.5))
        client.pull()
        client.train()
        thread.join(60)
        until(lambda: all(len(relay.seen[up]) > 8 * SIZE for up in (True, False)))
    assert result["state"] == "done"
    seen = [part in relay.seen[up] for up, vector in ((False, pulled), (True, pushed)) for part in pieces(vector)]
    assert all(seen) if host == "127.0.0.1" else not any(seen)
    words = [word in relay.seen[True] for word in (b"push", b"seconds_per_sample", b"samples")]
    assert all(words) if host == "127.0.0.1" else not any(words)
    assert SECRET not in relay.seen[True] + relay.seen[False]


def pieces(vector):
    return [vector[start : start + 4].tobytes() for start in range(0, SIZE, 997)]


@pytest.mark.parametrize("up", [True, False])
def test_a_relay_that_changes_weights(host, up, tmp_path):
    """Without TLS they are merged, or trained on, and nobody notices; with it the connection fails, and nothing is merged."""
    with serving(a_spec(tmp_path, host)) as (server, *_), Relay(server.address, Flip(up)) as relay:
        client = Client(relay.address, 0, size=SIZE)
        server.clients.append(client)
        right = server.course.update.weights.copy()
        if host == "127.0.0.1":
            client.pull()
            pulled = client.weights.copy()
            assert (pulled != right).sum() == (0 if up else 1)
            client.push(right)
            client.pull()
            assert (server.course.update.weights != right).any() == up and server.course.update.version == 1
            return
        if up:
            client.pull()
            client.push(right)
            with pytest.raises(WireError, match="what came is not what was sent: it was changed on the way"):
                client.pull()  # the server says so before it closes the connection
            until(lambda: 0 not in server.course.members)
            (left,) = events(server, "leave").message
            assert (
                "what came is not what was sent: it was changed on the way, or is no TLS (decryption failed or bad record" in left
            )
        else:
            with pytest.raises(
                WireError, match=r"is not what was sent: it was changed on the way, or is no TLS \(decryption failed"
            ):
                client.pull()
        assert server.course.update.version == 0 and (server.course.update.weights == right).all()
        again = Client(server.address, 0, size=SIZE, generation=1)  # another way
        server.clients.append(again)
        until(lambda: again.pull()["op"] == "grant")
        again.push(right)
        again.pull()
        assert server.course.update.version == 1 and (again.weights == right).all()


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("at", [0, 20, 45, 60, 100, 300])
def test_nobody_gets_in_when_a_bit_of_the_beginning_is_changed(at, up, identity):
    """Of the greeting, the proofs or what TLS begins with: it fails on this side or that one, and never goes on in the clear."""
    with transport.listen() as listener, Relay((*listener.getsockname()[:2], identity.certificate), Flip(up, at=at)) as relay:
        got = []

        def serve():
            with (
                contextlib.suppress(WireError),
                transport.accept(listener.accept()[0], SECRET, timeout=60, max_body=9, identity=identity) as it,
            ):
                got.append(it.receive())

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(WireError), transport.connect(relay.address, SECRET, timeout=60) as client:
            client.send({"op": "x"})
            client.receive()
        thread.join(60)
        assert not thread.is_alive() and not got


# -- at the server's place ---------------------------------------------------------------------------------------------


def test_who_has_another_certificate_gets_nothing(identity):
    """It even knows the secret, as a worker of the run does: it still is not the server."""
    other, listener, refused = tls.Identity(), transport.listen(), []

    def imposter():
        try:
            transport.accept(listener.accept()[0], SECRET, timeout=60, max_body=100, identity=other)
        except WireError as error:
            refused.append(str(error))

    thread = threading.Thread(target=imposter)
    thread.start()
    with pytest.raises(WireError, match="another certificate than the server of this run: somebody stands in between"):
        transport.connect((*listener.getsockname()[:2], identity.certificate), SECRET, timeout=60)
    thread.join(60)
    transport.shut(listener)
    assert refused and "a peer made no TLS connection" in refused[0]


def test_who_passes_on_the_proofs_and_then_speaks_itself_is_refused(tmp_path):
    """A relay lets a worker through the door and then takes its place: TLS with the server, which knows it by nothing."""
    with serving(a_spec(tmp_path, EVERYWHERE)) as (server, *_):
        with socket.create_connection(("127.0.0.1", server.address[1]), timeout=60) as sock:
            hello = sock.recv(1000)
            nonce = b"n" * transport.NONCE
            sock.sendall(
                nonce + transport._proof(SECRET, b"client", hello[len(transport.MAGIC) :] + nonce)
            )  # as the worker made it
            assert len(sock.recv(1000)) == 32
            with ssl._create_unverified_context().wrap_socket(sock) as inside:
                inside.sendall(b"p" * 32 + transport.PREFIX.pack(14, 0) + b'{"op":"watch"}')
                with contextlib.suppress(ConnectionError):
                    assert inside.recv(1) == b""
        assert ask(server)["state"] == "running"


def test_nothing_is_said_beyond_loopback_to_a_server_without_a_certificate():
    with pytest.raises(WireError, match=r"nothing is sent to 192\.0\.2\.7:4000 without TLS"):
        transport.connect(("192.0.2.7", 4000), SECRET)


def test_a_client_without_tls_is_refused_by_a_server_with_it(tmp_path):
    with serving(a_spec(tmp_path, EVERYWHERE)) as (server, *_):
        with transport.connect(("127.0.0.1", server.address[1]), SECRET, timeout=60) as client:
            client.send({"op": "watch"})
            with pytest.raises(WireError):
                client.receive()
        assert ask(server)["state"] == "running"


def test_who_is_silent_inside_keeps_nobody_out(tmp_path, monkeypatch):
    """Members who have passed the door and do not go on: each has a thread, and a time limit."""
    with serving(a_spec(tmp_path, EVERYWHERE)) as (server, *_), contextlib.ExitStack() as silent:

        def some():
            return [silent.enter_context(transport.connect(("127.0.0.1", server.address[1]), SECRET, timeout=60)) for _ in range(5)]

        some()
        join(server, 0, size=SIZE)
        monkeypatch.setattr(tls, "HANDSHAKE_S", 0.3)
        before = threading.active_count()
        for peer in some():
            with pytest.raises(WireError, match=r"the other side closed|broke"):
                peer.receive()
        until(lambda: threading.active_count() <= before)


# -- a connection ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(identity):
    listener, box = transport.listen(), []

    def serve():
        box.append(transport.accept(listener.accept()[0], SECRET, timeout=60, max_body=1 << 23, identity=identity))

    thread = threading.Thread(target=serve)
    thread.start()
    client = transport.connect((*listener.getsockname()[:2], identity.certificate), SECRET, timeout=60)
    thread.join()
    with client, box[0] as server:
        yield server, client
    transport.shut(listener)


def test_it_is_tls_13_and_no_session_is_resumed(pair):
    for connection in pair:
        assert connection.sock.sock.version() == "TLSv1.3" and not connection.sock.sock.session_reused
    server, client = pair
    assert not server.waiting(0.05) and not client.waiting(0.05)  # no ticket came after the handshake


def test_what_is_shut_is_not_read_as_if_it_were_plain(pair):
    """Python's own `shutdown` of such a socket lets the next call read what is there, encrypted."""
    server, client = pair
    client.send({"op": "x"}, bytes(100_000))
    assert server.waiting(60)
    server.sock.shutdown(socket.SHUT_RDWR)
    buffer = bytearray(b"y" * 100_000)
    with contextlib.suppress(WireError):
        server.receive(lambda header, n: [memoryview(buffer)])
    assert not buffer.strip(b"y\0")


def test_both_sides_send_large_bodies_at_once(pair):
    """OpenSSL must not be called by two threads at the same time; and who waits to send must receive meanwhile."""
    n, rounds = 3_000_001, 3
    body, wrong = np.random.default_rng(0).bytes(n), []

    def send(connection):
        for _ in range(rounds):
            connection.send({"op": "x"}, body)

    def receive(connection):
        buffer = bytearray(n)
        for _ in range(rounds):
            connection.receive(lambda header, size: [memoryview(buffer)])
            if buffer != body:
                wrong.append(connection)

    threads = [threading.Thread(target=work, args=(side,)) for side in pair for work in (send, receive)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads) and not wrong
    assert not any(side.waiting() for side in pair)


def test_something_decrypted_already_is_something_to_receive(pair):
    """Two messages in one record: the second has left the socket with the first."""
    server, client = pair
    text = b'{"op":"x"}'
    message = memoryview(2 * (transport.PREFIX.pack(len(text), 0) + text))
    while message:
        message = message[client.sock.send(message) :]
    for _ in range(2):
        assert server.waiting(60) and server.receive()[0] == {"op": "x"}
    assert not server.waiting()


# -- every client of a server ------------------------------------------------------------------------------------------


@pytest.fixture
def beyond(monkeypatch):
    """Servers listen beyond loopback, as if there were workers on other machines."""
    for module in (training, resuming):
        monkeypatch.setattr(module, "server_host", lambda lab: EVERYWHERE)


def test_a_run_is_followed_and_stopped_by_tls(tmp_path):
    with going(tmp_path, host=EVERYWHERE) as server:
        said = server_file.find(tmp_path)
        assert said["certificate"] == server.identity.certificate and server_file.address(said) == server.address
        run = labkit.load_run(tmp_path).attach()
        assert run.status()["budget"] == 34
        assert run.stop(60).state == "stopped"


def test_on_loopback_there_is_no_certificate(tmp_path):
    with going(tmp_path) as server:
        assert server.identity is None and len(server.address) == 2
        assert json.loads((tmp_path / server_file.FILE).read_text())["certificate"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threads", *(pytest.param(kind, marks=pytest.mark.cluster) for kind in ("dask", "ipyparallel"))])
def test_a_run_is_watched_cut_killed_and_resumed(kind, beyond, tmp_path):
    with labkit.connect(kind, 2) as lab:
        run = labkit.train(problem(kind=Slow), lab, passes=3, local_steps=2, seed=SEED, runs=tmp_path)
        until(lambda: run.status().get("started"), 60)
        assert server_file.find(run.path)["certificate"].startswith("-----BEGIN CERTIFICATE-----")
        assert labkit.load_run(run.path).attach().status()["state"] == "running"
        chaos.drop_link(run, 1)
        chaos.kill_server(run)
        with pytest.raises(RunError):
            run.wait(60)
        again = ended(labkit.resume(run.path, lab))
    assert chaos.audit(again) == []


@pytest.mark.slow
def test_a_run_through_a_relay_that_changes_bytes(beyond, tmp_path, monkeypatch):
    """The worker comes again each time, and what was changed is not merged."""
    start, relays = supervisor._start_server, []

    def through(*arguments):
        process, address = start(*arguments)
        relays.append(Relay(address, Flip(True, times=2, at=20_000)))
        return process, relays[-1].address

    monkeypatch.setattr(supervisor, "_start_server", through)
    with labkit.connect("threads", 1) as lab:
        run = ended(labkit.train(problem(partial(net, width=300)), lab, passes=4, local_steps=3, seed=SEED, runs=tmp_path))
    with relays[0] as relay:
        assert relay.change.left == 0
    left = run.events.query("kind == 'leave' and message != ''").message
    assert len(left) == 2 and left.str.contains("changed on the way").all() and chaos.audit(run) == []
