"""Few and short jets for what is trained, made of the sample once.

Used by the tests in this folder.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import labkit
from labkit.jets.files import convert
from tests.helpers import ended
from tests.jets.helpers import problem


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder with 120 jets of W, Z and t in a file, of their 12 hardest constituents, in row groups of 60."""
    folder = tmp_path_factory.mktemp("few") / "wzt"
    convert("jets", folder, classes="WZt", mass=(10, 200), particles=12, most=120, jets_per_file=120)
    return folder


@pytest.fixture(scope="package")
def lab():
    with labkit.connect(kind="threads", n_workers=2) as lab:
        yield lab


@pytest.fixture(scope="package")
def run(few, lab, tmp_path_factory):
    """Three passes by two workers without a barrier, with k-means after the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LABKIT_CACHE", str(tmp_path_factory.getbasetemp() / "labkit-cache"))
        return ended(labkit.train(problem(few), lab, update="agwu", passes=3, runs=tmp_path_factory.mktemp("runs"), seed=3))


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws is the same each time, whatever the tests before it have drawn."""
    torch.manual_seed(0)
    np.random.seed(0)
