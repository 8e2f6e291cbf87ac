"""What the title of a figure may claim of several runs: a winner beyond the spread of seeds, and numbers with the digits that it allows.

Three seeds are the least that show a spread. Of one or two there is no band and no winner, and a number has two digits.

Used by the figures of runs, searches and subnets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

SEEDS = 3
NARROW = 0.01  # of the median: within so much of it, three digits mean something


def stands_out(values: Mapping[str, Sequence[float]], least: bool = False) -> str | None:
    """The label whose values, one of each run, are all above (with `least` below) those of every other; None where the ranges overlap, or where
    one has fewer than three. The only label stands out."""
    if len(values) == 1 or not values:
        return next(iter(values), None)
    if min(map(len, values.values())) < SEEDS or any(math.isnan(value) for own in values.values() for value in own):
        return None
    sign = -1 if least else 1
    ranges = sorted(
        ((min(sign * v for v in own), max(sign * v for v in own), label) for label, own in values.items()), reverse=True
    )
    (low, _, first), others = ranges[0], ranges[1:]
    return first if all(low > high for _, high, _ in others) else None


def amount(value: float, values: Sequence[float] = ()) -> str:
    """A number with two digits, or three where it is the median of at least three `values` within 1 % of it."""
    values = [one for one in values if math.isfinite(one)]
    return rounded(value, 3 if len(values) >= SEEDS and np.ptp(values) <= NARROW * abs(value) else 2)


def rounded(value: float, digits: int) -> str:
    """1234.5 as "1,200" with two digits, 0.01234 as "0.012"."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.{digits}g}")
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def between(texts: Sequence[str]) -> str:
    """Equal texts once, others from the first to the last: "0.82", "0.82 to 0.87"."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"
