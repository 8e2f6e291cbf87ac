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
from labkit.plots import claims, style
from labkit.runs import analysis
from labkit.runs.analysis import crossing
from labkit.runs.events import as_table
from labkit.runs.labels import lines as by_line

if TYPE_CHECKING:
    from pathlib import Path

    import holoviews as hv
    import pandas as pd

    from labkit.runs.record import RunRecord

AXES = {"seconds": "time (s)", "samples": "samples trained on, all workers"}
BUSY = {"compute": 0, "wait": 4, "exchange": 6}  # what time goes into, and its colour: far apart in lightness
SQUEEZED = 1 / 3  # of the height of an axis: what is drawn in less is squeezed


# -- over time ---------------------------------------------------------------------------------------------------------


def curves(
    runs: RunRecord | str | Path | Sequence[RunRecord | str | Path],
    x: str = "seconds",
    target: float | None = None,
    y: str = "score",
) -> hv.Overlay:
    """Test accuracy, or another column `y` of the curves, against `x`, "seconds" or "samples" (of all workers together); one line
    for each setting.

    `y` is "loss", a metric of the problem, or, with "train_" before it, what the steps of training returned: "train_loss".

    A line is labelled by its strategy and by what differs among the runs, such as "AGWU + IDPA, lr 0.01"; where nothing differs, by
    the directory. Runs that differ in their seed alone share a line: of three or more the median, with a band from the lowest to the highest,
    of two the mean between them. A `target` (of a score in (0, 1], but where lower is better) is drawn as a level, and the legend has where
    each line crosses it, straight between points, from whichever side it comes; which is first is said of three seeds each whose crossings do not
    overlap. RunError while a run is running: it has no curve yet.

    The axis holds the first point of every line, unless that squeezes the others into less than a third of it; the caption says so then.

    One run is drawn in a line of your own by `run.curve().hvplot.line("seconds", "score")`, several by
    `pandas.concat({run.name: run.curve() for run in runs}, names=["run"]).hvplot.line("seconds", "score", by="run")`.

    Examples
    --------
    >>> figure = labkit.plots.curves([run, labkit.simulate(run, n_workers=8)], target=0.5)
    >>> labkit.plots.save(figure, "curves.png").name
    'curves.png'
    """
    if hasattr(x, "events"):
        raise TypeError("curves() got a run as x. Give several runs as a list: curves([a, b]).")
    x, y = known("x", x, AXES), text("y", y)
    runs = style.some_runs(runs)
    lower = any(run.config.lower_is_better for run in runs)  # of scores
    share = y == "score" and not lower
    target = None if target is None else real("target", target, **({"above": 0, "most": 1} if share else {}))
    tables = _tables(runs, lambda run: _curve(run, y))
    runs = list(tables)
    known("y", y, dict.fromkeys(column for table in tables.values() for column in table if column not in (*AXES, "version")))
    tables = {run: table if y in table else table.assign(**{y: np.nan}) for run, table in tables.items()}
    what, goal = _meaning(runs, y), "" if target is None else _percent(target) if share else f"{y} {target:g}"
    title = f"{what[0].upper()}{what[1:]} against {'time' if x == 'seconds' else 'samples'}"
    found = _series(tables, x, y)
    if not found:
        why = "no version was retained, so there is nothing to evaluate."
        if any(map(len, tables.values())):
            why = f"{y} is NaN in every row of the curve."
        elif all(run.config.without_weights for run in runs):
            why = "simulated without numerics, which makes times alone; labkit.simulate(..., numerics=True) trains, too."
        return style.message(title, f"{style.names(runs)}: {why}")
    lines, texts = {label: _median(own, x, y) for label, own in found.items()}, _counted(runs)
    if target is not None:
        reached, each = {}, {}
        for label, line in lines.items():
            sign = -1 if (lower if y == "score" else line[y].iloc[0] > target) else 1
            own = [crossing(table[x].to_numpy(), sign * table[y].to_numpy(), sign * target) for table in (line, *found[label])]
            reached[label], each[label] = own[0], np.nan_to_num(own[1:], nan=np.inf)
            texts[label] += f": {goal} {f'at {_amount(own[0], x, each[label])}' if np.isfinite(own[0]) else 'not reached'}"
        title = _who_reaches(goal, reached, each, x, what if share else "")
    elements = _draw(found, lines, texts, x, y)
    gaps = sum(int(table[y].isna().iloc[int(y.startswith("train_")) :].sum()) for table in tables.values())
    goals = [] if target is None else [target]
    seen = _in_sight(list(lines.values()), goals)
    bottom, top = max(0.0, np.floor(20 * seen.min() - 0.1) / 20) if share else seen.min(), seen.max()
    room = 0.05 * (top - bottom) or 0.05 * abs(top) or 0.05
    ylim = (bottom, top + room + 0.005) if share else (bottom - room, top + room)
    firsts = sorted(line[y].iloc[0] for line in lines.values())
    outside = [f"{first:.3g}" for first in firsts if not ylim[0] <= first <= ylim[1]]
    cut = f"axis cut: lines begin at {claims.between(outside)}" if outside else ""
    note = style.caption(runs, _seeds(runs), f"{gaps} NaN not drawn" if gaps else "", cut)
    xlim = (0, 1.03 * max(line[x].max() for line in lines.values()) or None)
    return style.finish([*map(style.level, goals), *elements], title, note, xlabel=AXES[x], ylabel=what, xlim=xlim, ylim=ylim)


