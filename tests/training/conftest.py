"""A lab of two threads, and runs on it that end with the test."""

from __future__ import annotations

import pytest

import labkit
from labkit.training import supervisor
from tests.helpers import stopped_at_last


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)


@pytest.fixture
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


@pytest.fixture
def train(lab, tmp_path):
    """train() on two threads, recorded in a folder of the test."""
    with stopped_at_last(runs=tmp_path / "runs") as begin:
        yield lambda a_problem, **options: begin(a_problem, options.pop("lab", lab), **options)
