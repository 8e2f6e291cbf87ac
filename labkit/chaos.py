"""Faults on purpose: what a lab must survive, as functions.

    kill, freeze, thaw      a worker process of this machine (SIGKILL, SIGSTOP, SIGCONT)
    drop_link               the connection between a worker and the server of a run
    kill_server             the server of a run
    corrupt_checkpoint      one bit of a kept version
    fill_disk, free_disk    the server can write no more, as on a full disk (Linux)
    Storm                   kills, freezes, dropped links and newcomers at random moments of a run, by seed
    audit, losses           what does not add up in the record of a run; how long a loss kept the others waiting

Used by the chaos notebooks and the tests; also good for asking whether one's own set-up would survive the night.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from labkit.errors import ClusterError, LabError, RunError
from labkit.runs import analysis, checkpoints, server_file
from labkit.training.attach import watch

if TYPE_CHECKING:
    import pandas as pd

    from labkit.cluster.lab import Lab
    from labkit.training.run import Run

__all__ = ["FAULTS", "Storm", "audit", "corrupt_checkpoint", "draw", "drop_link", "fill_disk", "free_disk", "freeze", "kill"]
__all__ += ["kill_server", "losses", "thaw"]

FAULTS = ("kill", "freeze", "drop", "join")
FROZEN_S = (0.5, 8.0)  # how long a storm freezes a worker: shorter and longer than heartbeat_timeout
JOIN_S = 30.0  # how long a storm waits for a worker that it has added


def kill(lab: Lab, worker: int) -> None:
    """End a worker process at once (SIGKILL). Dask's nanny starts it again; it then comes back under its index."""
    _send(_process(lab, worker), signal.SIGKILL)


def freeze(lab: Lab, worker: int) -> None:
    """Stop a worker process (SIGSTOP) until `thaw`: it is there and does nothing, as when its machine swaps or sleeps."""
    _send(_process(lab, worker), signal.SIGSTOP)


def thaw(lab: Lab, worker: int) -> None:
    """Let a frozen worker go on (SIGCONT)."""
    _send(_process(lab, worker), signal.SIGCONT)


def drop_link(run: Run, worker: int) -> None:
    """Cut the connection between a worker and the server of a run that goes; both stay alive, and the worker comes again."""
    server = _server(run)
    with watch((server["host"], server["port"]), server["secret"]) as ask:
        here = sorted(int(index) for index in ask("drop", workers=[int(worker)])["workers"])
    if worker not in here:
        raise ClusterError(f"worker {worker} has no link to run {run.name}; workers {here} have one.")


def kill_server(run: Run) -> None:
    """End the server process of a run at once (SIGKILL); `labkit.resume` goes on from the newest checkpoint."""
    os.kill(_server(run)["pid"], signal.SIGKILL)


