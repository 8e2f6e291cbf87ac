"""Going on with a run that was cut off or stopped: in its own directory, from its newest whole checkpoint, on any lab.

    not alive?  ->  newest whole checkpoint  ->  problem, update and partition as recorded  ->  server and workers, as in `train`

Everything after that checkpoint is made again; `labkit.runs.events.effective` leaves what was made before out of the curve and the
counts. Another kind of lab or another number of workers is fine: the samples of missing workers go to the others.

Used from notebooks; `problem_of` and `rule_of` also by `labkit.simulation`.
"""

import copy
import json
import re
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from labkit.cluster.connect import connect, current
from labkit.cluster.lab import Lab
from labkit.errors import LabError, PartitionError, RunError, file_path, instance
from labkit.imports import by_value, imported, is_same
from labkit.locks import DirectoryLock
from labkit.names import named
from labkit.partition import Partition, make_partition
from labkit.problems.problem import Problem
from labkit.runs import checkpoints, server_file, status, unfinished
from labkit.runs.config import RunConfig
from labkit.training.monitor import OnVersion
from labkit.training.run import Run, read_run
from labkit.training.server.server import ServerSpec
from labkit.training.supervisor import MEETING
from labkit.training.train import begin, check_sources, choose, labels_for, leased, server_host, units_of
from labkit.updates import Update, make_update

ENDING_S = 5.0  # a server that has ended the run has so long to go


@named
def resume(
    path: str | Path,
    lab: Lab | None = None,
    *,
    problem: Problem | None = None,
    update: Update | None = None,
    partition: Partition | None = None,
    workers: Sequence[int] | None = None,
    on_version: OnVersion | None = None,
) -> Run:
    """Go on with a run from its newest whole checkpoint; returns at once with its `Run`.

    Parameters
    ----------
    path
        The directory of a run that was cut off, failed or was stopped.
    lab
        Where: any kind, any number of workers. By default the lab of this kernel, or one such as the run had.
    problem
        The problem as it was given to `train`, where its model was written in a notebook cell.
    update, partition
        As they were given to `train`, where their class was written in a notebook cell.
    workers
        Indices of the workers to go on with; by default all that no other run holds.
    on_version
        As for `train`; target and patience are those of the run, and judge the versions that come now.

    Raises
    ------
    RunError
        The run is still running, is done, or has no whole checkpoint; or problem, update or partition are not those of the run, or
        were written in a notebook cell and are not given.

    Examples
    --------
    >>> cut = labkit.train(problem, lab, passes=20, name="cut").stop()
    >>> labkit.resume(cut.path, lab).stop().state
    'stopped'
    """
    run = read_run(path := file_path("path", path))
    on_version = (
        None if on_version is None else instance("on_version", on_version, Callable, ", on_version(run, version, measured)")
    )
    _check_ended(run)
    lock = server_file.hold(path, run.config.id)
    try:
        return _go_on(read_run(path, problem), lab, problem, update, partition, workers, on_version, lock)
    except BaseException:
        lock.release()
        raise


def _go_on(
    run: Run,
    lab: Lab | None,
    problem: Problem | None,
    update: Update | None,
    partition: Partition | None,
    workers: Sequence[int] | None,
    on_version: OnVersion | None,
    lock: DirectoryLock,
) -> Run:
    """The second half of `resume`, in a directory that is held."""
    version, refused = checkpoints.newest(run.path)
    weights, state = checkpoints.read_state(run.path, version)
    if "done" not in state:
        raise RunError(f"{run.path} holds weights alone: version {version} has no state to go on from. Train it again.")
    if (last := status.check_continued(run.path, version, state["done"])) not in (version, *checkpoints.versions(run.path)):
        refused = [f"{checkpoints.file_of(run.path, last)} is missing.", *refused]
    problem = problem_of(run, problem)
    layout = run.layout
    if len(weights) != layout.size:
        raise RunError(f"version {version} holds {len(weights)} weights, and layout.json of {run.path} says {layout.size}.")
    update, partition = rule_of(run, "update", update), rule_of(run, "partition", partition)
    lab = current() or _lab_like(run) if lab is None else instance("lab", lab, Lab, " of labkit.connect(...)")
    newcomers = workers is None
    workers = choose(lab, workers, run.path)
    if len(workers) > run.config.n_train:
        raise PartitionError(f"{run.config.n_train} samples cannot fill {len(workers)} shards. Use fewer workers.")
    sources = check_sources(lab, problem, update=update, partition=partition)
    with leased(lab, workers, run.config.id, run.path):
        for reason in refused:
            print(f"Not used: {reason}")
        print(f"Run {run.name!r} goes on from version {version}, after {state['done']:,} of {run.config.budget:,} samples.")
        config = _clear(run, lab.settings(workers) | {"sources": sources}, version, state["done"])
        about = {"labels": labels_for(partition, problem), "host": server_host(lab), "state": state}
        spec = ServerSpec(config, str(run.path), update, partition, np.array(weights), layout, **about)
        return begin(run.path, lab, problem, spec, lock, newcomers, on_version)


def _check_ended(run: Run) -> None:
    """One server for a run. Where that cannot be seen from here, nothing is begun."""
    if server_file.alive(run.path) is None:
        file = run.path / server_file.FILE
        raise RunError(f"run {run.name} may still go on another machine. Look there; delete {file} if it does not.")
    limit = time.monotonic() + ENDING_S
    while run.state != "running" and server_file.alive(run.path) and time.monotonic() < limit:
        time.sleep(0.02)  # it has recorded how it ended, and is about to exit
    if run.state == "running" or server_file.alive(run.path):
        done = unfinished.merged(run.path)
        far = "" if done is None else f" It is at {done:,} of {run.config.budget:,} samples."
        raise RunError(
            f"run {run.name} is still running. Use labkit.load_run({str(run.path)!r}).attach() to follow or stop it.{far}"
        )
    if run.state == "done":
        raise RunError(f"run {run.name} is done: all of its {run.config.budget:,} samples were trained on.")


