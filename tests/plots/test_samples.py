"""Figures of samples: every share and every picture is the right one, on both back ends, and what cannot be drawn is said."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import labkit
from labkit import plots
from labkit.errors import ProblemError
from labkit.training.run import Run
from tests.plots.helpers import Recorded, elements, title

pytestmark = pytest.mark.usefixtures("cache")
N = 40
Y = np.arange(N) % 3


class Pictures(torch.utils.data.Dataset):
    """The class is how bright a picture is; of every tenth it is another one."""

    classes = ("cat", "dog", "fox")
    targets = np.where(np.arange(N) % 10 == 4, 2, Y)

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.full((1, 4, 6), float(Y[i])), int(self.targets[i])


class Bright(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def forward(self, x):
        return -10 * (x.mean((1, 2, 3))[:, None] - self.at).abs()


class Trained(Recorded):
    """A run whose network is that of `problem`."""

    def __init__(self, path, problem):
        super().__init__(path)
        self.problem, self._network = lambda: problem, lambda version: problem.build(0)

    def opened_problem(self, what):
        return self.problem()

    tested, predictions, _on = Run.tested, Run.predictions, Run._on


@pytest.fixture
def pictures(tmp_path):
    return Trained(tmp_path, labkit.Classifier(Bright, (Pictures(), Pictures()), batch_size=8))


def test_both_are_pictures_and_pages(pictures, tmp_path):
    for name, figure in (("confusion", plots.confusion(pictures)), ("worst", plots.worst(pictures, 5))):
        assert plots.save(figure, tmp_path / f"{name}.png").stat().st_size > 5_000
        page = plots.save(figure, tmp_path / f"{name}.html").read_text()
        assert "Bokeh" in page and not re.search(r"<script[^>]* src=", page)


def test_what_each_class_is_taken_for(pictures):
    figure = plots.confusion(pictures)
    (cells,) = elements(figure, "Rectangles").values()
    shares = cells.data.to_numpy()[:, 4].reshape(3, 3)
    counts = pd.crosstab(Pictures.targets, Y).to_numpy()
    np.testing.assert_allclose(shares, 100 * counts / counts.sum(1, keepdims=True))
    assert title(figure) == f"AGWU + IDPA: fox is taken for dog most often, in {shares[2, 1]:.0f} % of its samples"
    # Two of ten cats and one of two dogs are wrong: the largest share that is drawn is what the title names.
    y, said = [0] * 10 + [1] * 2, [0] * 8 + [2] * 2 + [1, 2]
    uneven = {"x": np.ones((12, 1, 4, 6)) * np.reshape(said, (12, 1, 1, 1)), "y": y}
    assert title(plots.confusion(pictures, uneven)) == "AGWU + IDPA: dog is taken for fox most often, in 50 % of its samples"
    right = plots.confusion(pictures, {"x": np.ones((3, 1, 4, 6)), "y": [1, 1, 1]})
    assert title(right) == "AGWU + IDPA: every sample is classified correctly"


def test_the_worst_samples_come_first(pictures):
    table = pictures.predictions()
    wrong = np.flatnonzero(Pictures.targets != Y)
    assert sorted(table["sample"].head(len(wrong))) == wrong.tolist() and (table["loss"].diff().dropna() <= 0).all()
    assert (table["predicted"] == Y[table["sample"]]).all() and (table["label"] == Pictures.targets[table["sample"]]).all()
    expected = nn.functional.cross_entropy(Bright()(Pictures()[4][0][None]), torch.tensor([2])).item()
    assert table.set_index("sample")["loss"][4] == pytest.approx(expected) and table["probability"].min() > 0.99
    figure = plots.worst(pictures, 3)
    texts = [text for label in elements(figure, "Labels").values() for text in label.data["text"]]
    assert set(texts) <= {"is fox,\nsaid cat\n100 % sure", "is fox,\nsaid dog\n100 % sure"} and len(texts) == 3
    assert "3 of the 3 worst samples are of class fox" in title(figure)


def test_numbers_pixels_and_what_is_no_picture(tmp_path):
    x = np.random.default_rng(0).random((N, 1, 4, 4)).astype(np.float32)
    flat = Trained(tmp_path / "a", labkit.Regressor(nn.Linear(3, 1), (x[:, 0, 0, :3], x[:, 0, 0, 0])))
    assert list(flat.predictions()) == ["sample", "target", "loss", "predicted"]
    assert "are no pictures" in str(plots.worst(flat).traverse(lambda e: e, ["Text"])[0].data)
    with pytest.raises(ProblemError, match=r"a confusion matrix is of one label a sample.*y\.argmax\(1\)"):
        plots.confusion(flat)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    numbers = Trained(tmp_path / "b", labkit.Regressor(net, (x, x.mean((1, 2, 3)))))
    assert elements(plots.worst(numbers, 3), "RGB")
    masks = (x[:, 0] > 0.5).astype(np.uint8)
    masks[:, 0] = 255
    loss = {"name": "cross-entropy", "ignore_index": 255}
    pixels = Trained(tmp_path / "c", labkit.Classifier(nn.Conv2d(1, 2, 1), (x, masks), loss=loss))
    (cells,) = elements(plots.confusion(pixels), "Rectangles").values()
    assert cells.data.to_numpy()[:, 4].reshape(2, 2).sum(1) == pytest.approx(100)
