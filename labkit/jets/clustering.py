"""Clusters: k-means, and how well clusters agree with classes that they were not made from.

Used by `labkit.jets.problem` and `labkit.jets.evaluation`.
"""

import numpy as np

RESTARTS = 20


def k_means(z: np.ndarray, clusters: int, seed: int = 0) -> np.ndarray:
    """The centres (K, d), float64, ascending in their first number, of k-means++ with 20 restarts on (n, d).

    On one thread: the same bits on whichever worker, and in a replay.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    z = np.ascontiguousarray(z, np.float64)
    distinct = len(np.unique(z, axis=0))
    with threadpool_limits(1):
        fitted = KMeans(min(clusters, distinct), n_init=RESTARTS, random_state=seed).fit(z).cluster_centers_
    # a collapsed embedding has fewer points than clusters: the rest are copies
    centres = fitted[np.arange(clusters) % len(fitted)]
    return centres[np.lexsort(centres.T[::-1])]


def nearest(distances: np.ndarray) -> np.ndarray:
    """The cluster of each row of distances (n, K), int64."""
    return np.asarray(distances).argmin(1).astype(np.int64)


def contingency(clusters: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Counts (K, C) of samples by cluster and class."""
    clusters, label = np.asarray(clusters, np.int64), np.asarray(label, np.int64)
    table = np.zeros((clusters.max() + 1, label.max() + 1), np.int64)
    np.add.at(table, (clusters, label), 1)
    return table


def assignment(table: np.ndarray) -> np.ndarray:
    """The class of each cluster by which most samples are right, one cluster a class (Hungarian algorithm); -1 for clusters beyond."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-table)
    found = np.full(len(table), -1)
    found[rows] = columns
    return found


def accuracy(clusters: np.ndarray, label: np.ndarray) -> float:
    """The share of samples in the cluster of their class, by the best assignment over all of them at once."""
    table = contingency(clusters, label)
    found = assignment(table)
    return float(sum(table[row, column] for row, column in enumerate(found) if column >= 0) / table.sum())
