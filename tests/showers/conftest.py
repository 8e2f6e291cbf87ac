"""A lab of two threads and runs that end with the test; and a data set of small showers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.showers.helpers import data
from tests.training.conftest import _quick, lab, train  # noqa: F401  fixtures


@pytest.fixture
def small(cache):
    return data()


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws is the same each time, whatever the tests before it have drawn."""
    torch.manual_seed(0)
    np.random.seed(0)
