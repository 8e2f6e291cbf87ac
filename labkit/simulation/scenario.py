"""What a simulation is asked: the settings of a run on a cluster that one does not have, from those of a recorded one.

Workers of a scenario are as quick as the measured ones, in turn: the i-th has the pace of measured worker i mod m and its slowdown,
unless other ones are given. Whatever is not changed is as recorded, losses and newcomers too.

Used by `labkit.simulation.simulate`.
"""

import copy
import itertools
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from labkit.cluster.emulation import jitter_of, make_stalls, opposite, slowdown_of
from labkit.errors import MOST, SEEDS, RunError, real, several, whole
from labkit.partition import Partition, make_partition
from labkit.runs.config import RunConfig
from labkit.simulation.cost_model import Line, Pace, Timing, fit
from labkit.simulation.simulator import Change, Simulation
from labkit.training.resume import is_rule_of, rule_of
from labkit.training.run import Run
from labkit.training.server.coordinator import AGAIN
from labkit.training.train import check_traffic
from labkit.training.wire.protocol import MAX_WORKERS
from labkit.updates import Update, make_update

RECORDED = "as recorded"
ENOUGH, VARIES = 3, 2.0  # local passes of a worker, and by how much they may differ, before a fit is called rough
DRAWS, MOST_PUSHES = 10, 3000  # simulations by what was recorded, drawn anew; together they take a second at most
# Of the first of the runs that were fitted, since curves ask for it again and again: the runs and their sizes, timing, and error.
_fits: weakref.WeakKeyDictionary[Run, dict] = weakref.WeakKeyDictionary()
# Where nothing is recorded: a small network, a gigabyte per second, and what small messages were measured to take.
UNKNOWN = {"n_weights": 20_000, "n_train": 60_000, "batch_size": 64, "exchange": Line(1e-3, 2e-9), "server": Line(2e-4, 5e-10)}


def of_speeds(speeds: Sequence[float]) -> tuple[Timing, RunConfig]:
    """Timing and settings where only the samples/s of each worker are known."""
    paces = tuple(Pace(1 / speed) for speed in several("speed", speeds, partial(real, least=1e-9, most=1e15)))
    config = RunConfig(
        update=make_update("agwu").config(),
        partition=make_partition("idpa").config(),
        passes=5,
        budget=5 * UNKNOWN["n_train"],
        checkpoints=32,
        n_train=UNKNOWN["n_train"],
        batch_size=UNKNOWN["batch_size"],
        problem={"kind": "none: times alone", "batch_size": UNKNOWN["batch_size"]},
        n_workers=len(paces),
        workers=[{"slowdown": 1.0, "drifts_to": 1.0}] * len(paces),
    )
    return Timing(paces, UNKNOWN["exchange"], UNKNOWN["server"]), config


def of_runs(runs: Sequence[Run]) -> tuple[Timing, RunConfig]:
    """Timing of all, settings of the first."""
    for run in runs:
        if not isinstance(run, Run):
            raise TypeError(f"simulate() got a {type(run).__name__} among runs; give runs alone, or speeds alone.")
        if run.state == "running":
            raise RunError(f"run {run.name} is still running: its record is not whole yet. Use run.wait() first.")
        if run.origin != "live":
            raise RunError(f"run {run.name} is a {run.origin} itself; nothing was measured in it. Give a run of a lab.")
        if run.config.update["name"] == "allreduce":
            raise RunError(f"run {run.name} is an all-reduce, which exchanges within every step. Give a run of another update.")
    state = [(run.path, len(run.events)) for run in runs]
    fitted = _fits.get(runs[0])  # once: another thread may fit it together with other runs
    if fitted is None or fitted["state"] != state:
        fitted = _fits[runs[0]] = {"state": state, "timing": (timing := fit(runs))}
        if rough := list(map(_rough, filter(_is_rough, timing.paces))):
            without = " (emulation taken out)" if any(run.config.emulated for run in runs) else ""
            print(
                f"The fit is rough: {'; '.join(rough)}{without}. A prediction from it is as uncertain. Record more local passes, on a machine "
                "that does nothing else, or give several runs."
            )
    return fitted["timing"], runs[0].config


