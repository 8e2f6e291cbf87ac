"""Membership: a row for each incarnation of a worker, and in the figure a bar and the injected faults."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.runs.events import COLUMNS
from tests.plots.helpers import Recorded, elements, title


def test_the_table_has_a_row_for_each_incarnation_and_the_figure_a_bar(run):
    def event(kind, seconds, worker=None, incarnation=0, **fields):
        return {"kind": kind, "seconds": seconds, "worker": worker, "incarnation": incarnation, **fields}

    rows = [
        event("join", np.nan, 0), event("join", np.nan, 1), event("start", 0.0), event("leave", 2.0, 1, message="it broke."),
        event("join", 3.0, 1, 1), event("join", 3.5, 2), event("resume", 4.0), event("join", 4.0, 0, 1), event("start", 4.0),
        event("join", 4.5, 1, 2), event("leave", 6.0, 0, 1), event("push", 7.0, 1, 2),
    ]  # fmt: skip
    run.events = pd.DataFrame(rows, columns=COLUMNS)
    gone = "the server was gone."
    assert sorted(run.membership().itertuples(index=False, name=None)) == [
        (0, 0, 0.0, 4.0, gone), (0, 1, 4.0, 6.0, ""), (1, 0, 0.0, 2.0, "it broke."), (1, 1, 3.0, 4.0, gone), (1, 2, 4.5, 7.0, ""),
        (2, 0, 3.5, 4.0, gone),
    ]  # fmt: skip
    faults = pd.DataFrame([(2.0, "kill", 1), (1.0, "drop", 0), (1.5, "drop", 1)], columns=["seconds", "fault", "worker"])
    figure = plots.membership(run, faults)
    bars = elements(figure, "Rectangles")
    assert {name: len(bar) for name, bar in bars.items()} == {"from the start": 2, "came later or came back": 4}
    marks = {name: len(mark) for name, mark in elements(figure, "Scatter").items() if name != "global weights"}
    assert marks == {"kill (1)": 1, "drop (2)": 2}
    above, below = (title(view) for view in figure)
    assert above.startswith("AGWU + IDPA: a worker was lost 4 times, test accuracy")
    assert below == "Who was here, and the 3 faults injected"


@pytest.mark.parametrize(
    ("n", "said"), [(0, "no worker was lost"), (1, "a worker was lost once"), (2, "a worker was lost 2 times")]
)
def test_the_titles_say_how_often_a_worker_was_lost(run, n, said):
    rows = [{"kind": "join", "seconds": 0.0, "worker": i, "incarnation": 0} for i in range(3)]
    rows += [{"kind": "leave", "seconds": 1.0, "worker": i, "incarnation": 0, "message": "it broke."} for i in range(n)]
    run.events = pd.DataFrame([*rows, {"kind": "push", "seconds": 7.0, "worker": 2, "incarnation": 0}], columns=COLUMNS)
    faults = pd.DataFrame([(1.0, "kill", i) for i in range(n)], columns=["seconds", "fault", "worker"])
    above, below = (title(view) for view in plots.membership(run, faults))
    assert above.startswith(f"AGWU + IDPA: {said}, test accuracy")
    assert below == "Who was here" + ("", ", and one fault injected", ", and the 2 faults injected")[n]


def test_faults_are_a_table(tmp_path):
    with pytest.raises(TypeError, match="a dict was given; give a pandas DataFrame with the columns seconds, fault, worker"):
        plots.membership(Recorded(tmp_path), {"worker": [1]})
