"""The other drivers of a run's course: what happened, again (`replay`), and what would happen on another cluster (`simulate`).

Update, partition and coordinator are the objects of live runs; only who calls them differs. What comes out is a `Run` with a
directory of its own, so that every figure and table works on it, and it says of itself that it is none of a cluster's.

Used from notebooks; the work is done in `labkit.simulation.exact` and `labkit.simulation.simulator`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from labkit.errors import RunError, whole
from labkit.partition import Partition, make_partition
from labkit.plots.progress import meter
from labkit.problems.problem import Problem
from labkit.runs import events as record
from labkit.simulation import scenario as scenarios
from labkit.simulation.counterfactual import Arrivals
from labkit.simulation.exact import Course, Lives
from labkit.simulation.offline import Ledger
from labkit.simulation.simulator import Simulation
from labkit.training.resume import problem_of
from labkit.training.run import Run
from labkit.updates import Update, make_update


def replay(
    run: Run,
    *,
    update: str | dict | Update | None = None,
    problem: Problem | None = None,
    name: str | None = None,
    runs: str | Path | None = None,
) -> Run:
    """Make the recorded course of a run again in this process; returns a `Run` with a directory of its own.

    Without `update` its weights are bit for bit those of the run, on a CPU with the same torch. That is checked on the way: every
    event that follows from others, the loss and score of each local pass, each version that the run has kept.

    With another `update` it answers: the same arrivals, what would that rule have made of them? It is counterfactual, and says so
    in its name, label, summary and figures. Workers push in recorded order; one that the rule holds pushes
    as soon as it is released; how many samples they train on follows from the rule's own course, up to the same budget. Times are
    those of the record: what the rule would cost in time is for `simulate`.

    Parameters
    ----------
    run
        A run that has ended, however: done, stopped, failed, cut off, resumed.
    update
        Another rule, by name or as an object.
    problem
        The problem as it was given to `train`, where its model was written in a notebook cell of another kernel.
    name, runs
        Recorded in `runs/name`, by default beside the run as "<its name>-replay" or "<its name>-replay-<update>".

    Raises
    ------
    RunError
        The record cannot be replayed: it still grows, is older than replays, has a hole, is an all-reduce (torch averages inside
        the steps), was computed on a GPU, or by threads that shared a generator of random numbers. Or the replay differs from it:
        the first difference, with its event and worker.
    """
    rule = copy.deepcopy(make_update(update if update is not None else run.config["update"]))
    exact = update is None or rule.config() == run.config["update"]
    _check_replayable(run, rule)
    problem = problem_of(run, problem or run._problem, "replay(run, problem=problem)")
    lives = Lives(run)
    origin = {"kind": "replay" if exact else "counterfactual", "run": run.name, "id": run.config.get("id")}
    config = run.config if exact else {**run.config, "update": rule.config()}
    layout = record.read_json(run.path / "layout.json")
    name = name or f"{run.name}-replay" + ("" if exact else f"-{rule.name}")
    ledger = Ledger(Path(runs or run.path.parent), name, config, layout, origin)
    status = {"state": "failed", "reason": f"the {origin['kind']} of {run.name} was cut off."}
    try:
        with meter(f"{origin['kind']} of {run.name}", run.config["budget"]) as told:
            if exact:
                courses = _drive_again(run, problem, rule, ledger, lives, told)
                reason = f"{sum(course.passes for course in courses)} local passes and "
                reason += f"{sum(course.compared for course in courses)} kept versions are bit for bit the same"
            else:
                courses = [Arrivals(run, problem, rule, ledger, lives, told)]
                courses[0].drive()
                reason = ""
        last = courses[-1].it
        ended = run.recorded() if exact else {"state": last.state, "reason": last.reason}
        reason = "; ".join(filter(None, [reason, ended.get("reason")]))
        status = {"state": ended["state"], "reason": reason, "version": last.update.version, "samples": last.samples.done}
    except RunError as error:
        status["reason"] = str(error)
        raise
    finally:
        ledger.close(status)
    return Run(ledger.path, problem=problem)


def simulate(
    source: Run | Sequence[Run] | Sequence[float],
    *,
    n_workers: int | None = None,
    slowdown: Sequence[float] | None = None,
    jitter: float | None = None,
    drift: float | None = None,
    stalls: Sequence[float] | None = None,
    bandwidth: float | None = None,
    latency: float | None = None,
    servers: int = 1,
    failures: Sequence[tuple] | None = None,
    update: str | dict | Update | None = None,
    partition: str | dict | Partition | None = None,
    passes: float | None = None,
    local_steps: int | str | None = scenarios.RECORDED,
    samples: int | None = None,
    n_weights: int | None = None,
    exchange: str | None = None,
    overlap: int | None = None,
    seed: int | None = None,
    numerics: bool = False,
    problem: Problem | None = None,
    name: str | None = None,
    runs: str | Path | None = None,
) -> Run:
    """What a run would take on a cluster that one does not have; returns a `Run` whose seconds are simulated.

    Update and partition are driven as in a live run, on a clock that jumps from event to event. Computing (with its spread),
    scoring, exchange and the server's time for a merge are fitted from recorded runs. What is not given stays as it was there. How
    well the fit gives back the first of these runs is printed, once for each fit, and kept in `config["origin"]["error"]` (of the
    wall time).

    Parameters
    ----------
    source
        A run that has ended, several (the first is changed, all are fitted; two sizes of model tell latency from bandwidth), or
        speeds: samples/s of each worker, for a cluster of which nothing is recorded.
    n_workers, slowdown, jitter, drift, stalls
        Other workers: each is as quick as one of the measured ones without its slowdown, in turn, and slower by `slowdown` (by
        default as recorded, in turn). `jitter`, `drift` and `stalls` as in `connect`; 0, 0 and () for none.
    bandwidth, latency
        Of each worker's link, in bytes/s and seconds, each way.
    servers
        Among how many servers the weights are cut up. An assumption, since labkit has one: each merges its part, all side by side,
        so that what grows with the weights in the time of a merge is divided by their number; a worker's link still carries all.
    failures
        (seconds, worker) for a worker that is lost, (seconds, worker, away) for one that comes back after `away` seconds. By
        default as recorded, as long as the workers are those of the run; [] for none.
    update, partition, passes, local_steps, exchange, overlap, seed
        As in `train`. (Packing weights into 16 bits is taken to cost no time.)
    samples, n_weights
        Training samples and float32 weights, where they are to be others than those of the run (not with `numerics`).
    numerics
        Train the model for real: weights, scores and a curve of accuracy against simulated time. Otherwise times alone: no weights,
        no curve, and a thousand workers in seconds.
    problem
        The problem as it was given to `train`, where its model was written in a notebook cell of another kernel.
    name, runs
        Recorded in `runs/name`, by default beside the run as "<its name>-simulated", or as "runs/simulated".

    Raises
    ------
    RunError
        A run still goes, or is too short to be fitted.
    ValueError, TypeError, PartitionError, ProblemError
        The request makes no sense. An all-reduce cannot be simulated: it exchanges within every step.
    """
    measured = [source] if isinstance(source, Run) else list(source)
    if not measured:
        raise ValueError("simulate() needs a run, several, or the samples/s of at least one worker.")
    base = measured[0] if isinstance(measured[0], Run) else None
    timing, recorded = scenarios.of_runs(measured) if base else scenarios.of_speeds(measured)
    rule = copy.deepcopy(make_update(update if update is not None else recorded["update"]))
    parts = copy.deepcopy(make_partition(partition if partition is not None else recorded["partition"]))
    workers = {"n_workers": n_workers, "slowdown": slowdown, "jitter": jitter, "drift": drift, "stalls": stalls}
    lengths = {"passes": passes, "local_steps": local_steps, "samples": samples, "seed": seed}
    traffic = {"exchange": exchange, "overlap": overlap}
    config = scenarios.changed(recorded, update=rule, partition=parts, **workers, **lengths, **traffic)
    if numerics and (base is None or samples is not None or n_weights is not None):
        raise ValueError("numerics=True trains the model of a recorded run: not with speeds, samples= or n_weights=.")
    problem = problem_of(base, problem or base._problem, "simulate(run, problem=problem)") if numerics else None
    batch_size = config["problem"].get("batch_size") or base.problem().batch_size
    servers = whole("servers", servers)
    size = base.layout.size if base else scenarios.UNKNOWN["n_weights"]
    size = size if n_weights is None else whole("n_weights", n_weights)
    layout = record.read_json(base.path / "layout.json") if base else {"names": [], "shapes": [], "n_params": size, "n_buffers": 0}
    if failures is None and base and n_workers is None and slowdown is None:
        changes = scenarios.recorded_changes(base)
    else:
        changes = scenarios.changes(failures or (), len(config["workers"]))
    error = scenarios.compared(base, timing, rule, batch_size) if base else None
    origin = {"kind": "simulated", "run": base.name if base else None, "numerics": bool(numerics), "error": error}
    config["scenario"] = {"bandwidth": bandwidth, "latency": latency, "servers": servers, "n_weights": n_weights}
    config["scenario"] |= {"failures": [list(failure) for failure in failures] if failures is not None else None}
    folder = Path(runs) if runs is not None else base.path.parent if base else Path("runs")
    ledger = Ledger(folder, name or (f"{base.name}-simulated" if base else "simulated"), config, layout, origin)
    status = {"state": "failed", "reason": "the simulation was cut off."}
    try:
        with meter(f"simulation of {config['n_workers']} workers", config["budget"]) as told:
            rules = {"update": rule, "partition": parts, "batch_size": batch_size, "changes": changes, "problem": problem}
            there = timing.with_links(bandwidth, latency).on_servers(servers)
            made = Simulation(config, there, size, **rules, ledger=ledger, told=told).run()
        it = made.it
        status = {"state": it.state, "reason": it.reason, "version": it.update.version, "samples": it.samples.done}
        status |= {"server_busy": made.busy / made.merged_at if made.merged_at else 0.0}
        if not numerics:
            ledger.no_curve()
    finally:
        ledger.close(status)
    return Run(ledger.path, problem=problem)


def _drive_again(run: Run, problem: Problem, rule: Update, ledger: Ledger, lives: Lives, told) -> list[Course]:
    courses = []
    for part in range(len(lives.parts)):
        courses.append(Course(run, problem, copy.deepcopy(rule), ledger, lives, part, told))
        courses[-1].drive()
    return courses


def _check_replayable(run: Run, rule: Update) -> None:
    if run.state == "running":
        raise RunError(f"run {run.name} still goes: its record is not whole yet. Use run.wait() first.")
    if run.origin != "live":
        raise RunError(
            f"run {run.name} is a {run.origin} itself; replay the run that it comes from, {run.config['origin']['run']}."
        )
    if run.config.get("format", 0) < 2:
        raise RunError(
            f"run {run.name} was recorded by labkit {run.config.get('labkit')} before there were replays (format "
            f"{run.config.get('format')}): probed speeds and threads of its workers are not in the record. Train it again."
        )
    if "allreduce" in (rule.name, run.config["update"]["name"]):
        raise RunError(
            "an all-reduce cannot be replayed: torch averages gradients among the workers within every step, and in which order it "
            "adds them up is not in the record. With update='sgwu' a run with the same seed gives the same weights."
        )
