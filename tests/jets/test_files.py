"""Jets in files: the sample, the round trip, the formats of others in their true form, and whatever is no file of jets.

Used by pytest.
"""

from __future__ import annotations

import dataclasses
import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import labkit
from labkit.errors import DataError, PartitionError
from labkit.jets import files
from labkit.jets.files import CLASSES, SUBSTRUCTURE, Jets, convert, dataset, load, padded, provenance, read, to_awkward, write
from tests.jets.helpers import sample


def some(n=60, **changes):
    jets = sample()[np.arange(n)]  # a copy: some tests spoil it
    return dataclasses.replace(jets, **changes)


def masses(jets):
    total = jets.constituents.sum(1, dtype=np.float64)
    return np.sqrt(np.maximum(0, total[:, 3] ** 2 - (total[:, :3] ** 2).sum(1)))


def test_the_sample_is_real_jets_of_five_classes():
    jets, said = sample(), provenance(files.SAMPLE)
    assert files.SAMPLE.stat().st_size < 2_000_000 and 900 <= len(jets) <= 1_100
    assert jets.classes == CLASSES and np.bincount(jets.label).min() >= 150
    assert said["generator"] == "pythia" and said["pythia8mc"] and said["fastjet"] and said["preset"] in ("full", "clean")
    assert jets.of_jet["substructure"].shape == (len(jets), len(SUBSTRUCTURE))
    inside = jets.of_jet["n"] <= 100
    assert np.abs(masses(jets)[inside] - jets.of_jet["mass"][inside]).max() < 0.5  # GeV
    pt = np.hypot(jets.constituents[..., 0], jets.constituents[..., 1])
    assert (np.diff(pt, axis=1) <= 1e-3).all() and jets.of_jet["pt"].min() > 800 and jets.of_jet["pt"].max() < 1200


def test_what_is_written_is_read_again(tmp_path):
    jets = some()
    path = write(tmp_path / "deep" / "a.parquet", jets, {"from": "a test"}, rows=25)
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(0).column(0)
        assert file.num_row_groups == 3 and "BYTE_STREAM_SPLIT" in column.encodings and column.compression == "ZSTD"
        assert pa.types.is_fixed_size_list(file.schema_arrow.field("constituents").type)
    assert provenance(path)["from"] == "a test"
    again = load(path)
    assert again.classes == jets.classes and set(again.of_jet) == set(jets.of_jet)
    for got, wanted in [
        (again.constituents, jets.constituents),
        (again.label, jets.label),
        *zip(again.of_jet.values(), jets.of_jet.values(), strict=True),
    ]:
        np.testing.assert_array_equal(got, wanted)
    assert [len(block) for block in read(path, block=25)] == [25, 25, 10]


def test_the_hardest_are_kept_where_a_jet_has_more_than_there_is_room_for(tmp_path, capsys):
    momenta = np.array([[1.0, 0, 0, 1], [3, 0, 0, 3], [2, 0, 0, 2], [5, 0, 0, 5]])
    made = padded(momenta, [3, 0, 1], particles=2)
    assert made[..., 3].tolist() == [[3, 2], [0, 0], [5, 0]]
    (path,) = convert("jets", tmp_path / "few", particles=20)
    jets = load(path)
    assert jets.constituents.shape[1:] == (100, 4) and not jets.constituents[:, 20:].any() and jets.of_jet["n"].max() > 20
    assert "have more than 20 constituents, of which the hardest are kept" in capsys.readouterr().out
    convert("jets", tmp_path / "fewer", particles=3, most=7)
    assert "fewer: 7 of 7 jets have more than 3 constituents" in capsys.readouterr().out


