"""Training on a lab: puts the partition, the update, the server, the workers and the record together.

    problem fits?  ->  run directory  ->  server (a process)  ->  one worker loop on each worker of the lab
                                             |  pull, local pass, score, push ... until passes x n samples are trained on
    curve of the kept versions  <-  record  <-  everyone has left

`train` returns at once; a thread of the kernel follows the run to its end. Used from notebooks; nobody below imports it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from labkit import record, wire
from labkit.errors import ClusterError, LabError, RunError, WireError, WorkerError
from labkit.lab import Lab, Task
from labkit.partition import UDPA, make_partition
from labkit.problems import Problem
from labkit.run import Run, moved
from labkit.server import ServerSpec
from labkit.updates import Update, make_update
from labkit.worker import Layout, WorkerSpec, flatten, keep_memory, run_worker

if TYPE_CHECKING:
    import pandas as pd

POLL_S = 0.2
RETRY_S = 10.0  # how long a server that has hung up may take to end before it is asked again
EVALUATION_BATCH = 250


def train(
    problem: Problem,
    lab: Lab,
    *,
    partition: str | dict | UDPA = "idpa",
    update: str | dict | Update = "agwu",
    passes: float = 5,
    local_steps: int | None = None,
    seed: int = 0,
    name: str | None = None,
    runs: str | Path = "runs",
    checkpoints: int = 32,
) -> Run:
    """Train a problem on a lab; returns at once with a `Run`.

    Parameters
    ----------
    problem, lab
        What to train, and where.
    partition, update
        Objects or names: `IDPA(batches=4)` or "idpa"; `AGWU()` or "agwu".
    passes
        Length of the run: all workers together train on `passes` times the training samples. (BPT-CNN counts iterations K; with A
        allocation batches the same number of sample visits takes K + (A-1)/2 local passes.)
    local_steps
        Optimiser steps of a local pass, on average over the workers: each does them in proportion to its shard, so that a balanced
        partition stays balanced. By default a local pass is one pass of the worker over its shard.
    seed
        Initial weights, shuffles and orders all derive from it.
    name, runs
        The run is recorded in `runs/name`; an earlier run there is kept under `name.1`, `name.2`, ... Default name: strategy
        and seed.
    checkpoints
        How many versions to keep and to measure afterwards, spread evenly over the run.

    Raises
    ------
    ProblemError, DataError, PartitionError, RunError, ClusterError, ValueError
        The request makes no sense; nothing has been started.
    """
    update, partition = make_update(update), make_partition(partition)
    _check_lengths(passes, local_steps, seed, checkpoints)
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}; give a labkit.Problem such as labkit.Classifier(...).")
    problem.check(seed)
    _check_shards(problem, lab, partition)
    name = name or "-".join([update.name, partition.name, f"seed{seed}"])
    _free(lab, name)
    flat, layout = flatten(problem.build(seed))
    samples = problem.train_indices()
    budget = max(1, round(passes * len(samples)))
    path = _claim(Path(runs), name)
    config = _config(problem, lab, partition, update, name, budget, passes, local_steps, seed, len(samples))
    _write_beginning(path, config, layout)
    spec = ServerSpec(
        path=str(path),
        secret=secrets.token_bytes(32),
        update=update,
        partition=partition,
        weights=flat.numpy(),
        n_buffers=layout.n_buffers,
        n_samples=len(samples),
        labels=problem.labels(samples) if partition.stratified else None,
        workers=[worker.index for worker in lab.workers],
        budget=budget,
        local_steps=local_steps,
        batch_size=problem.batch_size,
        seed=seed,
        checkpoints=checkpoints,
        host=_host(lab),
    )
    session = Session(path, lab, problem, spec)
    lab.run = Run(path, problem=problem, session=session)
    session.start(lab.run)
    return lab.run


class Session:
    """A run that goes: its server process, its workers' tasks and the thread that follows them to the end."""

    def __init__(self, path: Path, lab: Lab, problem: Problem, spec: ServerSpec) -> None:
        self.path, self.lab, self.problem, self.spec = path, lab, problem, spec
        self.error: BaseException | None = None
        self._raised: dict[int, BaseException] = {}  # by worker
        self.state = "running"
        self.tasks: list[Task] = []
        self._status: dict = {"state": "running", "samples": 0, "budget": spec.budget, "version": 0}
        self._stop, self._over = threading.Event(), threading.Event()

    def start(self, run: Run) -> None:
        self.run, self.server = run, None
        try:
            self.server, self.address = _start_server(self.spec, self.path)
            for worker in self.lab.workers:
                self.tasks.append(self.lab.start(worker.index, run_worker, self.problem, self._worker_spec(worker)))
        except BaseException as error:
            if self.server:
                _end(self.server)
            self._finish("failed", f"it could not be started: {error}")
            raise
        threading.Thread(target=self._follow, name=f"labkit-{run.name}", daemon=True).start()

    def status(self) -> dict:
        return {**self._status, "state": self.state}

    def wait(self, timeout: float) -> bool:
        limit = time.monotonic() + timeout
        while not self._over.wait(0.1):  # short waits, so that an interrupt is heard
            if time.monotonic() > limit:
                return False
        return True

    def stop(self, timeout: float) -> None:
        self._stop.set()
        if not self.wait(timeout):
            self.server.kill()  # it does not answer; the workers see their connections close
            self.wait(10)

    def raise_error(self) -> None:
        if self.error:
            raise self.error

    def _worker_spec(self, worker) -> WorkerSpec:
        devices = [w.device for w in self.lab.workers]
        return WorkerSpec(
            index=worker.index,
            n_workers=len(self.lab.workers),
            address=self.address,
            secret=self.spec.secret,
            seed=self.spec.seed,
            budget=self.spec.budget,
            device=worker.device,
            threads=worker.threads,
            slowdown=worker.slowdown,
            jitter=self.lab.jitter,
            collective=str(self.path) if self.spec.update.collective else None,
            one_process=self.lab.one_process,
            one_host=self.lab.one_host,
            own_gpu=len(set(devices)) == len(devices) and all(device != "cpu" for device in devices),
        )

    def _follow(self) -> None:
        """Ask the server how things are until everyone is done; then say how the run ended and measure its curve."""
        try:
            self._watch()
            state, reason = self._ending()
            if state in ("done", "stopped"):
                measure(self.run, self.problem, self.lab)
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            _end(self.server)
            state, reason, self.error = "failed", str(error), self.error or error
        self._finish(state, reason)

    def _watch(self) -> None:
        failures = 0
        while self.server.poll() is None and failures < 3:
            try:
                with wire.connect(self.address, self.spec.secret, timeout=30) as connection:
                    connection.send({"op": "watch"})
                    while self.server.poll() is None:
                        self._ask(connection)
                        failures = 0
            except WireError:  # most likely it has ended
                failures += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.server.wait(timeout=RETRY_S)
        self._last_words = _end(self.server)
        for task in self.tasks:
            limit = time.monotonic() + 30
            while not task.done and time.monotonic() < limit:
                time.sleep(0.02)

    def _ask(self, connection: wire.Connection) -> None:
        """One question to the server: its status, or that it should stop."""
        trouble = self._trouble()
        if self._status["state"] != "running":
            connection.send({"op": "status"})
        elif trouble:
            connection.send({"op": "stop", "state": "failed", "reason": trouble})
        elif self._stop.is_set():
            connection.send({"op": "stop", "reason": ""})
        else:
            connection.send({"op": "status"})
        self._status = connection.receive()[0]
        if self._status["state"] == "running":
            self._stop.wait(POLL_S)
        else:
            time.sleep(0.05)

    def _trouble(self) -> str:
        """Why the run cannot go on although the server would. Who merely lost the server is treated there as any lost worker."""
        for error in self._errors():
            if not _lost_server(error):
                return _words(error)
        if not self._status.get("started"):  # until then everybody is needed
            if errors := self._errors():
                return _words(errors[0])
            if gone := [index for index in self.lab.lost() if index < len(self.tasks)]:
                return f"workers {gone} were lost before the run began. connect() again for a full lab."
        return ""

    def _errors(self) -> list[BaseException]:
        for task in self.tasks:
            if task.worker not in self._raised and task.future.status == "error":
                self._raised[task.worker] = task.future.exception(timeout=10)
        return list(self._raised.values())

    def _ending(self) -> tuple[str, str]:
        """State and reason, from the last words of the server; and the error to raise in `wait`."""
        try:
            ended = json.loads(self._last_words)
        except ValueError:
            log = (self.path / "server.log").read_text(errors="replace").strip()
            self.error = RunError(f"the server of run {self.run.name} ended with code {self.server.returncode}.\n{log[-2000:]}")
            return "failed", "the server ended"
        self._status = {**self._status, **ended}
        if ended["state"] == "failed":
            # The error of a worker tells more than the server's line; the worker that the line names failed first.
            errors = [error for error in self._errors() if not _lost_server(error)]
            errors.sort(key=lambda error: _words(error) != ended["reason"])
            self.error = LabError(f"run {self.run.name} failed: {ended['reason']}")
            if errors and isinstance(errors[0], WorkerError):
                self.error = errors[0]
            elif errors:
                self.error.__cause__ = errors[0]
        return ended["state"], ended["reason"]

    def _finish(self, state: str, reason: str) -> None:
        self._status = {**self._status, "reason": reason}
        if state == "failed":
            with contextlib.suppress(OSError):  # an unwritable folder may be why it failed
                record.write_json(self.path / "status.json", {**self._status, "state": "failed"})
        if self.lab.run is self.run:
            self.lab.run = None
        self.state = state
        self._over.set()


