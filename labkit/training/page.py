"""A page that follows a run of any kernel, from the same machine: `labkit.watch(run)`, `python -m labkit watch runs/x`.

    kernel  --starts-->  python -m labkit watch PATH  <--the record, its server's status--  the run
                                  |
                         a page on loopback, for whoever has its address

The page is served by a process of its own, so that a kernel which computes does not keep it waiting, and the kernel does nothing for it. It
listens on loopback, and its address holds a session that is signed with a secret of this page: without it, nothing is answered. On a
JupyterHub or Binder a browser reaches it through the user's own server, by jupyter-server-proxy, which lets nobody else in. It
reads the record, as `run.live()` does, and asks the run's server only for its state and for what a button says.

Used through `labkit` and the command line.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from labkit.cluster.emulation import SLOWEST
from labkit.errors import LabError, RunError, file_path, real, whole
from labkit.plots import style
from labkit.plots.live import VIEWS
from labkit.plots.live import Seen as LiveSeen
from labkit.plots.live import Watch as LiveWatch
from labkit.plots.runs import latest
from labkit.runs import server_file
from labkit.runs.analysis import quantile
from labkit.runs.files import find_json
from labkit.training.attach import kill, request, slow_down
from labkit.training.inspection import inspection
from labkit.training.run import Run, read_run

if TYPE_CHECKING:
    import holoviews as hv

WINDOW_S = 60.0  # that the timeline shows
ROWS = 2000  # latest events that are kept for it
START_S = 120.0  # the process of a page has so long to begin
PERIOD_MS = 500  # between two looks at the record
ANSWER_S = 5.0  # in which a Jupyter server says whether it passes on to ports
SLOW_S = 10.0  # a browser that has not drawn the picture before gets the next one after so long nevertheless


def watch(run: Run | str | Path, timeout: float = START_S) -> Page:
    """Follow a run on a page of its own, whichever kernel it belongs to; returns the page, whose `url` opens in a browser here.

    The page shows how far the run is, the scores and speeds of the workers, what each did in the last minute, how stale the merges were and
    who is here. Buttons stop the run, save a version, inspect a worker (`Run.inspect`), cut its connection, upon which it joins anew, make it
    slower (`Run.slow_down`), or kill its process where that is on this machine (`Run.kill`). It ends with `close`, or with this process.

    On a JupyterHub or Binder whose server has jupyter-server-proxy, `url` is a path of that server, and a link to it stands below the cell. Elsewhere
    the kernel's machine must be the browser's, or its port be brought here: `ssh -L PORT:localhost:PORT machine`.

    Parameters
    ----------
    run : a run, or its directory; one that has ended shows how it was at the end.
    timeout : seconds in which the page must be there.

    Raises
    ------
    RunError
        There is no run, or the page does not start.

    Examples
    --------
    >>> page = labkit.watch(run)
    >>> page.url.startswith("http://")
    True
    >>> page.close()
    """
    timeout = real("timeout", timeout, above=0, finite=False)
    return Page(run.path if isinstance(run, Run) else read_run(file_path("run", run)).path, timeout)


class Page:
    """The process of a page: `url`, which is for your eyes alone, and `close`."""

    def __init__(self, path: Path, timeout: float = START_S) -> None:
        self.path = path
        command = [sys.executable, "-m", "labkit", "watch", str(path), "--with-parent"]
        # It ends when its stdin does; in a session of its own, as the stop button of a notebook interrupts the whole group of the kernel.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes, start_new_session=True)
        atexit.register(self.close)
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        line = self._process.stdout.readline().strip()
        timer.cancel()
        if not line.startswith(("http", "/")):
            self.close()
            raise RunError(f"the page of {path} did not start within {timeout:g} s: {line or 'see what it printed'}.")
        self.url = line

    def close(self) -> None:
        """End the page. Twice is fine."""
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)
        self._process.stdout.close()

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<page of {self.path.name}: {self.url}>"

    def _repr_html_(self) -> str:
        return f'<a href="{self.url}" target="_blank">The page of {self.path.name}</a>'


def serve(path: str | Path, port: int = 0, with_parent: bool = False, tell: Callable[[str], None] = print) -> int:
    """Serve the page of a run until the process is interrupted, or, `with_parent`, until nobody holds its standard input any more.

    Tells the address, by default as a printed line. Returns 0.
    """
    import panel
    from bokeh.util.token import generate_session_id

    run, port = read_run(file_path("path", path)), whole("port", port, 0, 65535)
    style.extension("interactive")
    secret = secrets.token_urlsafe(32)
    settings = {"generate_session_ids": False, "sign_sessions": True, "secret_key": secret, "check_unused_sessions": 10_000}
    settings |= {"unused_session_lifetime": 60_000, "address": "127.0.0.1", "show": False, "start": False, "verbose": False}
    if hub := _hub():  # whose name in the browser is not known here; the session in the address is asked for as before
        settings["websocket_origin"] = "*"
        logging.getLogger("bokeh.server.util").setLevel(logging.ERROR)  # which warns of that
    server = panel.serve({"/": lambda: _moving(run)}, port=port, title=f"labkit: {run.name}", **settings)
    if with_parent:
        threading.Thread(target=_end_with_parent, args=(server,), name="parent", daemon=True).start()
    session = generate_session_id(secret, signed=True)
    base = f"{hub}proxy/{server.port}/" if hub else f"http://localhost:{server.port}/"
    tell(f"{base}?bokeh-session-id={session}")
    with contextlib.suppress(KeyboardInterrupt):
        server.io_loop.start()
    server.stop()
    return 0


def _hub() -> str:
    """Where a JupyterHub has the user's server, if that passes on to ports of this machine by jupyter-server-proxy; "" elsewhere. The server is
    asked; where it is not found, on another machine say, it is taken to have what is installed here."""
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX", "")
    if not prefix.startswith("/"):
        return ""
    found = _has_proxy(prefix)
    if found is None:
        found = importlib.util.find_spec("jupyter_server_proxy") is not None
    return prefix if found else ""


def _has_proxy(prefix: str) -> bool | None:
    """Has the Jupyter server whose path is `prefix` jupyter-server-proxy? As it answers; None where none on this machine does."""
    try:
        from jupyter_core.paths import jupyter_runtime_dir
    except ImportError:  # no kernel either
        return None
    for file in Path(jupyter_runtime_dir()).glob("jpserver-*.json"):
        about = find_json(file)
        if not isinstance(about, dict) or about.get("base_url") != prefix:
            continue
        # What an earlier server has left, or no such address.
        with contextlib.suppress(OSError, ValueError, HTTPException, psutil.Error):
            status = _status(about, f"{prefix}server-proxy/servers-info")
            if status < 500:
                return status != 404  # also one that asks who is asking has it
    return None


def _status(about: dict[str, Any], path: str) -> int:
    """Of the answer to a GET of the server that says this of itself, which is not redirected, at no proxy, and by whatever certificate: it is of
    this machine. A process of its number must listen at its port: where it has ended, the port may be of somebody who is to have no token."""
    address, pid = urlsplit(str(about.get("url"))), about.get("pid")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"{address.geturl()!r} is no address of a host")
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    links = psutil.Process(pid).net_connections("tcp") if isinstance(pid, int) else []
    if not any(link.status == psutil.CONN_LISTEN and link.laddr.port == port for link in links):
        raise ValueError(f"process {pid!r} does not listen at port {port}")
    headers = {"Authorization": f"token {about.get('token') or os.environ.get('JUPYTERHUB_API_TOKEN', '')}"}
    secure = {"context": ssl._create_unverified_context()} if address.scheme == "https" else {}
    kind = HTTPSConnection if secure else HTTPConnection
    with contextlib.closing(kind(address.hostname, port, timeout=ANSWER_S, **secure)) as connection:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status


def _end_with_parent(server: Any) -> None:
    sys.stdin.read()
    server.io_loop.add_callback(server.io_loop.stop)


# -- what is on it -----------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What is known now: `live` as `run.live()` draws it, and the latest events."""

    live: LiveSeen
    latest: list[dict[str, Any]]
    staleness: dict[int, int]  # versions: merges
    status: dict[str, Any]  # of the run


