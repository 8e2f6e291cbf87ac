"""Fault injection: the faults that a run must withstand, as functions.

    kill, freeze, thaw      a worker process of this machine (SIGKILL, SIGSTOP, SIGCONT)
    drop_link               the connection between a worker and the server of a run
    kill_server             the server of a run
    corrupt_checkpoint      one bit of a checkpoint
    fill_disk, free_disk    the server can write no more, as on a full disk (Linux)
    Storm                   kills, freezes, dropped links and newcomers at random moments of a run, by seed
    audit, losses           what is inconsistent in the record of a run; how long the others waited for a lost worker

Used by the chaos notebooks, the tests, and users who try their own set-up.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import psutil

from labkit.errors import SEEDS, ClusterError, LabError, PartitionError, RunError, known, real, several, whole
from labkit.names import face
from labkit.partition import UDPA
from labkit.runs import checkpoints, metrics, server_file, status
from labkit.runs.analysis import intervals
from labkit.runs.checkpoints import Layout
from labkit.runs.events import VERSIONS, effective, read_events
from labkit.runs.files import read_json
from labkit.training.attach import watch

if TYPE_CHECKING:
    from labkit.cluster.lab import Lab
    from labkit.training.run import Run

__all__ = ["FAULTS", "Storm", "audit", "corrupt_checkpoint", "draw", "drop_link", "fill_disk", "free_disk", "freeze", "kill"]
__all__ += ["kill_server", "losses", "thaw"]
__getattr__, __dir__ = face(__name__)

FAULTS = ("kill", "freeze", "drop", "join")
FROZEN_S = (0.5, 8.0)  # how long a storm freezes a worker: shorter and longer than heartbeat_timeout
STOPS_S = 5.0  # so long a process is waited for until it stands still
JOIN_S = 30.0  # how long a storm waits for a worker that it has added


def kill(lab: Lab, worker: int) -> None:
    """End a worker process at once (SIGKILL). Dask's nanny starts it again; it then comes back under its index.

    Examples
    --------
    >>> with labkit.connect("dask", 2) as processes:
    ...     run = labkit.train(problem, processes, passes=4, name="killed")
    ...     labkit.chaos.kill(processes, 1)
    ...     run.wait().state
    'done'
    """
    _send(_process(lab, worker), signal.SIGKILL)


def freeze(lab: Lab, worker: int) -> None:
    """Stop a worker process (SIGSTOP) until `thaw`: it is there and does nothing, as when its machine swaps or sleeps.

    Returns when all its threads stand still, which on a busy machine takes a moment.

    Examples
    --------
    >>> with labkit.connect("dask", 2) as processes:
    ...     run = labkit.train(problem, processes, passes=4, name="frozen")
    ...     labkit.chaos.freeze(processes, 1)
    ...     labkit.chaos.thaw(processes, 1)
    ...     run.wait().state
    'done'
    """
    _send(process := _process(lab, worker), signal.SIGSTOP)
    limit = time.monotonic() + STOPS_S
    while not _stands_still(process) and time.monotonic() < limit:
        time.sleep(0.002)


def thaw(lab: Lab, worker: int) -> None:
    """Let a frozen worker continue (SIGCONT).

    Examples
    --------
    >>> with labkit.connect("dask", 2) as processes:
    ...     run = labkit.train(problem, processes, passes=4, name="frozen")
    ...     labkit.chaos.freeze(processes, 1)
    ...     labkit.chaos.thaw(processes, 1)
    ...     run.wait().state
    'done'
    """
    _send(_process(lab, worker), signal.SIGCONT)


def drop_link(run: Run, worker: int) -> None:
    """Cut the connection between a worker and the server of a run; both stay alive, and the worker connects again.

    Examples
    --------
    >>> run = labkit.train(problem, lab, passes=10, name="dropped")
    >>> while not run.events["kind"].eq("push").any():  # until all are there
    ...     pass
    >>> labkit.chaos.drop_link(run, 1)
    >>> run.wait().state
    'done'
    """
    worker = whole("worker", worker, 0)
    server = _server(run)
    with watch(server_file.address(server), server["secret"]) as ask:
        here = sorted(int(index) for index in ask("drop", workers=[worker])["workers"])
    if worker not in here:
        raise ClusterError(f"worker {worker} has no link to run {run.name}; workers {here} have one.")


def kill_server(run: Run) -> None:
    """End the server process of a run at once (SIGKILL); `labkit.resume` continues from the newest checkpoint.

    Examples
    --------
    >>> run = labkit.train(problem, lab, passes=10, name="no-server")
    >>> while not run.events["kind"].eq("push").any():
    ...     pass
    >>> labkit.chaos.kill_server(run)
    >>> try:
    ...     run.wait()
    ... except labkit.LabError as error:
    ...     run.state
    'failed'
    >>> labkit.resume(run.path, lab).wait().state
    'done'
    """
    os.kill(_server(run)["pid"], signal.SIGKILL)


def corrupt_checkpoint(run: Run, version: int | None = None, seed: int = 0) -> Path:
    """Flip one bit of a checkpoint, the newest by default; returns the file.

    Examples
    --------
    >>> run = labkit.train(problem, lab, passes=1, name="damaged").wait()
    >>> labkit.chaos.corrupt_checkpoint(run).suffix
    '.npz'
    >>> len(labkit.chaos.audit(run)) > 0
    True
    """
    version, seed = None if version is None else whole("version", version, 0), whole("seed", seed, 0, SEEDS)
    versions = checkpoints.versions(run.path)
    if not versions or version not in (None, *versions):
        raise RunError(f"run {run.name} has no version {'at all' if version is None else version}; it has {versions}.")
    file = checkpoints.file_of(run.path, versions[-1] if version is None else version)
    data, chance = bytearray(file.read_bytes()), np.random.default_rng(seed)
    at = chance.integers(len(data) // 4, 3 * len(data) // 4)  # amid the arrays: the headers of the archive have unused bits
    data[at] ^= 1 << int(chance.integers(8))
    file.write_bytes(data)
    return file


def fill_disk(run: Run) -> None:
    """From now on the server of a run can write no more: its files may not grow (RLIMIT_FSIZE; Linux).

    Examples
    --------
    >>> run = labkit.train(problem, lab, passes=4, name="full")
    >>> labkit.chaos.fill_disk(run)
    >>> labkit.chaos.free_disk(run)
    >>> run.wait().state
    'done'
    """
    _limit_files(run, (run.path / "events.jsonl").stat().st_size)


def free_disk(run: Run) -> None:
    """Undo `fill_disk`.

    Examples
    --------
    >>> run = labkit.train(problem, lab, passes=4, name="full")
    >>> labkit.chaos.fill_disk(run)
    >>> labkit.chaos.free_disk(run)
    >>> run.wait().state
    'done'
    """
    _limit_files(run, -1)


class Storm:
    """Faults at random moments of a run, in a thread, from its start to `stop` or its end; frozen workers are thawed then.

    The seed decides what is planned: moments, faults, and which of the workers that are there. At least one worker always stays
    untouched.

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

    Examples
    --------
    >>> run = labkit.train(problem, lab, passes=10, name="stormy")
    >>> with labkit.chaos.Storm(run, lab, faults=["drop"], every=0.2, most=3) as storm:
    ...     run.wait().state
    'done'
    >>> storm.table.columns.tolist()
    ['seconds', 'fault', 'worker']
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
        faults = several("faults", faults, partial(known, options=FAULTS))
        if not faults:
            raise ValueError(f"faults=[]: give one at least. Known: {', '.join(FAULTS)}.")
        every, most, seed = real("every", every, above=0), whole("most", most, 0), whole("seed", seed, 0, SEEDS)
        most_joins = whole("most_joins", most_joins, 0)
        if {"kill", "freeze"} & set(faults) and any(worker.pid == os.getpid() for worker in lab.workers):
            raise ClusterError("these workers are threads of this process: Storm(faults=['drop']), or connect(kind='dask').")
        if run.state != "running":
            raise RunError(f"run {run.name} is not running: it is {run.state}.")
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
            for wait, *fault in [*self.plan, (math.inf,)]:
                due = time.monotonic() + wait
                while (now := time.monotonic()) < due:
                    if self._over.wait(0.05) or self.run.state != "running":
                        return
                    self._thaw([worker for worker, (_, end) in self._frozen.items() if end < now])
                with contextlib.suppress(LabError, OSError):  # the worker may be gone already, the run over
                    self._strike(*fault)
        finally:
            self._thaw(list(self._frozen))

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
            process, _ = self._frozen.pop(worker)  # by process: the lab may have replaced it by another one with its index
            with contextlib.suppress(LabError):
                _send(process, signal.SIGCONT)
                self._rows.append((time.time(), "thaw", worker))


