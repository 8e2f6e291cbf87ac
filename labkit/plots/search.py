"""Figures of a search: the best score over trials, all points as lines through their parameters, what matters, which trials are on
the front of two objectives, who trained what when; and the first and the last of these while the search goes.

They read what a search says of itself: `table()`, `timeline()`, `importance()` and its settings.

Used through `labkit.plots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from labkit.errors import RunError, known, like, real, several
from labkit.plots import style
from labkit.plots.live import moving

if TYPE_CHECKING:
    import holoviews as hv
    import pandas as pd

AXES = {"trials": "trials that have ended", "seconds": "time of the search (s)"}
STATES = {"done": 0, "pruned": 4, "failed": 1, "running": 6}  # and the colour of each
BEST = 0.2  # of the trials are drawn as the best ones


def search_history(searches: Any, x: str = "trials") -> hv.Overlay:
    """The best score so far against `x`, "trials" or "seconds", one line a method, with the trials of a single search as marks.

    Searches of one method and other seeds share a line: the median, with a band from the lowest to the highest.
    """
    x = known("x", x, AXES)
    one = not isinstance(searches, Iterable)
    searches = [_a_search("searches", searches)] if one else several("searches", searches, _a_search)
    style.extension()
    lower = any(found.lower_is_better for found in searches)
    groups: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for found in searches:
        ended = _ended(found)
        if len(ended):
            best = (np.minimum if lower else np.maximum).accumulate(ended.score.to_numpy(float))
            groups.setdefault(found.config["method"], []).append((ended[x].to_numpy(float), best))
    if not groups:
        return style.message("The best score so far", f"{_names(searches)}: no trial has a score yet.")
    elements, legend, last = [], [], {}
    for number, (method, series) in enumerate(groups.items()):
        end = min(at[-1] for at, _ in series)
        at = np.unique(np.concatenate([at for at, _ in series]))
        at = at[(at >= max(at[0] for at, _ in series)) & (at <= end)]
        steps = np.array([best[np.searchsorted(own, at, "right") - 1] for own, best in series])
        band = None if len(series) == 1 else (steps.min(0), steps.max(0))
        elements.append(style.line(at, np.median(steps, 0), number, method, (x, "score"), band))
        last[method] = float(np.median(steps[:, -1]))
        legend.append((f"{method}: {last[method]:.4g} in the end", number, "line"))
    if len(searches) == 1:
        ended = _ended(searches[0])
        elements.append(style.marks(ended[x].to_numpy(float), ended.score.to_numpy(float), 3, "a trial", (x, "score")))
        legend.append(("a trial", 3, "mark"))
    winner = (min if lower else max)(last, key=last.__getitem__)
    equal = [method for method in last if last[method] == last[winner]]
    title = f"{' and '.join(equal)} find{'s' * (len(equal) == 1)} {last[winner]:.4g}"
    title += f", the {'lowest' if lower else 'highest'} of {len(last)}" * (1 < len(last) != len(equal))
    counts = {len(series) for series in groups.values()}
    note = f"{min(counts)} search{'es' * (min(counts) > 1)} a method" + (
        ", range of the seeds as a band" if max(counts) > 1 else ""
    )
    return style.finish(elements, title, note if len(searches) > 1 else "", legend, xlabel=AXES[x], ylabel="best score so far")


def search_points(found: Any) -> hv.Overlay:
    """Parallel coordinates: each trial with a score a line through its parameters, the best fifth in colour, the best of all thick."""
    import holoviews as hv

    found = _a_search("found", found)
    style.extension()
    table = _ended(found)
    if len(table) < 2:
        return style.message("Which points are good", f"{found.name}: it needs two trials with a score.")
    space = _flat(found.config["space"])
    names = [name for name in space if table[name].nunique(dropna=False) > 1] or list(space)
    heights = np.column_stack([_height(table[name], space[name]) for name in names] + [_between(table.score.to_numpy(float))])
    order = np.argsort(table.score.to_numpy(float) * (-1 if found.lower_is_better else 1), kind="stable")
    n_best = max(1, round(BEST * len(order)))
    x = np.arange(len(names) + 1)
    rest, good = ([np.column_stack([x, heights[at]]) for at in part] for part in (order[:-n_best], order[-n_best:]))
    thin = {"bokeh": {"line_width": 1}, "matplotlib": {"linewidth": 1}}
    elements = [style.styled(hv.Path(rest), **thin, color=style.GREY, alpha=0.35)] if rest else []
    elements.append(
        style.styled(
            hv.Path(good),
            bokeh={"line_width": 2, "line_dash": "dashed"},
            matplotlib={"linewidth": 2, "linestyle": "--"},
            color=style.COLOURS[1],
            alpha=0.8,
        )
    )
    elements.append(style.line(x, heights[order[-1]], 0, "best", ("parameter", "value")))
    ends = [_ends(space[name]) for name in names] + [tuple(f"{edge:.3g}" for edge in (table.score.min(), table.score.max()))]
    texts = [(float(at), edge, text) for at, pair in enumerate(ends) for edge, text in zip((-0.09, 1.09), pair, strict=True)]
    elements.append(style.labels(texts, size=9))
    best = table.iloc[order[-1]]
    title = "Best: " + ", ".join(f"{name} {_short(best[name])}" for name in names) + f", score {best.score:.4g}"
    legend = [("the best", 0, "line"), (f"the best {n_best} of {len(order)}", 1, "line")]
    return style.finish(
        elements, title, "each line a trial; values from the lowest to the highest of the space", legend, xlabel="", ylabel="",
        xticks=list(enumerate([*names, "score"])), yaxis=None, xlim=(-0.4, len(names) + 0.4), ylim=(-0.2, 1.2), grid="x",
    )  # fmt: skip


def search_importance(found: Any) -> hv.Overlay:
    """How much each parameter decides whether a trial is among the best tenth (PED-ANOVA), as bars; they sum to 1."""
    found = _a_search("found", found)
    style.extension()
    try:
        shares = found.importance()
    except RunError as error:
        return style.message("What matters", str(error))
    title = f"{shares.index[0]} matters most: {100 * shares.iloc[0]:.0f} %"
    note = f"of whether a trial is among the best tenth; {len(_ended(found))} trials"
    return style.columns({"share": 100 * shares.to_numpy()}, list(shares.index), title, note, "{:.0f}", ylabel="importance (%)")


def search_front(found: Any, x: str | None = None, y: str | None = None) -> hv.Overlay:
    """Two objectives against each other, each trial a mark; those that no other one is better than in all of them are a line.

    `x` and `y` are names of objectives, by default the second and the first. Trials that break a constraint are marked as such.
    """
    found = like("found", _a_search("found", found), ("front", "objectives"), "a search, as labkit.search gives it")
    names = list(found.objectives)
    if len(names) < 2:
        raise ValueError(
            f"search {found.name} has one objective, {names[0]}. Give labkit.search several: objective=['score', 'time']."
        )
    x, y = (known(axis, given, names) for axis, given in (("x", x or names[1]), ("y", y or names[0])))
    style.extension()
    table, front = found.table(), found.front()
    if front.empty:
        return style.message(f"{y} against {x}", f"{found.name}: no trial is done that keeps the constraints.")
    at, height = ("score" if name == names[0] else name for name in (x, y))
    front = front.sort_values(at)
    rest = table[(table.state == "done") & ~table.trial.isin(front.trial)]
    broken = ~rest.feasible.astype(bool) if "feasible" in rest else np.zeros(len(rest), bool)
    elements = [style.line(front[at].to_numpy(float), front[height].to_numpy(float), 0, "front", (x, y))]
    legend = [(f"front ({len(front)} trials)", 0, "line")]
    for label, number, own in (("another trial", 5, rest[~broken]), ("breaks a constraint", 1, rest[broken])):
        if len(own):
            elements.append(style.marks(own[at].to_numpy(float), own[height].to_numpy(float), number, label, (x, y)))
            legend.append((f"{label} ({len(own)})", number, "mark"))
    title = f"{len(front)} of {len(front) + len(rest)} trials are worth a choice: {y} from {_ends_of(front[height])}, {x} from {_ends_of(front[at])}"
    limits = [f"{name} {_said(bounds)}" for name, bounds in (found.config.get("constraints") or {}).items()]
    units = {"time": "time of a run (s)", "size": "parameters of the network"}
    return style.finish(elements, title, "; ".join(limits), legend, xlabel=units.get(x, x), ylabel=units.get(y, y))


def search_timeline(found: Any) -> hv.Overlay:
    """One row for each worker: which trials it trained when, by how they ended."""
    found = _a_search("found", found)
    style.extension()
    if found.timeline().empty:
        return style.message("Who trained what when", f"{found.name}: no trial has begun yet.")
    return _timeline(found)


def search_live(found: Any, timeout: float = 86400) -> hv.Layout:
    """The best score so far and the trials of each worker, redrawn until the search ends or `timeout` seconds have passed.

    As `labkit.plots.live` of a run: begin the search with `wait=False`, and leave the kernel free in the next cell,
    `await asyncio.to_thread(found.wait)`. In static mode this waits for the end.
    """
    found = like("found", _a_search("found", found), ("state",), "a search, as labkit.search gives it")
    return moving(found, _Watch(found), LIVE, NOTHING, real("timeout", timeout, least=0, finite=False))


class _Seen(NamedTuple):
    """What is known of a search now."""

    table: Any = None
    timeline: Any = None
    trouble: str = ""


NOTHING = _Seen()


class _Watch:
    """Reads a search; `at` is how many runs have begun and ended, and trials been told of."""

    def __init__(self, found: Any) -> None:
        self.found, self.at = found, None

    def look(self) -> _Seen:
        timeline, table = self.found.timeline(), self.found.table()
        self.at = len(timeline), timeline.end.notna().sum(), (table.state != "running").sum()
        return _Seen(table, timeline)


class _Then:
    """A search as it was seen, for the figures."""

    def __init__(self, found: Any, seen: _Seen) -> None:
        self.name, self.config, self.lower_is_better, self.seen = found.name, found.config, found.lower_is_better, seen

    def table(self) -> pd.DataFrame:
        return self.seen.table

    def timeline(self) -> pd.DataFrame:
        return self.seen.timeline


def _live_history(found: Any, seen: _Seen) -> hv.Overlay:
    ended = _ended(_Then(found, seen)) if seen.table is not None else None
    at, score = (np.array([]), np.array([])) if ended is None else (ended.seconds.to_numpy(float), ended.score.to_numpy(float))
    best = (np.minimum if found.lower_is_better else np.maximum).accumulate(score)
    title = (
        f"{found.name}: best score {best[-1]:.4g} after {len(best)} trials" if len(best) else f"{found.name}: waiting for a score"
    )
    if seen.trouble:
        title = f"{found.name}: the log cannot be read now: {seen.trouble}"
    dims = ("time (s)", "score")
    elements = [style.line(at, best, 0, "best so far", dims), style.marks(at, score, 3, "a trial", dims)]
    legend = [("best so far", 0, "line"), ("a trial", 3, "mark")]
    return style.finish(
        elements, title, "", legend, xlabel=AXES["seconds"], ylabel="score", xlim=(0, None), height=2.8, shape={"aspect": 2.8}
    )


def _live_timeline(found: Any, seen: _Seen) -> hv.Overlay:
    return _timeline(_Then(found, seen), moves=True)


LIVE = (_live_history, _live_timeline)  # under each other


def _timeline(found: Any, moves: bool = False) -> hv.Overlay:
    """With `moves` all its elements are there from the beginning."""
    spans = found.timeline()
    if spans is None or spans.empty:
        import pandas as pd

        spans, state, end = pd.DataFrame({name: np.array([]) for name in ("trial", "worker", "start", "end")}), {}, 0.0
    else:
        state, end = found.table().set_index("trial").state, float(np.nanmax([spans.end.max(), spans.start.max()]))
    spans = spans.assign(end=spans.end.fillna(end), state=spans.trial.map(state))
    rows = {worker: -row for row, worker in enumerate(sorted(spans.worker.unique()))}  # worker 0 on top
    first = float(spans.start.min()) if len(spans) else 0.0
    busy = float((spans.end - spans.start).sum() / (len(rows) * (end - first))) if end > first else 1.0
    elements, legend = [], []
    for name, number in STATES.items():
        own = spans[spans.state == name]
        if len(own) or moves:
            y = own.worker.map(rows).to_numpy(float)
            table = (own.start.to_numpy(float), y - 0.3, own.end.to_numpy(float), y + 0.3)
            elements.append(style.boxes(table, number, name, ("start (s)", "bottom", "end (s)", "top")))
            legend.append((name if moves else f"{name} ({own.trial.nunique()} trials)", number, "box"))
    y = spans.worker.map(rows).to_numpy(float)
    elements.append(style.ticks(spans.start.to_numpy(float), y - 0.3, y + 0.3))
    names = [(row, f"worker {worker}") for worker, row in rows.items()] or [(0, "")]
    shape = {"height": 2.8, "shape": {"aspect": 2.8}} if moves else {"height": float(np.clip(1.6 + 0.7 * len(rows), 3.4, 8))}
    return style.finish(
        elements, f"Blocks have a run {100 * busy:.0f} % of the time", f"{found.name}: a tick begins each run", legend, xlabel=AXES["seconds"],
        ylabel="", yticks=names if len(names) <= 24 else names[::8], ylim=(-max(1, len(rows)) + 0.5, 0.5),
        xlim=(0, None if moves else end), grid="x", **shape,
    )  # fmt: skip


def _a_search(name: str, found: Any) -> Any:
    return like(name, found, ("table", "timeline", "importance", "lower_is_better"), "a search, as labkit.search gives it")


def _names(searches: Iterable[Any]) -> str:
    return ", ".join(found.name for found in searches)


def _ended(found: Any) -> pd.DataFrame:
    """The trials with a score, and that keep the constraints, in the order in which they ended, with columns trials (how many had ended by then) and seconds."""
    ends = found.timeline().groupby("trial").end.max()
    table = found.table()
    table = table[table.state.isin(["done", "pruned"]) & table.score.notna()]
    if "feasible" in table:
        table = table[table.feasible.astype(bool)]
    table = table.assign(seconds=table.trial.map(ends)).sort_values(["seconds", "trial"], kind="stable")
    return table.assign(trials=np.arange(1, len(table) + 1))


def _flat(space: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The attributes of each parameter, those that come with a choice too; of one that several choices have the first."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, about in space.items():
        found.setdefault(name, about["attributes"])
        for _, below in about.get("spaces", ()):
            for inner, attributes in _flat(below).items():
                found.setdefault(inner, attributes)
    return found


def _height(values: pd.Series, about: Mapping[str, Any]) -> np.ndarray:
    """Where values lie between the ends of their parameter, 0 to 1; NaN where a trial has none."""
    if "choices" in about:
        choices = list(about["choices"])
        return np.array([choices.index(value) / max(1, len(choices) - 1) if value in choices else np.nan for value in values])
    low, high, values = float(about["low"]), float(about["high"]), values.to_numpy(float)
    if about.get("log"):
        low, high, values = np.log(low), np.log(high), np.log(values)
    return (values - low) / (high - low or 1.0)


def _between(scores: np.ndarray) -> np.ndarray:
    spread = scores.max() - scores.min()
    return (scores - scores.min()) / spread if spread else np.full(len(scores), 0.5)


def _ends(about: Mapping[str, Any]) -> tuple[str, str]:
    """What stands below and above the axis of a parameter."""
    if "choices" in about:
        return _short(about["choices"][0]), _short(about["choices"][-1])
    return _short(about["low"]), _short(about["high"])


def _ends_of(values: pd.Series) -> str:
    return " to ".join(f"{end:,.0f}" if abs(end) >= 1000 else f"{end:.3g}" for end in (values.min(), values.max()))


def _said(bounds: Any) -> str:
    """A constraint in words."""
    low, high = bounds
    return f"at most {high:g}" if low is None else f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
