"""labkit and torchft through the same faults: workers that sleep instead of computing, killed (SIGKILL) or frozen (SIGSTOP) one after the other.

Both train the same small network, a step of which sleeps, in as many processes; each process writes down when its steps end, and from
that alone comes what is measured:

    stood_s   the longest time without a step of another worker after a fault, beyond its mean step
    joins_s   the same when the killed one has come back
    back_s    from the kill to the first step of the process that takes its place, Python's start included
    kept      steps of all over those that the living would have made at their rate before the faults

torchft (a LighthouseServer, a Manager in each replica, gradients averaged at each step by its `allreduce`) starts nobody again: this module does,
at once, as Dask's nanny does for labkit. Run as a script it is one such replica, or their lighthouse.

Used by the chaos benchmark.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import labkit

FEATURES, LIMIT_S = 20, 60.0
HEARTBEAT_S, EXCHANGE_S = 1.5, 5.0  # torchft: after so long a silent replica is taken to be gone, and an exchange is given up


def network() -> nn.Module:
    return nn.Linear(FEATURES, 10)


def note(log: str) -> None:
    """A step has ended."""
    file = os.open(f"{log}/{os.getpid()}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(file, f"{time.time()}\n".encode())
    os.close(file)


class Sleepy(labkit.Problem):
    """A step sleeps, exchanges (all-reduce: in its backward pass) and is written down."""

    def __init__(self, data, *, nap: float, log: str, **common) -> None:
        super().__init__(data, **common)
        self.nap, self.log = nap, log

    def build(self, seed):
        return network()

    def optimisers(self, module):
        return (torch.optim.SGD(module.parameters(), lr=0.01),)

    def step(self, module, batch, optimisers, clock):
        time.sleep(self.nap)
        loss = module(batch[0]).square().mean()
        optimisers[0].zero_grad()
        loss.backward()
        optimisers[0].step()
        note(self.log)
        return {"loss": loss.detach()}

    def evaluate(self, module, batch):
        return {"loss": 0.0, "score": 0.5}


def replica(lighthouse: str, name: str, nap: float, log: str) -> None:
    """One replica of torchft, until it is killed."""
    import datetime

    import torch.distributed as dist
    import torchft

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    module = network()
    inner = torch.optim.SGD(module.parameters(), lr=0.01)

    def load(state):
        module.load_state_dict(state["module"])
        inner.load_state_dict(state["optimiser"])

    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=datetime.timedelta(seconds=EXCHANGE_S)),
        load_state_dict=load,
        state_dict=lambda: {"module": module.state_dict(), "optimiser": inner.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=name,
    )
    optimiser = torchft.Optimizer(manager, inner)
    while True:
        optimiser.zero_grad()
        time.sleep(nap)
        module(torch.randn(1, FEATURES)).square().mean().backward()
        # Not its DistributedDataParallel, which in 0.2.0 raises in the replicas that are left (mended in the nightly of 2026-10).
        for work in [manager.allreduce(parameter.grad) for parameter in module.parameters()]:
            work.wait()
        optimiser.step()
        note(log)


def lighthouse() -> None:
    """Torchft's coordinator, until its standard input is closed."""
    from torchft.coordination import LighthouseServer

    milliseconds = round(1000 * HEARTBEAT_S)
    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, heartbeat_timeout_ms=milliseconds)
    print(server.address(), flush=True)
    sys.stdin.read()
    server.shutdown()


# -- both, as processes by index -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def of_labkit(update: str, n: int, nap: float, local_steps: int, log: Path) -> Iterator[tuple[Callable, Callable]]:
    """A run on a lab of processes: what their pids are, and what starts one again (nothing: that is done without us)."""
    x, y = np.random.default_rng(0).normal(size=(1000 * n, FEATURES)).astype(np.float32), np.arange(1000 * n) % 2
    problem = Sleepy((x, y), nap=nap, log=str(log), batch_size=1, score_samples=1)
    settings = {"partition": "udpa", "local_steps": local_steps, "passes": 10_000, "checkpoints": 1, "runs": log.parent}
    with labkit.connect("dask", n) as lab:
        run = labkit.train(problem, lab, update=update, name=f"run-{update}", **settings)
        yield lambda: {worker.index: worker.pid for worker in lab.workers}, lambda index: None
        run.stop()


