"""The live view in JupyterLab: it moves, and ends with what the record says, also in a second tab, after a reload, and when it is run again."""

from __future__ import annotations

import json

import pytest

from tests.browser.conftest import soon

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]

CELLS = [
    "import asyncio, json, pathlib\nimport labkit\nlab = labkit.connect('threads', 2)",
    "settings = {'data': 'digits', 'train_samples': 600, 'test_samples': 60, 'score_samples': 64}\n"
    "problem = labkit.Classifier('lenet', **settings)",
    "enough = pathlib.Path('enough')\nenough.unlink(missing_ok=True)\n"
    "run = labkit.train(problem, lab, update='agwu', partition='udpa', passes=100_000, local_steps=8, runs='runs/live')",
    "run.live()",
    "while not enough.exists():\n    await asyncio.sleep(0.1)\nrun.stop()",
    "pushes = run.events.query('kind == \"push\"')\n"
    "last = [own[['seconds', 'score']].ffill().iloc[-1].tolist() for _, own in pushes.groupby('worker')]\n"
    "print(json.dumps(last))",
]
# The last point of each line of the figures in sight, by figure, and the titles.
SHOWN = """() => [...(window.Bokeh?.index?.roots ?? [])].filter(view => view.el?.isConnected)
  .flatMap(view => [...view.model.references()].filter(model => model.type === "Figure")).map(figure => ({
    title: figure.title.text,
    lines: figure.renderers.filter(r => r.glyph?.type === "Line").map(({glyph, data_source}) =>
      [glyph.x.field, glyph.y.field].map(name => [...(data_source.data[name] ?? [])].at(-1) ?? null)),
  }))"""
LAST = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].at(-1).outputs.toJSON().map(output => output.text).join("")"""


def scores(page):
    """The last point of each worker's line of held-out scores."""
    shown = page.evaluate(SHOWN)
    return shown[0]["lines"] if len(shown) == 3 else []


def begun(page):
    """The view moves."""
    first = soon(page, lambda: [line for line in scores(page) if line[0]], 120)
    assert first and soon(page, lambda: (now := scores(page)) and now != first), "it moves"


def ends(jupyter, page, *others):
    """The run is stopped: each page shows the last push of each worker."""
    (jupyter.folder / "enough").touch()
    assert soon(page, lambda: page.evaluate(LAST)), page.evaluate(SHOWN)
    last = json.loads(page.evaluate(LAST))
    for tab in (page, *others):
        shows(tab, last)
    return last


def shows(tab, last):
    assert soon(tab, lambda: scores(tab) == last, 40), (last, tab.evaluate(SHOWN))
    assert f"after {max(seconds for seconds, _ in last):.0f} s" in tab.evaluate(SHOWN)[0]["title"].replace("\n", " ")


def test_it_moves_and_ends_with_the_last_picture_also_in_a_second_tab_after_a_reload_and_when_it_is_run_again(
    jupyter, page, new_page, screenshot
):
    jupyter.write("live.ipynb", CELLS)
    jupyter.open(page, "live.ipynb")
    run_all = "void window.jupyterapp.commands.execute('notebook:run-all-cells')"
    page.evaluate(run_all)
    begun(page)
    screenshot(page, "live")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    other = new_page()
    other.goto(f"{jupyter.url}lab/workspaces/other/tree/live.ipynb?token=token&reset", wait_until="domcontentloaded")
    begun(other)
    last = ends(jupyter, page, other)
    other.close()
    jupyter.open(page, "live.ipynb")  # as it was saved while the run went
    shows(page, last)
    screenshot(page, "live-reloaded")
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate(run_all)
    begun(page)
    ends(jupyter, page)
