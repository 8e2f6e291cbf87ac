"""The page of a run in a browser: it moves by itself, its button stops the run, and a second tab shows the same."""

from __future__ import annotations

import pytest

import labkit
from tests.helpers import Slow, problem, until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("cache"), pytest.mark.timeout(240)]


def test_it_moves_and_its_button_stops_the_run(tmp_path, browser, page, screenshot):
    with labkit.connect("threads", 2) as lab:
        run = labkit.train(problem(kind=Slow), lab, update="agwu", passes=2000, runs=tmp_path)
        moves_and_stops(run, browser, page, screenshot)


def moves_and_stops(run, browser, page, screenshot):
    with labkit.watch(run) as watched:
        page.goto(watched.url)
        page.get_by_text("running").wait_for(timeout=60_000)
        first = page.get_by_text("version").inner_text()
        until(lambda: page.get_by_text("version").inner_text() != first, 30)
        other = browser.new_page()
        other.goto(watched.url)
        other.get_by_text("running").wait_for(timeout=60_000)
        screenshot(page, "page")
        page.get_by_role("button", name="Stop the run").click()
        for tab in (page, other):
            tab.get_by_text("stopped").wait_for(timeout=30_000)
        other.close()
        assert run.wait(30).state == "stopped"
