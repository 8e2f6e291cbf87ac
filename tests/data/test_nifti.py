"""Volumes by class, in the form of MosMedData."""

from __future__ import annotations

import gzip
import sys

import numpy as np
import pytest

from labkit.data import open_dataset
from labkit.errors import DataError
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


def volumes(folder, *values, dtype=np.float32):
    for label, of_class in zip("ab", values, strict=True):
        for number, volume in enumerate(of_class):
            nifti(folder / label / f"{number}.nii.gz", volume, dtype=dtype)
    return folder


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0, 1, np.float32), (500, 4000, np.int16), (-4, 4, np.float32), (0, 200, np.uint8)]
)
def test_volumes_that_are_no_ct_have_the_values_of_their_files(low, high, dtype, tmp_path):
    made = [low + (high - low) * np.random.default_rng(seed).random((6, 5, 4)) for seed in range(4)]
    data = open_dataset(volumes(tmp_path / "mri", made[:2], made[2:], dtype=dtype), size=(4, 5, 6))
    x, _ = every(data)
    assert x.dtype == np.float32 and "not taken as CT" in data.note and "units='HU'" in data.note
    np.testing.assert_allclose(x[0, 0], made[0].astype(dtype)[::-1, ::-1].transpose(2, 1, 0), rtol=1e-5, atol=1e-5)


def test_units_are_asked_for_where_values_do_not_tell(tmp_path, mosmed):
    mri = np.random.default_rng(0).random((6, 5, 4))
    folder = volumes(tmp_path / "mixed", [mri * 2000 - 1000], [mri * 100])
    refused(folder, folder / "a" / "0.nii.gz", folder / "b" / "0.nii.gz", "units='HU'", "units='file'")
    as_ct, as_is = (open_dataset(folder, size=(4, 5, 6), units=units) for units in ("HU", "file"))
    assert every(as_ct)[0].dtype == np.float16 and every(as_ct)[0].max() == 1
    assert "1 of 2 volumes have no value below -500" in as_ct.note and every(as_is)[0].max() > 900
    refused(volumes(tmp_path / "padded", [mri * 9 - 20000], [mri]), "-20000", "units='file'")
    with pytest.raises(ValueError, match="units='MRI' is not known"):
        open_dataset(folder, units="MRI")
    assert "taken as CT" in open_dataset(mosmed).note and open_dataset(mosmed, units="HU").path != open_dataset(mosmed).path


def test_a_window_that_leaves_nothing_is_refused(tmp_path):
    mri = 500 + np.random.default_rng(0).random((6, 5, 4))
    folder = volumes(tmp_path / "mri", [mri], [mri + 100])
    with pytest.raises(DataError, match=r"1\.0 everywhere after conversion.*units='file'"):
        open_dataset(folder, units="HU")
    refused(volumes(tmp_path / "complex", [mri], [mri], dtype=np.complex64), "complex64")


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


def turned(degrees):
    a = np.radians(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return affine


FLIPPED = np.diag([-1.0, -1, 1, 1])
FORMS = {  # sform, qform, and what is said of the axes
    "sform alone": (np.eye(4), None, None),
    "both the same": (turned(10), turned(10), None),
    "neither": (None, None, "Axes not given in the file"),
    "two": (np.eye(4), FLIPPED, "Of two orientations in the file"),
    "oblique": (turned(30), None, "Oblique by more than 20 degrees"),
    "sheared": (np.eye(4) + 0.9 * np.eye(4, k=1) * [1, 1, 0, 0], None, "Oblique by more than 20 degrees"),
}


@pytest.mark.parametrize("form", FORMS)
def test_axes_that_a_file_does_not_say_or_says_twice_are_counted(form, tmp_path):
    nibabel, air = pytest.importorskip("nibabel"), -1000 * (len(form) % 2)  # as CT, or as it is
    sform, qform, said = FORMS[form]
    for label in "ab":
        for number in range(2):
            volume = np.random.default_rng(number).random((6, 5, 4)).astype(np.float32) * 500
            volume[0] = air
            image = nibabel.Nifti1Image(volume, None)
            image.header.set_sform(np.eye(4) if number else sform, 1 if number or sform is not None else 0)
            image.header.set_qform(None if number else qform, int(not number and qform is not None))
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            nibabel.save(image, tmp_path / "set" / label / f"{number}.nii.gz")
    note = open_dataset(tmp_path / "set", size=(4, 5, 6)).note
    assert (
        f"{said}" in note and note.rstrip().endswith(": 2.")
        if said
        else not any(text in note for _, _, text in FORMS.values() if text)
    )


def test_two_axes_of_one_direction_are_refused(tmp_path):
    affine = np.eye(4)
    affine[:, 1] = affine[:, 0] + [0, 1e-6, 0, 0]
    volumes(tmp_path / "set", [np.ones((6, 5, 4))], [np.ones((6, 5, 4))])
    nifti(tmp_path / "set" / "a" / "0.nii.gz", np.random.default_rng(0).random((6, 5, 4)), affine, dtype=np.float32)
    refused(tmp_path / "set", "no direction for one of the axes")


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
