"""Tables as people read them: rounded, and the first columns that fit; the values stay what they are."""

from __future__ import annotations

import pickle

import holoviews as hv
import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from labkit import plots
from labkit.tables import Table


def test_it_is_rounded_and_its_values_are_not():
    table = Table({"score": [0.123456789, 0.5], "seconds": [12.3456, 1234.5], "n": [3, 4]})
    assert "0.123 " in repr(table) and "0.123456" not in repr(table) + table._repr_html_() and "12.35" in table._repr_html_()
    assert table.score[0] == 0.123456789 and table.equals(pd.DataFrame(table)) and isinstance(table, pd.DataFrame)
    assert "0.123" in repr(table[table.score < 0.4]) and "0.1235" not in repr(table.head(1))
    with pd.option_context("display.float_format", "{:.6f}".format):
        assert "0.123457" in repr(table)


def test_the_first_columns_that_fit_are_shown_and_the_others_named(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = [f"column_{number}" for number in range(12)]
    table = Table(np.arange(24.0).reshape(2, 12), columns=names)
    *lines, last = repr(table).splitlines()
    assert max(map(len, lines)) <= 60 and "column_0" in lines[0] and "column_11" not in lines[0] and "..." not in lines[0]
    assert last.startswith("and ") and last.endswith("column_11")
    assert repr(Table({"a": [1]})) == repr(pd.DataFrame({"a": [1]})) and "Empty" in repr(Table({"a": []}))


def test_what_a_user_sets_for_pandas_is_what_is_shown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    table = Table(np.arange(24.0).reshape(2, 12), columns=[f"column_{number}" for number in range(12)])
    with pd.option_context("display.width", 500):
        assert "column_11" in repr(table).splitlines()[0]
    with pd.option_context("display.max_columns", None):
        assert "more column" not in repr(table) and "column_11" in repr(table)


@pytest.mark.parametrize("n", [0, 1, 500])
def test_of_any_length(n):
    table = Table({f"a_long_name_{column}": np.arange(n) for column in range(30)})
    assert repr(table) and "more column" in repr(table)


def test_it_is_equal_to_a_dataframe_of_the_same_values_and_back_from_a_file_and_a_pickle(tmp_path):
    table = Table({"score": [0.1, 0.2], "who": ["a", "b"]})
    frame = pd.DataFrame(table)
    for one, other in ((frame, table), (table, frame), (table, table)):
        assert_frame_equal(one, other)
        assert one.equals(other)
    with pytest.raises(AssertionError):
        assert_frame_equal(frame, table.assign(score=0.3))
    assert not isinstance({}, Table) and not issubclass(pd.DataFrame, Table)
    again = pickle.loads(pickle.dumps(table))
    assert type(again) is Table and again.equals(table)
    table.to_parquet(tmp_path / "table.parquet")
    assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)


def test_holoviews_draws_it_as_any_dataframe():
    plots.extension("static")
    table = Table({"seconds": [0.0, 1.0, 2.0], "score": [0.1, 0.2, 0.3], "who": ["a", "b", "a"]})
    for data in (table, pd.DataFrame(table)):
        curve = hv.Curve(data.set_index("seconds"), "seconds", "score")
        boxes = hv.BoxWhisker(hv.Dataset(data), "who", "score")
        assert hv.render(curve, backend="matplotlib") and hv.render(boxes, backend="matplotlib")
        assert isinstance(curve.dframe(), pd.DataFrame) and curve.range("score") == (0.1, 0.3)
