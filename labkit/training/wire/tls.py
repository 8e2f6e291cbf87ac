"""TLS 1.3 between the server of a run and its clients, where the server listens beyond loopback.

    door        both prove in the clear that they know the secret (`labkit.training.wire.transport`): strangers never get to OpenSSL
    TLS         the server shows the certificate of this run, and the client takes no other one
    inside      the client proves once more that it knows the secret, to a server that nobody can stand in for: who has only passed on the
                messages of the door, and then speaks itself, is refused

The key never leaves the server's process. The certificate goes to the clients with the secret; no authority, name or date counts.
Keys of a connection are agreed on for it alone (ECDHE), so that what was recorded stays closed when the secret is known later.

OpenSSL's state of a connection must not be used by two threads at once, and here one sends while another one receives: each call is
under a lock and does not block; waiting, for the peer or a time limit, is outside it.

Used by `labkit.training.wire.transport` and `labkit.training.server.server`.
"""

import contextlib
import hmac
import select
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from labkit.errors import WireError
from labkit.training.wire import certificate

HANDSHAKE_S = 5.0  # for each of the two sides
PIECE = 1 << 18  # bytes that one call encrypts or decrypts at most: as long another thread waits
RECORD = (1 << 14) + 256 + 5  # bytes of the longest record: of one that is not whole yet OpenSSL holds less (RFC 8446, 5.2)


class Identity:
    """Of the server of a run: a key and a certificate of its own. `certificate` (PEM) is what clients know it by."""

    def __init__(self) -> None:
        key, self.certificate = certificate.made()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.num_tickets = 0  # nobody resumes a session
        with tempfile.TemporaryDirectory() as folder:  # readable by this user alone; `ssl` reads keys from files only
            file = Path(folder) / "server.pem"
            file.write_text(key + self.certificate)
            self._context.load_cert_chain(file)

    def secured(self, sock: socket.socket, secret: bytes) -> "Encrypted":
        """The server's side of a connection whose peer has passed the door. `WireError`, and the socket is closed, if it fails here."""
        sock.settimeout(HANDSHAKE_S)
        try:
            made = Encrypted(self._context.wrap_socket(sock, server_side=True), HANDSHAKE_S)
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            sock.close()
            raise WireError(f"a peer made no TLS connection: {_reason(error)}.") from error
        try:
            if not hmac.compare_digest(made.read(32, time.monotonic() + HANDSHAKE_S), _proof(secret, self.certificate)):
                raise WireError("a peer that did not prove inside TLS that it knows the secret of this run was refused.")
        except OSError as error:
            made.close()
            raise WireError(f"a peer broke off: {error}.") from error
        except WireError:
            made.close()
            raise
        return made


def secured(sock: socket.socket, secret: bytes, certificate: str) -> "Encrypted":
    """The client's side: TLS with the server that has this certificate (PEM), and with no other.

    Raises `WireError` where another one is shown, else `OSError`; the socket is closed then.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # this certificate is the only one that is trusted, whatever name a client reaches it by
    context.load_verify_locations(cadata=certificate)
    sock.settimeout(HANDSHAKE_S)
    try:
        made = Encrypted(context.wrap_socket(sock), HANDSHAKE_S)
    except ssl.SSLCertVerificationError as error:
        why = "what answers has another certificate than the server of this run: somebody stands in between, or has taken its port."
        raise WireError(why) from error
    except OSError as error:
        sock.close()
        raise ConnectionError(f"no TLS connection could be made: {_reason(error)}") from error
    try:
        made.send(memoryview(_proof(secret, certificate)))  # the first bytes of a connection fit into its buffer
    except OSError:
        made.close()
        raise
    return made


class Encrypted:
    """A socket over which TLS goes. Its methods are those of a plain one that `transport.Connection` calls.

    It may be closed by any thread: who is inside a call then gets an `OSError`.
    """

    def __init__(self, sock: ssl.SSLSocket, timeout: float) -> None:
        self.sock, self._timeout, self._lock = sock, timeout, threading.Lock()
        sock.setblocking(False)
        self.fileno, self.setsockopt = sock.fileno, sock.setsockopt

    def send(self, view: memoryview) -> int:
        """Send the beginning of it; returns how many bytes. The next call must be with what is left."""
        return self._call(lambda: self.sock.send(view[:PIECE]))

    def recv_into(self, view: memoryview) -> int:
        """Receive what is there, and at least something; returns how many bytes, 0 at the end."""

        def read() -> int:
            done, most = 0, min(len(view), PIECE)
            try:
                while done < most and (got := self.sock.recv_into(view[done:most])):  # a record each time
                    done += got
            except ssl.SSLWantReadError:
                if not done:
                    raise
            return done

        return self._call(read)

    def read(self, n: int, until: float) -> bytes:
        """n bytes, by this time (`time.monotonic`)."""
        buffer, done = bytearray(n), 0
        while done < n:
            self._timeout = max(0.0, until - time.monotonic())
            got = self.recv_into(memoryview(buffer)[done:])
            if not got:
                raise ConnectionError("the other side closed the connection")
            done += got
        return bytes(buffer)

    def pending(self) -> int:
        """How many bytes have been decrypted and not received yet."""
        with self._lock:
            return self.sock.pending()

    def settimeout(self, timeout: float) -> None:
        self._timeout = timeout

    def gettimeout(self) -> float:
        return self._timeout

    def shutdown(self, how: int) -> None:
        """Nothing more goes over this connection. Both sides see it; what `ssl` does besides would make a plain socket of it."""
        socket.socket.shutdown(self.sock, how)

    def close(self) -> None:
        with self._lock:
            self.sock.close()

    def _call(self, what: Callable[[], int]) -> int:
        """Until it has succeeded; `TimeoutError` when the other side neither sends nor takes anything for so long."""
        while True:
            try:
                with self._lock:
                    return what()
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
            except ssl.SSLError as error:
                raise ConnectionError(_reason(error)) from error

    def _wait(self, event: int) -> None:
        poll = select.poll()
        with contextlib.suppress(ValueError):  # closed: the next call says so
            poll.register(self.sock, event)
            if not poll.poll(1000 * self._timeout):
                raise TimeoutError("timed out")


def _proof(secret: bytes, certificate: str) -> bytes:
    return hmac.digest(secret, b"inside" + certificate.encode(), "sha256")


def _reason(error: Exception) -> str:
    """What OpenSSL says, in words."""
    reason = getattr(error, "reason", None)
    if isinstance(error, TimeoutError) or not reason:
        return str(error)
    if isinstance(error, ssl.SSLEOFError):
        return "the other side closed the connection"
    return f"what came is not what was sent: it was changed on the way, or is no TLS ({reason.lower().replace('_', ' ')})"
