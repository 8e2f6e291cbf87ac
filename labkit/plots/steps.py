"""The time of a training step in several ways: bars, from the table of `labkit.step_times`.

Used through `labkit.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from labkit.errors import text
from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd


def step_times(frame: pd.DataFrame, note: str = "") -> hv.Overlay:
    """How many times as fast as the first problem each is, a group of bars for each batch size; `frame`: of `labkit.step_times`.

    Examples
    --------
    >>> figure = labkit.plots.step_times(labkit.step_times({"lenet": problem}, batch_sizes=[16, 32], steps=3))
    """
    note = text("note", note)
    style.extension()
    style.check_columns(frame, ["problem", "batch_size", "speedup"])
    if frame.empty:
        return style.message("How long a step takes", "there is no step to draw.")
    wide = frame.pivot(index="batch_size", columns="problem", values="speedup")[list(dict.fromkeys(frame["problem"]))]
    first, medians = wide.columns[0], wide.median()
    best = medians.idxmax()
    title = f"{best}: {medians[best]:.2f} times as fast as {first}" if best != first else f"Nothing is faster than {first}"
    title += f" (median of {len(wide)} batch sizes)" if len(wide) > 1 and best != first else ""
    threads, cores = frame.attrs.get("threads"), frame.attrs.get("cores")
    about = [note] if note else []
    about += [f"{cores} cores, {threads} thread{'s' if threads != 1 else ''} of torch unless it is said"] if cores else []
    return style.columns(wide.rename("batch {}".format), title, "; ".join(about), "{:.2f}", ylabel=f"times as fast as {first}")
