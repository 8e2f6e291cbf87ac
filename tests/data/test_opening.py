"""labkit.data itself: names, options, and which reader opens what is at a path."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from labkit.data import names, open_dataset
from labkit.errors import DataError
from tests.data.helpers import picture, refused

pytestmark = pytest.mark.usefixtures("own_cache")


def test_names_are_the_ones_that_open():
    assert names() == [
        "fashion-mnist",
        "fashion-mnist-32",
        "mnist",
        "digits",
        "lfw-faces",
        "head-lesions",
        "chest-phantom",
        "showers-wsi",
        "parametrised-showers",
        "jets",
    ]
    with pytest.raises(DataError, match="Did you mean 'digits'"):
        open_dataset("digit")
    with pytest.raises(DataError, match="data is a int"):
        open_dataset(3)


def test_a_dataset_is_returned_as_it_is():
    data = open_dataset("digits")
    assert open_dataset(data) is data


def test_a_missing_path_is_said_with_the_folder_in_which_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.csv", "data/train.parquet"):
        refused(name, f"is called {name!r} in {tmp_path}. ")
    refused("fashon", "is called 'fashon'. ")


def test_unknown_and_missing_paths_are_refused(tmp_path):
    refused(str(tmp_path / "nothing.parquet"), "nothing.parquet", "Registered names")
    (tmp_path / "a.csv").write_text("1,2")
    refused(tmp_path / "a.csv", "ends in '.csv'", ".parquet")
    (tmp_path / "a.h5").write_bytes(b"")
    refused(tmp_path / "a.h5", "is empty")


def test_importing_it_brings_neither_pyarrow_nor_h5py():
    code = "import sys, labkit.data; print([m for m in ('torch', 'pyarrow', 'h5py', 'sklearn') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.fullmatch(r"\[\]\s*", out)


def test_what_is_ready_is_not_read_again(flowers, mosmed, monkeypatch):
    """A worker opens it from its shards, without Pillow and nibabel and without touching the files."""
    paths = [open_dataset(folder).path for folder in (flowers, mosmed)]
    monkeypatch.setitem(sys.modules, "nibabel", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert [open_dataset(folder).path for folder in (flowers, mosmed)] == paths


def test_options_go_where_they_belong(flowers, tmp_path):
    for size in (16, (16,), (16, 0), (16.5, 16), (True, 16), (16, 16, 16), "16x16"):
        with pytest.raises(ValueError, match="Give \\(height, width\\)"):
            open_dataset(flowers, size=size)
    np.save(tmp_path / "x_train.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match="for images and volumes"):
        open_dataset(tmp_path, size=(16, 16))
    with pytest.raises(ValueError, match=r"no option n\. It has size"):
        open_dataset(flowers, n=3)
    with pytest.raises(ValueError, match=r"no option size, pad\. It has none"):
        open_dataset("fashion-mnist-32", size=3, pad=3)
    with pytest.raises(ValueError, match=r"no option seed\. It has channels"):
        open_dataset((np.zeros((2, 3)), [0, 1]), seed=3)
    for option in ({"units": "HU"}, {"channels": "last"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* holds none"):
            open_dataset(flowers, **option)
    with pytest.raises(ValueError, match=r"ground='black' is for pictures"):
        open_dataset(tmp_path, ground="black")
    (tmp_path / "both" / "a").mkdir(parents=True)
    (tmp_path / "both" / "a" / "1.nii.gz").touch()
    picture(tmp_path / "both" / "b" / "1.png", 4, 4)
    refused(tmp_path / "both", "both pictures and volumes (.nii.gz, .png)")
    (tmp_path / "nothing" / "deeper").mkdir(parents=True)
    refused(tmp_path / "nothing", "no .npy files", "folder for each class")
    (tmp_path / "nothing" / "deeper" / "1.dcm").touch()
    refused(tmp_path / "nothing", "It holds 1 .dcm files")
    (tmp_path / "set.tar.gz").write_bytes(b"x")
    refused(tmp_path / "set.tar.gz", "'.gz'", "CIFAR-10")


def test_a_folder_that_looks_like_shards_is_read_as_arrays(tmp_path):
    """A meta.json is valid in the cache alone."""
    data = open_dataset("digits")
    copy = Path(shutil.copytree(data.path, tmp_path / "copy"))
    assert open_dataset(data.path).name == "digits"
    assert open_dataset(copy).name == "copy" and open_dataset(copy).path != data.path
