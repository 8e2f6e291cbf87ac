"""The showers inside the package: packing loses nothing, the data set is whole, and it is the calorimeter that its text says."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.data import names, open_dataset
from labkit.errors import DataError
from labkit.showers import geant4
from labkit.showers.features import observables


def test_packing_is_exact_also_of_empty_showers():
    rng = np.random.default_rng(0)
    cells = np.where(rng.random((7, *geant4.SHAPE)) < 0.01, rng.gamma(1, 3, (7, *geant4.SHAPE)), 0).astype(np.float16)
    cells[[0, 3, 6]] = 0
    cells[1, 0, 0, 0], cells[5, -1, -1, -1] = 0.5, 200
    packed = geant4.unpack(geant4.pack(np.arange(7), cells))
    np.testing.assert_array_equal(packed.showers(0, 7), cells)
    np.testing.assert_array_equal(packed.showers(2, 6), cells[2:6])


def test_the_file_is_small_and_says_whom_to_credit():
    assert geant4.FILE.stat().st_size <= 10_000_000
    with np.load(geant4.FILE, allow_pickle=False) as file:
        assert len(file["energy"]) == geant4.N and str(file["about"]) == geant4.ABOUT
    assert "Geant4 Collaboration" in geant4.ABOUT and "Caveat" in geant4.ABOUT


@pytest.mark.usefixtures("cache")
def test_the_data_set_has_cells_in_mev_and_energies_and_is_split_the_same_each_time():
    data = open_dataset("showers-wsi", n=60)
    assert "showers-wsi" in names() and (data.n_train, data.n_test, data.shape) == (54, 6, (1, 25, 25, 25))
    assert (data.inputs, data.answers, data.n_classes, data.synthetic) == (["x"], ["energy"], None, False)
    assert "Geant4" in data.note and data.affine_of("x") is None
    batch = data.batch(np.arange(54))
    assert batch["x"].dtype == np.float16 and batch["energy"].min() >= 2 and batch["energy"].max() <= 50
    seen = observables(batch["x"][:, 0], batch["energy"])
    assert 29 < seen["fraction"].mean() < 33 and 9 < seen["depth"].mean() < 14  # MeV per GeV; layers
    assert 0.005 < (batch["x"] > 0).mean() < 0.04 and (abs(seen["x"]) < 1).all()
    assert open_dataset("showers-wsi", n=60).path == data.path


@pytest.mark.usefixtures("own_cache")
def test_what_is_no_number_of_showers_and_a_damaged_file_are_refused(tmp_path, monkeypatch):
    for n in (5, 9001, "all"):
        with pytest.raises(ValueError, match="n="):
            open_dataset("showers-wsi", n=n)
    monkeypatch.setattr(geant4, "FILE", tmp_path / "electrons-wsi.npz")
    geant4.FILE.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"electrons-wsi\.npz cannot be read"):
        open_dataset("showers-wsi", n=60)
