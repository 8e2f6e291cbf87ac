"""What tests of jets lend each other: jets of the sample, and the network as its formulas have it, with a tensor of all edges.

Used by the tests in this folder.
"""

from __future__ import annotations

import functools

import numpy as np
import torch.nn.functional as F

from labkit.jets import UCluster
from labkit.jets.files import Jets, load
from labkit.jets.networks import GAP, ABCNet

SMALL = {"batch_size": 16, "score_samples": 10, "train_samples": 48, "neighbours": 4, "pretrain": 1.0}


def problem(few, **settings):
    """UCluster on the jets of the fixture `few`, all of them in memory."""
    return UCluster(next(few.glob("*.parquet")), **{**SMALL, **settings})


def bits(run):
    return run.flat().view(np.uint32)


@functools.cache
def sample() -> Jets:
    return load("jets")


class PlainGAP(GAP):
    """Attention pooling, W_e applied to each difference, nothing left out."""

    def forward(self, x, neighbours, momentum):
        around = x[neighbours.t()]  # (M, K, F_in)
        k = around.shape[1]
        e = self.edge((x[:, None] - around).flatten(0, 1), momentum).unflatten(0, (-1, k))
        h = self.own(x, momentum)
        if self.attention == "faithful":
            c = self.of_own(h, momentum)[:, None] + self.of_edge(e.flatten(0, 1), momentum).unflatten(0, (-1, k))
        else:
            c = self.of_own.linear(h)[:, None] + self.of_edge.linear(e)
        a = F.leaky_relu(c, 0.2).softmax(1)
        return F.relu((a * e).sum(1)), e.max(1).values


def plain(network: ABCNet) -> ABCNet:
    """The same network, computed so."""
    for part in (network.gap_0, network.gap_1):
        part.__class__ = PlainGAP
    return network
