"""What all tests of subnets share: a lab of two threads, and a quick training on it."""

from __future__ import annotations

import pytest

import labkit
from labkit.subnets import train as subnets
from tests.subnets.helpers import SEED, problem


@pytest.fixture(scope="package")
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


@pytest.fixture
def train(lab, tmp_path, monkeypatch):
    """`train_subnets` with few epochs, also of the coarse network: what it learns is not the matter."""
    monkeypatch.setattr(subnets, "LENGTH", {"epochs": 6, "patience": 3})

    def train(a_problem=None, grid=(2, 2), **options):
        common = {"runs": tmp_path, "name": "joined", "progress": False, "epochs": 3, "seed": SEED}
        return labkit.train_subnets(a_problem or problem(), lab, grid, **common | options)

    return train
