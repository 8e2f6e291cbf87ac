"""Batch normalisation with others: two workers of equal batches are one with both. Unequal ones: training/worker/test_allreduce.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.models.batch_norm import Ranks, ranks, together

ALIKE = Ranks(lambda values: 2 * values, 0.5)  # another worker with the same batch
ALONE = Ranks(lambda values: values, 1.0)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None)])
def test_two_workers_of_equal_batches_are_one_with_both(layer):
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 5, 2) * 3 + 7, torch.randn(4, 3, 5, 2)
    found = []
    for given in (x.clone().requires_grad_(), torch.cat([x, x]).requires_grad_()):
        layer.reset_parameters()
        layer.zero_grad()
        if given.shape == x.shape:
            with together(ALIKE):
                assert ranks() is ALIKE
                y = layer(given)
                (y * weight).mean().backward()
        else:
            y = layer(given)
            (y * torch.cat([weight, weight])).mean().backward()
        parameters = [p.grad.clone() for p in layer.parameters()]
        gradient = given.grad[:4] * (len(given) / 4)  # each worker's loss is a mean over its own batch
        found.append([y[:4].detach(), gradient, *parameters, *(b.clone() for b in layer.buffers())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert ranks() is None


def test_what_it_does_not_normalise_is_left_to_torch():
    layer, x = nn.BatchNorm1d(3).eval(), torch.randn(5, 3)
    with together(Ranks(lambda values: pytest.fail("nothing to add up"), 1.0)):
        assert torch.equal(layer(x), layer(x)) and torch.equal(F.relu(x), x.clamp_min(0))
    layer.train()
    with together(ALONE), pytest.raises(ValueError, match="more than 1 value per channel when training, got 1 of all ranks"):
        layer(x[:1])
    with together(ALIKE):
        assert layer(x[:1]).abs().max() < 1e-3, "one sample here, one there"


def test_its_gradient_is_not_differentiated_again():
    x = torch.randn(5, 3, requires_grad=True)
    with together(ALONE):
        (slope,) = torch.autograd.grad(nn.BatchNorm1d(3)(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()
