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
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs labkit[browser]")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """A page of its own; what it says in its console as an error, or fetches from elsewhere, fails the test."""
    page, wrong = browser.new_page(viewport={"width": 1200, "height": 1600}), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None)
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(HERE) else None)
    yield page
    page.close()
    assert not wrong


HERE = ("http://localhost:", "http://127.0.0.1:", "ws://localhost:", "ws://127.0.0.1:", "data:", "blob:")


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("LABKIT_SCREENSHOTS", tmp_path))

    def take(page, name):
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return take


@pytest.fixture(params=[*THEMES])
def jupyter(request, browser, tmp_path):
    """A server of notebooks in a folder with copies of labkit's; its address opens a notebook by its name."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("runs", ".*"))
    theme = {"@jupyterlab/apputils-extension:themes": {"theme": THEMES[request.param]}}
    overrides = tmp_path / "settings" / "overrides.json"
    overrides.parent.mkdir()
    overrides.write_text(json.dumps(SETTINGS | theme))
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    env |= {"LABKIT_SMALL": "1", "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    options = [
        "--no-browser",
        "--ServerApp.port=0",
        f"--LabApp.app_settings_dir={overrides.parent}",
        "--LabApp.news_url=",
        "--LabApp.expose_app_in_browser=True",
    ]
    options += ["--IdentityProvider.token=token", f"--ServerApp.root_dir={tmp_path / 'notebooks'}", "--allow-root"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
    try:
        until(lambda: [*(tmp_path / "runtime").glob("jpserver-*-open.html")], 60)  # it is written last
        (about,) = (tmp_path / "runtime").glob("jpserver-*.json")
        url = json.loads(about.read_text())["url"]
        yield lambda name: f"{url}lab/tree/{name}?token=token&reset"
    finally:
        for kernel in _kernels(url):
            stop = urllib.request.Request(f"{url}api/kernels/{kernel}?token=token", method="DELETE")
            urllib.request.urlopen(stop, timeout=30).close()
        server.terminate()
        server.wait(30)


def _kernels(url):
    with urllib.request.urlopen(f"{url}api/kernels?token=token", timeout=30) as answer:
        return [kernel["id"] for kernel in json.load(answer)]
