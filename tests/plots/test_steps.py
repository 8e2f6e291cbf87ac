"""`plots.step_times`: a picture and a page, and a title that is the answer."""

import pandas as pd
import pytest

from labkit import plots
from tests.plots.helpers import title

ROWS = [("torch", 16, 1.0), ("samples", 16, 0.9), ("torch", 128, 1.0), ("samples", 128, 1.5)]
FRAME = pd.DataFrame(ROWS, columns=["problem", "batch_size", "speedup"])


def test_a_picture_and_a_page(tmp_path):
    FRAME.attrs |= {"threads": 1, "cores": 2}
    for frame in (FRAME, FRAME[FRAME.problem == "torch"], FRAME[FRAME.batch_size == 16], FRAME.iloc[:0]):
        figure = plots.step_times(frame, note="float32")
        assert plots.save(figure, tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        assert "Bokeh" in plots.save(figure, tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (FRAME, "samples: 1.20 times as fast as torch (median of 2 batch sizes)"),
        (FRAME[FRAME.batch_size == 128], "samples: 1.50 times as fast as torch"),
        (FRAME[FRAME.batch_size == 16], "Nothing is faster than torch"),
    ],
)
def test_its_title_is_the_answer(frame, said):
    assert title(plots.step_times(frame)) == said


def test_other_tables_are_refused():
    for wrong in (5, FRAME[["problem"]]):
        with pytest.raises((TypeError, ValueError)):
            plots.step_times(wrong)
