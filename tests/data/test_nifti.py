"""Volumes by class, in the form of MosMedData."""

from __future__ import annotations

import gzip
import sys

import numpy as np
import pytest

from labkit.data import open_dataset
from tests.data.helpers import body, every, nifti, refused

pytestmark = pytest.mark.usefixtures("own_cache")


def test_volumes_by_class_are_clipped_scaled_and_resized(mosmed):
    data = open_dataset(mosmed, size=(5, 12, 10))
    assert (data.shape, data.n_classes, data.synthetic) == ((1, 5, 12, 10), 3, False)
    assert "0 CT-0, 1 CT-1, 2 CT-2" in data.note and "[-1000, 400] HU" not in data.note and "HU clipped" in data.note
    x, y = every(data)
    assert y.tolist() == [0, 0, 1, 1, 2, 2] and x.dtype == np.float16 and x.min() >= 0 and x.max() <= 1
    # twice as coarse: neighbours averaged, from head to foot the last axis, front to back, right to left
    expected = np.clip((body() + 1000) / 1400, 0, 1)[::-1, ::-1].transpose(2, 1, 0)
    expected = expected.reshape(5, 2, 12, 2, 10, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(x[0, 0, 1:-1, 1:-1, 1:-1], expected[1:-1, 1:-1, 1:-1], atol=0.02)
    assert open_dataset(mosmed).shape == (1, 64, 128, 128)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_axes_of_a_volume_are_those_of_the_patient(suffix, tmp_path):
    """However the file orders and turns its axes, the same patient gives the same volume."""
    from labkit.data.nifti import read_volume

    hu, size = body((8, 10, 6)), (6, 10, 8)
    plain = read_volume(nifti(tmp_path / f"plain{suffix}", hu), size)
    np.testing.assert_allclose(plain, np.clip((hu + 1000) / 1400, 0, 1)[::-1, ::-1].transpose(2, 1, 0), atol=1e-3)
    affine = np.array([[0, 0, -2, 0], [0.8, 0, 0, 0], [0, -3, 0, 0], [0, 0, 0, 1.0]])  # y up, z down, x down; voxels of mm
    turned = hu[::-1, :, ::-1].transpose(1, 2, 0)
    np.testing.assert_array_equal(read_volume(nifti(tmp_path / f"turned{suffix}", turned, affine), size), plain)
    np.testing.assert_array_equal(read_volume(nifti(tmp_path / f"four{suffix}", hu[..., None]), size), plain)


def test_a_large_volume_is_read_slice_by_slice(tmp_path, monkeypatch):
    """Memory holds a slice and the result, not the volume."""
    import tracemalloc

    from labkit.data.nifti import read_volume

    path = nifti(tmp_path / "large.nii.gz", np.zeros((128, 128, 200)))
    read_volume(path, (8, 16, 16))
    tracemalloc.start()
    try:
        read_volume(path, (8, 16, 16))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 128 * 128 * 200 / 4


def test_damaged_volumes_are_refused(mosmed):
    path = mosmed / "CT-1" / "study_10.nii.gz"
    good = path.read_bytes()
    for damaged, words in [
        (b"", "is empty"),
        (good[:50], "no whole NIfTI"),
        (good[: len(good) // 2], "no whole NIfTI"),
        (gzip.decompress(good), "no whole NIfTI"),
        (gzip.compress(gzip.decompress(good)[:400]), "no whole NIfTI"),
        (gzip.compress(gzip.decompress(good)[:100]), "no whole NIfTI"),
        (gzip.compress(b"text" * 900), "no whole NIfTI"),
        (good[:-200] + bytes(192) + good[-8:], "no whole NIfTI"),
    ]:
        path.write_bytes(damaged)
        refused(mosmed, path, words)
    for hu, words in [
        (body()[:, :, 0], "(20, 24)"),
        (np.stack([body()] * 2, axis=-1), "(20, 24, 10, 2)"),
        (body()[:, :1], "(20, 1, 10)"),
    ]:
        nifti(path, hu)
        refused(mosmed, path, words)
    hu = body()
    hu[3, 4, 5] = np.nan
    nifti(path, hu, dtype=np.float32)
    refused(mosmed, path, "slice 5")
    nibabel = pytest.importorskip("nibabel")
    flat = nibabel.Nifti1Image(body().astype(np.int16), None)
    flat.header.set_sform(np.diag([1.0, 0, 1, 1]), 1)
    nibabel.save(flat, path)
    refused(mosmed, path, "no whole NIfTI", "affine")


def test_without_nibabel_a_volume_says_what_is_missing(tmp_path, monkeypatch):
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "1.nii").write_bytes(b"x" * 400)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    refused(tmp_path / "set", "nibabel, which is not here", "pip install labkit[volumes]")
