"""The wire: what is sent arrives, who does not belong here learns nothing, and every call ends."""

from __future__ import annotations

import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from labkit.errors import WireError
from labkit.training.wire import tls, transport
from tests.helpers import until

SECRET = b"s" * 32


@pytest.fixture
def listener():
    sock = transport.listen()
    yield sock
    transport.shut(sock)


@pytest.fixture(scope="module", params=["plain", "tls"])
def identity(request):
    """Of the server; None where it goes without TLS. What uses it holds for both."""
    return tls.Identity() if request.param == "tls" else None


@pytest.fixture
def pair(listener, identity):
    """The two ends of an authenticated connection (server's, client's)."""
    made = connected(listener, identity)
    yield made
    for connection in made:
        connection.close()


def connected(listener, identity=None, max_body=10_000, timeout=60.0):
    """The time limit is for what comes then: a busy machine may take its time for the handshake."""
    result = accepting(listener, max_body=max_body, identity=identity)
    certificate = (identity.certificate,) if identity else ()
    client = transport.connect(listener.getsockname()[:2] + certificate, SECRET, timeout=60)
    made = result(), client
    for connection in made:
        connection.set_timeout(timeout)
    return made


def put(connection, data):
    """Bytes that are no message."""
    view = memoryview(data)
    while view:
        view = view[connection.sock.send(view) :]


def check(header):
    if header["op"] == "refuse me":
        raise WireError("no such op")


def accepting(listener, max_body=10_000, timeout=60.0, identity=None):
    """Accept one peer in a thread; the returned function waits for the connection or raises its error."""
    box = []

    def run():
        sock, _ = listener.accept()
        try:
            how = {"timeout": timeout, "max_body": max_body, "check": check, "identity": identity}
            box.append(transport.accept(sock, SECRET, **how))
        except WireError as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result(limit=60):
        thread.join(limit)
        assert box, "accept does not end"
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]

    return result


@pytest.mark.parametrize("n", [0, 1, 17, 2481])
def test_what_is_sent_arrives(pair, n):
    server, client = pair
    weights, indices = np.arange(n, dtype=np.float32), np.arange(3, dtype=np.int64)
    sent = client.send({"op": "x", "text": "ä\n", "loss": float("inf")}, weights, indices)
    buffers = np.empty(n, np.float32), np.empty(3, np.int64)
    header, size = server.receive(lambda header, size: [memoryview(buffer) for buffer in buffers])
    assert header == {"op": "x", "text": "ä\n", "loss": float("inf")} and size == 4 * n + 24
    np.testing.assert_array_equal(buffers[0], weights)
    np.testing.assert_array_equal(buffers[1], indices)
    assert server.received == sent


def test_several_messages_follow_each_other_in_both_directions(pair):
    server, client = pair
    for number in range(5):
        client.send({"op": "count", "number": number})
        server.send({"op": "back", "number": -number})
    assert [server.receive()[0]["number"] for _ in range(5)] == [0, 1, 2, 3, 4]
    assert [client.receive()[0]["number"] for _ in range(5)] == [0, -1, -2, -3, -4]


def test_messages_of_several_threads_do_not_mix(pair):
    server, client = pair
    body = np.ones(2000, np.float32)
    threads = [threading.Thread(target=lambda i=i: client.send({"op": "x", "i": i}, body * i)) for i in range(8)]
    [thread.start() for thread in threads]
    seen, buffer = set(), np.empty(2000, np.float32)
    for _ in threads:
        header, _ = server.receive(lambda header, n: [memoryview(buffer)])
        assert (buffer == header["i"]).all()
        seen.add(header["i"])
    [thread.join() for thread in threads]
    assert seen == set(range(8))


def test_waiting_says_whether_something_has_come(pair):
    server, client = pair
    assert not server.waiting()
    client.send({"op": "x"})
    until(server.waiting)
    server.receive()
    assert not server.waiting()


# -- who does not belong here ------------------------------------------------------------------------------------------


def test_a_wrong_secret_is_refused_on_both_sides(listener):
    result = accepting(listener)
    with pytest.raises(WireError, match="the other side closed the connection"):
        transport.connect(listener.getsockname()[:2], b"t" * 32, timeout=60)
    with pytest.raises(WireError, match="without the secret of this run was refused"):
        result()


