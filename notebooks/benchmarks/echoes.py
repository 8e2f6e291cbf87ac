"""Echoes between two processes of this machine: a vector goes there, and comes back when all of it was there.

    raw     sendall and recv_into on plain sockets, nothing else
    timed   the same on sockets that have a time limit, as every socket of labkit does: Python then polls before each call
    wire    labkit's messages, proofs and limits

Run as a script this is the other side, which imports no more than it needs. Used by `sleepers`.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np

from labkit.errors import WireError
from labkit.training.wire import transport

SECRET = b"echo" * 8
KINDS = ("raw", "timed", "wire")
TIMEOUT_S = 600.0  # for every wait


@contextlib.contextmanager
def echo(kind: str, vector: np.ndarray, buffer: np.ndarray) -> Iterator[Callable[[], None]]:
    """A function that sends `vector` to a process of its own and gets it back into `buffer`."""
    there, here = (memoryview(array).cast("B") for array in (vector, buffer))
    process = subprocess.Popen([sys.executable, __file__, kind, str(there.nbytes)], stdout=subprocess.PIPE)
    try:
        address = "127.0.0.1", int(process.stdout.readline())
        if kind == "wire":
            with transport.connect(address, SECRET, timeout=TIMEOUT_S) as connection:
                yield lambda: (connection.send({"op": "push"}, there), connection.receive(lambda header, n: [here]))
        else:
            with socket.create_connection(address) as sock:
                plain(sock, kind)
                yield lambda: (sock.sendall(there), fill(sock, here))
        process.wait(TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def plain(sock: socket.socket, kind: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(TIMEOUT_S if kind == "timed" else None)


def fill(sock: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        got = sock.recv_into(view[done:])
        if not got:
            raise EOFError
        done += got


def other_side(kind: str, n_bytes: int) -> None:
    """Send back what comes, until nothing comes any more."""
    view, listener = memoryview(bytearray(n_bytes)), transport.listen()
    print(listener.getsockname()[1], flush=True)
    sock, _ = listener.accept()
    with contextlib.suppress(EOFError, WireError):
        if kind == "wire":
            connection = transport.accept(sock, SECRET, timeout=TIMEOUT_S, max_body=n_bytes)
            while True:
                connection.receive(lambda header, n: [view])
                connection.send({"op": "grant"}, view)
        plain(sock, kind)
        while True:
            fill(sock, view)
            sock.sendall(view)


if __name__ == "__main__":
    other_side(sys.argv[1], int(sys.argv[2]))
