"""The inner layer of one worker: who did which task of a training step, and how near each layer is to what the machine can do.

Both read a `Profile` of `labkit.inner.profile`.

Used through `labkit.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

    from labkit.inner.profiling import Profile

# Of the kinds of a task: its name in the legend and the number of its colour.
KINDS = {"forward": ("forward", 0), "input gradient": ("input gradient", 1), "weight gradient": ("weight gradient", 2)}
OTHERS = ("sums, statistics, loss, update", 4)
DIMS = ("milliseconds", "bottom", "end (ms)", "top")
CRITICAL = ("on the critical path", 6)
NAMED = 3  # layers of the roofline that are named, those that take longest


def gantt(profile: Profile) -> hv.Overlay:
    """The tasks of one step by thread, as they were executed; a black strip marks those of the critical path.

    Examples
    --------
    >>> figure = labkit.plots.gantt(labkit.inner.profile(problem, batch=16, inner=1, steps=3))
    """
    _check(profile)
    style.extension()
    tasks, measured = profile.tasks, profile.schedule
    start, end, row = 1e3 * np.array(tasks.start), 1e3 * np.array(tasks.end), -np.array(tasks.thread, float)
    kinds = np.array([KINDS.get(task.kind, OTHERS)[0] for task in profile.graph.tasks])
    elements, legend = [], []
    for name, number in (*KINDS.values(), OTHERS):
        if (own := kinds == name).any():
            elements.append(style.boxes((start[own], row[own] - 0.32, end[own], row[own] + 0.32), number, name, DIMS))
            legend.append((name, number, "box"))
    critical = np.zeros(len(start), bool)
    critical[tasks.critical_path] = True
    elements.append(
        style.boxes((start[critical], row[critical] - 0.44, end[critical], row[critical] - 0.36), CRITICAL[1], CRITICAL[0], DIMS)
    )
    legend.append((CRITICAL[0], CRITICAL[1], "box"))
    above = 100 * (measured.makespan / measured.bound - 1)
    title = f"{_threads(measured.threads)} {1e3 * measured.makespan:.3g} ms for a step, {above:.0f} % above the bound; idle {100 * measured.idle_share:.0f} %"
    bounds = {name: f"{1e3 * bound:.3g} ms" for name, bound in measured.bounds.items()}
    note = f"{profile.title}; work / threads {bounds['work / threads']}, critical path {bounds['critical path']}"
    return style.finish(
        elements, title, note, legend, xlabel="time (ms)", ylabel="", xlim=(0, 1.01 * float(end.max())), grid="x",
        ylim=(0.5 - measured.threads - 0.1, 0.5), yticks=[(-thread, f"thread {thread}") for thread in range(measured.threads)],
        height=1.8 + 0.6 * measured.threads,
    )  # fmt: skip


def _check(profile: Any) -> None:
    if not all(hasattr(profile, name) for name in ("graph", "tasks", "schedule", "peaks")):
        raise TypeError(f"profile={str(profile)[:80]} must be what labkit.inner.profile returns, not {type(profile).__name__}.")


def _threads(n: int) -> str:
    return "1 thread takes" if n == 1 else f"{n} threads take"


def roofline(profile: Profile) -> hv.Overlay:
    """FLOP/s of each layer against its FLOPs a byte, both logarithmic, with what one thread of this machine allows: copying and products of
    matrices, in float32 and in bfloat16, measured with the step.

    Examples
    --------
    >>> figure = labkit.plots.roofline(labkit.inner.profile(problem, batch=16, inner=1, steps=3))
    """
    _check(profile)
    style.extension()
    table, peaks = profile.table(), profile.peaks
    table = table[(table["flops"] > 0) & (table["ms"] > 0)]
    convs, lines = table["op"].str.startswith("Conv"), table["op"] == "Linear"
    low, high = 0.5 * float(table["intensity"].min()), 2 * max(float(table["intensity"].max()), peaks["bfloat16"] / peaks["bytes"])
    x = np.geomspace(low, high, 60)
    elements, legend = [], []
    for number, dtype in ((5, "bfloat16"), (3, "float32")):
        roof = np.minimum(x * peaks["bytes"], peaks[dtype]) / 1e9
        name = f"one thread at most, {dtype} ({peaks[dtype] / 1e9:.3g} GFLOP/s)"
        elements.append(style.line(x, roof, number, name, ("intensity", "gflops")))
        legend.append((name, number, "line"))
    for number, name, own in ((0, "convolution", convs), (2, "linear", lines), (4, "other", ~(convs | lines))):
        if own.any():
            elements.append(
                style.marks(
                    table.loc[own, "intensity"].to_numpy(),
                    table.loc[own, "gflops"].to_numpy(),
                    number,
                    name,
                    ("intensity", "gflops"),
                )
            )
            legend.append((name, number, "mark"))
    longest = table.nlargest(NAMED, "ms")
    elements.append(_named(longest))
    heavy = table[convs | lines]
    reached = float((heavy["ms"] * heavy["of_roof"]).sum() / heavy["ms"].sum()) if len(heavy) else 0.0
    title = f"Convolutions and linear layers reach {100 * reached:.0f} % of the float32 roof"
    note = f"{profile.title}; {peaks['bytes'] / 1e9:.0f} GB/s; {profile.instructions}; {len(table)} layers, forward and backward"
    top = 2 * max(peaks["float32"], peaks["bfloat16"]) / 1e9
    return style.finish(
        elements, title, note, legend, logx=True, logy=True, xlabel="FLOPs per byte", ylabel="GFLOP/s of one thread", xlim=(low, high), ylim=(0.5 * float(table["gflops"].min()), top),
    )  # fmt: skip


def _named(rows: pd.DataFrame) -> hv.Labels:
    import holoviews as hv

    written = hv.Labels(
        [(x, 1.25 * y, name) for x, y, name in zip(rows["intensity"], rows["gflops"], rows["layer"], strict=True)],
        ["x", "y"],
        "text",
    )
    above = {"text_font_size": "9pt", "text_color": "black", "text_baseline": "bottom"}
    return style.styled(written, bokeh=above, matplotlib={"size": 9, "color": "black", "verticalalignment": "bottom"})
