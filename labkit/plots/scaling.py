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
from labkit.plots import claims, style

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
    end = frame[x].max()
    ends = frame[frame[x] == end].set_index("strategy")["seconds"]
    first, worst = ends.idxmin(), ends.idxmax()
    title = f"{first} takes {claims.amount(ends[first])} s with {end:,.0f} {x.removeprefix('n_')}"
    title += f", {worst} {ends[worst] / ends[first]:.1f} times as long" if len(ends) > 1 else ""
    return _logarithmic(frame, (x, "seconds"), "strategy", title, note, xlabel=AXES[x], ylabel="time (s)")


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
    full = frame[frame["server_busy"] >= FULL].groupby("label", sort=False)["n_workers"].min()
    texts = {
        label: f"busy from {full[label]:,} workers on" if label in full else "never busy all the time" for label in frame["label"]
    }
    title = f"The server can take all {frame['n_workers'].max():,} workers"
    if len(full):
        title = f"{full.idxmin()}: from {full.min():,} workers on the server is busy all the time"
    table = frame.assign(text=[f"{label}: {texts[label]}" for label in frame["label"]])
    labels = {"xlabel": "workers", "ylabel": "throughput (samples/s)"}
    return _logarithmic(table, ("n_workers", "samples_per_s"), "text", title, note, **labels)


def errors(frame: pd.DataFrame, bar: float = 0.1, note: str = "") -> hv.Overlay:
    """How far simulated times are off, a mark a run and a row a configuration, with strokes at 0 and at `bar` above and below.

    `frame`: configuration, and error = simulated over measured time, less 1.

    Examples
    --------
    >>> import pandas as pd
    >>> figure = labkit.plots.errors(pd.DataFrame({"configuration": ["AGWU", "AGWU", "SGWU"], "error": [0.02, -0.05, 0.12]}))
    """
    import pandas as pd

    bar = real("bar", bar, least=0)
    style.extension()
    _check(frame, ["configuration", "error"])
    if frame.empty:
        return style.message("How far the simulator is off", "there is no run to compare with.")
    medians = frame.groupby("configuration", sort=False)["error"].median()
    rows = {name: name for name in medians.index}
    table = pd.concat([frame.assign(of="a run"), medians.reset_index().assign(of="median of a configuration")], ignore_index=True)
    table = table.assign(error=100 * table["error"].astype(float), row=style.heights(table["configuration"], rows))
    strokes = style.ticks(100 * np.array([-bar, 0, bar]), np.full(3, 0.5 - len(rows)), np.full(3, 0.5))
    within = int((medians.abs() <= bar).sum())
    title = f"{within} of {len(medians)} configurations within {100 * bar:g} %: median {100 * medians.abs().median():.1f} %"
    elements, axis = [strokes, *style.points(table, "error", "row", "of")], style.rows_axis(rows, 1.6 + 0.4 * len(rows))
    return style.finish(elements, title, note, xlabel="simulated time is longer than measured by (%)", **axis)


def _logarithmic(frame: pd.DataFrame, dims: tuple[str, str], by: str, title: str, note: str, **labels: str) -> hv.Overlay:
    """A line for each value of `by`; both axes logarithmic."""
    numbers = {str(label): number for number, label in enumerate(frame[by].unique())}
    elements = style.lines(frame.sort_values(dims[0], kind="stable"), *dims, by, numbers)
    at = sorted(frame[dims[0]].astype(float).unique())
    axes = {"logx": True, "logy": True, "xticks": [(x, f"{x:,.0f}") for x in at], "xlim": (0.9 * at[0], 1.1 * at[-1])}
    return style.finish(elements, title, note, **axes, **labels)


def _check(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    style.check_columns(frame, columns)
    if len(columns) > 2 and frame.duplicated(at := [columns[0], columns[-1] if columns[-1] in AXES else columns[1]]).any():
        where = ", ".join(f"{name} {value}" for name, value in frame[frame.duplicated(at)].iloc[0][at].items())
        raise ValueError(f"several rows of the frame have {where}. Say in {at[0]} what differs between them, or take their median.")
    if len(frame) and not np.isfinite(frame[columns[1:]].to_numpy(float)).all():
        raise ValueError(f"the columns {', '.join(columns[1:])} must hold numbers alone; some are missing.")
