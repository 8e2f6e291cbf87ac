"""The gallery in a browser without a network: filters, front, detail and themes, by mouse and keyboard, and a run's name is text."""

from __future__ import annotations

import re

import numpy as np
import pytest

from labkit.experiments.gallery import _card, _curves
from labkit.plots.gallery import Row, write
from labkit.runs.record import RunRecord
from tests.experiments.test_gallery import EVIL
from tests.runs.test_old_records import FOLDER

pytestmark = pytest.mark.slow
N = 200
SOURCES = "format-2-agwu", "format-3-resumed", "format-2-bfloat16", "format-2-stopped"


@pytest.fixture(scope="module")
def rows():
    """Of a few small runs as many rows, each with settings and results of its own."""
    made, read = [], [(run, *_card(run)[:2], _curves([run])) for run in (RunRecord(FOLDER / name) for name in SOURCES)]
    for number in range(N):
        run, state, results, curves = read[number % len(read)]
        settings = {"strategy": run.label, "lr": 1e-4 * 1.04**number, "batch_size": (16, 32, 64)[number % 3]}
        results = results | {
            "score": (results["score"] or 0.1) * (1 + number % 7) / 7,
            "seconds": results["seconds"] * (1 + number % 11),
        }
        made.append(Row(EVIL if number == 7 else f"run-{number:03d}", state, settings, results, curves))
    return made


@pytest.fixture(scope="module")
def gallery(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows[3].links["notebook"] = folder / "run-003" / "notebook.ipynb"
    return write(folder / "gallery.html", "many", "", rows)


@pytest.fixture
def page(browser, gallery):
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, offline=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(gallery.as_uri())
    page.locator("body[data-ready]").wait_for(timeout=20_000)
    yield page
    context.close()
    assert not wrong


def count(page):
    return page.locator("#count").inner_text()


def test_it_shows_all_filters_by_text_choice_range_and_brush_and_takes_them_back(page, screenshot):
    assert count(page) == f"{N} of {N} runs" and page.locator("#cards li").count() == N
    assert page.evaluate("typeof hacked") == "undefined" and page.get_by_text(EVIL).count() >= 1
    page.get_by_label("Text in name").fill("nothing fedbuff batch_size=32")
    assert count(page) == f"0 of {N} runs"
    page.get_by_label("Text in name").fill("fedbuff batch_size=32")
    assert page.locator("#table tbody tr:visible").count() == int(count(page).split()[0]) in range(10, 30)
    page.get_by_role("button", name="Show all", exact=True).click()
    page.get_by_role("group", name="batch_size").get_by_label("64").press("Space")
    left = int(count(page).split()[0])
    assert left in (N * 2 // 3, N * 2 // 3 + 1)
    page.get_by_label("lowest lr").fill("0.01")
    assert int(count(page).split()[0]) < left
    page.get_by_role("button", name="Show all", exact=True).click()
    assert count(page) == f"{N} of {N} runs"
    box = page.locator("#parallel .reach").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.6, steps=4)
    page.mouse.up()
    assert 0 < int(count(page).split()[0]) < N
    screenshot(page, "gallery")


def front_on(page):
    return [(float(x), float(y)) for x, y in re.findall(r"\(([\d.e-]+), ([\d.e-]+)\)", page.locator("#front-said").inner_text())]


def test_the_front_is_that_of_what_is_shown_and_its_senses_can_be_turned(page, rows):
    points = {(row.results["seconds"], row.results["score"]) for row in rows}
    front = sorted(p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points))
    shown = front_on(page)
    assert np.allclose(sorted({*shown}), front[: len({*shown})], rtol=1e-3) and len(shown) > 1
    page.locator("#front-choices").get_by_label("less is better").last.check()
    assert front_on(page)[-1][1] == pytest.approx(min(q for _, q in points), rel=1e-3)
    assert page.locator("#front").get_attribute("aria-label") == page.locator("#front-said").inner_text()
    page.get_by_label("Text in name").fill("no such run")
    assert page.locator("#front-said").inner_text() == "Nothing is on the front."


def test_a_run_is_chosen_by_key_sorted_and_leads_to_its_notebook(page):
    page.locator("#cards button").nth(3).press("Enter")
    assert page.locator("#detail h2").inner_text().startswith("run-003")
    assert page.locator("#detail").get_by_role("link", name="notebook").get_attribute("href") == "./run-003/notebook.ipynb"
    for _ in range(2):
        page.locator("#table").get_by_role("button", name="score").click()
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("score")
    column = [*page.locator("#table thead th").all_inner_texts()].index("score")
    scores = [float(row.split("\t")[column]) for row in page.locator("#table tbody tr").all_inner_texts()[:5]]
    assert scores == sorted(scores, reverse=True)


def test_it_has_both_themes(page):
    def ground():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    page.get_by_role("button", name="Light or dark").click()
    assert light != dark and ground() == light
