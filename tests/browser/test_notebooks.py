"""Notebooks in JupyterLab, as a user has them: Run All ends without an error, figures are drawn, in both themes, and after a reload."""

from __future__ import annotations

import json

import pytest

from tests.test_notebooks import FIGURES, TINY

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]

NOTEBOOKS = sorted(name for name in TINY if not name.startswith("benchmarks/"))
WITHOUT = {"00-bring-your-own-model": {"grid": {}}}  # its sweep of itself is a test of the sweep
STATE = """() => {
  const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === "code");
  const errors = cells.flatMap(cell => cell.outputs.toJSON()).filter(output => output.output_type === "error").map(output => output.evalue);
  return {done: cells.filter(cell => cell.executionCount).length, cells: cells.length, errors};
}"""
# Of the figures in sight: how they are described, how tall they are, and how many of their pixels are not white.
DRAWN = """() => {
  const inked = canvas => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let n = 0;
    for (let i = 0; i < data.length; i += 4) n += data[i + 3] > 0 && Math.min(data[i], data[i + 1], data[i + 2]) < 250;
    return n;
  };
  const all = element => [element, ...[...(element.shadowRoot?.children ?? []), ...element.children].flatMap(all)];
  const found = [...document.querySelectorAll(".jp-OutputArea-output")].flatMap(all);
  const figures = found.filter(e => e.classList.contains("bk-Figure"));
  return {
    images: found.filter(e => e.tagName === "IMG").length,
    figures: figures.map(e => ({
      label: e.getAttribute("role") === "img" ? e.getAttribute("aria-label") : null,
      height: Math.round(e.getBoundingClientRect().height),
      ink: all(e).filter(x => x.tagName === "CANVAS").reduce((sum, canvas) => sum + inked(canvas), 0),
    })),
  };
}"""


def run_all(page, limit=240_000):
    page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    ended = f"() => {{ const state = ({STATE})(); return state.errors.length || state.done === state.cells }}"
    page.wait_for_function(ended, timeout=limit)
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").first.wait_for(timeout=60_000)
    assert page.evaluate(STATE)["errors"] == []


def check_figures(page, least):
    """They are drawn, and each says what it shows; nothing could not be displayed."""
    page.wait_for_function(f"() => {{ const {{figures, images}} = ({DRAWN})(); return figures.length + images >= {least} }}")
    page.wait_for_timeout(500)
    drawn = page.evaluate(DRAWN)
    assert all(figure["ink"] > 1000 for figure in drawn["figures"]), drawn
    assert all(figure["label"] for figure in drawn["figures"]), drawn
    assert page.get_by_text("Error displaying widget").count() == 0
    return drawn


def looks(drawn):
    return [(figure["label"], figure["height"]) for figure in drawn["figures"]]


def with_tiny_values(jupyter, name):
    """The notebook with the small values of the tests in a cell below its parameters."""
    path = jupyter.folder / f"{name}.ipynb"
    book = json.loads(path.read_text())
    values = TINY[name] | WITHOUT.get(name, {})
    at = next(i for i, cell in enumerate(book["cells"]) if "parameters" in cell["metadata"].get("tags", []))
    source = "\n".join(f"{key} = {value!r}" for key, value in values.items())
    cell = {"cell_type": "code", "id": "tiny", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
    book["cells"].insert(at + 1, cell)
    path.with_name(f"tiny-{name}.ipynb").write_text(json.dumps(book))
    return f"tiny-{name}.ipynb"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_draws_figures_in_both_themes_that_are_there_after_a_reload(name, jupyter, page, screenshot):
    jupyter.open(page, book := with_tiny_values(jupyter, name))
    run_all(page)
    drawn = check_figures(page, len(FIGURES[name]))
    screenshot(page, f"{name}-light")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    jupyter.open(page, book)
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.locator("body[data-jp-theme-light=false]").wait_for(state="attached")
    assert page.evaluate(STATE)["errors"] == []
    assert looks(check_figures(page, len(FIGURES[name]))) == looks(drawn)
    screenshot(page, f"{name}-dark")
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    page.locator("body[data-jp-theme-light=true]").wait_for(state="attached")
