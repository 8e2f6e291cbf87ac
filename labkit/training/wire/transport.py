"""Flat weight vectors between processes: one framed message is a small JSON header and one buffer.

    prefix  4 bytes length of the header | 8 bytes length of the body | header (JSON) | body (raw bytes)

Nothing here can run code that a stranger sends: no pickle, sizes are checked before memory is taken, and before the first
message both sides prove that they know the secret of the run (HMAC-SHA256 over a fresh nonce, in both directions), which never
crosses the wire. Beyond loopback everything after that is TLS (`labkit.training.wire.tls`). A peer that has not proved that yet gets 5 s and one of 256 slots, or of fewer where this process may open few files,
in a loop that one thread serves: strangers can neither fill memory, files and threads nor keep members out. Arrays are received straight into the buffer that they end in. Every call has a time limit: a peer that is
silent for longer is a `WireError`.

Why not `distributed.comm`: its deserialisers (pickle among them) run before a handler can check who sends, it takes
memory by the lengths that a peer claims, and importing it costs the server 40 MB.

Used by `labkit.training.server.server` (accept), `labkit.training.worker.worker` and `labkit.training.attach` (connect).
"""

import contextlib
import hmac
import json
import os
import resource
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

from labkit.errors import WireError
from labkit.runs.server_file import loopback
from labkit.training.wire import tls

MAGIC = b"labkit2\n"  # with the version of the protocol
PREFIX = struct.Struct("!IQ")
MAX_HEADER = 1 << 20
HANDSHAKE_S = 5.0  # a peer gets this long to prove that it belongs here
HANDSHAKES = 256  # how many may be under way at the same time, at most
MEMBER_S = 0.5  # a member that takes longer has a slow link: it comes again
LOOK_S = 0.5  # so often the loop of those who wait at the door looks whether it has been shut
NONCE = 32
AT_LEAST = 1 << 20  # bytes of a large body, or all of a smaller one, that have to be there before its receiver wakes up
SMALL = 1 << 14  # bytes of one that does not count

Address = tuple[str, int] | tuple[str, int, str]  # host, port and, where TLS goes, the certificate of the server (PEM)
_OPEN: "weakref.WeakSet[Connection]" = weakref.WeakSet()  # of this process


class Connection(contextlib.AbstractContextManager):
    """One end of an authenticated connection. Sending is safe from several threads, receiving from one."""

    def __init__(
        self, sock: socket.socket | tls.Encrypted, timeout: float, max_body: int, check: Callable[[dict], None] | None = None
    ) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(timeout)
        self.sock, self.max_body, self.check = sock, max_body, check
        self.received, self.came_at = 0, 0.0  # bytes; when the latest came, some of a message or all of it
        self._sending, self._wakes_at = threading.Lock(), 1
        _OPEN.add(self)
        self._held = (
            tls.RECORD if isinstance(sock, tls.Encrypted) else 0
        )  # bytes that may have come without being there for `_fill`

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
        return bool(self._held and self.sock.pending()) or bool(poll.poll(max(0.0, timeout) * 1000))

    def set_timeout(self, timeout: float) -> None:
        """How long the other side may be silent in the middle of a message, from now on."""
        with contextlib.suppress(OSError):  # closed: the next call says so
            self.sock.settimeout(timeout)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side may have been quicker
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def is_over(self) -> bool:
        """Has one side closed it, whatever is still to be read? Of the other side Linux alone tells before that."""
        if (file := self.sock.fileno()) < 0:
            return True
        ends = select.poll()
        ends.register(file, getattr(select, "POLLRDHUP", 0))
        return bool(ends.poll(0))

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
                done, self.came_at = done + got, time.monotonic()
            self._wake_at(1)
        except TimeoutError as error:
            raise WireError(f"nothing came from the other side for {self.sock.gettimeout():g} s.") from error
        except OSError as error:
            raise self._broken(f"the connection broke: {error}.") from error

    def _wake_at(self, n: int) -> int:
        """A receiver sleeps until `n` bytes are there, or the end: waking up for every packet costs more than copying it."""
        n = max(1, n - self._held)
        if n != self._wakes_at:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, n)
            self._wakes_at = n
        return n


def _close_in_child() -> None:
    """A process that a worker has forked, for loading data say, holds no connection open: its end would not be noticed when it is killed."""
    for connection in list(_OPEN):
        sock = connection.sock
        # Past the lock of `Encrypted`, which a thread that is not in this process may hold.
        plain = sock.sock if isinstance(sock, tls.Encrypted) else sock
        plain.close()


os.register_at_fork(after_in_child=_close_in_child)


