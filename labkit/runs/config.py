"""The settings of a run: what `config.json` holds, spelt out once, whatever format it was written in.

    train(...)  ->  RunConfig  ->  config.json, server, workers          live
    config.json ->  RunConfig  ->  figures, replay, simulation, resume   afterwards

What earlier formats did not have is filled in by `RunConfig.load`; nobody else needs to know of them:

    1    no replays: probed speeds and threads of the workers are missing
    2    classes by the module that they were in, `silence` and `patience` for the two time limits
    3    public names (labkit:Classifier), batch_size, one_process
    4    exact_buffers: counters, flags and other buffers that are not float32 are in the weight vector, bit for bit
         digests: of JSON files, of each event, of the curve; what holds none is of an earlier format, or was damaged
    5    still: tensors that no push has changed keep their bits
         a local pass of an all-reduce that was broken off is made again with the same samples
    6    balanced_end: the last local passes of workers that train independently end together

Used wherever a run is started, driven or read. Imports numpy alone, so that the server stays small.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from labkit.cluster.emulation import Unevenness
from labkit.errors import RunError
from labkit.imports import by_value
from labkit.runs.files import find_json, read_json, write_json

FORMAT = 7  # of the run directory; what is newer is refused
JOINT = 5  # the first in which an all-reduce can be replayed
REPLAYABLE = 2  # the first format that holds all that a replay needs
FILE = "config.json"
# Settings that are left out where a run has none.
OPTIONAL = ("units", "milestones", "ema", "lower_is_better", "target", "patience", "sources", "origin", "scenario", "resumed")
PACKAGES = ("labkit", "torch", "numpy", "dask", "distributed", "ipyparallel", "papermill", "hvplot")
WORKER = {"index": int, "name": str, "host": str, "device": str, "threads": int, "pid": int, "slowdown": float, "drifts_to": float}
ALWAYS = ("index", "host", "slowdown")  # fields of a worker in every format
PUBLIC = {"labkit.problems:Classifier": "labkit:Classifier", "labkit.parts:Subnet": "labkit:Subnet"}  # of format 2 and before


@dataclass(frozen=True, kw_only=True)
class RunConfig(Mapping[str, Any]):
    """The settings of one run. Users read them like the dict in `config.json`: `run.config["seed"]`; `dict(run.config)` is one.

    `update`, `partition` and `problem` are the `config()` of each; `workers` the fields of `labkit.cluster.lab.Worker`, one dict
    each. `budget` are the samples to train on, all workers together, `n_train` those of the data set.
    """

    format: int = FORMAT
    id: str = ""  # also in its checkpoints, so that those of another run are refused
    labkit: str | None = None  # the version that wrote it
    name: str = ""
    created: str = ""
    # what is trained, and how
    problem: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    update: Mapping[str, Any]
    partition: Mapping[str, Any]
    passes: float
    local_steps: int | None = None
    seed: int = 0
    budget: int
    checkpoints: int
    n_train: int
    units: Sequence[int] = ()  # offsets in these of what the data set reads together, such as row groups; none: each by itself
    exact_buffers: bool = True  # are buffers that are not float32 in the weight vector (`labkit.models.flat`)?
    still: bool = True  # do tensors that no push has changed keep their bits (`labkit.updates.base`)?
    balanced_end: bool = True  # do the last local passes end together (`labkit.training.server.grants`)?
    batch_size: int | None  # None: an earlier format, and a problem that sets its own
    exchange: str = "float32"  # how weights travel: `labkit.training.wire.compression`
    overlap: int = 0  # batches that a worker computes while its push is under way
    heartbeat_timeout: float | None = None  # seconds; None: adaptive (`labkit.training.server.membership.FailureDetector`)
    join_timeout: float = 60.0  # seconds
    milestones: Sequence[int] = ()  # samples, of all workers, after which the problem settles something
    ema: float | None = None  # decay of the average of the global weights, for an optimiser step (`labkit.training.server.average`)
    lower_is_better: bool = False  # of scores
    target: float | None = None  # the score on the score set at which the run ends
    patience: int | None = None  # it ends after so many retained versions that are no better
    synthetic: bool = False  # are the data generated?
    data_note: str = ""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 of users' code (`labkit.sources`)
    # where
    kind: str = "threads"
    n_workers: int
    workers: Sequence[Mapping[str, Any]]
    one_process: bool = False  # are all workers threads of one process?
    jitter: float = 0.0
    drift: float = 0.0
    stalls: Sequence[float] | None = None  # mean seconds of work between two, seconds of each
    emulated: bool = False  # are some workers slower than they are?
    # its history
    origin: Mapping[str, Any] | None = None  # of a run that no cluster has made: its kind, and the run that it comes from
    scenario: Mapping[str, Any] | None = None  # of a simulation: what was asked beside these settings
    resumed: Sequence[Mapping[str, Any]] = ()  # of each time: version, samples, when, and where the run was before

    @classmethod
    def load(cls, run: Path) -> RunConfig:
        """The settings in a run directory; RunError where there are none, or those of a later labkit."""
        file = Path(run) / FILE
        stored = read_json(file)
        try:
            if stored.get("format", 0) > FORMAT:
                raise RunError(f"{run} was written by a later labkit ({stored.get('labkit')}). Update labkit to read it.")
            config = cls(**{key: value for key, value in _present(stored).items() if key in cls.__dataclass_fields__})
            config._check(set(stored) if stored.get("format", 0) > 3 else set())
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RunError(f"{file} is not whole: {error}. Is it the file of a run? Put a copy of it back.") from error
        _check_own(file, config.id)
        return config

    def _check(self, stored: set[str]) -> None:
        """TypeError for a setting of another type than it is written in, or that no run has."""
        if unknown := stored - set(self.__dataclass_fields__):
            raise TypeError(f"{min(unknown)!r} is no setting of a run")
        for name, kind in get_type_hints(RunConfig).items():
            if not _is_a(value := getattr(self, name), kind):
                raise TypeError(f"{name} is {value!r}")
        for what in ("update", "partition"):
            name = getattr(self, what).get("name")
            if not isinstance(name, str) and not (isinstance(name, Mapping) and "by_value" in name):  # a class of the user's own
                raise TypeError(f"the name of its {what} is {name!r}")
        _check_workers(self.workers)
        for note in self.resumed:
            if not _is_a(before := note.get("before", {}), Mapping[str, Any]):
                raise TypeError(f"what was before it was resumed is {before!r}")
            if not _is_a(workers := before.get("workers", []), Sequence[Mapping[str, Any]]):
                raise TypeError(f"workers before it was resumed are {workers!r}")
            _check_workers(workers)
        if not self.name.isprintable():  # names are printed, and a terminal obeys control characters
            raise ValueError(f"the name of the run is {self.name!r}")

    @property
    def without_weights(self) -> bool:
        """Was it simulated without numerics, so that it has times alone?"""
        origin = self.origin or {}
        return origin.get("kind") == "simulated" and not origin.get("numerics")

    @property
    def by_name_alone(self) -> list[str]:
        """Which of problem, update and partition the record has by name alone, so that they are given again to what makes them anew."""
        return [what for what in ("problem", "update", "partition") if by_value(getattr(self, what)) is not None]

    def resume_call(self, run: str | Path, lab: bool = False) -> str:
        """The call that goes on with this run, which is in the directory `run`; with `lab` it names one."""
        again = [f"{what}={what}" for what in self.by_name_alone]
        return f"labkit.resume({', '.join([repr(str(run)), *['lab'] * lab, *again])})"

    def save(self, run: Path) -> None:
        """Write `config.json`, in the present format. What a run does not have is left out."""
        write_json(Path(run) / FILE, {**self, "format": FORMAT}, run=self.id)

    def replace(self, **changes: Any) -> RunConfig:
        """The same settings but for these."""
        return dataclasses.replace(self, **changes)

    def __getitem__(self, name: str) -> Any:
        if name not in iter(self):
            raise KeyError(f"a run has no setting {name!r}. It has: {', '.join(self)}.")
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.__dataclass_fields__ if name not in OPTIONAL or getattr(self, name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def indices(self) -> list[int]:
        """Of the workers that the run begins with."""
        return sorted(int(worker["index"]) for worker in self.workers)

    def unevenness(self, worker: int) -> Unevenness:
        """How a worker was made slower than it is; newcomers have no slowdown, as on a live lab."""
        slow = next((about for about in self.workers if about["index"] == worker), {"slowdown": 1.0})
        here, there = float(slow["slowdown"]), float(slow.get("drifts_to", slow["slowdown"]))
        return Unevenness(here, self.jitter, self.drift, there, tuple(self.stalls) if self.stalls else None)


def _is_a(value: Any, kind: Any) -> bool:
    """Is this what JSON makes of such a setting?"""
    if kind is Any:
        return True
    if get_origin(kind) in (Union, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if (of := get_origin(kind)) is not None:
        return (
            isinstance(value, of) and not isinstance(value, str) and all(_is_a(item, get_args(kind)[-1]) for item in _items(value))
        )
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _check_workers(workers: Sequence[Mapping[str, Any]]) -> None:
    """TypeError for a field of another type than it is written in."""
    for worker in workers:
        for name, kind in WORKER.items():
            value = worker.get(name)
            if (name in worker or name in ALWAYS) and not _is_a(value, kind):
                raise TypeError(f"{name} of a worker is {value!r}")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, Mapping) else value


def _check_own(file: Path, run: str) -> None:
    """The files beside it must not be all of one other run."""
    beside = {name: find_json(file.with_name(name)) for name in ("environment.json", "layout.json", "status.json")}
    others = {name: value["run"] for name, value in beside.items() if isinstance(value, dict) and isinstance(value.get("run"), str)}
    if others and run not in others.values() and len(set(others.values())) == 1:
        raise RunError(
            f"{file} belongs to another run: it has the id {run or 'of none'!r}, and {', '.join(others)} beside it "
            f"{min(others.values())!r}. Put its own back."
        )


def _present(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of any format as the present one has them."""
    config = {"format": 0, **stored}
    if config["format"] < 3:
        problem = config["problem"]
        config["problem"] = {**problem, "kind": PUBLIC.get(problem["kind"], problem["kind"])}
        config["batch_size"] = problem.get("batch_size")
        for now, before in (("heartbeat_timeout", "silence"), ("join_timeout", "patience")):
            if before in config:
                config[now] = config.pop(before)
        processes = {(worker["host"], worker["pid"]) for worker in config["workers"]}
        config["one_process"] = len(processes) == 1 < len(config["workers"])
    if config["format"] < 4:
        config.setdefault("exact_buffers", False)
    if config["format"] < 5:
        config.setdefault("still", False)
    if config["format"] < 6:
        config.setdefault("balanced_end", False)
    if config.get("update", {}).get("name") == "allreduce":  # of before it had a choice
        config["update"] = {"buffers": "first", "sync_batchnorm": False, **config["update"]}
    return config


def environment() -> dict[str, Any]:
    """Where and with what a run was made: versions, machine, load."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
