"""Workers that sleep instead of computing, and exchange real weights with the real server of a run.

    pull (real weights, over a real socket) -> sleep -> push (real weights) -> ...

The server is the process that every run has, with its update, its partition and its record. The workers are threads of this
process which send what workers send (`labkit.training.wire.protocol`) and no more: they share one vector that they push and one
into which all receive, so that 64 workers with 100 MB each cost the server's memory and not theirs as well. `real` is the check on
them: the same with labkit's own workers, each with a replica, on a lab of threads.

What a server is busy with comes from two clocks: the CPU time of its process, and the record, which says when each push came in and
when what had to be done for it under the server's lock was done.

Used by the benchmark notebooks.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from echoes import KINDS, TIMEOUT_S, echo
from torch import nn

import labkit
from labkit.plots import style
from labkit.runs.checkpoints import Layout
from labkit.runs.config import RunConfig
from labkit.runs.events import read_events
from labkit.training import supervisor
from labkit.training.server.server import ServerSpec
from labkit.training.wire import transport
from labkit.training.worker.process import give_back, prepare

RESERVE = 2e9  # bytes of memory that are left to others


class Sleeper:
    """A worker that sleeps; joins at once. `vector` is what it pushes, `buffer` where it receives: both may be shared."""

    def __init__(self, address: tuple[str, int], secret: bytes, index: int, vector: np.ndarray, buffer: np.ndarray) -> None:
        self.connection = transport.connect(address, secret, timeout=TIMEOUT_S)
        self.vector, self.buffer = vector, memoryview(buffer).cast("B")
        self.exchanges = 0
        self.connection.send({"op": "join", "worker": index, "seconds_per_sample": 1e-3})

    def pull(self) -> bool:
        """Wait for the next version; False when the run has ended."""
        while (message := self.connection.receive(self._buffers)[0])["op"] == "hold":
            self.connection.send({"op": "heartbeat"})
        self.grant = message
        return message["op"] == "grant"

    def push(self, slept: float = 0.0) -> None:
        header = {"op": "push", "version": self.grant["version"], "samples": self.grant["samples"], "score": 0.5, "loss": 1.0}
        self.connection.send({**header, "compute_s": slept, "score_s": 0.0, "wait_s": 0.0, "send_s": 0.0}, self.vector)

    def work(self, nap: float, after: Callable[[], None] = lambda: None) -> None:
        """Sleep and exchange until the run ends; `after` each exchange."""
        while self.pull():
            self.exchanges += 1
            after()
            time.sleep(nap)
            if self.connection.waiting() and not self.pull():  # nothing but the end can have come
                break
            self.push(nap)
        self.leave()

    def leave(self) -> None:
        self.connection.send({"op": "leave"})
        self.connection.close()

    def _buffers(self, header: dict, n: int) -> list[memoryview]:
        return [self.buffer, memoryview(bytearray(8 * header["n_indices"]))]


@contextlib.contextmanager
def serving(update: str, n_workers: int, megabytes: float, path: Path) -> Iterator[tuple[int, tuple[str, int], bytes]]:
    """The server of a run of `n_workers` with so many MB of weights, recorded in `path`: its process, its address, its secret.

    Nothing but its first and its last version stays on the disk, and these are deleted afterwards.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        name=path.name,
        update={"name": update},
        partition={"name": "udpa"},
        n_workers=n_workers,
        workers=[{"index": index} for index in range(n_workers)],
        n_train=n_workers,
        passes=math.inf,
        budget=1 << 52,  # far more than will be trained on
        batch_size=1,
        checkpoints=1,
        heartbeat_timeout=TIMEOUT_S,
    )
    spec = ServerSpec(
        config=config,
        path=str(path),
        secret=os.urandom(32),
        update=labkit.updates.make_update(update),
        partition=labkit.UDPA(),
        weights=np.ones(size(megabytes), np.float32),
        layout=Layout((), (), size(megabytes), 0),
        age=TIMEOUT_S,
    )
    server, address = supervisor._start_server(spec, path)
    try:
        yield server.pid, address, spec.secret
        stop(address, spec.secret)
        server.wait(TIMEOUT_S)  # until the last worker has left
    finally:
        ending = supervisor._end(server)
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    assert json.loads(ending)["state"] == "stopped", ending


