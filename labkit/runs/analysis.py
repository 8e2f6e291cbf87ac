"""Analysis of a run: tables and numbers from its events (as `labkit.runs.events.read_events` gives them) and settings.

Most come from one table, `intervals`: what each worker did from when to when. A worker's time is a cycle:

    release ---- exchange, compute, idle -----------> push ---- compute ahead, wait, exchange ----> release
                          "pass"                                         "answer"

    of a push     compute_s, score_s    computing, up to the push, or up to where it was idle
                  load_s                of compute_s: waiting for data
                  wait_s                idle until the others of an all-reduce come (counted at the end of the pass)
                  hidden_s              computed on while its push before this one was under way (of the answer before the pass)
    of a release  wait_s                the server held the worker, from where it had nothing more to compute
    the rest      is exchange of weights

Used by `labkit.runs.record`, `labkit.plots` and `labkit.chaos`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.runs.config import RunConfig
from labkit.runs.events import effective

if TYPE_CHECKING:
    import pandas as pd

MEASURED_S = 1.0  # of work, and of each worker at least, from which the slowdown that was reached is told,
MEASURED = 2  # in so many local passes at least
CUT_OFF = "the server was gone."  # the message of those who were here when a run was cut off


# -- from when to when -------------------------------------------------------------------------------------------------


def intervals(events: pd.DataFrame) -> pd.DataFrame:
    """What each worker did from when to when, in the order in which it ended.

    Columns worker, incarnation, kind, start, end (s), held (s, when the server held it; NaN if it did not), message, and
    first, last: the index of the events that begin and end it. Kinds:

        here      a join to the leave (with its message), to what cut the run off (`CUT_OFF`), or to the end of the events
        pass      a release to the push of the local pass, or to what a milestone asked for
        answer    a push to the release that answers it
        refill    the same, of a worker without samples; or a join to its first release
        broken    a release to the next one, because the group of an all-reduce broke
        held      of an answer that never came, from when it was held to its leave
    """
    import pandas as pd

    rows: list[tuple] = []
    now, here, at = 0.0, {}, {}
    columns = [events[name].tolist() for name in ("kind", "worker", "incarnation", "seconds", "message")]
    for label, kind, worker, incarnation, seconds, message in zip(events.index.tolist(), *columns, strict=True):
        now = seconds if np.isfinite(seconds) else now  # before the start the clock does not run
        if kind == "resume":  # the server was killed, and everybody with it
            rows += [(w, n, "here", since, now, np.nan, CUT_OFF, first, label) for w, (n, since, first) in here.items()]
            here = {}
        if not np.isfinite(worker):
            continue
        own = at.setdefault(worker, _Open())
        if kind == "join":
            here[worker] = incarnation, now, label
            own.begin("refill", seconds, label)
        elif kind == "pull":
            own.kind = "refill" if own.kind in ("answer", "pass") else own.kind
        elif kind == "regroup":
            own.kind = "broken"
        elif kind == "hold":
            own.held = seconds
        elif kind in ("push", "settle"):
            if own.kind == "pass":
                rows.append((worker, incarnation, "pass", own.start, seconds, np.nan, "", own.first, label))
            own.begin("answer", seconds, label)
        elif kind == "release":
            if own.kind in ("answer", "refill", "broken"):
                rows.append((worker, incarnation, own.kind, own.start, seconds, own.held, "", own.first, label))
            own.begin("pass", seconds, label)
        elif kind == "leave":
            if np.isfinite(own.held):
                rows.append((worker, incarnation, "held", own.held, seconds, own.held, "", own.first, label))
            if worker in here:
                why = message if isinstance(message, str) else ""
                rows.append((worker, here[worker][0], "here", here[worker][1], now, np.nan, why, here.pop(worker)[2], label))
            del at[worker]
    end = events.index[-1] if len(events) else -1
    rows += [(worker, n, "here", since, now, np.nan, "", first, end) for worker, (n, since, first) in here.items()]
    names = ["worker", "incarnation", "kind", "start", "end", "held", "message", "first", "last"]
    table = pd.DataFrame(rows, columns=names)
    return table.astype({"worker": int, "incarnation": float, "start": float, "end": float, "held": float})


class _Open:
    """The interval that a worker is in: its kind, since when, and the event with which it began."""

    kind, start, first, held = "", np.nan, -1, np.nan

    def begin(self, kind: str, seconds: float, first: Any) -> None:
        self.kind, self.start, self.first, self.held = kind, seconds, first, np.nan


def spans(events: pd.DataFrame) -> pd.DataFrame:
    """What time went into: worker, activity ("compute", "wait", "exchange"), start, end (s), and of what: kind, first, last.

    Each pass, answer and refill is divided in this order; what has no length is left out.
    """
    import pandas as pd

    table = intervals(events)
    table = table[table.kind.isin(["pass", "answer", "refill", "held"]) & table.end.notna() & table.start.notna()]
    times = events[["compute_s", "score_s", "wait_s", "hidden_s"]].fillna(0.0)
    ends = times.reindex(table["last"])  # of the push that ends a pass, of the release that ends an answer
    pushes = events[events.kind == "push"]
    hidden = times.hidden_s.reindex(pushes.index).groupby(pushes.worker).shift(-1, fill_value=0.0)  # of the next push
    hidden = hidden.reindex(table["first"]).fillna(0.0).to_numpy()
    start, end = table.start.to_numpy(), table.end.to_numpy()
    idle = np.maximum(start, end - ends.wait_s.to_numpy())
    busy = np.maximum(start, idle - ends.compute_s.to_numpy() - ends.score_s.to_numpy())
    free = np.minimum(end, start + hidden)
    answered = np.minimum(end, free + ends.wait_s.to_numpy())
    tables = []
    for kinds, layout in (
        (("pass",), (("exchange", start, busy), ("compute", busy, idle), ("wait", idle, end))),
        (("answer", "refill"), (("compute", start, free), ("wait", free, answered), ("exchange", answered, end))),
        (("held",), (("wait", start, end),)),
    ):
        own = table.kind.isin(kinds).to_numpy()
        for order, (activity, since, until) in enumerate(layout):
            columns = {"activity": activity, "start": since[own], "end": until[own], "order": order}
            tables.append(table.loc[own, ["worker", "kind", "first", "last"]].assign(**columns))
    made = pd.concat(tables)
    made = made[made.end > made.start].sort_values(["worker", "last", "order"], kind="stable", ignore_index=True)
    return made[["worker", "activity", "start", "end", "kind", "first", "last"]]


def lost(events: pd.DataFrame) -> list[int]:
    """The workers that were lost and have not come back, with those that were not there when a run that was cut off was resumed."""
    table = intervals(events)
    latest = table[table.kind == "here"].sort_values("first").groupby("worker").tail(1)
    resumes = events.index[events.kind == "resume"]
    gone = latest.message.ne("") | (latest["first"].lt(resumes[-1]) if len(resumes) else False)
    return sorted(latest.worker[gone].tolist())


# -- the cost card -----------------------------------------------------------------------------------------------------


def balance(events: pd.DataFrame) -> pd.DataFrame:
    """See `labkit.runs.record.RunRecord.balance`."""
    import pandas as pd

    events = effective(events)
    pushes = events[events.kind == "push"]
    by_worker = pushes.groupby("worker").samples
    pushes = pushes[(pushes.samples >= by_worker.shift(1, fill_value=0)) | by_worker.shift(-1).notna()]
    if pushes.empty:
        return pd.DataFrame(columns=["pass", "mean_s", "max_s", "ratio"])
    took = pushes.compute_s + (pushes.score_s if pushes.score.notna().all() else 0.0)  # not every push is scored
    times = took.groupby([pushes["pass"], pushes.worker]).sum().unstack()
    away = times.isna() & times.bfill().notna()  # a newcomer continues the count of the quickest: it was not here before
    gone = times.columns.intersection(lost(events))
    away[gone] = times[gone].isna()
    times = times[(times.notna() | away).all(axis=1) & (times.count(axis=1) >= min(2, times.shape[1]))]
    table = pd.DataFrame({"mean_s": times.mean(axis=1), "max_s": times.max(axis=1)})
    table["ratio"] = table.mean_s / table.max_s
    return table.reset_index().astype({"pass": int})


def slowdown_reached(events: pd.DataFrame, config: RunConfig) -> dict[int, float]:
    """By worker, the slowdown that emulation reached: what a sample took it beside the least slowed workers, times the slowdown of those.

    The first local pass of each does not count. Empty where that tells nothing of emulation: workers that are not equal without it (of
    several hosts, devices or numbers of threads, by the record), factors that change (jitter, drift, stalls, or `slow` in mid-run), times
    that were not measured (simulated runs), or too little work (`MEASURED_S`, `MEASURED`).
    """
    asked = {int(worker["index"]): float(worker.get("slowdown") or 1.0) for worker in config.workers}
    alike = {(worker.get("host"), worker.get("device"), worker.get("threads")) for worker in config.workers}
    steady = not (config.jitter or config.drift or config.stalls or (events.kind == "slow").any())
    measured = (config.origin or {}).get("kind", "live") in ("live", "replay")
    if len(set(asked.values())) < 2 or len(alike) != 1 or None in next(iter(alike))[:2] or not (steady and measured):
        return {}
    pushes = effective(events).query("kind == 'push' and samples > 0")
    later = pushes[pushes.groupby("worker").cumcount() > 0]
    spent = later.groupby("worker").agg(n=("samples", "size"), samples=("samples", "sum"), seconds=("compute_s", "sum"))
    spent = spent[spent.index.isin(asked)]
    if set(spent.index) != set(asked) or spent.n.min() < MEASURED or not spent.seconds.min() >= MEASURED_S:
        return {}
    each, least = spent.seconds / spent.samples, min(asked.values())
    unit = each[[worker for worker, factor in asked.items() if factor == least]].median() / least
    return {int(worker): float(value / unit) for worker, value in each.items()}


def staleness(events: pd.DataFrame) -> pd.DataFrame:
    """See `labkit.runs.record.RunRecord.staleness`."""
    events = effective(events)
    merges = events.loc[events.kind == "merge", ["worker", "seconds", "version", "staleness"]].dropna(
        subset=["worker", "staleness"]
    )
    return merges.reset_index(drop=True).astype({"worker": int, "version": int, "staleness": int})


def quantile(staleness: Sequence[int], share: float) -> float:
    """The least number of versions that so large a share of the merges, in (0, 1], do not exceed: always one that occurred. NaN do not count."""
    values = np.asarray(staleness, float)
    return float(np.quantile(values[~np.isnan(values)], share, method="inverted_cdf"))


def contributions(events: pd.DataFrame) -> pd.DataFrame:
    """See `labkit.runs.record.RunRecord.contributions`."""
    import pandas as pd

    events = effective(events)
    merges = events[events.kind == "merge"].dropna(subset=["worker", "coefficient"])
    given = merges.coefficient.abs().groupby(merges.worker.astype(int)).sum()
    if not given.sum():
        return pd.DataFrame({"worker": [], "samples": [], "weight": []}).astype({"worker": int})
    pushes = events[events.kind == "push"]
    trained = pushes.groupby("worker").samples.sum().reindex(given.index, fill_value=0)
    shares = {"samples": trained / max(trained.sum(), 1), "weight": given / given.sum()}
    return pd.DataFrame(shares).rename_axis("worker").reset_index()


def trained(events: pd.DataFrame, curve: pd.DataFrame) -> pd.DataFrame:
    """Of each entry that steps returned the mean over the samples of the pushes since the row before of a `curve`; NaN without any."""
    import pandas as pd

    events = effective(events)
    pushes = events[(events.kind == "push") & (events.samples > 0)]
    rows = np.searchsorted(curve.seconds.to_numpy(float), pushes.seconds.to_numpy(float))  # the first version that holds a push
    entries = pd.DataFrame([given if isinstance(given, dict) else {} for given in pushes.metrics], index=pushes.index)
    found = {}
    for name, values in {"loss": pushes.loss, **entries}.items():
        weights = pushes.samples.where(values.notna())
        sums = pd.DataFrame({"value": values * weights, "weight": weights}).groupby(rows).sum(min_count=1)
        found[f"train_{name}"] = (sums.value / sums.weight).reindex(range(len(curve))).to_numpy(float)
    return pd.DataFrame(found, index=curve.index)


def summary(events: pd.DataFrame, config: RunConfig, curve: pd.DataFrame | None) -> dict[str, Any]:
    """See `labkit.runs.record.RunRecord.summary`; without a `curve` no score and no loss."""
    counted = effective(events)
    merges = counted[counted.kind == "merge"]
    pushes, releases, leaves = (events[events.kind == kind] for kind in ("push", "release", "leave"))
    seconds = float(merges.seconds.max()) if len(merges) else 0.0
    samples = float(merges.samples.sum())
    worked = float(pushes.compute_s.sum() + events.score_s.sum())
    sent, waited = float(pushes.send_s.sum()), float(sum(table.wait_s.sum() for table in (releases, pushes, leaves)))
    busy = worked + sent + waited
    passes = balance(events)
    later = passes.loc[passes["pass"] >= 2, "ratio"]
    coefficients = merges.groupby("worker").coefficient.sum()
    total = float(coefficients.sum())
    return {
        "score": None if curve is None or curve.score.isna().all() else float(curve.score.iloc[-1]),
        **({"lower_is_better": True} if config.lower_is_better else {}),
        "loss": None if curve is None or curve.empty else float(curve.loss.iloc[-1]),
        "seconds": seconds,
        "samples": int(samples),
        "samples_per_s": samples / seconds if seconds else 0.0,
        "versions": int(merges.version.max()) if len(merges) else 0,
        "wait_share": waited / busy if busy else 0.0,
        "send_share": sent / busy if busy else 0.0,
        "load_share": None if pushes.load_s.isna().all() or not busy else float(pushes.load_s.sum()) / busy,
        "staleness_p50": quantile(merges.staleness, 0.5) if len(merges) else 0.0,
        "staleness_p95": quantile(merges.staleness, 0.95) if len(merges) else 0.0,
        "balance": float(later.mean()) if len(later) else None,
        "weight_per_worker": {int(w): float(c) / total for w, c in coefficients.items()} if total else {},
        "exchange": config.exchange,
        "overlap": config.overlap,
        "bytes": int(pushes.bytes.sum() + releases.bytes.sum()),
        "checkpoints": int((counted.kind == "checkpoint").sum()),
        "n_workers": max(1, config.n_workers),
        "seed": config.seed,
    }


def crossing(x: np.ndarray, y: np.ndarray, target: float) -> float:
    """Where a polyline first reaches `target`; nan if it never does."""
    reached = np.flatnonzero(y >= target)
    if not len(reached):
        return float("nan")
    i = reached[0]
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (target - y[i - 1]) / (y[i] - y[i - 1]))