def problem_of(run: Run, given: Problem | None, by: str = "resume") -> Problem:
    """The problem of the run: what goes on, or is done again (`by` replay, simulate), must be what was begun."""
    recorded = run.config.problem
    if given is None:
        if (lost := by_value(recorded)) is not None:
            raise RunError(
                f"{lost!r} of run {run.name} was written in a notebook or a script, or is an object, and the record holds only its "
                f"name. Make the problem again and give it: {_call(run, by, 'problem')}."
            )
        given = run.problem()
    if not isinstance(given, Problem):
        raise TypeError(f"problem is a {type(given).__name__}; give a labkit.Problem such as labkit.Classifier(...).")
    run.warn_of_edits(problem=given)
    settings = json.loads(json.dumps(given.config()))
    names = [name for name in {**recorded, **settings} if name != "data"]
    other = [name for name in names if not is_same(_found(settings.get(name)), _found(recorded.get(name)))]
    if other:
        other = ", ".join(f"{name}={settings.get(name)!r} for {recorded.get(name)!r}" for name in other)
        raise RunError(
            f"this problem is not the one of run {run.name}: {other}. A changed problem is a new run: labkit.train(...)."
        )
    n_train = len(given.train_indices())
    if n_train != run.config.n_train:
        raise RunError(f"the data have {n_train} training samples, and run {run.name} was begun with {run.config.n_train}.")
    if units_of(given) != tuple(run.config.units):
        raise RunError(f"the data have other row groups than run {run.name} was begun with. Open them as they were.")
    from labkit.models.flat import Flat

    if checkpoints.Layout.of(*Flat(given.new_module(run.config.seed), exact=run.config.exact_buffers).shapes) != run.layout:
        raise RunError(f"the model of this problem has other tensors than run {run.name} was begun with (layout.json).")
    return given


def _found(setting: Any) -> Any:
    """What an import path of labkit's own stands for: the same by any of the paths that it has had."""
    return imported(setting) if isinstance(setting, str) and re.match(r"labkit[\w.]*:\w+$", setting) else setting


def rule_of(run: Run, what: str, given: Any = None, by: str = "resume") -> Update | Partition:
    """The "update" or the "partition" of a run: made again as recorded, or `given`, which must be what is recorded."""
    make, recorded = {"update": make_update, "partition": make_partition}[what], run.config[what]
    if given is not None:
        if not is_rule_of(run, what, rule := make(given)):
            raise RunError(f"this {what} is not the one of run {run.name}: {rule.config()} for {dict(recorded)}.")
        run.warn_of_edits(**{what: rule})
        return copy.deepcopy(rule)
    try:
        return make(recorded)
    except (LabError, ValueError, TypeError, ImportError) as error:
        raise RunError(
            f"the {what} of run {run.name} is not known here: {str(error).rstrip('.')}. Make it again as it was and give it: "
            f"{_call(run, by, what)}. A class in a module that can be imported is found without."
        ) from error


def _call(run: Run, by: str, what: str) -> str:
    """The call with all that the record does not hold; a simulation can do without the rest of it."""
    again = dict.fromkeys([*(run.config.by_name_alone if by != "simulate" else []), what])
    return f"labkit.{by}({', '.join([repr(str(run.path)) if by == 'resume' else 'run', *(f'{one}={one}' for one in again)])})"


def is_rule_of(run: Run, what: str, rule: Update | Partition) -> bool:
    """Is this update or partition what is recorded? Before format 3 a class of the user's own was recorded by its `name`."""
    now = rule.config()
    return any(is_same(run.config[what], one) for one in (now, {**now, "name": rule.name}))


def _lab_like(run: Run) -> Lab:
    """A lab such as the run had, started here."""
    kind, workers = run.config.kind, run.config.workers
    if kind == "slurm" or {worker["host"] for worker in workers} != {socket.gethostname()}:
        raise RunError(
            f"run {run.name} had a lab of kind {kind!r} elsewhere. Connect one: {run.config.resume_call(run.path, lab=True)}."
        )
    slowdown = [worker["slowdown"] for worker in workers]
    return connect(
        kind,
        len(workers),
        threads_per_worker=workers[0]["threads"],
        slowdown=slowdown if any(factor != 1 for factor in slowdown) else None,
        jitter=run.config.jitter,
        drift=run.config.drift if slowdown != slowdown[::-1] else 0.0,
        stalls=run.config.stalls,
    )


def _clear(run: Run, where: dict, version: int, done: int) -> RunConfig:
    """Remove what says that the run has ended; the settings, which are returned, say from where it is resumed."""
    earlier = {key: getattr(run.config, key) for key in where if key in run.config}
    note = {"version": version, "samples": done, "resumed": datetime.now(UTC).isoformat(timespec="seconds"), "before": earlier}
    config = run.config.replace(**where, resumed=[*run.config.resumed, note])
    try:
        checkpoints.rewind(run.path, version)
        server_file.withdraw(run.path)  # of the server that was killed
        config.save(run.path)
        for name in ("metrics.parquet", "status.json", "summary.json"):
            (run.path / name).unlink(missing_ok=True)
        for file in run.path.glob(f"{MEETING}*"):
            file.unlink(missing_ok=True)  # of a kernel that was killed
    except OSError as error:
        raise RunError(f"run {run.name} cannot go on in {run.path}: {error}.") from error
    return config
