"""Figures of a search: where its trials stand, the best score over them, all points as lines through their parameters, what matters, which
trials are on the front of two objectives, who trained what when; and, while it goes, all but the front under each other.

They read what a search says of itself: `table()`, `timeline()`, `importance()`, `front()`, `objectives` and its settings.

Used through `labkit.plots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from labkit.errors import RunError, known, like, real, several
from labkit.plots import claims, style
from labkit.plots.live import moving

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

SEARCH = "a search, as labkit.search gives it"
AXES = {"trials": "trials that have ended", "seconds": "time of the search (s)"}
STATES = {"done": 0, "pruned": 4, "failed": 1, "running": 6}  # and the colour of each
BEST = 0.2  # of the trials are drawn as the best ones,
MOST = 40  # at most
POINTS, LINES = 400, 150  # marks or runs, and lines of other trials in a figure: more hide each other, and make a page slow
MARKS = {"done": ("a trial", 3), "pruned": ("a pruned trial", 4)}  # trials that are marks, and the colour of each
# Below and above an axis of parallel coordinates, and where a trial without this parameter passes.
LOW, HIGH, ABSENT = -0.09, 1.09, -0.24
LIVE_SIZE = {"height": 2.8, "shape": {"aspect": 2.8}}  # of a figure that moves
ROWS, LEADING = 12, 3  # of the table of a search, and the best ones of them
WIDE = 100  # characters of a row
BARS = 15  # of importance
ROUGH = 30  # trials, of which a tenth is too few to tell from
GROWTH = 1.1  # so many times the trials, and the importance is computed again while a search goes


def search_table(found: Any) -> hv.Overlay:
    """Where a search stands: its three best trials (of several objectives three on the front), those under way, and the latest of the others, a row each.

    Examples
    --------
    >>> figure = labkit.plots.search_table(found)
    """
    found, seen = _opened(found)
    if seen.table.empty:
        return style.message("Where the search stands", f"{found.name}: no trial has begun yet.")
    return _table(found, seen)


def search_history(searches: Any, x: str = "trials") -> hv.Overlay:
    """The best score so far against `x`, "trials" or "seconds", one line a method, with the trials of a single search as marks.

    Searches of one method and other seeds share a line: the median, with a band from the lowest to the highest of three or more. A trial that
    ended early is a mark of its own at the score that it had reached, and never the best one. Of more than 400 trials some are drawn. Which
    method found the best is said of three seeds each whose ranges do not overlap. The numbers of a search: `Search.history`.

    Examples
    --------
    >>> figure = labkit.plots.search_history(found)
    """
    import pandas as pd

    x = known("x", x, AXES)
    one = not isinstance(searches, Iterable)
    searches = [_a_search("searches", searches)] if one else several("searches", searches, _a_search)
    style.extension()
    lower = any(found.lower_is_better for found in searches)
    what = " or ".join(dict.fromkeys(score_name(found) for found in searches))
    tables, groups = [history(found) for found in searches], {}
    for found, table in zip(searches, tables, strict=True):
        if len(best := table.dropna(subset=["best"])):
            groups.setdefault(found.config["method"], []).append(best.groupby(x)["best"].last())
    if not groups:
        return style.message("The best score so far", f"{style.names(searches)}: no trial has a score yet.")
    lines, last = [], {}
    for method, series in groups.items():
        steps = pd.concat(series, axis=1).sort_index().ffill().dropna()
        steps = steps[steps.index <= max(steps.index[0], min(own.index[-1] for own in series))]
        last[method] = steps.iloc[-1].to_numpy()
        text = f"{method}: {np.median(last[method]):.4g} in the end"
        line = pd.DataFrame({what: steps.median(axis=1), "low": steps.min(axis=1), "high": steps.max(axis=1), "method": text})
        lines.append(line.rename_axis(x).reset_index())
        if len(series) < claims.SEEDS:
            lines[-1][["low", "high"]] = np.nan
    elements = style.lines(pd.concat(lines, ignore_index=True), x, what, "method", None, ("low", "high"), steps=True)
    if len(searches) == 1:
        for label, number, drawn, n in _trial_marks(tables[0]):
            label += f" ({len(drawn)} of {n:,} drawn)" * (len(drawn) < n)
            drawn = drawn.assign(label=label).rename(columns={"score": what})
            elements += style.points(drawn, x, what, "label", {label: number}, small=n > 100)
    ends = sorted((float(np.median(own)) for own in last.values()), reverse=not lower)
    winner = claims.stands_out(last, least=lower)
    title = f"{winner} finds {what} {ends[0]:.4g}" + f", the {'lowest' if lower else 'highest'} of {len(last)}" * (len(last) > 1)
    if winner is None:
        title = f"{len(last)} methods find {what} {claims.between([f'{end:.4g}' for end in sorted(ends)])}"
    counts = {len(series) for series in groups.values()}
    note = f"{min(counts)} search{'es' * (min(counts) > 1)} a method"
    note += ", range of the seeds as a band" if max(counts) >= claims.SEEDS else ": what differs may be chance"
    note = note if len(searches) > 1 else _better(lower, what)
    alone = f"by {what} alone" if any(len(_objectives(found)) > 1 for found in searches) else ""
    n_ended = max(map(len, tables))
    ticks = {"xticks": style.whole_ticks(n_ended), "xlim": (0, 1.02 * n_ended)} if x == "trials" else {"xlim": (0, None)}
    return style.finish(
        elements, title, "; ".join(filter(None, [alone, note])), xlabel=AXES[x],
        ylabel=what if len(searches) == 1 else f"best {what} so far", **ticks,
    )  # fmt: skip


def search_points(found: Any) -> hv.Overlay:
    """Parallel coordinates: each trial with a score a line through its parameters, the best fifth (of several objectives the front) in
    colour, the best of all thick.

    At most the 40 best and 150 of the others are drawn. A trial without a parameter, which other choices bring, passes below its axis.

    Examples
    --------
    >>> figure = labkit.plots.search_points(found)
    """
    found, seen = _opened(found)
    if len(history(found, seen)) < 2:
        return style.message("Which points are good", f"{found.name}: it needs two trials with a score.")
    return _points(found, seen)


def search_importance(found: Any) -> hv.Overlay:
    """How much each parameter decides whether a trial is among the best tenth (PED-ANOVA), as bars; they sum to 1. Of several objectives
    those are the trials on and next to the front.

    Examples
    --------
    >>> figure = labkit.plots.search_importance(found)
    """
    found, seen = _opened(found)
    try:
        shares = found.importance()
    except RunError as error:
        return style.message("What matters", str(error))
    return _importance(found, seen._replace(importance=shares, counted=_n_scored(seen.table)))


def search_front(found: Any, x: str | None = None, y: str | None = None) -> hv.Overlay:
    """Two objectives against each other, each trial a mark; those that no other one is better than in all of them are a line
    (or marks, where there are more than two objectives).

    `x` and `y` are names of objectives, by default the second and the first. Trials that break a constraint are marked as such.

    Examples
    --------
    >>> two = labkit.search(problem, {"lr": (0.01, 0.5, "log")}, lab, trials=2, passes=1, objective=["score", "time"], name="two")
    >>> figure = labkit.plots.search_front(two)
    """
    found, seen = _opened(like("found", found, ("front", "objectives"), SEARCH))
    names = list(found.objectives)
    if len(names) < 2:
        raise ValueError(
            f"search {found.name} has one objective, {names[0]}. Give labkit.search several: objective=['score', 'time']."
        )
    x, y = (known(axis, given, names) for axis, given in (("x", x or names[1]), ("y", y or names[0])))
    table = seen.table
    front = table[table.trial.isin(seen.front)]
    if front.empty:
        return style.message(f"{y} against {x}", f"{found.name}: no trial is done that keeps the constraints.")
    at, height = ("score" if name == names[0] else name for name in (x, y))
    front = front.sort_values(at)
    rest = table[(table.state == "done") & ~table.trial.isin(front.trial)]
    broken = (~rest.feasible.astype(bool)).to_numpy() if "feasible" in rest else np.zeros(len(rest), bool)
    is_curve = len(names) == 2  # of more objectives a trial may be on the front by one that is not drawn
    labelled = front.assign(label=f"front ({len(front)} trials)")
    elements = (style.lines if is_curve else style.points)(labelled, at, height, "label")
    labelled = rest.assign(label=np.where(broken, f"breaks a constraint ({sum(broken)})", f"another trial ({sum(~broken)})"))
    others = labelled.sort_values("label", kind="stable")
    elements += style.points(others, at, height, "label", {text: 5 if text[0] == "a" else 1 for text in others["label"]})
    said = {name: name for name in names} | {names[0]: score_name(found)}
    title = f"{len(front)} of {len(front) + len(rest)} trials are worth a choice: {said[y]} from {_ends_of(front[height])}, {said[x]} from {_ends_of(front[at])}"
    third = [] if is_curve else [f"the front is also of {', '.join(name for name in names if name not in (x, y))}, not drawn"]
    limits = [f"{name} {_said(bounds)}" for name, bounds in (found.config.get("constraints") or {}).items()]
    units = said | {"time": "time of a run (s)", "size": "parameters of the network"}
    return style.finish(elements, title, "; ".join(third + limits), xlabel=units[x], ylabel=units[y])


def search_timeline(found: Any) -> hv.Overlay:
    """One row for each worker: which trials it trained when, by how they ended.

    Examples
    --------
    >>> figure = labkit.plots.search_timeline(found)
    """
    found, seen = _opened(found)
    if seen.timeline.empty:
        return style.message("Who trained what when", f"{found.name}: no trial has begun yet.")
    return _timeline(found, seen)


def search_live(found: Any, timeout: float = 86400) -> hv.Layout:
    """The table, the best score so far, parallel coordinates, the importance and the trials of each worker, redrawn until the search ends or
    `timeout` seconds have passed.

    As `labkit.plots.live` of a run: begin the search with `wait=False`, and leave the kernel free in the next cell,
    `await asyncio.to_thread(found.wait)`. In static mode this waits for the end. Of a long search the timeline shows the latest runs, and
    the importance is computed when a tenth more trials have ended.

    Examples
    --------
    >>> figure = labkit.plots.search_live(found)
    """
    found = like("found", _a_search("found", found), ("state",), SEARCH)
    watch = _Watch(found)
    return moving(found, watch, LIVE, watch.look(), real("timeout", timeout, least=0, finite=False), space=0.7, height=20)


class _Seen(NamedTuple):
    """What is known of a search now."""

    table: pd.DataFrame
    timeline: pd.DataFrame
    front: set[int] | None  # of several objectives the numbers of the trials on it
    importance: pd.Series | None = None
    counted: int = 0  # of so many trials with a score
    reason: str = ""  # why there is none
    trouble: str = ""


def _look(found: Any) -> _Seen:
    """All but the importance, which takes long."""
    return _Seen(found.table(), found.timeline(), set(found.front().trial) if len(_objectives(found)) > 1 else None)


class _Watch:
    """Reads a search; `at` is how many runs have begun and ended, and trials been told of."""

    def __init__(self, found: Any) -> None:
        self.found, self.at = found, None
        self.known: tuple[Any, int, str] = None, 0, "no trial has a score yet"  # importance, counted and reason of `_Seen`

    def look(self) -> _Seen:
        ended, seen = self.found.state != "running", _look(self.found)
        self.at = len(seen.timeline), seen.timeline.end.notna().sum(), (seen.table.state != "running").sum()
        n_scored = _n_scored(seen.table)
        if n_scored >= GROWTH * self.known[1] + 1 or (ended and n_scored > self.known[1]):
            try:
                self.known = self.found.importance(), n_scored, ""
            except RunError as error:
                self.known = None, n_scored, str(error)
        return _Seen(*seen[:3], *self.known)


def _live_history(found: Any, seen: _Seen) -> hv.Overlay:
    table, what = history(found, seen), score_name(found)
    best = table.dropna(subset=["best"])
    title = f"{found.name}: waiting for a {what}"
    if len(best):
        title = (
            f"{found.name}: best {_by(found)}{what} {best['best'].iloc[-1]:.4g} after {len(table)} trial{'s' * (len(table) > 1)}"
        )
    dims = ("time (s)", what)
    elements = [style.line(best.seconds.to_numpy(float), best.best.to_numpy(float), 0, "best so far", dims, steps=True)]
    for label, number, drawn, _ in _trial_marks(table):
        x, y = drawn.seconds.to_numpy(float), drawn.score.to_numpy(float)
        elements.append(style.marks(x, y, number, label, dims, small=True))
    return style.finish(
        elements, title, _better(found.lower_is_better, what), xlabel=AXES["seconds"], ylabel=what, xlim=(0, None),
        **LIVE_SIZE,
    )  # fmt: skip


def _table(found: Any, seen: _Seen, moves: bool = False) -> hv.Overlay:
    """The rows that `_rows` picks, as text in columns."""
    table = seen.table
    counts = table.state.value_counts()
    said = ", ".join(f"{counts[state]:,} {state}" for state in STATES if state in counts)
    title = f"{found.name}: {said or 'none begun'} of {found.config.get('trials', len(table)):,} trials"
    if seen.trouble:
        title = f"{found.name}: the log cannot be read now: {seen.trouble}"
    failed = table[table.state == "failed"]
    what, notes = score_name(found), []
    if what != _objectives(found)[0] and len(table):
        notes = [f"score: {what}"]
    if len(failed) and "error" in failed:
        notes.append(f"trial {failed.trial.iloc[-1]} failed: {failed.error.iloc[-1]}")
    shown = _rows(found, table, seen.front)
    lines = _lines(found, shown) if len(shown) else [""]
    texts = [(0.0, float(-at), line.replace(" ", "\N{NO-BREAK SPACE}")) for at, line in enumerate(lines)]
    dims = ("column", "row")
    look = {"size": 9, "dims": dims, "align": "left", "mono": True}
    elements = [style.labels(texts[:1], bold=True, **look), style.labels(texts[1:], **look)]
    n = ROWS if moves else len(shown)
    shape = LIVE_SIZE if moves else {"height": max(1.2, 0.22 * (n + 2))}
    note = _cut("; ".join(notes), WIDE - 5)
    return style.finish(elements, title, note, xlim=(0, 1), ylim=(-n - 0.6, 0.6), xaxis=None, yaxis=None, grid="", **shape)


def _rows(found: Any, table: pd.DataFrame, front: set[int] | None) -> pd.DataFrame:
    """The best trials (of several objectives some on the front), then those under way and the latest of the others, newest first; with `rank`, and only what tells trials apart."""
    import pandas as pd

    if table.empty:
        return table
    done = table[(table.state == "done") & (table.feasible.astype(bool) if "feasible" in table else True)]
    done = done if front is None else done[done.trial.isin(front)]
    best = done.sort_values("score", ascending=found.lower_is_better, kind="stable").head(LEADING)
    rest = table[~table.trial.isin(best.trial)].iloc[::-1]
    rest = rest.iloc[np.argsort(rest.state.to_numpy() != "running", kind="stable")].head(ROWS - len(best))
    rows = pd.concat([best, rest])
    ranks = ["best", "2nd", "3rd"] if front is None else ["front"] * LEADING
    rows = rows.assign(rank=ranks[: len(best)] + [""] * len(rest))
    columns = ["rank", "trial", "state", "score", *_objectives(found)[1:], "seconds", *_axes_of(found)]
    return rows[[name for name in columns if name in rows]]


def _lines(found: Any, rows: pd.DataFrame) -> list[str]:
    """A table as lines of equal columns, the first the names; those that are too many are left out, which is said."""
    import pandas as pd

    heads = {"rank": "", "score": _objectives(found)[0], "seconds": "s"}
    digits = {"score": 4}
    cells = {
        name: [heads.get(name, name), *(_text(value, digits.get(name, 3), "-") for value in own)] for name, own in rows.items()
    }
    cells = pd.DataFrame(cells).map(_cut, n=14).apply(lambda own: own.str.ljust(own.str.len().max() + 2))
    fit = cells.iloc[0].str.len().cumsum() <= WIDE
    head, *lines = cells.loc[:, fit].agg("".join, axis=1).str.rstrip()
    return [head if fit.all() else f"{head}  +{(~fit).sum()} more", *lines]


def _points(found: Any, seen: _Seen, moves: bool = False) -> hv.Overlay:
    """With `moves` all its elements are there from the beginning."""
    table, front, objectives = history(found, seen), seen.front, _objectives(found)
    names, space, what = _axes_of(found), _flat(found.config["space"]), score_name(found)
    axes, conditional = [(name, space[name]) for name in names], [name for name in names if name not in found.config["space"]]
    axes += [(name, {"low": float(table[name].min()), "high": float(table[name].max())}) for name in ("score", *objectives[1:])]
    x = np.arange(len(axes))
    heights = np.column_stack([_height(table[name], about, name in conditional) for name, about in axes])
    done = (table.state == "done").to_numpy()
    order = np.lexsort((table.score.to_numpy(float) * (-1 if found.lower_is_better else 1), done))  # the best one last
    best, is_on = order[-1:] if done.any() else order[:0], table.trial.isin(front or ()).to_numpy()
    n_good = min(MOST, max(1, round(BEST * len(order)))) if len(order) else 0
    good = order[-n_good:-1] if front is None else order[is_on[order]][-MOST:]
    rest = order[~np.isin(order, [*good, *best])]
    drawn = rest[style.evenly(len(rest), LINES)]
    others = f"the best {n_good} of {len(order):,}" if front is None else f"on the front ({is_on.sum()})"
    if moves:
        others = "others of the best fifth" if front is None else "on the front"
    dims, elements = ("parameter", "height"), []
    for part, label, look in (
        (drawn, "", {"dash": 0, "width": 1, "color": style.GREY, "alpha": 0.35}),
        (good, others, {"dash": 1, "width": 2, "color": style.COLOURS[1], "alpha": 0.8}),
    ):
        if len(part) or moves:
            elements.append(style.strokes([np.column_stack([x, heights[at]]) for at in part], label, dims, **look))
    line = heights[best[0]] if len(best) else np.full(len(x), np.nan)
    elements.append(style.line(x, line, 0, "the best" if front is None else f"the best by {what}", dims))
    slot = max(6, WIDE // len(x) - 1)
    texts = [(float(at), high, _cut(text, slot)) for at, (_, about) in enumerate(axes) for high, text in _written(about)]
    texts += [(float(names.index(name)), ABSENT, "none") for name in conditional]
    elements.append(style.labels(texts, "white", 9, dims))
    title = f"{found.name}: waiting for two trials with a {what}" if moves else "Which points are good"
    if len(best):
        row = table.iloc[best[0]]
        own = [name for at, name in enumerate(names) if heights[best[0], at] != ABSENT]
        title = f"Best {_by(found)}{what} {row.score:.4g}: " + ", ".join(f"{name} {_text(row[name])}" for name in own)
    note = "each line a trial; values from the lowest to the highest of the space"
    note += f"; {len(drawn)} of {len(rest):,} others drawn" if len(drawn) < len(rest) else ""
    note += f"; {_better(found.lower_is_better, what)}" if found.lower_is_better else ""
    shape = LIVE_SIZE | {"height": 3.3} if moves else {}
    return style.finish(
        elements, title, note, xlabel="", ylabel="", xticks=_staggered([*names, what, *objectives[1:]]), yaxis=None,
        xlim=(-0.5, len(x) - 0.5), ylim=(ABSENT - 0.12 if conditional else -0.2, 1.2), grid="x", **shape,
    )  # fmt: skip


def _importance(found: Any, seen: _Seen, moves: bool = False) -> hv.Overlay:
    """With `moves` all its elements are there from the beginning."""
    import pandas as pd

    shares, title, note = pd.Series(dtype=float), f"What matters: {seen.reason}", ""
    if seen.importance is not None:
        shares, is_rough = 100 * seen.importance.head(BARS), seen.counted < ROUGH
        title = f"{shares.index[0]} {'seems to matter' if is_rough else 'matters'} most: {shares.iloc[0]:.0f} %"
        which = "on or next to the front" if len(_objectives(found)) > 1 else "among the best tenth"
        note = f"of whether a trial is {which}; {seen.counted:,} trials{', too few for more than a rough guess' * is_rough}"
        note += f"; {BARS} of {len(seen.importance)} parameters" if len(seen.importance) > BARS else ""
    rows = {name: _cut(name, 24) for name in shares.index}
    table = pd.DataFrame({"parameter": shares.index, "start": 0.0, "end": shares.to_numpy(float), "kind": "importance"})
    bars = style.spans(table, "kind", {"importance": ("importance", 0)}, rows, "parameter", (-0.38, 0.38), "%")
    at = style.heights(table["parameter"], rows)
    texts = [(width + 0.8, height, f"{width:.0f}") for width, height in zip(table["end"], at, strict=True)]
    numbers = style.labels(texts, dims=("start (%)", "bottom (parameter)"), align="left")
    axis = style.rows_axis(rows, float(np.clip(1.4 + 0.35 * len(rows), 2.4, 7))) | (LIVE_SIZE if moves else {})
    return style.finish([*bars, numbers], title, note, False, xlabel="importance (%)", xlim=(0, 107), **axis)


def _timeline(found: Any, seen: _Seen, moves: bool = False) -> hv.Overlay:
    """With `moves` all its elements are there from the beginning, and of many runs the latest."""
    spans, table = seen.timeline, seen.table
    first, end = (float(spans.start.min()), float(spans[["start", "end"]].max().max())) if len(spans) else (0.0, 0.0)
    spans = spans.assign(end=spans.end.fillna(end), state=spans.trial.map(table.set_index("trial").state))
    rows = style.worker_rows(spans.worker.unique())
    busy = float((spans.end - spans.start).sum() / (len(rows) * (end - first))) if end > first else 1.0
    note, xlim, n_runs = f"{found.name}: a tick begins each run", (0, None if moves else end), len(spans)
    if n_runs > POINTS and moves:
        spans, note = spans.iloc[-POINTS:], f"{note}; the latest {POINTS} of {n_runs:,} runs"
        xlim = (float(spans.start.min()), None)
    elif n_runs > POINTS:
        note, xlim = f"{found.name}: {len(table):,} trials on {len(rows)} workers", (first, end)
    counts = spans.groupby("state").trial.nunique().reindex(list(STATES), fill_value=0)
    texts = {name: name if moves else f"{name} ({n:,} trial{'s' * (n > 1)})" for name, n in counts.items()}
    elements = style.spans(spans, "state", {name: (texts[name], STATES[name]) for name in STATES}, rows, absent=moves)
    if len(spans) <= POINTS:  # of more they would hide all else
        elements.append(style.row_ticks(spans, "start", rows, (-0.3, 0.3)))
    axis = style.rows_axis(rows) | (LIVE_SIZE if moves else {})
    title = f"Blocks have a run {100 * busy:.0f} % of the time" if len(rows) else "Who trained what when"
    return style.finish(elements, title, note, xlabel=AXES["seconds"], xlim=xlim, **axis)


# Under each other.
LIVE = (partial(_table, moves=True), _live_history, *(partial(draw, moves=True) for draw in (_points, _importance, _timeline)))


def _a_search(name: str, found: Any) -> Any:
    return like(name, found, ("table", "timeline", "importance", "lower_is_better"), SEARCH)


def _opened(found: Any) -> tuple[Any, _Seen]:
    found = _a_search("found", found)
    style.extension()
    return found, _look(found)


def history(found: Any, seen: _Seen | None = None) -> pd.DataFrame:
    """See `labkit.experiments.search.Search.history`."""
    table, timeline = (found.table(), found.timeline()) if seen is None else (seen.table, seen.timeline)
    ends = timeline.groupby("trial").end.max()
    table = table[table.state.isin(["done", "pruned"]) & table.score.notna()]
    if "feasible" in table:
        table = table[table.feasible.astype(bool)]
    table = table.assign(seconds=table.trial.map(ends)).sort_values(["seconds", "trial"], kind="stable")
    scores = table.score.where(table.state == "done").astype(float)
    best = (scores.cummin() if found.lower_is_better else scores.cummax()).ffill()
    return table.assign(trials=np.arange(1, len(table) + 1), best=best)


def _n_scored(table: pd.DataFrame) -> int:
    return int((table.state.isin(["done", "pruned"]) & table.score.notna()).sum())


def _objectives(found: Any) -> list[str]:
    return list(getattr(found, "objectives", ["score"]))


def score_name(found: Any) -> str:
    """What the column `score` is, in words: trials are measured on the score set, but for what a function or a notebook says."""
    name, config = _objectives(found)[0], found.config
    by_function = not config.get("objectives") and "objective" in config.get("code", {})
    by_notebook = isinstance(config.get("problem"), Mapping) and "notebook" in config["problem"]
    return f"held-out {name}" if name in ("score", "loss") and not by_function and not by_notebook else name


def _by(found: Any) -> str:
    """Of several objectives there is no single best, but one by the first of them."""
    return "by " if len(_objectives(found)) > 1 else ""


def _better(lower: bool, what: str) -> str:
    return f"the lower the {what}, the better" if lower else ""


def _trial_marks(ended: pd.DataFrame) -> list[tuple[str, int, pd.DataFrame, int]]:
    """Label, colour, the trials that are drawn, and of how many."""
    of_states = [(*look, ended[ended.state == state]) for state, look in MARKS.items()]
    return [(label, number, own.iloc[style.evenly(len(own), POINTS)], len(own)) for label, number, own in of_states]


def _cut(text: str, n: int) -> str:
    """A text of at most n characters: its beginning and its end."""
    return text if len(text) <= n else f"{text[: n - n // 3 - 1]}…{text[len(text) - n // 3 :]}"


def _axes_of(found: Any) -> list[str]:
    """The parameters that may differ between trials."""
    space = _flat(found.config["space"])
    return [name for name, about in space.items() if len(about.get("choices", (0, 0))) > 1] or list(space)


def _staggered(names: Sequence[str]) -> list[tuple[int, str]]:
    """Names of axes side by side: where there are many, each second one a line lower, and long ones cut."""
    per = 3 * WIDE // 4 // len(names)  # cells of a notebook are narrower than a figure may be
    if max(map(len, names)) < per:
        return list(enumerate(names))
    return [(at, "\n" * (at % 2) + _cut(name, 2 * per - 2)) for at, name in enumerate(names)]


def _written(about: Mapping[str, Any]) -> list[tuple[float, str]]:
    """What stands along an axis: its ends, and the choices between where they are few."""
    if "choices" not in about and np.isnan(about["low"]):  # an objective of no trial
        return []
    texts = [_text(value) for value in about.get("choices") or (about["low"], about["high"])]
    last = len(texts) - 1
    between = [(at / last, texts[at]) for at in range(1, last)] if last < 6 else []
    return [(LOW, texts[0]), *between, *([(HIGH, texts[-1])] if last else [])]


def _number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _text(value: Any, digits: int = 3, none: str = "None") -> str:
    """A value, with `none` for what is none."""
    if value is None or value != value:
        return none
    return _number(value, digits) if isinstance(value, float) else str(value)


def _flat(space: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The attributes of each parameter, those that come with a choice too; of one that several choices have the first."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, about in space.items():
        found.setdefault(name, about["attributes"])
        for _, below in about.get("spaces", ()):
            for inner, attributes in _flat(below).items():
                found.setdefault(inner, attributes)
    return found


def _height(values: Any, about: Mapping[str, Any], within: bool) -> np.ndarray:
    """Where values lie between the ends of their parameter, 0 to 1; below them where a trial has none (`within` a choice it may)."""
    if "choices" in about:
        choices = list(about["choices"])
        values = [None if within is False and None in choices and value != value else value for value in values]
        return np.array([choices.index(value) / max(1, len(choices) - 1) if value in choices else ABSENT for value in values])
    low, high, values = float(about["low"]), float(about["high"]), np.asarray(values, float)
    if about.get("log"):
        low, high, values = np.log(low), np.log(high), np.log(values)
    return np.nan_to_num((values - low) / (high - low) if high > low else values - low + 0.5, nan=ABSENT)


def _ends_of(values: pd.Series) -> str:
    return " to ".join(_number(end) for end in (values.min(), values.max()))


def _said(bounds: Any) -> str:
    """A constraint in words."""
    low, high = bounds
    return f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
