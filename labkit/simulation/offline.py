"""A run without a cluster: what stands in for the workers and for the run directory when a course is driven in one process.

    Replicas   the replica of every worker side by side, each with its own random numbers and its own number of torch threads
    Ledger     the directory that comes out: events and versions, written as they are made

The course itself is the `Coordinator` of live runs.

Used by `labkit.simulation.exact`, `labkit.simulation.joint`, `labkit.simulation.counterfactual` and `labkit.simulation.simulator`.
"""

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from labkit.errors import RunError
from labkit.inner.precision import Precision
from labkit.locks import DirectoryLock
from labkit.models.flat import Flat
from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.runs import checkpoints, metrics, status, summary
from labkit.runs.config import RunConfig
from labkit.runs.events import Recorder, read_rows
from labkit.runs.record import RunRecord
from labkit.training.server.coordinator import Coordinator
from labkit.training.train import labels_for, new_run, under_name
from labkit.training.wire import compression
from labkit.training.wire.protocol import Answer, Grant
from labkit.training.worker.replica import Replica
from labkit.training.worker.worker import WeightBuffers
from labkit.updates import BadPush, Update

Progress = Callable[[int], None]  # called with the samples done so far


@dataclass
class Incarnation:
    """One incarnation: its replica, the weights on their way, how it computes, its random numbers (None: not seeded yet)."""

    replica: Replica
    buffers: WeightBuffers
    threads: int
    shared: bool
    random: torch.Tensor | None = None
    grant: Grant | None = None  # the latest
    group: Any = None  # of an all-reduce
    precision: Precision | None = None  # None: as the problem says


class Replicas:
    """The workers of a run of this `config`, computing one after the other in this process; torch is left as it was (`close`)."""

    def __init__(self, problem: Problem, config: RunConfig) -> None:
        self.problem, self.config, self.workers = problem, config, {}
        self._threads = torch.get_num_threads()

    def join(self, worker: int, threads: int = 1, shared: bool = False, precision: Mapping[str, Any] | None = None) -> None:
        """A new incarnation of `worker`; with a `shared` generator its random numbers cannot be drawn again. `precision` is what it
        computed in, by its event "join"."""
        computed_in = Precision(**precision) if precision else None
        self.workers[worker] = Incarnation(*self._built(worker, computed_in), threads, shared, precision=computed_in)

    def _built(self, worker: int, precision: Precision | None) -> tuple[Replica, WeightBuffers]:
        how = {"exact": self.config.exact_buffers, "precision": precision}
        with torch.random.fork_rng(devices=[]):
            replica = Replica(self.problem, self.config.seed, worker, self.config.budget, **how)
        return replica, WeightBuffers(replica, self.config.exchange, apart=self.config.overlap > 0)

    def work(self, worker: int, answer: Answer, computed: str | None = None) -> tuple[dict, np.ndarray]:
        """The local pass that was granted: what `Replica.local_pass` returns, and the weights as the server gets them.

        `computed` says how its steps were computed, as of `Problem.compute_as`.
        These, float32 (n,), are good until the worker is at work again.
        """
        own, dtype = self.workers[worker], self.config.exchange
        replica, buffers = own.replica, own.buffers
        with self._as(own):
            if replica.shard is None:
                replica.begin(answer.grant.incarnation)
            began = torch.get_rng_state() if own.shared else None
            self._take(own, answer, computed)
            done = replica.local_pass(answer.grant)
            if began is not None and not torch.equal(began, torch.get_rng_state()):
                raise RunError(
                    "the model or the problem draws random numbers (dropout, say), and the workers of this run were threads that "
                    "shared one generator: who drew when is not in the record. Train it on processes: connect(kind='dask'). What a step "
                    "draws from clock.generator is replayed from threads too."
                )
        buffers.pack()
        if dtype == "float32":
            return done, buffers.weights
        weights = np.empty_like(answer.weights)
        sizes = replica.layout.n_params, self.config.still
        compression.add_change(answer.weights, buffers.pushed, dtype, buffers.shift, weights, *sizes)
        return done, weights

    def _take(self, own: Incarnation, answer: Answer, computed: str | None = None) -> None:
        """What its worker does with a grant before the local pass."""
        replica, buffers = own.replica, own.buffers
        if computed:
            replica.problem.compute_as(replica.module, computed)
        if own.grant:  # what it did while its push was under way
            replica.ahead(own.grant)
        np.copyto(buffers.pulled, compression.pack(answer.weights, self.config.exchange))
        buffers.unpack(answer.grant.carry)
        replica.hold(answer.grant.retain, answer.indices)
        own.grant = answer.grant

    def score(self, worker: int) -> float:
        """Q of what this worker has pushed last."""
        with self._as(self.workers[worker]):
            return self.workers[worker].replica.score()

    def close(self) -> None:
        torch.set_num_threads(self._threads)

    @contextlib.contextmanager
    def _as(self, worker: Incarnation) -> Iterator[None]:
        if torch.get_num_threads() != worker.threads:
            torch.set_num_threads(worker.threads)
        with torch.random.fork_rng(devices=[]):
            if worker.random is not None:
                torch.set_rng_state(worker.random)
            yield
            worker.random = torch.get_rng_state()


