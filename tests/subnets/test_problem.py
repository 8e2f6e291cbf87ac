"""The problem of a subnet: its window bit for bit, its width by the rule, and training on many workers."""

from __future__ import annotations

import pytest
import torch

import labkit
from labkit.models.cnn import resnet20
from labkit.models.costs import n_parameters
from labkit.subnets.decomposition import Decomposition
from labkit.subnets.problem import Subnet, narrowed
from tests.subnets.helpers import SEED, data, problem

pytestmark = pytest.mark.usefixtures("cache")


def test_a_part_sees_its_window_bit_for_bit():
    decomposition = Decomposition((2, 3), 1)
    for options in ({}, {"channels_last": True}, {"data": data(shape=(2, 9, 8)), "channels_last": True}):
        whole = problem(**options)
        for indices, split in ((whole.train_indices()[:7], "train"), (whole.test_indices(), "test")):
            x, y = whole.load(indices, split)
            for number, expected in enumerate(decomposition.cut(x)):
                part = Subnet.of(whole, decomposition, number)
                seen, labels = part.load(indices, split)
                assert torch.equal(seen, expected) and torch.equal(labels, y)


def test_width_rules():
    whole = n_parameters(resnet20((1, 32, 32), 10))
    for rule, share in (("sqrt", 1 / 16), ("linear", 1 / 256), ("same", 1)):
        part = n_parameters(resnet20((1, 8, 8), 10, **narrowed({}, 16, rule)))
        assert part / whole == pytest.approx(share, rel=0.25)
    assert narrowed({"width": 0.5, "a": 1}, 4, "sqrt") == {"width": 0.25, "a": 1} and narrowed({}, 1, "linear") == {}


def test_a_subnet_is_a_problem_that_many_workers_can_train(lab, tmp_path):
    part = Subnet.of(problem("lenet"), Decomposition((2, 2), 1), 2, "linear")
    run = labkit.train(part, lab, update="agwu", partition="idpa", passes=3, seed=SEED, name="part", runs=tmp_path).wait(60)
    again = labkit.load_run(run.path).model().network
    assert run.weights()["conv1.weight"].shape == (8, 1, 5, 5) and again.dense1.in_features == part.build(0).dense1.in_features
    assert run.summary()["score"] > 0.2
