"""The named networks: shapes, sizes, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.models import MODELS
from labkit.models.cnn import lenet, resnet20, vgg3, vgg9


def n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 8, 8), (2, 17, 19), (1, 9, 50)])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_accepts_any_size_and_gives_gradients(name, shape):
    net = MODELS[name](shape, 7, width=0.25)
    logits = net(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_accepts_volumes(name):
    shape = (1, 9, 8, 11)
    assert MODELS[name](shape, 3, width=0.25)(torch.randn(2, *shape)).shape == (2, 3)


def test_parameter_counts_are_the_classic_ones():
    assert n_parameters(lenet((1, 28, 28), 10)) == 317_066
    assert n_parameters(vgg3((3, 32, 32), 10)) == 550_570
    assert n_parameters(vgg9((3, 32, 32), 10)) == 3_491_530
    assert n_parameters(resnet20((3, 32, 32), 10)) == 269_722
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in resnet20((3, 32, 32), 10).modules()) == 20


def test_large_images_do_not_blow_up_the_dense_layers():
    assert n_parameters(vgg9((3, 180, 180), 10)) == n_parameters(vgg9((3, 32, 32), 10))


def test_pool_before_relu_is_the_same_network():
    net, x = lenet((1, 28, 28), 10), torch.randn(5, 1, 28, 28)
    layers = dict(net.named_children())
    h = layers["pool1"](torch.relu(layers["conv1"](x)))
    h = layers["pool2"](torch.relu(layers["conv2"](h)))
    h = layers["dense2"](torch.relu(layers["dense1"](h.flatten(1))))
    gradients = [torch.autograd.grad(out.square().sum(), list(net.parameters())) for out in (h, net(x))]
    assert torch.equal(h, net(x))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_width_scales_the_hidden_layers():
    assert n_parameters(lenet((1, 28, 28), 10, width=2)) > 3 * n_parameters(lenet((1, 28, 28), 10))
    assert lenet((1, 28, 28), 10, width=0.001)(torch.randn(1, 1, 28, 28)).shape == (1, 10)
    for width in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a positive number"):
            lenet((1, 28, 28), 10, width=width)


@pytest.mark.parametrize(
    ("name", "side", "layer", "smallest"),
    [("lenet", 3, "pool2", 4), ("vgg3", 7, "pool3", 8), ("vgg9", 7, "pool3", 8), ("resnet20", 4, "stage3", 5)],
)
def test_too_small_input_names_the_layer_and_the_smallest_size(name, side, layer, smallest):
    with pytest.raises(ProblemError, match=rf"{name} does not fit .* layer {layer} .* at least {smallest} pixels"):
        MODELS[name]((1, side, 20), 10)
    net = MODELS[name]((1, smallest, smallest), 10, width=0.25)
    assert net(torch.randn(1, 1, smallest, smallest)).shape == (1, 10)  # a training batch of one sample


@pytest.mark.parametrize("name", MODELS)
def test_channel_groups_share_the_channels_of_every_hidden_layer(name):
    def channels(**arguments):
        layers = MODELS[name]((1, 12, 12), 3, width=0.3, **arguments).modules()
        return np.array([layer.weight.shape[0] for layer in layers if isinstance(layer, nn.Conv2d | nn.Linear)])

    groups = [channels(piece=(i, 4)) for i in range(4)]
    assert np.array_equal(np.sum(groups, 0)[:-1], channels()[:-1]) and all(np.ptp(each) <= 1 for each in zip(*groups, strict=True))
    assert {group[-1] for group in groups} == {3} and np.array_equal(channels(piece=(0, 1)), channels())


@pytest.mark.parametrize(
    ("name", "n", "layer", "has"), [("lenet", 33, "conv1", 32), ("vgg9", 33, "conv1_1", 32), ("resnet20", 17, "conv1", 16)]
)
def test_too_many_channel_groups_name_the_layer(name, n, layer, has):
    MODELS[name]((1, 12, 12), 3, piece=(n - 2, n - 1))
    with pytest.raises(
        ProblemError, match=rf"{name} cannot be cut into {n} channel groups: its layer {layer} has {has}, .* Cut it into"
    ):
        MODELS[name]((1, 12, 12), 3, piece=(0, n))
    for piece in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=r"piece=.* must be \(i, n\)"):
            MODELS[name]((1, 12, 12), 3, piece=piece)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 2, 8, 8, 8)])
def test_features_are_no_images(shape):
    with pytest.raises(ProblemError, match=r"needs images .* the data have shape"):
        resnet20(shape, 10)


def test_senseless_sizes():
    with pytest.raises(ProblemError, match="n_classes=0"):
        lenet((1, 28, 28), 0)