def test_a_selection_is_in_random_order_and_the_same_each_time(tmp_path):
    first = convert("jets", tmp_path / "a", classes="WZt", mass=(10, 200), jets_per_file=150)
    again = convert("jets", tmp_path / "b", classes=["W", "Z", "t"], mass=(10, 200), jets_per_file=150)
    jets = load(tmp_path / "a")
    assert len(first) == len(again) > 2 and jets.classes == ("W", "Z", "t") and set(jets.label) == {0, 1, 2}
    assert jets.of_jet["mass"].min() > 10 and jets.of_jet["mass"].max() < 200
    np.testing.assert_array_equal(jets.constituents, load(tmp_path / "b").constituents)
    given = sample()
    wanted = [
        given.classes[label] in "WZt" and 10 < mass < 200 for label, mass in zip(given.label, given.of_jet["mass"], strict=True)
    ]
    assert len(jets) == sum(wanted) and (np.diff(jets.label) != 0).mean() > 0.4
    convert("jets", tmp_path / "a", classes="WZt", most=100, jets_per_file=150)
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["jets-00000.parquet"] and len(load(tmp_path / "a")) == 100
    with pytest.raises(DataError, match=r"no jet of .*sample\.parquet is of the classes x"):
        convert("jets", tmp_path / "c", classes=["x"])


# -- of others ---------------------------------------------------------------------------------------------------------


def hls4ml(path, jets, slots, names=True):
    """As Zenodo 3602254 (100 slots) and 3602260 (150): 16 columns a constituent, 59 a jet."""
    constituents, of_jet = np.zeros((len(jets), slots, 16)), np.zeros((len(jets), 59))
    order = np.random.default_rng(0).permutation(100)  # they are not sorted by everybody
    constituents[:, :100, :4] = jets.constituents[:, order]
    columns = [
        "j_ptfrac",
        "j_pt",
        "j_eta",
        "j_mass",
        *(f"j_other{i}" for i in range(49)),
        "j_g",
        "j_q",
        "j_w",
        "j_z",
        "j_t",
        "j_undef",
    ]
    of_jet[:, 3] = jets.of_jet["mass"]
    for row, label in enumerate(jets.label):
        of_jet[row, columns.index({"q": "j_q", "g": "j_g", "W": "j_w", "Z": "j_z", "t": "j_t"}[jets.classes[label]])] = 1
    with h5py.File(path, "w") as file:
        file["jetConstituentList"], file["jets"] = constituents, of_jet
        if names:
            file["jetFeatureNames"] = np.array(columns, "S20")


@pytest.mark.parametrize(("slots", "names"), [(100, False), (150, True)])
def test_hls4ml(slots, names, tmp_path):
    jets = some()
    hls4ml(tmp_path / "jets.h5", jets, slots, names)
    again = load(tmp_path / "jets.h5")
    assert [again.classes[label] for label in again.label] == [jets.classes[label] for label in jets.label]
    pt = [np.hypot(one.constituents[..., 0], one.constituents[..., 1]) for one in (again, jets)]
    np.testing.assert_array_equal(pt[0], np.sort(pt[1], 1)[:, ::-1])
    np.testing.assert_allclose(again.of_jet["mass"], jets.of_jet["mass"], rtol=1e-6)
    few = load(tmp_path / "jets.h5", particles=20)
    assert few.constituents.shape[1] == 20 and few.of_jet["n"].max() > 20
    for name in ("n", "pt", "eta", "phi", "mass"):  # of the whole jet
        np.testing.assert_array_equal(few.of_jet[name], again.of_jet[name])
    np.testing.assert_allclose(few.of_jet["pt"], np.hypot(*jets.constituents[..., :2].sum(1, dtype=float).T), rtol=1e-5)


def test_jetnet(tmp_path):
    jets = some()[some().label == CLASSES.index("t")]
    px, py, pz, _ = np.moveaxis(jets.constituents[:, :30].astype(float), -1, 0)
    pt, real, of = np.hypot(px, py), jets.constituents[:, :30, 3] > 0, jets.of_jet
    eta = np.arcsinh(pz / np.maximum(pt, 1e-9)) - of["eta"][:, None]
    phi = (np.arctan2(py, px) - of["phi"][:, None] + np.pi) % (2 * np.pi) - np.pi
    particles = np.stack([eta, phi, pt / of["pt"][:, None], np.ones_like(pt)], -1) * real[..., None]
    with h5py.File(tmp_path / "t.hdf5", "w") as file:
        file["particle_features"] = particles
        file["jet_features"] = np.stack([of["pt"], of["eta"], of["mass"], of["n"]], 1)
    again = load(tmp_path / "t.hdf5")
    assert {again.classes[label] for label in again.label} == {"t"} and again.constituents.shape[1:] == (100, 4)
    np.testing.assert_allclose(np.hypot(*again.constituents[:, :30, :2].transpose(2, 0, 1)), pt, rtol=1e-3, atol=1e-3)
    for name in ("pt", "eta", "mass", "n"):
        np.testing.assert_allclose(again.of_jet[name], of[name], rtol=1e-5)
    (tmp_path / "t.hdf5").rename(tmp_path / "mine.hdf5")
    with pytest.raises(DataError, match=r"is one class, and is called by it"):
        load(tmp_path / "mine.hdf5")


