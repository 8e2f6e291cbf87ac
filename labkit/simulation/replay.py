"""`replay`: the recorded course of a run made again in this process, by its own update or, counterfactually, by another one.

    recorded events  ->  its own update: every event, loss, score and kept version compared    ->  a Run, "replay"
                     ->  another update: the same arrivals, weights and grants computed anew   ->  a Run, "counterfactual"

Used from notebooks; the work is done in `labkit.simulation.exact` and `labkit.simulation.counterfactual`.
"""

import copy
import os
from pathlib import Path

from labkit.errors import RunError, file_path, instance
from labkit.imports import rule_title
from labkit.names import named
from labkit.partition import Partition
from labkit.plots.progress import meter
from labkit.problems.problem import Problem
from labkit.runs.config import JOINT, REPLAYABLE
from labkit.simulation.counterfactual import Arrivals
from labkit.simulation.exact import Course, read_lives
from labkit.simulation.offline import Ledger
from labkit.training.resume import is_rule_of, problem_of, rule_of
from labkit.training.run import Run, read_run
from labkit.training.train import check_weighed, run_name
from labkit.updates import Update, make_update


@named
def replay(
    run: Run | str | Path,
    *,
    update: str | dict | Update | None = None,
    partition: Partition | None = None,
    problem: Problem | None = None,
    name: str | None = None,
    runs: str | Path | None = None,
) -> Run:
    """Make the recorded course of a run again in this process; returns a `Run` with a directory of its own.

    Without `update` its weights are bit for bit those of the run, on a CPU with the same torch. That is checked on the way: every
    event that follows from others, the loss and score of each local pass, each version that the run has retained.

    With another `update` it answers: the same arrivals, what would that rule have made of them? It is counterfactual, and says so
    in its name, label, summary and figures. Workers push in recorded order; one that the rule holds pushes
    as soon as it is released; how many samples they train on follows from the rule's own course, up to the same budget. Times are
    those of the record: what the rule would cost in time is for `simulate`.

    Parameters
    ----------
    run
        A run, or its directory, that has ended, however: done, stopped, failed, cut off, resumed.
    update
        Another rule, by name or as an object; or the run's own, where its class was written in a notebook cell.
    partition, problem
        As they were given to `train`, where its class or its model was written in a notebook cell (of another kernel).
    name, runs
        Recorded in `runs/name`, by default beside the run as "<its name>-replay" or "<its name>-replay-<update>".

    Raises
    ------
    RunError
        The record cannot be replayed: it still grows, is older than replays (of an all-reduce: than format 5), has a hole, was
        computed on a GPU, or drew random numbers from torch's generator where that was or is of several: workers that were threads,
        ranks of an all-reduce, which are threads in a replay. Another `update` of an all-reduce, or an all-reduce of another run:
        they exchange at every step, and the arrivals of one say nothing about the other. Another `update` of a run that was resumed, since
        some of its arrivals happened twice: its own is replayed, and `simulate` takes others. Or the replay differs from the record: the
        first difference, with its event and worker.

    Examples
    --------
    >>> again = labkit.replay(run)  # the same weights, bit for bit, on CPUs
    >>> np.array_equal(again.flat(), run.flat())
    True
    >>> labkit.replay(run, update="sgwu").config.update["name"]  # what another rule makes of the same arrivals
    'sgwu'
    """
    run = (
        read_run(file_path("run", run))
        if isinstance(run, str | os.PathLike)
        else instance("run", run, Run, ", such as labkit.load_run(path)")
    )
    folder = run.path.parent if runs is None else file_path("runs", runs)
    name = None if name is None else run_name(name)
    rule = rule_of(run, "update", by="replay") if update is None else copy.deepcopy(make_update(update))
    exact = update is None or is_rule_of(run, "update", rule)
    _check_replayable(run, rule, exact)
    problem = problem_of(run, run._problem if problem is None else problem, by="replay")
    check_weighed(problem, rule, None if exact else run)
    partition = rule_of(run, "partition", partition, by="replay")
    lives = read_lives(run)
    if len(lives) > 1 and not exact:
        raise RunError(
            f"run {run.name} was resumed: some of its arrivals happened twice, which another rule cannot follow. labkit.replay(run) makes its "
            f"own weights again; with {rule_title(rule.config())}, train anew, labkit.train(..., update=...), or ask labkit.simulate(run, "
            "update=...) for the time that it would take."
        )
    origin = {"kind": "replay" if exact else "counterfactual", "run": run.name, "id": run.config.id}
    config = run.config if exact else run.config.replace(update=rule.config())
    layout = run.layout
    default = f"{run.name}-replay" + ("" if exact else f"-{rule_title(rule.config())}")
    with (
        Ledger(folder, name, default, config, layout, origin) as ledger,
        meter(f"{origin['kind']} of {run.name}", run.config.budget) as progress,
    ):
        if exact:
            rules = ((copy.deepcopy(rule), copy.deepcopy(partition)) for _ in lives)
            parts = [Course(run, problem, *own, ledger, life, progress).drive() for own, life in zip(rules, lives, strict=True)]
            same = f"{sum(part.passes for part in parts)} local passes and {sum(part.compared for part in parts)} kept versions"
            recorded = run.recorded()
            reason = "; ".join(filter(None, [f"{same} are bit for bit the same", recorded.get("reason")]))
            ledger.ended(parts[-1].it, state=recorded["state"], reason=reason)
        else:
            ledger.ended(Arrivals(run, problem, rule, partition, ledger, lives[0], progress).drive().it)
    return Run(ledger.path, problem=problem)


def _check_replayable(run: Run, rule: Update, exact: bool) -> None:
    if run.state == "running":
        raise RunError(f"run {run.name} is still running: its record is not whole yet. Use run.wait() first.")
    if run.origin != "live":
        raise RunError(f"run {run.name} is a {run.origin} itself; replay the run that it comes from, {run.config.origin['run']}.")
    if run.config.format < REPLAYABLE:
        raise RunError(
            f"run {run.name} was recorded by labkit {run.config.labkit} before there were replays (format "
            f"{run.config.format}): probed speeds and threads of its workers are not in the record. Train it again."
        )
    collective = rule.collective or run.config.update["name"] == "allreduce"
    if collective and not exact:
        raise RunError(
            "the workers of an all-reduce exchange gradients within every step, those of other rules weights after a local pass: the "
            "arrivals of one say nothing about the other. Train it: labkit.train(..., update=...)."
        )
    if collective and run.config.format < JOINT:
        raise RunError(
            f"run {run.name} is an all-reduce of format {run.config.format}, in which a local pass that was broken off went on with other "
            "samples when it was made again, and the record does not hold with which. Train it again."
        )
    run.events  # noqa: B018  checked against how the run ended; `read_rows` sees single rows
