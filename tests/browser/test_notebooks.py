"""Notebooks in JupyterLab, as a user has them: Run All ends without an error, figures are drawn, in both themes, and after a reload."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.usefixtures("cache"), pytest.mark.timeout(400)]

NOTEBOOKS = ["01-start-a-lab"]
STATE = """() => {
  const cells = [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === "code");
  const errors = cells.flatMap(cell => cell.outputs.toJSON()).filter(output => output.output_type === "error").map(output => output.evalue);
  return {done: cells.filter(cell => cell.executionCount).length, cells: cells.length, errors};
}"""


def open_in(page, url):
    page.goto(url, wait_until="domcontentloaded")
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").first.wait_for(timeout=120_000)  # before it Run All is dropped


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_run_all_draws_what_is_there_after_a_reload(name, jupyter, page, screenshot, request):
    open_in(page, jupyter(f"{name}.ipynb"))
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(
        f"() => {{ const state = ({STATE})(); return state.errors.length || state.done === state.cells }}", timeout=240_000
    )
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").first.wait_for(timeout=60_000)
    assert page.evaluate(STATE)["errors"] == []
    assert page.locator(".jp-OutputArea-output canvas, .jp-OutputArea-output img").count() >= 1
    assert page.get_by_text("Error displaying widget").count() == 0
    screenshot(page, f"{name}-{request.node.callspec.params['jupyter']}")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    open_in(page, page.url)
    assert page.evaluate(STATE)["errors"] == []
    assert page.locator(".jp-OutputArea-output canvas, .jp-OutputArea-output img").count() >= 1
    screenshot(page, f"{name}-{request.node.callspec.params['jupyter']}-reloaded")
