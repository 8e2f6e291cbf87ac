"""The first layer normalises as a batch of the data set is, to the last bit, and the whole is a plain module that can be exported."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from labkit import open_dataset
from labkit.models.normalised import Normalise, Normalised


def test_it_normalises_as_a_batch_does_and_the_names_of_the_network_stay(cache):
    x = np.random.default_rng(0).integers(0, 255, (20, 3, 6, 5)).astype(np.uint8)
    data = open_dataset((x, np.arange(20) % 2))
    layer, window = Normalise(*data.affine, 3), (slice(1, 4), slice(0, 2))
    at = np.arange(data.n_train)
    for given in (torch.from_numpy(data.raw(at)), torch.from_numpy(data.raw(at).astype(np.float64))):
        assert torch.equal(layer(given), torch.from_numpy(data.batch(at)["x"]))
    assert torch.equal(Normalise(*data.affine, 3, window)(given), torch.from_numpy(data.batch(at, window=window)["x"]))
    network = nn.Sequential(nn.Flatten(), nn.Linear(90, 2))
    whole = Normalised(network, [layer])
    assert list(whole.state_dict()) == ["normalise.centre", "normalise.rate", "network.1.weight", "network.1.bias"]
    copy.deepcopy(network).load_state_dict(whole.network.state_dict())


@pytest.mark.slow  # what exports takes seconds to load
def test_it_can_be_exported():
    whole, x = Normalised(nn.Linear(4, 2), [Normalise(np.arange(4.0), np.full(4, 0.5), 1)]).eval(), torch.randn(3, 4)
    assert torch.equal(torch.export.export(whole, (x,)).module()(x), whole(x))


def test_it_can_be_saved_and_takes_several_inputs():
    torch.manual_seed(0)
    whole = Normalised(nn.Linear(4, 2), [Normalise(np.arange(4.0), np.full(4, 0.5), 1)]).eval()
    x, file = torch.randn(3, 4), io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), whole(x))

    class Two(nn.Module):
        def forward(self, first, second):
            return first.sum(1) + second

    both = Normalised(Two(), [Normalise(np.ones(4), np.full(4, 2.0), 1), nn.Identity()])
    assert torch.equal(both((x, torch.ones(3))), 2 * (x - 1).sum(1) + 1)


def test_a_single_channel_may_be_left_out_and_what_has_other_axes_is_named():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3)), torch.randn(5, 1, 8, 8)
    whole = Normalised(network, [Normalise(np.ones(1), np.full(1, 2.0), 3)], [(1, 8, 8)]).eval()
    assert torch.equal(whole(x[:, 0]), whole(x)) and torch.equal(whole(x[0]), whole(x[:1]))
    with pytest.raises(ValueError, match=r"x has shape \(5, 64\); this network takes \(n, 1, 8, 8\), channels first\."):
        whole(x.flatten(1))
    colours = Normalised(nn.Flatten(), [Normalise(np.ones(3), np.ones(3), 3)], [(3, 8, None)])
    with pytest.raises(ValueError, match=r"takes \(n, 3, 8, any\), channels first\. For one sample give x\[None\]\."):
        colours(torch.randn(3, 8, 8))
