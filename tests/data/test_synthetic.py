"""Tests of labkit.data.volumes: the same seed gives the same patients, what is generated says so, and the classes differ
in nothing but the shape of what was added.

The head CT of these tests is a ball with a shell in the true file format; the real one is fetched by a slow test.
"""

from __future__ import annotations

import hashlib
import tarfile
from io import BytesIO

import numpy as np
import pytest

from labkit.data import fetch, fields, head, open_dataset
from labkit.errors import DataError

SMALL = (16, 24, 20)
really_fetch = fetch.fetch


pytestmark = pytest.mark.usefixtures("own_cache")


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


def write_ct(path, voxels, name="tmpx/matrix.dat"):
    with tarfile.open(path, "w") as file:
        for called, content in (("tmpx/main.plist", b"<plist/>"), (name, voxels)):
            member = tarfile.TarInfo(called)
            member.size = len(content)
            file.addfile(member, BytesIO(content))


def everything(dataset, split="train"):
    return dataset.raw(np.arange(getattr(dataset, f"n_{split}")), split).astype(np.float32), dataset.labels(split)


def counts(x):
    """What needs no eye for shapes: mean, spread, maximum, percentiles and histogram of each volume."""
    x = x.reshape(len(x), -1)
    histogram = np.stack([np.histogram(volume, bins=24, range=(0, 1))[0] for volume in x]) / x.shape[1]
    percentiles = np.percentile(x, [5, 25, 50, 75, 95, 99], axis=1).T
    return np.hstack([x.mean(1)[:, None], x.std(1)[:, None], x.max(1)[:, None], percentiles, np.log(histogram + 1e-5)])


