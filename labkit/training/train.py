"""Training on a lab: puts the partition, the update, the server, the workers and the record together.

    problem fits?  ->  run directory  ->  server (a process)  ->  one worker loop on each worker of the lab
                                             |  pull, local pass, score, push ... until passes x n samples are trained on
    curve of the kept versions  <-  record  <-  everyone has left

`train` returns at once; a thread of the kernel follows the run to its end.

Used from notebooks, by `labkit.training.resume`, which does the second half for a run that exists, by `labkit.subnets.train` and
`labkit.experiments.search`, which launch runs on workers that they hold already, and by `labkit.simulation.offline` and `labkit.simulation.scenario`.
"""

import contextlib
import copy
import itertools
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from labkit import locks
from labkit.cluster.lab import Lab
from labkit.cluster.notice import telling
from labkit.errors import (
    LONGEST_WAIT_S,
    MOST,
    SEEDS,
    ClusterError,
    ProblemError,
    RunError,
    RunningError,
    file_path,
    instance,
    known,
    real,
    text,
    whole,
)
from labkit.imports import rule_title
from labkit.locks import DirectoryLock
from labkit.models.flat import Flat
from labkit.names import named
from labkit.partition import Partition, make_partition
from labkit.problems.problem import Problem
from labkit.runs import server_file
from labkit.runs.checkpoints import Layout
from labkit.runs.config import RunConfig, environment
from labkit.runs.files import write_json
from labkit.sources import check, digests, needed, unpicklable
from labkit.training.monitor import Monitor, OnVersion
from labkit.training.run import Run
from labkit.training.server.server import ServerSpec
from labkit.training.supervisor import Supervisor
from labkit.training.wire.compression import DTYPES
from labkit.training.worker.allreduce import check_problem
from labkit.updates import Update, make_update

T = TypeVar("T")


