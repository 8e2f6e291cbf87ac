"""What the record of a run says: tables and numbers from its events (as `labkit.runs.events.read_events` gives them) and settings.

Most come from one table, `intervals`: what each worker did from when to when. A worker's time goes round in a circle:

    release ---- exchange, compute, stand still ----> push ---- compute ahead, wait, exchange ----> release
                          "pass"                                         "answer"

    of a push     compute_s, score_s    computing, up to the push, or up to where it stood still
                  wait_s                stood still for the others of an all-reduce (counted at the end of the pass)
                  hidden_s              computed on while its push before this one was under way (of the answer before the pass)
    of a release  wait_s                the server held the worker, from where it had nothing more to compute
    the rest      is exchange of weights

Used by `labkit.runs.record`, `labkit.plots` and `labkit.chaos`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import PartitionError, RunError
from labkit.partition import UDPA
from labkit.runs import checkpoints
from labkit.runs.config import RunConfig
from labkit.runs.events import effective

if TYPE_CHECKING:
    import pandas as pd

CUT_OFF = "the server was gone."  # the message of those who were here when a run was cut off


# -- from when to when -------------------------------------------------------------------------------------------------


def intervals(events: pd.DataFrame) -> pd.DataFrame:
    """What each worker did from when to when, in the order in which it ended.

    Columns worker, incarnation, kind, start, end (s), held (s, when it was told that it is held; NaN if it was not), message, and
    first, last: the index of the events that begin and end it. Kinds:

        here      a join to the leave (with its message), to what cut the run off (`CUT_OFF`), or to the end of the events
        pass      a release to the push of the local pass
        answer    a push to the release that answers it
        refill    the same, of a worker that had no samples left; or a join to its first release
        broken    a release to the next one, because the group of an all-reduce broke
        held      of an answer that never came, from when it was held to its leave
    """
    import pandas as pd

    rows: list[tuple] = []
    now, here, at = 0.0, {}, {}
    columns = [events[name].tolist() for name in ("kind", "worker", "incarnation", "seconds", "message")]
    for label, kind, worker, incarnation, seconds, message in zip(events.index.tolist(), *columns, strict=True):
        now = seconds if np.isfinite(seconds) else now  # before the start the clock stands
        if kind == "resume":  # the server was killed, and everybody with it
            rows += [(w, n, "here", since, now, np.nan, CUT_OFF, first, label) for w, (n, since, first) in here.items()]
            here = {}
        if not np.isfinite(worker):
            continue
        own = at.setdefault(worker, _Standing())
        if kind == "join":
            here[worker] = incarnation, now, label
            own.began("refill", seconds, label)
        elif kind == "pull":
            own.kind = "refill" if own.kind in ("answer", "pass") else own.kind
        elif kind == "regroup":
            own.kind = "broken"
        elif kind == "hold":
            own.held = seconds
        elif kind == "push":
            if own.kind == "pass":
                rows.append((worker, incarnation, "pass", own.start, seconds, np.nan, "", own.first, label))
            own.began("answer", seconds, label)
        elif kind == "release":
            if own.kind in ("answer", "refill", "broken"):
                rows.append((worker, incarnation, own.kind, own.start, seconds, own.held, "", own.first, label))
            own.began("pass", seconds, label)
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


class _Standing:
    """What a worker is in the middle of: a kind of interval, since when, and the event with which it began."""

    kind, start, first, held = "", np.nan, -1, np.nan

    def began(self, kind: str, seconds: float, first: Any) -> None:
        self.kind, self.start, self.first, self.held = kind, seconds, first, np.nan


def spans(events: pd.DataFrame) -> pd.DataFrame:
    """What time went into: worker, activity ("compute", "wait", "exchange"), start, end (s), and of what: kind, first, last.

    The parts of each pass, answer and refill, one behind the other; those that take no time are left out.
    """
    import pandas as pd

    table = intervals(events)
    table = table[table.kind.isin(["pass", "answer", "refill", "held"]) & table.end.notna() & table.start.notna()]
    told = events[["compute_s", "score_s", "wait_s", "hidden_s"]].fillna(0.0)
    ends = told.reindex(table["last"])  # of the push that ends a pass, of the release that ends an answer
    pushes = events[events.kind == "push"]
    hidden = told.hidden_s.reindex(pushes.index).groupby(pushes.worker).shift(-1, fill_value=0.0)  # what the next push says
    hidden = hidden.reindex(table["first"]).fillna(0.0).to_numpy()
    start, end = table.start.to_numpy(), table.end.to_numpy()
    stood = np.maximum(start, end - ends.wait_s.to_numpy())
    busy = np.maximum(start, stood - ends.compute_s.to_numpy() - ends.score_s.to_numpy())
    free = np.minimum(end, start + hidden)
    answered = np.minimum(end, free + ends.wait_s.to_numpy())
    parts = []
    for kinds, layout in (
        (("pass",), (("exchange", start, busy), ("compute", busy, stood), ("wait", stood, end))),
        (("answer", "refill"), (("compute", start, free), ("wait", free, answered), ("exchange", answered, end))),
        (("held",), (("wait", start, end),)),
    ):
        own = table.kind.isin(kinds).to_numpy()
        for place, (activity, since, until) in enumerate(layout):
            part = table.loc[own, ["worker", "kind", "first", "last"]]
            parts.append(part.assign(activity=activity, start=since[own], end=until[own], place=place))
    made = pd.concat(parts)
    made = made[made.end > made.start].sort_values(["worker", "last", "place"], kind="stable", ignore_index=True)
    return made[["worker", "activity", "start", "end", "kind", "first", "last"]]


def lost(events: pd.DataFrame) -> list[int]:
    """The workers that were lost and have not come back, those included with whom a run that was cut off did not go on."""
    table = intervals(events)
    latest = table[table.kind == "here"].sort_values("first").groupby("worker").tail(1)
    resumes = events.index[events.kind == "resume"]
    gone = latest.message.ne("") | (latest["first"].lt(resumes[-1]) if len(resumes) else False)
    return sorted(latest.worker[gone].tolist())


# -- the cost card -----------------------------------------------------------------------------------------------------


def balance(events: pd.DataFrame) -> pd.DataFrame:
    """How even the work was: pass, mean_s, max_s and ratio = mean T / max T of each local pass that all who were here have reached.

    T is the time of the local pass: optimiser steps and score, emulated sleep included. A last pass that the end of the run
    has cut short does not count.
    """
    import pandas as pd

    events = effective(events)
    pushes = events[events.kind == "push"]
    by_worker = pushes.groupby("worker").samples
    pushes = pushes[(pushes.samples >= by_worker.shift(1, fill_value=0)) | by_worker.shift(-1).notna()]
    if pushes.empty:
        return pd.DataFrame(columns=["pass", "mean_s", "max_s", "ratio"])
    took = pushes.compute_s + (pushes.score_s if pushes.score.notna().all() else 0.0)  # now and then a score says nothing
    times = took.groupby([pushes["pass"], pushes.worker]).sum().unstack()
    away = times.isna() & times.bfill().notna()  # who comes counts on from the quickest: it was not here before
    gone = times.columns.intersection(lost(events))
    away[gone] = times[gone].isna()
    times = times[(times.notna() | away).all(axis=1) & (times.count(axis=1) >= min(2, times.shape[1]))]
    table = pd.DataFrame({"mean_s": times.mean(axis=1), "max_s": times.max(axis=1)})
    table["ratio"] = table.mean_s / table.max_s
    return table.reset_index().astype({"pass": int})


def summary(events: pd.DataFrame, config: RunConfig, curve: pd.DataFrame | None) -> dict[str, Any]:
    """Final score and loss, time, throughput, waiting, staleness, balance, traffic; without a `curve` no score and no loss.

    Samples count once, also where a run was cut off and made some again; time, waiting and traffic are all that it cost.
    """
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
        "score": None if curve is None or curve.empty else float(curve.score.iloc[-1]),
        "loss": None if curve is None or curve.empty else float(curve.loss.iloc[-1]),
        "seconds": seconds,
        "samples": int(samples),
        "samples_per_s": samples / seconds if seconds else 0.0,
        "versions": int(merges.version.max()) if len(merges) else 0,
        "wait_share": waited / busy if busy else 0.0,
        "send_share": sent / busy if busy else 0.0,
        "staleness_p50": float(merges.staleness.median()) if len(merges) else 0.0,
        "staleness_p95": float(merges.staleness.quantile(0.95)) if len(merges) else 0.0,
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


# -- after faults ------------------------------------------------------------------------------------------------------


def audit(path: Path, events: pd.DataFrame, config: RunConfig) -> list[str]:
    """What does not add up in the record of a run that has ended: see `labkit.chaos.audit`."""
    wrong, budget = [], config.budget
    if list(events.seq) != list(range(len(events))):
        wrong.append("events are not numbered 0, 1, 2, ...")
    counted = effective(events)
    merges, pushes = (counted[counted.kind == kind] for kind in ("merge", "push"))
    joint = int(events.worker.nunique()) if config.update["name"] == "allreduce" else 1  # they stop together
    if not budget - joint < merges.samples.sum() <= budget:
        wrong.append(f"{int(merges.samples.sum())} of {budget} samples were merged")
    steps = merges.version.drop_duplicates().astype(int).tolist()
    if steps != list(range(1, len(steps) + 1)):
        wrong.append("versions are not numbered 1, 2, 3, ...")
    for worker, own in merges.groupby("worker"):
        sent = list(pushes.loc[pushes.worker == worker, ["seq", "samples"]].itertuples(index=False))
        for merge in own.itertuples():
            while sent and (sent[0].seq > merge.seq or sent[0].samples != merge.samples):
                del sent[0]  # a push that was never merged: its worker was lost while it waited for the others
            if not sent:
                wrong.append(f"a merge of {int(merge.samples)} samples of worker {int(worker)} has no push")
                break
            del sent[0]
    try:
        version, refused = checkpoints.newest(path)
        wrong += refused
        if steps and version != steps[-1]:
            wrong.append(f"the newest checkpoint holds version {version} of {steps[-1]}")
        UDPA().load_state_dict(checkpoints.read_state(path, version)[1]["partition"])
    except (RunError, PartitionError) as error:
        wrong.append(str(error))
    return wrong


def losses(events: pd.DataFrame, config: RunConfig, faults: pd.DataFrame | None = None) -> pd.DataFrame:
    """How long a lost worker kept the others waiting: see `labkit.chaos.losses`."""
    import pandas as pd

    counted, table, rows = effective(events), intervals(events), []
    merged = counted[counted.kind == "merge"]
    ended = events.seconds[events.kind == "merge"].max()
    waits = table[table.kind.isin(["answer", "refill", "broken"])]
    gone = events[(events.kind == "leave") & events.message.fillna("").ne("") & (events.seconds < ended)]
    for label, loss in zip(gone.index, gone.itertuples(), strict=True):
        began = -np.inf
        if faults is not None:
            own = faults[(faults.worker == loss.worker) & faults.fault.isin(["kill", "freeze", "drop"])]
            began = own.seconds[own.seconds <= loss.seconds].max() if (own.seconds <= loss.seconds).any() else began
        found = waits[(waits.worker != loss.worker) & (waits["last"] > label)].groupby("worker").head(1)
        found = found[(found["first"] < label) & (found.start <= loss.seconds)]
        waited = float((found.end - found.start.clip(lower=began)).max()) if len(found) else 0.0
        left = config.budget - merged.samples[merged.index < label].sum()
        rows.append((loss.seconds, int(loss.worker), loss.message, round(max(0.0, waited), 3), int(left)))
    return pd.DataFrame(rows, columns=["seconds", "worker", "message", "waited_s", "left"])
