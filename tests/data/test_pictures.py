"""Pictures by class, in the form of TF-Flowers and Extended Yale B."""

from __future__ import annotations

import shutil
import struct
import zlib

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
    with pytest.raises(ValueError, match="a sample of 10,000,000,000 values is too large"):
        open_dataset(flowers, size=(100_000, 100_000))
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


def test_one_odd_sized_picture_leaves_the_others_as_they_are(tmp_path):
    given = [picture(tmp_path / "set" / name / f"{n}.png", 12, 17, seed=n) for name in "ab" for n in range(2)]
    picture(tmp_path / "set" / "b" / "odd.png", 40, 30)
    data = open_dataset(tmp_path / "set")
    assert data.shape == (3, 12, 17) and "Resized to 12x17, the size of the other 4: 1 (odd.png)." in data.note
    np.testing.assert_array_equal(every(data)[0][:4], np.moveaxis(given, -1, 1))
    assert "Resized to 40x30, the size of the other 1: 4 (0.png)." in open_dataset(tmp_path / "set", size=(40, 30)).note


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
    np.testing.assert_allclose(x[2, 0], wide / 257, rtol=1e-6)  # on the scale of bytes, with all its bits
    np.testing.assert_array_equal(x[3], 255)  # clear: the ground
    np.testing.assert_allclose(x[4, 0], grey * (128 / 255) + 255 * (127 / 255), atol=1)


def icon(path, colour=(0, 0, 0), side=5):
    """A square in the alpha channel alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.new("RGBA", (12, 12), (*colour, 0))
    drawn.paste((*colour, 255), (2, 2, 2 + side, 2 + side))
    drawn.save(path, **{"lossless": True, "exact": True} if path.suffix == ".webp" else {})


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_transparent_pictures_are_laid_on_a_ground(tmp_path, suffix):
    for label in "ab":
        for side in range(3, 6):
            icon(tmp_path / "icons" / label / f"{side}{suffix}", side=side)
    data = open_dataset(tmp_path / "icons")
    assert "With transparency, laid on white" in data.note
    np.testing.assert_array_equal((every(data)[0][:, 0] == 0).sum(axis=(1, 2)), [9, 16, 25] * 2)
    assert every(open_dataset(tmp_path / "icons", ground="#ff0000"))[0][0, :, 0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match="ground='blak' is no colour"):
        open_dataset(tmp_path / "icons", ground="blak")


def test_shapes_that_cannot_be_seen_on_the_ground_are_refused(tmp_path):
    for label in "ab":
        icon(tmp_path / "icons" / label / "1.png", (255, 255, 255), side=3 + ord(label) % 2)
    refused(tmp_path / "icons", tmp_path / "icons" / "a" / "1.png", "white ground", "ground='black'")
    assert every(open_dataset(tmp_path / "icons", ground="black"))[0].max() == 255
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[0, 0] = 9, 9, 9, 0  # a colour, and all of it transparent
    Image.fromarray(pixels).save(tmp_path / "icons" / "a" / "1.png")
    refused(tmp_path / "icons", "transparent everywhere")


def test_grey_and_palette_pictures_with_transparency(tmp_path):
    alpha = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
    Image.merge("LA", [Image.new("L", (8, 8), 0), Image.fromarray(alpha)]).save(tmp_path / "set" / "a" / "1.png")
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    Image.fromarray(levels * 60).save(tmp_path / "set" / "b" / "1.png", transparency=0)  # one grey value is clear
    x, _ = every(open_dataset(tmp_path / "set"))
    assert x.shape == (2, 1, 8, 8)
    np.testing.assert_allclose(x[0, 0], 255 - alpha.astype(int), atol=1)
    np.testing.assert_array_equal(x[1, 0], np.where(levels == 0, 255, levels * 60))


def png(path, bits, values, key):
    """A grey picture (h, w), or one of colours (h, w, 3), of so many bits, with the value that stands for transparency."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = values.reshape(len(values), -1)
    packed = [row.astype(">u2").tobytes() for row in rows]
    if bits < 16:
        packed = [np.packbits(np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, -bits:]).tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), bits, 2 * (values.ndim - 2), 0, 0, 0)
    said = struct.pack(f">{len(key)}H", *key)
    chunks = [(b"IHDR", header), (b"tRNS", said), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed))), (b"IEND", b"")]
    made = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(made))


