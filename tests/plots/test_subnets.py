"""Figures of subnets: every frame is where its subdomain is, every number is the right one, and both back ends can draw them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import holoviews as hv
import numpy as np
import pandas as pd
import pytest

from labkit import plots
from labkit.errors import ProblemError
from labkit.plots import style
from labkit.subnets.decomposition import Decomposition
from tests.plots.helpers import elements, title


def image(shape=(1, 12, 16)):
    return np.random.default_rng(0).integers(255, size=shape).astype(np.uint8)


def joined(grid=(2, 3), shape=(1, 12, 15), baselines=("global CNN",)):
    """What the figures read of trained subnets."""
    decomposition = Decomposition(grid, 1)
    parts = [{"part": i, "accuracy": 0.5 + 0.01 * i, "seconds": 3.0 + 0.1 * i} for i in range(decomposition.n_parts)]
    times = {"CNN-DNN": parts[-1]["seconds"] + 0.5} | dict.fromkeys(baselines, 20.0)
    rows = [{"model": model, "seconds": seconds, "wall_s": 2 * seconds} for model, seconds in times.items()]
    config = {
        "shape": list(shape),
        "n_workers": 2,
        "synthetic": True,
        "emulated": True,
        "jitter": 0.0,
        "drift": 0.0,
        "stalls": None,
    }
    config["workers"] = [{"index": 0, "slowdown": 1.0}, {"index": 1, "slowdown": 4.0}]
    return SimpleNamespace(
        decomposition=decomposition, part_rows=parts, rows=rows, config=config, summary=lambda: {"accuracy": 0.93}
    )  # fmt: skip


def scores():
    """Two settings, two networks, three seeds; one network was not trained in the second setting."""
    values = {("a", "joined"): [0.5, 0.7, 0.6], ("a", "whole"): [0.8, 0.9, 0.75], ("b", "joined"): [0.4, 0.4, 0.1]}
    rows = [(setting, seed, net, score) for (setting, net), found in values.items() for seed, score in enumerate(found)]
    return pd.DataFrame(rows, columns=["setting", "seed", "network", "accuracy"])


FIGURES = {
    "scores": lambda: plots.part_scores(scores()),
    "decomposition": lambda: plots.decomposition(Decomposition((3, 2), 1), image()),
    "volume": lambda: plots.decomposition(Decomposition((2, 1, 3)), image((2, 5, 9, 9))),
    "accuracy": lambda: plots.part_accuracy(joined()),
    "times": lambda: plots.part_times(joined()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_picture_and_a_page(name, tmp_path):
    assert plots.save(FIGURES[name](), tmp_path / "figure.png").stat().st_size > 5_000
    page = plots.save(FIGURES[name](), tmp_path / "figure.html").read_text()
    assert "Bokeh" in page and not re.search(r"<script[^>]* src=", page)


def test_every_frame_lies_just_inside_its_part():
    decomposition, sample = Decomposition((4, 3), 1), image()
    figure = plots.decomposition(decomposition, sample)
    frames = figure.traverse(lambda element: element, ["Curve"])
    numbers = [label.data["text"].iloc[0] for label in figure.traverse(lambda element: element, ["Labels"])]
    assert len(frames) == 12 and numbers == [str(part) for part in range(12)]
    for (down, across), frame in zip(decomposition.windows(sample.shape), frames, strict=True):
        left, right, top, bottom = (*frame.range("x"), *frame.range("y"))
        assert across.start < left < across.start + 1 and across.stop - 1 < right < across.stop
        assert down.start < top < down.start + 1 and down.stop - 1 < bottom < down.stop
    assert title(figure) == "12 parts of 5 x 7 pixels, overlap 1"
    assert np.array_equal(next(iter(elements(figure, "Image").values())).data["value"], sample[0])


def test_of_a_volume_the_parts_that_meet_the_middle_slice_are_drawn():
    figure = plots.decomposition(Decomposition((2, 1, 3)), image((2, 5, 9, 9)))
    numbers = [label.data["text"].iloc[0] for label in figure.traverse(lambda element: element, ["Labels"])]
    assert numbers == ["3", "4", "5"] and title(figure) == "6 parts of 3 x 9 x 3 pixels, overlap 0"
    maps = plots.part_accuracy(joined((2, 1, 3), (1, 5, 9, 9)))
    assert len(elements(maps, "Rectangles")[""]) == 3
    assert title(maps) == "Alone, part 5 reaches 55.0 %, part 3 53.0 %"


def test_the_map_and_the_bars_hold_the_numbers(tmp_path):
    figure = plots.part_accuracy(joined())
    (cells,) = elements(figure, "Rectangles").values()
    assert list(cells["accuracy (%)"]) == pytest.approx([50, 51, 52, 53, 54, 55])
    assert list(cells["left"]) == [0, 5, 10] * 2 and list(cells["top"]) == [6] * 3 + [12] * 3
    assert title(figure) == "Alone, part 5 reaches 55.0 %, part 0 50.0 %"
    bars = plots.part_times(joined())
    assert list(elements(bars, "Rectangles")["training"]["top"]) == pytest.approx([3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 0.5, 4.0, 20.0])
    assert title(bars) == "6 subnets with a worker each: 4.0 s, the global network 20.0 s"
    assert (
        "slowdown emulated: 1x, 4x; synthetic data; 2 workers needed 8.0 s; 1 seed"
        in plots.save(bars, tmp_path / "a.html").read_text()
    )
    many = elements(plots.part_times(joined((4, 4), (1, 12, 16))), "Rectangles")["training"]  # 3.0 to 4.5 s
    assert list(many["top"]) == pytest.approx([3.75, 4.5, 0.5, 5.0, 20.0])
    assert title(plots.part_times(joined(baselines=()))) == "6 subnets with a worker each: 4.0 s"
    teams, batches = joined(baselines=()), joined(baselines=())
    teams.config["team"], batches.part_rows[2]["batched"] = {"n_workers": 2}, 4
    assert title(plots.part_times(teams)) == "6 subnets with 2 workers each: 4.0 s"
    assert title(plots.part_times(batches)) == "6 subnets (up to 4 at once on a worker): 4.0 s"


@pytest.mark.parametrize(("grid", "shape"), [((2, 3), (1, 12, 15)), ((3, 1), (1, 60, 20))])
def test_the_colour_bar_of_a_map_is_beside_it(grid, shape):
    style.extension()
    axes, bar = hv.render(plots.part_accuracy(joined(grid, shape)), backend="matplotlib").axes
    axes.figure.canvas.draw()
    here, there = axes.get_position(), bar.get_position()
    assert 0 < there.x0 - here.x1 < 0.1 and (there.y0, there.height) == pytest.approx((here.y0, here.height))


def test_scores_over_settings_are_medians_with_their_range():
    figure = plots.part_scores(scores())
    marks = {label: list(map(tuple, dots.array()[:, :2])) for label, dots in elements(figure, "Scatter").items()}
    assert [y for _, y in marks["joined"]] == pytest.approx([60, 40]) and [y for _, y in marks["whole"]] == pytest.approx([80])
    assert [round(x) for x, _ in marks["joined"]] == [0, 1] and round(marks["whole"][0][0]) == 0
    assert title(figure) == "Best in 1 of 2 settings: whole"
    assert title(plots.part_scores(scores().query("seed < 2"))) == "No network stands out of the spread of 2 seeds"
    with pytest.raises(ValueError, match=r"the frame has no column network\. It has: setting, seed, accuracy"):
        plots.part_scores(scores().drop(columns="network"))


def test_a_grid_that_does_not_fit_the_image_is_refused():
    with pytest.raises(ProblemError, match=r"cuts images \(C, H, W\), and the data have shape \(12, 16\)"):
        plots.decomposition(Decomposition((2, 2)), image((12, 16)))
