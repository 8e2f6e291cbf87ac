"""Which samples a problem trains on, is scored on and is tested on, and how samples are cut into batches.

The score set is held out of the training split, class by class in proportion, so that no worker is scored on samples
that it has seen. One fixed seed draws it, on every machine and in every run of a data set.

Used by the problems, and wherever a problem is trained or measured in batches; numpy only.
"""

import numpy as np

from labkit.errors import ProblemError

SEED = 20190417


SPREAD = 8  # units that the score set is drawn from, at least


def hold_out(labels: np.ndarray | None, n: int, n_score: int, units: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Cut 0..n-1 into (train, score): train in one fixed random order, score ascending; int64.

    The score set has `n_score` samples but at most a fifth of all, and at least one. Of samples that are read in `units` (their
    offsets) the order is one of units, and the score set is drawn from a few of them. Raises ProblemError for n < 2.
    """
    if n < 2:
        raise ProblemError(f"The data have {n} training sample(s). Give at least 2: one is held out as the score set.")
    order = shuffled(n, units)
    n_score = max(1, min(n_score, n // 5))
    if units is not None:
        lengths = np.diff(units)[_permutation(len(units) - 1)]
        few = order[: max(int(lengths[:SPREAD].sum()), min(n, 4 * n_score))]
        few = few[_permutation(len(few))]
        drawn = few[:n_score] if labels is None else few[_stratified(labels[few], n_score)]
        held = np.isin(order, drawn)
    else:
        held = np.arange(n) < n_score if labels is None else _stratified(labels[order], n_score)
    return order[~held], np.sort(order[held])


def fold(labels: np.ndarray | None, unit: np.ndarray, k: int, n_folds: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cut 0..n-1 into (all but fold k, fold k) of `n_folds` equal ones; int64, ascending.

    `unit` (n,) is what samples that stay together have in common. Where each stands alone, a fold has as equal a share of each class.
    All folds together hold each sample once; their units, and the samples of a class in them, differ by one at most.
    """
    distinct, number = np.unique(unit, return_inverse=True)
    order = np.random.default_rng([SEED, seed]).permutation(len(distinct))
    if labels is not None and len(distinct) == len(unit):
        order = order[np.argsort(labels[np.argsort(number)][order], kind="stable")]  # dealt out class after class
    held = np.isin(number, order[k::n_folds])
    return np.flatnonzero(~held), np.flatnonzero(held)


def folds(labels: np.ndarray, n_folds: int) -> np.ndarray:
    """The fold 0..n_folds-1 of each sample, int64 (n,): each class is dealt out one by one, so all folds have all classes."""
    return _rank(labels)[0] % n_folds


def shuffled(n: int, units: np.ndarray | None = None) -> np.ndarray:
    """0..n-1 in one fixed random order, int64; with `units` (their offsets) these are in a random order, and stay whole."""
    if units is None:
        return _permutation(n)
    return np.concatenate([np.empty(0, np.int64), *(np.arange(units[at], units[at + 1]) for at in _permutation(len(units) - 1))])


def _permutation(n: int) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(n)


def first(option: str, wanted: int | None, order: np.ndarray, but: str = "") -> np.ndarray:
    """The first `wanted` of `order`, all for None; ProblemError, naming the option, if there are fewer."""
    if wanted is not None and wanted > order.size:
        raise ProblemError(f"{option}={wanted}, but the data have {order.size}{but}. Use {option}=None for all of them.")
    return order[:wanted].copy()


def batches(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut into batches of `batch_size`; the rest is a smaller last one, except a single sample, which joins its neighbour
    (BatchNorm cannot train on one sample). Nothing makes no batch."""
    if not len(indices):
        return []
    cuts = list(range(batch_size, len(indices), batch_size))
    if cuts and batch_size > 1 and len(indices) - cuts[-1] == 1:
        cuts.pop()
    return np.split(indices, cuts)


def _stratified(labels: np.ndarray, size: int) -> np.ndarray:
    """Mask of `size` samples: the first ones of each class, in proportion by largest remainders."""
    rank, number, counts = _rank(labels)
    quota, remainder = np.divmod(counts * size, labels.size)
    quota[np.argsort(-remainder, kind="stable")[: size - quota.sum()]] += 1
    return rank < quota[number]


def _rank(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many samples of its class stand before each, (n,); the number of its class, (n,); the size of each class."""
    _, number, counts = np.unique(labels, return_inverse=True, return_counts=True)
    grouped = np.argsort(number, kind="stable")
    rank = np.empty_like(grouped)
    rank[grouped] = np.arange(labels.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank, number, counts