def test_a_server_without_the_secret_is_refused(listener):
    """Whoever took over the port must not get a message from us."""

    def imposter():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(transport.MAGIC + b"n" * transport.NONCE)
            sock.recv(1000)
            sock.sendall(b"p" * 32)

    thread = threading.Thread(target=imposter)
    thread.start()
    with pytest.raises(WireError, match="does not know the secret"):
        transport.connect(listener.getsockname()[:2], SECRET, timeout=60)
    thread.join()


def test_the_secret_never_crosses_the_wire_and_proofs_do_not_repeat(listener):
    proofs = set()
    for _ in range(3):
        result = accepting(listener)
        with socket.create_connection(listener.getsockname()[:2], timeout=60) as sock:
            hello = sock.recv(1000)
            assert hello.startswith(transport.MAGIC) and len(hello) == len(transport.MAGIC) + transport.NONCE
            nonce, theirs = b"m" * transport.NONCE, hello[len(transport.MAGIC) :]
            sock.sendall(nonce + transport._proof(SECRET, b"client", theirs + nonce))
            proofs.add(sock.recv(1000))
        result().close()
    assert len(proofs) == 3 and not any(SECRET in proof for proof in proofs)


def test_an_echo_of_our_own_proof_is_no_proof(listener):
    """Reflection: who sends back what it hears does not get in."""
    result = accepting(listener)
    with socket.create_connection(listener.getsockname()[:2], timeout=60) as sock:
        nonce = sock.recv(1000)[len(transport.MAGIC) :]
        sock.sendall(nonce + nonce)
        with pytest.raises(WireError, match="refused"):
            result()


def test_whoever_speaks_something_else(listener):
    def web_server():
        sock, _ = listener.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    thread = threading.Thread(target=web_server)
    thread.start()
    with pytest.raises(WireError, match="does not use the protocol of this version of labkit"):
        transport.connect(listener.getsockname()[:2], SECRET, timeout=60)
    thread.join()


@pytest.mark.parametrize("drip", [False, True])
def test_a_silent_stranger_and_a_dripping_one_are_dropped_in_time(listener, monkeypatch, drip):
    monkeypatch.setattr(transport, "HANDSHAKE_S", 0.4)
    begun, result, closed = time.monotonic(), accepting(listener), threading.Event()
    with socket.create_connection(listener.getsockname()[:2], timeout=60) as sock:

        def drop():
            while drip and not closed.wait(0.05):
                try:
                    sock.send(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drop)
        thread.start()
        with pytest.raises(WireError, match="nothing came from the other side"):
            result()
        closed.set()
        thread.join()
    assert time.monotonic() - begun < 30


def test_a_stranger_that_hangs_up(listener):
    result = accepting(listener)
    sock = socket.create_connection(listener.getsockname()[:2], timeout=60)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an orderly end
    sock.close()
    with pytest.raises(WireError):
        result()


@contextmanager
def door(listener, slots=None):
    """Those who are admitted at this listener, in a list, and the handshakes."""
    handshakes, members = transport.Handshakes(slots), []

    def run():
        for sock in handshakes.admitted(listener, SECRET):
            members.append(transport.Connection(sock, 60, 100))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield members, handshakes
    finally:
        transport.shut(listener)
        thread.join(60)
        for member in members:
            member.close()
        assert not thread.is_alive() and not handshakes._waiting


def stranger(listener):
    """Somebody who has been greeted and says nothing."""
    sock = socket.create_connection(listener.getsockname()[:2], timeout=60)
    assert len(sock.recv(1000)) == len(transport.MAGIC) + transport.NONCE
    return sock


def test_when_all_slots_are_taken_the_oldest_stranger_makes_room(listener):
    with door(listener, slots=3) as (members, handshakes):
        strangers = [stranger(listener) for _ in range(5)]
        for gone in strangers[:2]:
            assert gone.recv(1) == b""
        until(lambda: len(handshakes._waiting) == 3)
        with transport.connect(listener.getsockname()[:2], SECRET, timeout=60) as member:  # comes in all the same
            member.send({"op": "hello"})
            until(lambda: members)
            assert members[0].receive()[0] == {"op": "hello"}
        for sock in strangers:
            sock.close()
        until(lambda: not handshakes._waiting)


