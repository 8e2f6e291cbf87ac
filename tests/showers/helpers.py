"""Showers that the tests of this folder lend each other: small ones, made in a moment, and those of the package.

Used by the tests.
"""

from __future__ import annotations

import numpy as np

from labkit.data import open_dataset

SHAPE = (9, 9, 6)


def showers(n=60, seed=0, shape=SHAPE):
    """(cells in MeV, energies in GeV) of n small showers: a peaked profile, sparse away from the middle."""
    rng = np.random.default_rng(seed)
    energies = rng.uniform(2, 50, n).astype(np.float32)
    x, y = np.meshgrid(*(np.arange(side) - side // 2 for side in shape[:2]), indexing="ij")
    depth = np.arange(shape[2]) + 0.5
    peak = 1.5 + 0.2 * np.log(energies) + 0.2 * rng.normal(size=n)
    along = np.exp(-((depth - peak[:, None]) ** 2) / 4) * rng.gamma(20, 1 / 20, (n, shape[2]))
    across = np.exp(-1.2 * np.hypot(x, y))
    mean = (
        30
        * energies[:, None, None, None]
        * across[None, :, :, None]
        / across.sum()
        * (along / along.sum(1, keepdims=True))[:, None, None]
    )
    cells = 0.5 * rng.poisson(mean / 0.5) * rng.uniform(0.6, 1.4, mean.shape)
    return cells.astype(np.float32), energies


def data(n=60, seed=0, shape=SHAPE):
    cells, energies = showers(n, seed, shape)
    return open_dataset({"x": cells[:, None], "energy": energies}, target="energy", inputs="x", as_given="x")
