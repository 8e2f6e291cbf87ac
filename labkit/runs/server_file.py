"""Is a run alive, and where does its server listen: `server.json` in the run directory, for as long as the server lives.

    host, port   where it listens
    machine      the name of its machine; pid and started identify its process there, also after the number is used again
    secret       of the run, in hex: who can read this file can control the run, so nobody but its owner can

Written and removed by the server of a run; read by the handle of the run, by `attach`, by `resume` and by `labkit.chaos`.
"""

import contextlib
import ipaddress
import json
import os
import socket
from pathlib import Path

from labkit.errors import RunError
from labkit.runs.files import write_json

FORMAT = 1
FILE = "server.json"
FIELDS = {"host": str, "port": int, "machine": str, "pid": int, "started": float, "secret": bytes.fromhex}
CLOCK_S = 2.0  # by which the start time of one process may differ between two readings
ANSWER_S = 2.0  # for a connection to another machine


def announce(path: Path, address: tuple[str, int], secret: bytes) -> None:
    """Write that this process serves the run; nobody but its owner can read the file, from its first moment."""
    import psutil

    host, port = address
    server = {"format": FORMAT, "host": host, "port": port, "machine": socket.gethostname(), "pid": os.getpid()}
    server |= {"started": psutil.Process().create_time(), "secret": secret.hex()}
    write_json(Path(path) / FILE, server, mode=0o600)


def withdraw(path: Path) -> None:
    """The run has ended. Twice is fine."""
    (Path(path) / FILE).unlink(missing_ok=True)


def find(path: Path) -> dict | None:
    """What the server of a run has announced (`secret` as bytes); None where there is nothing. It may be dead (`alive`)."""
    file = Path(path) / FILE
    try:
        server = json.loads(file.read_text(encoding="utf-8"))
        if server["format"] > FORMAT:
            raise RunError(f"{file} was written by a later labkit. Update labkit to reach this run.")
        return {name: of_type(server[name]) for name, of_type in FIELDS.items()}
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise RunError(f"{file} is closed to you: only who started this run can reach it.") from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{file} is damaged: {error!r}. If the run has ended, delete it.") from error


def alive(path: Path) -> bool | None:
    """Does the server of a run live? None where that cannot be seen from here: another machine's loopback, another user's run."""
    try:
        server = find(path)
    except RunError as error:
        if isinstance(error.__cause__, PermissionError):
            return None
        raise
    if server is None:
        return False
    if server["machine"] == socket.gethostname():
        return _lives(server["pid"], server["started"])
    if loopback(server["host"]):
        return None
    with contextlib.suppress(OSError), socket.create_connection((server["host"], server["port"]), timeout=ANSWER_S):
        return True
    return False


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _lives(pid: int, started: float) -> bool:
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < CLOCK_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