def columns_of_jetclass(jets):
    """Lists of the lengths that jets have, and one column of 0 and 1 a class."""
    real = jets.constituents[..., 3] > 0
    columns = {
        name: [row[held].tolist() for row, held in zip(jets.constituents[..., at], real, strict=True)]
        for at, name in enumerate(["part_px", "part_py", "part_pz", "part_energy"])
    }
    names = ["label_QCD", "label_Hbb", "label_Tbqq", "label_Wqq", "label_Zqq"]
    of = {"q": "label_QCD", "g": "label_QCD", "t": "label_Tbqq", "W": "label_Wqq", "Z": "label_Zqq"}
    return columns | {name: np.array([of[jets.classes[label]] == name for label in jets.label], np.int32) for name in names}


def is_jetclass(again, jets):
    assert again.classes == ("QCD", "Hbb", "t", "W", "Z")
    assert [again.classes[label] for label in again.label] == [
        {"q": "QCD", "g": "QCD"}.get(jets.classes[label], jets.classes[label]) for label in jets.label
    ]
    np.testing.assert_array_equal(again.constituents, jets.constituents)
    np.testing.assert_allclose(again.of_jet["mass"], masses(jets), rtol=1e-3)


def test_jetclass_in_parquet(tmp_path):
    jets = some()
    pq.write_table(pa.table(columns_of_jetclass(jets)), tmp_path / "a.parquet", row_group_size=25)
    is_jetclass(load(tmp_path / "a.parquet"), jets)
    assert sum(map(len, read(tmp_path / "a.parquet", block=7))) == len(jets)
    (path,) = convert(tmp_path, tmp_path / "out", classes=["W", "t"])
    assert set(load(path).label) == {0, 1}


def test_jetclass_in_root(tmp_path):
    uproot, ak = pytest.importorskip("uproot", reason="needs labkit[jets]"), pytest.importorskip("awkward")
    jets = some()
    with uproot.recreate(tmp_path / "a.root") as file:
        columns = {name: ak.Array(v) if isinstance(v, list) else v for name, v in columns_of_jetclass(jets).items()}
        file.mktree("tree", {name: v.type.content if isinstance(v, ak.Array) else v.dtype for name, v in columns.items()})
        file["tree"].extend(columns)
    is_jetclass(load(tmp_path / "a.root"), jets)


def test_jets_are_momenta_to_those_who_use_vector():
    pytest.importorskip("vector", reason="needs labkit[jets]")
    jets = some()
    array = to_awkward(jets)
    assert array.constituents.ndim == 2 and array.name.tolist() == [jets.classes[label] for label in jets.label]
    np.testing.assert_allclose(np.asarray(array.jet.mass), jets.of_jet["mass"], rtol=1e-3)
    import awkward as ak

    np.testing.assert_allclose(
        ak.to_numpy(ak.max(array.constituents.pt, axis=1)), np.hypot(*jets.constituents[:, 0, :2].T), rtol=1e-5
    )


# -- what is refused ---------------------------------------------------------------------------------------------------


def without_constituents():
    jets = some()
    jets.constituents[5] = 0
    return jets


def not_finite(name):
    jets = some()
    (jets.constituents if name == "constituents" else jets.of_jet[name])[7] = np.nan
    return jets


def without(name):
    jets = some()
    jets.of_jet[name][7] = 0
    return jets