def accuracy_of_counts(data):
    """Of a logistic regression on `counts`, cross-validated over all volumes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = (np.concatenate(both) for both in zip(everything(data), everything(data, "test"), strict=True))
    return cross_val_score(make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)), counts(x), y, cv=5).mean()


@pytest.mark.parametrize("name", ["chest-phantom", "head-lesions"])
def test_volumes_are_generated_balanced_and_say_so(name, little_ct):
    data = open_dataset(name, n=42, size=SMALL)
    assert (data.name, data.shape, data.n_classes, data.synthetic) == (name, (1, *SMALL), 2, True)
    assert (data.n_train, data.n_test) == (34, 8)
    assert ("is synthetic" if name == "chest-phantom" else "is semi-synthetic") in data.note
    for split in ("train", "test"):
        x, y = everything(data, split)
        assert abs(int(y.sum()) * 2 - len(y)) <= 1
        assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.1
        assert len({volume.tobytes() for volume in x}) == len(x)
    again = open_dataset(data.path)
    assert again.synthetic and again.note == data.note  # as the record of a run names it


@pytest.mark.parametrize("name", ["chest-phantom", "head-lesions"])
def test_a_patient_depends_on_seed_and_number_alone(name, little_ct):
    one, more = open_dataset(name, n=20, size=SMALL), open_dataset(name, n=25, size=SMALL)
    for split, n in (("train", 16), ("test", 4)):
        np.testing.assert_array_equal(one.raw(np.arange(n), split), more.raw(np.arange(n), split))
        np.testing.assert_array_equal(one.labels(split), more.labels(split)[:n])
    other = open_dataset(name, n=20, size=SMALL, seed=1)
    assert not np.array_equal(other.raw([0]), one.raw([0])) and open_dataset(name, n=20, size=SMALL).path == one.path


def test_what_is_asked_of_volumes_is_checked():
    for options, words in [
        ({"n": 19}, "n=19"),
        ({"n": 40.0}, "n=40.0"),
        ({"size": (8, 64, 64)}, "16 at least"),
        ({"size": (64, 64)}, "(depth, height, width)"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"passes": 3}, "It has n, size, seed"),
    ]:
        for name in ("chest-phantom", "head-lesions"):
            with pytest.raises(ValueError) as caught:
                open_dataset(name, **options)
            assert words in str(caught.value)


def test_both_classes_get_the_same_in_sum():
    """Lesions or vessels: mean and spread of the classes agree within their errors."""
    x, y = everything(open_dataset("chest-phantom", n=200, size=SMALL))
    for of in (x.mean(axis=(1, 2, 3, 4)), x.std(axis=(1, 2, 3, 4))):
        apart = abs(of[y == 0].mean() - of[y == 1].mean())
        assert apart < 3 * of.std() * np.sqrt(4 / len(y))


@pytest.mark.parametrize("name", ["chest-phantom", "head-lesions"])
def test_counting_bright_voxels_does_not_solve_it(name, little_ct):
    assert accuracy_of_counts(open_dataset(name, n=300, size=SMALL)) < 0.75


def test_a_lesion_is_a_blob_in_the_organ_and_tubes_are_thin():
    z, y, x = fields.axes((32, 64, 64))
    organ = ((z**2 + y**2 + x**2) < 0.5).astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(5):
        blob = fields.lesion(rng, organ, (0.2, 0.25), (300, 600))
        assert 200 < blob.max() <= 600 and not blob[organ == 0].any()
        volume = (blob > blob.max() / 2).mean() * 8  # in half widths
        assert 0.3 < volume / (4 / 3 * np.pi * 0.22**3) < 3
        thin = fields.tubes(rng, organ, 5)
        assert thin.min() >= 0 and 0.5 < thin.max() <= 1
        worn = fields.blur(thin, 2.0).max() / thin.max()
        assert worn < 0.6 * fields.blur(blob, 2.0).max() / blob.max()


def test_values_along_vessels_are_those_of_the_lesion_in_the_organ():
    z, y, x = fields.axes((32, 48, 40))
    organ = ((z**2 + y**2 + x**2) < 0.5).astype(np.float32)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        blob = fields.lesion(rng, organ, (0.2, 0.25), (300, 600))
        moved = fields.along_vessels(rng, organ, blob)
        kept = blob[blob > 0.1 * blob.max()]
        np.testing.assert_array_equal(np.sort(moved[moved > 0]), np.sort(kept))
        assert not moved[fields.blur(organ, 1.0) < 0.01].any()
        assert fields.blur(moved, 2.0).max() < 0.75 * fields.blur(blob, 2.0).max()


@pytest.mark.parametrize(("old", "new"), [(7, 7), (5, 13), (40, 8), (9, 4), (1, 3)])
def test_resizing_keeps_constants_and_centres(old, new):
    weights = fields.resize_weights(old, new)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (weights >= 0).all() and (old != new or np.array_equal(weights, np.eye(old)))
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)  # from either end
    field = np.full((old, 3, 4), 7.0)
    np.testing.assert_allclose(fields.resized(field, (new, 5, 2)), 7, rtol=1e-6)


def test_a_smooth_field_has_spread_one_and_no_jumps():
    rng = np.random.default_rng(0)
    drawn = np.stack([fields.smooth(rng, (20, 24, 28), 3) for _ in range(60)])
    np.testing.assert_allclose(drawn.std(axis=0).mean(), 1, atol=0.05)
    assert np.abs(np.diff(drawn, axis=3)).max() < 0.9


# --- the head CT


def test_without_the_head_ct_the_phantom_takes_its_place_and_that_is_said():
    data = open_dataset("head-lesions", n=20, size=SMALL)
    assert data.name == "chest-phantom" and data.synthetic
    for said in ("The head CT could not be had", "no network in this test", head.FILE, "is synthetic"):
        assert said in data.note
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
    for content, words in [(bytes(voxels), "SHA-256"), (bytes(9), "9 bytes"), (bytes(voxels + 2), f"{voxels + 1} bytes")]:
        write_ct(little_ct, content)
        refuse_ct(little_ct, words)
    write_ct(little_ct, bytes(voxels), name="tmpx/other.dat")
    refuse_ct(little_ct, "0 bytes")


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
