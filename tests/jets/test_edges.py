"""Edges in blocks: the same numbers and gradients as with a tensor of all edges, in training and in evaluation.

Used by pytest.
"""

from __future__ import annotations

import pytest
import torch

from labkit.jets import edges
from labkit.jets.networks import EPS, GAP
from tests.jets.helpers import PlainGAP

M, K, F_IN, WIDTH = 23, 5, 4, 7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["faithful", "paper"])
def test_numbers_statistics_and_gradients_are_those_of_plain_tensors(attention, training, monkeypatch):
    monkeypatch.setattr(edges, "ROWS", 6)  # four blocks, the last one shorter
    torch.manual_seed(1)
    one = GAP(F_IN, WIDTH, attention).double()
    for name, p in one.named_parameters():
        p.data += 0.3 * torch.randn_like(p) * (name != "of_own.linear.bias")
    one.edge.norm.running_mean.normal_()
    other = GAP(F_IN, WIDTH, attention).double()
    other.load_state_dict(one.state_dict())
    other.__class__ = PlainGAP
    neighbours = torch.stack([torch.randperm(M) for _ in range(K)])
    neighbours[1, :4] = neighbours[0, :4]  # some twice
    x, weight = torch.randn(M, F_IN, dtype=torch.float64), torch.randn(2, M, WIDTH, dtype=torch.float64)
    results = []
    for gap in (one, other):
        gap.train(training)
        own = x.clone().requires_grad_()
        v, largest = gap(own, neighbours, 0.3)
        ((v * weight[0]).sum() + (largest * weight[1]).sum()).backward()
        trained = {name: p.grad for name, p in gap.named_parameters() if p.requires_grad}
        results.append([v, largest, own.grad, trained, gap.edge.norm.running_mean, gap.edge.norm.running_var])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    assert EPS == 1e-3 and all(grad is not None for grad in results[0][3].values())


def test_it_never_holds_all_edges():
    """Memory that a block takes, however many there are."""
    made = edges.Edges(torch.zeros(K, 10_000, dtype=torch.int64))
    blocks = made.blocks(torch.zeros(10_000, WIDTH))
    assert {memory.data_ptr() for _, _, memory in blocks} == {blocks[0][2].data_ptr()}
    assert sum(part.stop - part.start for part, _, _ in blocks) == 10_000 and len(blocks[0][2]) == edges.ROWS