@pytest.mark.parametrize(
    ("jets", "message"),
    [
        (without_constituents, r"a\.parquet: 1 jets, the first of them jet 5, have no constituents"),
        (lambda: not_finite("constituents"), "constituents of 1 jets, the first of them jet 7, are not finite"),
        (lambda: not_finite("mass"), "mass of 1 jets, the first of them jet 7, are not finite"),
        (lambda: without("pt"), "1 jets, the first of them jet 7, have no transverse momentum"),
        (lambda: some(label=np.full(60, 9)), "labels are 9 to 9, of the classes q, g, W, Z, t"),
        (lambda: some(constituents=-sample()[:60].constituents), "60 jets, the first of them jet 0, have constituents of negative"),
    ],
)
def test_jets_that_are_none_are_not_written(jets, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "a.parquet", jets())
    assert not list(tmp_path.iterdir())


def test_files_that_hold_no_jets_are_refused_by_name(tmp_path, cache):
    pq.write_table(pa.table({"x": [[1.0, 2.0]], "y": [0]}), tmp_path / "other.parquet")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1.0]
    (tmp_path / "cut.parquet").write_bytes(files.SAMPLE.read_bytes()[:5000])
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"0" * 100)
    (tmp_path / "jets.txt").write_text("jets")
    for name, message in {
        "other.parquet": "no column part_px, as files of JetClass have, and is none of labkit.jets. It has x, y",
        "other.h5": "HLS4ML's jets have jetConstituentList",
        "cut.parquet": "Is it a whole Parquet file",
        "cut.h5": "Is it a whole HDF5 file",
        "jets.txt": "Jets are read from .h5",
        "gone.h5": "there is no file",
    }.items():
        with pytest.raises(DataError, match=message):
            list(read(tmp_path / name))
    with pytest.raises(DataError, match=r"not in the layout of labkit\.jets\. Convert it: labkit\.jets\.convert\("):
        dataset(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="there is no file or folder"):
        dataset(tmp_path / "gone")
    with pytest.raises(DataError, match="field='constituents' is not known"):
        dataset(labkit.open_dataset("digits"))


def test_a_conversion_replaces_nothing_but_conversions(tmp_path):
    made = write(tmp_path / "made" / "jets-00000.parquet", some(20), {"generator": "pythia"})
    before = made.read_bytes()
    with pytest.raises(
        DataError, match=r"made.jets-00000\.parquet was not written by labkit\.jets\.convert, and would be replaced"
    ):
        convert("jets", made.parent, most=10)
    (path,) = convert(made, tmp_path / "few", most=10)
    with pytest.raises(DataError, match=r"few.jets-00000\.parquet is to be converted, and would be replaced"):
        convert([made, path.parent], path.parent)
    assert made.read_bytes() == before and len(load(path)) == 10


def test_what_makes_no_sense_is_refused_before_anything_is_read(tmp_path):
    for mass in [(200, 10), (10,), (-1, 5)]:
        with pytest.raises(ValueError, match="mass="):
            convert("gone.h5", tmp_path / "out", mass=mass)
    for call in (lambda: convert("gone.h5", tmp_path / "out", particles=0), lambda: load("gone.h5", particles=0)):
        with pytest.raises(ValueError, match="particles=0 must be at least 1"):
            call()
    assert not list(tmp_path.iterdir())


def test_files_of_a_data_set_that_do_not_fit_are_refused_by_name(tmp_path, monkeypatch, cache):
    write(tmp_path / "two" / "a.parquet", some(20), rows=10)
    write(tmp_path / "two" / "b.parquet", some(20, classes=CLASSES[::-1]), rows=10)
    with pytest.raises(DataError, match=r"b\.parquet has jets of the classes t, Z, W, g, q, and .*a\.parquet of q, g, W, Z, t"):
        dataset(tmp_path / "two")
    monkeypatch.setattr(files, "check", lambda *_: None)  # as somebody else may write them
    for jets, message in [
        (some(label=np.full(60, 9)), r"a\.parquet: labels are 9 to 9, of the classes q, g, W, Z, t"),
        (without("n"), r"a\.parquet: there are jets without constituents, their n is 0"),
        (without("pt"), r"a\.parquet: there are jets without transverse momentum, their pt is 0"),
    ]:
        with pytest.raises(DataError, match=message):
            dataset(write(tmp_path / "a.parquet", jets))


