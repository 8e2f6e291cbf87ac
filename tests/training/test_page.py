"""The page of a run: nobody without its address gets an answer, it shows what goes on, its buttons work, and it ends with its kernel."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

import labkit
from labkit.errors import RunError
from labkit.plots import style
from labkit.training import page as pages
from labkit.training.page import WINDOW_S, Watch, layout, state_of
from tests.helpers import Slow, ended, problem, until
from tests.plots.helpers import title

pytestmark = pytest.mark.usefixtures("cache")


def fetched(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_page_is_for_those_who_have_its_address_and_ends_with_its_kernel(train):
    run = ended(train(problem(), passes=1))
    with labkit.watch(run) as page:
        status, text = fetched(page.url)
        assert status == 200 and f"labkit: {run.name}" in text and "http://" not in text and "https://" not in text
        bare = page.url.partition("?")[0]
        assert {fetched(bare)[0], fetched(bare + "?bokeh-session-id=guessed")[0], fetched(page.url[:-4] + "AAAA")[0]} == {403}
        assert os.getpgid(page._process.pid) != os.getpgrp(), "an interrupt of the kernel is not for the page"
        (listening,) = {c.laddr.ip for c in psutil.Process(page._process.pid).net_connections() if c.status == "LISTEN"}
        assert listening == "127.0.0.1"
    assert page._process.poll() == 0
    script = f"import labkit, time\npage = labkit.watch({str(run.path)!r})\nprint(page._process.pid, flush=True)\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as kernel:
        child = psutil.Process(int(kernel.stdout.readline()))
        os.kill(kernel.pid, signal.SIGKILL)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30)


@contextlib.contextmanager
def jupyter_server(runtime, status):
    """Answers with this status at the path of jupyter-server-proxy, and keeps what it was asked for."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_response(status)
            self.send_header("Location", "/user/ada/login")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        about = {
            "base_url": "/user/ada/",
            "url": f"http://127.0.0.1:{server.server_port}/user/ada/",
            "token": "",
            "pid": os.getpid(),
        }
        (runtime / "jpserver-1.json").write_text(json.dumps(about))
        try:
            yield asked
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "here", "there"), [(200, False, True), (302, False, True), (404, True, False), (503, True, True)]
)
def test_the_server_of_a_hub_says_whether_it_passes_on_to_ports(status, here, there, tmp_path, monkeypatch):
    """It may be of another environment than the kernel; where it does not answer, what is installed here counts."""
    pytest.importorskip("jupyter_core")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "secret")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if here else None)
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
    other = {"base_url": "/user/bob/", "url": "http://127.0.0.1:9/user/bob/"}
    for name, about in (("0", other), ("2", "a text"), ("3", other | {"base_url": "/user/ada/", "url": "http+unix://socket"})):
        (tmp_path / f"jpserver-{name}.json").write_text(json.dumps(about))
    with jupyter_server(tmp_path, status) as asked:
        assert pages._hub() == "" and not asked
        monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
        assert pages._hub() == ("/user/ada/" if there else "")
    assert asked == [("/user/ada/server-proxy/servers-info", "token secret")]
    assert pages._hub() == ("/user/ada/" if here else ""), "of a server that has gone"


@pytest.mark.parametrize("pid", [None, "1", -1, 2**40, os.getppid()])
def test_no_token_is_sent_to_who_has_the_port_of_a_server_that_has_ended(pid, tmp_path, monkeypatch):
    pytest.importorskip("jupyter_core")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "secret")
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ada/")
    with jupyter_server(tmp_path, 200) as asked:
        left = tmp_path / "jpserver-1.json"
        left.write_text(json.dumps(json.loads(left.read_text()) | {"pid": pid}))
        pages._hub()
    assert not asked


def test_what_is_no_run_has_no_page(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        labkit.watch(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="timeout"):
        labkit.watch(tmp_path, timeout="soon")


@pytest.fixture
def interactive(monkeypatch):
    """Figures by bokeh, and afterwards by matplotlib again."""
    style.extension("interactive")
    yield
    style.extension("static")


def test_a_page_shows_a_run_and_its_buttons_cut_a_connection_and_stop_it(train, interactive):
    run = train(problem(kind=Slow), update="agwu", passes=1000)
    until(lambda: run.status()["version"] >= 3)
    page, look = layout(run)
    head, _, controls, *figures, table, sent, drawn = page
    (stop, save), (who, inspect, cut, factor, slow, end), said = controls
    assert "**running**" in head.object and str(run.path) in head.object and [*table.object.worker] == [0, 1] == who.options
    titles = [title(figure.object[()]) for figure in figures]
    assert "held-out score" in titles[0] and "2 workers here" in titles[2] and "last" in titles[3] and "staleness" in titles[4]
    who.value, cut.clicks = 1, 1
    until(lambda: len(run.events.query("kind == 'join' and worker == 1")) == 2)
    assert "Asked for" in said.object
    save.clicks = inspect.clicks = 1
    until(lambda: "Worker 1: process" in said.object)
    factor.value, slow.clicks = 3.0, 1
    look()
    drawn.value = sent.value
    look()
    assert (
        "worker 1 set from 1x to 3x in mid-run" in head.object
        and "worker 1 takes 3 times as long" in said.object
        and not end.visible
    )
    assert "worker 1 (1x, then 3x)" in str(figures[3].object[()].opts.get().kwargs["yticks"])
    stop.clicks = 1
    until(lambda: run.state == "stopped")
    look()
    assert "**running**" in head.object, "the browser has not drawn yet"
    drawn.value = sent.value
    look()
    assert "**stopped**" in head.object and stop.disabled and cut.disabled
    stop.clicks = 2
    assert said.object == "The run has ended."
    assert state_of(run)["state"] == "stopped"


def test_the_events_that_a_page_keeps_are_bounded(train, monkeypatch):
    monkeypatch.setattr("labkit.training.page.ROWS", 10)
    run = ended(train(problem(), update="agwu", passes=4))
    seen = Watch(run).all()
    assert len(seen.latest) == 10 < len(run.events)
    assert sum(seen.staleness.values()) == len(run.events.query("kind == 'merge'"))
    assert labkit.plots.runs.latest(run, seen.latest, WINDOW_S) is not None
