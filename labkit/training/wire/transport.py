"""Flat weight vectors between processes: one framed message is a small JSON header and one buffer.

    prefix  4 bytes length of the header | 8 bytes length of the body | header (JSON) | body (raw bytes)

Nothing here can run code that a stranger sends: no pickle, sizes are checked before memory is taken, and before the first
message both sides prove that they know the secret of the run (HMAC-SHA256 over a fresh nonce, in both directions), which never
crosses the wire. A peer that has not proved that yet gets 5 s and one of 256 slots: strangers can neither fill memory nor keep
members out. Arrays are received straight into the buffer that they end in. Every call has a time limit: a peer that is
silent for longer is a `WireError`.

Why not `distributed.comm`: its deserialisers (pickle among them) run before a handler can check who sends, it takes
memory by the lengths that a peer claims, and importing it costs the server 40 MB.

Used by `labkit.training.server.server` (accept), `labkit.training.worker.worker` and `labkit.training.attach` (connect).
"""

import contextlib
import hmac
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from labkit.errors import WireError

MAGIC = b"labkit2\n"  # with the version of the protocol
PREFIX = struct.Struct("!IQ")
MAX_HEADER = 1 << 20
HANDSHAKE_S = 5.0  # a peer gets this long to prove that it belongs here
HANDSHAKES = 256  # how many may be under way at the same time
NONCE = 32
AT_LEAST = 1 << 20  # bytes of a large body, or all of a smaller one, that have to be there before its receiver wakes up
SMALL = 1 << 14  # bytes of one that does not count


class Connection(contextlib.AbstractContextManager):
    """One end of an authenticated connection. Sending is safe from several threads, receiving from one."""

    def __init__(self, sock: socket.socket, timeout: float, max_body: int, check: Callable[[dict], None] | None = None) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout)
        self.sock, self.max_body, self.check = sock, max_body, check
        self.received = 0  # bytes
        self.deadline: float | None = None  # monotonic; until then everything must have come, at whatever speed
        self._sending, self._wakes_at = threading.Lock(), 1

    def send(self, header: dict, *buffers: memoryview | bytes) -> int:
        """Send one message; `buffers` are contiguous and follow each other in the body. Returns its size in bytes."""
        views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > MAX_HEADER:
            raise WireError(f"a header of {len(text)} bytes is too long (at most {MAX_HEADER}).")
        body = sum(view.nbytes for view in views)
        try:
            with self._sending:
                for view in (memoryview(PREFIX.pack(len(text), body) + text), *views):
                    while view.nbytes:  # not sendall, whose time limit is for the whole: a slow link may take its time
                        view = view[self.sock.send(view) :]
        except OSError as error:
            raise self._broken(f"the connection broke while {body} bytes were sent: {error}.") from error
        return PREFIX.size + len(text) + body

    def receive(self, buffers: Callable[[dict, int], Sequence[memoryview]] | None = None) -> tuple[dict, int]:
        """Wait for one message; returns its header and the length of its body.

        `buffers(header, n)` says where the n bytes of a body go: writable views that hold n bytes together. Without it a message
        that has a body is refused. `check`, if this connection has one, may refuse the header before.
        """
        n_header, n_body = PREFIX.unpack(self._read(PREFIX.size))
        if n_header > MAX_HEADER or n_body > self.max_body or (n_body and buffers is None):
            limit = f"at most {MAX_HEADER} + {self.max_body if buffers else 0}"
            raise WireError(f"a message of {n_header} + {n_body} bytes was refused ({limit}).")
        try:
            header = json.loads(self._read(n_header))
        except (ValueError, RecursionError) as error:  # no JSON, or a thousand brackets deep
            raise WireError("a message with a damaged header was refused.") from error
        if not isinstance(header, dict) or not isinstance(header.get("op"), str):
            raise WireError("a message without an 'op' was refused.")
        if self.check:
            self.check(header)
        if n_body:
            views = [memoryview(view).cast("B") for view in buffers(header, n_body)]
            if sum(view.nbytes for view in views) != n_body:
                raise WireError(f"a body of {n_body} bytes came where {sum(view.nbytes for view in views)} belong.")
            for view in views:
                self._fill(view)
        self.received += PREFIX.size + n_header + n_body
        return header, n_body

    def waiting(self, timeout: float = 0.0) -> bool:
        """Is there something to receive (be it the end), within `timeout` seconds?"""
        poll = select.poll()  # select() cannot watch more than 1024 files
        try:
            poll.register(self.sock, select.POLLIN)
        except ValueError as error:
            raise WireError("the connection was closed here.") from error
        return bool(poll.poll(max(0.0, timeout) * 1000))

    def set_timeout(self, timeout: float) -> None:
        """How long the other side may be silent in the middle of a message, from now on."""
        with contextlib.suppress(OSError):  # closed: the next call says so
            self.sock.settimeout(timeout)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side may have been quicker
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _broken(self, why: str) -> WireError:
        return WireError("the connection was closed here." if self.sock.fileno() < 0 else why)

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read(self, n: int) -> bytes:
        buffer = bytearray(n)
        self._fill(memoryview(buffer))
        return bytes(buffer)

    def _fill(self, view: memoryview) -> None:
        done, least = 0, AT_LEAST
        try:
            while done < len(view):
                if self.deadline is not None:
                    self.sock.settimeout(max(1e-3, self.deadline - time.monotonic()))
                left = len(view) - done
                self._wake_at(least if left >= least else left if SMALL <= len(view) < least else 1)
                try:
                    got = self.sock.recv_into(view[done:])
                except TimeoutError:
                    if self._wakes_at == 1:
                        raise
                    least = self._wake_at(1)  # a slow link: what little has come is not nothing
                    if not self.waiting():
                        raise
                    continue
                if not got:
                    raise WireError("the other side closed the connection.")
                done += got
            self._wake_at(1)
        except TimeoutError as error:
            raise WireError(f"nothing came from the other side for {self.sock.gettimeout():g} s.") from error
        except OSError as error:
            raise self._broken(f"the connection broke: {error}.") from error

    def _wake_at(self, n: int) -> int:
        """A receiver sleeps until `n` bytes are there, or the end: waking up for every packet costs more than copying it."""
        if n != self._wakes_at:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)
            self._wakes_at = n
        return n