# -- as data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.drop_columns(["mass"]),
            r"a\.parquet has no column 'mass', as files of labkit\.jets have\. It has: const",
        ),
        (lambda table: table.drop_columns(["label"]), r"a\.parquet has no column 'label'"),
        (lambda table: labelled(table, 0.5), r"a\.parquet: labels are double, not whole numbers of classes"),
        (
            lambda table: about(table, {"format": 99, "classes": ["q"]}),
            r"a\.parquet was written by a later labkit \(format 99; this one",
        ),
        (lambda table: about(table, {"format": 1}), r"a\.parquet: what labkit\.jets wrote of its classes is damaged"),
        (lambda table: about(table, [1]), r"a\.parquet: what labkit\.jets wrote of its classes is damaged"),
    ],
)
def test_files_that_others_have_written_anew_are_refused_by_name(change, message, tmp_path, cache):
    path = write(tmp_path / "a.parquet", some())
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(DataError, match=message):
        dataset(path)
    if "mass" not in message:  # which follows from the constituents
        with pytest.raises(DataError, match=message):
            load(path)


def labelled(table, more):
    return table.set_column(table.schema.get_field_index("label"), "label", pa.array(table["label"].to_numpy() + more))


def about(table, said):
    return table.replace_schema_metadata({files.KEY: json.dumps(said)})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["constituents", "mass"])
def test_numbers_that_are_not_finite_are_refused_in_files_of_others_too(name, stream, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(files, "check", lambda *_: None)
    path = write(tmp_path / "a.parquet", not_finite(name), rows=20)
    with pytest.raises(DataError, match=rf"a: {name}.*\[7\] holds nan"):
        dataset(path, stream=stream)


def test_empty_slots_are_no_jet_whatever_its_number_of_constituents_says(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(files, "check", lambda *_: None)
    problem = labkit.jets.UCluster(write(tmp_path / "a.parquet", without_constituents(), rows=20), train_samples=30)
    assert len(problem.load(np.arange(5)).label) == 5
    with pytest.raises(DataError, match="jet 5 of the train split has no constituents"):
        problem.load(np.arange(3, 9))


def test_no_jets_are_no_file_and_files_of_one_set_have_the_same_slots(tmp_path, cache):
    with pytest.raises(DataError, match=r"a\.parquet: there are no jets to write"):
        write(tmp_path / "a.parquet", some()[:0])
    for at, particles in enumerate((10, 20)):
        convert("jets", tmp_path / "set" / str(at), particles=particles, most=20)
    with pytest.raises(DataError, match=r"column constituents is .*\[80\], and .*\[40\] in"):
        dataset(tmp_path / "set")


def test_the_sample_has_a_name(cache):
    data = labkit.open_dataset("jets")
    assert data.fields["constituents"].shape in ((400,), (100, 4)) and data.answers[0] == "label" and data.label is None
    batch = data.batch([3, 1], fields=["constituents", "mass", "label"])
    raw = batch["constituents"].reshape(2, 100, 4)
    assert np.isin(batch["mass"], sample().of_jet["mass"]).all() and (raw[..., 3] >= 0).all()  # as they were given


@pytest.mark.slow
def test_a_folder_is_read_by_row_groups_which_are_dealt_out_whole(tmp_path, cache, lab):
    for at in range(2):
        write(tmp_path / f"jets-{at}.parquet", some(60 + 20 * at), rows=20)
    data = dataset(tmp_path)
    assert np.diff(data.units).tolist() == [20] * 6 and data.n_test == 20
    write(tmp_path / "two" / "a.parquet", some(20), rows=10)
    problem = labkit.jets.UCluster(tmp_path / "two", score_samples=2, neighbours=2, batch_size=4)
    with pytest.raises(PartitionError, match=r"1 units \(row groups\) cannot fill 2"):
        labkit.train(problem, lab, update="sgwu", partition="udpa", passes=1.0, runs=tmp_path, name="few").wait()


def test_a_jet_of_its_constituents():
    jets = Jets.of(np.array([[[3.0, 0, 0, 5], [0, 4, 0, 5]]]), [0], ("q",))
    assert {name: round(float(v[0]), 4) for name, v in jets.of_jet.items()} == {
        **{"mass": round(75**0.5, 4), "pt": 5.0, "eta": 0.0, "phi": round(float(np.arctan2(4, 3)), 4), "n": 2.0}
    }
