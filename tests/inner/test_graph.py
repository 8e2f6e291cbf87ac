"""The tasks of a step: what each depends on, what the blocks cover, logical counts, chains.

Used by pytest.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from labkit.inner.graph import LEAST_ROWS, chains, cut, input_rows, step_graph
from labkit.inner.layers import trace
from labkit.inner.scheduler import schedule
from labkit.models import cnn

SHAPES = {"lenet": (1, 28, 28), "vgg3": (1, 25, 25, 25), "vgg9": (3, 32, 32), "resnet20": (3, 32, 32)}

HELD = []  # layers do not hold the network


def graph_of(name, samples=8, width=0.1, **options):
    net = getattr(cnn, name)(SHAPES[name], 10, width) if isinstance(name, str) else name
    HELD[:] = [net]
    return step_graph(trace(net, torch.randn(samples, *(SHAPES[name] if isinstance(name, str) else (2, 8, 8)))), samples, **options)


def before(graph, task):
    """All that come before a task."""
    found, left = set(), list(graph.tasks[task].predecessors)
    while left:
        found.add(earlier := left.pop())
        left += set(graph.tasks[earlier].predecessors) - found
    return found


def find(graph, layer, kind):
    return [i for i, task in enumerate(graph.tasks) if graph.layers[task.layer].name == layer and task.kind == kind]


def test_a_cut_is_even_and_whole():
    for n in range(1, 20):
        for blocks in range(1, 25):
            ranges = cut(n, blocks)
            sizes = [last - first for first, last in ranges]
            assert len(ranges) == min(n, blocks) and sum(sizes) == n and max(sizes) - min(sizes) <= 1 and min(sizes) > 0
            assert [first for first, _ in ranges] == [0, *(last for _, last in ranges)][:-1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="whole", marks=pytest.mark.slow), pytest.param({"block": 3, "rows": 3}, id="cut")]
)
def test_every_layer_has_its_tasks(name, options):
    graph = graph_of(name, **options)
    assert all(earlier < number for number, task in enumerate(graph.tasks) for earlier in task.predecessors)
    for number, layer in enumerate(graph.layers[1:], start=1):
        own = [task for task in graph.tasks if task.layer == number]
        values = sum(
            (graph.samples[t.block][1] - graph.samples[t.block][0]) * (t.rows[1] - t.rows[0]) for t in own if t.kind == "forward"
        )
        assert values == 8 * layer.height
        assert sum(task.kind == "update" for task in own) == bool(layer.module)
        if layer.kind in ("conv", "linear"):
            macs = 8 * layer.module.weight[0].numel() * torch.Size(layer.shape).numel()
            for kind in ("forward", "weight gradient"):
                assert sum(task.flops for task in own if task.kind == kind) == pytest.approx(2 * macs, rel=1e-6)
        assert (len(graph.rows[number]) > 1) <= (layer.height >= 2 * LEAST_ROWS)
    (loss,) = [i for i, task in enumerate(graph.tasks) if task.kind == "loss"]
    assert {i for i in before(graph, loss)} == {
        i for i in range(loss) if graph.tasks[i].kind in ("forward", "statistics", "combine")
    }
    assert not [task for task in graph.tasks if task.kind == "input gradient" and graph.layers[task.layer].name == "conv1"]


def test_the_weights_of_a_layer_are_updated_after_every_task_that_reads_them():
    graph = graph_of("vgg9", block=4, rows=2)
    for update in [i for i, task in enumerate(graph.tasks) if task.kind == "update"]:
        name = graph.layers[graph.tasks[update].layer].name
        for kind in ("forward", "input gradient", "weight gradient", "sum"):
            assert set(find(graph, name, kind)) <= before(graph, update), (name, kind)
    # And not after those of other layers: it is off the critical path.
    (last,) = find(graph, "dense3", "update")
    assert not set(find(graph, "conv1_2", "input gradient")) & before(graph, last)


def test_a_weight_gradient_is_no_predecessor_of_the_layer_below():
    graph = graph_of("lenet", block=4)
    for below in find(graph, "relu1", "input gradient"):
        assert not set(find(graph, "conv2", "weight gradient")) & before(graph, below)
        assert set(find(graph, "conv2", "input gradient")) & before(graph, below)


def test_neighbouring_rows_need_each_other_as_far_as_the_window_reaches():
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    graph = step_graph(trace(net, torch.randn(2, 2, 16, 8)), 2, rows=4)
    first, second = find(graph, "0", "forward"), find(graph, "1", "forward")
    assert [graph.tasks[i].rows for i in first] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert [graph.tasks[i].predecessors for i in second] == [tuple(first[:2]), tuple(first[:3]), tuple(first[1:]), tuple(first[2:])]
    assert input_rows(graph.layers[2], graph.layers[1], (4, 8)) == (3, 9)
    assert graph.split == {("value", 1), ("value", 2), ("gradient", 1)}


def test_batch_normalisation_waits_for_all_blocks():
    graph = graph_of("resnet20", block=4)
    (combine,) = find(graph, "norm1", "combine")
    assert set(graph.tasks[combine].predecessors) == set(find(graph, "norm1", "statistics")) and len(graph.samples) == 2
    for forward in find(graph, "norm1", "forward"):
        assert combine in before(graph, forward)
    (combine,) = find(graph, "stage1.0.norm2", "gradient combine")
    assert set(find(graph, "stage1.0.norm2", "gradient statistics")) <= before(graph, combine)


def test_the_two_gradients_of_a_value_that_is_read_twice_are_added_in_order():
    graph = graph_of("resnet20", block=4)
    source = next(i for i, layer in enumerate(graph.layers) if layer.name == "relu1")
    writers = [
        i
        for i, task in enumerate(graph.tasks)
        if "input" in task.kind and source in graph.layers[task.layer].inputs and task.block == 0
    ]
    assert [graph.layers[graph.tasks[i].layer].name for i in writers] == ["stage1.0.add", "stage1.0.conv1"]
    assert [graph.tasks[i].adds for i in writers] == [(), (source,)] and writers[0] in before(graph, writers[1])


def test_layers_below_all_that_is_trained_have_no_gradient():
    net = cnn.lenet((2, 8, 8), 3, 0.1)
    net.conv1.requires_grad_(False)
    net.conv2.weight.requires_grad_(False)
    graph = graph_of(net)
    assert not find(graph, "conv2", "input gradient") and len(find(graph, "conv2", "weight gradient")) == 1
    assert not [task for task in graph.tasks if graph.layers[task.layer].name == "conv1" and task.kind != "forward"]
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad=False"):
        graph_of(net)


def test_logical_tasks_of_the_paper_beside_the_blocks():
    rows = {row["layer"]: row for row in graph_of("vgg9", width=1, block=2, rows=2).table()}
    assert rows["conv1_1"]["logical_tasks"] == 32 * 32 and rows["conv1_1"]["filters"] == 32 and rows["conv1_1"]["blocks"] == 8
    assert rows["conv3_2"]["logical_tasks"] == 8 * 8 and rows["dense1"]["logical_tasks"] == 0
    volumes = {row["layer"]: row for row in graph_of("vgg3").table()}
    assert volumes["conv1_1"]["logical_tasks"] == 25**3


def test_names():
    graph = graph_of("lenet", block=4, rows=2)
    assert graph.name(graph.tasks[0]) == "conv1 forward, samples 0-3, rows 0-11"
    assert graph.name(graph.tasks[-1]) == "conv1 update"


@pytest.mark.parametrize("name", SHAPES)
def test_chains_keep_the_order_and_a_good_schedule(name):
    graph = graph_of(name, samples=32, width=1, block=8)
    costs = [task.flops / 50e9 + task.bytes / 10e9 + 1e-5 for task in graph.tasks]
    groups, waits = chains(graph, costs, 100e-6)
    home = {task: number for number, chain in enumerate(groups) for task in chain}
    assert sorted(home) == list(range(len(costs))) and len(groups) < len(costs)
    for number, task in enumerate(graph.tasks):
        for earlier in task.predecessors:
            assert (home[earlier] == home[number] and earlier < number) or home[earlier] in waits[home[number]]
    assert all(other < number for number, others in enumerate(waits) for other in others)
    assert all(task.predecessors == () or min(costs[i], sum(costs[j] for j in chain if j < i)) < 100e-6
               for chain in groups for i in chain[1:] for task in [graph.tasks[i]])  # fmt: skip
    plan = schedule(waits, [sum(costs[task] for task in chain) for chain in groups], 2)
    assert plan.makespan <= 1.1 * plan.bound


def test_what_cannot_be_cut():
    net = cnn.lenet((1, 8, 8), 2)
    layers = trace(net, torch.randn(4, 1, 8, 8))
    for wrong, words in (({"block": 0}, "block=0"), ({"rows": 0}, "rows=0")):
        with pytest.raises(ValueError, match=words):
            step_graph(layers, 4, **wrong)
    with pytest.raises(TypeError, match="block"):
        step_graph(layers, 4, block=1.5)
