"""Teams: where a subnet is more than one worker can do, several train it together, with any partition and update of labkit.

    workers 0 1 2 3 4, teams of 2     (0, 1) and (2, 3), each with one subnet at a time, longest first; worker 4 has nothing to do
    parts/<name>-part-3/              the run of part 3, as `labkit.train` would have recorded it; `labkit.load_run` reads it

A team of one with SGWU and UDPA trains as a worker without a team does, bit for bit (the orders derive from the index of the
worker, so this is worker 0). The workers stay leased to the subnets from the first run to the last. A run goes on without
a worker that is lost, as any run does; the next ones begin without it.

Used by `labkit.subnets.train`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.cluster.lab import Lab
from labkit.errors import ClusterError, RunError, known, whole
from labkit.partition import make_partition
from labkit.subnets.problem import Subnet
from labkit.training.run import Run
from labkit.training.train import check_shards, launch
from labkit.updates import make_update

POLL_S = 0.05
DEFAULTS = {"n_workers": None, "partition": "idpa", "update": "agwu", "local_steps": None}  # the last three as in `train`


def make_team(team: Mapping[str, Any], problem: Subnet, workers: Sequence[int]) -> dict[str, Any]:
    """The settings of a team, complete and in full; ValueError, ClusterError or PartitionError where they make no sense.

    `problem` is one of the subnets, `workers` are those that may be used: without an `n_workers` all of them are one team.
    """
    for key in team:
        known("team", key, DEFAULTS)
    team = DEFAULTS | dict(team)
    n_workers = len(workers) if team["n_workers"] is None else whole("team n_workers", team["n_workers"])
    if n_workers > len(workers):
        raise ClusterError(f"a team of {n_workers} workers was asked for, and there are {len(workers)}: {list(workers)}.")
    steps = None if team["local_steps"] is None else whole("team local_steps", team["local_steps"])
    update, partition = make_update(team["update"]), make_partition(team["partition"])
    check_shards(problem, list(workers)[:n_workers], partition)
    return {"n_workers": n_workers, "partition": partition.config(), "update": update.config(), "local_steps": steps}


def train_in_teams(
    problems: Sequence[Subnet],
    seeds: Sequence[int],
    names: Sequence[str],
    lab: Lab,
    workers: Sequence[int],
    team: Mapping[str, Any],
    *,
    folder: Path,
    passes: int,
    timeout: float,
    each: Callable[[int, Run], None] = lambda number, run: None,
) -> list[Run]:
    """A run for each problem, in `folder`; `workers` must be leased. `each(number, run)` is called again and again while one goes.

    Raises
    ------
    WorkerError, LabError, RunError
        A run failed, or was stopped; the others are stopped.
    ClusterError
        All workers are lost, or not all was done within `timeout` seconds.
    """
    limit = time.monotonic() + timeout
    size, todo, done = team["n_workers"], deque(range(len(problems))), {}
    teams = [list(workers[at : at + size]) for at in range(0, len(workers) - size + 1, size)]
    going: dict[int, tuple[int, Run]] = {}  # by team: number of the problem, its run
    options = {key: team[key] for key in ("partition", "update", "local_steps")}
    try:
        while len(done) < len(problems):
            for at in [at for at in range(len(teams)) if at not in going and todo]:
                if here := [worker for worker in teams[at] if worker not in lab.lost()]:
                    number = todo.popleft()
                    place = {"name": names[number], "runs": folder}
                    run = launch(problems[number], lab, here, **place, **options, passes=passes, seed=seeds[number], checkpoints=1)
                    going[at] = number, run
            if not going:
                raise ClusterError("every worker of this lab is lost. connect() again for a full lab.")
            for at, (number, run) in list(going.items()):
                over = run.state != "running"
                each(number, run)
                if over:
                    done[number] = _ended(run)
                    del going[at]
            if time.monotonic() > limit and len(done) < len(problems):
                left = len(problems) - len(done)
                raise ClusterError(f"{left} of {len(problems)} subnets were not done within {timeout:g} s; they were stopped.")
            time.sleep(POLL_S)
    finally:
        for _, run in going.values():
            run.stop()
    return [done[number] for number in range(len(problems))]


def _ended(run: Run) -> Run:
    """The run, if it was trained to its end."""
    run.wait(10)
    if run.state != "done":
        raise RunError(f"run {run.name} was {run.state}, so its subnet is not trained. Train the subnets again.")
    return run
