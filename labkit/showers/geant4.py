"""The data set "showers-wsi": 9,000 electron showers that Geant4 simulated, inside the package.

Electrons of 2 to 50 GeV, uniform, hit the centre cell of a sampling calorimeter of 25 layers (2.4 mm W + 0.5 mm Si) head on; a
layer has 25 x 25 cells of 5.1 mm. A shower is the visible energy in MeV of (25, 25, 25) cells, axes x, y, depth; below 1 keV it is 0.
One cell in fifty is hit. So the file holds, of each shower, the cells that are, and is a twelfth of what they fill in memory:

    hits (N,) uint16              how many cells of each shower
    gaps (2, M) uint8             from one hit cell to the next, in the order of the flat shower; low and high bytes of uint16
    cells (2, M) uint8            their energies; low and high bytes of float16
    energy (N,) float32, about    GeV; credit and caveats

Used by `labkit.data.open_dataset` through its table of names; the parametrised generator and the tests pack showers likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from labkit.data.cache import Source, cached, reading, rows_per_chunk
from labkit.data.dataset import Dataset
from labkit.errors import whole

SHAPE = (25, 25, 25)
FILE = Path(__file__).with_name("electrons-wsi.npz")
N = 9000
RATE = 7.0  # showers a second and core, with which Geant4 made them
ABOUT = (
    "Simulated with Geant4 11.4 (Geant4 Collaboration, https://geant4.org: S. Agostinelli et al., NIM A 506 (2003) 250; J. Allison et "
    "al., NIM A 835 (2016) 186), which is to be credited in any use. Electrons of 2 to 50 GeV at normal incidence on the centre cell of 25 layers of 2.4 "
    "mm W + 0.5 mm Si with cells of 5.1 mm; visible energy in MeV, 0 below 1 keV; range cut 0.7 mm. Caveat: models that read no "
    "data files, among them the older (9.x) parametrised bremsstrahlung below 1 GeV; no Rayleigh scattering, no fluorescence, no electronics."
)
NOTE = "showers-wsi was simulated with Geant4 11.4, which is to be credited in any use (models and caveats: labkit.showers.geant4.ABOUT)."


class Packed(NamedTuple):
    """Showers as the cells that are hit: `energy` (N,) float32, `starts` (N + 1,), `at` (M,) flat indices, `cells` (M,) float16."""

    energy: np.ndarray
    starts: np.ndarray
    at: np.ndarray
    cells: np.ndarray

    def showers(self, begin: int, end: int) -> np.ndarray:
        """Showers begin..end - 1: (n, 25, 25, 25) float16."""
        made = np.zeros((end - begin, int(np.prod(SHAPE))), np.float16)
        some = slice(self.starts[begin], self.starts[end])
        rows = np.repeat(np.arange(end - begin), np.diff(self.starts[begin : end + 1]))
        made[rows, self.at[some]] = self.cells[some]
        return made.reshape(-1, *SHAPE)


def showers_wsi(n: int = N) -> Dataset:
    """The first `n` of the 9,000 showers, a tenth of them held out: "x" (1, 25, 25, 25) float16 in MeV, not normalised, and "energy", the
    target, in GeV. ValueError for fewer than 20 or more than there are."""
    n = whole("n", n, 20, N, error=ValueError)
    return cached("showers-wsi", f"1-{n}", lambda: (fields(_packed(), n, NOTE), None))


def fields(packed: Packed, n: int, about: str = "") -> dict[str, Source]:
    """The split of the first `n` showers, on its way into the cache."""
    shape, dtype = (n, 1, *SHAPE), np.dtype(np.float16)
    rows = rows_per_chunk(shape, dtype)

    def chunks() -> Iterator[np.ndarray]:
        return (packed.showers(at, min(n, at + rows))[:, None] for at in range(0, n, rows))

    return {
        "x": Source(shape, dtype, chunks, about=about, as_given=True),
        "energy": Source((n,), np.dtype(np.float32), lambda: [packed.energy[:n]], role="target", as_given=True),
    }


def pack(energy: np.ndarray, showers: np.ndarray) -> dict[str, np.ndarray]:
    """What the file holds of showers (N, 25, 25, 25) in MeV, none of them negative; for `numpy.savez_compressed`."""
    flat = np.asarray(showers, np.float16).reshape(len(showers), -1)
    rows, at = np.nonzero(flat)
    hits = np.bincount(rows, minlength=len(flat))
    gaps = np.diff(at, prepend=0)
    first = np.cumsum(hits)[:-1][hits[1:] > 0] if len(hits) > 1 else np.zeros(0, int)
    gaps[first] = at[first]
    return {
        "energy": np.asarray(energy, np.float32),
        "hits": hits.astype(np.uint16),
        "gaps": _planes(gaps.astype(np.uint16)),
        "cells": _planes(flat[rows, at].view(np.uint16)),
    }


def unpack(stored: dict[str, np.ndarray]) -> Packed:
    """The showers of such a file."""
    hits, steps = stored["hits"].astype(np.int64), _joined(stored["gaps"]).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(hits)])
    passed = np.concatenate([[0], np.cumsum(steps)])  # each shower begins at 0 again
    at = passed[1:] - np.repeat(passed[starts[:-1]], hits)
    return Packed(stored["energy"], starts, at.astype(np.int32), _joined(stored["cells"]).view(np.float16))


def _packed() -> Packed:
    with reading(FILE, advice="Install labkit again."), np.load(FILE, allow_pickle=False) as file:
        return unpack({name: file[name] for name in ("energy", "hits", "gaps", "cells")})


def _planes(values: np.ndarray) -> np.ndarray:
    """Low and high bytes apart, which deflate better: (2, M) uint8."""
    return np.stack([values & 0xFF, values >> 8]).astype(np.uint8)


def _joined(planes: np.ndarray) -> np.ndarray:
    return planes[0].astype(np.uint16) | (planes[1].astype(np.uint16) << 8)
