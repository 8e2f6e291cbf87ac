"""One real head CT, and randomly deformed copies of it.

The CT is an example that InVesalius ships (Debian's `invesalius-examples`): 108 slices of 256x256 in HU, voxels of 1.5 x
0.957 x 0.957 mm, in a tar file under the name `Cranium.inv3`. Only the part with the brain is used. Copies are
turned, stretched, mirrored and bent smoothly, the brain with them.

Used by `labkit.data.synthetic.volumes`.
"""

import math
import tarfile
from pathlib import Path

import numpy as np

from labkit.data.fetch import Origin, find, published
from labkit.data.synthetic.fields import Patient, axes, resized, smooth, turn

CT = Origin("The head CT", 19, debian="invesalius-examples", unpacked=Path("usr/share/doc/invesalius-examples/examples"))
FILE = "Cranium.inv3"
MEMBER, SHAPE = "matrix.dat", (108, 256, 256)
SHA256 = "d87fd5e6aaf2c4fdf4f3fe28ee3335192fc2464ed8e9682fc78530cb837938da"  # of that member
BRAIN = (slice(16, 104), slice(8, 212), slice(38, 230))  # the part that is used
WINDOW = (0.0, 100.0)  # HU; brain is at 20 to 40, lesions up to 100


def find_ct() -> tuple[Path | None, list[str]]:
    """The file with the CT, or None and the reasons why it cannot be had. As `labkit.data.fetch.find`."""
    folder, reasons = find("head-ct", CT, [FILE], lambda folder: _voxels(folder / FILE))
    return None if folder is None else folder / FILE, reasons


def _voxels(path: Path) -> bytes:
    def read(path: Path) -> bytes:
        with tarfile.open(path) as file:  # nothing is unpacked to the disk
            members = (member for member in file if member.isreg() and Path(member.name).name == MEMBER)
            member = next(members, None)
            return file.extractfile(member).read(2 * math.prod(SHAPE) + 1) if member else b""

    return published(path, read, SHA256, f"Debian's package {CT.debian}")


def read_ct(path: Path, size: tuple[int, int, int]) -> Patient:
    """The part with the brain, a little finer than `size`; rows from front to back, the brain as the organ."""
    hu = np.frombuffer(_voxels(path), dtype="<i2").reshape(SHAPE)
    brain = _brain(hu)
    shape = tuple(5 * n // 4 for n in size)
    hu, brain = (resized(whole[BRAIN], shape)[:, ::-1] for whole in (hu, brain))
    return Patient(hu, brain, WINDOW)


def _brain(hu: np.ndarray) -> np.ndarray:
    """The voxels of the brain: the largest component of soft tissue that is left when thin bridges are eroded."""
    from scipy.ndimage import binary_dilation, binary_erosion, label  # slow to import

    components, _ = label(binary_erosion((hu > -5) & (hu < 90), iterations=3))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    return binary_dilation(components == sizes.argmax(), iterations=3)


def deformed(rng: np.random.Generator, head: Patient, shape: tuple[int, int, int]) -> Patient:
    """A copy of the head: mirrored or not, turned (6 degrees), stretched (8 %), shifted, bent, its HU a little off."""
    from scipy.ndimage import map_coordinates  # slow to import

    stretch = np.diag(1 + 0.08 * rng.uniform(-1, 1, 3))
    stretch[2, 2] *= rng.choice([-1, 1])
    matrix = turn(rng, 6.0) @ stretch
    here = axes(shape)
    there = []
    for row, side in zip(matrix, head.hu.shape, strict=True):
        position = sum(m * line for m, line in zip(row, here, strict=True)) + 0.06 * rng.uniform(-1, 1)
        there.append((position + 0.03 * smooth(rng, shape, 3) + 1) * (side / 2) - 0.5)
    hu, brain = (map_coordinates(field, there, order=1, mode="nearest") for field in (head.hu, head.organ))
    hu = hu * rng.uniform(0.95, 1.05) + brain * (6 * rng.uniform(-1, 1) + 3 * smooth(rng, shape, 4))
    return Patient(hu, np.clip(brain, 0, 1), head.window)
