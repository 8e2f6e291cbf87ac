"""The flat vector of a module: values stay, tensors are views, and the layout states which entries are whose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.models.flat import Flat
from labkit.runs.checkpoints import Layout


class Odd(nn.Module):
    """Two layers that share their weight, a frozen one, statistics, a counter and a tensor that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.conv = nn.Conv2d(1, 2, 3).to(memory_format=torch.channels_last)
        self.scalar = nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        return self.norm(self.frozen(self.second(self.first(x)))) @ self.turned * self.scalar


def test_values_stay_and_tensors_become_views():
    torch.manual_seed(0)
    module = Odd()
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    state = Flat(module)
    flat, layout = state.vector, Layout.of(*state.shapes)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    parts = layout.split(flat.numpy())
    assert layout.size == flat.numel() == layout.n_params + layout.n_buffers and (layout.n_buffers, layout.n_exact) == (6 + 8, 8)
    assert "second.weight" not in parts  # a weight that is there already
    for name, part in parts.items():
        np.testing.assert_array_equal(part, before[name].numpy())
    flat.fill_(7.0)
    for name, tensor in module.state_dict().items():
        assert name == "norm.num_batches_tracked" or (tensor == 7.0).all(), name
    assert module.first.weight is module.second.weight


def test_steps_change_the_flat_vector_and_a_pull_changes_the_module():
    module = Odd()
    state = Flat(module)
    flat, layout = state.vector, Layout.of(*state.shapes)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    start = flat.clone()
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        module(torch.randn(5, 4)).square().sum().backward()
        optimiser.step()
    parts, first = layout.split(flat.numpy()), layout.split(start.numpy())
    assert np.array_equal(parts["first.weight"], module.first.weight.detach()) and not np.array_equal(
        parts["first.weight"], first["first.weight"]
    )
    assert np.array_equal(parts["norm.running_mean"], module.norm.running_mean) and parts["norm.running_mean"].any()
    assert np.array_equal(parts["frozen.weight"], first["frozen.weight"])
    memoryview(flat.numpy()).cast("B")[:] = memoryview(start.numpy()).cast("B")
    assert np.array_equal(module.first.weight.detach(), first["first.weight"])


def test_parameters_come_before_buffers():
    state = Flat(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), exact=False)
    flat, (params, buffers, exact) = state.vector, state.shapes
    assert exact == {}
    assert list(params.items()) == [("0.weight", (3,)), ("0.bias", (3,)), ("1.weight", (2, 3)), ("1.bias", (2,))]
    assert list(buffers.items()) == [("0.running_mean", (3,)), ("0.running_var", (3,))]
    layout = Layout.of(params, buffers)
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias", "0.running_mean", "0.running_var")
    assert (layout.n_params, layout.n_buffers) == (14, 6)
    assert (flat[-3:] == 1).all() and (flat[-6:-3] == 0).all()


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(ProblemError, match=r"parameter 'weight' is float64, not float32.*precision='bfloat16'"):
        Flat(nn.Linear(2, 2, dtype=torch.float64))
