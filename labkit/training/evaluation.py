"""The learning curve of a run: every retained version of the global weights, measured on the test set after the run.

It is measured afterwards, so that the times that are compared do not include it. A large test set takes seconds a version, which a notebook
and a terminal are told.

Used by `labkit.training.supervisor` at the end of a run, and by `Run.curve` where that was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from labkit.cluster.notice import telling
from labkit.inner.precision import Precision
from labkit.models.flat import Flat
from labkit.runs import checkpoints, metrics
from labkit.runs.events import VERSIONS, effective
from labkit.training.worker.process import give_back, prepare

if TYPE_CHECKING:
    import pandas as pd

    from labkit.cluster.lab import Lab
    from labkit.problems.problem import Problem
    from labkit.runs.config import RunConfig
    from labkit.runs.record import RunRecord

BATCH = 250
TOLD_S = 3.0  # what takes longer to measure is told


def measure(run: RunRecord, problem: Problem, lab: Lab | None = None, workers: Sequence[int] | None = None) -> pd.DataFrame:
    """All that the problem's `measure` gives of every retained version on the test set, as `metrics.parquet`; on `workers` of the lab
    (by default those that no run holds), or here without a lab. What is NaN is printed."""
    import pandas as pd

    versions = checkpoints.versions(run.path)
    n = len(workers or lab.free()) or 1 if lab else 1
    shares = [versions[i::n] for i in range(n) if versions[i::n]]
    items = [(problem, str(run.path), share, run.config) for share in shares]
    measured: list[dict[str, float]] = []  # here; what workers have is not known before they are done
    n_test = run.config.problem.get("test_samples")  # of the record: what workers are sent is packed
    on = "the whole test set" if n_test is None else f"{n_test} test samples"  # whatever a problem of one's own has there

    def text() -> str:
        how_far = f"{len(versions)} versions" if lab else f"{len(measured)} of {len(versions)} versions"
        return f"The curve of run {run.name} is being measured, {how_far}, on {on}; the problem's test_samples= makes that shorter."

    with telling(text, TOLD_S):
        results = lab.map(_evaluate, items, workers=workers) if lab else [_evaluate(item, measured) for item in items]
    rows = sorted((row for share in results for row in share), key=lambda row: row["version"])
    events = effective(run.events)
    merges = events[events.kind.isin(VERSIONS)].groupby("version")[["seconds", "total"]].max()
    merges.loc[0] = 0.0
    others = list(dict.fromkeys(name for row in rows for name in row if name not in metrics.COLUMNS))
    table = pd.DataFrame(rows, columns=[*metrics.COLUMNS, *others])
    table = table[table.version.isin(merges.index)]  # a full disk may lack the merge of the last one
    table["seconds"] = table.version.map(merges.seconds)
    table["samples"] = table.version.map(merges.total).astype("int64")
    table = table[[*metrics.COLUMNS, *others]].astype(dict.fromkeys(("loss", "score", *others), float))
    for name in others:
        if without := table.version[table[name].isna()].tolist():
            print(f"Run {run.name!r}: {name} is NaN for version{'s' * (len(without) > 1)} {', '.join(map(str, without[:12]))}.")
    metrics.write(run.path, run.config.id, table)
    return table


def as_recorded(problem: Problem, run: RunRecord) -> Problem:
    """The problem to measure weights of this run with: in float32 where bfloat16 was asked for and a worker found layers wrong in it."""
    if problem.precision == "bfloat16" and any(found["float32"] for found in run.events.precision.dropna()):
        return problem.in_precision(Precision("float32", problem.channels_last))
    return problem


def _evaluate(
    item: tuple[Problem, str, list[int], RunConfig], rows: list[dict[str, float]] | None = None
) -> list[dict[str, float]]:
    """Runs on a worker: version, loss, score and so on of some versions of a run; `rows` grows by each one as it is measured."""
    prepare()
    try:
        return _evaluated(*item, [] if rows is None else rows)
    finally:
        give_back()


def _evaluated(
    problem: Problem, path: str, versions: list[int], config: RunConfig, rows: list[dict[str, float]]
) -> list[dict[str, float]]:
    module = problem.new_module(config.seed)
    state = Flat(module, exact=config.exact_buffers)
    indices = problem.test_indices()
    readers = {"": checkpoints.read_weights} | ({"ema_": checkpoints.read_average} if config.ema else {})
    for version in versions:
        row = {"version": version}
        for prefix, read in readers.items():
            state.load(torch.from_numpy(read(Path(path), version, len(state.vector), writable=True)))
            measured = problem.measure(module, indices, "test", batch_size=BATCH)
            row |= {f"{prefix}{name}": value for name, value in measured.items()}
        rows.append(row)
    return rows
