"""The coarse level: votes and their ties, features, and a coarse network that learns what no vote can express."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from labkit.models import make_model
from labkit.subnets.coarse import CoarseProblem, average, coarse_net, gather, majority, subnet_outputs
from labkit.training.local import fit
from tests.subnets.helpers import data, net, problem

pytestmark = pytest.mark.usefixtures("cache")


def test_features_are_what_the_last_dense_layer_sees():
    x, module = torch.randn(5, 1, 8, 8), net((1, 8, 8), 3).eval()
    outputs = subnet_outputs(module, x, "features")
    assert torch.equal(outputs[:, :3], module(x))
    torch.testing.assert_close(module[-1](outputs[:, 3:]), module(x))
    assert torch.equal(subnet_outputs(module, x, "logits"), module(x)) and not module[-1]._forward_pre_hooks
    logits, seen = gather([outputs, outputs + 1], 3, "features")
    assert logits.shape == (5, 2, 3) and torch.equal(seen[:, :16], outputs[:, 3:]) and seen.shape == (5, 32)


def test_equal_votes_go_to_the_larger_summed_probability():
    p = torch.tensor([[[0.9, 0.1, 0.0], [0.4, 0.6, 0.0]], [[0.55, 0.45, 0.0], [0.0, 0.9, 0.1]], [[0.2, 0.5, 0.3], [0.1, 0.2, 0.7]]])
    assert majority(p.log()).argmax(1).tolist() == [0, 1, 2]
    sure = torch.tensor([[[0.34, 0.33, 0.33], [0.34, 0.33, 0.33], [0.0, 1.0, 0.0]]]).log()
    assert majority(sure).argmax(1).tolist() == [0] and average(sure).argmax(1).tolist() == [1]  # two votes beat one, however sure


def test_the_coarse_network_learns_what_no_vote_can_express():
    """The class is whether the two subdomains agree."""
    generator = np.random.default_rng(0)
    bits = generator.integers(2, size=(1200, 2))
    logits = np.eye(2, dtype=np.float32)[bits] * 4 + generator.normal(size=(1200, 2, 2)).astype(np.float32)
    labels = (bits[:, 0] == bits[:, 1]).astype(np.int64)
    for inputs in ("probabilities", "logits"):
        seen = gather(list(torch.from_numpy(logits).unbind(1)), 2, inputs)[1]
        two = problem(data=data(n_classes=2))
        task = CoarseProblem(two, seen, torch.from_numpy(labels), lr=0.01)
        module = make_model(coarse_net, (2, 2), 2, {"hidden": [16], "dropout": 0.1}, seed=0)
        fit(task, module, np.arange(900), np.arange(900, 1200), epochs=40, patience=None, seed=0)
        assert task.measure(module, np.arange(900, 1200))["score"] > 0.95
    votes = average(torch.from_numpy(logits)).argmax(1).numpy()
    assert abs((votes == labels).mean() - 0.5) < 0.06
    assert [layer.out_features for layer in coarse_net((2, 2), 5, [7, 4]) if isinstance(layer, nn.Linear)] == [7, 4, 5]