def test_strangers_take_no_threads_and_as_many_files_as_a_process_can_spare(listener, monkeypatch):
    for limit, slots in ((256, 64), (8, 4), (100_000, 256), (resource.RLIM_INFINITY, 256)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert transport._slots() == slots
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with door(listener) as (_, handshakes):
        before = threading.active_count()
        strangers = [stranger(listener) for _ in range(30)]
        until(lambda: len(handshakes._waiting) == 10)
        assert threading.active_count() == before
        for sock in strangers:
            sock.close()


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), OSError(12, "Cannot allocate memory"), MemoryError()])
def test_a_door_stays_open_when_the_system_has_nothing_left(listener, error, monkeypatch):
    monkeypatch.setattr(transport, "MEMBER_S", 5.0)

    class Full:
        """A listener of a process that can open another file now and then."""

        failed = 0

        def accept(self):
            if self.failed % 7 < 6:
                self.failed += 1
                raise error
            self.failed += 1
            return listener.accept()

        setblocking, fileno, shutdown, close = listener.setblocking, listener.fileno, listener.shutdown, listener.close

    full = Full()
    with door(full) as (members, _):
        strangers = [socket.create_connection(listener.getsockname()[:2], timeout=60) for _ in range(3)]
        made = [transport.connect(listener.getsockname()[:2], SECRET, timeout=60) for _ in range(3)]
        until(lambda: len(members) == 3)
        assert full.failed > 6
        for sock in (*strangers, *made):
            sock.close()


# -- members who send nonsense -----------------------------------------------------------------------------------------


def packed(text, body=0):
    return transport.PREFIX.pack(len(text), body) + text


