"""Whoever speaks at the server's port, with or without the secret: the run goes on as if nobody had.

The messages are made from valid ones by chance with a seed: bits flipped, ends cut off, lengths that lie, values of another type.
Those that are still valid and that a server must obey (a worker that joins, a request to stop) are left out.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

import labkit
from labkit.errors import WireError
from labkit.runs import checkpoints
from labkit.training import supervisor
from labkit.training.wire import transport
from labkit.training.wire.protocol import check_request
from labkit.updates import SGWU
from tests.training.server.test_server import SECRET, SIZE, Client, ask, events, join, serving, spec, until

# -- messages that nobody meant ----------------------------------------------------------------------------------------

BODY = 16
PUSH = {"op": "push", "version": 0, "samples": 8, "score": 0.5, "loss": 1.0}
PUSH |= {"compute_s": 0.1, "score_s": 0.01, "wait_s": 0.0, "send_s": 0.0}
MEANT = [
    {"op": "join", "worker": 0, "seconds_per_sample": 0.01, "about": "pid 1"},
    {"op": "watch"},
    {"op": "status"},
    {"op": "stop", "state": "stopped", "reason": "enough"},
    {"op": "heartbeat", "samples": 3, "loss": 0.7},
    PUSH,
    {"op": "regroup", "reason": "no luck"},
    {"op": "drop", "workers": [0, 1]},
    {"op": "fail", "reason": "no luck"},
    {"op": "leave"},
]
VALUES = [
    "x",
    "",
    None,
    True,
    -1,
    0,
    1.5,
    [],
    {},
    [0],
    {"op": "join"},
    2**63,
    -(2**70),
    10**400,
    float("nan"),
    float("inf"),
    "\ud800",
]


def packed(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return transport.PREFIX.pack(len(text), len(body)) + text + body


def flipped(data, chance):
    data = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def mutant(chance):
    """One message, or what is left of it."""
    header = dict(chance.choice(MEANT))
    body = bytes(chance.choice([0, 0, BODY, 3]))
    way = chance.randrange(8)
    if way == 0:
        return flipped(packed(header, body), chance)
    if way == 1:
        data = packed(header, body)
        return data[: chance.randrange(len(data))]
    if way == 2:  # lengths that lie
        lengths = [chance.choice([0, 1, 7, 200, 1 << 20, (1 << 32) - 1]), chance.choice([0, 3, 1 << 20, 1 << 40, (1 << 64) - 1])]
        return transport.PREFIX.pack(*lengths) + packed(header, body)[transport.PREFIX.size :]
    if way == 3:
        depth = chance.choice([10, 900, 5_000, 100_000])
        return packed(chance.choice([b"[" * depth, b'{"op":' * depth, b'{"op":"push","x":' + b"[" * depth + b"]" * depth + b"}"]))
    if way == 4:
        return packed(
            chance.choice([b"", b"null", b"[]", b'"op"', b"{}", b'{"op":1}', b'{"op":["join"]}', b"\xff\xfe", b"9" * 5000])
        )
    if way == 5:
        del header[chance.choice(list(header))]
        return packed(header, body)
    for _ in range(chance.randint(1, 3)):  # values that are not meant
        header[chance.choice(list(header))] = chance.choice(VALUES)
    return packed(header, body)


def obeyed(data):
    """Would a server have to do as this message says?"""
    try:
        n, _ = transport.PREFIX.unpack_from(data)
        header = json.loads(data[transport.PREFIX.size : transport.PREFIX.size + n])
        check_request(header)
    except Exception:  # no message at all
        return False
    return header["op"] in ("join", "stop", "expect", "drop")


def throw(address, secret, chance):
    """Connect, say something that was not meant, and stay until the server hangs up."""
    with socket.create_connection(address, timeout=100) as sock:
        hello = b""
        while len(hello) < len(transport.MAGIC) + transport.NONCE:
            hello += sock.recv(100)
        theirs, mine = hello[len(transport.MAGIC) :], chance.randbytes(transport.NONCE)
        proof = mine + transport._proof(secret, b"client", theirs + mine)
        try:
            if chance.random() < 0.4:  # a stranger
                answers = [
                    flipped(proof, chance),
                    proof[: chance.randrange(64)],
                    chance.randbytes(chance.randrange(300)),
                    mutant(chance),
                ]
                sock.sendall(chance.choice(answers))
            else:  # somebody with the secret
                said = mutant(chance)
                while obeyed(said):
                    said = mutant(chance)
                sock.sendall(proof + chance.choice([b"", packed({"op": "watch"})]) + said)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except TimeoutError:
            pytest.fail("the server does not hang up")
        except OSError:  # it has hung up already, without reading the rest
            pass


# -- a run that goes on ------------------------------------------------------------------------------------------------


class Pace:
    """Holds the run back, so that it is under way for as long as messages are thrown."""

    def __init__(self):
        self.changed, self.thrown, self.wanted = threading.Condition(), 0, 0

    def wait(self, share):
        with self.changed:
            assert self.changed.wait_for(lambda: self.thrown >= share * self.wanted, timeout=500)

    def count(self):
        with self.changed:
            self.thrown += 1
            self.changed.notify_all()


PACE = Pace()


class Paced(labkit.Classifier):
    def step(self, module, batch, optimisers, clock):
        PACE.wait(min(1.0, 1.1 * clock.samples / clock.total))  # the last steps wait for the last message
        return super().step(module, batch, optimisers, clock)


@pytest.mark.parametrize("n", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])])
def test_a_run_is_not_disturbed_by_mutated_messages(n, tmp_path, cache):
    PACE.thrown = PACE.wanted = 0
    problem = Paced(model="lenet", data="digits", train_samples=320, test_samples=60, score_samples=60, batch_size=16)
    settings = {"update": "sgwu", "partition": "udpa", "passes": 3, "local_steps": 2, "checkpoints": 1, "runs": tmp_path}
    settings["heartbeat_timeout"] = 60.0  # a worker is a thread of the process that throws
    with labkit.connect("threads", 2) as lab:
        quiet = labkit.train(problem, lab, name="quiet", **settings).wait(timeout=110)
        PACE.wanted = n
        run = labkit.train(problem, lab, name="disturbed", **settings)
        try:
            until(lambda: run.status().get("started"))
            address, secret, server = run._follower.address, run._follower.spec.secret, psutil.Process(run._follower.server.pid)
            threads, sizes = server.num_threads(), []

            def attack(number):
                throw(address, secret, random.Random(number))
                if number % (n // 5) == 0:
                    sizes.append(server.memory_info().rss)
                PACE.count()

            with ThreadPoolExecutor(4) as pool:
                thrown = [pool.submit(attack, number) for number in range(n - 1)]
            [attempt.result() for attempt in thrown]
            until(lambda: server.num_threads() <= threads + 1)  # the kernel's question may come again
            assert run.state == "running"
            attack(n - 1)
            run.wait(timeout=110)
        finally:
            PACE.wanted = 0
            run.stop()
    assert run.state == "done", run.summary()
    for name, weights in quiet.weights().items():
        np.testing.assert_array_equal(run.weights()[name], weights)
    assert sorted(run.events[run.events.kind == "join"].worker) == [0, 1] and not (run.events.kind == "error").any()
    assert max(sizes) - sizes[1] < 8e6, sizes  # the first one is from before each thread had its first piece of memory
    assert (run.path / "server.log").read_text() == ""


# -- members that are mistaken -----------------------------------------------------------------------------------------

MISTAKES = {
    "no fields": {"op": "push"},
    "text for a number": PUSH | {"compute_s": "x"},
    "a list for a number": PUSH | {"samples": [9]},
    "half a number": PUSH | {"version": 0.5},
    "infinite seconds": PUSH | {"score_s": float("inf")},
    "a huge number": PUSH | {"send_s": 10**400},
    "text for a reason": {"op": "regroup", "reason": [1]},
    "a heartbeat of NaN": {"op": "heartbeat", "samples": float("nan"), "loss": 0.1},
    "a failure without a reason": {"op": "fail"},
    "an unknown word": {"op": "pull"},
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistaken_member_is_taken_out_and_the_others_go_on(what, tmp_path):
    with serving(spec(tmp_path, SGWU())) as (server, result, thread):
        mistaken, other = join(server, 0, 1)
        other.push()
        mistaken.connection.send(MISTAKES[what], memoryview(mistaken.weights))
        other.pull()
        assert other.message["op"] == "grant"
        other.train()
        thread.join(60)
    assert (result["state"], result["samples"]) == ("done", 34)
    (left,) = events(server, "leave").query("worker == 0").message
    assert what == "an unknown word" or "message was refused: '" in left
    assert events(server, "push").worker.tolist() == [1] * len(events(server, "push"))


@pytest.mark.parametrize("mistake", [{"worker": "x"}, {"worker": None}, {"seconds_per_sample": "x"}, {"about": [1]}])
def test_a_mistaken_join_is_no_join(mistake, tmp_path):
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        with transport.connect(server.address, SECRET, timeout=60) as connection:
            connection.send({"op": "join", "worker": 0, **mistake})
            with pytest.raises(WireError):
                connection.receive()
        (worker,) = join(server, 0)
        worker.train()
        thread.join(60)
    assert result["state"] == "done" and len(events(server, "join")) == 1


def test_a_request_to_stop_in_an_unknown_way_is_refused(tmp_path):
    with serving(spec(tmp_path, workers=(0,))) as (server, result, thread):
        (worker,) = join(server, 0)
        with pytest.raises(WireError):
            ask(server, op="stop", state="running")
        worker.train()
        thread.join(60)
    assert result["state"] == "done"


# -- strangers who take their time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [transport.HANDSHAKES, 20])
def test_two_hundred_slow_strangers_delay_nobody(slots, tmp_path, monkeypatch):
    """One byte a second from each; also when there are more of them than slots, and when none is dropped for being slow."""
    monkeypatch.setattr(transport, "HANDSHAKE_S", 60.0)
    with serving(spec(tmp_path), lambda server: setattr(server.handshakes, "slots", slots)) as (server, result, thread):
        before = threading.active_count()
        strangers = [socket.create_connection(server.address, timeout=60) for _ in range(200)]
        drip(strangers)
        begun = time.monotonic()
        clients = join(server, 0, 1)
        joined, begun = time.monotonic() - begun, time.monotonic()
        drip(strangers)
        threads = [threading.Thread(target=client.train) for client in clients]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        trained = time.monotonic() - begun
        thread.join(60)
        assert joined < 30 and trained < 30, (joined, trained)  # of a minute that a stranger has
        until(lambda: threading.active_count() - before <= 5)
        for stranger in strangers:
            stranger.close()
        until(lambda: threading.active_count() <= before)
    assert result["state"] == "done"


class Flood:
    """Strangers from a thread, who come again as soon as they are broken off."""

    def __init__(self, address, n):
        self.address, self.n, self.came, self.over = address, n, 0, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        until(lambda: self.came >= self.n)
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(60)

    def run(self):
        strangers = []
        while not self.over.is_set():
            while len(strangers) < self.n:
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(self.address)
                strangers.append(sock)
                self.came += 1
            for sock in list(strangers):
                try:
                    gone = not sock.recv(1000)
                except BlockingIOError:
                    gone = False
                except OSError:
                    gone = True
                if gone:
                    strangers.remove(sock)
                    sock.close()
            self.over.wait(0.01)
        for sock in strangers:
            sock.close()


def test_a_server_that_may_open_few_files_serves_its_members_under_a_flood(tmp_path):
    process, address = supervisor._start_server(spec(tmp_path, budget=17 * 40, checkpoints=10), tmp_path)
    try:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
        with Flood(address, 300) as flood:
            clients = [at_last(partial(Client, address, index)) for index in (0, 1)]
            for client in clients:
                client.pull()
            came = flood.came
            until(lambda: flood.came > came + 200)  # they are broken off and come again
            assert len(os.listdir(f"/proc/{process.pid}/fd")) < 256
            threads = [threading.Thread(target=client.train) for client in clients]
            [thread.start() for thread in threads]
            [thread.join(60) for thread in threads]
            assert process.wait(60) == 0
            last = json.loads(supervisor._end(process))
    finally:
        supervisor._end(process)
    assert last["state"] == "done" and checkpoints.versions(tmp_path)[-1] == last["version"]


@contextmanager
def few_tasks(process, most):
    """A process that may have so many threads, its own and those of its children: by a cgroup of version 2 or 1. It is skipped where neither can be."""
    whys = []
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/pids")):
        group = root / f"labkit-tests-{os.getpid()}"
        try:
            group.mkdir()
        except OSError as error:
            whys.append(str(error))
            continue
        try:
            for file, value in (("pids.max", most), ("cgroup.procs", process.pid)):
                with (group / file).open("r+") as there:
                    there.write(str(value))
        except OSError as error:  # no such controller here, or not ours
            whys.append(str(error))
            group.rmdir()
            continue
        try:
            yield group
        finally:
            process.kill()  # a group with a process cannot be removed
            process.wait()
            group.rmdir()
        return
    pytest.skip(f"no cgroup can be made here: {'; '.join(whys)}")


@contextmanager
def few_processes_of_a_user(process, most):
    """The same by RLIMIT_NPROC, which counts the threads of a user: one of its own, since root has no limit."""
    resource.prlimit(process.pid, resource.RLIMIT_NPROC, (most, most))
    yield None


def at_last(connect):
    """As workers do: one that the flood has pushed out comes again."""
    for _ in range(200):
        with suppress(WireError):
            return connect()
    return connect()


OTHER_USER = 54321


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="cgroups and prlimit() are Linux's")
@pytest.mark.parametrize("limit", [few_tasks, few_processes_of_a_user])
def test_a_server_with_few_files_and_threads_serves_forty_members_under_a_flood(limit, tmp_path, monkeypatch):
    """ulimit -n 256 and pids.max=60: members join, push and checkpoint; a thread more than that cannot be started."""
    readable = False
    if limit is few_processes_of_a_user:
        with suppress(OSError):  # PermissionError: the Python of this environment is not for others to read
            readable = os.getuid() == 0 and not subprocess.call([sys.executable, "-c", "import labkit"], user=OTHER_USER)
        if not readable:
            pytest.skip("needs root, and a Python that other users can read")
        popen = partial(subprocess.Popen, user=OTHER_USER)
        monkeypatch.setattr(supervisor, "subprocess", SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE))
        tmp_path = Path(tempfile.mkdtemp())  # pytest's own are nobody else's
        os.chown(tmp_path, OTHER_USER, -1)
    members = range(40)
    process, address = supervisor._start_server(
        spec(tmp_path, workers=members, n_train=80, budget=960, checkpoints=20, heartbeat_timeout=60.0), tmp_path
    )
    try:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
        with limit(process, 60) as group, Flood(address, 300) as flood:
            clients = [at_last(partial(Client, address, index)) for index in members]
            for client in clients:
                client.pull()
            came = flood.came
            until(lambda: flood.came > came + 200)
            threads = int((group / "pids.current").read_text()) if group else psutil.Process(process.pid).num_threads()
            assert len(members) < threads <= 60 and len(os.listdir(f"/proc/{process.pid}/fd")) < 256
            watchers = [
                at_last(partial(transport.connect, address, SECRET, timeout=60)) for _ in range(60 - threads + 1)
            ]  # one has no thread
            for watcher in watchers:
                watcher.send({"op": "watch"})
            threads = [threading.Thread(target=client.train) for client in clients]
            [thread.start() for thread in threads]
            [thread.join(60) for thread in threads]
            for watcher in watchers:
                watcher.close()
            assert process.wait(60) == 0
            last = json.loads(supervisor._end(process))
    finally:
        supervisor._end(process)
    assert last["state"] == "done" and last["samples"] == 960
    # How many there are depends on the disk: one that is due waits until the one before is saved.
    assert {0, last["version"]} <= set(checkpoints.versions(tmp_path))
    if limit is few_processes_of_a_user:
        shutil.rmtree(tmp_path)


def test_a_process_that_can_start_no_thread_goes_on_when_it_can(tmp_path, monkeypatch):
    """Of three members one begins while no thread can be started; another one's end makes room for it."""
    start, refused = threading.Thread.start, []

    def limited(thread):
        target = getattr(thread, "_args", ((),))
        if room[0] <= 0 and target and getattr(target[0], "__name__", "") in ("_serve_peer", "_notify"):
            refused.append(target[0].__name__)
            raise RuntimeError("can't start new thread")
        start(thread)

    room = [1]
    monkeypatch.setattr(threading.Thread, "start", limited)
    with serving(spec(tmp_path, workers=(0, 1), budget=17 * 6)) as (server, result, thread):
        first = Client(server.address, 0)
        server.clients.append(first)
        until(lambda: 0 in server.connections)
        room[0] = 0
        second = Client(server.address, 1)
        server.clients.append(second)
        until(lambda: refused.count("_serve_peer") > 3)
        room[0] = 1
        assert first.pull()["op"] == second.pull()["op"] == "grant"
        room[0] = 0
        for client in (first, second) * 2:
            client.push()
            client.pull()
        with server.lock:
            server.stop("stopped", "enough")
        while first.message["op"] == "grant":
            first.pull()
        assert "_notify" in refused and first.message == {"op": "stop", "reason": "enough", "wait_s": 0.0}
        for client in (first, second):
            client.leave()
        thread.join(60)
    assert result["state"] == "stopped" and "traceback" not in result


def drip(strangers):
    for stranger in strangers:
        try:
            stranger.send(b"x")
        except OSError:  # dropped already
            continue


def test_a_slow_member_delays_nobody(tmp_path):
    """The secret is known, but the message never ends."""
    with (
        serving(spec(tmp_path, workers=(0,))) as (server, result, thread),
        transport.connect(server.address, SECRET, timeout=60) as slow,
    ):
        slow.sock.sendall(transport.PREFIX.pack(100, 4 * SIZE) + b"{")
        (worker,) = join(server, 0)
        worker.train()
        thread.join(60)
    assert result["state"] == "done"


# -- what is promised --------------------------------------------------------------------------------------------------


def test_each_promise_of_security_md_names_the_tests_that_hold_it():
    root = Path(__file__).parent.parent
    section = (root / "SECURITY.md").read_text().split("## What is promised")[1].split("**Not protected:**")[0]
    promises = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^\*\*|\Z)", section, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in promises] == list(range(1, len(promises) + 1)) and len(promises) > 20
    for number, text in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
        assert named, f"promise {number} names no test: {text}"
        for path, name in named:
            functions = {node.name for node in ast.walk(ast.parse((root / path).read_text())) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"promise {number}: {path} has no {name}"
