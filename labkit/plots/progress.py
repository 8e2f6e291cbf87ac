"""Progress of a run, or of subnets in training: a bar that moves by itself in a notebook, a line every few seconds elsewhere.

Where the work stands is read elsewhere: from `status()` of a run, and of subnets by a function that is an argument.

Used by `Run.progress`, `labkit.subnets.train`, and drivers that work in the kernel itself (`meter`).
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from labkit.errors import LabError
from labkit.plots import style

EVERY_S = 5.0  # between two lines of a batch
BAR_S = 0.5  # between two moves of the bar
FAILURES = 20  # of reading the status in a row, before the bar stops
SOON_S = 2.0  # shorter work needs no bar: a cell may do a hundred of them


def line(status: dict) -> str:
    """One line: share done, samples, version, the mean of the workers' held-out scores, time left; at the end the test score."""
    share, samples = _share(status), f"{status.get('samples', 0):,} of {status.get('budget') or 1:,} samples"
    fields = [f"{share:4.0%}", samples, f"version {status.get('version', 0)}"]
    running = status.get("state") == "running"
    scores = [score for w in status.get("workers", {}).values() if (score := w.get("held_out_score", w.get("score"))) is not None]
    if not running and status.get("test_score") is not None:
        fields.append(f"test score {status['test_score']:.3f}")
    elif scores:
        fields.append(f"held-out score {sum(scores) / len(scores):.3f}")
    seconds = status.get("seconds", 0.0)
    if not running:
        fields.append(status["state"] + (f": {status['reason']}" if status.get("reason") else ""))
    elif not status.get("started"):
        fields.append("workers are starting")
    elif share == 1.0:
        fields.append("measuring the curve")
    elif share > 0.02:
        fields.append(f"{seconds * (1 - share) / share:.0f} s left")
    return ", ".join(fields)


def show(label: str, read: Callable[[], dict]) -> None:
    """See `Run.progress`: `read()` gives the status of the run with this label, and `test_score` when it has ended.

    Where the status cannot be read, the next look may be luckier; after FAILURES of them the line says why it stops, and so does the bar,
    which goes on looking.
    """
    bar = Bar() if style.interactive() else None

    def follow() -> None:
        printed, running, failures, status = 0.0, True, 0, {}
        while running:
            try:
                status, failures = read(), 0
            except (LabError, OSError, ValueError) as error:
                failures += 1
                if failures == FAILURES:
                    status = status | {"state": "unknown", "reason": str(error)}
                elif not status:
                    status = {"state": "running"}
            running, now = status["state"] == "running" or bool(bar and failures), time.monotonic()
            if bar:
                bar.move(_share(status), f"{label}: {line(status)}")
            elif not running or now - printed >= EVERY_S:
                print(f"{label}: {line(status)}", flush=True)
                printed = now
            if running:
                time.sleep(BAR_S if bar else 0.1)
        if bar:
            bar.close()

    if bar:
        threading.Thread(target=follow, daemon=True).start()
    else:
        follow()


def _share(status: dict) -> float:
    return min(1.0, status.get("samples", 0) / (status.get("budget") or 1))


class Bar:
    """A bar from 0 to 1 and the text beside it, shown below the cell; `close` leaves the text alone, as text.

    A widget needs its kernel: a notebook that is opened later would say that it cannot be displayed. The widget is there still, for
    pages that have shown the cell without running it; they know no id of what is displayed.
    """

    def __init__(self) -> None:
        import ipywidgets as widgets
        from IPython.display import display

        self._bar, self._text = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="40%")), widgets.Label()
        self._displayed = uuid.uuid4().hex
        display(widgets.HBox([self._bar, self._text]), display_id=self._displayed)

    def move(self, share: float, text: str) -> None:
        self._bar.value, self._text.value = share, text

    def close(self) -> None:
        """Twice is fine."""
        from IPython.display import display

        display({"text/plain": self._text.value}, raw=True, display_id=self._displayed, update=True)


# -- subnets -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def following(
    read: Callable[[], dict[int, dict[str, Any]]], names: Mapping[int, str], epochs: int, done: Collection[int]
) -> Iterator[None]:
    """While it is open, show how far the subnets are, `names` by number: `read()` gives the latest epoch, loss and score of each by
    its number; those among `done` have ended."""
    over, bar = threading.Event(), Bar() if style.interactive() else None
    show = _in_bar(bar, names, epochs, done) if bar else _in_lines(names, epochs, done)

    def follow() -> None:
        ended = False
        while not ended:
            ended = over.wait(BAR_S)
            with contextlib.suppress(OSError, ValueError):  # the next look may be luckier
                show(read())

    thread = threading.Thread(target=follow, name="labkit-subnets", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
        if bar:
            bar.close()


def _in_lines(names: Mapping[int, str], epochs: int, done: Collection[int]) -> Any:
    """At most one line a subnet every few seconds; none for one that takes no longer."""
    printed: dict[int, tuple[int, float]] = {}  # number: epoch, when

    def show(rows: dict[int, dict]) -> None:
        now = time.monotonic()
        for number, row in rows.items():
            before, at = printed.setdefault(number, (row["epoch"], now))
            if number not in done and row["epoch"] != before and now - at >= EVERY_S:
                print(f"  {_epoch(names[number], row, epochs)}", flush=True)
                printed[number] = row["epoch"], now

    return show


def _in_bar(bar: Bar, names: Mapping[int, str], epochs: int, done: Collection[int]) -> Any:
    def show(rows: dict[int, dict]) -> None:
        under_way = {number: row for number, row in rows.items() if number not in done}
        share = (len(done) + sum(row["epoch"] for row in under_way.values()) / epochs) / len(names)
        texts = [f"{len(done)} of {len(names)} subnets", *(_epoch(names[number], row, epochs) for number, row in under_way.items())]
        bar.move(share, "; ".join(texts))

    return show


def _epoch(name: str, row: dict[str, Any], epochs: int) -> str:
    names = {"loss": "loss", "score": "held-out score"}
    numbers = [f", {name} {row[column]:.3f}" for column, name in names.items() if row[column] is not None]
    return f"{name}: epoch {row['epoch']} of {epochs}{''.join(numbers)}"


# -- this kernel itself ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def meter(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """For work in this kernel itself: call the function that is yielded with the samples done so far, as often as you like."""
    started = shown = time.monotonic()
    latest = 0
    bars, bar = style.interactive(), None

    def move(done: int, last: bool = False) -> None:
        nonlocal shown, latest, bar
        now, latest = time.monotonic(), done
        if now - shown < (BAR_S if bar else SOON_S if bars else EVERY_S) and not (last and shown > started):
            return
        if bars and not bar:
            bar = Bar()
        shown, share = now, min(1.0, done / max(1, total))
        left = f", {(now - started) * (1 - share) / share:.0f} s left" if 0.02 < share < 1 else ""
        message = f"{title}: {share:4.0%}, {done:,} of {total:,} samples{left}"
        if bar:
            bar.move(share, message)
        else:
            print(message, flush=True)

    try:
        yield move
        move(latest, last=True)
    finally:
        if bar:
            bar.close()