def draw(faults: Sequence[str], every: float, most: int, seed: int) -> list[tuple[float, str, float, float]]:
    """The plan of a storm.

    Examples
    --------
    >>> plan = labkit.chaos.draw(["kill", "drop"], every=2.0, most=3, seed=0)
    >>> [fault for _, fault, _, _ in plan]
    ['kill', 'kill', 'kill']
    """
    chance = np.random.default_rng(seed)
    waits, kinds = chance.exponential(every, most), chance.integers(len(faults), size=most)
    which, frozen = chance.random(most), chance.uniform(*FROZEN_S, most)
    return [(float(w), faults[k], float(p), float(f)) for w, k, p, f in zip(waits, kinds, which, frozen, strict=True)]


# -- processes ---------------------------------------------------------------------------------------------------------


def _process(lab: Lab, worker: int) -> psutil.Process:
    """The process of a worker, if it is here and its own."""
    (worker,) = lab.checked([worker])
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


def _stands_still(process: psutil.Process) -> bool:
    """Has each of its threads been stopped? So is a process that has ended."""
    try:
        threads = [psutil.Process(thread.id) for thread in process.threads()] if psutil.LINUX else [process]
        return all(thread.status() == psutil.STATUS_STOPPED for thread in threads)
    except psutil.Error:
        return not process.is_running()