NONSENSE = {
    "a long header": (transport.PREFIX.pack(transport.MAX_HEADER + 1, 0), r"a message of 1048577 \+ 0 bytes was refused"),
    "a large body": (transport.PREFIX.pack(2, 10_001), r"2 \+ 10001 bytes was refused \(at most 1048576 \+ 10000\)"),
    "a body of 2**64 - 1": (transport.PREFIX.pack(2, 2**64 - 1), "was refused"),
    "no JSON": (packed(b"{]"), "damaged header"),
    "no text": (packed(b"\xff\xfe"), "damaged header"),
    "a list": (packed(b"[]"), "without an 'op'"),
    "no op": (packed(b"{}"), "without an 'op'"),
    "an op that is no text": (packed(b'{"op":["x"]}'), "without an 'op'"),
    "brackets without end": (packed(b"[" * 200_000), "damaged header"),
    "a number of 5,000 digits": (packed(b'{"op":"x","n":' + b"9" * 5000 + b"}"), "damaged header"),
    "what the check refuses": (packed(b'{"op":"refuse me"}'), "no such op"),
    "an end in the middle": (packed(b'{"op":"x"}', 8) + b"1234", "the other side closed the connection"),
    "another size": (packed(b'{"op":"x"}', 4) + b"1234", "a body of 4 bytes came where 8 belong"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused(pair, what):
    server, client = pair
    text, words = NONSENSE[what]
    put(client, text)
    client.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match=words):
        server.receive(lambda header, n: [memoryview(bytearray(8))])


def test_a_body_that_nobody_waits_for_is_refused(pair):
    server, client = pair
    client.send({"op": "x"}, b"1234")
    with pytest.raises(WireError, match=r"at most 1048576 \+ 0"):
        server.receive()


def test_sizes_are_checked_before_memory_is_taken(pair):
    server, client = pair
    put(client, transport.PREFIX.pack(2, 1 << 50) + b"{}")
    with pytest.raises(WireError, match="was refused"):
        server.receive(lambda header, n: pytest.fail("asked for a buffer"))


def test_a_header_that_is_too_long_is_not_sent(pair):
    server, client = pair
    with pytest.raises(WireError, match="too long"):
        client.send({"op": "x" * transport.MAX_HEADER})
    client.send({"op": "still fine"})
    assert server.receive()[0] == {"op": "still fine"}


# -- every call ends ---------------------------------------------------------------------------------------------------


def test_silence_has_a_limit(listener, identity):
    server, client = connected(listener, identity, timeout=0.2)
    with server, client, pytest.raises(WireError, match=r"nothing came from the other side for 0\.2 s"):
        server.receive()


LARGE = 2 * transport.AT_LEAST + 17


def test_a_large_body_and_what_follows_it(listener, identity):
    """Its receiver wakes up for large pieces, and for a small message again afterwards."""
    server, client = connected(listener, identity, max_body=LARGE)
    body, buffer = np.random.default_rng(0).bytes(LARGE), bytearray(LARGE)
    with server, client:
        for _ in range(2):
            sender = threading.Thread(target=client.send, args=({"op": "x"}, body))
            sender.start()
            assert server.receive(lambda header, n: [memoryview(buffer)]) == ({"op": "x"}, LARGE) and buffer == body
            sender.join()
            assert not server.waiting()
            client.send({"op": "small"})
            assert server.waiting(60) and server.receive()[0] == {"op": "small"}


@pytest.mark.parametrize("n", [0, 3])
def test_silence_in_the_middle_of_a_large_body_has_a_limit(listener, identity, n):
    server, client = connected(listener, identity, max_body=LARGE, timeout=0.3)
    with server, client:
        put(client, packed(b'{"op":"x"}', LARGE) + bytes(n * transport.AT_LEAST // 2))
        begun = time.monotonic()
        with pytest.raises(WireError, match=r"nothing came from the other side for 0\.3 s"):
            server.receive(lambda header, size: [memoryview(bytearray(size))])
    assert time.monotonic() - begun < 30


def test_a_link_may_be_slow(listener, identity):
    """It brings a little each time, and never so much at once that a receiver of a large body would wake up for it."""
    server, client = connected(listener, identity, max_body=LARGE, timeout=2.0)
    received, failed = [], []

    def receive():
        try:
            received.append(server.receive(lambda header, size: [memoryview(bytearray(size))]))
        except WireError as error:
            failed.append(error)

    with server, client:
        receiver = threading.Thread(target=receive)
        receiver.start()
        put(client, packed(b'{"op":"x"}', LARGE))
        for _ in range(10):
            put(client, bytes(100))
            time.sleep(0.25)  # 2.5 s together
        put(client, bytes(LARGE - 1000))
        receiver.join(60)
    assert received == [({"op": "x"}, LARGE)] and not failed


def test_a_peer_that_reads_nothing_has_a_limit(listener, identity):
    server, client = connected(listener, identity, timeout=0.3)
    with server, client, pytest.raises(WireError, match="the connection broke while 60000000 bytes were sent"):
        client.send({"op": "x"}, memoryview(bytearray(60_000_000)))


def test_a_closed_connection(pair):
    server, client = pair
    client.close()
    client.close()
    with pytest.raises(WireError, match="the other side closed the connection"):
        server.receive()
    with pytest.raises(WireError, match="the connection was closed here"):
        client.receive()
    with pytest.raises(WireError, match="the connection was closed here"):
        client.send({"op": "x"})
    assert client.sock.fileno() == -1


FORKING = """
import os, sys
from labkit.training.wire import transport
connection = transport.connect(("127.0.0.1", int(sys.argv[1])), b"s" * 32, timeout=60)
if not os.fork():
    sys.stdin.read()
    os._exit(0)
connection.send({"op": "hello"})
sys.stdin.read()
"""


def test_the_end_of_a_killed_process_is_noticed_although_a_child_of_it_lives(listener):
    """As data loaders have them: a forked child inherits the files of its parent."""
    command = [sys.executable, "-c", FORKING, str(listener.getsockname()[1])]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as process,
        transport.accept(listener.accept()[0], SECRET, timeout=60, max_body=0) as connection,
    ):
        assert connection.receive()[0] == {"op": "hello"}
        (child,) = psutil.Process(process.pid).children()
        process.kill()
        with pytest.raises(WireError, match=r"closed the connection|broke"):
            connection.receive()
        assert child.is_running()
    psutil.wait_procs([child], timeout=60)


def test_nobody_listens(listener):
    address = listener.getsockname()[:2]
    transport.shut(listener)
    with pytest.raises(WireError, match=r"no server answers at 127\.0\.0\.1:\d+ .* Has the run ended\?"):
        transport.connect(address, SECRET)


def test_shut_wakes_who_accepts(listener):
    woken = threading.Event()

    def run():
        try:
            listener.accept()
        except OSError:
            woken.set()

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.1)  # it should be inside accept by then; the outcome is the same if it is not
    transport.shut(listener)
    thread.join(60)
    assert woken.is_set()
    transport.shut(listener)
