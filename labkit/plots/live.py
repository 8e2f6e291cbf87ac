"""The live view of a run: the held-out score that workers report, their samples/s, and how many are here, redrawn while it runs.

A thread reads what was appended to the record, each second at first, later every three seconds, and less often where reading and drawing
take long, and the kernel sends it to the figure between its cells. What consists of lines is drawn by HoloViews once; then only its points,
title and limits are sent (`Lines.move`); what does not is drawn anew, one panel after the other, so that no cell waits for all of them. A
browser moves the figure only with a free kernel, so `await` the run in the next cell instead of blocking it; when a page begins to listen,
also one that is loaded again or a second one, it gets all that is known then. At the end of the run all pages get the last picture, and it
takes the place of the output of the cell, where it needs no kernel any more: it is there however late the browser was, and in the notebook
that is saved. In a front end that never begins to listen, as VS Code and Colab, a new picture takes the place of the old one every few
seconds. The first figure of a kernel takes seconds; a line says meanwhile how far the run is.

`moving` is the mechanism, for whatever grows. Used through `labkit.plots` and `Run.live`, and by the figures of a search.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from labkit.cluster.notice import front_end, telling
from labkit.errors import real
from labkit.plots import style
from labkit.plots.progress import line
from labkit.runs.events import FILE, Tail

if TYPE_CHECKING:
    from pathlib import Path

    import holoviews as hv

    from labkit.runs.record import RunRecord

PERIOD_S = 0.5  # between two redraws, at least,
SHARE, SHARE_LATER = 0.1, 0.02  # and so much of a core at most, with what is read for them, in the first
EARLY_S = 10.0  # seconds of a view and afterwards: workers may share the cores of the kernel and of the browser,
PAGE_S = 0.06  # of which a page takes about this long to show one
LATEST_S = 10.0  # but after so long it is redrawn in any case, also where all of it takes long on a busy machine
FAILURES = 20  # of reading the record in a row, before the view says so; it goes on looking, more rarely
RARELY_S = 5.0  # between two looks then
POINTS = 400  # of a worker's line, at most: a long run must not slow the browser down
PAD, ALONE = 0.09, 0.5  # of the height of the data, below and above them, or so much where all are equal

MUTE = 40  # redraws that no page has listened to, after which new pictures take the place of the figure
AGAIN_S = (0.0, 1.0, 3.0, 9.0, 27.0)  # after a page has begun to listen, all is sent

Post = Callable[..., Any]  # post(call, wait=0.0): from any thread, have the kernel make a call in `wait` seconds
Series = dict[int, list[tuple[float, float, float]]]  # worker: (seconds, score, samples/s) of each push


class Panel(NamedTuple):
    """What a panel of lines shows."""

    lines: Sequence[tuple[str, Any, Any]]  # label, seconds and values of each, as many each time
    title: str
    ylabel: str
    ylim: tuple[float, float] | None = None  # as the data need it
    note: str = ""
    legend: bool = False
    height: float = 2.8
    aspect: float = 2.8


class Lines:
    """A view that draws what `panel(grows, seen)` says: HoloViews makes the figure, and for what comes later only the points, the
    title and the limits of what it made are changed. To have it make all of it again takes 35 ms."""

    def __init__(self, panel: Callable[[Any, Any], Panel]) -> None:
        self.panel = panel

    def __call__(self, grows: Any, seen: Any) -> Any:
        panel = self.panel(grows, seen)
        dims = ("seconds", panel.ylabel)
        elements = [style.line(x, y, number, label, dims) for number, (label, x, y) in enumerate(panel.lines)]
        limits = {} if panel.ylim is None else {"ylim": panel.ylim}
        return style.finish(
            elements, panel.title, panel.note, panel.legend, xlabel="time (s)", ylabel=panel.ylabel, xlim=(0, None), **limits,
            height=panel.height, shape={"aspect": panel.aspect},
        )  # fmt: skip

    def move(self, plot: Any, grows: Any, seen: Any) -> None:
        """Have what HoloViews made, an overlay of bokeh, show something new."""
        panel = self.panel(grows, seen)
        drawn = iter(part.handles for part in plot.subplots.values())
        for _, x, y in panel.lines:
            for handles, columns in ((next(drawn), (x, y)), (next(drawn), (style.some(x), style.some(y)))):  # a curve, and its dots
                handles["source"].data = dict(zip((handles["glyph"].x, handles["glyph"].y), columns, strict=True))
        x, y = (np.concatenate([np.asarray(line[axis], float) for line in panel.lines] or [[]]) for axis in (1, 2))
        x, y = x[np.isfinite(x)], y[np.isfinite(y)]
        plot.handles["x_range"].end = x.max(initial=0) or 1
        limits = panel.ylim or (0, 1)  # also of nothing there are some: a page that is sent all anew is told those that differ
        if panel.ylim is None and len(y):
            pad = PAD * np.ptp(y) or ALONE
            limits = y.min() - pad, y.max() + pad
        plot.handles["y_range"].update(start=limits[0], end=limits[1])
        style.retitle(plot.state, panel.title, panel.note)


class Seen(NamedTuple):
    """What is known now; a later one is another object."""

    series: Series
    here: list[tuple[float, int]]  # (seconds, how many workers are here from then on)
    workers: frozenset[int]  # who is here, or was to the end
    test: float | None = None  # the score of the newest version on the test set, when the run has ended
    trouble: str = ""  # why the record cannot be read just now


NOTHING = Seen({}, [], frozenset())


def live(run: RunRecord | str | Path, timeout: float = 86400) -> hv.Layout:
    """Held-out score and samples/s of each worker, and how many are here, against time, until the run ends or `timeout` seconds have
    passed; then the title has the score on the test set.

    Moves under "Run All" if the next cell leaves the kernel free: `await asyncio.to_thread(run.wait)`; after a cell
    that blocks it, the picture of that moment comes. In static mode, where nobody looks (a batch, a script), this waits for the end of the
    run, and returns the final picture; in Colab and VS Code a picture is drawn anew every few seconds.

    Examples
    --------
    >>> figure = labkit.plots.live(run)  # of a run that has ended: its last picture
    """
    timeout = real("timeout", timeout, least=0, finite=False)
    run = style.a_run("run", run)
    with telling(lambda: f"{run.label}: {line({'budget': run.config.budget, **run.status()})} (the figure is being made)"):
        return moving(run, Watch(run), VIEWS, NOTHING, timeout)


class Watched(Protocol):
    """What reads something that grows."""

    @property
    def at(self) -> Any:
        """How far it has read: another value where something is new."""

    def look(self) -> Any:
        """What is known now, a named tuple with `trouble`, a text."""


def moving(
    grows: Any,
    watch: Watched,
    views: Sequence[Callable[[Any, Any], Any]],
    nothing: Any,
    timeout: float,
    **stacked: float,
) -> hv.Layout:
    """A figure of `view(grows, seen)` for each view, under each other, redrawn until `grows.state` is not "running" any more.

    What a view draws consists of the same elements each time, also of `nothing`; it is drawn anew, or, if the view is `Lines`, moved.
    `stacked` is what `style.stack` takes.
    """

    def picture(seen: Any) -> hv.Layout:
        return style.stack([draw(grows, seen) for draw in views], **stacked)

    static = style.extension() == "static"
    if static and not front_end():
        limit = time.monotonic() + timeout
        while grows.state == "running" and time.monotonic() < limit:
            time.sleep(PERIOD_S)
        return picture(watch.look())
    import holoviews as hv

    seen = watch.look()
    pipes = [hv.streams.Pipe(data=seen) for _ in views]
    calls = [hv.Callable(lambda data, draw=draw: draw(grows, data), memoize=False) for draw in views]  # it goes by what is sent
    maps = [hv.DynamicMap(call, streams=[pipe]) for call, pipe in zip(calls, pipes, strict=True)]
    lines = all(isinstance(view, Lines) for view in views)
    screen = Screen([_Moved(grows, views, pipes)] if lines else pipes, _poster(), picture, nothing, static)
    screen.latest = seen
    threading.Thread(target=_feed, args=(grows, watch, screen, timeout), name=f"live-{grows.name}", daemon=True).start()
    figure, shown = style.stack(maps), style.stack(maps)  # what is shown keeps its state, whatever is done with `figure`

    def display() -> None:  # what a notebook calls instead of showing `figure` in its own way
        for view in shown:
            view[()]  # drawn of what is known now; what was drawn before has only been moved
        screen.display(shown)

    figure._ipython_display_ = display
    return figure


class _Moved:
    """Pipes in one, which moves what was drawn, all panels by one message, instead of having it drawn anew."""

    def __init__(self, grows: Any, views: Sequence[Lines], pipes: Sequence[Any]) -> None:
        self.grows, self.views, self.pipes = grows, views, pipes

    @property
    def subscribers(self) -> list[Any]:
        return [subscriber for pipe in self.pipes for subscriber in pipe.subscribers]

    def send(self, seen: Any) -> None:
        whole = {}
        for view, pipe in zip(self.views, self.pipes, strict=True):
            pipe.update(data=seen)  # of which the figure is drawn where it is shown once more
            for plot in filter(None, map(_plot, pipe.subscribers)):
                if plot.top_level:
                    whole[id(plot)] = plot
                if "y_range" in plot.handles:  # the panel; the others are what it is part of
                    view.move(plot, self.grows, seen)
        for plot in whole.values():
            plot.push()


class Watch:
    """Pushes and membership of a run so far; `look` reads what was appended to its record since it was last called."""

    def __init__(self, run: RunRecord) -> None:
        self.run, self.tail = run, Tail(run.path)
        self.series: Series = {}
        self.here: list[tuple[float, int]] = []
        self.workers: set[int] = set()
        self.last: dict[int, float] = {}  # worker: seconds of its last push, or of the release that it started with

    @property
    def at(self) -> int:
        return self.tail.offset

    def look(self) -> Seen:
        self.tail.file = self.run.path / FILE  # when it has ended, a run of its name may take its place
        for row in self.tail.read():
            self._count(row)
        series = {worker: points[:: len(points) // POINTS + 1] for worker, points in self.series.items()}
        return Seen(series, self.here[-POINTS:], frozenset(self.workers), self.run.test_score)

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


class Screen:
    """The figure of a live view, wherever it is shown: `show` has it show something new, as soon as a browser can.

    What is sent before the browser listens is lost. The comm of a figure is opened by the browser when it does (`_comm` is None
    before), and by each page that is loaded later: then all is sent, and again after a while, since a page opens the comm before it has
    drawn the figure, which takes long on a busy machine, and drops what comes in between. What is displayed
    under an id can be replaced without a comm: that is how the last picture comes, which `picture(seen)` draws, to the page in which the
    cell was run. Other pages know no ids and get it as before. Where nobody listens for long, all pictures come that
    way (`mute`), and to a page that begins to listen later also as before.
    """

    def __init__(
        self, pipes: Sequence[Any], post: Post, picture: Callable[[Any], Any], nothing: Any = NOTHING, mute: bool = False
    ) -> None:
        self.pipes, self.post, self.picture, self.nothing = pipes, post, picture, nothing
        self.static = self.mute = mute  # static: there is no page that could listen
        self.unheard = 0  # redraws
        self.latest, self.posted, self.ended = nothing, False, False
        self.costs, self.took = [0.0] * len(pipes), 0.0  # seconds of the latest drawing of each panel, and of all
        self.displayed: str | None = None  # the id

    def display(self, figure: Any) -> None:
        """Show the figure below the cell, or, if the run has ended, its last picture."""
        from IPython.display import display

        place = self.displayed or uuid.uuid4().hex
        display(self.picture(self.latest) if self.ended or self.mute else figure, display_id=place)
        self.displayed = place  # from here on it can be replaced

    def show(self, seen: Any, last: bool = False) -> None:
        """From any thread; `post` has the kernel draw, which must not do two things at once to a figure."""
        self.latest, self.ended = seen, last
        if not self.posted:
            self.posted = True
            self.post(self._draw)

    def _draw(self) -> None:
        self.posted = False
        comms = self._comms()
        for comm in comms:
            comm._on_open = self._again
        _ignore_pages({plot.root.ref["id"] for plot in self._plots() if getattr(plot, "root", None)})
        began = time.monotonic()
        if not self.static and all(comm._comm for comm in comms):  # sending would open it from this side, where nobody listens yet
            self.unheard = 0
            for number in range(len(self.pipes)):
                self.post(lambda number=number: self._send(number))
        elif self.displayed:
            self.unheard += 1
            self.mute = self.mute or self.unheard >= MUTE
        if self.displayed and (self.ended or self.mute):
            _replace(self.displayed, self.picture(self.latest))
            self.took = time.monotonic() - began

    def _send(self, number: int) -> None:
        began = time.monotonic()
        self.pipes[number].send(self.latest)
        self.costs[number] = time.monotonic() - began
        self.took = sum(self.costs)

    def _again(self, _: Any) -> None:
        for wait in AGAIN_S:
            for pipe in self.pipes:  # JupyterLab opens comms of a busy kernel in a thread beside the one that draws
                self.post(lambda pipe=pipe: self._resend(pipe), wait)

    def _resend(self, pipe: Any) -> None:
        """Send all of a panel: as only what changes travels, it is made empty first, which no page is told."""
        comms = self._comms()
        for comm in comms:
            comm.send = _to_nobody
        try:
            pipe.send(self.nothing)
        finally:
            for comm in comms:
                del comm.send
        pipe.send(self.latest)

    def _plots(self) -> list[Any]:
        return [_plot(subscriber) for pipe in self.pipes for subscriber in pipe.subscribers]

    def _comms(self) -> list[Any]:
        """Of the figure, in the pages in which the kernel moves it."""
        return [*{id(plot.comm): plot.comm for plot in self._plots() if getattr(plot, "comm", None)}.values()]


def _replace(place: str, figure: Any) -> None:
    """Have a figure take the place of what is displayed under an id. It is drawn before that goes: a notebook may be saved at any time."""
    from IPython import get_ipython
    from IPython.display import display

    shell, how = get_ipython(), {}
    if shell:
        figure, how["metadata"] = shell.display_formatter.format(figure)
        how["raw"] = True
    # JupyterLab draws nothing where the new output has the form of the old one; so there is another one between.
    display({"text/plain": ""}, raw=True, display_id=place, update=True)
    display(figure, display_id=place, update=True, **how)


def _to_nobody(*args: Any, **how: Any) -> None:
    pass


def _ignore_pages(roots: set[str]) -> None:
    """Have the kernel not read what pages say of these figures. Panel 1.9 has them send back whatever they are sent, which takes the kernel
    ten times what sending does, and what is late would take the place of what is newer; and nothing that a page says matters here."""
    import holoviews as hv

    for comm in [*hv.renderer("bokeh").comm_manager._comms.values()]:
        if comm._handle_msg is not _to_nobody and not roots.isdisjoint(getattr(comm._on_msg, "args", ())[:1]):
            comm._handle_msg = _to_nobody
            if comm._comm:
                comm._comm.on_msg(_to_nobody)


def _plot(subscriber: Any) -> Any:
    return getattr(subscriber, "__self__", None)


def _poster() -> Post:
    """Has the loop of the kernel, which runs between its cells, make a call; without one, it is made at once and not again."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return lambda call, wait=0.0: None if wait else call()
    return lambda call, wait=0.0: loop.call_soon_threadsafe(loop.call_later, wait, call)