@contextlib.contextmanager
def of_torchft(n: int, nap: float, log: Path) -> Iterator[tuple[Callable, Callable]]:
    """The same of torchft's replicas, each of which writes a log of its own beside the folder."""
    there: dict[int, subprocess.Popen] = {}
    command = [sys.executable, __file__]
    with open(f"{log}-lighthouse.txt", "wb") as output:  # a line for each quorum
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        lighthouse = subprocess.Popen([*command, "lighthouse"], stderr=output, text=True, **pipes)
    address = lighthouse.stdout.readline().strip()

    def start(index: int) -> None:
        what = [address, f"replica-{index}", str(nap), str(log)]
        with open(f"{log}-{index}.txt", "ab") as output:
            there[index] = subprocess.Popen(
                [*command, *what], stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def again(index: int) -> None:
        there[index].wait()
        start(index)

    try:
        for index in range(n):
            start(index)
        yield lambda: {index: process.pid for index, process in there.items()}, again
    finally:
        for process in there.values():
            process.kill()
            process.wait()
        lighthouse.communicate()


# -- what is done to them, and what comes of it -----------------------------------------------------------------------------


def missing() -> str:
    """Why torchft cannot run here; empty if it can."""
    return (
        "" if importlib.util.find_spec("torchft") else "torchft is not installed here (pip install labkit[torchft]): labkit alone."
    )


def trials(updates: list[str], n: int, nap: float, local_steps: int, kills: int, freezes: int, run_dir: str) -> Iterator[dict]:
    """A row for each system and kind of fault: medians, and the longest."""
    for title, log, way in _systems(updates, n, nap, local_steps, run_dir):
        with way as (pids, again):
            for row in _faults(pids, again, log, kills, freezes):
                yield {"system": title, "workers": n, **row, "load": round(os.getloadavg()[0], 1)}


def regular(
    updates: list[str], n: int, nap: float, local_steps: int, calm_s: float, every_s: float, minutes: float, run_dir: str
) -> Iterator[dict]:
    """A row for each system in which somebody, drawn by a fixed seed, is killed every `every_s` seconds for so many minutes.

    `step_s` is a step of a living worker meanwhile, on average; `before_s` the same in `calm_s` seconds before.
    """
    for title, log, way in _systems(updates, n, nap, local_steps, run_dir):
        with way as (pids, again):
            calm = _calm(pids, log, 10, calm_s)
            draws, begun, kills = random.Random(0), time.time(), 0
            while time.time() + every_s <= begun + 60 * minutes + 1:
                time.sleep(every_s)
                there = pids()
                index = draws.choice(sorted(there))
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    os.kill(there[index], signal.SIGKILL)
                    kills += 1
                    again(index)
            row = {"kills": kills, "minutes": (time.time() - begun) / 60, "before_s": calm, "kept": kept(log, begun, calm)}
            yield {"system": title, "workers": n, **row, "step_s": calm / row["kept"], "load": round(os.getloadavg()[0], 1)}


def _systems(updates: list[str], n: int, nap: float, local_steps: int, run_dir: str) -> Iterator[tuple[str, Path, Any]]:
    """labkit under each update, then torchft if it is here: its title, the folder of its logs, and what starts and ends its processes."""
    ways = {f"labkit {update}": lambda log, update=update: of_labkit(update, n, nap, local_steps, log) for update in updates}
    if not missing():
        ways["torchft"] = lambda log: of_torchft(n, nap, log)
    for title, way in ways.items():
        log = Path(run_dir).resolve() / f"steps-{title.replace(' ', '-')}"
        shutil.rmtree(log, ignore_errors=True)
        log.mkdir(parents=True)
        yield title, log, way(log)


def _calm(pids: Callable, log: Path, first: int, seconds: float) -> float:
    """The mean step without faults, in so many seconds after everybody's first steps, of which half are left out."""
    _until(lambda: all(len(steps(log, pid)) > first for pid in pids().values()), "the first steps", 10 * LIMIT_S)
    time.sleep(seconds)
    return float(np.mean([step for pid in pids().values() for step in np.diff(steps(log, pid)[first // 2 :])]))


def _faults(pids: Callable, again: Callable, log: Path, kills: int, freezes: int) -> Iterator[dict]:
    mean, begun, found = _calm(pids, log, 20, 3.0), time.time(), []
    for number in range(kills):
        time.sleep(1.0)
        index = number % len(pids())
        others, pid, at = _others(pids, index), pids()[index], time.time()
        os.kill(pid, signal.SIGKILL)
        again(index)
        _until(lambda index=index, pid=pid: pids()[index] != pid and len(steps(log, pids()[index])), "the killed one")
        back = steps(log, pids()[index])[0]
        time.sleep(1.5)
        found.append((_pause(log, others, at, min(at + 2.0, back)), _pause(log, others, back - 0.5, back + 1.0), back - at))
    if found:
        stood, joins, backs = (np.array(column) for column in zip(*found, strict=True))
        row = {"fault": "kill", "n": kills, "stood_s": np.median(stood) - mean, "most_s": stood.max() - mean}
        yield row | {"joins_s": np.median(joins) - mean, "back_s": np.median(backs), "kept": kept(log, begun, mean)}
    found = []
    for number in range(freezes):
        time.sleep(3.0)
        index = number % len(pids())
        others, pid, at = _others(pids, index), pids()[index], time.time()
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(2 * EXCHANGE_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        found.append(_pause(log, others, at, at + 2 * EXCHANGE_S))
    if found:
        yield {"fault": "freeze", "n": freezes, "stood_s": np.median(found) - mean, "most_s": max(found) - mean}


def steps(log: Path, pid: int) -> np.ndarray:
    """When the steps of a process ended, on the clock of `time.time`; none of one that has made none."""
    with contextlib.suppress(FileNotFoundError):
        return np.array((log / str(pid)).read_text().split(), float)
    return np.empty(0)


def kept(log: Path, begun: float, mean: float) -> float:
    """Steps since `begun` over those of workers that live as long and take `mean` seconds for each."""
    made, lived = 0, 0.0
    for file in log.iterdir():
        ends = steps(log, int(file.name))
        ends = ends[ends >= begun]
        if len(ends) > 1:
            made, lived = made + len(ends) - 1, lived + ends[-1] - ends[0]
    return made * mean / lived


def _others(pids: Callable, index: int) -> list[int]:
    return [pid for other, pid in pids().items() if other != index]


def _pause(log: Path, pids: list[int], begin: float, end: float) -> float:
    """The longest time between two steps of one of these, of which a part is between `begin` and `end`."""
    longest = 0.0
    for pid in pids:
        ends = steps(log, pid)
        inside = (ends[1:] > begin) & (ends[:-1] < end)
        longest = max(longest, float(np.diff(ends)[inside].max(initial=0.0)))
    return longest


def _until(there: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    limit = time.monotonic() + limit_s
    while not there():
        if time.monotonic() > limit:
            raise TimeoutError(f"{what}: not within {limit_s:g} s.")
        time.sleep(0.05)


if __name__ == "__main__":
    lighthouse() if sys.argv[1:] == ["lighthouse"] else replica(*sys.argv[1:3], float(sys.argv[3]), sys.argv[4])