@telling("The training is being prepared: the first one of a kernel takes some seconds.")
@named
def train(
    problem: Problem,
    lab: Lab,
    *,
    partition: str | dict | Partition = "idpa",
    update: str | dict | Update = "agwu",
    passes: float = 5,
    local_steps: int | None = None,
    seed: int = 0,
    name: str | None = None,
    runs: str | Path = "runs",
    checkpoints: int = 32,
    workers: Sequence[int] | None = None,
    exchange: str = "float32",
    overlap: int = 0,
    heartbeat_timeout: float | None = None,
    join_timeout: float = 60.0,
    target: float | None = None,
    patience: int | None = None,
    on_version: OnVersion | None = None,
) -> Run:
    """Train a problem on a lab; returns at once with a `Run`.

    Parameters
    ----------
    problem, lab
        What to train, and where.
    partition, update
        Objects or names: `IDPA(batches=4)` or "idpa"; `AGWU()` or "agwu" (`labkit.updates.names()` lists all). Or a dict of name
        and settings: {"name": "fedbuff", "size": 4}. A class of your own is named by its import path, "my_module:Mine".
    passes
        Length of the run: all workers together train on `passes` times the training samples. (BPT-CNN counts iterations K; with A
        allocation batches the same number of sample visits takes K + (A-1)/2 local passes.)
    local_steps
        Optimiser steps of a local pass, on average over the workers: each does them in proportion to its shard, so that a balanced
        partition stays balanced. By default a local pass is one pass of the worker over its shard.
    seed
        Initial weights, shuffles and orders all derive from it.
    name, runs
        The run is recorded in `runs/name`; an earlier run there that has ended is kept under `name.1`, `name.2`, ... Default name:
        strategy and seed, and where another kernel's run of that name is running, the next free of `name-2`, `name-3`, ...
    checkpoints
        How many versions to keep and to measure afterwards, spread evenly over the run.
    workers
        Indices of the workers to train on; by default all that no other run holds, and those that join in mid-run.
    exchange
        How weights travel: "float32", or with half the bytes "bfloat16" or "float16" (`labkit.training.wire.compression`):
        versions are rounded on their way to a worker, and of its push the change. The server's weights stay float32.
    overlap
        Batches that a worker goes on computing while its push and the next version are on their way; they count for its next
        push, whose last batches are then from an older version. 0: it stands still meanwhile. Where the rule does not weigh pushes
        by their score, that is measured in this time too. `stop` waits for these batches. Rules that answer at once (AGWU,
        FedAsync, ...) allow both, those that wait for everybody (LocalSGD, DiLoCo) the score alone; SGWU and AllReduce refuse.
    heartbeat_timeout
        Seconds without a heartbeat (workers send two a second) after which a worker is taken to be lost: the others go on, and it
        may join again. By default adaptive: four times its longest silence of late, from 2 to 10 s (4 s for one that has just come).
    join_timeout
        Seconds that the run waits for all workers at the start, before it begins without the missing ones (they may come later);
        and for anybody when every worker is lost, before it fails (`resume` goes on from there).
    target
        The run is stopped, with the reason in its record, when a retained version reaches this score on the score set (from above
        where the problem says `lower_is_better`).
    patience
        It is stopped when so many retained versions in a row (of which `checkpoints` come in a whole run) were no better on the
        score set than the best before them. `run.model("best")` is the best one.
    on_version
        Called in a thread of this kernel as `on_version(run, version, measured)` for each retained version, `measured` with at
        least "loss" and "score" on the score set: for a log of your own, or to `run.stop()`. What it raises fails the run; one
        that is done ends when it has been called for all of them. To
        measure in mid-run costs this machine time: leave these three out where times are compared.

    Raises
    ------
    ProblemError, DataError, PartitionError, RunError, ClusterError, ValueError
        The request makes no sense; nothing has been started. A `RunningError`, which is a RunError: a run of this name is running
        that another kernel has started, which may have died; follow or stop it (`load_run(...).attach()`), or choose another name. A ClusterError also:
        a module of your own is not what this kernel has loaded, as its file was edited since.

    Examples
    --------
    >>> run = labkit.train(problem, lab, partition="idpa", update="agwu", passes=2, seed=0, name="first")
    >>> run.wait().state
    'done'
    >>> run.summary()["versions"] > 0
    True
    """
    update, partition = make_update(update), make_partition(partition)
    seed = whole("seed", seed, 0, SEEDS, error=ValueError)
    lengths = {"seed": seed, **check_lengths(passes, local_steps, checkpoints)}
    traffic = check_traffic(update, exchange, overlap)
    limits = check_limits(heartbeat_timeout, join_timeout)
    bounds = {} if getattr(problem, "lower_is_better", False) else {"above": 0, "most": 1}
    limits["target"] = None if target is None else real("target", target, **bounds)
    limits["patience"] = None if patience is None else whole("patience", patience, error=ValueError)
    on_version = (
        None if on_version is None else instance("on_version", on_version, Callable, ", on_version(run, version, measured)")
    )
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}; give a labkit.Problem such as labkit.Classifier(...).")
    instance("lab", lab, Lab, " of labkit.connect(...)")
    runs, name = file_path("runs", runs), None if name is None else run_name(name)
    check_under(problem, update, seed, scored=target is not None or patience is not None)
    default = "-".join([*(rule_title(rule.config()) for rule in (update, partition)), f"seed{seed}"])
    newcomers = workers is None
    workers = choose(lab, workers, runs / (name or default))
    check_shards(problem, workers, partition)
    check_travels(problem, update, partition)
    config = configure(problem, lab, workers, update, partition, name=name or default, **lengths, **traffic, **limits)

    def begin_as(name: str) -> Run:
        with leased(lab, workers, config.id, runs / name):
            settings, options = config.replace(name=name), {"takes_newcomers": newcomers, "on_version": on_version}
            return launch(problem, lab, settings, update, partition, runs, **options)

    return under_name(name, default, begin_as)


