"""The 3D problem "lesion or none": volumes with and without lesions in them, made here, the same for the same seed.

No public set of chest CTs is small and free enough to come with a package. The very values that lesions add in HU are added to
a patient without lesions too, along thin vessels, so that counts of bright voxels are of little use (a logistic regression on the
histogram of 500 chests is right for 53 %), and shapes must be seen. Neither set is evidence for anything in medicine.

Used by `labkit.data.open_dataset`; the anatomy is in `head` and `phantom`.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np

from labkit.data.cache import Source, cached, file_key, one_by_one
from labkit.data.dataset import Dataset
from labkit.data.folders import checked_size
from labkit.data.synthetic import head, phantom
from labkit.data.synthetic.fields import Patient, along_vessels, blur, lesion
from labkit.errors import SEEDS, whole

LEAST_SIDE = 16  # below it a lesion is a voxel
LESIONS = (3, 7)  # from, to before: several, so that more than one part of a volume sees one
EVERY = 5  # one patient in so many is in the test split


def chest_phantom(n: int = 400, size: tuple[int, int, int] = (32, 64, 64), seed: int = 0, note: str = "") -> Dataset:
    """n drawn chests, a fifth of them to test, half of them with 3 to 6 lesions in the lungs (class 1): (1, D, H, W),
    float16, HU clipped to [-1000, 400] and scaled to [0, 1]. Synthetic, as in its note.

    Patient i is the same for every n. Raises ValueError for fewer than 20 or for sides under 16.
    """
    n, size, seed = _checked(n, size, seed)
    about = (
        "chest-phantom is synthetic: chests drawn from formulas, each of another shape, with vessels and noise; lesions of "
        "random place, size and contrast in half of them."
    )

    def make(i: int, label: int) -> np.ndarray:
        rng = np.random.default_rng([seed, i])
        return _finished(rng, phantom.chest(rng, size), label, radius=(0.14, 0.24), contrast=(300, 600), noise=(15, 40))

    return cached("chest-phantom", _key(n, size, seed, ""), lambda: _splits(n, size, make, about), synthetic=True, note=note)


def head_lesions(n: int = 400, size: tuple[int, int, int] = (32, 64, 64), seed: int = 0) -> Dataset:
    """n deformed copies of a real head CT, a fifth of them to test, half of them with 3 to 6 lesions in the brain (class
    1): (1, D, H, W), float16, HU clipped to [0, 100] and scaled to [0, 1]. Semi-synthetic, as in its note; where the
    CT cannot be had, the chest phantom, with a note saying why.

    The CT is an example of InVesalius in Debian's package `invesalius-examples`, found and fetched as Fashion-MNIST is.
    Patient i is the same for every n. Raises ValueError for fewer than 20 or for sides under 16.
    """
    n, size, seed = _checked(n, size, seed)
    path, reasons = head.find_ct()
    if path is None:
        note = (
            f"The head CT could not be had ({'; '.join(reasons)}); the synthetic chest phantom is used instead. Set "
            f"LABKIT_DATA to a folder with {head.FILE} to use it."
        )
        return chest_phantom(n, size, seed, note=note)
    about = (
        "head-lesions is semi-synthetic: randomly deformed copies of one real head CT; generated lesions of random place, "
        "size and contrast in half of them. Train and test split show the same head."
    )

    def load() -> tuple[Source, Source]:
        skull = head.read_ct(path, size)

        def make(i: int, label: int) -> np.ndarray:
            rng = np.random.default_rng([seed, i])
            return _finished(rng, head.deformed(rng, skull, size), label, radius=(0.14, 0.24), contrast=(30, 60), noise=(4, 10))

        return _splits(n, size, make, about)

    return cached("head-lesions", _key(n, size, seed, file_key([path])), load, synthetic=True)


def _checked(n: int, size: tuple[int, int, int], seed: int) -> tuple[int, tuple[int, int, int], int]:
    if (n := whole("n", n, -math.inf, error=ValueError)) < 20:
        raise ValueError(f"n={n} volumes are too few. Give a whole number, 20 at least.")
    size = checked_size(size, "(depth, height, width)", (32, 64, 64))
    if min(size) < LEAST_SIDE:
        raise ValueError(f"size={size} is too small for lesions to have a shape. Give {LEAST_SIDE} at least on each side.")
    return n, size, whole("seed", seed, 0, SEEDS, error=ValueError)


def _key(n: int, size: tuple[int, ...], seed: int, of: str) -> str:
    return hashlib.sha256(f"2 {n} {size} {seed} {of}".encode()).hexdigest()  # 2: count up when what is made changes


def _splits(n: int, size: tuple[int, int, int], make: Callable[[int, int], np.ndarray], about: str) -> tuple[Source, Source]:
    """Patients 0..n-1 in the two splits, the classes balanced to one patient in each."""

    def label(i: int) -> int:
        return (i % EVERY + i // EVERY) % 2

    def source(of_test: bool) -> Source:
        patients = [i for i in range(n) if (i % EVERY == EVERY - 1) == of_test]
        labels = [label(i) for i in patients]
        return one_by_one(lambda i: make(i, label(i))[None], patients, (1, *size), np.float16, labels, about)

    return source(False), source(True)


def _finished(
    rng: np.random.Generator,
    patient: Patient,
    label: int,
    radius: tuple[float, float],
    contrast: tuple[float, float],
    noise: tuple[float, float],
) -> np.ndarray:
    """The patient with lesions (label 1) or with the same values along vessels (label 0), with noise, scaled to [0, 1]."""
    hu, organ, window = patient
    lesions = np.maximum.reduce([lesion(rng, organ, radius, contrast) for _ in range(rng.integers(*LESIONS))])
    more = lesion(rng, organ, radius, contrast)  # vessels in everybody: their presence is no sign of a class
    added = lesions + along_vessels(rng, organ, more) if label else along_vessels(rng, organ, lesions + more)
    grain = blur(rng.standard_normal(hu.shape, dtype=np.float32), rng.uniform(0.4, 0.8))
    hu = blur(hu, rng.uniform(0.3, 0.6)) + added + grain * (rng.uniform(*noise) / grain.std())
    low, high = window
    return np.clip((hu - low) / (high - low), 0, 1).astype(np.float16)