def stop(address: tuple[str, int], secret: bytes) -> None:
    with transport.connect(address, secret, timeout=TIMEOUT_S) as connection:
        connection.send({"op": "watch"})
        connection.send({"op": "stop"})
        connection.receive()


def size(megabytes: float) -> int:
    """Weights of float32 in so many MB."""
    return round(megabytes * 250_000)


def fits(n_workers: int, megabytes: float) -> bool:
    """Is there memory for this? A push of each worker, a version that each works from, and a few more."""
    return (2 * n_workers + 6) * megabytes * 1e6 < psutil.virtual_memory().available - RESERVE


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads.

    On Linux from the clock that the kernel has for each process: `psutil` counts in steps of 10 ms, and a server may do ten
    exchanges in one of them.
    """
    if sys.platform == "linux":
        return time.clock_gettime(~pid << 3 | 2)
    used = psutil.Process(pid).cpu_times()
    return used.user + used.system


def saturate(update: str, n_workers: int, megabytes: float, nap: float, seconds: float, path: Path) -> dict:
    """One row: what a server does with `n_workers` that sleep `nap` seconds between a pull and a push.

    Measured over at least `seconds`, and three cycles of worker 0, when everybody has pushed once.
    """
    vector, buffer = np.ones(size(megabytes), np.float32), np.empty(size(megabytes), np.float32)
    turn = threading.Semaphore(0)  # released by worker 0 after each of its exchanges
    with serving(update, n_workers, megabytes, path) as (pid, address, secret):
        workers = [Sleeper(address, secret, index, vector, buffer) for index in range(n_workers)]
        calls = [turn.release] + [lambda: None] * (n_workers - 1)
        for worker, call in zip(workers, calls, strict=True):
            threading.Thread(target=worker.work, args=(nap, call), daemon=True).start()
        while turn.acquire(timeout=TIMEOUT_S) and min(worker.exchanges for worker in workers) < 2:
            pass
        begun, cycles = _now(pid, workers), 0
        while turn.acquire(timeout=TIMEOUT_S):
            cycles, ended = cycles + 1, _now(pid, workers)
            if cycles >= 3 and ended["time"] - begun["time"] >= seconds:
                break
    took = {key: ended[key] - begun[key] for key in begun}
    wall, n = took["time"], took["exchanges"]
    locked = under_lock(read_events(path), begun["time"], ended["time"])
    return {
        "update": update,
        "MB": megabytes,
        "workers": n_workers,
        "exchanges_per_s": n / wall,
        "MB_per_s": 2 * megabytes * n / wall,  # there and back
        "busy": took["server"] / wall,  # CPU time of the server over time: 1 is one core
        "locked": locked / wall,  # share of the time in which something was done under the lock
        "machine": (took["server"] + took["here"]) / wall / os.cpu_count(),  # server and workers: 1 is the whole machine
        "cpu_ms": 1e3 * took["server"] / n,  # of the server, for one push and one pull
        "lock_ms": 1e3 * locked / n,
        "all_ms": 1e3 * (took["server"] + took["here"]) / n,  # the same and the workers' side of it
        "waiting": max(0.0, 1 - nap * n / wall / n_workers),  # share of a worker's time in which it does not "compute"
    }


def _now(pid: int, workers: list[Sleeper]) -> dict[str, float]:
    exchanges = sum(worker.exchanges for worker in workers)
    return {"time": time.time(), "server": cpu_seconds(pid), "here": time.process_time(), "exchanges": exchanges}


def under_lock(events: pd.DataFrame, begin: float, end: float) -> float:
    """Seconds between two times that pushes took until they were merged, or until their workers were held.

    Meanwhile the server does nothing else with the run. The record gives both: of a worker that is held, when that was; of one that
    is released, how long its push had to wait for its answer.
    """
    pushed, seconds = {}, 0.0
    for event in events[events.kind.isin(["push", "hold", "release"])].to_dict("records"):
        if event["kind"] == "push":
            pushed[event["worker"]] = event["time"]
        elif (at := pushed.pop(event["worker"], None)) is not None:
            done = event["time"] if event["kind"] == "hold" else at + event["wait_s"]
            seconds += max(0.0, min(done, end) - max(at, begin))
    return seconds


# -- one worker, and echoes --------------------------------------------------------------------------------------------


def rounds(megabytes: float, updates: list[str], n: int, path: Path) -> list[dict]:
    """`n` rows of seconds for so many MB there and back: a column for each of `KINDS` and each of `updates`, one worker each."""
    vector, buffer = np.ones(size(megabytes), np.float32), np.empty(size(megabytes), np.float32)
    several = max(1, min(50, round(20 / megabytes)))  # of which one time is the mean
    with contextlib.ExitStack() as stack:
        ways = {kind: stack.enter_context(echo(kind, vector, buffer)) for kind in KINDS}
        ways |= {update: stack.enter_context(exchange(update, vector, buffer, path / update)) for update in updates}
        rows = [{name: timed(way, several) for name, way in turned(ways, number).items()} for number in range(n + 3)]
    return rows[3:]  # before those memory is fetched that is used again afterwards


def turned(ways: dict[str, Callable], number: int) -> dict[str, Callable]:
    """Each round begins with another one."""
    names = list(ways)
    first = number % len(names)
    return {name: ways[name] for name in names[first:] + names[:first]}


def timed(way: Callable[[], None], several: int) -> float:
    started = time.perf_counter()
    for _ in range(several):
        way()
    return (time.perf_counter() - started) / several


@contextlib.contextmanager
def exchange(update: str, vector: np.ndarray, buffer: np.ndarray, path: Path) -> Iterator[Callable[[], None]]:
    """A function that pushes `vector` to the server of a run and pulls the next version into `buffer`."""
    with serving(update, 1, vector.nbytes / 1e6, path) as (_, address, secret):
        worker = Sleeper(address, secret, 0, vector, buffer)
        worker.pull()
        yield lambda: (worker.push(), worker.pull())
        worker.leave()


# -- tables and figure -------------------------------------------------------------------------------------------------


def lines(table: pd.DataFrame) -> pd.DataFrame:
    """Is cost linear? The server's CPU time against the number of exchanges, a straight line for each update and size.

    `cpu_ms` is its slope, the cost of one exchange; `worst` the largest distance of a point from it, as a share of the point.
    """
    rows = []
    for (update, megabytes), own in table.groupby(["update", "MB"], sort=False):
        slope = float((own.busy * own.exchanges_per_s).sum() / (own.exchanges_per_s**2).sum())
        apart = float((slope * own.exchanges_per_s / own.busy - 1).abs().max())
        several = own[own.workers > 1]
        rows.append({"update": update, "MB": megabytes, "cpu_ms": 1e3 * slope, "worst": apart, "lock_ms": several.lock_ms.median()})
    return pd.DataFrame(rows).set_index(["update", "MB"])


def saturation(table: pd.DataFrame, nap: float) -> pd.DataFrame:
    """Where the throughput ends to grow: by two predictions from what one worker alone was measured to need, and measured.

        serial       (nap + e) / e workers fill the time with their exchanges of e seconds, if no two overlap
        predicted    (nap + e) / s, with s what an exchange needs of the scarcest resource: of all cores together, or of the lock
        measured     the highest throughput over that of one worker

    `more` is true where it still grows: it is over 0.9 of what so many workers do that never wait for each other. With a
    barrier all exchange at once, and then all sleep: no prediction holds. `cycle_64_s` is what a cycle of 64 workers takes.
    """
    rows = []
    for (update, megabytes), own in table.groupby(["update", "MB"], sort=False):
        one, best = own.sort_values("workers").iloc[0], own.loc[own.exchanges_per_s.idxmax()]
        cycle = one.workers / one.exchanges_per_s
        gain = best.exchanges_per_s * cycle
        rows.append(
            {
                "update": update,
                "MB": megabytes,
                "serial": cycle / max(1e-4, cycle - nap),
                "predicted": 1e3 * cycle / max(one.all_ms / os.cpu_count(), one.lock_ms),
                "measured": gain,
                "more": bool(gain > 0.9 * own.workers.max()),
                "exchanges_per_s": best.exchanges_per_s,
                "busy": best.busy,
                "locked": best.locked,
                "machine": best.machine,
                "cycle_64_s": 64 / best.exchanges_per_s,
            }
        )
    return pd.DataFrame(rows).set_index(["update", "MB"])


def figure(table: pd.DataFrame, found: pd.DataFrame, update: str, note: str):
    """Throughput against workers, a line for each size of the weights; a mark where its rise would meet its highest level."""
    style.extension()
    elements, texts, dims = [], [], ("workers", "exchanges_per_s")
    for number, (megabytes, own) in enumerate(table[table["update"] == update].groupby("MB")):
        row, name = found.loc[(update, megabytes)], f"{megabytes:g} MB"
        elements.append(style.line(own.workers.to_numpy(), own.exchanges_per_s.to_numpy(), number, name, dims))
        texts.append(f"{'more than ' if row.more else ''}{own.workers.max() if row.more else round(row.measured)} of {name}")
        if not row.more:
            elements.append(style.marks([row.measured], [row.exchanges_per_s], 6, "saturated", dims))
    ticks = [(n, str(n)) for n in sorted(table.workers.unique())]
    labels = {"xlabel": "workers", "ylabel": "exchanges per second"}
    title = f"Workers that one server serves: {', '.join(texts)}"
    return style.finish(elements, title, note, **labels, xticks=ticks, logx=True, logy=True)


# -- the same with real workers ----------------------------------------------------------------------------------------


class Nap(labkit.Problem):
    """A problem whose step sleeps, with so many MB of weights that nothing changes."""

    def __init__(self, data, *, megabytes: float, nap: float, **common) -> None:
        super().__init__(data, **common)
        self.megabytes, self.nap = megabytes, nap

    def build(self, seed):
        module = nn.Module()
        module.weights = nn.Parameter(torch.ones(size(self.megabytes)))
        return module

    def optimisers(self, module):
        return ()

    def step(self, module, batch, optimisers, clock):
        time.sleep(self.nap)
        return {"loss": 0.0}

    def evaluate(self, module, batch):
        return {"loss": 0.0, "score": 0.5}


def real(update: str, n_workers: int, megabytes: float, nap: float, exchanges: int, run_dir: str | Path) -> float:
    """Exchanges per second of labkit's own workers, each of which makes so many, by the median of their cycles."""
    x, y = np.zeros((10 * n_workers, 1), np.float32), np.zeros(10 * n_workers, np.int64)
    problem = Nap((x, y), megabytes=megabytes, nap=nap, batch_size=1, score_samples=1)
    settings = {"local_steps": 1, "passes": n_workers * exchanges / len(problem.train_indices()), "checkpoints": 1}
    with labkit.connect("threads", n_workers) as lab:
        run = labkit.train(problem, lab, update=update, partition="udpa", name=f"real-{update}", runs=run_dir, **settings)
        pushes = run.wait(TIMEOUT_S).events.query("kind == 'push'")
    return n_workers / pushes.sort_values("seconds").groupby("worker").seconds.diff().median()


