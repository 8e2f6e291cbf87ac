"""Pictures by class, in the form of TF-Flowers and Extended Yale B."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from labkit.data import open_dataset
from tests.data.helpers import every, picture, refused

pytestmark = pytest.mark.usefixtures("own_cache")


def test_pictures_of_varying_size_are_resized_with_a_note(flowers, capsys):
    data = open_dataset(flowers)
    assert (data.name, data.shape, data.n_classes) == ("flower_photos", (3, 180, 180), 3)
    for noted in ("0 daisy, 1 roses, 2 tulips", "9 sizes", "180x180"):
        assert noted in data.note
    x, y = every(data)
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and x.dtype == np.uint8
    small = open_dataset(flowers, size=(16, 24))
    assert small.shape == (3, 16, 24) and small.path != data.path
    with Image.open(flowers / "roses" / "1.jpg") as one:
        expected = np.asarray(one.resize((24, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(every(small)[0][4], np.moveaxis(expected, -1, 0))
    assert open_dataset(data.path).note == data.note  # a run's record names the folder of the shards


def test_pictures_of_one_size_stay_as_they_are(tmp_path):
    expected = [picture(tmp_path / "set" / f"c{i}" / "a.png", 12, 17, seed=i) for i in range(3)]
    data = open_dataset(tmp_path / "set")
    assert data.shape == (3, 12, 17) and "resized" not in data.note
    np.testing.assert_array_equal(every(data)[0], np.moveaxis(expected, -1, 1))


def test_pictures_of_several_kinds_become_rgb_bytes(tmp_path):
    folder = tmp_path / "set"
    grey = picture(folder / "a" / "grey.png", 8, 9, mode="L")
    picture(folder / "a" / "colour.bmp", 8, 9)
    wide = (np.arange(72, dtype=np.uint16) * 900).reshape(8, 9)
    Image.fromarray(wide).save(folder / "a" / "wide.png")
    (folder / "b").mkdir()
    Image.fromarray(grey).convert("P").save(folder / "b" / "palette.png", transparency=b"\x80" * 256)
    Image.new("CMYK", (9, 8)).save(folder / "b" / "print.jpg")
    Image.new("RGBA", (9, 8), (1, 2, 3, 0)).save(folder / "b" / "clear.PNG")
    x, _ = every(open_dataset(folder))
    assert x.shape == (6, 3, 8, 9)
    np.testing.assert_array_equal(x[1], np.broadcast_to(grey, (3, 8, 9)))
    np.testing.assert_array_equal(x[2, 0], np.rint(wide / 257).astype(np.uint8))
    np.testing.assert_array_equal(x[3, :, 0, 0], [1, 2, 3])


def pgm(path, pixels, comment=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"P5\n" + comment + b"%d %d\n255\n" % pixels.shape[::-1] + pixels.tobytes())


def test_extended_yale_b_is_read_with_its_folders(tmp_path):
    rng, expected = np.random.default_rng(0), []
    for name in ("yaleB01", "yaleB02", "yaleB11"):
        for light in ("+000E+00", "-005E+10"):
            expected.append(rng.integers(0, 256, (192, 168), dtype=np.uint8))
            pgm(tmp_path / "CroppedYale" / name / f"{name}_P00A{light}.pgm", expected[-1], b"# made by hand\n")
        pgm(tmp_path / "CroppedYale" / name / f"{name}_P00_Ambient.pgm", np.zeros((480, 640), dtype=np.uint8))
        (tmp_path / "CroppedYale" / name / f"{name}_P00.info").write_text("")
        (tmp_path / "CroppedYale" / name / f"{name}_P00A+050E-40.pgm.bad").write_bytes(b"damaged when it was published")
    data = open_dataset(tmp_path / "CroppedYale")
    assert data.shape == (1, 192, 168) and data.n_classes == 3 and "2 yaleB11" in data.note
    x, y = every(data)
    np.testing.assert_array_equal(x[:, 0], expected)
    assert y.tolist() == [0, 0, 1, 1, 2, 2]


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 9, 1):
        picture(tmp_path / "set" / f"CT-{i}" / "a.png", 4, 4)
    assert "0 CT-1, 1 CT-9, 2 CT-10" in open_dataset(tmp_path / "set").note


def test_damaged_pictures_are_refused(flowers, monkeypatch):
    path = flowers / "roses" / "1.jpg"
    good = path.read_bytes()
    for damaged, words in [
        (b"", "is empty"),
        (good[:100], "no whole picture"),
        (good[: len(good) // 2], "no whole picture"),
        (b"GIF89a" + good, "no whole picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no whole picture"),  # Pillow would start a program
        (b"P5\n9 9\n255\nabc", "no whole picture"),
        (b"P5\n9999 9999\n255\nabc", "9999x9999 pixels"),
        (b"P5\n99999 99999\n255\nabc", "decompression bomb"),
    ]:
        path.write_bytes(damaged)
        refused(flowers, path, words)
    path.write_bytes(good)
    shutil.rmtree(flowers / "daisy")
    (flowers / "daisy").mkdir()
    refused(flowers, flowers / "daisy", "no sample")
    shutil.rmtree(flowers / "daisy")
    shutil.rmtree(flowers / "tulips")
    refused(flowers, flowers, "one class")
