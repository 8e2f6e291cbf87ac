"""What a network costs, counted by torch's formulas, is what one counts by hand."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from labkit.models import MODELS
from labkit.models.cnn import lenet
from labkit.models.costs import multiply_adds, n_parameters


def test_costs_are_counted():
    assert multiply_adds(lenet((1, 28, 28), 10), (1, 28, 28)) == 24 * 24 * 32 * 25 + 8 * 8 * 64 * 32 * 25 + 1024 * 256 + 2560
    assert multiply_adds(nn.Conv3d(4, 6, 3, groups=2), (4, 5, 5, 5)) == 27 * 6 * 2 * 27
    twice = nn.Sequential(nn.Flatten(), *[layer := nn.Linear(9, 9), nn.ReLU(), layer])
    assert multiply_adds(twice, (1, 3, 3)) == 2 * 81 and n_parameters(twice) == 90
    assert not layer._forward_hooks and twice.training


@pytest.mark.parametrize(
    ("name", "shape", "whole", "narrow"),
    [
        ("lenet", (3, 32, 32), 7413760, 1100345),
        ("vgg3", (3, 32, 32), 38896896, 3738684),
        ("vgg9", (3, 32, 32), 135369728, 12333448),
        ("resnet20", (3, 32, 32), 40551040, 3937150),
        ("lenet", (2, 9, 8, 11), 26949632, 3892474),
        ("vgg3", (2, 9, 8, 11), 41862912, 4225920),
        ("vgg9", (2, 9, 8, 11), 119879168, 11118994),
        ("resnet20", (2, 9, 8, 11), 62727040, 6173200),
    ],
)
def test_costs_of_the_named_networks(name, shape, whole, narrow):
    """As counted from the sizes of their layers, which tables made so far hold."""
    assert multiply_adds(MODELS[name](shape, 10), shape) == whole
    assert multiply_adds(MODELS[name](shape, 10, width=0.3), shape) == narrow


def test_groups_strides_and_products_without_a_layer():
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1, dilation=2))
    assert multiply_adds(grouped, (4, 9, 9)) == 7 * 7 * 8 * 2 * 9 + 3 * 3 * 8 * 1 * 9
    assert multiply_adds(nn.Conv1d(4, 6, 3, groups=2), (4, 20)) == 18 * 6 * 2 * 3
    assert multiply_adds(nn.Linear(4, 5), (7, 4)) == 7 * 4 * 5

    class Product(nn.Linear):
        def forward(self, x):
            return x @ x.transpose(1, 2)

    assert multiply_adds(Product(4, 5), (7, 4)) == 7 * 7 * 4


def test_what_another_thread_trains_does_not_count():
    other = nn.Linear(50, 50)

    class Beside(nn.Linear):
        def forward(self, x):
            thread = threading.Thread(target=lambda: other(torch.ones(3, 50)).sum().backward())
            thread.start()
            thread.join()
            return super().forward(x)

    assert multiply_adds(Beside(4, 5), (4,)) == 20 and other.weight.grad is not None