class Watch(LiveWatch):
    """Also keeps the latest events, counts how stale merges were, and asks for the status."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.latest: deque[dict[str, Any]] = deque(maxlen=ROWS)
        self.staleness: dict[int, int] = {}

    def all(self) -> Seen:
        status = state_of(self.run)  # before the record is read: of a run that has ended all is there
        return Seen(self.look(), list(self.latest), dict(self.staleness), status)

    def _count(self, event: dict[str, Any]) -> None:
        super()._count(event)
        self.latest.append(event)
        if event["kind"] == "merge" and event.get("staleness") is not None:
            stale = int(event["staleness"])
            self.staleness[stale] = self.staleness.get(stale, 0) + 1


def _moving(run: Run) -> Any:
    import panel

    page, look = layout(run)
    panel.state.add_periodic_callback(look, PERIOD_MS)
    return page


def layout(run: Run) -> tuple[Any, Callable[[], None]]:
    """The page, of one browser, and what has it show what is known now."""
    import holoviews as hv
    import panel

    read, pipe = Watch(run), hv.streams.Pipe(data=None)
    seen = read.all()
    pipe.event(data=seen)
    views = [lambda data, draw=draw: draw(run, data.live) for draw in VIEWS]
    views += [lambda data: latest(run, data.latest, WINDOW_S, data.status), lambda data: _staleness(data)]
    figures = [panel.pane.HoloViews(hv.DynamicMap(view, streams=[pipe]), sizing_mode="stretch_width") for view in views]
    head, done = panel.pane.Markdown(), panel.indicators.Progress(max=1000, sizing_mode="stretch_width")
    said = panel.pane.Str("")
    stop = panel.widgets.Button(name="Stop the run")
    who = panel.widgets.Select(name="Worker", options=[worker["index"] for worker in run.config.workers], width=100)
    save = panel.widgets.Button(name="Checkpoint now")
    inspect = panel.widgets.Button(name="Inspect", align="end")
    cut = panel.widgets.Button(name="Cut its connection", align="end")
    factor = panel.widgets.FloatInput(name="times as slow, in all", value=4.0, start=1.0, end=SLOWEST, width=150)
    slow = panel.widgets.Button(name="Slow it down", align="end")
    end = panel.widgets.Button(name="Kill it", align="end", visible=not run.config.one_process)
    buttons = {
        stop: lambda: order(run, "stop"),
        save: lambda: order(run, "checkpoint", within=10.0),
        inspect: lambda: order(run, "inspect", worker=who.value, within=5.0),
        cut: lambda: order(run, "drop", workers=[who.value]),
        slow: lambda: order(run, "slow", worker=who.value, factor=factor.value),
        end: lambda: order(run, "kill", worker=who.value),
    }
    table = panel.pane.DataFrame(index=False)
    for button, act in buttons.items():
        button.on_click(lambda _, act=act: said.param.update(object=act()))
    # A browser that is slower than the run would fall behind ever further: it says when it has drawn, and then gets the next picture.
    sent, drawn = panel.widgets.IntInput(visible=False), panel.widgets.IntInput(visible=False)
    sent.jslink(drawn, value="value")
    shown = {"at": None, "ended": False, "since": 0.0}

    def look() -> None:
        if drawn.value != sent.value and time.monotonic() - shown["since"] < SLOW_S:
            return
        seen = read.all()
        status = seen.status
        head.object, table.object = heading(run, status), members(status)
        done.value = min(1000, round(1000 * status.get("samples", 0) / max(1, status.get("budget") or 1)))
        for button in buttons:
            button.disabled = status["state"] != "running"
        if read.at != shown["at"] or (status["state"] != "running") != shown["ended"]:
            shown.update(at=read.at, ended=status["state"] != "running", since=time.monotonic())
            pipe.send(seen)
            sent.value = (sent.value or 0) + 1

    look()
    controls = panel.Column(panel.Row(stop, save), panel.Row(who, inspect, cut, factor, slow, end), said)
    wide = {"sizing_mode": "stretch_width", "max_width": 1100, "margin": (10, 30)}
    return panel.Column(head, done, controls, *figures, table, sent, drawn, **wide), look


def state_of(run: Run) -> dict[str, Any]:
    """What the server of the run says; where there is none, what its record does."""
    recorded = run.recorded()
    with contextlib.suppress(LabError):
        if recorded["state"] == "running":
            return {**request(run, "status", 2.0), "state": "running"}
    return {"samples": recorded.get("samples") or 0, "budget": run.config.budget, **recorded}


def order(run: Run, op: str, **fields: Any) -> str:
    """Ask the server of the run for something; returns what is to be said about it."""
    if server_file.find(run.path) is None:
        return "The run has ended."
    now = time.strftime("%H:%M:%S")
    try:
        if op == "slow":
            slow_down(run, **fields, timeout=5.0)
            return f"From {now} on worker {fields['worker']} takes {fields['factor']:g} times as long as its machine."
        if op == "kill":
            return f"Process {kill(run, **fields, timeout=5.0)} of worker {fields['worker']} was ended at {now}."
        status = request(run, op, 5.0 + fields.get("within", 0.0), **fields)
        if op == "inspect":
            return str(inspection(status, fields["worker"], fields["within"]))
    except LabError as error:
        return str(error)
    if op == "checkpoint":
        return "Nothing was saved in time." if status.get("saved") is None else f"Version {status['saved']} is saved."
    return f"Asked for at {now}."


def heading(run: Run, status: dict[str, Any]) -> str:
    """Name, state and settings, in Markdown."""
    why = f": {status['reason']}" if status.get("reason") else ""
    note = style.caption([run], style.slowed(run, status) if status["state"] == "running" else "")
    samples = f"{status.get('samples', 0):,} of {run.config.budget:,} samples, version {status.get('version', 0)}"
    return f"## {run.label}\n\n**{status['state']}**{why} · {samples}{' · ' + note if note else ''} · `{run.path}`"


def members(status: dict[str, Any]) -> Any:
    """A row for each worker that is here."""
    import pandas as pd

    rows = sorted((status.get("workers") or {}).items(), key=lambda item: int(item[0]))
    names = {"loss": "training loss", "score": "held-out score", "passes": "local passes"}
    return pd.DataFrame([{"worker": int(index), **{names[key]: own.get(key) for key in names}} for index, own in rows])


def _staleness(seen: Seen) -> hv.Overlay:
    """How stale the merges were, of the whole run."""
    import numpy as np

    counts = seen.staleness or {0: 0}
    values, n = np.array(sorted(counts)), sum(counts.values())
    at = np.repeat(values, [counts[value] for value in values])
    title = f"Median staleness of {n:,} merges, in versions: {quantile(at, 0.5):.0f}" if n else "Staleness: nothing merged yet"
    boxes = (values - 0.4, np.zeros(len(values)), values + 0.4, np.array([counts[value] / max(1, n) for value in values]))
    element = style.boxes(boxes, 0, "share of the merges", ("from", "zero", "to", "share"))
    return style.finish(
        [element], title, legend=False, xlabel="staleness (versions)", ylabel="share of the merges", ylim=(0, 1.05),
        xlim=(-0.6, float(values.max()) + 0.6), height=1.8, shape={"aspect": 5},
    )  # fmt: skip