def configure(
    problem: Problem, lab: Lab, workers: list[int], update: Update, partition: Partition, *, passes: float, **settings: Any
) -> RunConfig:
    """The settings of a new run, with a new id; `settings` are further fields of `RunConfig`, as in `train`."""
    n_train = len(problem.train_indices())
    sources = check_sources(lab, problem, update=update, partition=partition)
    budget = whole("passes x training samples", max(1, round(passes * n_train)), most=MOST)
    return RunConfig(
        id=secrets.token_hex(8),
        labkit=metadata.version("labkit"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        problem=problem.config(),
        update=update.config(),
        partition=partition.config(),
        passes=passes,
        budget=budget,
        ema=problem.ema,
        lower_is_better=problem.lower_is_better,
        milestones=tuple(m for m in milestones_of(problem, n_train) if m < budget),
        n_train=n_train,
        units=units_of(problem),
        batch_size=problem.batch_size,
        synthetic=problem.dataset.synthetic,
        data_note=problem.dataset.note,
        sources=sources,
        **settings,
        **lab.settings(workers),
    )


def check_travels(*things: Problem | Update | Partition) -> None:
    """ProblemError, by name, where the problem cannot go to workers (also to threads: each has its own), or a rule to the server."""
    for thing in things:
        if error := unpicklable(thing):
            travels = thing.__getstate__()
            attributes = travels.items() if isinstance(travels, dict) else ()
            lost = next((name for name, value in attributes if unpicklable(value)), None)
            what = f"its {lost!r} holds something that" if lost else "it"
            raise ProblemError(
                f"{type(thing).__name__} cannot be sent to workers and server: {what} cannot be pickled ({error}). Make locks, files, "
                "generators and connections where they are used, not beside the function or in the constructor; call torch.compile "
                "on the module that a function makes, not on methods of a class."
            )


def check_sources(lab: Lab, problem: Problem, **rules: Update | Partition) -> dict[str, str]:
    """The digests of the user's own code, for the record; ClusterError where other processes would import something else."""
    sent = () if all(worker.here for worker in lab.workers) else (problem,)
    check(needed(*rules.values(), *sent))
    return digests(needed(problem, *rules.values()), problem=problem, **rules)


def milestones_of(problem: Problem, n_train: int) -> list[int]:
    """The milestones of a problem in samples, in order; ProblemError for those that make no sense."""
    try:
        return sorted({max(1, round(real("milestones", passes, above=0, most=MOST) * n_train)) for passes in problem.milestones()})
    except (TypeError, ValueError) as error:
        raise ProblemError(f"milestones() of {type(problem).__name__} must give passes above 0: {error}") from error


def launch(
    problem: Problem,
    lab: Lab,
    config: RunConfig,
    update: Update,
    partition: Partition,
    runs: str | Path,
    *,
    takes_newcomers: bool = False,
    on_version: OnVersion | None = None,
    curve: bool = True,
) -> Run:
    """The second half of `train`: a run of what was checked, on workers that are leased, by the caller.

    Without `curve` nothing is measured on the test set at its end; `Run.curve` does it when it is asked.
    """
    state = Flat(problem.new_module(config.seed), exact=config.exact_buffers)
    layout = Layout.of(*state.shapes)
    path, lock = new_run(Path(runs), config, layout)
    spec = ServerSpec(
        config,
        str(path),
        update,
        partition,
        state.vector.numpy(),
        layout,
        labels=labels_for(partition, problem),
        host=server_host(lab),
    )
    return begin(path, lab, problem, spec, lock, takes_newcomers, on_version, curve)


def begin(
    path: Path,
    lab: Lab,
    problem: Problem,
    spec: ServerSpec,
    lock: DirectoryLock,
    takes_newcomers: bool,
    on_version: OnVersion | None = None,
    curve: bool = True,
) -> Run:
    """Start the server and the workers of a run whose directory is ready, and held by `lock`."""
    spec = replace(spec, kernel=os.getpid(), local=lab.local)
    monitor = Monitor.of(problem, spec.config, on_version)
    supervisor = Supervisor(path, lab, problem, spec, lock, monitor, takes_newcomers=takes_newcomers, curve=curve)
    run = Run(path, problem=problem, follower=supervisor)
    lab.runs.append(run)
    try:
        supervisor.start(run)
    except BaseException:
        if run in lab.runs:  # whatever it was: the lab has no run that nobody follows
            lab.runs.remove(run)
        raise
    return run


def server_host(lab: Lab) -> str:
    """Where the server listens: on loopback alone if all workers are here, else where other machines reach this one."""
    from distributed.utils import get_ip

    return "127.0.0.1" if {worker.host for worker in lab.workers} == {socket.gethostname()} else get_ip()


def check_lengths(passes: float, local_steps: int | None, checkpoints: int) -> dict[str, Any]:
    """The length of a run, of its local passes, and what is kept of it, by name."""
    return {
        "passes": real("passes", passes, above=0, most=MOST),
        "local_steps": None if local_steps is None else whole("local_steps", local_steps, most=MOST, error=ValueError),
        "checkpoints": whole("checkpoints", checkpoints, most=MOST, error=ValueError),
    }


def check_under(problem: Problem, update: Update, seed: int, scored: bool) -> None:
    """ProblemError where the problem cannot be trained under this rule, or has no score and is to be `scored`."""
    problem.check(seed, scored=update.scored or scored)
    check_weighed(problem, update)
    if update.collective:
        if update.sync_batchnorm and getattr(problem, "inner", None) is not None:
            raise ProblemError(
                f"{problem._title()} has an inner layer, whose threads normalise by the batch of their own worker, and update="
                "AllReduce(sync_batchnorm=True) normalises by those of all. Leave out inner=... or sync_batchnorm."
            )
        check_problem(problem, seed)


def check_limits(heartbeat_timeout: float | None, join_timeout: float) -> dict[str, float | None]:
    """The two limits of time of a run, by name; a heartbeat time-out of None is adaptive."""
    limits = {"heartbeat_timeout": heartbeat_timeout, "join_timeout": join_timeout}
    given = {name: seconds for name, seconds in limits.items() if seconds is not None or name == "join_timeout"}
    given = {name: real(name, seconds, most=LONGEST_WAIT_S, error=ValueError) for name, seconds in given.items()}
    if min(given.values()) < 1:
        text = ", ".join(f"{name}={seconds:g}" for name, seconds in given.items())
        raise ValueError(f"{text}: workers send a heartbeat every 0.5 s and need some time to come; give 1 s at least.")
    return limits | given


def check_traffic(update: Update, exchange: str, overlap: int) -> dict[str, Any]:
    """How weights travel, by name; ValueError where they cannot travel like this under this rule."""
    exchange, overlap = known("exchange", exchange, DTYPES), whole("overlap", overlap, 0, MOST, error=ValueError)
    if update.collective and (exchange != "float32" or overlap):
        raise ValueError(f"{update.name} exchanges gradients within every step, by torch: leave exchange and overlap as they are.")
    if overlap and update.scored and not update.ahead:
        raise ValueError(
            f"with {update.name} nothing can be done while a push is under way: it needs the score first, and everybody waits for "
            "the others. Use overlap=0, or an update that answers at once, such as 'agwu' or 'fedasync'."
        )
    return {"exchange": exchange, "overlap": overlap}


def check_weighed(problem: Problem, update: Update, run: Run | None = None) -> None:
    """ProblemError where a rule weighs pushes by a score of which less is better, or there is none, as a `run` shows."""
    if update.scored and problem.lower_is_better:
        raise ProblemError(
            f"{problem._title()} has a score of which less is better, and {update.name} weighs pushes by a score in [0, 1] of which "
            "more is better. Use a rule that does not, such as 'localsgd' or 'fedasync'."
        )
    if update.scored and run and (run.events.kind == "push").any() and run.events.score.isna().all():
        raise ProblemError(
            f"{problem._title()} has no score, as no push of run {run.name} has one, and {update.name} weighs pushes by it. Use a rule "
            "that does not, such as 'localsgd' or 'fedasync'."
        )


def check_shards(problem: Problem, workers: list[int], partition: Partition) -> None:
    """A partition of the true size, made and thrown away: it should fail here, not in the server."""
    units = {"units": found} if (found := units_of(problem)) else {}
    copy.deepcopy(partition).start(len(problem.train_indices()), workers, labels=labels_for(partition, problem), **units)


def units_of(problem: Problem) -> tuple[int, ...]:
    """The units of the training samples, as the record has them; none where each is read by itself."""
    return () if (units := problem.units()) is None else tuple(units.tolist())


def labels_for(partition: Partition, problem: Problem) -> np.ndarray | None:
    """Classes of the training samples, where the partition needs them; int64 (n_train,)."""
    if not partition.stratified or (problem.dataset.label is None and type(problem).labels is Problem.labels):
        return None  # the partition says that it needs some
    return problem.labels(problem.train_indices())


def choose(lab: Lab, workers: Sequence[int] | None, path: Path) -> list[int]:
    """The workers of a run in `path`: those asked for, or all that no other run holds."""
    if lab.closed:
        raise ClusterError("this lab is closed. Run the cell with connect() again.")
    workers = None if workers is None else lab.checked(workers)
    lab.refresh()
    gone = set(lab.lost()) & set(range(len(lab)) if workers is None else workers)
    if gone:
        raise ClusterError(f"workers {sorted(gone)} of this lab are lost. connect() again for a full lab, or train(workers=[...]).")
    earlier = _earlier(lab, path)
    chosen = lab.free(earlier.config.id if earlier else "") if workers is None else sorted(set(workers))
    if not chosen and workers is None:
        names = " and ".join(repr(run.name) for run in lab.runs) or "another run"
        raise ClusterError(f"this lab still trains {names}. Call run.wait() or run.stop() on it first.")
    if not chosen:
        raise ClusterError("workers=[]: a run needs at least one worker.")
    return chosen


@contextlib.contextmanager
def leased(lab: Lab, workers: list[int], id: str, path: Path) -> Iterator[None]:
    """The workers belong to the run of this id from here on; they are free again if it cannot begin."""
    if earlier := _earlier(lab, path):
        print(f"Stopping {path.name!r}, which is begun again.")
        if earlier.stop().state == "running":
            raise ClusterError(f"{path.name!r} does not end. Call run.wait() on it, or connect() again for a fresh lab.")
    lab.lease(workers, id, path.name, str(path.absolute()))
    try:
        yield
    except BaseException:
        lab.release(id)
        raise


def _earlier(lab: Lab, path: Path) -> Run | None:
    """The run that goes in this directory. Running a cell again means to begin again; a run elsewhere of this name is another."""
    return next((run for run in lab.runs if run.path.resolve() == path.resolve() and run.state == "running"), None)


def run_name(name: str) -> str:
    """A name that a run can have: RunError where it cannot become a folder of its own, or would not be printed as it is."""
    name = text("name", name)
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        why = (
            "it becomes a folder"
            if name.isprintable()
            else "it holds characters that cannot be printed, such as control characters"
        )
        raise RunError(f"name={name!r} cannot be the name of a run: {why}.")
    return name


def under_name(given: str | None, default: str, start: Callable[[str], T]) -> T:
    """`start(name)`: the given name, whose run must not be running, or else the first free one of default, default-2, ..."""
    if given is not None:
        return start(given)
    living, number, name = "", 1, default
    while True:
        try:
            made = start(name)
            break
        except RunningError as error:
            living, number = living or str(error), number + 1
            name = f"{default}-{number}"
    if living:
        print(f"This one is recorded as {name!r}: {living}")
    return made


def claim(runs: Path, name: str, id: str) -> tuple[Path, DirectoryLock]:
    """A new, empty directory `runs/name`, held for the run with this id; what was there is kept under the next free number.

    `RunningError` if a run that is there is running.
    """
    path = (runs / run_name(name)).absolute()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with locks.alone(runs):
            if path.exists():
                earlier = server_file.hold(path)
                number = next(n for n in itertools.count(1) if not path.with_name(f"{name}.{n}").exists())
                path.rename(path.with_name(f"{name}.{number}"))
                earlier.release()
                print(f"The earlier run {name!r} is kept as {name}.{number}.")
            path.mkdir()
            lock = DirectoryLock(path, id)
        (path / "checkpoints").mkdir()
        (path / "figures").mkdir()
    except OSError as error:
        raise _unrecordable(path, error) from error
    return path, lock


def new_run(runs: Path, config: RunConfig, layout: Layout) -> tuple[Path, DirectoryLock]:
    """The directory of a run that begins, with all but its record, and its lock."""
    path, lock = claim(runs, config.name, config.id)
    try:
        config.save(path)
        write_json(path / "environment.json", environment(), run=config.id)
        layout.save(path, config.id)
    except OSError as error:
        raise _unrecordable(path, error) from error
    return path, lock


def _unrecordable(path: Path, error: OSError) -> RunError:
    return RunError(f"the run cannot be recorded in {path}: {error}. Give another folder: runs=...")
