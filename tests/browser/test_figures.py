"""A saved figure in a browser without a network: title and note are broken into lines where the page is narrow, and nothing is fetched."""

from __future__ import annotations

import pytest

from labkit import plots
from labkit.plots import style

pytestmark = pytest.mark.slow
TITLE = "1 of 2 trials are worth a choice: score from 0.108 to 0.108, size from 43,531 to 43,531, and both are on the front"
NOTE = "of whether a trial is among the best tenth; 4 trials, too few for more than a rough guess of what matters"
# How many lines title and note have, and by how many pixels the widest of them is too wide for the frame.
LINES = """() => [...Bokeh.index.roots].flatMap(view => [...view.model.references()]).filter(model => model.type === "Figure")
  .flatMap(figure => [figure.title, ...figure.above.filter(above => above.name === "note")].map(title => {
    const pen = document.createElement("canvas").getContext("2d")
    pen.font = `${title.text_font_style} ${title.text_font_size} ${title.text_font}`
    const lines = title.text.split("\\n")
    return {lines, beyond: Math.max(...lines.map(line => pen.measureText(line).width)) - figure.inner_width}
  }))"""

# Pixels of the first rows that are not white: of a title that is cut at the top.
CUT = """() => {
  const all = element => [element, ...[...(element.shadowRoot?.children ?? []), ...element.children].flatMap(all)]
  return all(document.body).filter(element => element.tagName === "CANVAS").reduce((sum, canvas) => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, 2)
    return sum + data.filter((value, i) => i % 4 < 3 && data[i - i % 4 + 3] > 0 && value < 128).length
  }, 0)
}"""


@pytest.mark.parametrize("note", [NOTE, NOTE[:20]])
def test_title_and_note_are_as_wide_as_the_frame_at_most(note, tmp_path, new_page, screenshot):
    plots.extension("interactive")
    try:
        figure = style.finish([style.line([0, 1], [0, 1], 0, "a", ("x", "y"))], TITLE, note)
        file = plots.save(figure, tmp_path / "figure.html")
    finally:
        plots.extension("static")
    page = new_page()
    page.set_viewport_size({"width": 500, "height": 700})
    page.goto(file.as_uri())
    narrow = "() => Bokeh.index.roots?.length && ({lines})().every(title => title.beyond <= 0)"
    page.wait_for_function(narrow.replace("{lines}", LINES), timeout=20_000)
    assert [" ".join(title["lines"]) for title in page.evaluate(LINES)] == [TITLE, note]
    page.wait_for_timeout(500)  # and it is drawn
    screenshot(page, f"narrow-{len(note)}")
    assert page.evaluate(CUT) == 0
    page.set_viewport_size({"width": 1300, "height": 700})
    page.wait_for_function(f"() => ({LINES})().every(title => title.lines.length === 1 && title.beyond <= 0)", timeout=20_000)


def test_titles_are_whole_however_a_page_is_resized(tmp_path, new_page):
    titles = [
        "340 cells are hit in a generated shower, 330 in a simulated one",
        "The sampling fraction by energy is 2 layers off at most",
    ]
    plots.extension("interactive")
    try:
        panels = [style.finish([style.line([0, 1], [0, 10.0**k], 0, "a", ("x", "y"))], titles[k % 2], height=2.8) for k in range(4)]
        file = plots.save(style.stack(panels), tmp_path / "figure.html")
    finally:
        plots.extension("static")
    page = new_page()
    page.goto(file.as_uri())
    page.wait_for_function("() => Bokeh.index.roots?.length", timeout=20_000)
    for width in range(641, 800, 12):
        for beside in (3, -3, 4, 0):  # there and back before it is drawn
            page.set_viewport_size({"width": width + beside, "height": 2000})
        page.wait_for_timeout(400)
        assert page.evaluate(CUT) == 0, width
