"""Tables of runs: DataFrames that are shown rounded for people. Their values are exact.

Used by `labkit.runs.record`, `labkit.runs.compare`, `labkit.plots` and `labkit.experiments`.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from labkit.cards import number

ROWS = 30  # at the beginning and at the end of a long table, which pandas shows at most
MOST = 20  # columns that are named
WIDTH = 80  # characters: the default of pandas, which stands for the width of the terminal


class _Shown(type):
    """A table is a DataFrame that is shown in another way: no other difference counts, also for `pandas.testing.assert_frame_equal`."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, pd.DataFrame)


class Table(pd.DataFrame, metaclass=_Shown):
    """A DataFrame of which a notebook and a terminal show numbers to three or four digits (`labkit.cards.number`).

    As text it shows the first columns that fit into the terminal, and names the others; columns that were selected, `table[["score", "seconds"]]`,
    are all shown, below each other where need be. Long labels of rows are cut to leave room, so that they still differ. What pandas
    makes of it is a `Table`, too. With `pandas.set_option` of your own, "display.float_format", "display.width" or "display.max_columns", those are used.
    """

    _metadata: ClassVar[list[str]] = ["_selected"]  # what pandas hands on
    _selected = False

    @property
    def _constructor(self) -> type:
        return Table

    @property
    def hvplot(self) -> Any:
        """hvPlot of the same DataFrame, once `labkit.plots.extension()` or `import hvplot.pandas` has loaded it; after the latter alone
        HoloViews does not know a `Table` (`register`)."""
        return pd.DataFrame(self).hvplot

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if type(found) is Table and found.shape[1] < self.shape[1]:
            found._selected = True
        return found

    def __repr__(self) -> str:
        width, own = (pd.get_option(f"display.{name}") for name in ("width", "max_columns"))
        with _rounded():
            if own is None:  # all columns, in pandas's way
                return super().__repr__()
            limit = width if width not in (None, WIDTH) else shutil.get_terminal_size((width or 10_000, 24)).columns
            index, columns = self._widths()
            least = min(index, limit * 2 // 5) if _named(self) else index
            fitting = int((least + np.cumsum(columns) <= limit).sum())
            n = len(columns) if self._selected else max(1, fitting)
            shown = _labelled(self.iloc[:, :n], max(least, limit - sum(columns[:n])))
            if fitting == len(columns):
                with pd.option_context("display.expand_frame_repr", False):
                    return repr(shown)
            with pd.option_context(
                "display.max_columns", None, "display.expand_frame_repr", self._selected, "display.width", limit
            ):
                text = repr(shown)
            others = self.columns[n:]
            named = ", ".join(map(str, others[:MOST])) + ", ..." * (len(others) > MOST)
            return text + f"\nand {len(others)} more column{'s' * (len(others) > 1)}: {named}" * (len(others) > 0)

    def _widths(self) -> tuple[int, list[int]]:
        """Characters that the labels of the rows take, and each column with the space before it."""
        rows = pd.concat([self.head(ROWS), self.tail(ROWS)]) if len(self) > 2 * ROWS else self
        most, widths = pd.get_option("display.max_colwidth") or 10_000, []
        for name, values in rows.items():
            texts = [number(value) if isinstance(value, float) else str(value) for value in values]
            widths.append(2 + max(len(str(name)), min(most, max(map(len, texts), default=0))))
        return max(map(len, [*map(str, rows.index), str(self.index.name or "")])), widths

    def _repr_html_(self) -> str | None:
        with _rounded():
            return super()._repr_html_()


@functools.cache
def register() -> None:
    """HoloViews takes a `Table` for the DataFrame that it is. It knows DataFrames by their exact type, and what is derived from them by
    narwhals, which has no index and draws no boxes."""
    from holoviews.core.data import PandasInterface

    applies = PandasInterface.applies.__func__
    PandasInterface.applies = classmethod(lambda cls, data: issubclass(type(data), Table) or applies(cls, data))


def _rounded() -> Any:
    own = pd.get_option("display.float_format")
    return pd.option_context("display.float_format", own or number)


def _named(table: pd.DataFrame) -> bool:
    """Have its rows labels of text?"""
    return table.index.nlevels == 1 and len(table) > 0 and pd.api.types.is_string_dtype(table.index)


def _labelled(table: pd.DataFrame, width: int) -> pd.DataFrame:
    """The table with labels of `width` characters at most, and of so many as pandas shows: it would cut the ends, in which they may differ."""
    if _named(table):
        labels = _cut([str(label) for label in table.index], min(width, pd.get_option("display.max_colwidth") or width))
        table = table.set_axis(pd.Index(labels, name=table.index.name), axis=0)
    return pd.DataFrame(table)


def _cut(labels: Sequence[str], width: int) -> list[str]:
    """Labels of `width` characters at most that differ as before: without their middle, or, where that makes some alike, without what
    these have in common. One that this does not tell apart remains as long as it is."""
    cut = {label: _without(label, width // 2, len(label) - (width - 3 - width // 2), width) for label in labels}
    for group in _alike(cut):
        common = os.path.commonprefix(group)  # noqa: RUF071 - of texts
        for start in (common.rfind(", ") + 2, len(common)):  # from the name of a setting on, or else from where they differ
            own = {label: _without(label, width // 3, start, width) for label in group}
            if not _alike(own):
                cut |= own
                break
    cut |= {label: label for group in _alike(cut) for label in group}
    return [cut[label] for label in labels]


def _alike(cut: Mapping[str, str]) -> list[list[str]]:
    """The labels that were cut to the same text."""
    groups: dict[str, list[str]] = {}
    for label, text in cut.items():
        groups.setdefault(text, []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def _without(label: str, head: int, start: int, width: int) -> str:
    """A label that is longer than `width` as its first characters, up to `head`, and what follows from `start` on."""
    if len(label) <= width:
        return label
    text = f"{label[:head]}...{label[start:]}" if start > head + 3 else label
    return text if len(text) <= width else f"{text[: max(1, width - 3)]}..."
