"""Parametrised showers, any number of them, in a second or two a thousand: drawn from formulas whose constants are fitted to Geant4's.

The form is that of Grindhammer and Peters (hep-ex/0001020): with t the depth in layers, r the distance from the axis in cells,

    dE/dt = E_vis beta (beta t)^(alpha - 1) exp(-beta t) / Gamma(alpha)         ln T = ln((alpha - 1) / beta) and ln alpha: normal,
                                                                                correlated, means and spreads by ln E
    f(r)  = p 2 r Rc^2 / (r^2 + Rc^2)^2 + (1 - p) 2 r Rt^2 / (r^2 + Rt^2)^2      p, Rc, ln Rt linear in tau = t / T

A layer's energy comes in spots, Poisson in number and gamma in energy, round an axis that is uniform in the centre cell: they are the sampling
fluctuations, and leave most cells empty. No cell knows of its neighbour but through these; so profiles and sums are close to those of
Geant4 and single cells are not, and the data set says that it is parametrised.

Used by `labkit.data.open_dataset` ("parametrised-showers"), and where more showers are needed than Geant4 has made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from labkit.data.cache import Source, cached
from labkit.data.dataset import Dataset
from labkit.errors import SEEDS, whole
from labkit.showers.features import observables
from labkit.showers.geant4 import SHAPE

BLOCK = 64  # showers that are drawn at once, each block from a generator of its own
LEAST_MEV = 1e-3
ENERGIES = (2.0, 50.0)  # GeV, of the data set
WINDOWS = (1, 3, 5, 7, 9, 13, 17, 21)  # sides of the squares whose energy the radial profile is fitted to
NOTE = "parametrised-showers are drawn from formulas fitted to showers of Geant4 (labkit.showers.parametrised), and no simulation."


class Constants(NamedTuple):
    """What `fit` finds; of each pair (a, b) the value is a + b ln(E / GeV), or a + b tau where it says so."""

    visible: tuple[float, float]  # MeV per GeV
    spread: tuple[float, float]  # (s, c): relative spread of the visible energy beside that of the spots, sqrt(s^2 / E + c^2)
    ln_t: tuple[float, float]
    ln_alpha: tuple[float, float]
    inverse_sd_t: tuple[float, float]  # 1 / standard deviation of ln T
    inverse_sd_alpha: tuple[float, float]
    correlation: float  # of ln T and ln alpha
    core: tuple[float, float]  # Rc by tau, cells
    ln_tail: tuple[float, float]  # ln Rt by tau
    share: tuple[float, float]  # p by tau
    spot: float  # mean energy of a spot, MeV
    shape: float  # of the gamma distribution of spots


FITTED = Constants(
    visible=(32.6676, -0.4724),
    spread=(0.059, 0.0293),
    ln_t=(1.6956, 0.169),
    ln_alpha=(0.8912, 0.1937),
    inverse_sd_t=(2.857, 1.6184),
    inverse_sd_alpha=(3.3275, 0.6719),
    correlation=0.8714,
    core=(0.064, 0.1907),
    ln_tail=(-0.5266, 0.3308),
    share=(0.8601, -0.1351),
    spot=0.4408,
    shape=1.0209,
)


def parametrised_showers(n: int = 10000, seed: int = 0) -> Dataset:
    """`n` parametrised showers of 2 to 50 GeV, a tenth of them held out: the fields of "showers-wsi". Shower i is the same for every n."""
    n, seed = whole("n", n, 20, error=ValueError), whole("seed", seed, 0, SEEDS, error=ValueError)

    blocks = range(math.ceil(n / BLOCK))

    def begun(number: int) -> tuple[np.ndarray, np.random.Generator]:
        rng = np.random.default_rng([seed, number])
        return rng.uniform(*ENERGIES, BLOCK).astype(np.float32), rng

    def chunks() -> Iterator[np.ndarray]:
        return (draw(*begun(number))[: n - BLOCK * number, None] for number in blocks)

    def load() -> tuple[dict[str, Source], None]:
        energy = np.concatenate([begun(number)[0] for number in blocks])[:n]
        x = Source((n, 1, *SHAPE), np.dtype(np.float16), chunks, about=NOTE, as_given=True)
        return {"x": x, "energy": Source((n,), np.dtype(np.float32), lambda: [energy], role="target", as_given=True)}, None

    return cached("parametrised-showers", f"1-{n}-{seed}", load, synthetic=True)


def draw(energies: np.ndarray, rng: np.random.Generator, constants: Constants = FITTED) -> np.ndarray:
    """A shower for each of `energies` (n,) in GeV: (n, 25, 25, 25) float16, MeV, axes x, y, depth."""
    from scipy.special import gammainc

    side, _, depth = SHAPE
    energies = np.asarray(energies, np.float64)
    n, c = len(energies), constants
    ln_e = np.log(energies)
    one, other = rng.standard_normal((2, n))
    other = c.correlation * one + np.sqrt(1 - c.correlation**2) * other
    peak = np.exp(_line(c.ln_t, ln_e) + one / _line(c.inverse_sd_t, ln_e))
    alpha = np.maximum(np.exp(_line(c.ln_alpha, ln_e) + other / _line(c.inverse_sd_alpha, ln_e)), 1.05)
    beta = (alpha - 1) / peak
    within = gammainc(alpha[:, None], beta[:, None] * np.arange(depth + 1))
    shares = np.diff(within) / within[:, -1:]
    visible = energies * _line(c.visible, ln_e)
    visible *= np.maximum(0.05, 1 + np.sqrt(c.spread[0] ** 2 / energies + c.spread[1] ** 2) * rng.standard_normal(n))

    spots = rng.poisson(visible[:, None] * shares / c.spot)  # (n, depth)
    row = np.repeat(np.arange(n * depth), spots.ravel())
    shower, layer = row // depth, row % depth
    tau = (layer + 0.5) / peak[shower]
    is_core = rng.random(len(row)) < np.clip(_line(c.share, tau), 0.02, 0.98)
    radius = np.where(is_core, np.maximum(_line(c.core, tau), 0.02), np.exp(_line(c.ln_tail, np.minimum(tau, 4))))
    u, angle = rng.random(len(row)), 2 * np.pi * rng.random(len(row))
    radius *= np.sqrt(u / (1 - u))
    centre = side / 2 + rng.uniform(-0.5, 0.5, (2, n))
    x = np.floor(centre[0, shower] + radius * np.cos(angle))
    y = np.floor(centre[1, shower] + radius * np.sin(angle))
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    at = ((shower * side + x) * side + y) * depth + layer
    deposited = rng.gamma(c.shape, c.spot / c.shape, len(row))
    cells = np.bincount(at[inside].astype(np.int64), deposited[inside], n * side * side * depth)
    cells[cells < LEAST_MEV] = 0
    return cells.reshape(n, *SHAPE).astype(np.float16)


def fit(energies: np.ndarray, showers: np.ndarray, seed: int = 0) -> Constants:
    """The constants of showers (n, 25, 25, 25) in MeV of these energies: moments of each shower and least squares, then corrections."""
    from scipy.optimize import least_squares

    showers = np.asarray(showers, np.float32)
    depth, ln_e = np.arange(SHAPE[2]) + 0.5, np.log(energies)
    layers, total = showers.sum((1, 2)), showers.sum((1, 2, 3))
    mean = layers @ depth / total
    alpha = mean**2 / np.maximum(layers @ depth**2 / total - mean**2, 1e-3)
    peak = np.maximum((alpha - 1) / (alpha / mean), 0.1)

    def with_energy(values: np.ndarray) -> tuple[tuple[float, float], np.ndarray]:
        slope, start = np.polyfit(ln_e, values, 1)
        return (float(start), float(slope)), values - start - slope * ln_e

    ln_t, apart_t = with_energy(np.log(peak))
    ln_alpha, apart_alpha = with_energy(np.log(alpha))
    bins = np.digitize(ln_e, np.quantile(ln_e, np.linspace(0, 1, 9)[1:-1]))
    middle = np.array([ln_e[bins == b].mean() for b in range(8)])

    def inverse_sd(apart: np.ndarray) -> tuple[float, float]:
        slope, start = np.polyfit(middle, [1 / apart[bins == b].std() for b in range(8)], 1)
        return float(start), float(slope)

    visible, apart = with_energy(total / energies)
    # Cells that a few spots hit: by their number in the thin outer part, where hardly two fall into one cell.
    outer = showers[:, [0, 1, 2, 3, 4, -5, -4, -3, -2, -1]]
    hit = outer[outer > LEAST_MEV]
    spot, shape = float(hit.mean()), float(np.clip(hit.mean() ** 2 / hit.var(), 0.3, 5.0))
    relative = [(apart[bins == b] / (total / energies)[bins == b].mean()).var() for b in range(8)]
    of_spots = [spot * (1 + 1 / shape) / total[bins == b].mean() for b in range(8)]
    left = np.maximum(np.subtract(relative, of_spots), 1e-6)
    slope, start = np.polyfit(np.exp(-middle), left, 1)

    tau = depth[None] / peak[:, None]
    edges = np.array([0.0, 0.3, 0.6, 0.9, 1.2, 1.6, 2.2, 3.0])
    number = np.digitize(tau, edges) - 1
    seen, at = [], []
    for b in range(len(edges)):
        some = number == b
        if layers[some].sum() == 0:
            continue
        image = np.einsum("nxyz,nz->xy", showers, some.astype(np.float32))
        seen.append([_window(image, side) / image.sum() for side in WINDOWS])
        at.append(float((tau * layers)[some].sum() / layers[some].sum()))
    seen, at, rng = np.array(seen), np.array(at), np.random.default_rng(seed)
    u, angle, offset = rng.random(20000), 2 * np.pi * rng.random(20000), rng.uniform(-0.5, 0.5, (2, 20000))
    unit = np.sqrt(u / (1 - u))

    def inside(radius: float) -> np.ndarray:
        far = np.maximum(np.abs(offset[0] + radius * unit * np.cos(angle)), np.abs(offset[1] + radius * unit * np.sin(angle)))
        shares = np.array([(far < side / 2).mean() for side in (*WINDOWS, SHAPE[0])])
        return shares[:-1] / shares[-1]

    def apart_of(values: np.ndarray) -> np.ndarray:
        core, tail, share = values[:2], values[2:4], values[4:]
        made = []
        for t in at:
            p = np.clip(_line(share, t), 0.02, 0.98)
            made.append(p * inside(max(_line(core, t), 0.02)) + (1 - p) * inside(np.exp(_line(tail, min(t, 4)))))
        return (np.array(made) - seen).ravel()

    found = least_squares(apart_of, [0.2, 0.1, 0.5, 0.2, 0.8, -0.1], diff_step=0.02).x
    pairs = [tuple(map(float, found[i : i + 2])) for i in (0, 2, 4)]
    correlation = float(np.corrcoef(apart_t, apart_alpha)[0, 1])
    spread = (float(np.sqrt(max(slope, 0.0))), float(np.sqrt(max(start, 0.0))))
    of_t, of_alpha = inverse_sd(apart_t), inverse_sd(apart_alpha)
    found = Constants(visible, spread, ln_t, ln_alpha, of_t, of_alpha, correlation, *pairs, spot, shape)
    # Moments of single showers are those of a smooth profile and its spots together: what is drawn is compared, and corrected.
    some = rng.permutation(len(energies))[:1000]
    real = observables(showers[some], energies[some])
    for _ in range(4):
        drawn = observables(draw(energies[some], rng, found), energies[some])
        ratio = {name: float(real[name].mean() / drawn[name].mean()) for name in ("depth", "length", "hits", "width")}
        found = found._replace(
            ln_t=(found.ln_t[0] + np.log(ratio["depth"]), found.ln_t[1]),
            ln_alpha=(found.ln_alpha[0] + 2 * np.log(ratio["depth"] / ratio["length"]), found.ln_alpha[1]),
            ln_tail=(found.ln_tail[0] + np.log(ratio["width"]), found.ln_tail[1]),
            spot=found.spot / ratio["hits"] ** 1.5,
        )
    return Constants(*(tuple(map(float, one)) if isinstance(one, tuple) else float(one) for one in found))


def _line(pair: tuple[float, float], at: np.ndarray | float) -> np.ndarray:
    return pair[0] + pair[1] * at


def _window(image: np.ndarray, side: int) -> float:
    low = (len(image) - side) // 2
    return float(image[low : low + side, low : low + side].sum())
