"""What clusters of jets are worth: against the classes that they were not made from, beside simple methods, and beside a ceiling.

    accuracy   of the best assignment of clusters to classes over all test jets at once (Hungarian), at the version `chosen` without labels;
               the best version by the labels, "oracle", is a column of its own
    ari, nmi   adjusted Rand index, normalised mutual information: no assignment needed
    knn, linear   accuracy of 20 neighbours, and of a logistic regression, on the embedding: trained with labels, on training jets

Of baselines the mass alone comes first: UCluster learns little else. K-means on it splits the tops, whose masses are spread most, rather than W from
Z; by its rank, in which jets lie evenly, k-means comes close to the best cuts on the mass. No such rows were found published, nor an accuracy of W, Z and
t without labels later than UCluster's 0.81, which is of other jets.

Used by users, as `labkit.jets.table`, `confusion`, `baselines`, `embedded` and `silhouette`, by `labkit.jets.figures` and by notebooks 12 and 13.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from labkit.errors import DataError, ProblemError, known, like
from labkit.jets.clustering import accuracy, assignment, contingency, k_means, nearest
from labkit.jets.files import OF_JET, SUBSTRUCTURE, Jets
from labkit.jets.problem import UCluster, first
from labkit.plots.style import some_runs
from labkit.training.run import load_run

NEIGHBOURS = 20  # of the kNN probe
PROBED = 20_000  # training jets of the probes
SILHOUETTE = 2_000  # training jets of a silhouette: it compares each with each
STEPS, CLOSE = 200, 1e-6  # of the mixture of Poisson distributions
PROBES = ("knn", "linear")
UNSUPERVISED = (
    "mass: k-means",
    "mass by rank: k-means",
    "mass: Gaussian mixture",
    "ten numbers: k-means",
    "multiplicity: Poisson mixture",
)
CEILINGS = ("mass: best cuts", "ten numbers: boosted trees")


def agreement(clusters: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Accuracy of the best assignment, ARI and NMI of clusters (n,) and classes (n,)."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    ari, nmi = adjusted_rand_score(label, clusters), normalized_mutual_info_score(label, clusters)
    return {"accuracy": accuracy(clusters, label), "ari": float(ari), "nmi": float(nmi)}


def confusion(clusters: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Shares (C, K) of the jets of each class in each cluster, clusters in the order of the classes that they are assigned to.

    Examples
    --------
    >>> labkit.jets.confusion(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 1]))
    array([[1.        , 0.        ],
           [0.33333333, 0.66666667]])
    """
    table = contingency(clusters, label)
    classes = assignment(table)
    order = np.argsort(np.where(classes < 0, table.shape[1], classes), kind="stable")
    return (table[order] / np.maximum(1, table.sum(0))).T


def chosen(run: Any) -> int:
    """The version of a run of UCluster that is chosen without labels: after k-means, the one with the smallest "spread", the mean squared
    distance to the nearest centre over that to the mean of all.

    Examples
    --------
    >>> labkit.jets.chosen(clustered) > 0
    True
    """
    curve = like("run", run, ("curve", "config"), "a run of labkit.jets.UCluster").curve()
    if "spread" not in curve:
        raise ProblemError(f"run {run.config['name']!r} is none of labkit.jets.UCluster: its curve has no column 'spread'.")
    after = curve[curve["pretext"].notna() & (curve["spread"] != 1.0)]
    if after.empty:
        raise ProblemError(
            f"run {run.config['name']!r} has no version after k-means, which comes after pretrain={run.config['problem'].get('pretrain')} "
            "passes. Train longer, or pretrain for less."
        )
    return int(after.loc[after["spread"].idxmin(), "version"])


def table(runs: Any, *, probes: Sequence[str] = PROBES) -> pd.DataFrame:
    """A row for each run of UCluster, on its test split: accuracy, ari, nmi, and the `probes`, at the version `chosen` without labels, and
    "oracle", the best accuracy of any version. Mean and spread over seeds: `table(runs).accuracy.agg(["mean", "std"])`.

    Examples
    --------
    >>> labkit.jets.table(clustered, probes=[]).columns.tolist()
    ['run', 'seed', 'version', 'accuracy', 'ari', 'nmi', 'oracle']
    """
    probes = [known("probes", probe, PROBES) for probe in probes]
    rows = []
    for run in some_runs(runs, read=load_run):
        version = chosen(run)
        own = evaluate(run.problem(), network(run, version), probes)
        curve = run.curve()
        rows.append(
            {"run": run.config["name"], "seed": run.config["seed"], "version": version, **own, "oracle": curve["accuracy"].max()}
        )
    return pd.DataFrame(rows)


