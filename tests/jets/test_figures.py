"""Figures of jets are pictures, say what they show, and say so where there is nothing to draw.

Used by pytest.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.jets.evaluation import table
from labkit.jets.figures import before_and_after, embedding, masses, worlds
from tests.jets.helpers import sample
from tests.plots.helpers import title

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache")]  # HoloViews is slow to load


@pytest.mark.parametrize("of", ["mass", "tau21"])
def test_masses_by_class(of):
    figure = masses(sample(), of)
    assert all(name in title(figure) for name in ("q", "g", "W", "Z", "t"))
    with pytest.raises(ValueError, match="of='tau12'"):
        masses(sample(), "tau12")


def test_embeddings_by_class():
    label = np.repeat([0, 1, 2], 20)
    z = np.random.default_rng(0).normal(size=(60, 3)) + 9 * np.eye(3)[label]
    figure = embedding(z, label, ("W", "Z", "t"), label[::-1], title="After clustering")
    assert title(figure) == "After clustering: 100 % of the jets are in the cluster of their class"


def test_without_jets_a_figure_is_a_message():
    assert title(masses(sample()[:0])) == "The masses of the jets"


def test_embeddings_before_and_after_clustering(run, tmp_path):
    figure = before_and_after(run, ("W", "Z", "t"))
    titles = [title(panel) for panel in figure]
    assert [text.partition(":")[0] for text in titles] == ["Before clustering", "After clustering"]
    assert titles[1].split()[2] == f"{100 * table(run, probes=[]).accuracy[0]:.0f}"
    assert plots.save(figure, tmp_path / "both.png").stat().st_size > 10_000


def test_speed_and_accuracy_by_workers():
    frame = pd.DataFrame({"n_workers": [1, 1, 2, 2], "samples_per_s": [100, 110, 180, 198], "accuracy": [0.7, 0.72, 0.71, 0.75]})
    figure = worlds(frame)
    assert [title(panel) for panel in figure] == [
        "2 workers train 1.80 times the jets per second of 1",
        "Accuracy of 1 to 2 workers: means 2.0 points apart, seeds up to 4.0",
    ]
    assert runs_drawn(figure) == [4, 4]
    alone = worlds(frame.drop_duplicates("n_workers"))
    assert title(alone[1]) == "Accuracy of 1 to 2 workers: 1.0 points apart"
    assert runs_drawn(alone) == [0, 0]  # the line has a mark on each
    assert title(worlds(frame[:0])) == "Speed and accuracy by workers"


def runs_drawn(figure):
    """How many marks there are of single runs on each panel."""
    return [sum(len(part) for part in panel if part.label == "a run") for panel in figure]
