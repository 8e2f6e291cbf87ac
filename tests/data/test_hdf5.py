"""HDF5 files that claim more than they hold, or show what other files hold: refused by every reader, by name, before memory is taken."""

from __future__ import annotations

import os

import h5py
import numpy as np
import pytest

import labkit.jets
from labkit.data import hdf5, open_dataset
from labkit.errors import DataError
from labkit.jets.anomaly import HADRONS
from labkit.showers import open_showers
from tests.data.helpers import everything, some

pytestmark = pytest.mark.usefixtures("own_cache")
X, Y = some(n=23, dtype=np.uint8)


def external_link(file, name, values, secret):
    with h5py.File(secret, "w") as other:
        other["a"] = values
    file[name] = h5py.ExternalLink(secret.name, "/a")


def a_link_to_a_link(file, name, values, secret):
    external_link(file, "there", values, secret)
    file[name] = h5py.SoftLink("/there")


def a_group_elsewhere(file, name, values, secret):
    with h5py.File(secret, "w") as other:
        other["deep/a"] = values
    file["there"] = h5py.ExternalLink(secret.name, "/deep")
    file[name] = h5py.SoftLink("/there/a")


def external_storage(file, name, values, secret):
    secret.write_bytes(np.ascontiguousarray(values).tobytes())
    file.create_dataset(name, values.shape, values.dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])


def virtual(file, name, values, secret):
    with h5py.File(secret, "w") as other:
        other["a"] = values
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    layout[...] = h5py.VirtualSource(str(secret), "a", values.shape)
    file.create_virtual_dataset(name, layout)


ELSEWHERE = {
    external_link: "link to another file",
    a_link_to_a_link: "link to another file",
    a_group_elsewhere: "link to another file",
    external_storage: "stored in other files",
    virtual: "made of other data sets",
}


def readers(tmp_path):
    """Each reader of HDF5 files: what it needs beside the array that is put in its way, whose name comes last."""
    jets = np.zeros((9, 59))
    jets[:, 53] = 1
    particles = np.ones((9, 30, 4), np.float32)
    cells = np.ones((9, 3, 3, 3), np.float32)
    return {
        "arrays": (open_dataset, {"y": Y}, "x", X),
        "labels": (open_dataset, {"x": X}, "y", Y),
        "columns": (lambda path, **how: open_dataset(path, label="c", inputs="a", **how), {"c": Y}, "a", X),
        "texts": (lambda path, **how: open_dataset(path, label="c", inputs="x", **how), {"x": X}, "c", np.array([b"a", b"b"] * 11 + [b"a"])),
        "showers": (open_showers, {"target": np.ones((9, 2))}, "ECAL", cells),
        "energies": (lambda path, **how: open_showers(path, scale=1, **how), {"X": cells[..., None]}, "y/b", np.ones(9)),
        "hls4ml": (labkit.jets.load, {"jets": jets}, "jetConstituentList", np.ones((9, 30, 16), np.float32)),
        "jetnet": (labkit.jets.load, {"jet_features": np.ones((9, 4))}, "particle_features", particles),
        "converted": (lambda path, **how: labkit.jets.convert(path, tmp_path / "out", **how), {"jets": jets}, "jetConstituentList", particles),
        "events": (lambda path, **how: list(labkit.jets.anomaly.events(path, **how)), {}, "df/block0_values", np.zeros((9, 3 * HADRONS + 1))),
    }  # fmt: skip


READERS = ("arrays", "labels", "columns", "texts", "showers", "energies", "hls4ml", "jetnet", "converted", "events")


def written(path, arrays, add):
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        add(file)
    return path


@pytest.mark.parametrize("how", ELSEWHERE)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_in_another_file_is_read_on_request_alone(reader, how, tmp_path):
    if reader == "events":
        pytest.importorskip("fastjet")
    read, others, name, values = readers(tmp_path)[reader]
    path = written(tmp_path / "t.h5", others, lambda file: how(file, name, values, tmp_path / "secret"))
    with pytest.raises(DataError, match=ELSEWHERE[how]) as refused:
        read(path)
    assert "t.h5" in str(refused.value) and "external=True" in str(refused.value)
    if reader in ("texts", "events") and how is external_storage:
        return
    read(path, external=True)


