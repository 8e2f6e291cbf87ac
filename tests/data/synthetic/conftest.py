"""The head CT of these tests: a ball with a shell in the true file format; the real one is fetched by a slow test."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from labkit.data.synthetic import fields, head
from tests.data.synthetic.helpers import write_ct


@pytest.fixture
def little_ct(tmp_path, monkeypatch):
    """The file of the head CT with a ball of brain in a shell of bone, 36x48x40, all of it used."""
    shape = (36, 48, 40)
    z, y, x = fields.axes(shape)
    distance = np.sqrt(z**2 + y**2 + x**2)
    rng = np.random.default_rng(0)
    hu = np.select([distance < 0.75, distance < 0.9], [30 + 6 * fields.smooth(rng, shape, 8), 1000], -1000)
    hu = np.where((distance < 0.2) & (y > 0.05), 5, hu).astype("<i2")
    path = tmp_path / "ct" / head.FILE
    path.parent.mkdir()
    write_ct(path, hu.tobytes())
    monkeypatch.setattr(head, "SHAPE", shape)
    monkeypatch.setattr(head, "BRAIN", (slice(None),) * 3)
    monkeypatch.setattr(head, "SHA256", hashlib.sha256(hu.tobytes()).hexdigest())
    monkeypatch.setenv("LABKIT_DATA", str(path.parent))
    return path