def network(run: Any, version: int | None = None) -> nn.Module:
    """The network of a version, by default of the last one, as the problem builds it.

    Examples
    --------
    >>> isinstance(labkit.jets.network(clustered), torch.nn.Module)
    True
    """
    module = run.problem().new_module(run.config["seed"])
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in run.weights(version).items()})
    return module


def evaluate(problem: UCluster, module: Any, probes: Sequence[str] = PROBES) -> dict[str, float]:
    """The numbers of one network on the test split of its problem."""
    train = problem.train_indices()[:PROBED]
    z, label, _, clusters = embedded(problem, module)
    found = agreement(clusters, label)
    if probes:
        of_train, wanted = problem.embeddings(module, train), _labels(problem, train, "train")
        found |= {probe: _probe(probe, of_train, wanted, z, label) for probe in probes}
    return found


def embedded(
    problem: UCluster, module: Any, split: str = "test", most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the jets of a split, or the first `most`: embeddings (n, d), labels (n,), and the clusters: centres (K, d), and of each jet (n,).

    Examples
    --------
    >>> z, label, centres, of = labkit.jets.embedded(clustered.problem(), labkit.jets.network(clustered))
    >>> z.shape, centres.shape
    ((64, 3), (3, 3))
    """
    indices = (problem.test_indices() if split == "test" else problem.train_indices())[:most]
    z, label = problem.embeddings(module, indices, split), _labels(problem, indices, split)
    centres = first(module).centres.detach().cpu().double().numpy()
    return z, label, centres, nearest(((z[:, None] - centres) ** 2).sum(-1))


def silhouette(run: Any) -> float:
    """How far apart the clusters of the last version of a run are, in [-1, 1], without labels and of any number of them: the silhouette
    (Rousseeuw 1987) of training jets; -1 where they are all in one. For a search: `labkit.search(..., objective=labkit.jets.silhouette)`.

    Examples
    --------
    >>> -1 <= labkit.jets.silhouette(clustered) <= 1
    True
    """
    from sklearn.metrics import silhouette_score

    z, _, _, clusters = embedded(run.problem(), network(run), "train", SILHOUETTE)
    n = len(np.unique(clusters))
    return float(silhouette_score(z, clusters)) if 1 < n < len(z) else -1.0


def _labels(problem: UCluster, indices: np.ndarray, split: str) -> np.ndarray:
    return problem.dataset.batch(indices, split, fields=["label"])["label"].astype(np.int64)


def _probe(name: str, z: np.ndarray, wanted: np.ndarray, of_test: np.ndarray, label: np.ndarray) -> float:
    """Accuracy on test jets of a simple classifier on embeddings."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = KNeighborsClassifier(min(NEIGHBOURS, len(z))) if name == "knn" else LogisticRegression(max_iter=1000)
    return float(make_pipeline(StandardScaler(), made).fit(z, wanted).score(of_test, label))


# -- what simple methods give ------------------------------------------------------------------------------------------


def baselines(
    train: Jets | UCluster, test: Jets | None = None, *, seed: int = 0, names: Sequence[str] | None = None
) -> pd.DataFrame:
    """A row for each simple method, fitted to `train` without labels and measured on `test`, and for two that see the labels.

        labkit.jets.baselines(problem)           on the jets that UCluster is trained on, and the test split that it is measured on
        labkit.jets.baselines(jets[:n], jets[n:])            jets = labkit.jets.load("jets/full")

    Columns: method, labels (does it see them?), accuracy, ari, nmi. The mixture of Poisson distributions of the multiplicity (Alvarez et
    al., arXiv:2112.11352) is for two classes, q and g; the ten numbers are those that `labkit.jets.generate` stores.

    Examples
    --------
    >>> labkit.jets.baselines(jets[::2], jets[1::2], names=["mass: k-means"])["method"].tolist()
    ['mass: k-means']
    """
    if isinstance(train, UCluster) and test is None:
        train, test = _of(train, "train"), _of(train, "test")
    if not isinstance(train, Jets) or not isinstance(test, Jets):
        raise TypeError("baselines are of labkit.jets.Jets, to train and to test, or of a problem labkit.jets.UCluster alone.")
    classes = len(np.unique(train.label))
    if classes < 2:
        raise DataError(f"all jets are {train.classes[train.label[0]]!r}: there is nothing to tell apart.")
    wanted = [known("names", name, UNSUPERVISED + CEILINGS) for name in names] if names else list(UNSUPERVISED + CEILINGS)
    if "substructure" not in train.of_jet:
        wanted = [name for name in wanted if not name.startswith("ten numbers")]
    if classes != 2:
        wanted = [name for name in wanted if "Poisson" not in name]
    rows = []
    for name in wanted:
        clusters = _METHODS[name](train, test, classes, seed)
        numbers = agreement(clusters, test.label)
        if name in CEILINGS:  # it says classes: no assignment is needed
            numbers["accuracy"] = float((clusters == test.label).mean())
        rows.append({"method": name, "labels": name in CEILINGS, **numbers})
    return pd.DataFrame(rows)


def _of(problem: UCluster, split: str) -> Jets:
    """What simple methods read of the jets of a problem: no constituents."""
    indices = problem.train_indices() if split == "train" else problem.test_indices()
    names = [name for name in (*OF_JET, "substructure") if name in problem.dataset.fields]
    of_jet = problem.dataset.batch(indices, split, fields=["label", *names])
    label = of_jet.pop("label").astype(np.int64)
    return Jets(np.zeros((len(label), 0, 4), np.float32), label, tuple(map(str, range(label.max(initial=0) + 1))), of_jet)


def _mass(jets: Jets) -> np.ndarray:
    return jets.of_jet["mass"].astype(np.float64)[:, None]


def _by_mass(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    centres = k_means(_mass(train), classes, seed)
    return np.abs(_mass(test) - centres.T).argmin(1)


def _by_rank(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    """Of the share of training jets that are lighter: clusters of about equal size."""
    masses = np.sort(_mass(train)[:, 0])
    ranks = [np.searchsorted(masses, _mass(jets)[:, 0])[:, None] / len(masses) for jets in (train, test)]
    return np.abs(ranks[1] - k_means(ranks[0], classes, seed).T).argmin(1)


def _by_mixture(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(classes, n_init=5, max_iter=1000, random_state=seed).fit(_mass(train)).predict(_mass(test))


def _ten(jets: Jets) -> np.ndarray:
    """The ten numbers, masses in their logarithms."""
    values = jets.of_jet["substructure"].astype(np.float64).copy()
    for name in ("mass", "trimmed"):
        at = SUBSTRUCTURE.index(name)
        values[:, at] = np.log1p(values[:, at])
    return values


def _by_ten(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    mean, deviation = _ten(train).mean(0), _ten(train).std(0) + 1e-9
    centres = k_means((_ten(train) - mean) / deviation, classes, seed)
    return ((((_ten(test) - mean) / deviation)[:, None] - centres) ** 2).sum(-1).argmin(1)


def poisson_mixture(n: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares (C,) and means (C,), ascending, of a mixture of Poisson distributions of counts (m,), by expectation and maximisation."""
    n = np.asarray(n, np.float64)
    share, mean = np.full(classes, 1 / classes), np.quantile(n, (np.arange(classes) + 0.5) / classes)
    for _ in range(STEPS):
        log = np.log(share) + n[:, None] * np.log(mean) - mean
        weight = np.exp(log - log.max(1, keepdims=True))
        weight /= weight.sum(1, keepdims=True)
        before, share = mean, weight.mean(0)
        mean = (weight * n[:, None]).sum(0) / np.maximum(weight.sum(0), 1e-9)
        if np.abs(mean - before).max() < CLOSE * before.max():
            break
    order = np.argsort(mean)
    return share[order], mean[order]


def _by_counts(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    share, mean = poisson_mixture(train.of_jet["n"], classes)
    n = test.of_jet["n"].astype(np.float64)[:, None]
    return (np.log(share) + n * np.log(mean) - mean).argmax(1)


def _by_cuts(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_leaf_nodes=16, min_samples_leaf=max(1, len(train) // 100), random_state=seed)
    return tree.fit(_mass(train), train.label).predict(_mass(test))


def _by_trees(train: Jets, test: Jets, classes: int, seed: int) -> np.ndarray:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(random_state=seed).fit(_ten(train), train.label).predict(_ten(test))


_METHODS = dict(
    zip(UNSUPERVISED + CEILINGS, (_by_mass, _by_rank, _by_mixture, _by_ten, _by_counts, _by_cuts, _by_trees), strict=True)
)
