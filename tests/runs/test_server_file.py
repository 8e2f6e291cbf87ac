"""Who serves a run: nobody else can read where and how, and a server that is gone is not taken for alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.errors import RunError
from labkit.runs import server_file
from labkit.runs.files import replacing, write_json

SECRET = b"s" * 32


@pytest.fixture
def announced(tmp_path):
    """A run directory whose server is this process; `change(key=value)` edits what it says."""
    server_file.announce(tmp_path, ("127.0.0.1", 4321), SECRET)

    def change(**fields):
        file = tmp_path / server_file.FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        return tmp_path

    return change


def test_what_is_announced_is_found_until_it_is_withdrawn(tmp_path):
    assert server_file.find(tmp_path) is None and server_file.alive(tmp_path) is False
    server_file.announce(tmp_path, ("127.0.0.1", 4321), SECRET)
    server = server_file.find(tmp_path)
    assert (server["host"], server["port"], server["secret"], server["pid"]) == ("127.0.0.1", 4321, SECRET, os.getpid())
    assert server_file.alive(tmp_path) is True
    server_file.withdraw(tmp_path)
    server_file.withdraw(tmp_path)
    assert server_file.find(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_the_secret_is_closed_to_others_from_the_first_moment(tmp_path):
    mask = os.umask(0)
    try:
        (tmp_path / server_file.FILE).touch(0o666)  # also in place of one that was open
        with replacing(tmp_path / "draft", mode=0o600) as file:
            assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
        server_file.announce(tmp_path, ("127.0.0.1", 4321), SECRET)
        assert (tmp_path / server_file.FILE).stat().st_mode & 0o777 == 0o600
        write_json(tmp_path / "config.json", {})
        assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o666  # the others as before
    finally:
        os.umask(mask)


def test_a_process_that_has_ended_or_only_bears_the_number_is_not_alive(announced):
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        process.stdout.read()  # ended, and nobody has waited for it
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        import psutil

        started = psutil.Process(process.pid).create_time()
        assert server_file.alive(announced(pid=process.pid, started=started)) is False
    assert server_file.alive(announced()) is False
    assert server_file.alive(announced(pid=os.getpid(), started=started - 100)) is False


def test_another_machine_is_asked_at_its_port_unless_it_listens_to_itself_alone(announced, monkeypatch):
    assert server_file.alive(announced(machine="elsewhere")) is None
    monkeypatch.setattr(server_file, "loopback", lambda host: False)  # as if it were an address of that machine
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert server_file.alive(announced(port=listener.getsockname()[1])) is True
    assert server_file.alive(announced()) is False


def test_loopback_is_distinct_from_other_addresses():
    hosts = ["127.0.0.1", "127.8.8.8", "::1", "localhost", "10.0.0.1", "node7"]
    assert [server_file.loopback(host) for host in hosts] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"format": 1, "host": "x", "port": "y"}', '{"format": "a"}', "[" * 5000]
)
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    (tmp_path / server_file.FILE).write_text(text)
    for look in (server_file.find, server_file.alive):
        with pytest.raises(RunError, match=r"server\.json is damaged: .*If the run has ended, delete it"):
            look(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 0},
        {"port": 70_000},
        {"port": float("inf")},
        {"pid": 2**70},
        {"pid": -1},
        {"started": float("nan")},
        {"host": "a" * 300},
        {"certificate": "-----BEGIN CERTIFICATE-----\u00e9"},
    ],
)
def test_an_address_or_a_process_that_cannot_be_is_refused(announced, fields):
    with pytest.raises(RunError, match=r"server\.json is damaged: "):
        server_file.alive(announced(**fields))


def test_a_later_format_is_refused(announced):
    with pytest.raises(RunError, match=r"server\.json was written by a later labkit"):
        server_file.find(announced(format=2))


def test_another_user_s_run_is_seen_but_not_reached(announced, monkeypatch):
    path = announced()

    def closed(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", closed)
    assert server_file.alive(path) is None
    with pytest.raises(RunError, match=r"server\.json is closed to you: only who started this run can reach it"):
        server_file.find(path)