@pytest.mark.parametrize(("bits", "colours"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)])
def test_one_value_stands_for_transparency_in_the_bits_of_the_file(bits, colours, tmp_path):
    top, chance = 2**bits - 1, np.random.default_rng(0)
    levels, keys = chance.integers(0, 2, (6, 8)) * top, {"a": top, "b": 0}
    for label, key in keys.items():
        values = levels if colours == 1 else np.repeat(levels[..., None], 3, -1)
        png(tmp_path / "set" / label / "1.png", bits, values, [key] * colours)
    data, scale = open_dataset(tmp_path / "set", ground="#c0c0c0"), 65535 if (bits, colours) == (16, 1) else 255
    assert "With transparency, laid on #c0c0c0 (ground=...): 2." in data.note
    for x, key in zip(every(data)[0], keys.values(), strict=True):
        np.testing.assert_array_equal(x[0], np.where(levels == key, 192 * scale // 255, levels // top * scale))


def test_grey_values_of_16_bits_that_cannot_be_seen_are_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 2, (6, 8)) * 65535
    for label in "ab":
        png(tmp_path / "set" / label / "1.png", 16, values, [0])
    refused(tmp_path / "set", "nothing of it is seen on a white ground", "ground='black'")
    png(tmp_path / "set" / "a" / "1.png", 16, values * 0, [0])
    refused(tmp_path / "set", "transparent everywhere")


UPRIGHT = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> how such a picture was stored


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_pictures_are_upright_whatever_their_exif_orientation(tmp_path, suffix):
    sky = Image.new("RGB", (24, 40))
    sky.paste((255, 255, 255), (0, 0, 24, 8))
    sky.paste((255, 0, 0), (0, 8, 8, 40))  # left
    for orientation, how in UPRIGHT.items():
        tag = Image.Exif()
        tag[0x0112] = orientation
        stored = sky if how is None else sky.transpose(how)
        for label in "ab":
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            stored.save(
                tmp_path / "set" / label / f"{orientation}{suffix}", exif=tag, **{"quality": 95} if suffix == ".jpg" else {}
            )
    data = open_dataset(tmp_path / "set")
    assert data.shape == (3, 40, 24) and "resized" not in data.note and "Turned upright by EXIF orientation: 14" in data.note
    x, _ = every(data)
    assert (x[:, :, :6].min(axis=(1, 2, 3)) > 200).all() and (x[:, 0, 12:, :6].min(axis=(1, 2)) > 200).all()
    assert (x[:, :, 12:, 12:].max(axis=(1, 2, 3)) < 60).all()


def test_animations_and_pages_are_named(tmp_path):
    frames = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (10, 90)]
    frames[0].putpixel((0, 0), 0)
    for label, name in (("a", "1.gif"), ("b", "1.tif")):
        (tmp_path / "set" / label).mkdir(parents=True)
        frames[0].save(tmp_path / "set" / label / name, save_all=True, append_images=frames[1:])
    data = open_dataset(tmp_path / "set")
    assert "Several in one file (animation, pages), only the first read: 2" in data.note
    assert set(np.unique(every(data)[0])) == {0, 10}


@pytest.mark.parametrize(
    ("suffix", "values"),
    [
        (".png", np.arange(64, dtype=np.uint16) * 60),  # 12 bits, as of a camera or a scanner: bytes would hold 15 levels
        (".tif", np.arange(64, dtype=np.uint16) * 1000),
        (".tif", np.arange(64, dtype=np.int32) * 5000 - 70),
        (".tif", np.linspace(-2, 0.5, 64, dtype=np.float32)),
    ],
)
def test_values_of_more_than_8_bits_stay_as_they_are(tmp_path, suffix, values):
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.fromarray(values.reshape(8, 8)).save(tmp_path / "set" / label / f"1{suffix}")
    data = open_dataset(tmp_path / "set")
    x, _ = every(data)
    assert x.dtype == np.float32 and "stay as they are in the files" in data.note
    np.testing.assert_array_equal(x[1, 0].ravel(), values)
    if values.dtype.kind == "f":
        picture(tmp_path / "set" / "b" / "2.png", 8, 8)
        refused(tmp_path / "set", "no common scale")
        values[3] = np.nan
        (tmp_path / "set" / "b" / "2.png").unlink()
        Image.fromarray(values.reshape(8, 8)).save(tmp_path / "set" / "b" / f"1{suffix}")
        refused(tmp_path / "set", tmp_path / "set" / "b" / f"1{suffix}", "no numbers")


def wide_colour(path, pixels):
    """A PNG of 16 bits for each of three colours, which Pillow cannot write."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_what_is_cut_off_of_wide_colours_is_said_and_nothing_left_is_refused(tmp_path):
    pixels = np.arange(8 * 8 * 3).reshape(8, 8, 3)
    for label in "ab":
        wide_colour(tmp_path / "set" / label / "1.png", 300 * pixels)
    assert "Of 16 bits a colour, read to the upper 8: 2" in open_dataset(tmp_path / "set").note
    for label in "ab":
        wide_colour(tmp_path / "dark" / label / "1.png", pixels)
    refused(tmp_path / "dark", "0 everywhere after conversion", "upper 8")


def test_black_and_white_is_0_and_255(tmp_path):
    drawn = np.eye(9, dtype=bool)
    for label, suffix in (("a", "png"), ("b", "tif")):
        (tmp_path / "set" / label).mkdir(parents=True)
        Image.fromarray(drawn).save(tmp_path / "set" / label / f"1.{suffix}")
    np.testing.assert_array_equal(every(open_dataset(tmp_path / "set"))[0][:, 0], np.stack([drawn * 255] * 2))


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
