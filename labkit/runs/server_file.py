"""Does a run live, and where does its server listen: `server.json` in the run directory, for as long as the server lives.

    host, port   where it listens
    machine      the name of its machine; pid and started identify its process there, also after the number is used again
    certificate  of the server (PEM), by which its clients know it; "" where it listens on loopback, without TLS
    secret       of the run, in hex: who can read this file can control the run, so nobody but its owner can

A run lives while its directory is held (`labkit.locks`); by `server.json` where the file system has no locks. Nobody else takes,
renames, resumes or prunes it then: `hold` is the only way to a directory that is there already.

Written and removed by the server of a run; read by the handle of the run, by `attach`, by `train` and `resume`, and by `labkit.chaos`.
"""

import contextlib
import ipaddress
import json
import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit import locks
from labkit.errors import RunError, RunningError
from labkit.runs.files import write_json

FORMAT = 1
FILE = "server.json"
FIELDS = {"host": str, "port": int, "certificate": str, "machine": str, "pid": int, "started": float, "secret": bytes.fromhex}
CLOCK_S = 2.0  # by which the start time of one process may differ between two readings
ANSWER_S = 2.0  # for a connection to another machine
STARTING_S = 60.0  # without locks: so long after its directory was taken a run may be without `server.json`


def announce(path: Path, address: tuple[str, int] | tuple[str, int, str], secret: bytes) -> None:
    """Write that this process serves the run, at host, port and, with TLS, by which certificate.

    Nobody but its owner can read the file, from its first moment.
    """
    import psutil

    host, port, *certificate = address
    server = {"format": FORMAT, "host": host, "port": port, "certificate": "".join(certificate), "machine": socket.gethostname()}
    server |= {"pid": os.getpid(), "started": psutil.Process().create_time(), "secret": secret.hex()}
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
        server.setdefault("certificate", "")  # before there was TLS
        found = {name: of_type(server[name]) for name, of_type in FIELDS.items()}
        found["host"].encode("idna")
        if not (0 < found["port"] < 1 << 16 and 0 < found["pid"] < 1 << 31 and math.isfinite(found["started"])):
            raise ValueError(f"port {found['port']}, process {found['pid']}")
        found["certificate"].encode("ascii")
        return found
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise RunError(f"{file} is closed to you: only who started this run can reach it.") from error
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RunError(f"{file} is damaged: {error!r:.200}. If the run has ended, delete it.") from error


def address(server: Mapping[str, Any]) -> tuple[str, int] | tuple[str, int, str]:
    """Where the server that has announced this (`find`) listens: host, port and, with TLS, its certificate."""
    there = server["host"], server["port"]
    return (*there, server["certificate"]) if server["certificate"] else there


def alive(path: Path) -> bool | None:
    """Does a run live? None where that cannot be seen from here: another machine's loopback, another user's run."""
    if locks.held(path):
        return True
    try:
        server = find(path)
    except RunError as error:
        if isinstance(error.__cause__, PermissionError):
            return None
        raise
    if server is None:
        return _starts(Path(path))
    if server["machine"] == socket.gethostname():
        return _lives(server["pid"], server["started"])
    if loopback(server["host"]):
        return None
    with contextlib.suppress(OSError), socket.create_connection((server["host"], server["port"]), timeout=ANSWER_S):
        return True
    return False


def hold(path: Path, id: str = "") -> locks.DirectoryLock:
    """Hold a run directory that is there already, for the run with this id; `RunningError` while its run lives, or may live.

    So do runs in folders inside it, such as those of the subnets of a training.
    """
    path = Path(path)
    try:
        lock = locks.DirectoryLock(path, id) if alive(path) is False else None
    except BlockingIOError:
        lock = None
    living = (
        path if lock is None else next((it.parent for it in path.glob(f"*/**/{locks.LOCK}") if alive(it.parent) is not False), None)
    )
    if living is None:
        return lock
    if lock:
        lock.release()
    raise RunningError(_says(living))


def _says(path: Path) -> str:
    """That the run in `path` lives, and what to do."""
    server = None
    with contextlib.suppress(RunError):
        server = find(path)
    if alive(path) is None:
        file = f"delete {path / FILE}" if server else "ask who started it"
        return (
            f"run {path.name} may still be running on another machine. Look there; {file} if it is not, or choose another name=..."
        )
    where = f" (its server is process {server['pid']} on {server['machine']})" if server else ""
    return (
        f"run {path.name} is still running{where}, or is being written, in {path}. labkit.load_run({str(path)!r}).attach() follows it, "
        ".stop() then ends it; or choose another name=... If its workers are gone, it ends by itself after its join_timeout."
    )


def _starts(path: Path) -> bool:
    """Was this directory taken just now? Asked where there are no locks."""
    if locks.held(path) is None and not (path / "status.json").exists():
        with contextlib.suppress(OSError):
            return time.time() - (path / locks.LOCK).stat().st_mtime < STARTING_S
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
