"""Cutting and putting together: subdomains cover everything, weights sum to 1, overlap 0 is bit for bit the image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from labkit.errors import ProblemError
from labkit.subnets.decomposition import BORDERS, Decomposition

CASES = [
    ((1, 28, 28), (2, 2), 4), ((3, 17, 19), (3, 2), 0), ((1, 5, 7), (4, 7), 0), ((2, 29, 13), (5, 3), (2, 4)),
    ((1, 8, 8), (1, 1), 0), ((1, 9, 8, 11), (2, 1, 3), 1), ((1, 16, 12, 10), (4, 4, 2), 0), ((2, 7, 7, 7), (3, 3, 3), 1),
    ((1, 6, 40), (1, 20), 1),
]  # fmt: skip


def weights(decomposition, shape):
    """For each subdomain how much of each of its pixels counts: one over the number of subdomains that hold the pixel."""
    held = np.zeros(shape[1:])
    for window in decomposition.windows(shape):
        held[window] += 1
    return [1 / held[window] for window in decomposition.windows(shape)]


def assemble(decomposition, parts, shape):
    """Put subdomains (..., C, h, w) together to (..., C, H, W), bit for bit what was cut; overlaps as weighted means."""
    windows = decomposition.windows(shape)
    whole = np.empty((*parts[0].shape[: -len(shape)], *shape), np.float64)
    for part, window in zip(parts, windows, strict=True):
        whole[(..., *window)] = part
    off = np.zeros_like(whole)  # from what is there already: nothing, and exactly so, where the subdomains agree
    for part, window, weight in zip(parts, windows, weights(decomposition, shape), strict=True):
        off[(..., *window)] += (part - whole[(..., *window)]) * weight
    return (whole + off).astype(parts[0].dtype)


def image(shape, n=3, dtype=np.float32):
    generator = np.random.default_rng(0)
    return (255 * generator.random((n, *shape))).astype(dtype)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("shape", "grid", "overlap"), CASES)
def test_subdomains_cover_every_pixel_and_the_weights_sum_to_one(shape, grid, overlap, border):
    decomposition = Decomposition(grid, overlap, border=border)
    windows, shares = decomposition.windows(shape), weights(decomposition, shape)
    assert len(windows) == len(shares) == decomposition.n_parts == len(set(map(str, windows)))
    total, held = np.zeros(shape[1:]), np.zeros(shape[1:], int)
    for window, weight, part in zip(windows, shares, decomposition.shapes(shape), strict=True):
        assert weight.shape == part[1:] and all(0 <= side.start < side.stop for side in window)
        total[window] += weight
        held[window] += 1
    assert held.min() >= 1
    np.testing.assert_allclose(total, 1, rtol=1e-14)
    parts = [np.full((1, *part), number, np.float64) for number, part in enumerate(decomposition.shapes(shape))]
    mean = sum((shares[number] * number).sum() for number in range(len(parts)))
    np.testing.assert_allclose(assemble(decomposition, parts, shape)[0, 0].sum(), mean)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize(("shape", "grid", "most"), CASES)
def test_subdomains_reassemble_the_input_bit_for_bit(shape, grid, most, border):
    for dtype, overlap in itertools.product([np.uint8, np.int16, np.float32, np.float64], {0, most}):
        x, decomposition = image(shape, dtype=dtype), Decomposition(grid, overlap, border=border)
        whole = assemble(decomposition, decomposition.cut(x), shape)
        assert whole.dtype == x.dtype and np.array_equal(whole, x)


@pytest.mark.parametrize(("shape", "grid", "overlap"), CASES)
def test_equal_subdomains_have_one_shape_and_share_at_least_twice_the_overlap(shape, grid, overlap):
    decomposition = Decomposition(grid, overlap)
    assert len(set(decomposition.shapes(shape))) == 1
    for axis, slices in enumerate(decomposition._axes(shape)):
        assert slices[0].start == 0 and slices[-1].stop == shape[axis + 1]
        for left, right in itertools.pairwise(slices):
            assert left.start < right.start and left.stop - right.start >= 2 * decomposition.overlap[axis]


def test_the_border_rules_differ_where_they_should():
    shape = (1, 32, 32)
    assert Decomposition((2, 2), 4).windows(shape) == Decomposition((2, 2), 4, border="cut").windows(shape)
    assert {part[1] for part in Decomposition((4, 4), 2, border="cut").shapes(shape)} == {10, 12}
    assert {part[1] for part in Decomposition((4, 4), 2).shapes(shape)} == {11}
    whole = tuple(slice(0, side) for side in shape[1:])
    assert Decomposition((1, 1), 4).windows(shape) == [whole]  # there is no neighbour to reach into


def test_subdomains_are_views_of_arrays_and_tensors_alike():
    x = image((2, 9, 9))
    parts = Decomposition((2, 3), 1).cut(x)
    assert all(np.shares_memory(part, x) for part in parts)
    for part, same in zip(parts, Decomposition((2, 3), 1).cut(torch.from_numpy(x)), strict=True):
        assert torch.equal(torch.from_numpy(part), same)
    assert parts[5].shape[-2:] == Decomposition((2, 3), 1).shapes(x.shape[1:])[5][1:]
    assert Decomposition((2, 3)).place(5) == (1, 2) and Decomposition((2, 3, 2)).place(7) == (1, 0, 1)


def test_it_is_its_settings():
    for decomposition in (Decomposition((2, 2), 4), Decomposition((2, 1, 3), (0, 1, 2), border="cut")):
        assert Decomposition.of(decomposition.config()) == decomposition == Decomposition.of(decomposition)
        assert eval(repr(decomposition)) == decomposition
    assert Decomposition.of([2, 3]) == Decomposition((2, 3)) != Decomposition((2, 3), 1)
    assert len({Decomposition((2, 2)), Decomposition([2, 2], 0), Decomposition((2, 2), 1)}) == 2


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        (((9, 2), 0), (1, 8, 8), r"9 subdomains along axis 0, which has 8 pixels .* Use at most 8"),
        (((2, 4), 3), (1, 8, 8), r"an overlap of 3 along axis 1 is too much for 4 subdomains of 2 pixels"),
        (((1, 8), 1), (1, 8, 8), r"an overlap of 1 along axis 1 is too much for 8 subdomains of 1 pixels .* see the same"),
        (((2, 2), 0), (1, 8, 8, 8), r"cuts images \(C, H, W\), and the data have shape \(1, 8, 8, 8\)"),
        (((2, 2, 2), 0), (1, 8, 8), r"cuts volumes \(C, D, H, W\), and the data have shape \(1, 8, 8\)"),
        (((2, 2), 0), (64,), "the data have shape"),
    ],
)
def test_a_grid_that_does_not_fit_says_why(arguments, shape, message):
    with pytest.raises(ProblemError, match=message):
        Decomposition(*arguments).windows(shape)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((2, 2), -1), ValueError, "overlap=-1 must be at least 0"),
        (((2, 2), (0, -2)), ValueError, "overlap=-2 must be at least 0"),
        (((2, 2), 1.5), TypeError, "overlap=1.5 must be a whole number"),
        (((2, 2), (1, 2, 3)), ValueError, "3 entries for 2 axes"),
        (((0, 2),), ValueError, "grid=0 must be at least 1"),
        ((4,), TypeError, "grid=4 must be a list"),
        (("22",), TypeError, "grid='22' must be a list"),
        (((2, 2, 2, 2),), TypeError, "must have 2 entries"),
    ],
)
def test_senseless_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Decomposition(*arguments)
    with pytest.raises(ValueError, match=r"border='wrap' is not known. Known: equal, cut"):
        Decomposition((2, 2), border="wrap")
