"""Tables of runs: DataFrames that are shown rounded for people. Their values are exact.

Used by `labkit.runs.record`, `labkit.runs.compare`, `labkit.plots` and `labkit.experiments`.
"""

from __future__ import annotations

import functools
import shutil
from typing import Any

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

    As text it shows the first columns that fit into the terminal, and names the others. What pandas makes of it is one, too. With
    `pandas.set_option` of your own, "display.float_format", "display.width" or "display.max_columns", those are used.
    """

    @property
    def _constructor(self) -> type:
        return Table

    @property
    def hvplot(self) -> Any:
        """hvPlot of the same DataFrame, once `labkit.plots.extension()` or `import hvplot.pandas` has loaded it; after the latter alone
        HoloViews does not know a `Table` (`register`)."""
        return pd.DataFrame(self).hvplot

    def __repr__(self) -> str:
        with _rounded():
            n = self._fitting()
            if n == self.shape[1]:
                return super().__repr__()
            others = self.columns[n:]
            named = ", ".join(map(str, others[:MOST])) + ", ..." * (len(others) > MOST)
            with pd.option_context("display.max_columns", None, "display.expand_frame_repr", False):
                shown = pd.DataFrame.__repr__(self.iloc[:, :n])
            return f"{shown}\nand {len(others)} more column{'s' * (len(others) > 1)}: {named}"

    def _fitting(self) -> int:
        """How many of the first columns fit into the width of the terminal, or into that which `pandas.set_option` was given; one at least."""
        width, own = (pd.get_option(f"display.{name}") for name in ("width", "max_columns"))
        if own is None:  # as many as there are, in pandas's way
            return self.shape[1]
        limit = width if width not in (None, WIDTH) else shutil.get_terminal_size((width or 10_000, 24)).columns
        rows = pd.concat([self.head(ROWS), self.tail(ROWS)]) if len(self) > 2 * ROWS else self
        index = [str(name) for name in rows.index] + [str(self.index.name or "")]
        wide, most = max(map(len, index)), pd.get_option("display.max_colwidth") or 10_000
        for n, (name, values) in enumerate(rows.items()):
            texts = [number(value) if isinstance(value, float) else str(value) for value in values]
            wide += 2 + max(len(str(name)), min(most, max(map(len, texts), default=0)))
            if wide > limit:
                return max(1, n)
        return self.shape[1]

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
