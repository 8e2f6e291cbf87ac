"""Fixtures of the figures' tests: pictures by default, and a small run."""

from __future__ import annotations

import pytest

from labkit import plots
from tests.plots.helpers import Recorded


@pytest.fixture(autouse=True)
def static():
    plots.extension("static")
    yield
    plots.extension("static")


@pytest.fixture
def run(tmp_path):
    return Recorded(tmp_path)