def _in_sight(lines: Sequence[pd.DataFrame], goals: Sequence[float]) -> np.ndarray:
    """The values that set the limits of the axis: all, unless the first points, of weights untrained or barely trained, squeeze the rest."""
    later = np.concatenate([goals, *(line.iloc[int(len(line) > 1) :][["low", "high"]].to_numpy().ravel() for line in lines)])
    every = np.concatenate([later, *(line.iloc[0][["low", "high"]].to_numpy() for line in lines)])
    return later if 0 < np.ptp(later) < SQUEEZED * np.ptp(every) else every


def _who_reaches(goal: str, reached: dict[str, float], each: dict[str, np.ndarray], x: str, what: str) -> str:
    """The title of curves with a target: who reaches it, and who first where seeds do not overlap."""
    there = sorted((label for label in reached if np.isfinite(reached[label])), key=reached.__getitem__)
    if not there:
        who = "No run reaches" if len(reached) > 1 else f"{next(iter(reached))} does not reach"
        return f"{who} {goal} {what}".rstrip()
    first, last = there[0], there[-1]
    at = {label: _amount(reached[label], x, each[label]) for label in (first, last)}
    if claims.stands_out(each, least=True) == first:
        return f"{first} reaches {goal} {'first, ' if len(reached) > 1 else ''}after {at[first]}"
    if len(there) == 1:
        return f"Only {first} reaches {goal}, after {at[first]}"
    return (
        f"{goal} is reached after {at[first]} ({first}) to {at[last]} ({last}){', not by all' if len(there) < len(reached) else ''}"
    )


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


def balance(runs: RunRecord | str | Path | Sequence[RunRecord | str | Path]) -> hv.Overlay:
    """Mean T / max T of each local pass (T: seconds of one worker's pass) with the 0.95 that IDPA is held to: `Run.balance`.

    1 means that all workers take equally long, 1/m that all others do little but wait for one of m workers.

    Examples
    --------
    >>> figure = labkit.plots.balance([run])
    """
    tables = _tables(style.some_runs(runs), lambda run: run.balance())
    runs = list(tables)
    found, texts = _series(tables, "pass", "ratio"), _counted(runs)
    if not found:
        return style.message("Balance of the local passes", f"{style.names(runs)}: no pass that all workers have finished.")
    later = {label: [table.ratio[table["pass"] >= 2].mean() for table in own] for label, own in found.items()}
    means = {label: float(np.nanmean(own)) for label, own in later.items() if np.isfinite(own).any()}
    texts |= {label: f"{texts[label]}: mean {mean:.2f} from pass 2 on" for label, mean in means.items()}
    title, best = "Balance of the local passes", claims.stands_out(later)
    if best in means:
        title = f"{best}: local passes balanced {'best, ' if len(found) > 1 else ''}to {means[best]:.2f} from pass 2 on"
    elif means:
        title = f"Local passes are balanced to {claims.between([f'{mean:.2f}' for mean in sorted(means.values())])} from pass 2 on"
    elements = _draw(found, {label: _median(own, "pass", "ratio") for label, own in found.items()}, texts, "pass", "ratio")
    last = max(table["pass"].max() for own in found.values() for table in own)
    return style.finish(
        [style.level(0.95), *elements], title, style.caption(runs, "dashed: 0.95", _seeds(runs)), xlabel="local pass",
        ylabel="mean T / max T (1 = equal)", ylim=(0, 1.05), xticks=style.whole_ticks(int(last)), xlim=(0.5, last + 0.5),
    )  # fmt: skip


# -- one run, by worker ------------------------------------------------------------------------------------------------