def listen(host: str = "127.0.0.1") -> socket.socket:
    """A listening socket on a free port of `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind((host, 0))
    sock.listen(128)
    return sock


def shut(listener: socket.socket) -> None:
    """Close a listening socket; a thread that waits in its `accept` gets an `OSError`."""
    with contextlib.suppress(OSError):  # macOS, where closing is enough; on Linux that alone does not wake `accept`
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def incoming(listener: socket.socket) -> Iterator[socket.socket]:
    """Peers as they come, until the listener is shut. That no file is left to open is no end: others will close theirs."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0:
                return
            time.sleep(0.02)
            continue
        yield sock


class Handshakes:
    """Those under way, of peers that have not proved yet that they belong here. When all slots are taken the oldest is broken off:
    it takes a member milliseconds."""

    def __init__(self, slots: int = HANDSHAKES) -> None:
        self.slots = slots
        self._waiting: dict[socket.socket, None] = {}  # in the order in which they came
        self._lock = threading.Lock()

    def add(self, sock: socket.socket) -> None:
        with self._lock:
            while len(self._waiting) >= self.slots:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                with contextlib.suppress(OSError):  # it may be gone already
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up and closes it
            self._waiting[sock] = None

    def remove(self, sock: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(sock, None)


def accept(
    sock: socket.socket,
    secret: bytes,
    *,
    timeout: float,
    max_body: int,
    check: Callable[[dict], None] | None = None,
    handshakes: Handshakes | None = None,
) -> Connection:
    """Make an accepted socket a connection, if the peer knows the secret; otherwise `WireError` and it is closed.

    Runs in a thread of its own for each peer: a silent stranger delays no other and is dropped after 5 s.
    """
    handshakes = handshakes or Handshakes()
    handshakes.add(sock)
    try:
        connection = Connection(sock, HANDSHAKE_S, max_body, check)
        connection.deadline = time.monotonic() + HANDSHAKE_S
        nonce = os.urandom(NONCE)
        sock.sendall(MAGIC + nonce)
        answer = connection._read(NONCE + 32)
        theirs, proof = answer[:NONCE], answer[NONCE:]
        if not hmac.compare_digest(proof, _proof(secret, b"client", nonce + theirs)):
            raise WireError("a peer without the secret of this run was refused.")
        sock.sendall(_proof(secret, b"server", theirs + nonce))
        connection.deadline = None
        sock.settimeout(timeout)
        return connection
    except (OSError, WireError) as error:
        sock.close()
        raise error if isinstance(error, WireError) else WireError(f"a peer broke off: {error}.") from error
    finally:
        handshakes.remove(sock)


def connect(
    address: tuple[str, int],
    secret: bytes,
    *,
    timeout: float = 60.0,
    max_body: int = 1 << 40,
    check: Callable[[dict], None] | None = None,
) -> Connection:
    """Connect to the server of a run; both sides prove that they know `secret`."""
    host, port = address
    try:
        sock = socket.create_connection((host, port), timeout=min(timeout, 30.0))
    except OSError as error:
        raise WireError(f"no server answers at {host}:{port} ({error}). Has the run ended?") from error
    connection = Connection(sock, timeout, max_body, check)
    try:
        hello = connection._read(len(MAGIC) + NONCE)
        if not hello.startswith(MAGIC):
            raise WireError(f"the process at {host}:{port} does not use the protocol of this version of labkit.")
        theirs, nonce = hello[len(MAGIC) :], os.urandom(NONCE)
        sock.sendall(nonce + _proof(secret, b"client", theirs + nonce))
        if not hmac.compare_digest(connection._read(32), _proof(secret, b"server", nonce + theirs)):
            raise WireError(f"the process at {host}:{port} does not know the secret of this run.")
    except (OSError, WireError) as error:
        connection.close()
        raise error if isinstance(error, WireError) else WireError(f"{host}:{port} broke off: {error}.") from error
    return connection


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, role + nonces, "sha256")
