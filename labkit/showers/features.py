"""What physics looks at in a shower: energies of layers, depth, width, hits; and how far two samples of such numbers are apart.

Cells are arrays (n, X, Y, Z) in MeV, depth last; energies (n,) in GeV; positions are in cells from the middle of the calorimeter.

Used by `labkit.showers.gan` and `flow` (the score), and by `labkit.showers.validation`.
"""

from __future__ import annotations

import numpy as np

LEAST_MEV = 1e-3  # of a cell that is hit


def observables(cells: np.ndarray, energies: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers by name, each (n,), and "layer" (n, Z) in MeV.

    "total" (MeV), "fraction" (total / energy, MeV per GeV), "depth" and "length" (mean and standard deviation of the depth, layers), "x", "y" (centre,
    cells), "width" (standard deviation of the distance from it), "hits" (cells above 1 keV), "peak" (the layer with the most energy), "core" (share of
    the central 3 x 3 cells).

    Examples
    --------
    >>> numbers = labkit.showers.observables(labkit.showers.generate(gan, np.array([50.0])), np.array([50.0]))
    >>> numbers["layer"].shape
    (1, 25)
    """
    cells = np.asarray(cells, np.float32)
    _, sides, others, depth = cells.shape
    layer, columns = cells.sum((1, 2)), cells.sum(3)
    total = layer.sum(1)
    safe = np.where(total > 0, total, 1)
    x, y, z = np.arange(sides) - (sides - 1) / 2, np.arange(others) - (others - 1) / 2, np.arange(depth) + 0.5
    along_x, along_y = columns.sum(2), columns.sum(1)
    mean_x, mean_y, mean_z = along_x @ x / safe, along_y @ y / safe, layer @ z / safe
    wide = (along_x @ x**2 + along_y @ y**2) / safe - mean_x**2 - mean_y**2
    near = columns[:, abs(x) < 2][:, :, abs(y) < 2]
    return {
        "total": total,
        "fraction": total / energies,
        "depth": mean_z,
        "length": np.sqrt(np.maximum(layer @ z**2 / safe - mean_z**2, 0)),
        "x": mean_x,
        "y": mean_y,
        "width": np.sqrt(np.maximum(wide, 0)),
        "hits": (cells > LEAST_MEV).sum((1, 2, 3)).astype(np.float32),
        "peak": layer.argmax(1).astype(np.float32),
        "core": near.sum((1, 2)) / safe,
        "layer": layer,
    }


def by_layer(cells: np.ndarray) -> dict[str, np.ndarray]:
    """Of each layer "layer" (MeV), its centre "centre_x", "centre_y" and its width "width_x", "width_y" (cells): (n, Z) each."""
    cells = np.asarray(cells, np.float32)
    layer = cells.sum((1, 2))
    safe = np.where(layer > 0, layer, 1)
    found = {"layer": layer}
    for name, along, side in (("x", cells.sum(2), cells.shape[1]), ("y", cells.sum(1), cells.shape[2])):
        at = (np.arange(side) - (side - 1) / 2)[None, :, None]
        centre = (along * at).sum(1) / safe
        found[f"centre_{name}"] = centre
        found[f"width_{name}"] = np.sqrt(np.maximum((along * at**2).sum(1) / safe - centre**2, 0))
    return found


def compared(cells: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """What a score compares, (n, 5 + Z): fraction, depth, width, core, hits, and the energy of each layer, as roots (spreads alike)."""
    seen = observables(cells, energies)
    named = [seen[name] for name in ("fraction", "depth", "width", "core")]
    return np.column_stack([*named, np.sqrt(seen["hits"]), np.sqrt(seen["layer"])])


def distance(real: np.ndarray, made: np.ndarray) -> float:
    """The mean over columns of the Wasserstein-1 distance of two samples (n, k), each in standard deviations of the real one."""
    spread = np.maximum(real.std(0), 1e-3)
    if len(real) != len(made):
        at = (np.arange(512) + 0.5) / 512
        real, made = np.quantile(real, at, axis=0), np.quantile(made, at, axis=0)
    return float((np.abs(np.sort(real, 0) - np.sort(made, 0)).mean(0) / spread).mean())
