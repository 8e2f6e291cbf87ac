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


LABELS = {
    "settings": [f"AGWU + IDPA, problem Classifier, model Net, data spirals-cba123, lr {lr}, ..." for lr in (0.01, 0.015, 0.02)],
    "strategies": [
        f"{update} + IDPA, problem Classifier, model Net, data spirals-cba123, ..." for update in ("AGWU", "SGWU", "SSP")
    ],
    "middle": [f"AGWU + IDPA, {'a' * 30} {seed} {'b' * 30}, {'c' * 60}" for seed in range(3)],
    "mixed": ["AGWU + IDPA, model Net" + ", more" * 12, "AGWU + IDPA, model Lenet" + ", more" * 12, "SGWU"],
    "one": ["x" * 90, "x" * 90, "x" * 90],
}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("of", LABELS)
def test_long_labels_leave_room_for_what_came_out_and_still_differ(of, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    whole = {"score": [0.1, 0.2, 0.3], "seconds": [1.0, 20.0, 300.5], **{f"column_{n}": ["abc"] * 3 for n in range(20)}}
    table = Table(whole, index=pd.Index(LABELS[of], name="run"))
    head, name, *rows, last = repr(table).splitlines()
    assert head.split()[:2] == ["score", "seconds"] and name.strip() == "run" and last.startswith("and ")
    assert max(map(len, [head, *rows])) <= width and all("0." in row for row in rows)
    labels = [row[: row.index("  0.")].strip() for row in rows]
    assert len(set(labels)) == len(set(LABELS[of])) and list(table.index) == LABELS[of]


@pytest.mark.parametrize("names", [["score"], ["who", "score"], [f"column_{n}" for n in range(9)] + ["score"]], ids=len)
def test_columns_that_were_selected_are_all_shown(names, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    whole = {f"column_{n}": [n, n] for n in range(20)} | {"who": ["a-long-name-of-a-run-" * 2] * 2, "score": [0.125, 0.25]}
    table = Table(whole, index=LABELS["settings"][:2])
    for shown in (table[names], table[names].sort_values("score"), table[table.score > 0.2][names]):
        text = repr(shown)
        assert "more column" not in text and all(name in text.split() for name in names) and "0.250" in text
        assert all(len(line) <= 80 for line in text.splitlines())
    assert "more column" in repr(table) and "more column" in repr(table[table.score > 0.2])


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
