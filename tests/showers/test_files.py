"""The layouts of the field: true files of each are read, what labkit writes comes back, and bad ones are refused by what is wrong."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from labkit.errors import DataError
from labkit.showers import open_showers
from labkit.showers.files import Writer
from tests.showers.helpers import showers

pytestmark = pytest.mark.usefixtures("own_cache")
CELLS, ENERGIES = showers(24)


def written(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def lcd(path, cells=CELLS, energies=ENERGIES):
    return written(
        path, ECAL=cells, target=np.column_stack([np.full(len(energies), 11), energies]), HCAL=np.zeros((len(energies), 5))
    )


def everything(data):
    """All samples of both splits, in the order of their energies."""
    parts = [data.batch(np.arange(n), split) for split, n in (("train", data.n_train), ("test", data.n_test))]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = joined["energy"].argsort()
    return {name: values[order] for name, values in joined.items()}


def same(data, cells=CELLS, energies=ENERGIES):
    found, order = everything(data), energies.argsort()
    np.testing.assert_allclose(found["energy"], energies[order], rtol=1e-6)
    np.testing.assert_allclose(found["x"][:, 0], cells[order], rtol=1e-6)
    assert data.inputs == ["x"] and data.affine_of("x") is None


def test_fixed_angle_files_are_read_alone_as_a_list_and_as_a_folder(tmp_path):
    same(open_showers(lcd(tmp_path / "one.h5")))
    parts = [
        lcd(tmp_path / "parts" / f"{i}.h5", CELLS[i::2], ENERGIES[i::2])
        for i in range(2)
        if (tmp_path / "parts").mkdir(exist_ok=True) is None
    ]
    data = open_showers(parts)
    same(data)
    assert open_showers(tmp_path / "parts").path == data.path
    same(open_showers(parts, scale=1000), 1000 * CELLS)


def test_other_layouts_are_known_by_their_keys(tmp_path):
    theta = np.linspace(1, 2, 24, dtype=np.float32)
    angle = open_showers(written(tmp_path / "angle.h5", ECAL=CELLS[..., None], energy=ENERGIES[:, None], mtheta=theta))
    same(angle)
    np.testing.assert_allclose(everything(angle)["theta"], theta[ENERGIES.argsort()])
    same(open_showers(written(tmp_path / "nnlo.h5", X=CELLS[..., None], **{"y/a": np.ones(24), "y/b": ENERGIES / 100})))
    flat = np.random.default_rng(0).gamma(1, 1, (24, 6480)).astype(np.float32)
    data = open_showers(written(tmp_path / "two.hdf5", showers=flat, incident_energies=1e3 * ENERGIES[:, None]))
    assert data.shape == (1, 16, 9, 45)
    same(data, np.moveaxis(flat.reshape(24, 45, 16, 9), 1, 3))
    assert open_showers(written(tmp_path / "one.hdf5", showers=flat[:, :368], incident_energies=1e3 * ENERGIES[:, None])).shape == (
        1,
        1,
        1,
        368,
    )


@pytest.mark.parametrize("layout", ["lcd", "lcd-angle", "calochallenge", "showerdata"])
def test_what_is_written_batch_by_batch_comes_back(layout, tmp_path):
    with Writer(tmp_path / "out" / "made.h5", layout, CELLS.shape[1:]) as file:
        for at in range(0, 24, 10):
            file.append(CELLS[at : at + 10], ENERGIES[at : at + 10])
        assert not file.path.exists()
    same(open_showers(file.path, empty="drop"))


def test_points_are_counted_in_the_cells_of_a_grid(tmp_path):
    """The layout of showerdata 0.7: flat points (x, y, z, energy), padded to the longest, and how many there are."""
    clouds = [np.float32([[0.5, -9, 2, 1.5], [0.7, -9, 2, 1.0], [99, 0, 0, 7]]), np.float32([[-4, 9, 5, 2.0]])] * 12
    with h5py.File(tmp_path / "points.h5", "w") as file:
        stored = file.create_dataset("showers", (24,), h5py.vlen_dtype(np.dtype(np.float32)))
        for i, cloud in enumerate(clouds):
            stored[i] = np.concatenate([cloud.ravel(), np.zeros(4 * (3 - len(cloud)), np.float32)])
        file["energies"], file["num_points"], file["shape"] = ENERGIES[:, None], [len(c) for c in clouds], [24, 3, 4]
    with pytest.raises(DataError, match=r"points.*grid="):
        open_showers(tmp_path / "points.h5")
    data = open_showers(tmp_path / "points.h5", grid=[(-10, 10, 10), (-10, 10, 10), (0, 6, 6)])
    x = data.batch(np.arange(data.n_train))["x"]
    assert data.shape == (1, 10, 10, 6) and set(np.round(x.sum((1, 2, 3, 4)), 3)) == {2.5, 2.0}
    assert x[:, 0, 5, 0, 2].max() == 2.5 and x[:, 0, 3, 9, 5].max() == 2.0


def test_bad_files_are_refused_by_what_is_wrong(tmp_path):
    def refused(words, path, **options):
        with pytest.raises(DataError, match=words):
            open_showers(path, **options)

    negative, odd, hollow, low = ENERGIES.copy(), CELLS.copy(), CELLS.copy(), CELLS.copy()
    negative[5], odd[3, 0, 0, 0], hollow[7], low[2, 1, 1, 1] = -3, np.nan, 0, -0.5
    refused("energy of shower 5 is -3", lcd(tmp_path / "a.h5", energies=negative))
    refused("energy of shower 5 is nan", lcd(tmp_path / "b.h5", energies=np.where(negative < 0, np.nan, negative)))
    refused("shower 3 has cells that are negative or no numbers", lcd(tmp_path / "c.h5", odd))
    refused("shower 2 has cells", lcd(tmp_path / "d.h5", low))
    refused('shower 7 is empty. Leave such out with empty="drop"', lcd(tmp_path / "e.h5", hollow))
    data = open_showers(tmp_path / "e.h5", empty="drop")
    assert data.n_train + data.n_test == 23 and "1 of 24 showers were empty" in data.note
    refused("all 24 showers are empty", lcd(tmp_path / "f.h5", 0 * CELLS), empty="drop")
    refused("has the keys HCAL, ecal, and lacks those of showers", written(tmp_path / "g.h5", ecal=CELLS, HCAL=[1]))
    refused("lacks those of showers .target for layout 'lcd'", written(tmp_path / "h.h5", ECAL=CELLS), layout="lcd")
    refused(r"showers have shape \(24, 486\)", written(tmp_path / "i.h5", ECAL=CELLS.reshape(24, -1), target=np.ones((24, 2))))
    refused("Open them as two data sets", [lcd(tmp_path / "j.h5"), lcd(tmp_path / "k.h5", CELLS[:, :8])])
    refused("24 rows of ECAL, 48 rows of target. Each shower", lcd(tmp_path / "o.h5", energies=np.tile(ENERGIES, 2)))
    refused("no angles; layout 'lcd-angle' needs theta or mtheta", written(tmp_path / "p.h5", ECAL=CELLS, energy=ENERGIES))
    refused(r"showers have 0.0[23]\d* per GeV.*give scale=1000; scale=1 says", lcd(tmp_path / "q.h5", CELLS / 1000))
    same(open_showers(tmp_path / "q.h5", scale=1), CELLS / 1000)
    refused("second column is the energy", written(tmp_path / "l.h5", ECAL=CELLS, target=ENERGIES))
    (tmp_path / "m.h5").write_bytes(b"no HDF5")
    refused("m.h5 cannot be read", tmp_path / "m.h5")
    refused("There is no file", tmp_path / "n.h5")
    with pytest.raises(ValueError, match="Known: showerdata, calo"):
        open_showers(tmp_path / "a.h5", layout="cms")


def test_a_file_whose_writing_fails_is_gone(tmp_path):
    with pytest.raises(DataError, match="do not fit a file"), Writer(tmp_path / "made.h5", shape=(9, 9, 6)) as file:
        file.append(CELLS[:, :8], ENERGIES)
    assert not list(tmp_path.iterdir())
