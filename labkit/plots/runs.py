"""Figures of runs: accuracy over time, what each worker did when, staleness, balance, effective weight, speed.

A figure reads nothing but the record of a run. Its title states what was found, the line under the title what must be
known to believe it: emulated slowdown, synthetic data, a single seed. Where there is nothing yet, a text says so.

Used through `labkit.plots`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from labkit.errors import RunError, known, real, text
from labkit.plots import style
from labkit.runs import analysis
from labkit.runs.analysis import crossing
from labkit.runs.events import as_table, effective
from labkit.runs.labels import lines as by_line

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

    from labkit.runs.record import RunRecord

Series = tuple[np.ndarray, np.ndarray]  # x, y of a polyline
AXES = {"seconds": "time (s)", "samples": "samples trained on, all workers"}
BUSY = {"compute": 0, "wait": 4, "exchange": 6}  # what time goes into, and its colour: far apart in lightness


# -- over time ---------------------------------------------------------------------------------------------------------


def curves(runs: RunRecord | Sequence[RunRecord], x: str = "seconds", target: float | None = None, y: str = "score") -> hv.Overlay:
    """Test accuracy, or another column `y` of the curves, against `x`, "seconds" or "samples" (of all workers together); one line
    for each setting.

    `y` is "loss", a metric of the problem, or, with "train_" before it, what the steps of training returned: "train_loss".

    A line is labelled by its strategy and by what differs among the runs, such as "AGWU + IDPA, lr 0.01"; where nothing differs, by
    the directory. Runs that differ in their seed alone share a line: the median, with a band from the lowest to the highest. A
    `target` (of a score in (0, 1], but where lower is better) is drawn as a level, and the legend has where each line crosses it, straight between points,
    from whichever side it comes. RunError while a run is running: it has no curve yet.

    Examples
    --------
    >>> figure = labkit.plots.curves([run, labkit.simulate(run, n_workers=8)], target=0.5)
    >>> labkit.plots.save(figure, "curves.png").name
    'curves.png'
    """
    x, y = known("x", x, AXES), text("y", y)
    runs = style.some_runs(runs)
    lower = any(run.config.lower_is_better for run in runs)  # of scores
    share = y == "score" and not lower
    target = None if target is None else real("target", target, **({"above": 0, "most": 1} if share else {}))
    style.extension()
    runs = _as_runs(runs, lambda run: run.curve())
    tables = {run: _curve(run, y) for run in runs}
    known("y", y, dict.fromkeys(column for table in tables.values() for column in table if column not in (*AXES, "version")))
    tables = {run: table if y in table else table.assign(**{y: np.nan}) for run, table in tables.items()}
    what, amount, of = _meaning(runs, y), _percent if share else "{:g}".format, "" if share else f"{y} "
    title = f"{what[0].upper()}{what[1:]} against {'time' if x == 'seconds' else 'samples'}"
    lines = {label: _median(series) for label, series in _series(runs, tables.__getitem__, x, y).items()}
    if not lines and any(len(table) for table in tables.values()):
        return style.message(title, f"{_names(runs)}: {y} is NaN in every row of the curve.")
    if not lines:
        return style.message(title, f"{_names(runs)}: no version was retained, so there is nothing to evaluate.")
    texts, reached = _counted(runs), {}
    for label, (at, middle, *_) in lines.items() if target is not None else ():
        sign = -1 if (lower if y == "score" else middle[0] > target) else 1
        where = reached[label] = crossing(at, sign * middle, sign * target)
        texts[label] += f": {of}{amount(target)} {f'at {_amount(where, x)}' if np.isfinite(where) else 'not reached'}"
    levels = [style.level(target)] if target is not None else []
    elements, legend = _draw(lines, texts, (x, y))
    first = min(reached, key=lambda label: reached[label] if np.isfinite(reached[label]) else np.inf, default=None)
    if first is not None and np.isfinite(reached[first]):
        order = "first, " if len(lines) > 1 else ""
        title = f"{first} reaches {of}{amount(target)} {order}after {_amount(reached[first], x)}"
    elif first is not None:
        title = (
            f"{'No run reaches' if len(lines) > 1 else first + ' does not reach'} {of}{amount(target)}{'' if of else ' ' + what}"
        )
    gaps = sum(int(table[y].isna().iloc[int(y.startswith("train_")) :].sum()) for table in tables.values())
    note = style.caption(runs, _seeds(runs), f"{gaps} NaN not drawn" if gaps else "")
    # The untrained weights lie far below the rest and would press what matters against the top.
    seen = np.concatenate([np.r_[low[1:], high[1:]] if len(low) > 1 else low for _, _, low, high in lines.values()])
    bottom, top = np.floor(20 * seen.min()) / 20, max(seen.max(), target or 0.0)
    ylim = (bottom, top + 0.05 * (top - bottom) + 0.005)
    if not share:
        bottom, top = (pick(seen.min(), seen.max(), *([] if target is None else [target])) for pick in (min, max))
        room = 0.05 * (top - bottom) or 0.05 * abs(top) or 0.05
        ylim = (bottom - room, top + room)
    return style.finish(levels + elements, title, note, legend, xlabel=AXES[x], ylabel=what, ylim=ylim)


def _curve(run: RunRecord, y: str) -> pd.DataFrame:
    curve = run.curve()
    return curve.join(run.trained(curve)) if y.startswith("train_") and y not in curve else curve


def _meaning(runs: Sequence[RunRecord], y: str) -> str:
    """A column of the curve in words; the score of all but a regressor is called accuracy."""
    if y == "score":
        if any(run.config.lower_is_better for run in runs):
            return "test score (less is better)"
        return "test score" if any(run.config["problem"].get("kind") == "labkit:Regressor" for run in runs) else "test accuracy"
    return y.replace("train_", "training ", 1) if y.startswith("train_") else f"test {y}"


def balance(runs: RunRecord | Sequence[RunRecord]) -> hv.Overlay:
    """Mean T / max T of each local pass (T: seconds of one worker's pass) with the 0.95 that IDPA is held to.

    1 means that all workers take equally long, 1/m that all others do little but wait for one of m workers.

    Examples
    --------
    >>> figure = labkit.plots.balance([run])
    """
    runs = style.some_runs(runs)
    style.extension()
    runs = _as_runs(runs, lambda run: run.balance())
    lines, means, texts = {}, {}, _counted(runs)
    for label, series in _series(runs, lambda run: run.balance(), "pass", "ratio").items():
        lines[label] = _median(series)
        later = np.concatenate([ratio[at >= 2] for at, ratio in series])
        means[label] = float(later.mean()) if len(later) else float("nan")
        texts[label] += f": mean {means[label]:.2f} from pass 2 on" if len(later) else ""
    if not lines:
        return style.message("Balance of the local passes", f"{_names(runs)}: no pass that all workers have finished.")
    elements, legend = _draw(lines, texts, ("pass", "ratio"))
    best = max(means, key=lambda label: np.nan_to_num(means[label]))
    title = f"{best}: local passes balanced {'best, ' if len(lines) > 1 else ''}to {means[best]:.2f} from pass 2 on"
    title = title if np.isfinite(means[best]) else "Balance of the local passes"
    last = max(at[-1] for at, *_ in lines.values())
    return style.finish(
        [style.level(0.95), *elements], title, style.caption(runs, "dashed: 0.95", _seeds(runs)), legend, xlabel="local pass",
        ylabel="mean T / max T (1 = equal)", ylim=(0, 1.05), xticks=_ticks(1, last), xlim=(0.5, last + 0.5),
    )  # fmt: skip


# -- one run, by worker ------------------------------------------------------------------------------------------------


def segments(run: RunRecord) -> pd.DataFrame:
    """What each worker did when: columns worker, activity ("compute", "wait", "exchange"), start, end (s).

    How a worker's time is divided: `labkit.runs.analysis`.

    Examples
    --------
    >>> sorted(labkit.plots.segments(run)["worker"].unique().tolist())
    [0, 1]
    """
    table = analysis.spans(style.a_run("run", run).events)
    return table.loc[table.kind != "refill", ["worker", "activity", "start", "end"]].reset_index(drop=True)


def timeline(run: RunRecord) -> hv.Overlay:
    """One row for each worker: when it computed, waited and exchanged weights; a tick above it: its push was merged.

    Examples
    --------
    >>> figure = labkit.plots.timeline(run)
    """
    style.a_run("run", run)
    style.extension()
    spans = segments(run)
    if spans.empty:
        return style.message(f"{run.label}: what the workers did when", f"{run.name}: no worker has pushed yet.")
    spans["length"] = spans["end"] - spans["start"]
    shares = spans.pivot_table(index="worker", columns="activity", values="length", aggfunc="sum", fill_value=0.0)
    shares = shares.reindex(columns=list(BUSY), fill_value=0.0).pipe(lambda table: table.div(table.sum(axis=1), axis=0))
    waits = shares["wait"]
    title = f"{run.label}: worker {waits.idxmax()} waits {_percent(waits.max())} of the time"
    if waits.max() < 0.005:
        title = f"{run.label}: no worker waits more than 0.5 % of the time"
    texts = {activity: f"{activity} ({_percent(_share(spans, activity))})" for activity in BUSY}
    rows, elements, legend = _in_rows(spans, shares.index, texts)
    merges = run.events.query("kind == 'merge'").dropna(subset=["worker", "seconds"])
    merges = merges[merges["worker"].isin(shares.index)]
    y = merges["worker"].map(rows).to_numpy(float)
    ticks = style.ticks(merges["seconds"].to_numpy(), y + 0.34, y + 0.44)
    note, end = style.caption([run], "ticks: merges"), float(spans["end"].max())
    return _rows_of_workers(run, rows, [*elements, ticks], title, note, legend, (0, end))


def latest(run: RunRecord, rows: list[dict], window: float) -> hv.Overlay:
    """What the workers did in the last `window` seconds, from the latest events alone (`labkit.runs.events.Tail`): it can be live."""
    spans = analysis.spans(as_table(rows))
    end = float(spans["end"].max()) if len(spans) else 0.0
    since = max(0.0, end - window)
    title = f"The last {end - since:.0f} s" if len(spans) else "No worker has pushed yet"
    workers = sorted(style.slowdowns(run)) or sorted(set(spans["worker"])) or [0]
    spans = spans[spans["end"].gt(since) & spans["worker"].isin(workers)]
    spans = spans.assign(start=spans["start"].clip(lower=since))
    rows_of, elements, legend = _in_rows(spans, workers, {activity: activity for activity in BUSY})
    return _rows_of_workers(run, rows_of, elements, title, "", legend, (since, max(end, since + 1.0)))


def _in_rows(spans: pd.DataFrame, workers: Sequence[int], texts: dict[str, str]) -> tuple[dict[int, int], list, list]:
    """Where the row of each worker is, worker 0 on top; the bars in them, of each activity; and the legend."""
    rows = {worker: -i for i, worker in enumerate(workers)}
    elements, legend = [], []
    for activity, number in BUSY.items():
        part = spans[spans["activity"] == activity]
        y = part["worker"].map(rows).to_numpy(float)
        table = (part["start"].to_numpy(float), y - 0.3, part["end"].to_numpy(float), y + 0.3)
        elements.append(style.boxes(table, number, texts[activity], ("start (s)", "bottom", "end (s)", "top")))
        legend.append((texts[activity], number, "box"))
    return rows, elements, legend


def _rows_of_workers(
    run: RunRecord, rows: dict[int, int], elements: list, title: str, note: str, legend: list, xlim: tuple[float, float]
) -> hv.Overlay:
    slow = style.slowdowns(run)
    names = [(y, f"worker {worker}" + (f" ({slow[worker]:g}x)" if slow.get(worker, 1) != 1 else "")) for worker, y in rows.items()]
    return style.finish(
        elements, title, note, legend, xlabel="time (s)", ylabel="",
        yticks=names if len(names) <= 24 else names[::8], ylim=(-len(rows) + 0.5, 0.5), xlim=xlim,
        grid="x", height=float(np.clip(1.6 + 0.7 * len(rows), 3.4, 8)),
    )  # fmt: skip


def staleness(runs: RunRecord | Sequence[RunRecord]) -> hv.Overlay:
    """How stale the merges were, in versions: a histogram by worker for one run, by setting for several.

    Examples
    --------
    >>> figure = labkit.plots.staleness([run])
    """
    runs = style.some_runs(runs)
    style.extension()
    runs = _as_runs(runs, lambda run: run.events)
    merges = [effective(run.events).query("kind == 'merge'").dropna(subset=["staleness"]) for run in runs]
    values = np.concatenate([table["staleness"].to_numpy(float) for table in merges])
    if not len(values):
        return style.message("Staleness of the merges", f"{_names(runs)}: nothing merged yet.")
    if len(runs) == 1 and merges[0]["worker"].nunique() <= len(style.COLOURS):
        groups = {f"worker {int(worker)}": own["staleness"] for worker, own in merges[0].groupby("worker")}
    else:
        groups = {
            label: np.concatenate([merges[runs.index(run)]["staleness"] for run in group]) for label, group in by_line(runs).items()
        }
    width = int(values.max()) // 25 + 1  # versions in a bar
    edges = np.arange(0, values.max() + width + 1, width)
    heights = {label: np.histogram(own, edges)[0] for label, own in groups.items()}
    if len(runs) > 1:  # the title is about the stalest
        most = max(groups, key=lambda label: np.mean(groups[label]) if len(groups[label]) else -1.0)
        values, subject = groups[most], most + (" is stalest" if len(groups) > 1 else "")
    else:
        subject = runs[0].label
    middle, high = np.percentile(values, [50, 95])
    title = f"{subject}: median staleness {middle:.0f}, 95 % of the merges at most {high:.0f}"
    names = [f"{int(edge)}" if width == 1 else f"{int(edge)}-{int(edge) + width - 1}" for edge in edges[:-1]]
    return style.columns(heights, names, title, style.caption(runs), xlabel="staleness (versions)", ylabel="merges")


def weights(run: RunRecord) -> hv.Overlay:
    """Each worker's share of the coefficients with which its pushes were merged, beside its share of the samples.

    Examples
    --------
    >>> figure = labkit.plots.weights(run)
    """
    style.a_run("run", run)
    style.extension()
    events = effective(run.events)
    merges = events.query("kind == 'merge'").dropna(subset=["worker", "coefficient"])
    given = merges["coefficient"].abs().groupby(merges["worker"]).sum()
    if merges.empty or not given.sum():
        return style.message(f"{run.label}: effective weight", f"{run.name}: nothing merged yet.")
    pushes = events.query("kind == 'push'")
    trained = pushes.groupby("worker")["samples"].sum().reindex(given.index, fill_value=0)
    given, trained = given / given.sum(), trained / max(trained.sum(), 1)
    worker = (given - trained).abs().idxmax()
    title = (
        f"{run.label}: worker {int(worker)} trains on {_percent(trained[worker])} of the samples, weighs {_percent(given[worker])}"
    )
    heights = {"share of the samples": 100 * trained.to_numpy(), "effective weight": 100 * given.to_numpy()}
    names = [f"worker {int(index)}" for index in given.index]
    return style.columns(heights, names, title, style.caption([run]), ylabel="share (%)", text="{:.0f}")


def speed(frame: pd.DataFrame) -> hv.Overlay:
    """Measured samples/s of each worker; `frame` has the columns worker, samples_per_s and slowdown.

    Examples
    --------
    >>> import pandas as pd
    >>> figure = labkit.plots.speed(pd.DataFrame({"worker": [0, 1], "samples_per_s": [900.0, 230.0], "slowdown": [1, 4]}))
    """
    style.extension()
    style.check_columns(frame, ["worker", "samples_per_s", "slowdown"])
    if frame.empty:
        return style.message("Speed of the workers", "no worker was measured.")
    rates = frame["samples_per_s"].to_numpy(float)
    fast, slow = frame["worker"].iloc[rates.argmax()], frame["worker"].iloc[rates.argmin()]
    title = "One worker's speed"
    if len(frame) > 1:
        title = f"Worker {fast} is {rates.max() / max(rates.min(), 1e-12):.1f} times as fast as worker {slow}"
    note = style.emulated(frame["slowdown"].to_list()) if (frame["slowdown"] != 1).any() else ""
    names = [f"worker {worker}" for worker in frame["worker"]]
    return style.columns({"measured": rates}, names, title, note, ylabel="speed (samples/s)", text="{:.0f}")


# -- texts and numbers -------------------------------------------------------------------------------------------------


def _as_runs(runs: list[RunRecord], read: Callable[[RunRecord], pd.DataFrame]) -> list[RunRecord]:
    """Those of which `read` can be read; one of several that is damaged is left out, which is printed."""
    if not runs:
        raise ValueError("there is no run to draw: pass a run, or a list of at least one.")
    found, refused = [], []
    for run in runs:
        try:
            read(run)
            found.append(run)
        except RunError as error:
            if "is still running" in str(error):
                raise
            refused.append(error)
    if not found:
        raise refused[0]
    for error in refused:
        print(f"Left out of the figure: {error}")
    return found


def _counted(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Each label with ", 3 seeds" for a line of three runs; without where each line is one run, as the caption then states."""
    texts, settings = {}, by_line(runs)
    for label, group in settings.items():
        n, seeds = len(group), len({run.config.seed for run in group})
        count = f", {n} {'seed' if seeds == n else 'run'}{'s' if n > 1 else ''}"
        texts[label] = label + (count if any(len(group) > 1 for group in settings.values()) else "")
    return texts


def _series(runs: Sequence[RunRecord], read: Callable[[RunRecord], pd.DataFrame], x: str, y: str) -> dict[str, list[Series]]:
    """Column `y` against `x` of the table that `read` gives of each run, by label; a label without a point is left out."""
    series = {}
    for label, group in by_line(runs).items():
        tables = [read(run).dropna(subset=[x, y]).sort_values(x) for run in group]
        series[label] = [(table[x].to_numpy(float), table[y].to_numpy(float)) for table in tables if len(table)]
    return {label: found for label, found in series.items() if found}


def _draw(lines: dict[str, tuple], texts: dict[str, str], dims: tuple[str, str]) -> tuple[list, list]:
    """A line for each label of `texts` that has one (see `_median`), with a band where its runs differ; and the legend.

    Its colour goes by the order of the runs, whether the others have a line or not.
    """
    elements, legend = [], []
    for number, label in enumerate(texts):
        if label not in lines:
            continue
        at, middle, low, high = lines[label]
        band = (low, high) if np.any(high > low) else None
        elements.append(style.line(at, middle, number, texts[label], dims, band))
        legend.append((texts[label], number, "line"))
    return elements, legend


def _seeds(runs: Sequence[RunRecord]) -> str:
    together = any(len(group) > 1 for group in by_line(runs).values())
    return "line: median, band: lowest to highest" if together else "1 seed"


def _median(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, median, lowest and highest y of several polylines; after its last point a run stays at its last value."""
    at = np.unique(np.concatenate([x for x, _ in series]))
    every = np.stack([np.interp(at, x, y) for x, y in series])
    return at, np.median(every, axis=0), every.min(axis=0), every.max(axis=0)


def _names(runs: Sequence[RunRecord]) -> str:
    return ", ".join(run.name for run in runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _amount(value: float, x: str) -> str:
    return f"{value:,.0f} samples" if x == "samples" else f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} s"


def _share(spans: pd.DataFrame, activity: str) -> float:
    return float(spans.loc[spans["activity"] == activity, "length"].sum() / spans["length"].sum())


def _ticks(first: int, last: float) -> list[tuple[int, str]]:
    step = int(last - first) // 12 + 1
    return [(n, str(n)) for n in range(first, int(last) + 1, step)]
