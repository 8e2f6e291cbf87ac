"""Named columns: their roles, types and shapes are what was asked for or what the note says; the rest is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from labkit.data import Field, cache, open_dataset
from labkit.errors import DataError
from tests.data.helpers import some

pytestmark = pytest.mark.usefixtures("own_cache")
N = 40
Y = np.arange(N) % 3
AGE = np.linspace(20, 80, N)
IMAGES, _ = some(n=N, shape=(3, 5, 7), dtype=np.uint8)


def fields(data):
    return {name: (field.role, str(field.dtype), field.shape, field.n_values) for name, field in data.fields.items()}


def refused(data, *words, **options):
    with pytest.raises(DataError) as caught:
        open_dataset(data, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_dict_of_arrays_has_named_inputs_and_labels():
    data = open_dataset({"image": IMAGES, "age": AGE, "label": Y})
    assert fields(data) == {
        "image": ("input", "float32", (3, 5, 7), None),
        "age": ("input", "float32", (1,), None),
        "label": ("label", "int64", (), 3),
    }
    assert (data.shape, data.n_classes, data.n_train, data.n_test) == ((3, 5, 7), 3, 36, 4)
    train = ~cache.hold_out(N)
    np.testing.assert_array_equal(data.labels(), Y[train])
    batch = data.batch(np.arange(36))
    assert list(batch) == ["image", "age", "label"] and list(data.batch([0], fields=["age"])) == ["age"]
    for name, given in (("image", IMAGES), ("age", AGE[:, None])):
        axes = (0, *range(2, given.ndim))
        x = given[train].astype(float)
        expected = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
        np.testing.assert_allclose(batch[name], expected, atol=1e-4)
    np.testing.assert_array_equal(data.raw([0, 1]), IMAGES[train][:2])
    np.testing.assert_allclose(data.raw([3], field="age"), AGE[train][3:4, None], rtol=1e-6)
    with pytest.raises(ValueError, match="fields='imag"):
        data.batch([0], fields=["imag"])


def test_a_pair_of_arrays_is_read_as_before_and_old_sets_stay_readable():
    pair, named = open_dataset((IMAGES, Y)), open_dataset({"x": IMAGES, "y": Y})
    meta = json.loads(Path(pair.path, "meta.json").read_text())
    assert meta["format"] == 1 and "fields" not in meta and pair.path != named.path
    assert (
        pair.fields
        == named.fields
        == {
            "x": Field((3, 5, 7), np.dtype(np.float32), "input"),
            "y": Field((), np.dtype(np.int64), "label", 3),
        }
    )
    for a, b in zip(pair.batch([0, 9]).values(), named.batch([0, 9]).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert open_dataset({"x": IMAGES, "y": Y}).path == named.path == open_dataset(named.path).path


@pytest.mark.parametrize(
    ("y", "options", "role", "dtype", "n_values"),
    [
        (AGE, {}, "target", "float32", None),
        (AGE.astype(np.float16), {}, "target", "float16", None),
        (np.eye(3)[Y], {}, "target", "float32", None),
        (np.eye(3, dtype=int)[Y], {}, "target", "float32", None),
        (np.eye(3, dtype=int)[Y], {"label": "y"}, "label", "int64", 2),
        (Y, {"target": "y"}, "target", "int64", None),
        (Y.astype(float), {"label": ["y"]}, "label", "int64", 3),
        (IMAGES[:, 0] % 4, {}, "label", "int64", (IMAGES[:, 0] % 4).max() + 1),
        (np.array(["cat", "dog", "eel"])[Y], {}, "label", "int64", 3),
        (Y == 1, {}, "label", "int64", 2),
        (Y[:, None] == np.arange(3), {"target": "y"}, "target", "float32", None),
    ],
)
def test_what_is_to_be_predicted_keeps_its_values(y, options, role, dtype, n_values):
    data = open_dataset({"x": IMAGES, "y": y}, **options)
    assert fields(data)["y"] == (role, dtype, y.shape[1:], n_values)
    assert "y is read as" in data.note or options or y.dtype.kind == "U"
    expected = Y if y.dtype.kind == "U" else y
    got = data.batch(np.arange(data.n_train))["y"]
    np.testing.assert_allclose(got, expected[~cache.hold_out(N)].astype(dtype))
    scalar = role == "label" and y.ndim == 1
    assert (data.label == "y") == scalar
    if not scalar:
        with pytest.raises(DataError, match="no field with one label a sample"):
            data.labels()


def test_several_answers_and_none():
    data = open_dataset({"x": IMAGES, "kind": Y, "age": AGE, "size": AGE}, label="kind", target=["age", "size"])
    assert data.answers == ["kind", "age", "size"] and data.n_classes == 3
    alone = open_dataset({"x": IMAGES})
    assert alone.answers == [] and alone.n_classes is None and "nothing is read as labels" in alone.note


def test_token_ids_stay_as_they_are_and_shorter_samples_are_filled_up():
    texts = [[*range(1, 2 + i % 5)] for i in range(N)]
    refused({"ids": texts, "y": Y}, "ids have 1 to 5 entries", "pad=0")
    data = open_dataset({"ids": texts, "y": Y}, pad=0)
    assert fields(data)["ids"] == ("input", "int64", (5,), 6) and "filled up with 0 to 5" in data.note
    at = np.flatnonzero(~cache.hold_out(N))[7]
    np.testing.assert_array_equal(data.batch([7])["ids"][0], texts[at] + [0] * (5 - len(texts[at])))
    whole = np.array([row + [0] * (5 - len(row)) for row in texts])
    np.testing.assert_array_equal(open_dataset((whole, Y), tokens=True).batch([7])["x"], data.batch([7])["ids"])
    assert fields(open_dataset((whole, Y), tokens=["x"]))["x"] == ("input", "int64", (5,), 6)
    assert fields(open_dataset({"x": whole, "y": Y}))["x"] == ("input", "float32", (5,), None)
    refused({"x": whole - 1, "y": Y}, "x goes down to -1", tokens="x")
    refused({"x": AGE[:, None], "y": Y}, "Token ids are integers", tokens="x")
    series = [np.full((2 + i % 3, 4), i, np.float32) for i in range(N)]
    data = open_dataset({"series": series, "y": Y}, pad=-1)
    assert data.shape == (4, 4) and "is not normalised" in data.note
    at = np.flatnonzero(~cache.hold_out(N))[0]
    np.testing.assert_array_equal(data.batch([0])["series"][0, :, 0], [at] * (2 + at % 3) + [-1] * (2 - at % 3))
    refused({"series": [np.zeros((2, 3)), np.zeros((2, 4))] * 20, "y": Y}, "number 1", pad=0)


def test_inputs_as_given_keep_shape_and_values():
    series = np.random.default_rng(0).normal(3, 2, (N, 6, 4))
    data = open_dataset({"x": series, "y": Y}, as_given="x")
    assert fields(data)["x"] == ("input", "float32", (6, 4), None)
    np.testing.assert_allclose(data.batch([0])["x"][0], series[~cache.hold_out(N)][0], rtol=1e-6)
    assert open_dataset({"x": IMAGES, "y": Y}, as_given=True).batch([0])["x"].dtype == np.float32


def test_what_is_to_be_learned_is_said_in_one_word():
    roles = {asked: open_dataset({"x": IMAGES, "y": Y}, **{asked: True}).fields["y"].role for asked in ("label", "target")}
    assert roles == {"label": "label", "target": "target"}
    assert open_dataset((IMAGES, Y - 5), target=True).batch([0])["y"].dtype == np.int64
    with pytest.raises(TypeError, match="give one of them"):
        open_dataset((IMAGES, Y), target=True, label=True)


def test_labels_of_many_lengths_end_in_what_losses_ignore():
    ids = [np.arange(1, 3 + i % 4) for i in range(N)]
    data = open_dataset({"ids": ids, "label": [one.astype(np.uint8) % 3 for one in ids]}, pad=0)
    batch = data.batch(np.arange(8))
    assert ((batch["label"] == -100) == (batch["ids"] == 0)).all() and (batch["label"] == -100).any()
    assert (data.fields["label"].n_values, data.fields["label"].no_class) == (3, (-100,)) and "filled up with -100" in data.note


def test_two_splits_in_one_dict():
    four = {"x_train": IMAGES, "y_train": Y, "x_test": IMAGES[:9], "y_test": Y[:9]}
    nested = {"train": {"x": IMAGES, "y": Y}, "test": {"x": IMAGES[:9], "y": Y[:9]}}
    assert open_dataset(four).path == open_dataset(nested).path
    assert (open_dataset(four).n_train, open_dataset(four).n_test) == (N, 9)
    pairs = open_dataset({"train": (IMAGES, Y), "test": [IMAGES[:9], Y[:9]]})
    assert pairs.path == open_dataset((IMAGES, Y, IMAGES[:9], Y[:9])).path and pairs.n_test == 9
    refused({**four, "z_train": Y}, "z is in one split only")
    refused({**four, "y_test": Y[:9] + 9}, "y_test[0] is 9", "target='y'")


def test_wrong_columns_are_refused_by_name():
    refused({"x": IMAGES, "y": Y[:-1]}, "x 40, y 39")
    refused({"x": IMAGES, "y": [object()] * N}, "y[0] is of type object")
    refused({"x": IMAGES, "y": np.array([None, 1] * 20)}, "y[0] is of type NoneType")
    refused({"x": IMAGES, "name": ["a"] * N, "y": Y}, "column name is text", "inputs=")
    refused({"x": IMAGES, "y": Y}, "label='yy' is no column", "Did you mean 'y'", label="yy")
    masks = (IMAGES[:, 0] % 3).astype(np.int16)
    masks[:, 0] = 255
    field = open_dataset({"x": IMAGES, "y": masks}).fields["y"]
    assert (field.n_values, field.no_class) == (3, (255,))
    refused({"x": IMAGES, "y": 255 * (masks == 1)}, "y holds 2 different labels, 0 to 255", "numpy.unique")
    refused({"x": IMAGES, "y": 50 * masks.astype(int)}, "different labels, 0 to 12750", "numpy.unique")
    ignoring = open_dataset({"x": IMAGES, "y": np.where(masks == 255, -100, masks)})
    assert ignoring.n_classes == 3 and "is -100 in places" in ignoring.note
    refused({"y": Y}, "no column is left as an input")
    refused({"x": IMAGES * np.float32("nan"), "y": Y}, "x[0] holds nan")
    refused({"x": IMAGES, "y": np.where(Y == 1, np.nan, AGE)}, "y[1] holds nan")
    refused({"x": IMAGES, "y": AGE}, "y[1]", "target='y'", label="y")
    refused({"x": IMAGES, "y": Y.astype("datetime64[s]")}, "y is of type datetime64")
    refused({"x": IMAGES[:0], "y": Y[:0]}, "x of the train split is empty")
    refused({3: IMAGES, "y": Y}, "column 3 is not named by a text")
    refused(pd.DataFrame({0: AGE, 1: Y}), "column 0 is not named by a text", "table.columns = table.columns.map(str)")
    refused((IMAGES, AGE), "target='y'")
    with pytest.raises(TypeError, match="pad='0' must be a number"):
        open_dataset({"x": IMAGES}, pad="0")
    with pytest.raises(TypeError, match="label=3"):
        open_dataset({"x": IMAGES}, label=3)


def test_a_data_frame_has_features_and_named_answers():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": AGE, "b": Y, "c": Y == 1, "city": ["x", "y"] * 20, "price": 2 * AGE})
    data = open_dataset(frame, target="price", inputs=["a", "b", "c"])
    assert fields(data) == {"x": ("input", "float32", (3,), None), "price": ("target", "float32", (), None)}
    assert "left out: city" in data.note and "x is the columns a, b, c" in data.note
    train = ~cache.hold_out(N)
    features = frame[["a", "b", "c"]].to_numpy(float)[train]
    expected = (features - features.mean(0)) / features.std(0)
    np.testing.assert_allclose(data.batch(np.arange(36))["x"], expected, atol=1e-5)
    for city in (frame.city, frame.city.astype("category")):
        by_city = open_dataset(frame.assign(city=city), label="city")
        assert by_city.n_classes == 2 and "0 to 1 are x, y" in by_city.note
        np.testing.assert_array_equal(by_city.labels(), (frame.city == "y")[train])
    refused(frame, "column city is text", target="price")
    refused(frame.assign(a=frame.a.where(frame.b > 0)), "column a has 14 missing values", target="price", inputs="a")
    refused(frame.assign(a=frame.b.astype("Int64").where(frame.b > 0)), "missing values", target="price", inputs="a")
    both = open_dataset({"train": frame, "test": frame[:5]}, label="city")
    assert (both.n_train, both.n_test, both.shape) == (N, 5, (4,))


def test_columns_of_pandas_are_told_apart_and_stand_row_by_row():
    pandas = pytest.importorskip("pandas")
    twice = pandas.DataFrame(np.c_[AGE, AGE, Y], columns=["age", "age", "label"])
    refused(twice, "2 columns are called 'age'")
    age, label = pandas.Series(AGE), pandas.Series(Y, index=np.arange(N)[::-1])
    refused({"age": age, "label": label}, "age and label have different indexes", "label.loc[age.index]")
    assert open_dataset({"age": age, "label": label.reset_index(drop=True)}).n_classes == 3


@pytest.mark.parametrize(
    ("data", "note"),
    [
        ({"age": AGE, "target": np.ones(N)}, "target is 1 in all samples."),
        ({"age": AGE, "target": np.c_[AGE, np.zeros(N)]}, "target: 1 of 2 numbers are the same in all samples (1)."),
        ({"input_ids": np.full((N, 3), 7), "label": Y}, "input_ids is 7 in all samples."),
        ({"age_train": AGE, "label_train": 0 * Y, "age_test": AGE, "label_test": 0 * Y}, "all labels are 0"),
    ],
)
def test_what_is_the_same_in_all_samples_is_said(data, note):
    assert note in open_dataset(data).note


def test_files_with_named_columns(tmp_path):
    h5py, pandas = pytest.importorskip("h5py"), pytest.importorskip("pandas")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"], file["energy"], file["who"] = IMAGES, AGE, ["a", "b"] * 20
        file.create_dataset("ids", data=[np.arange(1 + i % 3) for i in range(N)], dtype=h5py.vlen_dtype(np.int32))
    data = open_dataset(tmp_path / "a.h5", target="energy", label="who", inputs=["image", "ids"], pad=9)
    assert [(name, field.role, field.shape) for name, field in data.fields.items()] == [
        ("image", "input", (3, 5, 7)),
        ("ids", "input", (3,)),
        ("who", "label", ()),
        ("energy", "target", ()),
    ]
    assert (
        "left out" not in data.note
        and "left out: ids, who" in open_dataset(tmp_path / "a.h5", target="energy", inputs="image").note
    )
    frame = pandas.DataFrame({"a": AGE, "b": Y, "who": ["a", "b"] * 20, "vec": list(np.outer(AGE, [1, 2, 3])), "price": AGE})
    frame["seq"] = [list(range(1 + i % 4)) for i in range(N)]
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=7)
    data = open_dataset(tmp_path / "a.parquet", label="who", target="price", pad=0)
    assert [(name, field.role, field.shape) for name, field in data.fields.items()] == [
        ("x", "input", (2,)),
        ("vec", "input", (3,)),
        ("seq", "input", (4,)),
        ("who", "label", ()),
        ("price", "target", ()),
    ]
    assert data.fields["seq"].dtype == np.int64 and data.n_classes == 2
    np.testing.assert_allclose(data.batch(np.arange(36))["price"], AGE[~cache.hold_out(N)], rtol=1e-6)
    refused(tmp_path / "a.parquet", "who is text", target="price", pad=0)
    refused(tmp_path / "a.parquet", "seq have 1 to 4 entries", label="who")
    refused(tmp_path / "a.parquet", "no column 'y'", "label=")
    with pytest.raises(ValueError, match="holds none"):
        open_dataset(os.path.dirname(open_dataset("digits").path), target="price")


@pytest.mark.parametrize("one_hot", [True, False])
def test_answers_of_yes_or_no_that_are_one_hot_are_said_to_be(one_hot):
    y = np.eye(3, dtype=int)[np.arange(30) % 3]
    y[4, :] = [0, 1, 0] if one_hot else [1, 1, 0]
    note = open_dataset({"x": np.ones((30, 2)), "y": y}).note
    assert ("one-hot; for classes give y.argmax(1)" in note) == one_hot and "3 answers of yes or no a sample" in note
