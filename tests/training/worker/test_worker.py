"""The loop of one worker, piece by piece: orders, batches, the flat vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from labkit.errors import WorkerError
from labkit.models.flat import Layout, flatten
from labkit.training.worker.sampler import Shard, batches, pass_order

# -- which samples, in which order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 31, 33, 49])
def test_batches_cover_everything_in_order_and_none_is_a_lone_sample(n, batch_size):
    parts = batches(np.arange(n), batch_size)
    assert np.array_equal(np.concatenate([*parts, np.arange(0)]), np.arange(n))
    assert all(len(part) == batch_size for part in parts[:-1])
    if n > 1 and batch_size > 1:
        assert all(1 < len(part) <= batch_size + 1 for part in parts)
    assert len(parts) <= -(-n // batch_size)
    if n % batch_size == 0:
        assert len(parts) == n // batch_size  # local_steps is the number of optimiser steps


def test_orders_derive_from_seed_worker_and_pass():
    shard = np.arange(100, 117)
    orders = {(s, w, e): tuple(pass_order(shard, s, w, e)) for s in range(3) for w in range(3) for e in range(3)}
    assert len(set(orders.values())) == 27
    assert all(sorted(order) == list(shard) for order in orders.values())
    assert tuple(pass_order(shard, 1, 2, 0)) == orders[1, 2, 0]


def test_a_pass_covers_each_sample_once_whatever_is_taken_at_a_time():
    for sizes in ([17], [5] * 17, [1] * 17, [3, 30, 1, 17]):
        shard = Shard(seed=1, worker=2)
        shard.add(np.arange(10))
        shard.add(np.arange(10, 17))
        taken = np.concatenate([shard.take(n) for n in sizes])
        assert len(taken) == sum(sizes)
        for epoch in range(len(taken) // 17):
            mine = taken[17 * epoch : 17 * (epoch + 1)]
            assert sorted(mine) == list(range(17))
            assert np.array_equal(mine, pass_order(np.arange(17), 1, 2, epoch))


def test_taking_nothing_and_adding_nothing():
    shard = Shard(0, 0)
    shard.add(np.empty(0, np.int64))
    assert shard.take(0).dtype == np.int64 and len(shard.take(0)) == 0
    shard.add(np.arange(3))
    assert len(shard.take(0)) == 0 and len(shard.take(3)) == 3


def test_samples_that_are_added_come_with_the_next_pass():
    shard = Shard(0, 0)
    shard.add(np.arange(5))
    first = shard.take(5)
    shard.add(np.arange(5, 9))
    assert sorted(first) == list(range(5)) and sorted(shard.take(9)) == list(range(9))


# -- the flat vector ---------------------------------------------------------------------------------------------------


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


def test_flatten_keeps_values_and_makes_views():
    torch.manual_seed(0)
    module = Odd()
    before = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    flat, layout = flatten(module)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    parts = layout.split(flat.numpy())
    assert layout.size == flat.numel() == layout.n_params + layout.n_buffers and layout.n_buffers == 6
    assert "norm.num_batches_tracked" not in parts and "second.weight" not in parts  # a counter; a weight that is there already
    for name, part in parts.items():
        np.testing.assert_array_equal(part, before[name].numpy())
    flat.fill_(7.0)
    for name, tensor in module.state_dict().items():
        assert name == "norm.num_batches_tracked" or (tensor == 7.0).all(), name
    assert module.first.weight is module.second.weight


def test_steps_change_the_flat_vector_and_a_pull_changes_the_module():
    module = Odd()
    flat, layout = flatten(module)
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
    flat, layout = flatten(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias", "0.running_mean", "0.running_var")
    assert (layout.n_params, layout.n_buffers) == (14, 6)
    assert (flat[-3:] == 1).all() and (flat[-6:-3] == 0).all()


def test_weights_that_are_not_float32_are_refused():
    with pytest.raises(WorkerError, match=r"tensors \['weight', 'bias'\] are not float32.*precision='bfloat16'"):
        flatten(nn.Linear(2, 2, dtype=torch.float64))


def test_a_layout_splits_scalars_and_empty_tensors():
    layout = Layout(("a", "b", "c"), ((), (0, 3), (2, 2)), 5, 0)
    parts = layout.split(np.arange(5, dtype=np.float32))
    assert [part.shape for part in parts.values()] == [(), (0, 3), (2, 2)]
    assert parts["a"] == 0 and parts["c"].tolist() == [[1, 2], [3, 4]]
