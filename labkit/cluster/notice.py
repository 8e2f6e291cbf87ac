"""A line below a notebook's cell while something takes longer than a moment; when that is over the line is gone. In a terminal a line now and then.

First calls load libraries, start processes and convert data, which takes seconds, on a busy machine many.

Used by `connect`, `labkit.training.train` and the first figure of a kernel.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

AFTER_S = 0.8  # what is quicker is not told
EVERY_S = 0.5  # between two readings of a text that changes
EXECUTED = "LABKIT_KERNEL"  # in the environment of a kernel of a sweep and of all that it starts: the folder of its sockets
TERMINAL_S = 10.0  # after so long a terminal is told, once and again
_telling = threading.Lock()  # one line at a time: what is called in there is part of it


def shell() -> Any:
    """The IPython shell of this process; None outside of IPython, which is not loaded for it."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython else None


def front_end() -> str:
    """What shows the notebook of this kernel to somebody: "jupyter" (its server names the notebook), "vscode" or "colab"; "" where nobody
    looks, as under papermill, in scripts and in consoles."""
    if not hasattr(shell(), "kernel") or EXECUTED in os.environ:
        return ""
    if "google.colab" in sys.modules:
        return "colab"
    if hasattr(sys.modules["__main__"], "__vsc_ipynb_file__"):  # which, other than a variable of the environment, is not inherited
        return "vscode"
    return "jupyter" if "JPY_SESSION_NAME" in os.environ else ""


def terminal() -> bool:
    """Does somebody read this process's standard error in a terminal? Not that of a script whose output goes to a file, nor of a notebook."""
    return sys.stderr is not None and sys.stderr.isatty() and EXECUTED not in os.environ


@contextlib.contextmanager
def telling(text: str | Callable[[], str], after: float = AFTER_S) -> Iterator[None]:
    """While the block takes longer than `after` seconds, a notebook shows `text`, or what `text()` says now.

    A terminal has it on stderr, every ten seconds with the time that has passed. A script whose output goes to a file has nothing.
    """
    tell = _tell if front_end() else _tell_terminal if terminal() else None
    if tell is None or not _telling.acquire(blocking=False):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=tell, args=(text, after, over), name="labkit-telling", daemon=True)
    try:
        thread.start()
        yield
    finally:
        over.set()
        thread.join(5)
        _telling.release()


def _tell(text: str | Callable[[], str], after: float, over: threading.Event) -> None:
    from IPython.display import display

    shown, line = "", uuid.uuid4().hex
    while not over.wait(EVERY_S if shown else after):
        with contextlib.suppress(Exception):  # the next reading may be luckier
            now = text() if callable(text) else text
            if now != shown:
                display({"text/plain": now}, raw=True, display_id=line, update=bool(shown))
                shown = now
    if shown:
        display({}, raw=True, display_id=line, update=True)


def _tell_terminal(text: str | Callable[[], str], after: float, over: threading.Event) -> None:
    seconds = 0.0
    while not over.wait(TERMINAL_S):
        seconds += TERMINAL_S
        with contextlib.suppress(Exception):  # the terminal may be closed
            print(f"{text() if callable(text) else text} {seconds:.0f} s so far.", file=sys.stderr, flush=True)