def _server(run: Run) -> dict:
    """What the server of a run has announced, if it is on this machine."""
    server = server_file.find(run.path)
    if server is None or server_file.alive(run.path) is False:
        raise RunError(f"run {run.name} is not running: it has no server.")
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


# -- after the faults --------------------------------------------------------------------------------------------------


def audit(run: Run) -> list[str]:
    """What is inconsistent in the record of a run that has ended; an empty list if nothing is.

    All samples of the budget were merged, each merge has its push, versions and events are numbered without holes, the newest
    checkpoint holds the last version and every sample exactly once, and no file is damaged or of another run.

    Examples
    --------
    >>> labkit.chaos.audit(run)
    []
    """
    wrong, budget, id = [], run.config.budget, run.config.id
    curve = [lambda: metrics.read(run.path, id, run.config.format > 3)] if (run.path / metrics.FILE).exists() else []
    for read in (
        lambda: status.read(run.path, id),
        lambda: read_json(run.path / "environment.json", id),
        lambda: Layout.load(run.path, id),
        *curve,
    ):
        try:
            read()
        except RunError as error:
            wrong.append(str(error))
    try:
        events = read_events(run.path)
    except RunError as error:
        return [*wrong, str(error)]
    try:
        status.check(run.path, events, run.config, run._ended(), checkpoints.versions(run.path))
    except RunError as error:
        wrong.append(str(error))
    counted = effective(events)
    merges, pushes = (counted[counted.kind == kind] for kind in ("merge", "push"))
    joint = int(events.worker.nunique()) if run.config.update["name"] == "allreduce" else 1  # they stop together
    if not budget - joint < merges.samples.sum() <= budget:
        wrong.append(f"{int(merges.samples.sum())} of {budget} samples were merged")
    steps = counted.version[counted.kind.isin(VERSIONS)].drop_duplicates().astype(int).tolist()
    if steps != list(range(1, len(steps) + 1)):
        wrong.append("versions are not numbered 1, 2, 3, ...")
    for worker, own in merges.groupby("worker"):
        sent = list(pushes.loc[pushes.worker == worker, ["seq", "samples"]].itertuples(index=False))
        for merge in own.itertuples():
            while sent and (sent[0].seq > merge.seq or sent[0].samples != merge.samples):
                del sent[0]  # a push that was never merged: its worker was lost while it waited for the others
            if not sent:
                wrong.append(f"a merge of {int(merge.samples)} samples of worker {int(worker)} has no push")
                break
            del sent[0]
    try:
        version, refused = checkpoints.newest(run.path)
        wrong += refused
        if steps and version != steps[-1]:
            wrong.append(f"the newest checkpoint holds version {version} of {steps[-1]}")
        UDPA().load_state_dict(checkpoints.read_state(run.path, version)[1]["partition"])
    except (RunError, PartitionError) as error:
        wrong.append(str(error))
    return wrong


def losses(run: Run, faults: pd.DataFrame | None = None) -> pd.DataFrame:
    """How long the others waited for a lost worker: a row for each loss, with seconds, worker, message, waited_s and left.

    waited_s is the longest wait of another worker at the time of the loss: from its push or join, or from the start of a pass that
    the loss has broken off (all-reduce), to its next release. With the `faults` of a storm none begins before the fault itself.
    Waiting at the barrier that was due without the loss is included. left is how many samples of the budget were not merged yet:
    when all of them are granted, the others wait for those of the lost worker under any update.

    Examples
    --------
    >>> len(labkit.chaos.losses(run))  # nobody was lost
    0
    """
    events, rows = run.events, []
    counted, table = effective(events), intervals(events)
    merged = counted[counted.kind == "merge"]
    ended = events.seconds[events.kind == "merge"].max()
    waits = table[table.kind.isin(["answer", "refill", "broken"])]
    gone = events[(events.kind == "leave") & events.message.fillna("").ne("") & (events.seconds < ended)]
    for label, loss in zip(gone.index, gone.itertuples(), strict=True):
        began = -np.inf
        if faults is not None:
            own = faults[(faults.worker == loss.worker) & faults.fault.isin(["kill", "freeze", "drop"])]
            began = own.seconds[own.seconds <= loss.seconds].max() if (own.seconds <= loss.seconds).any() else began
        found = waits[(waits.worker != loss.worker) & (waits["last"] > label)].groupby("worker").head(1)
        found = found[(found["first"] < label) & (found.start <= loss.seconds)]
        waited = float((found.end - found.start.clip(lower=began)).max()) if len(found) else 0.0
        left = run.config.budget - merged.samples[merged.index < label].sum()
        rows.append((loss.seconds, int(loss.worker), loss.message, round(max(0.0, waited), 3), int(left)))
    return pd.DataFrame(rows, columns=["seconds", "worker", "message", "waited_s", "left"])
