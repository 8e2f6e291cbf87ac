"""Membership of a run: which worker was here from when to when, drawn under the accuracy, with the faults that were injected.

One bar for each incarnation of a worker, from its join until the server counted it as lost. Both come from the events alone.

Used through `labkit.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.plots import style
from labkit.runs.analysis import intervals

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

    from labkit.runs.record import RunRecord

MARKS = {"kill": 6, "freeze": 1, "thaw": 4, "drop": 3, "join": 0}  # a fault and the number of its marker
HEIGHTS = (2.6, 1.4)  # of the accuracy; of the membership, and 0.45 for each worker (inches)


def roster(run: RunRecord) -> pd.DataFrame:
    """Who was here when: columns worker, incarnation, start, end (s), message (why it was gone; "" for an ordinary end).

    Examples
    --------
    >>> sorted(labkit.plots.roster(run)["worker"].tolist())
    [0, 1]
    """
    table = intervals(style.a_run("run", run).events)
    here = table.loc[table.kind == "here", ["worker", "incarnation", "start", "end", "message"]]
    return here.astype({"incarnation": int}).reset_index(drop=True)


def membership(run: RunRecord, faults: pd.DataFrame | None = None) -> hv.Layout:
    """Test accuracy over time, and under it who was here when; `faults` is the table of a `labkit.chaos.Storm`, drawn as marks.

    A tick begins each bar: a worker that was lost and came back is another incarnation. RunError while the run is running: it has
    no accuracy yet.

    Examples
    --------
    >>> figure = labkit.plots.membership(run)
    """
    style.a_run("run", run)
    if faults is not None:
        style.check_columns(faults, ["seconds", "fault", "worker"])
    style.extension()
    table, curve = roster(run), run.curve().dropna(subset=["seconds", "score"])
    if table.empty or curve.empty:
        return style.message(f"{run.label}: who was here when", f"{run.name}: no worker has joined, or no version was retained.")
    end = 1.02 * max(float(table.end.max()), float(curve.seconds.max()))
    lost = int((table.message != "").sum())
    times = "once" if lost == 1 else f"{lost} times"
    last = curve.score.iloc[-1]
    what, amount = ("test score", f"{last:.4g}") if run.config.lower_is_better else ("test accuracy", f"{100 * last:.1f} %")
    title = f"{run.label}: a worker was lost {times}, {what} {amount} in the end"
    upper = style.line(curve.seconds.to_numpy(), curve.score.to_numpy(), 0, "global weights", ("seconds", "score"))
    upper = style.finish(
        [upper], title, style.caption([run]), xlabel="", ylabel=what, xlim=(0, end), **_size(HEIGHTS[0])
    )  # fmt: skip
    return style.stack([upper, _bars(table, faults, end)], space=0.1)


def _bars(table: pd.DataFrame, faults: pd.DataFrame | None, end: float) -> hv.Overlay:
    rows = {worker: -row for row, worker in enumerate(sorted(table.worker.unique()))}  # worker 0 on top
    y = table.worker.map(rows).to_numpy(float)
    first = ((table.incarnation == 0) & (table.start == 0)).to_numpy()
    elements, legend = [], []
    for name, number, which in (("from the start", 5, first), ("came later or came back", 2, ~first)):
        if which.any():
            own = table[which]
            spans = (own.start.to_numpy(), y[which] - 0.3, own.end.to_numpy(), y[which] + 0.15)
            elements.append(style.boxes(spans, number, name, ("seconds", "bottom", "end (s)", "top")))
            legend.append((name, number, "box"))
    elements.append(style.ticks(table.start.to_numpy(), y - 0.3, y + 0.15))
    faults = faults[faults.worker.isin(list(rows)) & faults.seconds.le(end)] if faults is not None else table[:0].assign(fault="")
    for name, own in faults.groupby("fault"):
        at = own.seconds.clip(lower=0).to_numpy()
        elements.append(style.marks(at, own.worker.map(rows).to_numpy(float) + 0.3, MARKS[name], str(name), ("seconds", "bottom")))
        legend.append((f"{name} ({len(own)})", MARKS[name], "mark"))
    names = [(row, f"worker {worker}") for worker, row in rows.items()]
    n = sum(len(own) for name, own in faults.groupby("fault") if name != "thaw")
    title = f"Who was here, and the {n} faults injected" if n else "Who was here"
    return style.finish(
        elements, title, "a tick begins each bar", legend, xlabel="time (s)", ylabel="",
        yticks=names if len(names) <= 24 else names[::8], ylim=(-len(rows) + 0.5, 0.6), xlim=(0, end), grid="x",
        **_size(min(8.0, HEIGHTS[1] + 0.45 * len(rows))),
    )  # fmt: skip


def _size(height: float) -> dict:
    return {"height": height, "shape": {"aspect": 8 / height}}