def _feed(run: Any, watch: Watched, screen: Screen, timeout: float) -> None:
    """Show what is new until the run ends; the state is read first, so that the last push is drawn too."""
    first = time.monotonic()
    limit, shown, failures, seen = first + timeout, None, 0, screen.nothing
    while (began := time.monotonic()) < limit:
        try:
            ended = run.state != "running"
            seen = watch.look()
        except Exception as error:  # the next look may be luckier
            failures += 1
            if failures == FAILURES:
                _show(screen, seen._replace(trouble=str(error)))
        else:
            if watch.at != shown or ended or failures >= FAILURES:
                shown = watch.at
                _show(screen, seen, ended)
            if ended:
                return
            failures = 0
        share = SHARE if began - first < EARLY_S else SHARE_LATER
        pause = min(LATEST_S, (time.monotonic() - began + screen.took + PAGE_S) / share)
        pause = max(PERIOD_S if failures < FAILURES else RARELY_S, pause)
        for _ in range(max(1, math.ceil(min(pause, limit - time.monotonic()) / PERIOD_S))):
            time.sleep(PERIOD_S)
            if _has_ended(run):
                break


def _has_ended(run: Any) -> bool:
    """As far as it can be read just now."""
    with contextlib.suppress(Exception):
        return run.state != "running"
    return False


