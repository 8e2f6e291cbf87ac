"""A run is followed and stopped from another kernel, and says clearly why it cannot be."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import labkit
from labkit.errors import RunError
from labkit.locks import DirectoryLock
from labkit.partition import UDPA
from labkit.runs import server_file
from labkit.runs.checkpoints import Layout
from labkit.training import attach
from labkit.training.server.server import Server, ServerSpec
from labkit.training.wire import transport
from labkit.updates import AGWU
from tests.helpers import settings, until

SECRET, SIZE = b"s" * 32, 5
CONFIG = settings([0], name="far", join_timeout=60.0, heartbeat_timeout=60.0)


def spec(path):
    return ServerSpec(
        config=CONFIG,
        path=str(path),
        secret=SECRET,
        update=AGWU(),
        partition=UDPA(),
        weights=np.zeros(SIZE, np.float32),
        layout=Layout((), (), SIZE, 0),
    )


@contextmanager
def going(path, host="127.0.0.1"):
    """A run whose server is in a thread here and announces itself, as the process of a real one does."""
    CONFIG.save(path)
    server = Server(replace(spec(path), host=host))
    server_file.announce(path, server.address, SECRET)

    def serve():
        server.serve()
        server_file.withdraw(path)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server
    finally:
        with server.lock:
            server.stop("stopped", "the test is over")
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def train(server):
    """The one worker of the run, to the end."""
    weights = np.empty(SIZE, np.float32)
    with transport.connect(server.address, SECRET, timeout=60) as connection:
        connection.send({"op": "join", "worker": 0, "seconds_per_sample": 0.01})
        while True:
            header, _ = connection.receive(lambda header, n: [memoryview(weights), bytearray(n - weights.nbytes)])
            if header["op"] == "stop":
                return connection.send({"op": "leave"})
            if header["op"] == "grant":
                push = {"op": "push", "version": header["version"], "samples": header["samples"], "score": 0.5, "loss": 1.0}
                push |= dict.fromkeys(("compute_s", "score_s", "wait_s", "send_s"), 0.01)
                connection.send(push, memoryview(weights + np.float32(1)))


def test_a_run_that_goes_elsewhere_is_followed_to_its_end(tmp_path):
    with going(tmp_path) as server:
        run = labkit.load_run(tmp_path)
        assert run.state == "running" and run.status() == {"state": "running", "reason": ""}
        for steer in (run.wait, run.stop, run.progress):
            with pytest.raises(RunError, match=r"run far is running in another kernel\. Call run\.attach\(\) first"):
                steer()
        assert run.attach() is run and run.attach() is run
        status = run.status()
        assert (status["state"], status["samples"], status["budget"], status["started"]) == ("running", 0, 34, False)
        with pytest.raises(RunError, match="run far is still running after"):
            run.wait(0.3)
        train(server)
        run.wait(60)
        assert run.state == "done" and run.status()["samples"] == 34 and "done" in repr(run)
        assert labkit.load_run(tmp_path).state == "done" and run.events.query("kind == 'merge'").samples.sum() == 34
        run.stop()  # it has ended: fine
    assert (tmp_path / server_file.FILE).exists() is False


def test_waiting_ends_when_its_kernel_has_measured_the_curve(tmp_path, monkeypatch):
    asleep = []
    with going(tmp_path) as server:
        lock = DirectoryLock(tmp_path, CONFIG.id)
        run = labkit.load_run(tmp_path).attach()
        train(server)
        until(lambda: run.state == "done")

        def sleep(seconds):
            asleep.append(run.being_measured)
            lock.release()

        monkeypatch.setattr(attach, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        run.wait(60)
    assert asleep == [True] and not run.being_measured


def test_it_is_stopped_from_afar(tmp_path):
    with going(tmp_path):
        run = labkit.load_run(tmp_path).attach()
        assert run.stop(60) is run and run.state == "stopped"
        run.stop()
        run.wait()
    with pytest.raises(RunError, match="run far is not running any more, it is stopped"):
        labkit.load_run(tmp_path).attach()


def test_progress_shows_a_run_that_goes_elsewhere(tmp_path, capsys):
    with going(tmp_path) as server:
        run = labkit.load_run(tmp_path).attach()
        worker = threading.Thread(target=train, args=(server,))
        worker.start()
        run.progress()
        worker.join(60)
    assert "AGWU + UDPA: 100%, 34 of 34 samples" in capsys.readouterr().out


def test_a_server_that_dies_is_noticed(tmp_path, monkeypatch):
    with going(tmp_path):
        run = labkit.load_run(tmp_path).attach()
        monkeypatch.setattr(server_file, "_lives", lambda pid, started: False)  # killed
        until(lambda: run.state == "failed")
        with pytest.raises(RunError, match=r"run far failed: cut off; labkit\.resume\(.*\) continues it"):
            run.wait(60)


def test_a_run_that_was_cut_off_says_how_to_go_on(tmp_path):
    CONFIG.save(tmp_path)
    run = labkit.load_run(tmp_path)
    assert run.state == "failed" and run.status()["reason"] == f"cut off; labkit.resume({str(tmp_path)!r}) continues it"
    with pytest.raises(RunError, match=r"is not running any more, it is failed: cut off; labkit\.resume\("):
        run.attach()
    assert run.wait() is run.stop() is run


def test_a_server_that_cannot_be_reached_is_named(tmp_path):
    def change(**fields):
        file = tmp_path / server_file.FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    with going(tmp_path) as server:
        change(secret="00" * 32)
        with pytest.raises(RunError, match=rf"the server of run far \(process {os.getpid()} on .*\) does not let us in"):
            labkit.load_run(tmp_path).attach()
        change(secret=SECRET.hex(), port=1)
        with pytest.raises(RunError, match=r"does not let us in: no server answers at 127\.0\.0\.1:1 "):
            labkit.load_run(tmp_path).attach()
        change(port=server.address[1], machine="elsewhere")
        assert labkit.load_run(tmp_path).state == "running"  # for all that can be seen from here
        with pytest.raises(RunError, match=r"run far runs on elsewhere and listens there alone.*Attach from there"):
            labkit.load_run(tmp_path).attach()
