"""A run without a cluster: what stands in for the workers and for the run directory when a course is driven in one process.

    Replicas   the replica of every worker side by side, each with its own random numbers and its own number of torch threads
    Ledger     the directory that comes out: events and versions, written as they are made

The course itself is the `Coordinator` of live runs.

Used by `labkit.simulation.exact` and `labkit.simulation.simulator`.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labkit.errors import RunError
from labkit.partition import Partition
from labkit.problems.problem import Problem
from labkit.runs import checkpoints
from labkit.runs.config import RunConfig, environment
from labkit.runs.events import Recorder
from labkit.runs.files import replacing, write_json
from labkit.training.server.coordinator import Coordinator
from labkit.training.train import claim
from labkit.training.wire import compression
from labkit.training.wire.protocol import Answer, Grant
from labkit.training.worker.replica import Replica
from labkit.updates import Update


@dataclass
class _Place:
    """One worker's: its replica, its random numbers (None before they were seeded), how it computes."""

    replica: Replica
    threads: int
    shared: bool
    random: torch.Tensor | None = None
    went: Grant | None = None  # its latest


class Replicas:
    """The workers of a run of this `config`, computing one after the other in this process; torch is left as it was (`close`)."""

    def __init__(self, problem: Problem, config: RunConfig) -> None:
        self.problem, self.seed, self.budget = problem, config.seed, config.budget
        self.exchange = config.exchange
        self.places: dict[int, _Place] = {}
        self._threads = torch.get_num_threads()

    def join(self, worker: int, threads: int = 1, shared: bool = False) -> None:
        """A new incarnation of `worker`; with a `shared` generator its random numbers cannot be drawn again."""
        with torch.random.fork_rng(devices=[]):
            replica = Replica(self.problem, self.seed, worker, self.budget)
        self.places[worker] = _Place(replica, threads, shared)

    def work(self, worker: int, go: Answer) -> tuple[dict, np.ndarray]:
        """The local pass that `go` asks for: what `Replica.local_pass` returns, and the weights as the server gets them."""
        place = self.places[worker]
        replica = place.replica
        with self._as(place):
            if replica.shard is None:
                replica.begin(go.grant.incarnation)
            began = torch.get_rng_state() if place.shared else None
            if place.went:  # what it did while its push was under way
                replica.ahead(place.went)
            given, taken = compression.pack(go.weights, self.exchange), np.array(go.weights)
            if self.exchange != "float32":
                compression.unpack(given, self.exchange, taken)
            replica.pull(torch.from_numpy(taken), go.grant.carry)
            replica.hold(go.grant.retain, go.indices)
            done, place.went = replica.local_pass(go.grant), go.grant
            if began is not None and not torch.equal(began, torch.get_rng_state()):
                raise RunError(
                    "the model or the problem draws random numbers (dropout, say), and the workers of this run were threads that "
                    "shared one generator: who drew when is not in the record. Train it on processes: connect(kind='dask')."
                )
        return done, self._pushed(replica, go.weights, given)

    def score(self, worker: int) -> float:
        """Q of what this worker has pushed last."""
        place = self.places[worker]
        with self._as(place):
            return place.replica.score()

    def _pushed(self, replica: Replica, base: np.ndarray, given: np.ndarray) -> np.ndarray:
        """As the server gets it, float32 (n,), good until the worker is at work again."""
        weights = replica.flat.numpy()
        if self.exchange == "float32":
            return weights
        change, made = compression.buffer(self.exchange, len(weights)), np.empty_like(weights)
        n = replica.layout.n_params
        shift = compression.pack_change(weights, given, self.exchange, change, n)
        compression.add_change(base, change, self.exchange, shift, made, n)
        return made

    def close(self) -> None:
        torch.set_num_threads(self._threads)

    @contextlib.contextmanager
    def _as(self, place: _Place) -> Iterator[None]:
        if torch.get_num_threads() != place.threads:
            torch.set_num_threads(place.threads)
        with torch.random.fork_rng(devices=[]):
            if place.random is not None:
                torch.set_rng_state(place.random)
            yield
            place.random = torch.get_rng_state()


class Ledger:
    """A new run directory beside no cluster; `origin` says what kind of run it holds. Its driver sets the clock of the recorder."""

    def __init__(self, runs: Path, name: str, config: RunConfig, layout: dict, origin: dict) -> None:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        self.config = config.replace(id=secrets.token_hex(8), name=name, origin=origin, created=created)
        self.path = claim(runs, name)
        try:
            self.config.save(self.path)
            write_json(self.path / "environment.json", environment())
            write_json(self.path / "layout.json", layout)
            self.recorder = Recorder(self.path)
        except OSError as error:
            raise RunError(f"nothing can be written in {self.path}: {error}. Give another folder: runs=...") from error

    def save(self, version: int, weights: np.ndarray) -> int:
        """A checkpoint without state, as nothing goes on from it; returns its size in bytes."""
        return checkpoints.write(self.path, version, weights)

    def no_curve(self) -> None:
        """There are no weights to measure, so the curve is empty."""
        import pandas as pd

        with replacing(self.path / "metrics.parquet") as file:
            pd.DataFrame(columns=["seconds", "samples", "version", "loss", "score"], dtype=float).to_parquet(file)

    def close(self, status: dict) -> None:
        """No event comes any more; `status` says how the run ended."""
        self.recorder.close()
        write_json(self.path / "status.json", status)


def begin_course(
    config: RunConfig,
    update: Update,
    partition: Partition,
    weights: np.ndarray,
    n_buffers: int,
    *,
    blocks: Iterable[int] = (),
    labels: np.ndarray | None = None,
    state: dict | None = None,
    **options: Any,
) -> Coordinator:
    """A coordinator as the server of a run of this `config` would make it; `options` are its other arguments."""
    if state:
        update.go_on(weights, config.indices, n_buffers, state["update"])
        partition.load_state_dict(state["partition"])
    else:
        update.start(weights, config.indices, n_buffers, blocks)
        partition.start(config.n_train, config.indices, seed=config.seed, labels=labels)
    return Coordinator(config, update, partition, state=state, **options)