class Wide(nn.Module):
    """So many MB of weights in 16 layers of a size, and little to compute."""

    def __init__(self, megabytes: float = 1.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 512), nn.Linear(16, 2)
        self.parts = nn.ModuleList(nn.Linear(512, max(1, size(megabytes) // 16 // 512), bias=False) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        return self.last(torch.stack([part(x).mean(1) for part in self.parts], 1))


def multiples(update: str, n_workers: int, megabytes: float, optimiser: str, path: Path) -> list[dict[str, float | str]]:
    """The most memory of the server and of a worker during each of two runs, its curve included, over its weights; Linux only.

    Beyond what the same processes take for a run of hardly any weights. `torch` is what a process takes that trains the same network by a
    loop of torch alone: weights, gradient, the state of the optimiser, and what a step needs besides.
    """
    rows, base, torch_alone = [], {}, alone(megabytes, optimiser)
    with labkit.connect("dask", n_workers) as lab:
        pids = [worker.pid for worker in lab.workers]
        for number, wide in enumerate((0.1, megabytes, megabytes)):
            for pid in pids:
                forget_high_water(pid)
            how = {"update": update, "partition": "udpa", "passes": 3, "local_steps": 4, "checkpoints": 3}
            how |= {"join_timeout": TIMEOUT_S, "name": f"{number}", "runs": path}
            run, server = labkit.train(wide_problem(wide, optimiser), lab, **how), 0.0
            pid = next(child.pid for child in psutil.Process().children() if "training.server" in " ".join(child.cmdline()))
            while run.state == "running":
                with contextlib.suppress(OSError, StopIteration):  # it has ended
                    server = max(server, high_water(pid))
                time.sleep(0.02)
            run.wait()
            if not number:
                base = {"server": server, **{pid: psutil.Process(pid).memory_info().rss for pid in pids}}
                continue
            most = max(high_water(pid) - base[pid] for pid in pids)
            left = max(psutil.Process(pid).memory_info().rss - base[pid] for pid in pids)
            found = {"server": server - base["server"], "worker": most, "left": left}
            about = {"update": update, "workers": n_workers, "optimiser": optimiser, "MB": megabytes, "run": number}
            rows.append(about | {name: n / (1e6 * megabytes) for name, n in found.items()} | {"torch": torch_alone})
    shutil.rmtree(path, ignore_errors=True)
    return rows


def wide_problem(megabytes: float, optimiser: str) -> labkit.Classifier:
    """A network of so many MB; `optimiser` is "sgd", "adam", or "momentum" for SGD with it."""
    generator = np.random.default_rng(0)
    data = generator.normal(size=(64, 1, 2, 2)).astype(np.float32), generator.integers(0, 2, 64)
    plain = {"optimiser": optimiser, "momentum": 0.0 if optimiser == "sgd" else 0.9}
    plain = {"optimiser": "sgd", "momentum": 0.9} if optimiser == "momentum" else plain
    return labkit.Classifier(Wide, data, batch_size=4, lr=1e-3, model_args={"megabytes": megabytes}, **plain)


def alone(megabytes: float, optimiser: str) -> float:
    """The most memory, over the weights, of a process of its own that trains such a network without labkit: the most of three times."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_train_alone, megabytes, optimiser).result()


def _train_alone(megabytes: float, optimiser: str) -> float:
    prepare(threads=1)
    most, pid = [], os.getpid()
    for wide in (0.1, megabytes, megabytes, megabytes):
        base = psutil.Process().memory_info().rss
        forget_high_water(pid)
        problem = wide_problem(wide, optimiser)
        module = problem.build(0)
        (made,) = problem.optimisers(module)
        for _ in range(12):
            x, y = torch.randn(4, 1, 2, 2), torch.randint(0, 2, (4,))
            made.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            made.step()
        most.append((high_water(pid) - base) / (1e6 * wide))
        del module, made
        give_back()
    return max(most[1:])


def forget_high_water(pid: int) -> None:
    """The high-water mark of a process begins anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def high_water(pid: int) -> float:
    """The most memory, in bytes, that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