def test_on_request_it_is_what_the_other_file_holds_and_is_read_again_when_that_changes(tmp_path):
    path = written(tmp_path / "set.h5", {"y": Y}, lambda file: external_link(file, "x", X, tmp_path / "other.h5"))
    assert hdf5.named_files(path) == [tmp_path / "other.h5"]
    inside = open_dataset(written(tmp_path / "whole.h5", {"x": X, "y": Y}, lambda file: None))
    np.testing.assert_array_equal(everything(open_dataset(path, external=True)), everything(inside))
    with h5py.File(tmp_path / "other.h5", "a") as other:
        other["a"][...] = X[::-1]
    os.utime(tmp_path / "other.h5", ns=(1, 1))
    assert (everything(open_dataset(path, external=True)) != everything(inside)).any()
    with pytest.raises(DataError, match="another file"):
        open_dataset(path)
    with pytest.raises(TypeError, match="external"):
        open_dataset(path, external="no")
    with pytest.raises(ValueError, match="HDF5 files"):
        open_dataset(tmp_path, external=True)


def never_written(file, name, values):
    file.create_dataset(name, (10**12, *values.shape[1:]), values.dtype, chunks=(1, *values.shape[1:]))


def late(file, name, values):
    file.create_dataset(name, (10**12, *values.shape[1:]), values.dtype)


def packed(file, name, values):
    made = file.create_dataset(name, (10**9, *values.shape[1:]), values.dtype, compression="gzip", chunks=(2, *values.shape[1:]))
    made[0] = values[0]


def a_huge_chunk(file, name, values):
    rows = (3 << 30) // (int(np.prod(values.shape[1:])) * values.dtype.itemsize)
    file.create_dataset(
        name, values.shape, values.dtype, chunks=(rows, *values.shape[1:]), maxshape=(None, *values.shape[1:]), compression="gzip"
    )


@pytest.mark.parametrize("how", [never_written, late, packed, a_huge_chunk])
@pytest.mark.parametrize("reader", READERS)
def test_a_shape_that_the_file_cannot_hold_is_refused(reader, how, tmp_path):
    if reader == "events":
        pytest.importorskip("fastjet")
    read, others, name, values = readers(tmp_path)[reader]
    path = written(tmp_path / "t.h5", others, lambda file: how(file, name, values))
    with pytest.raises(DataError, match=rf"{name.split('/')[-1]} of shape .* the file holds"):
        read(path)


def test_what_is_packed_well_is_read(tmp_path):
    x = np.zeros((17, 1200, 1200), np.uint8)
    x[:, 0, 0] = 1 + np.arange(17)

    def add(file):
        file.create_dataset("x", data=x, compression="gzip", chunks=(17, 1200, 1200))

    path = written(tmp_path / "t.h5", {"y": np.arange(17) % 2}, add)
    assert x.nbytes > 100 * path.stat().st_size and x.nbytes > hdf5.CHUNK_BYTES
    np.testing.assert_array_equal(
        np.sort(everything(open_dataset(path))[:, 0, 0, 0]), np.setdiff1d(1 + np.arange(17), held_out(path))
    )


def held_out(path):
    return everything(open_dataset(path), "test")[:, 0, 0, 0]


def test_links_in_a_circle_are_refused(tmp_path):
    def add(file):
        file["x"], file["z"] = h5py.SoftLink("/z"), h5py.SoftLink("/x")

    with pytest.raises(DataError, match="leads to no data"):
        open_dataset(written(tmp_path / "t.h5", {"y": Y}, add))


def test_cells_that_a_file_of_points_claims_have_a_limit(tmp_path):
    points = {"energies": np.ones((2, 1)), "num_points": [1, 1], "shape": [2, 1, 4]}

    def add(file):
        held = file.create_dataset("showers", (2,), h5py.vlen_dtype(np.float32))
        held[0], held[1] = np.float32([0, 0, 0, 1]), np.float32([1, 1, 1, 1])
        file.attrs["labkit_cells"] = cells

    cells = (10**5, 10**5, 10**5)
    with pytest.raises(DataError, match="coarser grid"):
        open_showers(written(tmp_path / "t.h5", points, add))
    cells = (3, 3, 3)
    assert open_showers(written(tmp_path / "s.h5", points, add)).n_train == 1