def listen(host: str = "127.0.0.1") -> socket.socket:
    """A listening socket on a free port of `host`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.bind((host, 0))
    sock.listen(1024)
    return sock


def shut(listener: socket.socket) -> None:
    """Close a listening socket; a thread that waits in its `accept` gets an `OSError`."""
    with contextlib.suppress(OSError):  # macOS, where closing is enough; on Linux that alone does not wake `accept`
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


class Handshakes:
    """Peers that have not proved yet that they belong here. They all stand in one loop and take no thread.

    `slots` is how many may at the same time, by default 256 or a quarter of the files that this process may open, if that is less. When all
    are taken, or no more files can be opened, the oldest is broken off: it takes a member milliseconds.
    """

    def __init__(self, slots: int | None = None) -> None:
        self.slots = slots
        self._waiting: dict[int, _Peer] = {}  # by file descriptor, in the order in which they came

    def admitted(self, listener: socket.socket, secret: bytes) -> Iterator[socket.socket]:
        """Those who know the secret, as they prove it, until the listener is shut. Nothing that strangers or the system do ends it."""
        try:
            listener.setblocking(False)
            while listener.fileno() >= 0:
                poll = select.poll()
                poll.register(listener, select.POLLIN)
                for peer in self._waiting.values():
                    poll.register(peer.sock, select.POLLIN)
                first = next(iter(self._waiting.values()), None)
                wait = LOOK_S if first is None else min(LOOK_S, first.until - time.monotonic())
                for number, event in poll.poll(1000 * max(0.0, wait)):
                    if number in self._waiting:
                        if self._proceeds(number):
                            yield self._waiting.pop(number).sock
                    elif event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                        return
                    else:
                        self._accept(listener, secret)
                for number in [number for number, peer in self._waiting.items() if peer.until <= time.monotonic()]:
                    self._break_off(number)
        except (OSError, ValueError):  # it was shut between two of these lines
            if listener.fileno() >= 0:
                raise
        finally:
            for number in list(self._waiting):
                self._break_off(number)

    def _accept(self, listener: socket.socket, secret: bytes) -> None:
        """As many of those who wait at the door as there are slots."""
        slots = self.slots or _slots()
        for _ in range(slots):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except (OSError, MemoryError):  # no file or no memory is left for another one
                oldest = next(iter(self._waiting.items()), None)
                if oldest and oldest[1].until - time.monotonic() < HANDSHAKE_S - MEMBER_S:
                    self._break_off(oldest[0])
                else:
                    time.sleep(0.02)  # others will close theirs
                return
            while len(self._waiting) >= slots:
                self._break_off(next(iter(self._waiting)))
            try:
                self._waiting[sock.fileno()] = _Peer(sock, secret)
            except (OSError, WireError, MemoryError):
                sock.close()

    def _proceeds(self, number: int) -> bool:
        """Whether this peer has proved that it knows the secret; who never will is gone."""
        try:
            return self._waiting[number].proceed()
        except (OSError, WireError, MemoryError):
            self._break_off(number)
            return False

    def _break_off(self, number: int) -> None:
        self._waiting.pop(number).sock.close()


def _slots() -> int:
    """How many strangers this process can afford: for members, checkpoints and the record there must be files left."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return HANDSHAKES if most == resource.RLIM_INFINITY else max(4, min(HANDSHAKES, most // 4))


class _Peer:
    """The handshake with one peer, seen from the server; it never blocks."""

    def __init__(self, sock: socket.socket, secret: bytes) -> None:
        self.sock, self.secret, self.nonce = sock, secret, os.urandom(NONCE)
        self.came, self.until = bytearray(), time.monotonic() + HANDSHAKE_S
        sock.setblocking(False)
        self._send(MAGIC + self.nonce)

    def proceed(self) -> bool:
        """Read what has come; whether the peer has proved that it knows the secret, and knows now that we do."""
        try:
            part = self.sock.recv(NONCE + 32 - len(self.came))
        except BlockingIOError:
            return False
        if not part:
            raise WireError("the other side closed the connection.")
        self.came += part
        if len(self.came) < NONCE + 32:
            return False
        theirs, proof = bytes(self.came[:NONCE]), bytes(self.came[NONCE:])
        if not hmac.compare_digest(proof, _proof(self.secret, b"client", self.nonce + theirs)):
            raise WireError("a peer without the secret of this run was refused.")
        self._send(_proof(self.secret, b"server", theirs + self.nonce))
        return True

    def _send(self, some: bytes) -> None:
        if self.sock.send(some) < len(some):  # the first bytes of a connection fit into its buffer
            raise WireError("a peer that takes nothing was refused.")


def accept(
    sock: socket.socket,
    secret: bytes,
    *,
    timeout: float,
    max_body: int,
    check: Callable[[dict], None] | None = None,
    identity: tls.Identity | None = None,
) -> Connection:
    """Make one accepted socket a connection, if the peer knows the secret; otherwise `WireError` and it is closed.

    With an `identity`, which the client has to know, it is encrypted.
    """
    try:
        peer, poll = _Peer(sock, secret), select.poll()
        poll.register(sock, select.POLLIN)
        while not peer.proceed():
            if not poll.poll(1000 * max(0.0, peer.until - time.monotonic())):
                raise WireError(f"nothing came from the other side for {HANDSHAKE_S:g} s.")
        return Connection(identity.secured(sock, secret) if identity else sock, timeout, max_body, check)
    except (OSError, WireError) as error:
        sock.close()
        raise error if isinstance(error, WireError) else WireError(f"a peer broke off: {error}.") from error


def connect(
    address: Address,
    secret: bytes,
    *,
    timeout: float = 60.0,
    max_body: int = 1 << 40,
    check: Callable[[dict], None] | None = None,
) -> Connection:
    """Connect to the server of a run; both sides prove that they know `secret`, and the server that the certificate is its own."""
    host, port, *certificate = address
    if not certificate and not loopback(host):
        raise WireError(
            f"nothing is sent to {host}:{port} without TLS: its certificate is not known here. Was it started by another labkit?"
        )
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
        if certificate:
            connection = Connection(tls.secured(sock, secret, *certificate), timeout, max_body, check)
    except (OSError, WireError) as error:
        connection.close()
        raise error if isinstance(error, WireError) else WireError(f"{host}:{port} broke off: {error}.") from error
    return connection


def _proof(secret: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, role + nonces, "sha256")
