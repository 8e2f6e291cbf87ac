"""Baselines: a network cut along its channels is, composed again, the mean of its groups and exactly the global architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import labkit
from labkit.errors import ClusterError, ProblemError
from labkit.models import MODELS
from labkit.runs import checkpoints
from labkit.subnets.baselines import channel_groups, compose
from labkit.subnets.problem import subnet_seed
from labkit.training.local import fit
from tests.subnets.helpers import SEED

pytestmark = pytest.mark.usefixtures("cache")


def cut(name, shape, n, width=0.4):
    """A network, and the channel groups that it was cut into, with weights and BatchNorm statistics that no two of them share."""
    torch.manual_seed(0)
    whole, *nets = (MODELS[name](shape, 5, width=width, piece=piece) for piece in [(0, 1), *((i, n) for i in range(n))])
    for net in nets:
        for _ in range(3):
            net(torch.randn(6, *shape) * 2 + 1)
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return whole, nets


def problem(model="lenet", **settings):
    generator, y = np.random.default_rng(0), np.arange(120) % 3
    x = generator.normal(size=(120, 1, 8, 12)).astype(np.float32)
    x[np.arange(120), 0, y * 2] += 1
    return labkit.Classifier(model, (x, y), **{"batch_size": 16, "lr": 0.05, "score_samples": 20} | settings)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 17, 19), (2, 9, 8, 11)])
@pytest.mark.parametrize("name", MODELS)
def test_the_composed_network_gives_the_mean_of_its_groups(name, shape, n):
    whole, nets = cut(name, shape, n)
    compose(whole, nets)
    x = torch.randn(7, *shape)
    with torch.no_grad():
        found, expected = whole.eval()(x), torch.stack([net.eval()(x) for net in nets]).mean(0)
    assert found.abs().max() > 0.1
    if n == 1:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_not_connected_until_the_composed_network_is_trained(name):
    whole, nets = cut(name, (1, 12, 12), 3)
    compose(whole, nets)
    weight = [layer for layer in whole.modules() if isinstance(layer, torch.nn.Conv2d)][1].weight
    owner = [torch.arange(channels) % 3 for channels in weight.shape[:2]]
    between = owner[0][:, None] != owner[1][None]
    assert not weight[between].any() and weight[~between].all()
    torch.nn.functional.cross_entropy(whole(torch.randn(20, 1, 12, 12)), torch.arange(20) % 5).backward()
    assert weight.grad[between].any()


def test_the_baseline_is_composed_of_its_groups_and_trained_on(train, tmp_path):
    a_problem = problem(model_args={"width": 0.3})
    joined = train(a_problem, (1, 3), epochs=2, baselines=["global", "width"])
    assert checkpoints.versions(tmp_path / "joined" / "channel-groups") == [0, 1, 2]
    settings = {"epochs": 2, "patience": None}
    indices = a_problem.train_indices(), a_problem.score_indices()
    by_hand, nets = a_problem.build(SEED), []
    for number, group in enumerate(channel_groups(a_problem, 3)):
        nets.append(group.build(seed := subnet_seed(SEED, number)))
        fit(group, nets[-1], *indices, **settings, seed=seed)
    compose(by_hand, nets)
    fit(a_problem, by_hand, *indices, **settings, seed=SEED)
    found = joined.baselines["width"].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in by_hand.state_dict().items())
    table = joined.table()
    rows = table.loc[["global CNN", "width decomposition (Gu et al.)"]]
    same = ["parameters", "multiply_adds"]
    assert (rows[same].iloc[0] == rows[same].iloc[1]).all() and list(rows.epochs) == [2, 4]
    assert rows.wall_s.iloc[1] > rows.seconds.iloc[1] > 0  # three groups on two workers take longer than the longest of them
    images = a_problem.dataset.raw(a_problem.test_indices(), "test")
    again = labkit.load_subnets(tmp_path / "joined")
    assert np.array_equal(joined.scores(images, "width"), again.scores(images, "width")) and again.table().equals(table)


def test_a_group_can_be_cut_again():
    whole = problem(model_args={"width": 0.3})  # 10, 19 and 77 channels
    half = channel_groups(whole, 2)[1]
    thirds = [net.build(0) for net in channel_groups(half, 3)]
    assert [net.conv1.out_channels for net in thirds] == [2, 2, 1] and half.build(0).conv1.out_channels == 5
    compose(half.build(0), thirds)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            MODELS["lenet"],
            "baseline 'width' .* can do for lenet, vgg3, vgg9, resnet20 alone, not for your model lenet. Leave",
        ),
        ("labkit.models.cnn:lenet", "not for your model 'labkit.models.cnn:lenet'"),
        ("lenet", "lenet cannot be cut into 4 channel groups: its layer conv1 has 3"),
    ],
)
def test_what_cannot_be_cut_starts_nothing(model, message, train, tmp_path):
    with pytest.raises(ProblemError, match=message):
        train(problem(model, model_args={"width": 0.1}), (2, 2), baselines=["width"])
    assert not list(Path(tmp_path).iterdir())


def test_workers_do_not_go_on_with_baselines_that_nobody_waits_for(train, lab, tmp_path, monkeypatch):
    spread = type(lab).map

    def endless(self, fn, items, timeout, *rest, **more):  # of the baselines alone
        long = [replace(job, config=job.config | {"epochs": 1_000_000}) if hasattr(job, "baseline") else job for job in items]
        return spread(self, fn, long, 1 if long != items else timeout, *rest, **more)

    monkeypatch.setattr(type(lab), "map", endless)
    with pytest.raises(ClusterError, match="tasks were not done within 1 s"):
        train(grid=(1, 2), baselines=["global", "small"])
    assert lab.map(abs, [-1, -2], timeout=100) == [1, 2]
    assert labkit.load_subnets(tmp_path / "joined").summary()["n_parts"] == 2  # they were done before
