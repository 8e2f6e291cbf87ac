"""Which files below a folder of classes are its samples, and what is said of the others."""

from __future__ import annotations

import shutil

import pytest

from labkit.data import open_dataset
from tests.data.helpers import picture, refused

pytestmark = pytest.mark.usefixtures("own_cache")


def test_all_pictures_are_read_or_named(tmp_path):
    folder = tmp_path / "pets"
    for label in ("cat", "dog"):
        for number, suffix in enumerate(("jpg", "JPEG", "webp", "tif", "tiff", "gif", "bmp", "png")):
            picture(folder / label / f"{number}.{suffix}", 8, 8, seed=100 * ord(label[0]) + number)
        picture(folder / label / "jfif.jfif", 8, 8, seed=100 * ord(label[0]) + 50, format="JPEG")
        picture(folder / label / "more" / "deep" / "1.png", 8, 8, seed=100 * ord(label[0]) + 60)
    data = open_dataset(folder)
    assert data.n_train + data.n_test == 20 and "20 files read, 2 of them in subfolders." in data.note

    for name in ("cat/1.heic", "cat/notes.txt", "dog/extensionless", "readme.md", "cat/Thumbs.db", "dog/.DS_Store", "dog/._1.png"):
        (folder / name).write_bytes(b"x")
    (folder / "dog" / "gone.png").symlink_to("nowhere.png")
    (folder / "dog" / "round").symlink_to(folder / "dog")
    (folder / "__MACOSX").mkdir()
    shutil.copy(folder / "cat" / "7.png", folder / "dog" / "copy.png")
    data = open_dataset(folder)
    for said in (
        "21 files read",
        "1 .heic (cat/1.heic)",
        "1 .txt (cat/notes.txt)",
        "1 without a suffix (dog/extensionless)",
        "1 broken link (dog/gone.png)",
        "1 beside the class folders (readme.md)",
        "Hidden or of the system, left out: 4",
        "Copies of other files: 1 (dog/copy.png is cat/7.png); in more than one class: 1",
    ):
        assert said in data.note, data.note
    (folder / "dog" / ".hidden").touch()
    assert open_dataset(folder).path == data.path  # looking into a folder is no reason to convert it again
    (folder / "dog" / "2.heic").touch()
    assert "2 .heic" in open_dataset(folder).note


def test_folders_that_may_be_no_classes_are_asked_about(tmp_path):
    for outer in ("train", "Test"):
        for inner in "ab":
            picture(tmp_path / "splits" / outer / inner / "1.png", 4, 4)
    refused(tmp_path / "splits", "splits and no classes", tmp_path / "splits" / "train")
    (tmp_path / "splits" / "train").rename(tmp_path / "splits" / "2019")
    (tmp_path / "splits" / "Test").rename(tmp_path / "splits" / "2020")
    refused(tmp_path / "splits", "Which are the classes?", tmp_path / "splits" / "2019")
    shutil.rmtree(tmp_path / "splits" / "2020")
    refused(tmp_path / "splits", "one class", f"give {tmp_path / 'splits' / '2019'}")
    assert open_dataset(tmp_path / "splits" / "2019").n_classes == 2


@pytest.mark.parametrize(
    "names",
    [
        ["CT-1", "CT-9", "CT-10"],
        ["aster", "daisy", "rose", "sunflower"],  # whatever their lengths
        ["a9b2", "a9b10", "a10", "ab"],
        ["01", "1", "2 fast", "10", "b", "b²", "b²3"],  # ² is a digit to str.isdigit() alone
    ],
)
def test_classes_are_in_the_order_of_their_names_and_numbers_in_them_by_value(names, tmp_path):
    for name in reversed(names):
        picture(tmp_path / "set" / name / "a.png", 4, 4)
    data = open_dataset(tmp_path / "set")
    assert list(data.classes) == names and ", ".join(f"{i} {name}" for i, name in enumerate(names)) in data.note
