"""A tiny problem whose classes show in every quarter of an image, and comparisons of weights; used by all tests of subnets."""

from __future__ import annotations

import numpy as np
from torch import nn

import labkit
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import Subnet

SEED = 5


def data(n=231, shape=(1, 8, 8), n_classes=3):
    """A bright pixel somewhere in each quarter: its column gives the class, noisily."""
    generator = np.random.default_rng(0)
    y = np.arange(n) % n_classes
    x = generator.normal(size=(n, *shape)).astype(np.float32)
    for quarter in range(0, shape[-1], 4):
        x[np.arange(n), 0, ..., quarter // 4, quarter + y % 4] += 2.5
    return x, y


def net(shape, n_classes, width=1.0):
    hidden = max(1, round(16 * width))
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


def problem(model=net, **settings):
    return labkit.Classifier(model, settings.pop("data", data()), **{"batch_size": 16, "lr": 0.05, "score_samples": 30} | settings)


def parts_of(a_problem, *stacking):
    return [Subnet.of(a_problem, Decomposition((2, 2)), part, "sqrt", *stacking) for part in range(4)]


def weights(joined):
    return {name: value.numpy().copy() for name, value in joined.module.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(np.array_equal(value, second[name]) for name, value in first.items())
