"""Samples given after the training become what the same samples were in it, whatever layout they come in; what cannot be is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from labkit import open_dataset
from labkit.data.cache import hold_out
from labkit.data.given import given
from labkit.errors import DataError
from tests.data.helpers import some, write_folder

pytestmark = pytest.mark.usefixtures("cache")


def every(data):
    return data.batch(np.arange(data.n_test), "test")


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        ((3, 8, 9), [lambda x: x, lambda x: np.moveaxis(x, 1, -1), torch.from_numpy, lambda x: x.tolist()]),
        ((1, 6, 7), [lambda x: x, lambda x: x[:, 0], lambda x: x[..., None][:, 0]]),
        ((5,), [lambda x: x, pd.DataFrame, lambda x: x.astype(np.float64)]),
    ],
)  # fmt: skip
def test_any_layout_is_what_it_was_in_the_training(shape, layouts):
    x, y = some(20, shape)
    like = open_dataset((x[:12], y[:12], x[12:], y[12:]))
    for layout in layouts:
        assert np.array_equal(every(given(layout(x[12:]), like, answers=False))["x"], every(like)["x"])
    both = every(given({"x": x[12:], "y": torch.from_numpy(y[12:])}, like, answers=True))
    assert np.array_equal(both["x"], every(like)["x"]) and np.array_equal(both["y"], y[12:])


def test_channels_are_where_they_were_in_the_training_where_a_shape_does_not_tell():
    x, y = some(20, (4, 4, 4))
    like = open_dataset((x, y), channels="last")
    assert np.array_equal(given(x, like, answers=False)._samples["x"], np.moveaxis(x, -1, 1))
    like = open_dataset({"x": x, "label": y}, channels="last")
    assert np.array_equal(given({"x": x}, like, answers=False)._samples["x"], np.moveaxis(x, -1, 1))
    first = open_dataset((x, y), channels="first")
    rounded = torch.from_numpy(x).bfloat16()
    assert np.array_equal(given(rounded, first, answers=False)._samples["x"], rounded.float().numpy())


def test_it_is_normalised_by_the_training_and_not_by_itself(tmp_path):
    x, y = some(30, (3, 8, 8))
    like = open_dataset((x, y))
    other = open_dataset(write_folder(tmp_path / "other", x_train=5 * x, y_train=y, x_test=5 * x[:4], y_test=y[:4]))
    centre, rate = like.affine_of("x")
    for data in (other, str(tmp_path / "other")):
        assert np.allclose(every(given(data, like, answers=True))["x"], (5 * x[:4] - centre) * rate, atol=1e-5)


def test_of_a_data_set_without_a_test_split_all_are_taken_in_their_order(tmp_path):
    x, y = some(37, (3, 8, 8), k=5)
    like = open_dataset((x, y))
    folder = write_folder(tmp_path / "new", x_train=x + 1, y_train=y)
    samples = given(folder, like, answers=True)
    centre, rate = like.affine_of("x")
    assert np.allclose(every(samples)["x"], (x + 1 - centre) * rate, atol=1e-5) and np.array_equal(every(samples)["y"], y)
    assert np.array_equal(samples.batch([30, 2, 30], "test")["y"], y[[30, 2, 30]])
    assert given(like, like, answers=True).is_own and given(like, like, answers=True).n_test == 4
    assert np.array_equal(given(like, like, answers=False).raw(np.arange(37), "test"), x)  # predicted are all, as of other sets


def flowers(folder, names, side=9):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (side, side), (20 * i, 40 * len(name), 10 * number)).save(folder / name / f"{i}.png")
    return folder


def test_classes_of_folders_have_the_numbers_of_the_training_and_pictures_its_size(tmp_path):
    like = open_dataset(flowers(tmp_path / "a", ["aster", "daisy", "roses", "tulip"]))
    fewer = given(flowers(tmp_path / "b", ["daisy", "tulip"], side=20), like, answers=True)
    assert fewer.n_test == 12 and every(fewer)["y"].tolist() == [1] * 6 + [3] * 6 and every(fewer)["x"].shape[1:] == like.shape
    with pytest.raises(DataError, match="hold weed; the network knows aster, daisy, roses, tulip"):
        given(flowers(tmp_path / "c", ["aster", "weed"]), like, answers=True)


def test_labels_may_be_the_names_of_the_classes(tmp_path):
    like = open_dataset(flowers(tmp_path / "a", ["aster", "daisy"]))
    x = np.zeros((3, 3, 9, 9), np.uint8)
    for y in (["daisy", "aster", "daisy"], pd.Series(["daisy", "aster", "daisy"]), np.array([1, 0, 1])):
        assert every(given((x, y), like, answers=True))["y"].tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="y holds weed; the network knows aster, daisy"):
        given((x, ["weed", "aster", "daisy"]), like, answers=True)


def test_what_does_not_fit_is_refused_and_other_units_are_said():
    x, y = some(20, (3, 8, 9), dtype=np.uint8)
    like = open_dataset((x, y))
    for wrong, message in (
        (x[0], r"x has shape \(3, 8, 9\); this network needs \(n, 3, 8, 9\)\. For one sample give x\[None\]"),
        (x[:, :2], r"x has shape \(20, 2, 8, 9\)"),
        (np.where(x > 50, np.nan, x), "not all finite"),
        (x[:0], "no samples"),
    ):
        with pytest.raises(DataError, match=message):
            given(wrong, like, answers=False)
    for wrong, message in (
        ((x, y + 1), "y reaches 3; the network was trained on labels 0..2"),
        ((x, y + 0.5), "no labels"),
        ((x, y[:-1]), "different lengths: x 20, y 19"),
        ((x, y[:, None]), r"y has shape \(20, 1\); give \(n\)"),
        (x, r"give a tuple of 2, \(x, y\)"),
        ({"x": x}, "y missing"),
    ):
        with pytest.raises(DataError, match=message):
            given(wrong, like, answers=True)
    with pytest.warns(UserWarning, match=r"x spreads 0.0039. times"):
        given(torch.utils.data.TensorDataset(torch.from_numpy(x / np.float32(255)), torch.from_numpy(y)), like, answers=False)
    with pytest.warns(
        UserWarning, match="x spreads 0.0039. times as much as the data of the training: is it in the units of those"
    ):
        given(x / 255.0, like, answers=False)


@pytest.mark.filterwarnings("error")
def test_features_of_different_scales_are_in_the_units_of_the_training():
    frame = pd.DataFrame({"a": some(20, (1,))[0][:, 0] * 1e4, "b": some(20, (1,))[0][:, 0], "label": [0, 1] * 10})
    like = open_dataset(frame)
    assert every(given(frame, like, answers=False))["x"].shape == (20, 2)
    with pytest.warns(UserWarning, match="x spreads"):
        given(frame[["b", "a"]].to_numpy(), like, answers=False)
    with pytest.raises(DataError, match="a missing: the table has A, b, label"):
        given(frame.rename(columns={"a": "A"}), like, answers=False)


def test_a_table_is_read_by_the_columns_of_the_training():
    pandas = pytest.importorskip("pandas")
    rng, n = np.random.default_rng(0), 40
    frame = pandas.DataFrame(
        {"a": rng.normal(5, 2, n), "b": rng.normal(size=n), "kind": ["u", "v"] * (n // 2), "price": np.arange(n)}
    )
    like = open_dataset(frame, label="kind", target="price")
    one = given(frame[["price", "kind", "b", "a"]], like, answers=True)
    at = np.arange(n)
    features = frame[["a", "b"]].to_numpy(np.float32)
    np.testing.assert_array_equal(one.raw(at, "test"), features)
    centre, rate = like.affine
    batch = one.batch(at, "test")
    np.testing.assert_allclose(batch["x"], (features - centre) * rate, rtol=1e-6)
    np.testing.assert_array_equal(batch["kind"], at % 2)
    np.testing.assert_array_equal(batch["price"], at)
    assert given(frame[["a", "b"]], like, answers=False).answers == []
    for table, words in (
        (frame.assign(kind="w"), "kind 'w' is new; the network knows u, v"),
        (frame.drop(columns="price"), "price missing"),
        (frame.assign(a=None), "x has 40 missing values"),
    ):
        with pytest.raises(DataError, match=words):
            given(table, like, answers=True)


def test_samples_that_are_shorter_than_those_of_the_training_are_filled_up_as_those_were():
    ids = [[1 + i % 4] * (2 + i % 3) for i in range(40)]
    like = open_dataset({"ids": ids, "labels": ids}, pad=0, tokens="ids", label="labels")
    assert like.fields["ids"].shape == (4,)
    batch = given({"ids": ids[:5], "labels": ids[:5]}, like, answers=True).batch(np.arange(5), "test")
    np.testing.assert_array_equal(batch["ids"], [own + [0] * (4 - len(own)) for own in ids[:5]])
    np.testing.assert_array_equal(batch["labels"], [own + [-100] * (4 - len(own)) for own in ids[:5]])
    for short in ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]], np.uint8)):
        np.testing.assert_array_equal(every(given(short, like, answers=False))["ids"], [[1, 2, 0, 0], [3, 4, 0, 0]])
    with pytest.raises(DataError, match="ids: a sample has 5 entries, and those of the training had 4 at most"):
        given([[1] * 5, [2]], like, answers=False)


class Numbered:
    """A set by items whose answers are whole numbers, trained on as targets."""

    def __init__(self, n=20):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.full(i % 3 + 1, float(i)), i


def test_a_set_by_items_is_read_in_the_roles_of_the_training():
    like = open_dataset(Numbered(), target="y", pad=0)
    for data, n in ((Numbered(7), 7), ({"train": Numbered(), "test": Numbered(5)}, 5), ((Numbered(), Numbered(5)), 5)):
        one = given(data, like, answers=True)
        batch = one.batch(np.arange(n), "test")
        assert one.n_test == n and batch["y"].dtype == like.fields["y"].dtype
        np.testing.assert_array_equal(batch["y"], np.arange(n))
        np.testing.assert_array_equal(batch["x"], [[i] * (i % 3 + 1) + [0] * (2 - i % 3) for i in range(n)])
    several = [{"x": [float(i)] * (i % 3 + 1), "y": i} for i in range(9)]
    like = open_dataset(several, target="y", pad=0)
    for rows in (several[2:3], several[::3]):  # one, or several of one length
        assert given(rows, like, answers=True).batch([0], "test")["y"] == rows[0]["y"]
    with pytest.raises(DataError, match=r"x is input \(2, 1\); the network was trained on input \(None,\)"):
        given([{"x": [[1.0], [2.0]], "y": 1}] * 2, like, answers=True)
    cut = given({"x": [[7.0], [8.0, 9.0]], "y": [1, 2]}, like, answers=True).batch([0, 1], "test")
    np.testing.assert_array_equal(cut["x"], [[7, 0], [8, 9]])
    held = np.flatnonzero(hold_out(7))  # the longest of a batch is in one split, and a shorter one in the other
    assert given(Numbered(7), like, answers=True).batch([held[0], 3], "test")["x"].shape == (2, held[0] % 3 + 1)
