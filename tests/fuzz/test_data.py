"""Data sets whose files hold other bytes than anybody meant: each is opened, or refused by an error of labkit."""

from __future__ import annotations

import json
import shutil
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit.data import cache, dataset, open_dataset
from labkit.errors import LabError
from tests.data.helpers import body, nifti, picture, some, write_folder
from tests.fuzz.helpers import LIMIT, few_or_many, fuzzed
from tests.fuzz.test_files import changed, guarded, mangled

pytestmark = [LIMIT, pytest.mark.usefixtures("own_cache")]


def npy(folder):
    write_folder(folder / "set", x_train=some()[0], y_train=some()[1])
    return folder / "set", folder / "set" / "x_train.npy"


def hdf5(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("x", data=some(dtype=np.uint8)[0], compression="gzip")
        file["y"] = some()[1]
    return (folder / "a.h5",) * 2


def parquet(folder):
    x, y = some(shape=(4,))
    pd.DataFrame({**{f"f{i}": x[:, i] for i in range(4)}, "y": y}).to_parquet(folder / "a.parquet")
    return (folder / "a.parquet",) * 2


def png(folder):
    for label in "abc":
        for i in range(3):
            picture(folder / "set" / label / f"{i}.png", 8, 9, seed=i)
    return folder / "set", folder / "set" / "b" / "1.png"


def jpeg(folder):
    for label in "abc":
        for i in range(3):
            picture(folder / "set" / label / f"{i}.jpg", 8, 9, seed=i)
    return folder / "set", folder / "set" / "b" / "1.jpg"


def volume(folder):
    for label in "ab":
        for i in range(3):
            nifti(folder / "set" / label / f"{i}.nii.gz", body((6, 5, 4)))
    return folder / "set", folder / "set" / "b" / "1.nii.gz"


@few_or_many(3, 60)
@pytest.mark.parametrize("kind", [npy, hdf5, parquet, png, jpeg, volume])
def test_whatever_the_bytes_of_a_data_set_are_it_is_opened_or_refused(kind, tmp_path, examples):
    given_path, file = kind(tmp_path)
    whole = file.read_bytes()
    options = {"units": "HU"} if kind is volume else {}
    open_dataset(given_path, **options).raw([0])

    @fuzzed(examples)
    @given(st.integers(0, 2**32))
    def opened_or_refused(seed):
        file.write_bytes(mangled(whole, seed))
        with guarded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow and nibabel, of what they make of it
            try:
                made = open_dataset(given_path, **options)
                made.raw(np.arange(made.n_train))
            except LabError:
                pass
        shutil.rmtree(cache.cache_dir(), ignore_errors=True)

    opened_or_refused()


@few_or_many(3, 60)
def test_whatever_the_cache_says_of_a_data_set_it_is_opened_as_it_was(tmp_path, examples):
    """Its copies are made again where they are not what they were."""
    path = write_folder(tmp_path / "set", x_train=some()[0], y_train=some()[1])
    made = open_dataset(path)
    expected = made.raw(np.arange(made.n_train)).tobytes()
    (meta,) = (cache.cache_dir() / "shards").glob("*/meta.json")
    whole = meta.read_bytes()

    @fuzzed(examples)
    @given(st.integers(0, 2**32), st.booleans())
    def opened_as_it_was(seed, as_json):
        if as_json:
            meta.write_text(json.dumps(changed(json.loads(whole), seed)))
        else:
            meta.write_bytes(mangled(whole, seed))
        dataset.forget(meta.parent)
        with guarded():
            again = open_dataset(path)
            assert again.raw(np.arange(again.n_train)).tobytes() == expected

    opened_as_it_was()
