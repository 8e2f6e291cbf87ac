"""Scaling curves hold what their table holds, and their titles say what was found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from tests.plots.helpers import elements, title


def times(x="n_workers"):
    """Two strategies at three places, the first twice as quick; rows in no order."""
    rows = [{"strategy": s, x: n, "seconds": k / n} for n in (5, 1, 30) for s, k in (("AGWU + IDPA", 30.0), ("SGWU + UDPA", 60.0))]
    return pd.DataFrame(rows)


def crowds(*limits):
    """Throughput of servers that can take 10 pushes of 3 samples a second, or as many as they are given."""
    return pd.DataFrame(
        {"label": f"{limit} at most", "n_workers": n, "samples_per_s": 3.0 * min(n, limit), "server_busy": min(1.0, n / limit)}
        for limit in limits
        for n in (1, 9, 40, 1000)
    )


def off():
    """Two configurations, three runs each; the first is 20 % off."""
    errors = {"AGWU + IDPA, 1:4": [-0.4, 0.2, 0.24], "SGWU + UDPA, 1:1": [0.06, -0.08, 0.3]}
    return pd.DataFrame([{"configuration": name, "error": error} for name, own in errors.items() for error in own])


FIGURES = {
    "scaling": lambda: plots.scaling(times()),
    "saturation": lambda: plots.saturation(crowds(10, 5000), "simulated"),
    "errors": lambda: plots.errors(off(), note="simulated"),
}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_each_is_a_picture_and_a_page(figure, tmp_path):
    assert plots.save(figure(), tmp_path / "figure.png").stat().st_size > 5_000
    assert "Bokeh" in plots.save(figure(), tmp_path / "figure.html").read_text()


def test_scaling_holds_the_table_and_its_title_the_quickest_at_its_end():
    figure = plots.scaling(times("samples"), "samples")
    curve = elements(figure, "Curve")["AGWU + IDPA"]
    assert curve["samples"].tolist() == [1, 5, 30] and curve["seconds"].tolist() == [30.0, 6.0, 1.0]
    assert title(figure) == "AGWU + IDPA takes 1.0 s with 30 samples, SGWU + UDPA 2.0 times as long"
    assert title(plots.scaling(times().iloc[::2])) == "AGWU + IDPA takes 1.0 s with 30 workers"


def test_saturation_shows_from_where_on_the_server_is_busy():
    figure = plots.saturation(crowds(10, 40, 5000))
    assert title(figure) == "10 at most: from 9 workers on the server is busy all the time"
    busy = {"10 at most: busy from 9 workers on", "40 at most: busy from 40 workers on", "5000 at most: never busy all the time"}
    assert set(elements(figure, "Curve")) == busy
    assert title(plots.saturation(crowds(5000))) == "The server can take all 1,000 workers"


def test_errors_are_counted_by_configuration():
    figure = plots.errors(off())
    assert title(figure) == "1 of 2 configurations within 10 %: median 13.0 %"
    marks = elements(figure, "Scatter")
    assert np.allclose(marks["a run"].array().T, [[-40, 20, 24, 6, -8, 30], [0, 0, 0, -1, -1, -1]])
    assert np.allclose(marks["median of a configuration"].array().T, [[20, 6], [0, -1]])


def test_what_cannot_be_drawn_is_refused_or_a_message():
    with pytest.raises(ValueError, match="x='epochs' is not known"):
        plots.scaling(times(), "epochs")
    with pytest.raises(ValueError, match=r"the frame has no column samples\. It has: strategy, n_workers, seconds"):
        plots.scaling(times(), "samples")
    with pytest.raises(ValueError, match=r"several rows of the frame have strategy .* n_workers .*Say in strategy what differs"):
        plots.scaling(pd.concat([times(), times()]))
    with pytest.raises(ValueError, match="must hold numbers alone"):
        plots.saturation(crowds(10).assign(server_busy=None))
    for figure in (plots.scaling(times().iloc[:0]), plots.saturation(crowds(10).iloc[:0]), plots.errors(off().iloc[:0])):
        assert "no run" in next(iter(figure.traverse(lambda text: text.data[2], ["Text"])))
