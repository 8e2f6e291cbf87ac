"""The profile of a step: what its table and its line say, of networks and of problems.

Used by pytest.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import labkit
from labkit import inner
from labkit.errors import ProblemError
from labkit.inner import profiling
from labkit.models import cnn


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch):
    monkeypatch.setattr(profiling, "SIDES", (32,))
    monkeypatch.setattr(profiling, "NUMBERS", 10_000)


def test_the_profile_of_a_network():
    net = cnn.lenet((1, 8, 8), 3, 0.2)
    made = inner.profile(net, (torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2] * 2)), labkit.Inner(threads=2, block=2), steps=1)
    table = made.table()
    assert list(table.layer)[:3] == ["conv1", "pool1", "relu1"] and list(table.logical_tasks)[:2] == [64, 0]
    assert (table.blocks[table.op != "batch"] == 3).all() and (table.ms > 0).all() and 0.5 < table.share.sum() < 1
    assert (table.of_roof > 0).all()
    assert made.tasks.threads == 2 and len(made.tasks.start) == len(made.graph.tasks) > len(made.schedule.start)
    assert made.planned.makespan >= made.planned.bound > 0
    assert "on 2 threads" in str(made) and "critical path" in str(made) and "GFLOP/s float32" in str(made)
    assert set(made.peaks) == {"float32", "bfloat16", "bytes"} and made.instructions


def test_the_profile_of_a_problem():
    problem = labkit.Classifier("lenet", "digits", batch_size=8)
    made = inner.profile(problem, inner=1, steps=1)
    assert made.title == "lenet, 8 samples of 1 x 8 x 8" and made.schedule.threads == 1
    assert inner.profile(problem, 3, 1, steps=1).title.startswith("lenet, 3 samples")


def test_a_network_is_as_it_was_afterwards():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 3)).eval()
    net[0].weight.register_post_accumulate_grad_hook(lambda p: p.mul_(0))
    net[4].bias.grad = torch.ones(3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    inner.profile(net, (torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)), 2, steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert (
        not any(part.training for part in net.modules()) and net[0].weight.grad is None and net[4].bias.grad.tolist() == [1, 1, 1]
    )


def one_output(shape, n_outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout(0.1), nn.GroupNorm(1, 4), nn.Linear(4, 1))


def test_a_problem_is_profiled_with_what_it_says_and_in_float32():
    """Its loss, its threads, and which of its layers are computed whole."""
    seen = []

    def loss(outputs, targets):
        seen.append((len(outputs), outputs.dtype))
        return (outputs.flatten() - targets.flatten()).abs().mean()

    x = torch.randn(40, 1, 8, 8)
    own = labkit.Inner(threads=1, split="rows", whole=["3"])
    problem = labkit.Regressor(
        one_output, (x.numpy(), x[:, 0, 0, 0].numpy()), loss=loss, batch_size=6, precision="bfloat16", inner=own
    )
    made = inner.profile(problem, steps=1)
    assert made.title == "one_output, 6 samples of 1 x 8 x 8, in float32" and made.schedule.threads == 1
    assert "GroupNorm" in set(made.table().op) and set(seen) == {(6, torch.float32)}


def test_what_cannot_be_profiled():
    with pytest.raises(ProblemError, match="on a CPU, and this batch is on meta"):
        inner.profile(nn.Linear(2, 3), (torch.zeros(4, 2, device="meta"), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(TypeError, match="must be a network"):
        inner.profile("lenet")
    with pytest.raises(ProblemError, match=r"profile\(network, \(x, y\)\)"):
        inner.profile(nn.Linear(2, 3), torch.zeros(4, 2))
    with pytest.raises(ProblemError, match=r"1 \(GroupNorm\)"):
        inner.profile(nn.Sequential(nn.Linear(2, 4), nn.GroupNorm(2, 4)), (torch.zeros(4, 2), torch.zeros(4, 4)), 1)
