"""Figures of jets are pictures, say what they show, and say so where there is nothing to draw.

Used by pytest.
"""

from __future__ import annotations

import numpy as np
import pytest

from labkit import plots
from labkit.jets.figures import embedding, masses
from tests.jets.helpers import sample
from tests.plots.helpers import title

pytestmark = pytest.mark.slow  # HoloViews is slow to load


@pytest.mark.parametrize("of", ["mass", "trimmed", "tau21"])
def test_masses_by_class(of, tmp_path):
    figure = masses(sample(), of)
    assert all(name in title(figure) for name in ("q", "g", "W", "Z", "t"))
    if of == "mass":
        assert plots.save(figure, tmp_path / "masses.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="of='tau12'"):
        masses(sample(), "tau12")


def test_embeddings_by_class(tmp_path):
    label = np.repeat([0, 1, 2], 20)
    z = np.random.default_rng(0).normal(size=(60, 3)) + 9 * np.eye(3)[label]
    figure = embedding(z, label, ("W", "Z", "t"), label[::-1], title="After clustering")
    assert title(figure) == "After clustering: 100 % of the jets are in the cluster of their class"
    assert plots.save(figure, tmp_path / "embedding.png").stat().st_size > 5_000


def test_without_jets_a_figure_is_a_message(tmp_path):
    assert plots.save(masses(sample()[:0]), tmp_path / "a.png").stat().st_size > 2_000
