"""The inner layer of one worker: who did which task of a training step, and how near each layer is to what the machine can do.

Both read a `Profile` of `labkit.inner.profile`.

Used through `labkit.plots`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import like
from labkit.plots import style

if TYPE_CHECKING:
    import holoviews as hv

    from labkit.inner.profiling import Profile

# What the legend says of the kinds of a task, and the number of the colour.
KINDS = {"forward": 0, "input gradient": 1, "weight gradient": 2}
OTHERS = ("sums, statistics, loss, update", 4)
CRITICAL = ("on the critical path", 6)
NAMED = 3  # layers of the roofline that are named, those that take longest


def gantt(profile: Profile) -> hv.Overlay:
    """The tasks of one step by thread, as they were executed; a black strip marks those of the critical path.

    Examples
    --------
    >>> figure = labkit.plots.gantt(labkit.inner.profile(problem, batch=16, inner=1, steps=3))
    """
    import pandas as pd

    _opened(profile)
    tasks, measured = profile.tasks, profile.schedule
    kinds = [task.kind if task.kind in KINDS else OTHERS[0] for task in profile.graph.tasks]
    table = pd.DataFrame({"thread": tasks.thread, "start": tasks.start, "end": tasks.end, "kind": kinds})
    table[["start", "end"]] *= 1e3
    rows = {thread: f"thread {thread}" for thread in range(measured.threads)}
    by = {name: (name, number) for name, number in (*KINDS.items(), OTHERS)}
    elements = style.spans(table, "kind", by, rows, "thread", (-0.32, 0.32), "ms", absent=False)
    critical = table.loc[list(tasks.critical_path)].assign(kind=CRITICAL[0])
    elements += style.spans(critical, "kind", {CRITICAL[0]: CRITICAL}, rows, "thread", (-0.44, -0.36), "ms")
    above = 100 * (measured.makespan / measured.bound - 1)
    title = f"{_threads(measured.threads)} {1e3 * measured.makespan:.3g} ms for a step, {above:.0f} % above the bound; idle {100 * measured.idle_share:.0f} %"
    bounds = {name: f"{1e3 * bound:.3g} ms" for name, bound in measured.bounds.items()}
    note = f"{profile.title}; work / threads {bounds['work / threads']}, critical path {bounds['critical path']}"
    axis = style.rows_axis(rows, 1.8 + 0.6 * measured.threads) | {"ylim": (0.4 - measured.threads, 0.5)}
    return style.finish(elements, title, note, xlabel="time (ms)", xlim=(0, 1.01 * float(table["end"].max())), **axis)


def _opened(profile: Any) -> None:
    like("profile", profile, ("graph", "tasks", "schedule", "peaks"), "what labkit.inner.profile returns")
    style.extension()


def _threads(n: int) -> str:
    return "1 thread takes" if n == 1 else f"{n} threads take"


def roofline(profile: Profile) -> hv.Overlay:
    """FLOP/s of each layer against its FLOPs a byte, both logarithmic, with what one thread of this machine allows: copying and products of
    matrices, in float32 and in bfloat16, measured with the step. The layers: `profile.table()`.

    Examples
    --------
    >>> figure = labkit.plots.roofline(labkit.inner.profile(problem, batch=16, inner=1, steps=3))
    """
    import pandas as pd

    _opened(profile)
    table, peaks = profile.table(), profile.peaks
    table = table[(table["flops"] > 0) & (table["ms"] > 0)]
    convs, lines = table["op"].str.startswith("Conv"), table["op"] == "Linear"
    low, high = 0.5 * float(table["intensity"].min()), 2 * max(float(table["intensity"].max()), peaks["bfloat16"] / peaks["bytes"])
    x, numbers = np.geomspace(low, high, 60), {}
    roofs = []
    for number, dtype in ((5, "bfloat16"), (3, "float32")):
        name = f"one thread at most, {dtype} ({peaks[dtype] / 1e9:.3g} GFLOP/s)"
        numbers[name], roof = number, np.minimum(x * peaks["bytes"], peaks[dtype]) / 1e9
        roofs.append(pd.DataFrame({"intensity": x, "gflops": roof, "name": name}))
    elements = style.lines(pd.concat(roofs, ignore_index=True), "intensity", "gflops", "name", numbers)
    marked = table.assign(name=np.select([convs, lines], ["convolution", "linear"], "other")).sort_values("name", kind="stable")
    elements += style.points(marked, "intensity", "gflops", "name", {"convolution": 0, "linear": 2, "other": 4})
    longest = table.nlargest(NAMED, "ms").assign(gflops=lambda rows: 1.25 * rows["gflops"])
    texts = longest[["intensity", "gflops", "layer"]].itertuples(index=False, name=None)
    written = style.labels(list(texts), size=9, dims=("intensity", "gflops"), baseline="bottom")
    heavy = table[convs | lines]
    reached = float((heavy["ms"] * heavy["of_roof"]).sum() / heavy["ms"].sum()) if len(heavy) else 0.0
    title = f"Convolutions and linear layers reach {100 * reached:.0f} % of the float32 roof"
    note = f"{profile.title}; {peaks['bytes'] / 1e9:.0f} GB/s; {profile.instructions}; {len(table)} layers, forward and backward"
    top = 2 * max(peaks["float32"], peaks["bfloat16"]) / 1e9
    return style.finish(
        [*elements, written], title, note, logx=True, logy=True, xlabel="FLOPs per byte",
        ylabel="GFLOP/s of one thread", xlim=(low, high), ylim=(0.5 * float(table["gflops"].min()), top),
    )  # fmt: skip
