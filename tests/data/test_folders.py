"""Which files below a folder of classes are its samples, and what is said of the others."""

from __future__ import annotations

import shutil

import numpy as np
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
    for outer in ("train", "Test", "others"):
        for inner in "ab":
            picture(tmp_path / "splits" / outer / inner / "1.png", 4, 4)
    refused(tmp_path / "splits", "splits and no classes, beside others", tmp_path / "splits" / "train")
    shutil.rmtree(tmp_path / "splits" / "others")
    (tmp_path / "splits" / "train").rename(tmp_path / "splits" / "2019")
    (tmp_path / "splits" / "Test").rename(tmp_path / "splits" / "2020")
    refused(tmp_path / "splits", "Which are the classes?", tmp_path / "splits" / "2019")
    shutil.rmtree(tmp_path / "splits" / "2020")
    refused(tmp_path / "splits", "one class", f"give {tmp_path / 'splits' / '2019'}")
    assert open_dataset(tmp_path / "splits" / "2019").n_classes == 2


@pytest.mark.parametrize(
    ("folders", "test"), [(("train", "Test"), "Test"), (("training", "val"), "val"), (("train", "test", "valid"), "test")]
)
def test_folders_train_and_test_are_the_splits(tmp_path, folders, test):
    path, seeds = tmp_path / "set", iter(range(100))
    pixels = {
        (folder, name, n): picture(path / folder / name / f"{n}.png", 4, 4, seed=next(seeds))
        for folder in folders
        for name in ("b", "a10", "a9")
        for n in range(3 if folder == folders[0] else 1)
    }
    data = open_dataset(path)
    assert (data.n_train, data.n_test, list(data.classes)) == (9, 3, ["a9", "a10", "b"])
    assert f"9 in {folders[0]} and 3 in {test}" in data.note and "in subfolders" not in data.note
    assert ("Not used: valid" in data.note) == (len(folders) == 3)
    assert data.labels("test").tolist() == [0, 1, 2] and sorted(data.labels("train")) == [0] * 3 + [1] * 3 + [2] * 3
    for label, name in enumerate(["a9", "a10", "b"]):
        given = np.moveaxis(pixels[test, name, 0], -1, 0)
        np.testing.assert_array_equal(data.raw(np.array([label]), "test")[0], given)


def test_a_test_split_with_a_class_of_its_own_is_refused(tmp_path):
    for where in ("train/a", "train/b", "test/a", "test/c"):
        picture(tmp_path / "set" / where / "1.png", 4, 4)
    refused(tmp_path / "set", "holds c, and", "no such class")
    shutil.rmtree(tmp_path / "set" / "test" / "c")
    assert open_dataset(tmp_path / "set").n_test == 1  # one of the classes may be missing in it


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