def _show(screen: Screen, seen: Any, last: bool = False) -> None:
    with contextlib.suppress(RuntimeError):  # the kernel ends
        screen.show(seen, last)


def _scores(run: RunRecord, seen: Seen) -> Panel:
    values = [points[-1][1] for worker, points in seen.series.items() if worker in seen.workers and not np.isnan(points[-1][1])]
    title = f"{run.label}: waiting for the first push"
    if values:
        now = max(points[-1][0] for points in seen.series.values())
        title = f"{run.label}: mean held-out score {np.mean(values):.3f} after {now:.0f} s"
        if seen.test is not None:
            title = f"{run.label}: test score {seen.test:.3f} after {now:.0f} s"
    if seen.trouble:
        title = f"{run.label}: the record cannot be read now: {seen.trouble}"
    return Panel(_workers(run, seen.series, 1), title, "held-out score", note=style.caption([run]))


def _rates(run: RunRecord, seen: Seen) -> Panel:
    rates = [points[-1][2] for worker, points in seen.series.items() if worker in seen.workers]
    title = f"Latest local passes: {sum(rates):,.0f} samples/s, all workers together" if rates else "Speed of the workers"
    return Panel(_workers(run, seen.series, 2), title, "speed (samples/s)", legend=True)


def _membership(run: RunRecord, seen: Seen) -> Panel:
    """How many workers are here, as steps."""
    now = [(points[-1][0], len(seen.workers)) for points in seen.series.values()]
    at, counts = np.array([*seen.here, *sorted(now)[-1:]], float).reshape(-1, 2).T
    top, n = max((count for _, count in seen.here), default=1), len(seen.workers)
    title = f"{n} worker{'s' * (n != 1)} here" if n else "Workers here"
    steps = [("workers here", np.repeat(at, 2)[1:], np.repeat(counts, 2)[:-1])]
    return Panel(steps, title, "workers", (0, top + 0.5), height=1.8, aspect=5)


def _workers(run: RunRecord, data: Series, column: int) -> list[tuple[str, Any, Any]]:
    """One line for each worker, also for one that has not pushed yet: the elements of a live figure must not change."""
    tables = {
        worker: np.array(data.get(worker, []), float).reshape(-1, 3) for worker in sorted(style.slowdowns(run)) or sorted(data)
    }
    return [(f"worker {worker}", table[:, 0], table[:, column]) for worker, table in tables.items()]


VIEWS = (Lines(_scores), Lines(_rates), Lines(_membership))  # under each other
