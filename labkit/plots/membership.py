"""Membership of a run: which worker was here from when to when, drawn under the accuracy, with the faults that were injected.

One bar for each row of `Run.membership`: an incarnation of a worker, from its join until the server counted it as lost.

Used through `labkit.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from labkit.plots import style

if TYPE_CHECKING:
    from pathlib import Path

    import holoviews as hv
    import pandas as pd

    from labkit.runs.record import RunRecord

MARKS = {"kill": 6, "freeze": 1, "thaw": 4, "drop": 3, "join": 0}  # a fault and the number of its marker
HEIGHTS = (2.6, 1.4)  # of the accuracy; of the membership, and 0.45 for each worker (inches)


def membership(run: RunRecord | str | Path, faults: pd.DataFrame | None = None) -> hv.Layout:
    """Test accuracy over time, and under it who was here when; `faults` is the table of a `labkit.chaos.Storm`, drawn as marks.

    A tick begins each bar: a worker that was lost and came back is another incarnation. RunError while the run is running: it has
    no accuracy yet.

    Examples
    --------
    >>> figure = labkit.plots.membership(run)
    """
    run = style.a_run("run", run)
    if faults is not None:
        style.check_columns(faults, ["seconds", "fault", "worker"])
    style.extension()
    table, curve = run.membership(), run.curve().dropna(subset=["seconds", "score"])
    if table.empty or curve.empty:
        return style.message(f"{run.label}: who was here when", f"{run.name}: no worker has joined, or no version was retained.")
    end = 1.02 * max(float(table.end.max()), float(curve.seconds.max()))
    lost = int((table.message != "").sum())
    losses = {0: "no worker was lost", 1: "a worker was lost once"}.get(lost, f"a worker was lost {lost} times")
    last = curve.score.iloc[-1]
    what, amount = ("test score", f"{last:.4g}") if run.config.lower_is_better else ("test accuracy", f"{100 * last:.1f} %")
    title = f"{run.label}: {losses}, {what} {amount} in the end"
    upper = style.lines(curve.assign(weights="global weights"), "seconds", "score", "weights")
    upper = style.finish(upper, title, style.caption([run]), False, xlabel="", ylabel=what, xlim=(0, end), **_size(HEIGHTS[0]))
    return style.stack([upper, _bars(table, faults, end)], space=0.1)


def _bars(table: pd.DataFrame, faults: pd.DataFrame | None, end: float) -> hv.Overlay:
    rows = style.worker_rows(table.worker.unique())
    table = table.assign(since=np.where((table.incarnation == 0) & (table.start == 0), "start", "later"))
    kinds = {"start": ("from the start", 5), "later": ("came later or came back", 2)}
    elements = style.spans(table, "since", kinds, rows, between=(-0.3, 0.15), absent=False)
    elements.append(style.row_ticks(table, "start", rows, (-0.3, 0.15)))
    faults = table[:0].assign(fault="", seconds=0.0) if faults is None else faults
    faults = faults[faults.worker.isin(list(rows)) & faults.seconds.le(end)].sort_values("fault", kind="stable")
    counts = faults.fault.value_counts()
    drawn = faults.assign(seconds=faults.seconds.clip(lower=0), bottom=style.heights(faults.worker, rows) + 0.3)
    texts = {fault: f"{fault} ({n})" for fault, n in counts.items()}
    numbers = {text: MARKS[fault] for fault, text in texts.items()}
    elements += style.points(drawn.assign(fault=faults.fault.map(texts)), "seconds", "bottom", "fault", numbers)
    n = int(counts.drop("thaw", errors="ignore").sum())
    title = f"Who was here, and {'one fault' if n == 1 else f'the {n} faults'} injected" if n else "Who was here"
    axis = style.rows_axis(rows) | {"ylim": (-len(rows) + 0.5, 0.6)} | _size(min(8.0, HEIGHTS[1] + 0.45 * len(rows)))
    return style.finish(elements, title, "a tick begins each bar", xlabel="time (s)", xlim=(0, end), **axis)


def _size(height: float) -> dict:
    return {"height": height, "shape": {"aspect": 8 / height}}