def corrupt_checkpoint(run: Run, version: int | None = None, seed: int = 0) -> Path:
    """Flip one bit of a kept version, the newest by default; returns the file."""
    kept = checkpoints.versions(run.path)
    if version not in (kept if version is not None else [None]) or not kept:
        raise RunError(f"run {run.name} has no version {'at all' if version is None else version}; it keeps {kept}.")
    file = run.path / checkpoints.FOLDER / f"{kept[-1] if version is None else version:08d}.npz"
    data, chance = bytearray(file.read_bytes()), np.random.default_rng(seed)
    at = chance.integers(len(data) // 4, 3 * len(data) // 4)  # amid the arrays: the frame of the archive has idle bits
    data[at] ^= 1 << int(chance.integers(8))
    file.write_bytes(data)
    return file


def fill_disk(run: Run) -> None:
    """From now on the server of a run can write no more: its files may not grow (RLIMIT_FSIZE; Linux)."""
    _limit_files(run, (run.path / "events.jsonl").stat().st_size)


def free_disk(run: Run) -> None:
    """Undo `fill_disk`."""
    _limit_files(run, -1)


class Storm:
    """Faults at random moments of a run, in a thread, from its start to `stop` or its end; frozen workers are thawed then.

    The seed decides what is planned: moments, faults, and which of the workers that are there. One worker at least is always left
    alone.

    Parameters
    ----------
    faults
        Kinds to draw from: "kill", "freeze" (thawed after a while), "drop" (a link), "join" (a new worker).
    every
        Mean number of seconds between two faults.
    most, most_joins
        At most so many faults, of which at most so many workers that join.

    Attributes
    ----------
    plan
        What was drawn: a list of (seconds since the fault before, fault, which of those there in [0, 1), seconds frozen).
    """

    def __init__(
        self,
        run: Run,
        lab: Lab,
        *,
        faults: Sequence[str] = FAULTS,
        every: float = 2.0,
        most: int = 10,
        most_joins: int = 2,
        seed: int = 0,
    ) -> None:
        unknown = set(faults) - set(FAULTS)
        if unknown or not faults:
            raise ValueError(f"unknown faults {sorted(unknown)}. Known: {', '.join(FAULTS)}.")
        if {"kill", "freeze"} & set(faults) and any(worker.pid == os.getpid() for worker in lab.workers):
            raise ClusterError("these workers are threads of this process: Storm(faults=['drop']), or connect(kind='dask').")
        if run.state != "running":
            raise RunError(f"run {run.name} does not go: it is {run.state}.")
        self.run, self.lab, self.joins_left = run, lab, most_joins
        self.plan = draw(faults, every, most, seed)
        self._rows: list[tuple[float, str, int]] = []
        self._frozen: dict[int, tuple[psutil.Process, float]] = {}  # worker: its process, when it is thawed
        self._over, self._joins = threading.Event(), []
        self._thread = threading.Thread(target=self._run, name="labkit-storm", daemon=True)
        self._thread.start()

    @property
    def table(self) -> pd.DataFrame:
        """What was done: seconds on the clock of the run, fault ("thaw" among them), worker."""
        import pandas as pd

        table = pd.DataFrame(self._rows, columns=["seconds", "fault", "worker"])
        begun = self.run.events.query("kind == 'start'")
        if len(begun):
            table.seconds = (table.seconds - (begun.time - begun.seconds).iloc[-1]).round(3)
        return table

    def stop(self) -> Storm:
        """No more faults; twice is fine."""
        self._over.set()
        for thread in (self._thread, *self._joins):
            thread.join(JOIN_S + 5)
        return self

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            while not self.run.status().get("started") and self.run.state == "running" and not self._over.wait(0.05):
                pass
            self._follow_plan()
        finally:
            self._thaw(list(self._frozen))

    def _follow_plan(self) -> None:
        plan = iter(self.plan)
        step = next(plan, None)
        due = time.monotonic() + (step[0] if step else 0.0)
        while not self._over.wait(0.05) and self.run.state == "running":
            now = time.monotonic()
            self._thaw([worker for worker, (_, end) in self._frozen.items() if end < now])
            if step and now >= due:
                with contextlib.suppress(LabError, OSError):  # the worker may be gone already, the run over
                    self._strike(*step[1:])
                step = next(plan, None)
                due = time.monotonic() + (step[0] if step else 0.0)

    def _strike(self, fault: str, which: float, frozen_s: float) -> None:
        gone = {*self.lab.lost(), *self._frozen}
        there = [worker.index for worker in self.lab.workers if worker.index not in gone]
        if fault == "join":
            if self.joins_left > 0:
                self.joins_left -= 1
                self._joins.append(threading.Thread(target=self._join, name="labkit-storm-join", daemon=True))
                self._joins[-1].start()  # a new process takes seconds to come
            return
        if len(there) < 2:
            return
        worker = there[int(which * len(there))]
        if fault == "kill":
            kill(self.lab, worker)
        elif fault == "freeze":
            self._frozen[worker] = _process(self.lab, worker), time.monotonic() + frozen_s
            freeze(self.lab, worker)
        else:
            drop_link(self.run, worker)
        self._rows.append((time.time(), fault, worker))

    def _join(self) -> None:
        with contextlib.suppress(LabError, OSError):
            for worker in self.lab.add(1, timeout=JOIN_S):
                self._rows.append((time.time(), "join", worker))

    def _thaw(self, workers: list[int]) -> None:
        for worker in workers:
            process, _ = self._frozen.pop(worker)  # by process: the lab may have given it up, and its index to another one
            with contextlib.suppress(LabError):
                _send(process, signal.SIGCONT)
                self._rows.append((time.time(), "thaw", worker))


def draw(faults: Sequence[str], every: float, most: int, seed: int) -> list[tuple[float, str, float, float]]:
    """The plan of a storm."""
    chance = np.random.default_rng(seed)
    waits, kinds = chance.exponential(every, most), chance.integers(len(faults), size=most)
    which, frozen = chance.random(most), chance.uniform(*FROZEN_S, most)
    return [(float(w), faults[k], float(p), float(f)) for w, k, p, f in zip(waits, kinds, which, frozen, strict=True)]


# -- where things are --------------------------------------------------------------------------------------------------


def _process(lab: Lab, worker: int) -> psutil.Process:
    """The process of a worker, if it is here and its own."""
    if not 0 <= worker < len(lab.workers):
        raise ClusterError(f"there is no worker {worker}; this lab has workers 0 to {len(lab.workers) - 1}.")
    about = lab.workers[worker]
    if lab.closed:
        raise ClusterError("this lab is closed.")
    if about.host != socket.gethostname():
        raise ClusterError(f"worker {worker} is on {about.host}, not here: it cannot be sent a signal.")
    if about.pid == os.getpid():
        raise ClusterError(f"worker {worker} is a thread of this process. Use connect(kind='dask') to do this to a process.")
    try:
        return psutil.Process(about.pid)
    except psutil.NoSuchProcess as error:
        raise ClusterError(f"worker {worker} was lost already.") from error


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)  # never to a later process with the same number
    except psutil.NoSuchProcess as error:
        raise ClusterError(f"process {process.pid} has ended already.") from error
    except psutil.AccessDenied as error:
        raise ClusterError(f"process {process.pid} is another user's.") from error