def _lost_server(error: BaseException) -> bool:
    """Was the connection all that this worker lost?"""
    return isinstance(error, WorkerError) and not error.remote_traceback


def _words(error: BaseException) -> str:
    return str(error.args[0]) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"


def measure(run: Run, problem: Problem, lab: Lab | None = None) -> pd.DataFrame:
    """Loss and score of every kept version on the test set, as `metrics.parquet`; on the lab's workers, or here without one."""
    import pandas as pd

    versions = record.checkpoint_versions(run.path)
    n = len(lab.workers) if lab else 1
    shares = [versions[i::n] for i in range(n) if versions[i::n]]
    items = [(problem, str(run.path), share, int(run.config["seed"])) for share in shares]
    results = lab.map(_evaluate, items) if lab and lab.workers else [_evaluate(item) for item in items]
    rows = sorted(itertools.chain.from_iterable(results))
    events = run.events
    merges = events[events.kind == "merge"].groupby("version")[["seconds", "total"]].max()
    merges.loc[0] = 0.0
    table = pd.DataFrame(rows, columns=["version", "loss", "score"])
    table["seconds"] = table.version.map(merges.seconds)
    table["samples"] = table.version.map(merges.total).astype("int64")
    table = table[["seconds", "samples", "version", "loss", "score"]]
    with record.replacing(run.path / "metrics.parquet") as file:
        table.to_parquet(file)
    return table