def timeline(run: RunRecord | str | Path) -> hv.Overlay:
    """One row for each worker: when it computed, waited and exchanged weights (`Run.timeline`); a tick above it: its push was merged.

    Examples
    --------
    >>> figure = labkit.plots.timeline(run)
    """
    run = style.a_run("run", run)
    style.extension()
    table = run.timeline()
    if table.empty:
        return style.message(f"{run.label}: what the workers did when", f"{run.name}: no worker has pushed yet.")
    table["length"] = table["end"] - table["start"]
    spent = table.pivot_table(index="worker", columns="activity", values="length", aggfunc="sum", fill_value=0.0)
    spent = spent.reindex(columns=list(BUSY), fill_value=0.0)
    waits, shares = spent["wait"] / spent.sum(axis=1), spent.sum() / spent.to_numpy().sum()
    title = f"{run.label}: worker {waits.idxmax()} waits {_percent(waits.max())} of its time"
    if waits.max() < 0.005:
        title = f"{run.label}: no worker waits more than 0.5 % of its time"
    rows = style.worker_rows(spent.index, run)
    kinds = {activity: (f"{activity} ({_percent(shares[activity])})", number) for activity, number in BUSY.items()}
    merges = run.staleness().query("worker in @rows").dropna(subset=["seconds"])
    elements = [*style.spans(table, "activity", kinds, rows), style.row_ticks(merges, "seconds", rows, (0.34, 0.44))]
    note, xlim = style.caption([run], "ticks: merges; in brackets: of all workers' time"), (0, float(table["end"].max()))
    return style.finish(elements, title, note, xlabel="time (s)", xlim=xlim, **style.rows_axis(rows))


def latest(run: RunRecord, rows: list[dict], window: float, status: dict | None = None) -> hv.Overlay:
    """What the workers did in the last `window` seconds, from the latest events alone (`labkit.runs.events.Tail`) and, of the run, the status
    that its server has sent: it can be live."""
    spans = analysis.spans(as_table(rows))
    end = float(spans["end"].max()) if len(spans) else 0.0
    since = max(0.0, end - window)
    title = f"The last {end - since:.0f} s" if len(spans) else "No worker has pushed yet"
    of_workers = style.worker_rows(style.slowdowns(run) or set(spans["worker"]) or [0], run, status)
    spans = spans[spans["end"].gt(since) & spans["worker"].isin(list(of_workers))]
    spans = spans.assign(start=spans["start"].clip(lower=since))
    elements = style.spans(spans, "activity", {activity: (activity, number) for activity, number in BUSY.items()}, of_workers)
    xlim = (since, max(end, since + 1.0))
    return style.finish(elements, title, xlabel="time (s)", xlim=xlim, **style.rows_axis(of_workers))


def staleness(runs: RunRecord | str | Path | Sequence[RunRecord | str | Path]) -> hv.Overlay:
    """How stale the merges were, in versions (`Run.staleness`): a histogram by worker for one run, and by setting for several, as shares of
    their merges, since one run may have many more than another.

    Examples
    --------
    >>> figure = labkit.plots.staleness([run])
    """
    import pandas as pd

    merges = _tables(style.some_runs(runs), lambda run: run.staleness())
    runs = list(merges)
    if not sum(map(len, merges.values())):
        return style.message("Staleness of the merges", f"{style.names(runs)}: nothing merged yet.")
    alone, groups = len(runs) == 1, {label: [merges[run]["staleness"] for run in group] for label, group in by_line(runs).items()}
    values = {label: np.concatenate(own) for label, own in groups.items()}
    stalest = claims.stands_out({label: [own.mean() for own in each] for label, each in groups.items()})
    told = [own for own in values.values() if len(own)] if stalest is None else [values[stalest]]
    medians, most = (sorted(analysis.quantile(own, share) for own in told) for share in (0.5, 0.95))
    title = f"{runs[0].label}: " if alone else f"{stalest} is stalest: " if stalest and len(groups) > 1 else ""
    title += (
        f"median staleness {claims.between([f'{median:.0f}' for median in medians])}, 95 % of the merges at most {most[-1]:.0f}"
    )
    if alone and merges[runs[0]]["worker"].nunique() <= len(style.COLOURS):
        values = {f"worker {worker}": own["staleness"] for worker, own in merges[runs[0]].groupby("worker")}
    highest = int(max(own.max() for own in values.values() if len(own)))
    width = highest // 25 + 1  # versions in a bar
    edges = np.arange(0, highest + width + 1, width)
    names = [f"{int(edge)}" if width == 1 else f"{int(edge)}-{int(edge) + width - 1}" for edge in edges[:-1]]
    bars, ylabel = pd.DataFrame({label: np.histogram(own, edges)[0] for label, own in values.items()}, index=names), "merges"
    if not alone:
        bars, ylabel = 100 * bars / bars.sum().clip(lower=1), "share of the merges (%)"
    title = title[0].upper() + title[1:]
    return style.columns(bars, title, style.caption(runs), xlabel="staleness (versions)", ylabel=ylabel)