def _server(run: Run) -> dict:
    """What the server of a run has announced, if it is on this machine."""
    server = server_file.find(run.path)
    if server is None or server_file.alive(run.path) is False:
        raise RunError(f"run {run.name} does not go: it has no server.")
    if server["machine"] != socket.gethostname():
        raise ClusterError(f"the server of run {run.name} is on {server['machine']}, not here.")
    return server


def _limit_files(run: Run, size: int) -> None:
    if sys.platform != "linux":
        raise LabError("a full disk is made with prlimit(), which only Linux has.")
    import resource

    pid = _server(run)["pid"]
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most if size < 0 else size, most))


# -- what they have left behind ----------------------------------------------------------------------------------------


def audit(run: Run) -> list[str]:
    """What does not add up in the record of a run that has ended; an empty list is what one hopes for.

    All samples of the budget were merged, each merge has its push, versions and events are numbered without holes, and the newest
    checkpoint holds the last version and every sample exactly once.
    """
    return analysis.audit(run.path, run.events, run.config)


def losses(run: Run, faults: pd.DataFrame | None = None) -> pd.DataFrame:
    """How long a lost worker kept the others waiting: a row for each loss, with seconds, worker, message, waited_s and left.

    waited_s is the longest wait that the loss found among the others: from their push or join, or from the start of a pass that the
    loss has broken off (all-reduce), to their next release. With the `faults` of a storm none begins before the fault itself.
    Waiting that the barrier would have asked for anyhow is in it. left says how many samples of the budget were not merged yet:
    when all of them are handed out, the others wait for those of the lost worker under any update.
    """
    return analysis.losses(run.events, run.config, faults)