def _evaluate(item: tuple[Problem, str, list[int], int]) -> list[tuple[int, float, float]]:
    """Runs on a worker: (version, loss, score) of some versions of a run."""
    import torch

    problem, path, versions, seed = item
    keep_memory()
    module = problem.build(seed)
    flat, layout = flatten(module)
    indices = problem.test_indices()
    parts = [indices[i : i + EVALUATION_BATCH] for i in range(0, len(indices), EVALUATION_BATCH)]
    rows = []
    for version in versions:
        flat.copy_(torch.from_numpy(np.array(record.read_checkpoint(Path(path), version, layout.size))))
        measured = [(problem.evaluate(module, problem.load(part, "test")), len(part)) for part in parts]
        loss = sum(m["loss"] * n for m, n in measured) / len(indices)
        score = sum(m["score"] * n for m, n in measured) / len(indices)
        rows.append((version, float(loss), float(score)))
    return rows


def _start_server(spec: ServerSpec, path: Path, timeout: float = 60.0) -> tuple[subprocess.Popen, tuple[str, int]]:
    """The server in a process of its own; it gets its spec, secret included, through a pipe that nobody else can read."""
    import cloudpickle

    message = cloudpickle.dumps(spec)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with open(path / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", "import labkit.server; labkit.server.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # an interrupt of the kernel is for the kernel
        )
    watchdog = threading.Timer(timeout, server.kill)
    watchdog.start()
    try:
        server.stdin.write(message)
        server.stdin.close()
        server.stdin = None  # nothing more to say
        place = json.loads(server.stdout.readline())
    except (OSError, ValueError) as error:
        _end(server)
        said = (path / "server.log").read_text(errors="replace").strip()
        raise RunError(f"the server did not start: {said[-2000:] or error}") from error
    finally:
        watchdog.cancel()
    return server, (place["host"], place["port"])


