"""Figures of the inner layer: a picture and a page of each, and what their titles say.

Used by pytest.
"""

from __future__ import annotations

import pytest
import torch

from labkit import plots
from labkit.inner.graph import step_graph
from labkit.inner.layers import trace
from labkit.inner.profiling import Profile
from labkit.inner.scheduler import schedule
from labkit.models import cnn

PEAKS = {"float32": 50e9, "bfloat16": 400e9, "bytes": 10e9}


@pytest.fixture(scope="module")
def profile():
    """As of a machine that reaches half of its roofs."""
    net = cnn.lenet((1, 28, 28), 10)
    graph = step_graph(trace(net, torch.randn(8, 1, 28, 28)), 8, block=4)
    costs = [2 * max(task.flops / PEAKS["float32"], task.bytes / PEAKS["bytes"]) for task in graph.tasks]
    plan = schedule(graph.predecessors, costs, 2)
    return Profile(graph, plan, plan, plan, PEAKS, "AVX512, amx_tile", "lenet, 8 samples of 1 x 28 x 28")


def test_the_gantt_chart(profile, tmp_path):
    figure = plots.gantt(profile)
    assert plots.save(figure, tmp_path / "gantt.png").stat().st_size > 5_000
    assert "Bokeh" in plots.save(figure, tmp_path / "gantt.html").read_text()
    title = figure.opts.get("plot").kwargs["title"] if "title" in figure.opts.get("plot").kwargs else str(figure)
    assert title.startswith("2 threads take") and "above the bound; idle" in title
    boxes = {element.label: len(element) for element in figure.traverse(lambda x: x, ["Rectangles"])}
    assert sum(boxes.values()) == len(profile.graph.tasks) + len(profile.tasks.critical_path)
    assert boxes["on the critical path"] == len(profile.tasks.critical_path)


def test_the_roofline(profile, tmp_path):
    figure = plots.roofline(profile)
    assert plots.save(figure, tmp_path / "roofline.png").stat().st_size > 5_000
    assert "Bokeh" in plots.save(figure, tmp_path / "roofline.html").read_text()
    title = figure.opts.get("plot").kwargs["title"]
    assert title.startswith("Convolutions and linear layers reach") and "% of the float32 roof" in title
    reached = float(title.split("reach ")[1].split(" %")[0])
    assert 40 <= reached <= 60
