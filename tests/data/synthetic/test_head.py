"""The head CT and its deformed copies."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.data import fetch, open_dataset
from labkit.data.synthetic import fields, head
from labkit.errors import DataError
from tests.data.helpers import really_fetch
from tests.data.synthetic.helpers import SMALL, accuracy_of_counts, write_ct

pytestmark = pytest.mark.usefixtures("own_cache")


def test_without_the_head_ct_the_phantom_is_used_with_a_note():
    data = open_dataset("head-lesions", n=20, size=SMALL)
    assert data.name == "chest-phantom" and data.synthetic
    for noted in ("The head CT could not be had", "no network in this test", head.FILE, "is synthetic"):
        assert noted in data.note
    plain = open_dataset("chest-phantom", n=20, size=SMALL)
    assert plain.path == data.path and "could not" not in plain.note


def test_the_brain_is_found_and_deformed_with_its_head(little_ct):
    ct = head.read_ct(little_ct, SMALL)
    z, y, x = fields.axes(ct.hu.shape)
    distance = np.sqrt(z**2 + y**2 + x**2)
    assert ct.hu.shape == ct.organ.shape == (20, 30, 25)
    assert ct.organ[(distance < 0.5) & (distance > 0.35)].min() > 0.9 and ct.organ[distance > 0.95].max() < 0.1
    assert ct.hu[10, 4:14, 12].min() < ct.hu[10, 16:26, 12].min()  # what was at the end of the rows is at the front
    one, two = (head.deformed(np.random.default_rng(i), ct, SMALL) for i in range(2))
    assert one.hu.shape == SMALL and not np.allclose(one.hu, two.hu)
    assert 10 < one.hu[one.organ > 0.95].mean() < 50


def test_a_damaged_head_ct_is_refused(little_ct):
    good = little_ct.read_bytes()
    voxels = 36 * 48 * 40 * 2
    for content, words in [
        (b"", "truncated or damaged"),
        (b"text" * 400, "truncated or damaged"),
        (good[: voxels // 2], "truncated or damaged"),
    ]:
        little_ct.write_bytes(content)
        refuse_ct(little_ct, words)
    for content in (bytes(voxels), bytes(9), bytes(voxels + 2)):
        write_ct(little_ct, content)
        refuse_ct(little_ct, "SHA-256")
    write_ct(little_ct, bytes(voxels), name="tmpx/other.dat")
    refuse_ct(little_ct, "SHA-256")


def refuse_ct(path, words):
    with pytest.raises(DataError) as caught:
        open_dataset("head-lesions", n=20, size=SMALL)
    assert str(path) in str(caught.value) and words in str(caught.value) and "invesalius-examples" in str(caught.value)


@pytest.mark.slow
def test_the_real_head_ct_is_fetched_by_apt_without_root(monkeypatch):
    if not fetch._has_apt():
        pytest.skip("this system has no apt-get")
    monkeypatch.setattr(fetch, "fetch", really_fetch)
    data = open_dataset("head-lesions", n=300, size=(16, 32, 32))
    if data.name != "head-lesions":
        pytest.skip(data.note)
    assert accuracy_of_counts(data) < 0.75
    path, _ = head.find_ct()
    ct = head.read_ct(path, (32, 64, 64))
    assert 1.2 < ct.organ.mean() * np.prod([88 * 1.5, 204 * 0.957, 192 * 0.957]) * 1e-6 < 1.6  # litres of brain
    assert 20 < np.median(ct.hu[ct.organ > 0.95]) < 35