class Ledger(contextlib.AbstractContextManager):
    """A new run directory beside no cluster, until the end of a `with` block; `origin` says what kind of run it holds.

    Its driver sets the clock of the `recorder`, and the `status` when the run has `ended`. What is refused before a first push leaves no
    directory.
    """

    def __init__(
        self, runs: Path, name: str | None, default: str, config: RunConfig, layout: checkpoints.Layout, origin: dict
    ) -> None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self.config = config.replace(id=secrets.token_hex(8), name=name or default, origin=origin, created=created)

        def begin_as(name: str) -> tuple[Path, DirectoryLock]:
            self.config = self.config.replace(name=name)
            return new_run(runs, self.config, layout)

        self.path, self._lock = under_name(name, default, begin_as)
        self.status = {"state": "failed", "reason": f"this {origin['kind']} run was cut off."}
        self.recorder = Recorder(self.path)

    def save(self, version: int, weights: np.ndarray, state: dict) -> None:
        """A checkpoint without its state, as nothing goes on from it, and its event."""
        size = checkpoints.write(self.path, version, weights, checkpoints.lasting(state), run=self.config.id)
        self.recorder.event("checkpoint", version=version, total=state["done"], bytes=size)

    def no_curve(self) -> None:
        """There are no weights to measure, so the curve is empty."""
        metrics.write(self.path, self.config.id, pd.DataFrame(columns=metrics.COLUMNS, dtype=float))

    def ended(self, it: Coordinator, **other: Any) -> None:
        """The status as this course has ended; `other` entries count for more."""
        self.status = {"state": it.state, "reason": it.reason, "version": it.update.version, "samples": it.grants.done} | other

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RunError):
            self.status["reason"] = str(error)
        self.recorder.close()
        if error and not any(row["kind"] == "push" for row in read_rows(self.path)):
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            status.write(self.path, self.config.id, self.status, self.recorder.events)
            summary.write(RunRecord(self.path))
        self._lock.release()


def push(it: Coordinator, worker: int, header: dict, weights: np.ndarray, n_bytes: int) -> None:
    """A push that cannot be merged ends the course: its worker, if it began anew, would do the same."""
    member = it.members[worker]
    try:
        it.push(member, header, weights, n_bytes)
    except BadPush as error:
        it.stop("failed", str(error))
        it.leave(member, str(error))


def begin_course(
    config: RunConfig, problem: Problem, update: Update, partition: Partition, weights: np.ndarray | None = None, **options: Any
) -> Coordinator:
    """A coordinator as the server of this run would make it, by default at its initial weights; for `options` see there."""
    state = Flat(problem.new_module(config.seed), exact=config.exact_buffers)
    weights, layout = state.vector.numpy() if weights is None else weights, checkpoints.Layout.of(*state.shapes)
    config, labels = config.replace(batch_size=problem.batch_size), labels_for(partition, problem)
    return Coordinator.begin(config, update, partition, weights, layout, labels=labels, **options)