def _is_rough(pace: Pace) -> bool:
    """Do its passes not tell how fast a worker is?"""
    return len(pace.passes) < ENOUGH or pace.passes.max() > VARIES * pace.passes.min()


def _rough(pace: Pace) -> str:
    slow, fast = 1 / max(pace.passes.max(), 1e-9), 1 / max(pace.passes.min(), 1e-9)
    speeds = f"{slow:,.0f}" if f"{slow:,.0f}" == f"{fast:,.0f}" else f"{slow:,.0f} to {fast:,.0f}"
    return f"worker {pace.worker} made {speeds} samples/s in {len(pace.passes)} local pass{'es' * (len(pace.passes) > 1)}"


def spread(
    config: RunConfig, timing: Timing, n_weights: int, update: Update, partition: Partition, changes: Sequence[Change]
) -> list[float] | None:
    """Lowest and highest seconds of `DRAWS` simulations: by the fit, and by what was recorded drawn anew. None where that would take
    long, where a worker has one local pass alone, or where a course has no end."""
    n_pushes = config.budget / (config.local_steps * config.batch_size if config.local_steps else config.n_train / config.n_workers)
    if DRAWS * n_pushes > MOST_PUSHES or any(len(pace.passes) < 2 for pace in timing.paces):
        return None
    seconds = []
    for draw in range(DRAWS):
        chance = np.random.default_rng(np.random.SeedSequence([config.seed, draw, 1 << 22]))
        rules = {"update": copy.deepcopy(update), "partition": copy.deepcopy(partition)}
        own = config.replace(seed=(config.seed + draw) % SEEDS)
        made = Simulation(own, timing.redrawn(chance) if draw else timing, n_weights, changes=changes, **rules).run()
        if made.it.state != "done":
            return None
        seconds.append(round(made.merged_at, 6))
    return [min(seconds), max(seconds)]


def changed(recorded: RunConfig, update: Update, partition: Partition, given: Mapping[str, Any]) -> RunConfig:
    """The settings of the scenario; `given` are the arguments of `simulate`, by name, None where they are to be as recorded."""
    n_workers, slowdown, drift, stalls = (given[name] for name in ("n_workers", "slowdown", "drift", "stalls"))
    slowdown = None if slowdown is None else several("slowdown", slowdown, slowdown_of)
    exchange, overlap, local_steps = (given[name] for name in ("exchange", "overlap", "local_steps"))
    if update.collective:
        raise ValueError("an all-reduce cannot be simulated: it exchanges within every step. Known to work: every other update.")
    before = recorded.workers
    n = len(before if slowdown is None else slowdown) if n_workers is None else whole("n_workers", n_workers, most=MAX_WORKERS)
    again = [before[i % len(before)] for i in range(n)]
    slow = [worker["slowdown"] for worker in again] if slowdown is None else slowdown
    if len(slow) != n:
        raise ValueError(f"slowdown has {len(slow)} entries for {n} workers. Give one factor for each worker.")
    moves = slowdown is not None or drift is not None
    about = {"name": "simulated", "host": "simulated", "device": "cpu", "threads": 1, "pid": 0}
    drift = recorded.drift if drift is None else real("drift", drift, least=0)
    there = [worker.get("drifts_to", worker["slowdown"]) for worker in again]
    there = opposite(slow, drift) if moves else there
    pairs = enumerate(zip(slow, there, strict=True))
    settings = {
        "workers": [{"index": i, **about, "slowdown": here, "drifts_to": later} for i, (here, later) in pairs],
        "n_workers": n,
        "kind": "simulated",
        "emulated": False,
        "update": update.config(),
        "partition": partition.config(),
        "drift": drift,
        "stalls": make_stalls(recorded.stalls if stalls is None else stalls),
        "exchange": recorded.exchange if exchange is None else exchange,
        "resumed": (),
    }
    traffic = check_traffic(update, settings["exchange"], 0 if overlap is None else overlap)
    settings["exchange"] = traffic["exchange"]
    if overlap is not None or (update.scored and not update.ahead):  # a rule that allows none does not inherit it
        settings["overlap"] = traffic["overlap"]
    if given["jitter"] is not None:
        settings["jitter"] = jitter_of("jitter", given["jitter"])
    if given["seed"] is not None:
        settings["seed"] = whole("seed", given["seed"], 0, SEEDS)
    if not isinstance(local_steps, str) or local_steps != RECORDED:
        settings["local_steps"] = None if local_steps is None else whole("local_steps", local_steps)
    n_train = recorded.n_train if given["samples"] is None else whole("samples", given["samples"], most=MOST)
    passes = recorded.passes if given["passes"] is None else real("passes", given["passes"], above=0, most=MOST)
    units = recorded.units if n_train == recorded.n_train else units_like(recorded.units, n_train)
    budget = whole("passes x samples", max(1, round(passes * n_train)), most=MOST)
    milestones = [max(1, round(samples * n_train / recorded.n_train)) for samples in recorded.milestones]
    settings |= {"milestones": tuple(samples for samples in milestones if samples < budget), "target": None, "patience": None}
    return recorded.replace(**settings, n_train=n_train, units=units, passes=passes, budget=budget)


