"""What titles claim: a winner of three seeds whose ranges do not overlap, and digits that the spread allows."""

from __future__ import annotations

import math

import pytest

from labkit.plots.claims import amount, between, rounded, stands_out


def test_a_winner_is_beyond_the_spread_of_three_seeds():
    far, near = {"a": [1, 2, 3], "b": [4, 5, 6]}, {"a": [1, 2, 4], "b": [4, 5, 6]}
    assert stands_out(far) == "b" and stands_out(far, least=True) == "a"
    assert stands_out(near) is None and stands_out({**far, "c": [9, 9]}) is None
    assert stands_out({"a": [1]}) == "a" and stands_out({}) is None
    assert stands_out({"a": [1, 2, 3], "b": [4, math.inf, math.inf]}, least=True) == "a", "two never came there"
    assert stands_out({"a": [1, 2, 3], "b": [4, math.nan, 5]}) is None


@pytest.mark.parametrize(
    ("value", "values", "said"),
    [
        (1.2345, (), "1.2"),
        (1.2345, (1.234, 1.235), "1.2"),
        (1.2345, (1.234, 1.2345, 1.235), "1.23"),
        (1.2345, (1.1, 1.2345, 1.3), "1.2"),
        (1234.5, (), "1,200"),
        (0.09951, (), "0.10"),
        (0.0, (), "0"),
    ],
)
def test_digits_are_those_that_the_spread_allows(value, values, said):
    assert amount(value, values) == said


def test_ranges_and_digits():
    assert rounded(99.95, 3) == "100" and rounded(-2.345, 2) == "-2.3"
    assert between(["0.8", "0.9"]) == "0.8 to 0.9" and between(["1", "1"]) == "1"
