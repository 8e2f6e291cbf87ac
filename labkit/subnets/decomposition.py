"""Decomposition: how an image or a volume is cut into overlapping subdomains, one for each subnet.

An axis of n pixels in p subdomains with overlap d becomes p windows; a subdomain is the product of one window of each axis, and
subdomains are numbered like a page is read, last axis fastest. Two rules for the border of the image:

    "equal"   windows of one length, ceil((n + 2 d (p - 1)) / p), spread evenly from border to border, so that neighbours
              share 2d pixels (more by rounding, where n does not divide) and all subdomains have one shape
    "cut"     cells i n / p to (i + 1) n / p, grown by d into their neighbours and cut off at the border of the image (CNN-DNN,
              Klawonn et al. 2024): subdomains at the border are smaller than inner ones

Two windows of an even axis are the same by both rules. Windows are slices, so what is cut out is a view: nothing is copied.

Used by `train`, `problem`, `coarse`, `baselines` and `result` of `labkit.subnets`, and in notebooks.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from labkit.cards import Card, Carded, value_text
from labkit.errors import ProblemError, known, plain_scalar, several, whole

BORDERS = ("equal", "cut")
MOST_PARTS = 1 << 16
Window = tuple[slice, ...]


class Decomposition(Carded):
    """Overlapping subdomains of an image (2 axes) or a volume (3 axes).

    Parameters
    ----------
    grid
        Subdomains along each axis, in the order of the data: (rows, columns), or (depth, rows, columns).
    overlap
        Pixels by which a subdomain reaches across each cut into its neighbour: one number, or one for each axis. Never as far
        as the neighbour after that. (The `overlap` of `labkit.train` is another one: batches while weights are on their way.)
    border
        "equal" or "cut": see above.

    Shapes are those of one sample, with its channels: (C, H, W) or (C, D, H, W). A grid that does not fit a shape is a
    ProblemError; a senseless argument a ValueError or TypeError.

    Examples
    --------
    >>> quarters = labkit.Decomposition((2, 2), overlap=2)
    >>> [part.shape for part in quarters.cut(np.zeros((1, 8, 8)))]
    [(1, 6, 6), (1, 6, 6), (1, 6, 6), (1, 6, 6)]
    """

    def __init__(self, grid: Sequence[int], overlap: int | Sequence[int] = 0, *, border: str = "equal") -> None:
        self.grid = tuple(several("grid", grid, whole))
        if len(self.grid) not in (2, 3):
            raise TypeError(f"grid={grid!r} must have 2 entries (images) or 3 (volumes), such as (2, 2) or (2, 4, 4).")
        if self.n_parts > MOST_PARTS:
            raise ValueError(f"grid={self.grid} makes {self.n_parts} subdomains; {MOST_PARTS} at most can be trained.")
        overlap = plain_scalar(overlap)
        each = [overlap] * len(self.grid) if isinstance(overlap, numbers.Number) else overlap
        each = several("overlap", each, partial(whole, least=0))
        if len(each) != len(self.grid):
            raise ValueError(
                f"overlap={overlap!r} has {len(each)} entries for {len(self.grid)} axes. Give one number, or one an axis."
            )
        self.overlap = tuple(each)
        self.border = known("border", border, BORDERS)

    @property
    def n_parts(self) -> int:
        return math.prod(self.grid)

    def place(self, part: int) -> tuple[int, ...]:
        """Where in the grid a subdomain lies, by its number: (row, column), or (depth, row, column)."""
        return tuple(int(i) for i in np.unravel_index(part, self.grid))

    def windows(self, shape: Sequence[int]) -> list[Window]:
        """The window of each subdomain: slices of the axes behind the channels."""
        return list(itertools.product(*self._axes(shape)))

    def shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each subdomain, with its channels."""
        return [(shape[0], *(side.stop - side.start for side in window)) for window in self.windows(shape)]

    def cut(self, samples: Any) -> list[Any]:
        """The subdomains of samples (n, C, H, W), or of one, as views; of an array of numpy or a tensor of torch."""
        shape = samples.shape[-1 - len(self.grid) :]
        return [samples[(..., *window)] for window in self.windows(shape)]

    def config(self) -> dict[str, Any]:
        """As JSON; `Decomposition.of` makes it again."""
        return {"grid": list(self.grid), "overlap": list(self.overlap), "border": self.border}

    @classmethod
    def of(cls, what: Decomposition | Mapping[str, Any] | Sequence[int]) -> Decomposition:
        """A decomposition as it is, from its `config()`, or from a bare grid, as a notebook's parameter gives it."""
        if isinstance(what, cls):
            return what
        if isinstance(what, Mapping):
            return cls(
                **{
                    known("decomposition", key, ("grid", "overlap", "border"), error=TypeError): value
                    for key, value in what.items()
                }
            )
        return cls(what)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decomposition) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash((self.grid, self.overlap, self.border))

    def __repr__(self) -> str:
        same = len(set(self.overlap)) == 1
        border = "" if self.border == BORDERS[0] else f", border={self.border!r}"
        return f"Decomposition({self.grid}, overlap={self.overlap[0] if same else self.overlap}{border})"

    def _card(self) -> Card:
        axes = ("rows", "columns") if len(self.grid) == 2 else ("slices", "rows", "columns")
        border = {"equal": "windows of one shape", "cut": "cells grown by the overlap, cut off at the border"}[self.border]
        rows = {
            "subdomains": f"{self.n_parts}: " + " x ".join(f"{n} {axis}" for n, axis in zip(self.grid, axes, strict=True)),
            "overlap": f"{value_text(self.overlap if len(set(self.overlap)) > 1 else self.overlap[0])} pixel(s) across each cut",
            "border": f"{self.border}: {border}",
        }
        calls = {"labkit.train_subnets(problem, lab, decomposition)": "trains a subnet for each subdomain"}
        return Card("Decomposition", rows=rows, calls=calls)

    def _axes(self, shape: Sequence[int]) -> list[list[slice]]:
        """The windows of each axis."""
        shape = tuple(shape)
        axes = len(self.grid)
        if len(shape) != axes + 1:
            kind = {2: "images (C, H, W)", 3: "volumes (C, D, H, W)"}
            raise ProblemError(
                f"{self!r} cuts {kind[axes]}, and the data have shape {shape}. Give a grid with one entry for each axis "
                "behind the channels."
            )
        found = []
        for axis, (side, n, pixels) in enumerate(zip(shape[1:], self.grid, self.overlap, strict=True)):
            if n > side:
                raise ProblemError(
                    f"{self!r}: {n} subdomains along axis {axis}, which has {side} pixels (data of shape {shape}). "
                    f"Use at most {side}."
                )
            slices = _equal(side, n, pixels) if self.border == "equal" else _cut(side, n, pixels)
            if n > 1 and (pixels > side // n or len({(each.start, each.stop) for each in slices}) < n):
                raise ProblemError(
                    f"{self!r}: an overlap of {pixels} along axis {axis} is too much for {n} subdomains of {side // n} pixels "
                    f"(data of shape {shape}): one would reach past its neighbour, or see the same as it. Use less."
                )
            found.append(slices)
        return found


def _equal(side: int, n: int, pixels: int) -> list[slice]:
    length = -(-(side + 2 * pixels * (n - 1)) // n)
    starts = [i * (side - length) // max(1, n - 1) for i in range(n)]
    return [slice(start, start + length) for start in starts]


def _cut(side: int, n: int, pixels: int) -> list[slice]:
    cuts = [i * side // n for i in range(n + 1)]
    return [slice(max(0, a - pixels), min(side, b + pixels)) for a, b in itertools.pairwise(cuts)]
