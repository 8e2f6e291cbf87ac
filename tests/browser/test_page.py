"""The page of a run in a browser: it moves by itself, its button stops the run, and a second tab shows the same."""

from __future__ import annotations

import pytest

import labkit
from tests.helpers import Slow, problem, until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("cache"), pytest.mark.timeout(240)]


@pytest.fixture
def run(tmp_path):
    with labkit.connect("threads", 2) as lab:
        yield labkit.train(problem(kind=Slow), lab, update="agwu", passes=2000, runs=tmp_path)


def test_it_moves_and_its_button_stops_the_run(run, page, new_page, screenshot):
    moves_and_stops(run, page, new_page(), screenshot)


def test_behind_a_hub_it_is_reached_through_the_user_s_server(run, monkeypatch, jupyter, page, new_page, screenshot):
    pytest.importorskip("jupyter_server_proxy")
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/")
    tabs = page, new_page()
    for tab in tabs:  # who has not signed in is let in nowhere
        tab.goto(f"{jupyter.url}api/status?token=token")
    moves_and_stops(run, *tabs, screenshot, jupyter.url.rstrip("/"))


def moves_and_stops(run, page, other, screenshot, server=""):
    with labkit.watch(run) as watched:
        assert watched.url.startswith("/proxy/" if server else "http://localhost:")
        page.goto(server + watched.url)
        page.get_by_text("running").wait_for(timeout=60_000)
        first = page.get_by_text("version").inner_text()
        until(lambda: page.get_by_text("version").inner_text() != first, 30)
        other.goto(server + watched.url)
        other.get_by_text("running").wait_for(timeout=60_000)
        screenshot(page, "page")
        page.get_by_role("button", name="Stop the run").click()
        for tab in (page, other):
            tab.get_by_text("stopped").wait_for(timeout=90_000)
        assert run.wait(30).state == "stopped"
