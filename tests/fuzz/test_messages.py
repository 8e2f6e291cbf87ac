"""Messages and handshakes that nobody meant, at both ends of a connection: each is taken, or refused by a `WireError`, and takes no
more memory than a whole one. What a run makes of them is in tests/test_security.py."""

from __future__ import annotations

import json
import random
import socket
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.errors import WireError
from labkit.training.wire import transport
from labkit.training.wire.protocol import REPLIES, REQUESTS, Grant, check_reply, check_request
from tests.fuzz.helpers import LIMIT, few_or_many, fuzzed
from tests.test_security import MEANT, VALUES, flipped, mutant, packed

pytestmark = LIMIT

SECRET, MOST = b"s" * 32, 64  # bytes of a body
GRANT = Grant(
    incarnation=1, version=3, samples=7, ahead=2, carry=1, ranks=(0, 1), rank_samples=(7, 7), n_indices=2, done=5
).header()
ANSWERS = [
    GRANT,
    {"op": "hold"},
    {"op": "regroup", "group": 2},
    {"op": "rejoin"},
    {"op": "stop", "reason": "enough", "wait_s": 0.5},
]
STATUS = {"op": "status", "state": "running", "reason": "", "started": True, "workers": {"0": {"loss": 1.0}}, "seconds": 2.0}
ANSWERS += [STATUS | {"version": 1, "samples": 2, "budget": 3}]
ANYTHING = st.recursive(
    st.integers() | st.floats() | st.sampled_from(VALUES),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(["", "op", "float32", "é\0"]), part, max_size=3),
    max_leaves=6,
)


@st.composite
def headers(draw, meant, rules):
    """A header that was meant, with fields of other values, without some, and with others beside them."""
    header = dict(draw(st.sampled_from(meant)))
    fields = sorted({*header, *rules.get(header["op"], {})})
    for _ in range(draw(st.integers(0, 3))):
        field = draw(st.sampled_from(fields))
        if draw(st.booleans()):
            header[field] = draw(ANYTHING)
        else:
            header.pop(field, None)
    return header


def received(data, check):
    """What the other end of a connection makes of these bytes: the messages up to the first that is refused."""
    here, there = link()
    with here, transport.Connection(there, 5.0, MOST, check) as connection:
        sender = threading.Thread(target=send, args=(here, data))
        sender.start()
        taken = []
        try:
            while True:
                taken.append(connection.receive(lambda header, n: [bytearray(n)]))
        except WireError:
            return taken
        finally:
            connection.close()
            sender.join(10)


def link():
    """Two ends, both in this process."""
    listener = transport.listen()
    here = socket.create_connection(listener.getsockname()[:2], timeout=5)
    there, _ = listener.accept()
    listener.close()
    return here, there


def send(sock, data):
    try:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # the other end has hung up
        pass


@few_or_many(60, 1000)
@pytest.mark.parametrize("way", ["to a server", "to a worker"])
def test_a_message_is_taken_or_refused(way, examples):
    meant, rules, check = (MEANT, REQUESTS, check_request) if way == "to a server" else (ANSWERS, REPLIES, check_reply)

    @fuzzed(examples)
    @given(headers(meant, rules), st.integers(0, 2), st.integers(0, 999))
    def taken_or_refused(header, n, seed):
        chance = random.Random(seed)
        data = packed(header, bytes(n)) + packed(meant[0])
        if seed % 3 == 1:
            data = flipped(data, chance) if seed % 2 else data[: chance.randrange(len(data))]
        elif seed % 3 == 2:
            data = mutant(chance) + data
        for message, _ in received(data, check):
            check(message)  # nothing passes that is refused
            if message["op"] == "grant":
                try:
                    Grant.read(message, worker=0, budget=20, n_bytes=16)
                except WireError as error:
                    assert "was refused" in str(error)

    taken_or_refused()


@few_or_many(60, 1000)
def test_who_does_not_know_the_secret_is_refused_at_either_end(examples):
    @fuzzed(examples)
    @given(st.binary(max_size=80), st.integers(0, 99), st.booleans())
    def refused(noise, seed, server):
        chance = random.Random(seed)
        if server:
            here, there = link()
            stranger = threading.Thread(target=prove, args=(here, noise, chance))
        else:
            listener = transport.listen()
            hello = flipped(transport.MAGIC + bytes(transport.NONCE), chance) if seed % 2 else noise
            stranger = threading.Thread(target=answer_once, args=(listener, hello + noise))
        stranger.start()
        try:
            with pytest.raises(WireError):
                if server:
                    transport.accept(there, SECRET, timeout=5.0, max_body=MOST)
                else:
                    transport.connect(listener.getsockname()[:2], SECRET, timeout=5.0)
        finally:
            stranger.join(10)
            (here if server else listener).close()

    refused()


def prove(sock, noise, chance):
    """A proof that is all but right, or none at all."""
    theirs, mine = sock.recv(100)[len(transport.MAGIC) :], chance.randbytes(transport.NONCE)
    proof = mine + transport._proof(SECRET, b"client", theirs + mine)
    send(sock, chance.choice([flipped(proof, chance), proof[:-1], noise, proof[::-1]]))


def answer_once(listener, data):
    sock, _ = listener.accept()
    with sock:
        send(sock, data)
        try:
            while sock.recv(100):
                pass
        except OSError:
            pass


def test_no_length_that_a_message_claims_takes_memory():
    """The prefix alone comes."""
    tracemalloc.start()
    try:
        for n_header, n_body in [(1 << 31, 0), (2, 1 << 40), (transport.MAX_HEADER + 1, 1), (2, MOST + 1)]:
            received(transport.PREFIX.pack(n_header, n_body) + b"{}", check_request)
        assert tracemalloc.get_traced_memory()[1] < 4 * transport.MAX_HEADER
    finally:
        tracemalloc.stop()


def test_half_a_surrogate_pair_is_no_text():
    assert received(packed({"op": "fail", "reason": "\ud800"}), check_request) == []
    assert json.loads(json.dumps("\ud800")) == "\ud800"  # which JSON lets through
