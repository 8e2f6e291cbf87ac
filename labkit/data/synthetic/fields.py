"""Fields on a grid of voxels: resizing, blurring, random smooth fields, and the lesions and vessels made of them.

Arrays are (D, H, W), float32. Positions are in half widths: each axis runs from -1 to 1, whatever its number of voxels.

Used by `labkit.data.synthetic.volumes`, `phantom`, `head` and `nifti`.
"""

from typing import NamedTuple

import numpy as np


class Patient(NamedTuple):
    """A volume before lesions: HU (D, H, W); the organ that lesions are in, 0 to 1; the window that is stored, in HU."""

    hu: np.ndarray
    organ: np.ndarray
    window: tuple[float, float]


def resize_weights(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of linear interpolation between `old` and `new` points of one axis, rows of sum 1.

    A triangle as wide as the larger of both steps, so that a smaller volume averages all of the slices it has.
    """
    step = old / new
    centre = (np.arange(new)[:, None] + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old)[None] - centre) / max(1.0, step))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resized(field: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The field at another number of voxels, by linear interpolation along each axis."""
    depth, height, width = (resize_weights(old, new) for old, new in zip(field.shape, shape, strict=True))
    return np.einsum("dz,zyx->dyx", depth, height @ (field.astype(np.float32) @ width.T), optimize=True)


def blur(field: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of `sigma` voxels."""
    from scipy.ndimage import gaussian_filter  # slow to import

    return gaussian_filter(field, sigma, truncate=3.0)


def axes(shape: tuple[int, ...]) -> list[np.ndarray]:
    """z, y and x of the voxels, from -1 to 1, shaped so that they broadcast to `shape`."""
    lines = [(2 * np.arange(n, dtype=np.float32) + 1) / n - 1 for n in shape]
    return list(np.meshgrid(*lines, indexing="ij", sparse=True))


def smooth(rng: np.random.Generator, shape: tuple[int, int, int], waves: int) -> np.ndarray:
    """A random field of mean 0 and spread 1 that changes over about 1 / `waves` of each axis."""
    field = rng.standard_normal((waves + 3,) * 3, dtype=np.float32)  # one point beyond each end
    for axis, n in enumerate(shape):
        at = (np.arange(n) + 0.5) * waves / n + 1
        weights = np.exp(-((np.arange(waves + 3)[None] - at[:, None]) ** 2) / 0.8).astype(np.float32)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        field = np.moveaxis(np.tensordot(weights, field, axes=(1, axis)), 0, axis)
    return field


def turn(rng: np.random.Generator, degrees: float) -> np.ndarray:
    """A rotation about a random axis by a normal angle of this spread, (3, 3)."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees) * rng.standard_normal()
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def lesion(rng: np.random.Generator, organ: np.ndarray, radius: tuple[float, float], contrast: tuple[float, float]) -> np.ndarray:
    """What one lesion adds in HU: an ellipsoid, turned at random, its edge soft and uneven, its centre well within the
    organ; `radius` in half widths.
    """
    depths = blur(organ, 1.5)
    inside = np.flatnonzero(depths > 0.85 * depths.max())
    at = np.unravel_index(rng.choice(inside), organ.shape)
    away = [line - line.flat[i] for line, i in zip(axes(organ.shape), at, strict=True)]
    half = rng.uniform(*radius) * rng.uniform(0.75, 1.3, 3)
    turned = (sum(r * a for r, a in zip(row, away, strict=True)) for row in turn(rng, 60.0))
    distance = np.sqrt(sum((line / h) ** 2 for line, h in zip(turned, half, strict=True)))
    distance = distance * np.exp(0.2 * smooth(rng, organ.shape, 6))
    return (rng.uniform(*contrast) * organ / (1 + np.exp(np.minimum(8 * (distance - 1), 50)))).astype(np.float32)


def tubes(rng: np.random.Generator, organ: np.ndarray, count: int) -> np.ndarray:
    """`count` thin winding tubes in the organ, 0 to 1: each a walk from a random point in a slowly turning direction."""
    shape = np.array(organ.shape)
    inside = np.flatnonzero(organ > 0.5)
    at = np.stack(np.unravel_index(rng.choice(inside, count), organ.shape), axis=1).astype(np.float64)
    heading = rng.standard_normal((count, 3))
    drawn = np.zeros(organ.shape, dtype=np.float32)
    for _ in range(2 * shape.max() // 3):
        heading += 0.25 * rng.standard_normal((count, 3))
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        at += 0.7 * heading * (shape / shape.max()) ** 0.5
        voxel = np.rint(at).astype(int)
        voxel = voxel[((voxel >= 0) & (voxel < shape)).all(axis=1)]
        drawn[tuple(voxel.T)] += 1
    return (1 - np.exp(-6 * blur(drawn * organ, 0.7))).astype(np.float32)


def along_vessels(rng: np.random.Generator, organ: np.ndarray, added: np.ndarray) -> np.ndarray:
    """The values of `added`, each once, but along thin tubes in the organ: the largest in the middle of the tubes.

    Tubes are drawn until they have room for all values above a tenth of the largest; the others are left out.
    """
    values = np.sort(added[added > 0.1 * added.max()])
    field = np.zeros_like(organ)
    for _ in range(20):  # a round makes room for about a quarter of the values
        field = np.maximum(field, tubes(rng, organ, count=1 + round(values.size / (4 * max(organ.shape)))))
        if np.count_nonzero(field > 0.3) >= values.size:
            break
    moved = np.zeros_like(added)
    moved.flat[np.argsort(field, axis=None)[-values.size :]] = values
    return moved
