"""Parquet in all its layouts gives the same samples; what is damaged is refused."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.data import open_dataset
from tests.data.helpers import everything, refused, some

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(columns, metadata=None, **options):
        table = pa.table(columns)
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "set.parquet", **options)
        return tmp_path / "set.parquet"

    return write


def test_parquet_layouts_give_the_same_samples(parquet):
    import pyarrow as pa

    x, y = some(shape=(3, 2, 5))
    expected = everything(open_dataset((x, y)))
    flat = pa.array(x.reshape(-1))
    tensor = pa.fixed_shape_tensor(pa.float32(), (3, 2, 5))
    layouts = {
        "nested lists": ({"x": pa.array(x.tolist(), pa.list_(pa.list_(pa.list_(pa.float32())))), "y": y}, None),
        "fixed lists": ({"x": pa.FixedSizeListArray.from_arrays(flat, 30), "y": y}, {"shape": "[3, 2, 5]"}),
        "flat lists": ({"x": list(x.reshape(17, -1)), "y": y}, {"shape": "[3, 2, 5]"}),
        "tensors": (
            {"x": pa.ExtensionArray.from_storage(tensor, pa.FixedSizeListArray.from_arrays(flat, 30)), "y": y},
            None,
        ),
    }
    for name, (columns, metadata) in layouts.items():
        data = open_dataset(parquet(columns, metadata, row_group_size=4))
        assert data.shape == (3, 2, 5), name
        np.testing.assert_array_equal(everything(data), expected, err_msg=name)


def test_parquet_features_are_taken_in_the_order_of_their_numbers(parquet, monkeypatch):
    monkeypatch.setattr("labkit.data.parquet.ROWS", 5)
    x, y = some(shape=(11,), dtype=np.float64)
    columns = {f"f{i}": x[:, i] for i in reversed(range(11))}
    data = open_dataset(parquet({**columns, "y": y, "other": y}))
    assert data.shape == (11,) and data.name == "set"
    np.testing.assert_array_equal(everything(data), everything(open_dataset((x, y))))
    assert "columns f0 to f10 and y are read; left out: other." in data.note


def test_columns_of_an_index_are_left_out_and_said(parquet):
    x, y = some(shape=(4,))
    data = open_dataset(parquet({"x": list(x), "y": y, "__index_level_0__": y, "f0": y}))
    assert data.shape == (4,) and "left out: __index_level_0__, f0" in data.note
    assert open_dataset(parquet({"x": list(x), "y": y})).note == ""


def test_the_names_of_a_tensors_axes_tell_where_the_channels_are(parquet):
    import pyarrow as pa

    x, y = some(shape=(5, 5, 5))
    storage = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 125)
    for names, expected in ((["H", "W", "C"], np.moveaxis(x, -1, 1)), (["C", "H", "W"], x)):
        tensor = pa.fixed_shape_tensor(pa.float32(), (5, 5, 5), dim_names=names)
        data = open_dataset(parquet({"x": pa.ExtensionArray.from_storage(tensor, storage), "y": y}))
        np.testing.assert_array_equal(everything(data), everything(open_dataset((expected, y), channels="first")))
    refused(parquet({"x": pa.array(x.tolist()), "y": y}), "does not tell")


def test_damaged_parquet_is_refused(parquet, monkeypatch):
    import pyarrow as pa

    x, y = some(shape=(4,))
    lists = list(x)
    refused(parquet({"x": lists, "label": y}), "no column 'y'", "x, label")
    refused(parquet({"pixels": lists, "y": y}), "neither a column 'x'", "pixels, y")
    refused(parquet({"f0": x[:, 0], "f2": x[:, 1], "y": y}), "lacks the column f1")
    refused(parquet({"x": [*lists[:-1], x[-1, :3]], "y": y}), "lengths")
    refused(parquet({"x": [*lists[:-1], None], "y": y}), "lengths")
    refused(parquet({"x": pa.array([[1.0, None]] * 17), "y": y}), "missing values")
    refused(parquet({"x": lists, "y": pa.array([0, None] + [1] * 15)}), "column y has 1 missing")
    refused(parquet({"x": ["a"] * 17, "y": y}), "column x is of type string")
    refused(parquet({"x": lists, "y": ["cat"] * 17}), "column y is of type string")
    refused(parquet({"x": lists, "y": y}, {"shape": "2x2"}), "metadata 'shape'", "2x2")
    refused(parquet({"x": lists, "y": y}, {"shape": "[3, 3]"}), "(4,)", "(3, 3)")
    refused(parquet({"x": [float(v) for v in y], "y": y}), "x[:, None]")
    refused(parquet({"x": pa.array([], pa.list_(pa.float32())), "y": pa.array([], pa.int64())}), "no rows")
    refused(parquet({"x": [*lists[:-1], x[-1] * np.nan], "y": y}), "x[16] holds nan")
    monkeypatch.setattr("labkit.data.parquet.ROWS", 8)
    refused(parquet({"x": [*lists[:8], *(v[:3] for v in lists[8:])], "y": y}), "(3,)", "(4,)")
    path = parquet({"x": lists, "y": y})
    good = path.read_bytes()
    for damaged in (good[:-9], good[:100], b"PAR1", b"x" * 100):
        path.write_bytes(damaged)
        refused(path, "cannot be read")
