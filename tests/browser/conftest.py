"""A JupyterLab server on loopback and a Chromium that opens it: what the tests of this folder share.

They are skipped where Playwright (the extra `browser`) or a Chromium is missing. Screenshots go to the folder that LABKIT_SCREENSHOTS
names, else to pytest's temporary one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.helpers import until

ROOT = Path(__file__).parents[2]
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
)
SETTINGS = {  # of JupyterLab: every output is drawn, also one that is not in sight; no news are fetched
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True},
}
OTHERS = ("Comm not found", "Exception opening new comm")  # JupyterLab of a comm of the other page, also beside an empty notebook
HERE = ("file:", "http://localhost:", "http://127.0.0.1:", "ws://localhost:", "ws://127.0.0.1:", "data:", "blob:")


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs labkit[browser]")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


def is_wrong(message):
    return message.type == "error" and not message.text.startswith(OTHERS)


def soon(page, condition, limit=60.0):
    """Poll a page, which goes on meanwhile, until the condition holds, for at most `limit` seconds; returns what it was last."""
    end = time.monotonic() + limit
    while not (found := condition()) and time.monotonic() < end:
        page.wait_for_timeout(100)
    return found


@pytest.fixture
def new_page(browser):
    """Makes pages; what one says in its console as an error, or fetches from elsewhere, fails the test."""
    pages, wrong = [], []

    def make():
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        page.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(HERE) else None)
        pages.append(page)
        return page

    yield make
    for page in pages:
        page.close()
    assert not wrong


@pytest.fixture
def page(new_page):
    return new_page()


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("LABKIT_SCREENSHOTS", tmp_path))

    def take(page, name):
        folder.mkdir(parents=True, exist_ok=True)
        size = page.viewport_size
        height = page.evaluate("Math.max(0, ...[...document.querySelectorAll('.jp-WindowedPanel-outer')].map(e => e.scrollHeight))")
        page.set_viewport_size(
            {**size, "height": min(16_000, max(size["height"], height + 200))}
        )  # a notebook scrolls inside of the page
        page.evaluate("document.querySelectorAll('.jp-WindowedPanel-outer').forEach(e => e.scrollTop = 0)")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{name}.png", full_page=True)
        page.set_viewport_size(size)

    return take


class Jupyter:
    """A server of the notebooks in `folder`; `open` shows one in a page, with a kernel of its own, and waits until it is ready."""

    def __init__(self, url, folder):
        self.url, self.folder = url, folder

    def open(self, page, name, workspace="auto"):
        page.goto(f"{self.url}lab/workspaces/{workspace}/tree/{name}?token=token&reset", wait_until="domcontentloaded")
        page.locator(".jp-StatusBar-TextItem", has_text="| Idle").first.wait_for(timeout=120_000)  # before it Run All is dropped

    def write(self, name, sources):
        """A notebook of code cells."""
        cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
        cells = [{**cell, "id": f"cell-{number}", "source": source} for number, source in enumerate(sources)]
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        book = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}
        (self.folder / name).write_text(json.dumps(book))

    def end_kernels(self):
        with urllib.request.urlopen(f"{self.url}api/sessions?token=token", timeout=30) as answer:
            sessions = json.load(answer)
        for session in sessions:
            request = urllib.request.Request(f"{self.url}api/sessions/{session['id']}?token=token", method="DELETE")
            urllib.request.urlopen(request, timeout=60).close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One for all tests of a file."""
    folder = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("runs", ".*"))
    cache = tmp_path_factory.getbasetemp() / "labkit-cache"  # as that of the fixture `cache`
    cache.mkdir(exist_ok=True)
    overrides = folder / "settings" / "overrides.json"
    overrides.parent.mkdir()
    overrides.write_text(json.dumps(SETTINGS))
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    env |= {"LABKIT_SMALL": "1", "LABKIT_CACHE": str(cache), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    options = [
        "--no-browser",
        "--ServerApp.port=0",
        f"--LabApp.app_settings_dir={overrides.parent}",
        "--LabApp.news_url=",
        "--LabApp.expose_app_in_browser=True",
    ]
    options += ["--IdentityProvider.token=token", f"--ServerApp.root_dir={folder / 'notebooks'}", "--allow-root"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    try:
        until(lambda: [*(folder / "runtime").glob("jpserver-*-open.html")], 60)  # it is written last
        (about,) = (folder / "runtime").glob("jpserver-*.json")
        yield Jupyter(json.loads(about.read_text())["url"], folder / "notebooks")
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def jupyter(server):
    """The server, whose kernels end with the test."""
    yield server
    server.end_kernels()
