"""A lab of two threads and runs that end with the test; and a data set of small showers."""

from __future__ import annotations

import pytest

from tests.showers.helpers import data
from tests.training.conftest import _quick, lab, train  # noqa: F401  fixtures


@pytest.fixture
def small(cache):
    return data()