def units_like(units: Sequence[int], n: int) -> tuple[int, ...]:
    """Offsets of units of n samples, of the lengths of these in turn."""
    made = [0]
    for length in itertools.cycle(np.diff(units).tolist()) if units else ():
        if made[-1] + length >= n:
            return (*made, n)
        made.append(made[-1] + length)
    return ()


def checked_failures(failures: Sequence[Sequence[float]], n_workers: int) -> list[list[float]]:
    """Each as [seconds, worker] or [seconds, worker, away]; ValueError where one makes no sense."""
    checked = []
    for failure in several("failures", failures, lambda _, failure: failure):
        try:
            seconds, worker, *away = several("failures", failure, partial(real, least=0))
            if len(away) > 1:
                raise ValueError
            checked.append([seconds, whole("failures", worker, 0, n_workers - 1), *away])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"failures: {failure!r}: give (seconds, worker) or (seconds, worker, away), workers 0 to {n_workers - 1}."
            ) from error
    return checked


def changes(failures: Sequence[Sequence[float]]) -> list[Change]:
    """[seconds, worker] is lost for good; [seconds, worker, away] comes back."""
    made = []
    for seconds, worker, *away in failures:
        made.append(Change(seconds, worker, False))
        made += [Change(seconds + later, worker, True) for later in away]
    return made


def recorded_changes(run: Run) -> list[Change]:
    """Who was lost and who came in mid-run, as recorded."""
    events = run.events
    begun = events.seq[events.kind == "start"].iloc[0]
    rows = events[(events.seq > begun) & events.kind.isin(["join", "leave"])]
    return [
        Change(float(row.seconds), int(row.worker), row.kind == "join")
        for row in rows.itertuples()
        if row.kind == "join" or (isinstance(row.message, str) and row.message not in ("", AGAIN))
    ]


def compared(run: Run, timing: Timing, update: Update, partition: Partition, batch_size: int) -> float | None:
    """Simulated, by this fit, against measured wall time of a run as it was: the relative error; None where it has no end. Printed once.

    `update` and `partition` are used where they are the run's own, which may be of classes that only their user has.
    """
    known = _fits.get(run, {})
    if known.get("timing") is not timing:  # another thread has fitted it together with other runs meanwhile
        known = {}
    if "error" not in known:
        known["error"] = _compared(run, timing, update, partition, batch_size)
    return known["error"]


def _compared(run: Run, timing: Timing, update: Update, partition: Partition, batch_size: int) -> float | None:
    if run.state != "done" or run.config.resumed:
        print(f"Run {run.name} was not made from start to end, so there is no wall time to compare the simulation with.")
        return None
    try:
        own = {
            what: copy.deepcopy(rule) if is_rule_of(run, what, rule) else rule_of(run, what, by="simulate")
            for what, rule in (("update", update), ("partition", partition))
        }
    except RunError as error:
        print(f"There is no comparison with the run as it was: {error}")
        return None
    measured = float(run.events.query("kind == 'merge'").seconds.max())
    again = Simulation(
        run.config.replace(batch_size=batch_size), timing, run.layout.size, **own, changes=recorded_changes(run)
    ).run()
    error = again.merged_at / measured - 1
    print(
        f"Run {run.name} took {measured:.2f} s; simulated as it was, it takes {again.merged_at:.2f} s ({100 * error:+.1f} %).",
        "That is the error of the fit on the run that it is made from, not that of a prediction.",
    )
    return error