def weights(run: RunRecord | str | Path) -> hv.Overlay:
    """Each worker's share of the coefficients with which its pushes were merged, beside its share of the samples: `Run.contributions`.

    Examples
    --------
    >>> figure = labkit.plots.weights(run)
    """
    run = style.a_run("run", run)
    style.extension()
    table = run.contributions()
    if table.empty:
        return style.message(f"{run.label}: effective weight", f"{run.name}: nothing merged yet.")
    most = table.loc[(table["weight"] - table["samples"]).abs().idxmax()]
    shares = f"trains on {_percent(most['samples'])} of the samples, weighs {_percent(most['weight'])}"
    bars = 100 * table.set_index("worker")[["samples", "weight"]].rename("worker {}".format)
    bars.columns = ["share of the samples", "effective weight"]
    title = f"{run.label}: worker {int(most['worker'])} {shares}"
    return style.columns(bars, title, style.caption([run]), ylabel="share (%)", text="{:.0f}")


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
    bars = frame.set_index("worker")[["samples_per_s"]].rename("worker {}".format)
    return style.columns(bars, title, note, ylabel="speed (samples/s)", text="{:.0f}")


# -- texts and numbers -------------------------------------------------------------------------------------------------


def _tables(runs: list[RunRecord], read: Callable[[RunRecord], pd.DataFrame]) -> dict[RunRecord, pd.DataFrame]:
    """The table of each run; one of several that is damaged is left out, which is printed."""
    if not runs:
        raise ValueError("there is no run to draw: pass a run, or a list of at least one.")
    style.extension()
    found, refused = {}, []
    for run in runs:
        try:
            found[run] = read(run)
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


def _series(tables: dict[RunRecord, pd.DataFrame], x: str, y: str) -> dict[str, list[pd.DataFrame]]:
    """Columns `x` and `y` of the table of each run, by label; a label without a point is left out."""
    found = {run: table[[x, y]].astype(float).dropna().sort_values(x) for run, table in tables.items()}
    groups = {label: [found[run] for run in group if len(found[run])] for label, group in by_line(list(tables)).items()}
    return {label: group for label, group in groups.items() if group}


def _draw(found: dict[str, list[pd.DataFrame]], lines: dict[str, pd.DataFrame], texts: dict[str, str], x: str, y: str) -> list:
    """A line for each label of `texts` that has one, with a band where at least three runs differ, and each of two runs thin.

    Its colour goes by the order of the runs, whether the others have a line or not.
    """
    import pandas as pd

    numbers = {text: number for number, text in enumerate(texts.values())}
    table = pd.concat([line.assign(label=texts[label]) for label, line in lines.items()], ignore_index=True)
    pairs = {label: tables for label, tables in found.items() if len(tables) == 2}
    thin = [
        style.strokes([table.to_numpy() for table in tables], "", (x, y), 0, 1, color=style.of_number(style.COLOURS, n), alpha=0.6)
        for label, tables in pairs.items()
        for n in [numbers[texts[label]]]
    ]
    table.loc[table["label"].isin([texts[label] for label in pairs]), "high"] = np.nan
    return thin + style.lines(table, x, y, "label", numbers, ("low", "high"))


def _seeds(runs: Sequence[RunRecord]) -> str:
    counts = [len(group) for group in by_line(runs).values()]
    if max(counts) == 1:
        return "1 seed" if len(counts) == 1 else "1 seed each: what differs may be chance"
    bands = ["line: median, band: lowest to highest"] if max(counts) > 2 else []
    return "; ".join([*bands, *(["of two seeds the mean, thin: each"] if 2 in counts else [])])


def _median(tables: Sequence[pd.DataFrame], x: str, y: str) -> pd.DataFrame:
    """x, and as y the median, low and high of several polylines; after its last point a run stays at its last value."""
    import pandas as pd

    at = np.unique(np.concatenate([table[x] for table in tables]))
    every = np.stack([np.interp(at, table[x], table[y]) for table in tables])
    return pd.DataFrame({x: at, y: np.median(every, axis=0), "low": every.min(axis=0), "high": every.max(axis=0)})


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def _amount(value: float, x: str, each: Sequence[float]) -> str:
    return f"{claims.amount(value, each)} {'samples' if x == 'samples' else 's'}"
