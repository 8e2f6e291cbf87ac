"""How far a run is, or the subnets that are trained: a bar that moves by itself in a notebook, a line every few seconds elsewhere.

What is shown is read elsewhere: a run has a `status()`, and of subnets a function is handed in that reads where each of them is.

Used by `Run.progress`, `labkit.subnets.train`, and drivers that work in the kernel itself (`meter`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

EVERY_S = 5.0  # between two lines of a batch
BAR_S = 0.5  # between two moves of the bar
SOON_S = 2.0  # what is done sooner needs no bar: a cell may do a hundred of them


def line(status: dict) -> str:
    """One line: share done, samples, version, latest scores, time left."""
    budget = status.get("budget") or 1
    share = min(1.0, status.get("samples", 0) / budget)
    parts = [f"{share:4.0%}", f"{status.get('samples', 0):,} of {budget:,} samples", f"version {status.get('version', 0)}"]
    scores = [w["score"] for w in status.get("workers", {}).values() if w.get("score") is not None]
    if scores:
        parts.append(f"score {sum(scores) / len(scores):.3f}")
    seconds = status.get("seconds", 0.0)
    if status.get("state") != "running":
        parts.append(status["state"] + (f": {status['reason']}" if status.get("reason") else ""))
    elif not status.get("started"):
        parts.append("workers are starting")
    elif share == 1.0:
        parts.append("measuring the curve")
    elif share > 0.02:
        parts.append(f"{seconds * (1 - share) / share:.0f} s left")
    return ", ".join(parts)


def show(label: str, read: Callable[[], dict]) -> None:
    """See `Run.progress`: `read()` says where the run with this label stands."""
    from labkit.plots.style import interactive

    if not interactive():
        last = 0.0
        while (status := read())["state"] == "running":
            if time.monotonic() - last >= EVERY_S:
                print(f"{label}: {line(status)}", flush=True)
                last = time.monotonic()
            time.sleep(0.1)
        print(f"{label}: {line(status)}", flush=True)
        return
    bar, text = _bar()

    def move() -> None:
        while True:
            status = read()
            bar.value = min(1.0, status.get("samples", 0) / (status.get("budget") or 1))
            text.value = f"{label}: {line(status)}"
            if status["state"] != "running":
                bar.bar_style = {"done": "success", "stopped": "warning"}.get(status["state"], "danger")
                return
            time.sleep(BAR_S)

    threading.Thread(target=move, daemon=True).start()


def _bar() -> tuple[Any, Any]:
    """A bar from 0 to 1 and the words beside it, shown below the cell."""
    import ipywidgets as widgets
    from IPython.display import display

    bar, text = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="40%")), widgets.Label()
    display(widgets.HBox([bar, text]))
    return bar, text


# -- subnets -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def following(
    read: Callable[[], dict[int, dict[str, Any]]], names: Mapping[int, str], epochs: int, done: Collection[int]
) -> Iterator[None]:
    """While it is open, show how far the subnets are, `names` by number: `read()` gives the latest epoch, loss and score of each by
    its number; those among `done` have ended."""
    from labkit.plots.style import interactive

    over, show = threading.Event(), (_in_bar if interactive() else _in_lines)(names, epochs, done)

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


def _in_lines(names: Mapping[int, str], epochs: int, done: Collection[int]) -> Any:
    """At most one line a subnet every few seconds; none for one that takes no longer."""
    said: dict[int, tuple[int, float]] = {}

    def show(rows: dict[int, dict]) -> None:
        now = time.monotonic()
        for number, row in rows.items():
            before, at = said.setdefault(number, (row["epoch"], now))
            if number not in done and row["epoch"] != before and now - at >= EVERY_S:
                print(f"  {_words(names[number], row, epochs)}", flush=True)
                said[number] = row["epoch"], now

    return show


def _in_bar(names: Mapping[int, str], epochs: int, done: Collection[int]) -> Any:
    bar, text = _bar()

    def show(rows: dict[int, dict]) -> None:
        under_way = {number: row for number, row in rows.items() if number not in done}
        bar.value = (len(done) + sum(row["epoch"] for row in under_way.values()) / epochs) / len(names)
        words = [f"{len(done)} of {len(names)} subnets", *(_words(names[number], row, epochs) for number, row in under_way.items())]
        text.value = "; ".join(words)
        bar.bar_style = "success" if len(done) == len(names) else ""

    return show


def _words(name: str, row: dict[str, Any], epochs: int) -> str:
    numbers = [f", {word} {row[word]:.3f}" for word in ("loss", "score") if row[word] is not None]
    return f"{name}: epoch {row['epoch']} of {epochs}{''.join(numbers)}"


# -- this kernel itself ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def meter(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """For work that keeps this kernel busy: call what is given with the samples done so far, as often as you like."""
    from labkit.plots.style import interactive

    started = shown = time.monotonic()
    told, latest = False, 0
    bars, bar, text = interactive(), None, None

    def move(done: int, last: bool = False) -> None:
        nonlocal shown, told, latest, bar, text
        now, latest = time.monotonic(), done
        if now - shown < (BAR_S if bar else SOON_S if bars else EVERY_S) and not (last and told):
            return
        if bars and not bar:
            bar, text = _bar()
        shown, told, share = now, True, min(1.0, done / max(1, total))
        left = f", {(now - started) * (1 - share) / share:.0f} s left" if 0.02 < share < 1 else ""
        words = f"{title}: {share:4.0%}, {done:,} of {total:,} samples{left}"
        if bar:
            bar.value, text.value = share, words
        else:
            print(words, flush=True)

    yield move
    move(latest, last=True)