def _end(server: subprocess.Popen) -> bytes:
    """What the server said last; it is killed if it still goes. Twice is fine."""
    server.kill()
    server.wait()
    said = b"" if server.stdout.closed else server.stdout.read()
    for pipe in (server.stdin, server.stdout):
        with contextlib.suppress(OSError):  # what it was not told any more
            if pipe:
                pipe.close()
    return said


def _host(lab: Lab) -> str:
    """Where the server listens: on loopback alone if all workers are here, else where other machines reach this one."""
    from distributed.utils import get_ip

    return "127.0.0.1" if {worker.host for worker in lab.workers} == {socket.gethostname()} else get_ip()


def _check_lengths(passes: float, local_steps: int | None, seed: int, checkpoints: int) -> None:
    if not 0 < passes < float("inf"):
        raise ValueError(f"passes={passes} must be a positive number.")
    if local_steps is not None and (int(local_steps) != local_steps or local_steps < 1):
        raise ValueError(f"local_steps={local_steps} must be a whole number of at least 1, or None for a pass over the shard.")
    if int(seed) != seed or seed < 0:
        raise ValueError(f"seed={seed} must be a whole number of at least 0.")
    if int(checkpoints) != checkpoints or checkpoints < 1:
        raise ValueError(f"checkpoints={checkpoints}: at least one version must be kept.")


def _check_shards(problem: Problem, lab: Lab, partition: UDPA) -> None:
    """A partition of the true size, made and thrown away: what is wrong with it should be heard here, not in the server."""
    import copy

    samples = problem.train_indices()
    labels = problem.labels(samples) if partition.stratified else None
    copy.deepcopy(partition).start(len(samples), [worker.index for worker in lab.workers], labels=labels)


def _free(lab: Lab, name: str) -> None:
    """One run at a time on a lab. Running a cell again means to begin again; another run is not cut off silently."""
    if lab.closed:
        raise ClusterError("this lab is closed. Run the cell with connect() again.")
    gone = lab.lost()
    if gone:
        raise ClusterError(f"workers {gone} of this lab are lost. connect() again for a full lab.")
    if lab.run is not None and lab.run.state == "running":
        if lab.run.name != name:
            raise ClusterError(f"this lab still trains {lab.run.name!r}. Call run.wait() or run.stop() on it first.")
        print(f"Stopping {name!r}, which is begun again.")
        if lab.run.stop().state == "running":
            raise ClusterError(f"{name!r} does not end. Call run.wait() on it, or connect() again for a fresh lab.")


def _claim(runs: Path, name: str) -> Path:
    """A new, empty directory `runs/name`; what was there before is kept under the next free number."""
    if not name or name != Path(name).name or name.startswith("."):
        raise RunError(f"{name!r} cannot be the name of a run: it becomes a folder in {runs}.")
    path = (runs / name).absolute()
    try:
        if path.exists():
            number = next(n for n in itertools.count(1) if not path.with_name(f"{name}.{n}").exists())
            moved(path, path.rename(path.with_name(f"{name}.{number}")))
        (path / "checkpoints").mkdir(parents=True)
        (path / "figures").mkdir()
    except OSError as error:
        raise RunError(f"the run cannot be recorded in {path}: {error}. Give train() another folder: runs=...") from error
    return path


def _write_beginning(path: Path, config: dict, layout: Layout) -> None:
    try:
        record.write_json(path / "config.json", config)
        record.write_json(path / "environment.json", record.environment())
        record.write_json(path / "layout.json", asdict(layout))
    except OSError as error:
        raise RunError(f"the run cannot be recorded in {path}: {error}. Give train() another folder: runs=...") from error


def _config(problem, lab, partition, update, name, budget, passes, local_steps, seed, n_train) -> dict:
    return {
        "format": record.FORMAT,
        "labkit": record.environment()["versions"]["labkit"],
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "update": update.config(),
        "partition": partition.config(),
        "passes": passes,
        "local_steps": local_steps,
        "seed": seed,
        "budget": budget,
        "n_train": n_train,
        "kind": lab.kind,
        "n_workers": len(lab.workers),
        "workers": [asdict(worker) for worker in lab.workers],
        "jitter": lab.jitter,
        "emulated": lab.emulated,
        "synthetic": problem.dataset.synthetic,
        "data_note": problem.dataset.note,
        "problem": problem.config(),
    }
