"""`simulate`: what a run would take on a cluster that one does not have.

    runs or speeds  ->  cost model (fitted)  +  scenario (what is to differ)  ->  simulator  ->  a Run, "simulated"

Used from notebooks; the work is done in `labkit.simulation.simulator`.
"""

import copy
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from labkit.errors import file_path, flag, real, several, whole
from labkit.names import named
from labkit.partition import Partition, make_partition
from labkit.plots.progress import meter
from labkit.problems.problem import Problem
from labkit.runs.checkpoints import Layout
from labkit.runs.record import directories
from labkit.simulation import scenario
from labkit.simulation.offline import Ledger
from labkit.simulation.simulator import Simulation
from labkit.training.resume import problem_of, rule_of
from labkit.training.run import Run, read_run
from labkit.training.train import check_weighed, run_name
from labkit.updates import Update, make_update


@named
def simulate(
    source: Run | str | Path | Sequence[Run | str | Path] | Sequence[float],
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
    local_steps: int | str | None = scenario.RECORDED,
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
    wall time); it is not the error of a prediction. For that stands `config["origin"]["range_s"]`, which `repr` of the run has too: the lowest
    and the highest wall time of ten simulations, one by the fit and nine by the recorded runs and local passes drawn anew (None for speeds, beyond some 300
    local passes, and where a worker has made one alone). Where passes are few or differ much, that is printed. What no recording has seen, another
    day's load say, is in neither.

    Parameters
    ----------
    source
        A run that has ended, or its directory, several, or a folder of runs (the first is changed, all are fitted; two sizes of model tell
        latency from bandwidth), or speeds: samples/s of each worker, for a cluster of which nothing is recorded.
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
        A run is still running, or is too short to be fitted.
    ValueError, TypeError, PartitionError, ProblemError
        The request makes no sense. An all-reduce cannot be simulated: it exchanges within every step.

    Examples
    --------
    >>> many = labkit.simulate(run, n_workers=8, slowdown=[1, 1, 1, 1, 2, 2, 4, 4], update="fedbuff")
    >>> many.origin, many.config.n_workers
    ('simulated', 8)
    """
    given = [_measured("source", source)] if isinstance(source, Run | str | os.PathLike) else several("source", source, _measured)
    measured = list(chain.from_iterable(given))
    if not measured:
        raise ValueError("simulate() needs a run, several, or the samples/s of at least one worker.")
    base = measured[0] if isinstance(measured[0], Run) else None
    servers, numerics = whole("servers", servers), flag("numerics", numerics)
    timing, recorded = scenario.of_runs(measured) if base else scenario.of_speeds(measured)
    if base and update is None:
        update = rule_of(base, "update", by="simulate")
    if base and partition is None:
        partition = rule_of(base, "partition", by="simulate")
    update = copy.deepcopy(make_update(recorded.update if update is None else update))
    partition = copy.deepcopy(make_partition(recorded.partition if partition is None else partition))
    bandwidth = None if bandwidth is None else real("bandwidth", bandwidth, least=1e-3)
    latency = None if latency is None else real("latency", latency, least=0, most=1e9)
    given = {"n_workers": n_workers, "slowdown": slowdown, "jitter": jitter, "drift": drift, "stalls": stalls, "seed": seed}
    given |= {"passes": passes, "local_steps": local_steps, "samples": samples, "exchange": exchange, "overlap": overlap}
    config = scenario.changed(recorded, update, partition, given)
    if numerics and (base is None or samples is not None or n_weights is not None):
        raise ValueError("numerics=True trains the model of a recorded run: not with speeds, samples= or n_weights=.")
    problem = problem_of(base, base._problem if problem is None else problem, by="simulate") if numerics else None
    if problem:
        check_weighed(problem, update, base)
    batch_size = config.batch_size or base.problem().batch_size
    size = base.layout.size if base else scenario.UNKNOWN["n_weights"]
    size = size if n_weights is None else whole("n_weights", n_weights)
    layout = base.layout if base else Layout((), (), size, 0)
    if failures is None and base and n_workers is None and slowdown is None:
        changes = scenario.recorded_changes(base)
    else:
        failures = None if failures is None else scenario.checked_failures(failures, config.n_workers)
        changes = scenario.changes(failures or ())
    error = scenario.compared(base, timing, update, partition, batch_size) if base else None
    asked = {"bandwidth": bandwidth, "latency": latency, "servers": servers, "n_weights": None if n_weights is None else size}
    asked |= {"failures": failures}
    config = config.replace(batch_size=batch_size, scenario=asked)
    folder = file_path("runs", runs) if runs is not None else base.path.parent if base else Path("runs")
    name, default = None if name is None else run_name(name), f"{base.name}-simulated" if base else "simulated"
    timing = timing.with_links(bandwidth, latency).on_servers(servers)
    spread = scenario.spread(config, timing, size, update, partition, changes) if base else None
    origin = {
        "kind": "simulated",
        "run": base.name if base else None,
        "numerics": bool(numerics),
        "error": error,
        "range_s": spread,
    }
    ledger = Ledger(folder, name, default, config, layout, origin)
    rules = {"update": update, "partition": partition, "changes": changes, "problem": problem}
    with ledger, meter(f"simulation of {config.n_workers} workers", config.budget) as progress:
        made = Simulation(config, timing, size, **rules, ledger=ledger, progress=progress).run()
        ledger.ended(made.it, server_busy=made.busy / made.merged_at if made.merged_at else 0.0)
        if not numerics:
            ledger.no_curve()
    return Run(ledger.path, problem=problem)


def _measured(name: str, given: Any) -> list[Any]:
    """A run in a list, the runs that a path means, or a speed, which is checked with the others."""
    return [read_run(path) for path in directories(file_path(name, given))] if isinstance(given, str | os.PathLike) else [given]
