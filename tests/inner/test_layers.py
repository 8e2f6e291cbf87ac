"""Tracing: the four networks, functions as users write them, which rows a row needs, and what is refused by its place.

Used by pytest.
"""

from __future__ import annotations

import operator
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.errors import ProblemError
from labkit.inner.layers import EACH_ROW, Window, trace
from labkit.models import cnn

NETWORKS = [(cnn.lenet, (1, 28, 28)), (cnn.vgg3, (1, 9, 11, 8)), (cnn.vgg9, (3, 32, 32)), (cnn.resnet20, (3, 32, 32))]


class Own(nn.Module):
    """A network with the given forward pass, and a few layers for it."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.conv, self.dense = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.own = forward

    def forward(self, x):
        return self.own(self, x)


class Round(nn.Module):
    """A block that gives its input as it is, but for a step that no rule covers."""

    def forward(self, x):
        return torch.roll(x, 1, 1)


def kinds(net, x=None, **options):
    return [(layer.name, layer.kind, layer.op) for layer in trace(net, torch.randn(5, 2, 8, 8) if x is None else x, **options)]


@pytest.mark.parametrize(("network", "shape"), NETWORKS, ids=[network.__name__ for network, _ in NETWORKS])
def test_the_four_networks_are_recorded(network, shape):
    net = network(shape, 10, width=0.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    layers = trace(net, torch.randn(3, *shape))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())  # running statistics too
    modules = [layer.module for layer in layers if layer.module]
    assert modules == [part for part in net.modules() if list(part.parameters(recurse=False))]
    assert all(source < number for number, layer in enumerate(layers) for source in layer.inputs)
    assert layers[-1].shape == (10,) and layers[0].shape == shape
    for layer in layers[1:]:  # what a layer says of itself is so
        if layer.kind == "each":
            assert layer.function(*(torch.zeros(2, *layers[i].shape) for i in layer.inputs)).shape == (2, *layer.shape)


def test_residual_blocks_are_named_by_their_place():
    names = [layer.name for layer in trace(cnn.resnet20((1, 8, 8), 2), torch.randn(2, 1, 8, 8))]
    assert names[1:4] == ["conv1", "norm1", "relu1"] and "stage2.0.cut" in names and "stage2.0.pad" in names
    assert names[names.index("stage1.2.conv1") :][:6] == [
        "stage1.2.conv1", "stage1.2.norm1", "stage1.2.relu", "stage1.2.conv2", "stage1.2.norm2", "stage1.2.add",
    ]  # fmt: skip
    assert "stage1.2.relu (2)" in names


@pytest.mark.parametrize(
    "window", [Window(), Window(3, 1, 1), Window(5, 2, 2), Window(3, 1, 2, 2), Window(2, 2), Window(3, 3, 1), Window(1, 2)]
)
def test_windows(window):
    height = 13
    out = (height + 2 * window.padding - window.reach - 1) // window.stride + 1
    used = {row: {row * window.stride - window.padding + window.dilation * u for u in range(window.kernel)} for row in range(out)}
    for first in range(out):
        for last in range(first + 1, out + 1):
            rows = set.union(*(used[row] for row in range(first, last)))
            assert window.needed(first, last) == (min(rows), max(rows) + 1)
    for first in range(height):
        for last in range(first + 1, height + 1):
            low, high = window.touched(first, last, out)
            assert {row for row in used if used[row] & set(range(first, last))} <= set(range(low, high))
            touched = [row for row in used if used[row] & set(range(first, last))]
            assert (
                not touched or window.dilation > 1 or window.kernel < window.stride or (low, high) == (touched[0], touched[-1] + 1)
            )


FORMS = {
    "flatten": lambda self, x: self.dense(torch.flatten(F.adaptive_avg_pool2d(self.conv(x), 1), 1)),
    "view by size": lambda self, x: self.dense((y := F.avg_pool2d(self.conv(x), 8)).view(y.size(0), -1)),
    "view by shape": lambda self, x: self.dense((y := F.max_pool2d(self.conv(x), 8)).view(y.shape[0], y.shape[1])),
    "view by what is left": lambda self, x: self.dense(F.max_pool2d(self.conv(x), kernel_size=8).reshape(-1, 4)),
    "mean": lambda self, x: self.dense(self.conv(x).relu().mean((2, 3))),
    "cut": lambda self, x: self.dense(self.conv(x)[:, :, 1, -1]),
    "cat": lambda self, x: self.dense(torch.cat([self.conv(x), self.conv(x)], 1).mean([-1, -2]).view(x.size(0), 2, 4)[:, 0]),
    "scaled": lambda self, x: self.dense((self.conv(x) * 2 + 1).mean((2, 3))),
    "shapes decide": lambda self, x: self.dense(self.conv(x if x.dim() == 4 and x.shape[-1] > 4 else x + 1).mean((2, 3))),
}


@pytest.mark.parametrize("form", FORMS)
def test_functions_as_users_write_them(form):
    net, x = Own(FORMS[form]), torch.randn(5, 2, 8, 8)
    layers = trace(net, x)
    values = [x]
    for layer in layers[1:]:
        call = layer.module if layer.kind != "each" else layer.function
        values.append(call(*(values[i] for i in layer.inputs)))
    assert torch.equal(values[-1], net(x))
    # What no rule says of single samples would show here.
    values = [x[3:]]
    for layer in layers[1:]:
        call = layer.module if layer.kind != "each" else layer.function
        values.append(call(*(values[i] for i in layer.inputs)))
    assert torch.allclose(values[-1], net(x)[3:], atol=1e-6)


def test_a_change_in_place_is_seen_by_who_reads_the_value_later():
    def forward(self, x):
        y = self.conv(x)
        self.relu(y)
        y += 1
        return y.mean((2, 3))

    layers = trace(Own(forward, relu=nn.ReLU(inplace=True)), torch.randn(5, 2, 8, 8))
    assert [(layer.op, layer.inputs) for layer in layers[1:]] == [("Conv2d", (0,)), ("ReLU", (1,)), ("add", (2,)), ("mean", (3,))]
    y = -torch.ones(1, 4, 8, 8)
    assert layers[2].function(y).max() == 0 and y.max() == -1  # the input of a task stays as it is


def _halved(self, x):
    y = self.conv(x)
    y /= 2
    return y.mean((2, 3)) + self.conv(x).mean((2, 3))


CHANGED = {
    "in place, by another name": lambda self, x: ((y := self.conv(x)), operator.iadd(y, 1), y)[2].mean((2, 3)),
    "halved": _halved,
    "of one tensor": lambda self, x: ((y := self.conv(x)), self.relu(self.same(y)), y)[2].mean((2, 3)),
    "twice": lambda self, x: ((y := self.conv(x)), F.leaky_relu_(self.relu(y).sub_(1)), y)[2].mean((2, 3)),
    "a view that alone is read": lambda self, x: self.relu(self.conv(x).flatten(1)).view(-1, 4, 64).mean(2),
}


@pytest.mark.parametrize("form", CHANGED)
def test_values_that_change_in_place(form):
    net, x = Own(CHANGED[form], relu=nn.ReLU(inplace=True), same=nn.Identity()), torch.randn(5, 2, 8, 8)
    layers, values = trace(net, x), [x]
    for layer in layers[1:]:
        values.append((layer.module if layer.kind != "each" else layer.function)(*(values[i] for i in layer.inputs)))
    assert torch.equal(values[-1], net(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda self, x: ((y := self.conv(x)), y.view(x.shape[0], -1).mul_(2), y)[2].mean((2, 3)),
            "mul changes memory in place that conv",
        ),
        (lambda self, x: ((y := self.conv(x)), operator.imul(y[:, :2], 2), y)[2].mean((2, 3)), "mul changes .* that conv"),
        (lambda self, x: ((y := self.conv(x)), (z := y.flatten(1)), self.relu(y), z)[3], "ReLU changes .* that flatten"),
    ],
)
def test_a_view_and_what_it_is_of_are_refused_where_one_changes_in_place(change, words):
    with pytest.raises(ProblemError, match=words):
        trace(Own(change, relu=nn.ReLU(inplace=True)), torch.randn(5, 2, 8, 8))


def test_rows():
    layers = trace(Own(lambda self, x: F.relu(F.max_pool2d(self.conv(x), 2))[..., ::2, :]), torch.randn(5, 2, 8, 8))
    assert [layer.window for layer in layers[1:]] == [Window(3, 1, 1), Window(2, 2), EACH_ROW, Window(1, 2)]
    overlapping = Own(lambda self, x: F.max_pool2d(self.conv(x), 3, 2, 1)), Own(lambda self, x: F.pad(self.conv(x), [0, 0, 1, 1]))
    assert [trace(net, torch.randn(5, 2, 8, 8))[-1].window for net in overlapping] == [None, None]
    assert trace(Own(lambda self, x: F.pad(self.conv(x), [1, 1])), torch.randn(5, 2, 8, 8))[-1].window == EACH_ROW


def test_what_is_not_used_is_left_out():
    def forward(self, x):
        self.conv(x)
        return self.dense(x.mean((2, 3)))

    assert [layer.name for layer in trace(Own(forward, dense=nn.Linear(2, 3)), torch.randn(5, 2, 8, 8))] == [
        "batch",
        "mean",
        "dense",
    ]


def _nested():
    net = nn.Sequential()
    net.add_module("conv", nn.Conv2d(2, 4, 3))
    inner = nn.Sequential()
    inner.add_module("deep", Round())
    net.add_module("inside", nn.Sequential(nn.ReLU(), inner))
    return net


REFUSED = {
    r"attention \(MultiheadAttention\).*there is no rule for it": Own(
        lambda self, x: self.attention(*[x.flatten(1)] * 3)[0], attention=nn.MultiheadAttention(128, 2)
    ),
    r"inside.1.deep \(Round\).*no rule for roll": _nested(),
    r"the network itself \(Own\).*number of samples": Own(lambda self, x: self.conv(x) / x.shape[0]),
    r"the network itself \(Own\).*it mixes the samples": Own(lambda self, x: self.conv(x) - self.conv(x).mean()),
    r"the network itself \(Own\).*takes some of the samples": Own(lambda self, x: self.conv(x)[1:]),
    r"the network itself \(Own\).*its output is not one tensor": Own(lambda self, x: (self.conv(x), self.conv(x))),
    r"the network itself \(Own\).*symbolically traced": Own(lambda self, x: self.conv(x) if x.sum() > 0 else x),
    r"conv \(Conv2d\).*padding_mode='circular'": Own(
        lambda self, x: self.conv(x), conv=nn.Conv2d(2, 4, 3, padding_mode="circular")
    ),
    r"norm \(GroupNorm\).*there is no rule for it": Own(lambda self, x: self.norm(self.conv(x)), norm=nn.GroupNorm(2, 4)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_split_is_named_with_its_place(words):
    with pytest.raises(ProblemError, match=words):
        trace(REFUSED[words], torch.randn(5, 2, 8, 8))


def test_or_runs_as_a_whole():
    assert kinds(_nested(), whole=True)[-1] == ("inside.1.deep", "whole", "Round")
    assert kinds(_nested(), whole=["inside"])[1:] == [("conv", "conv", "Conv2d"), ("inside", "whole", "Sequential")]
    mixing = Own(lambda self, x: self.conv(x) - self.conv(x).mean())
    assert kinds(mixing, whole=True) == [("batch", "batch", "batch"), ("network", "whole", "Own")]

    class Attention(nn.Module):  # the layer gives a pair, so the module around it is the one
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.layer(x, x, x)[0]

    net = nn.Sequential(nn.Linear(8, 8), Attention(), nn.Linear(8, 2))
    assert [kind for _, kind, _ in kinds(net, torch.randn(5, 8), whole=True)] == ["batch", "linear", "whole", "linear"]
    with pytest.raises(ProblemError, match=r"no module 'atention'.*It has 0, 1, 1.layer"):
        trace(net, torch.randn(5, 8), whole=["atention"])
    with pytest.raises(ProblemError, match="its output is not one tensor"):
        trace(Own(lambda self, x: (x, x)), torch.randn(5, 2, 8, 8), whole=True)


def test_hooks_and_shared_weights_are_no_silent_difference():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ProblemError, match=r"0 \(Conv2d\).*hooks"):
        trace(net, torch.randn(5, 2, 8, 8))
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ProblemError, match=r"0.weight and 1.weight are one tensor"):
        trace(tied, torch.randn(5, 3))


def test_other_threads_compute_while_a_network_is_recorded():
    net, x, wrong, ended = cnn.vgg3((1, 8, 8), 2, width=0.2), torch.randn(2, 1, 8, 8), [], threading.Event()
    other = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    right = other(x)

    def compute():
        while not ended.is_set():
            try:
                wrong.extend([] if torch.equal(other(x), right) else ["other numbers"])
            except Exception as error:
                wrong.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        lengths = {len(trace(net, x)) for _ in range(3)}
    finally:
        ended.set()
        thread.join()
    assert not wrong and len(lengths) == 1


def test_a_computed_tensor_on_a_module_is_no_obstacle():
    net = Own(lambda self, x: self.dense(self.conv(x).mean((2, 3))))
    net.seen = net.conv.weight * 2
    assert len(trace(net, torch.randn(2, 2, 8, 8))) == 4
