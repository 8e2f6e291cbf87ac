"""The live view of a run: the score that workers report, their samples/s, and how many are here, redrawn while it is running.

A thread reads what was appended to the record, twice a second, and sends it to the figure; the kernel stays free.
A browser gets its first picture only from a free kernel, so `await` the run in the next cell instead of blocking it.

Used through `labkit.plots` and `Run.live`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from labkit.plots import style
from labkit.runs.events import Tail

if TYPE_CHECKING:
    import holoviews as hv

    from labkit.runs.record import RunRecord

PERIOD_S = 0.5  # between two redraws
ASKING_S = 3.0  # from a free kernel until the browser's figure listens
POINTS = 400  # of a worker's line, at most: a long run must not slow the browser down

Series = dict[int, list[tuple[float, float, float]]]  # worker: (seconds, score, samples/s) of each push


class Seen(NamedTuple):
    """What is known now; a later one is another object."""

    series: Series
    here: list[tuple[float, int]]  # (seconds, how many workers are here from then on)
    workers: frozenset[int]  # who is here, or was to the end


def live(run: RunRecord, timeout: float = 86400) -> hv.Layout:
    """Score and samples/s of each worker, and how many are here, against time, until the run ends or `timeout` seconds have passed.

    Moves under "Run All" if the next cell leaves the kernel free: `await asyncio.to_thread(run.wait)`; after a cell
    that blocks it, only the last picture comes. In static mode nothing can move: this then waits for the end of the
    run, and returns the final picture.
    """
    watch = Watch(run)
    if style.extension() == "static":
        limit = time.monotonic() + timeout
        while run.state == "running" and time.monotonic() < limit:
            time.sleep(PERIOD_S)
        return style.stack([draw(run, watch.look()) for draw in VIEWS])
    import holoviews as hv

    pipe = hv.streams.Pipe(data=Seen({}, [], frozenset()))
    views = [hv.DynamicMap(lambda data, draw=draw: draw(run, data), streams=[pipe]) for draw in VIEWS]
    free = threading.Event()
    try:
        asyncio.get_running_loop().call_later(PERIOD_S, free.set)  # the kernel's, which runs between its cells
    except RuntimeError:
        free.set()
    feed = threading.Thread(target=_feed, args=(run, watch, pipe, free, timeout), name=f"live-{run.name}", daemon=True)
    feed.start()
    return style.stack(views)


class Watch:
    """Pushes and membership of a run so far; `look` reads what was appended to its record since it was last called."""

    def __init__(self, run: RunRecord) -> None:
        self.tail = Tail(run.path)
        self.series: Series = {}
        self.here: list[tuple[float, int]] = []
        self.workers: set[int] = set()
        self.last: dict[int, float] = {}  # worker: seconds of its last push, or of the release that it started with

    def look(self) -> Seen:
        for row in self.tail.read():
            self._count(row)
        series = {worker: points[:: len(points) // POINTS + 1] for worker, points in self.series.items()}
        return Seen(series, self.here[-POINTS:], frozenset(self.workers))

    def _count(self, event: dict[str, Any]) -> None:
        kind, worker, now = event["kind"], event.get("worker"), event.get("seconds")
        lost = kind == "leave" and event.get("message")  # a worker that leaves without a message has reached the end
        if kind == "join":
            self.workers = {*self.workers, worker}
        elif lost or kind == "resume":
            self.workers = self.workers - {worker} if lost else set()
        if (lost or kind in ("start", "join")) and now is not None:  # before the start the clock does not run
            self.here.append((now, len(self.workers)))
        if worker is None or now is None:
            return
        if kind == "join":
            self.last[worker] = now
        elif kind == "push":
            elapsed = now - self.last.get(worker, 0.0)
            score, rate = event.get("score"), event["samples"] / elapsed if elapsed > 0 else np.nan
            points = self.series.setdefault(worker, [])
            latest = points[-1][1] if points else np.nan  # not every push is scored
            points.append((now, latest if score is None else score, rate))
            self.last[worker] = now
        elif kind == "score" and self.series.get(worker):  # of the latest push
            pushed, _, rate = self.series[worker][-1]
            self.series[worker][-1] = (pushed, event["score"], rate)


def _feed(run: RunRecord, watch: Watch, pipe: Any, free: threading.Event, timeout: float) -> None:
    """Send the figure what is new until the run ends; the state is read first, so that the last push is drawn too.

    What is sent before the browser has requested the figure is lost, and a kernel answers that request only when it is `free`.
    """
    limit, seen = time.monotonic() + timeout, -1
    if not free.wait(2 * PERIOD_S):  # the next cell blocks the kernel: then the figure comes when it has ended
        if not free.wait(timeout):
            return
        time.sleep(ASKING_S)
    while time.monotonic() < limit:
        ended = run.state != "running"
        data = watch.look()
        if watch.tail.offset != seen:
            seen = watch.tail.offset
            pipe.send(data)
        if ended:
            return
        time.sleep(PERIOD_S)


def _scores(run: RunRecord, seen: Seen) -> Any:
    values = [points[-1][1] for worker, points in seen.series.items() if worker in seen.workers and not np.isnan(points[-1][1])]
    title = f"{run.label}: waiting for the first push"
    if values:
        now = max(points[-1][0] for points in seen.series.values())
        title = f"{run.label}: mean score {np.mean(values):.3f} after {now:.0f} s"
    return _panel(run, seen.series, 1, title, style.caption([run]), "score of the worker", legend=False)


def _rates(run: RunRecord, seen: Seen) -> Any:
    rates = [points[-1][2] for worker, points in seen.series.items() if worker in seen.workers]
    title = f"{sum(rates):,.0f} samples/s, all workers together" if rates else "Speed of the workers"
    return _panel(run, seen.series, 2, title, "", "speed (samples/s)")


def _membership(run: RunRecord, seen: Seen) -> Any:
    """How many workers are here, as steps."""
    now = [(points[-1][0], len(seen.workers)) for points in seen.series.values()]
    at, counts = np.array([*seen.here, *sorted(now)[-1:]], float).reshape(-1, 2).T
    steps = style.line(np.repeat(at, 2)[1:], np.repeat(counts, 2)[:-1], 0, "workers here", ("seconds", "workers"))
    top = max((count for _, count in seen.here), default=1)
    n = len(seen.workers)
    title = f"{n} worker{'s' * (n != 1)} here" if n else "Workers here"
    return style.finish(
        [steps], title, xlabel="time (s)", ylabel="workers", xlim=(0, None), ylim=(0, top + 0.5),
        height=1.8, shape={"aspect": 5},
    )  # fmt: skip


def _panel(run: RunRecord, data: Series, column: int, title: str, note: str, ylabel: str, legend: bool = True) -> Any:
    """One line for each worker, also for one that has not pushed yet: the elements of a live figure must not change."""
    workers = sorted(style.slowdowns(run)) or sorted(data)
    elements, named = [], []
    for number, worker in enumerate(workers):
        table = np.array(data.get(worker, []), float).reshape(-1, 3)
        named.append((f"worker {worker}", number, "line"))
        elements.append(style.line(table[:, 0], table[:, column], number, f"worker {worker}", ("seconds", ylabel)))
    return style.finish(
        elements, title, note, named if legend else (), xlabel="time (s)", ylabel=ylabel, xlim=(0, None),
        height=2.8, shape={"aspect": 2.8},
    )  # fmt: skip


VIEWS = (_scores, _rates, _membership)  # under each other
