"""Scaling of runs: time against data or workers, where the server saturates, and how far simulated times are off.

Read from tables, a row a run, as notebooks make them from simulations. A server needs t seconds for a merge, and each worker pushes
every T seconds: with T/t of them it is busy all the time.

    throughput of m workers = m/T up to m = T/t, and 1/t from there on

Used through `labkit.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from labkit.errors import known, real, text
from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

AXES = {"samples": "training samples", "n_workers": "workers"}
FULL = 0.9  # busy share from which on a server counts as busy all the time


def scaling(frame: pd.DataFrame, x: str = "n_workers", note: str = "") -> hv.Overlay:
    """Seconds against `x`, "samples" or "n_workers", both logarithmic, one line a strategy; columns: strategy, seconds and `x`.

    `note` is the line under the title: where the times come from.

    Examples
    --------
    >>> import pandas as pd
    >>> figure = labkit.plots.scaling(pd.DataFrame({"strategy": "AGWU + IDPA", "n_workers": [1, 2, 4], "seconds": [60, 31, 17]}))
    """
    x, note = known("x", x, AXES), text("note", note)
    style.extension()
    _check(frame, ["strategy", "seconds", x])
    if frame.empty:
        return style.message("How runs scale", "there is no run to draw.")
    strategies = {label: own.sort_values(x) for label, own in frame.groupby("strategy", sort=False)}
    end = frame[x].max()
    ends = {label: own["seconds"].iloc[-1] for label, own in strategies.items() if own[x].iloc[-1] == end}
    first, worst = min(ends, key=ends.get), max(ends, key=ends.get)
    title = f"{first} takes {ends[first]:,.3g} s with {end:,.0f} {x.removeprefix('n_')}"
    title += f", {worst} {ends[worst] / ends[first]:.1f} times as long" if len(ends) > 1 else ""
    return _logarithmic(strategies, (x, "seconds"), title, note, xlabel=AXES[x], ylabel="time (s)")


def saturation(frame: pd.DataFrame, note: str = "") -> hv.Overlay:
    """Samples/s against workers, both logarithmic, one line a label; `frame`: label, n_workers, samples_per_s, server_busy.

    The legend of a line: from how many workers on its server is busy all the time (90 % of it).

    Examples
    --------
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"label": "AGWU", "n_workers": [1, 4, 16], "samples_per_s": [900, 3500, 8000], "server_busy": [0.1, 0.4, 0.95]})
    >>> figure = labkit.plots.saturation(frame)
    """
    style.extension()
    _check(frame, ["label", "n_workers", "samples_per_s", "server_busy"])
    if frame.empty:
        return style.message("Where the server saturates", "there is no run to draw.")
    lines, full = {}, {}
    for label, own in frame.groupby("label", sort=False):
        busy = own.loc[own["server_busy"] >= FULL, "n_workers"]
        if len(busy):
            full[label] = int(busy.min())
        text = f"{label}: " + (f"busy from {full[label]:,} workers on" if len(busy) else "never busy all the time")
        lines[text] = own.sort_values("n_workers")
    title = f"The server can take all {frame['n_workers'].max():,} workers"
    if full:
        soonest = min(full, key=full.get)
        title = f"{soonest}: from {full[soonest]:,} workers on the server is busy all the time"
    labels = {"xlabel": "workers", "ylabel": "throughput (samples/s)"}
    return _logarithmic(lines, ("n_workers", "samples_per_s"), title, note, **labels)


def errors(frame: pd.DataFrame, bar: float = 0.1, note: str = "") -> hv.Overlay:
    """How far simulated times are off, a mark a run and a row a configuration, with strokes at 0 and at `bar` above and below.

    `frame`: configuration, and error = simulated over measured time, less 1.

    Examples
    --------
    >>> import pandas as pd
    >>> figure = labkit.plots.errors(pd.DataFrame({"configuration": ["AGWU", "AGWU", "SGWU"], "error": [0.02, -0.05, 0.12]}))
    """
    bar = real("bar", bar, least=0)
    style.extension()
    _check(frame, ["configuration", "error"])
    if frame.empty:
        return style.message("How far the simulator is off", "there is no run to compare with.")
    medians = frame.groupby("configuration", sort=False)["error"].median()
    rows = {name: -i for i, name in enumerate(medians.index)}
    axes = ("error (%)", "row")
    each = style.marks(100 * frame["error"].to_numpy(float), frame["configuration"].map(rows).to_numpy(float), 0, "a run", axes)
    middle = style.marks(100 * medians.to_numpy(float), np.array([*rows.values()], float), 1, "median", axes)
    strokes = style.ticks(100 * np.array([-bar, 0, bar]), np.full(3, 0.5 - len(rows)), np.full(3, 0.5))
    within = int((medians.abs() <= bar).sum())
    title = f"{within} of {len(medians)} configurations within {100 * bar:g} %: median {100 * medians.abs().median():.1f} %"
    return style.finish(
        [strokes, each, middle], title, note, [("a run", 0, "mark"), ("median of a configuration", 1, "mark")],
        xlabel="simulated time is longer than measured by (%)", ylabel="", ylim=(0.5 - len(rows), 0.5), grid="x",
        yticks=[(y, name) for name, y in rows.items()], height=1.6 + 0.4 * len(rows),
    )  # fmt: skip


def _logarithmic(lines: dict[str, pd.DataFrame], dims: tuple[str, str], title: str, note: str, **labels: str) -> hv.Overlay:
    """A line for each table, by its label; both axes logarithmic."""
    elements = [
        style.line(*(own[name].to_numpy(float) for name in dims), number, label, dims)
        for number, (label, own) in enumerate(lines.items())
    ]
    at = sorted({float(x) for own in lines.values() for x in own[dims[0]]})
    axes = {"logx": True, "logy": True, "xticks": [(x, f"{x:,.0f}") for x in at], "xlim": (0.9 * at[0], 1.1 * at[-1])}
    return style.finish(elements, title, note, [(label, number, "line") for number, label in enumerate(lines)], **axes, **labels)


def _check(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    style.check_columns(frame, columns)
    if len(columns) > 2 and frame.duplicated(at := [columns[0], columns[-1] if columns[-1] in AXES else columns[1]]).any():
        where = ", ".join(f"{name} {value}" for name, value in frame[frame.duplicated(at)].iloc[0][at].items())
        raise ValueError(f"several rows of the frame have {where}. Say in {at[0]} what differs between them, or take their median.")
    if len(frame) and not np.isfinite(frame[columns[1:]].to_numpy(float)).all():
        raise ValueError(f"the columns {', '.join(columns[1:])} must hold numbers alone; some are missing.")
