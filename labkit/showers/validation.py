"""Do generated showers measure like simulated ones? The protocol of CaloChallenge (arXiv:2410.21611), and what 3DGAN looked at.

    separation   1/2 sum (h - g)^2 / (h + g) over bins of two normalised histograms: 0 the same, 1 apart         each feature, each layer
    FPD, KPD     Frechet distance of Gaussians, extrapolated to infinitely many showers, and MMD^2 with the polynomial kernel
                 (x.y / d + 1)^4, unbiased (Kansal et al., arXiv:2211.10295), on high-level features; x 1000, as published
    correlation  mean difference of the correlation coefficients of the layers' energies, each relative to that of the shower, over pairs of layers
    P, R, D, C   precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) by the k = 5 nearest neighbours
    AUC, JSD     of a classifier on voxels ("low"), voxels and layers apart ("normalised"), layers' sums and shapes ("high"): 0.5 and 0 cannot
                 tell them apart; trained, chosen and calibrated on parts of its own, and judged on another

Each number stands beside its floor, which is that of simulated showers against others of them, with the spread of bootstrap samples and the number
of showers: numbers of other sizes or detectors are no comparison.

Used by users through `labkit.showers.validate`; `labkit.showers.figures` draws what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from labkit.data import Dataset, open_dataset
from labkit.errors import DataError, ProblemError, known, several, whole
from labkit.models import seeded
from labkit.showers.features import by_layer, observables
from labkit.showers.generation import generate, model_of
from labkit.training.run import Run

if TYPE_CHECKING:
    import pandas as pd

BINS = 30
NEIGHBOURS = 5
MOST = 10_000  # showers of each sample whose distances from each other are counted: 0.8 GB a matrix
DEGREE = 4  # of the kernel of KPD
INPUTS = ("low", "normalised", "high")
SEPARATED = ("total", "fraction", "depth", "length", "x", "y", "width", "hits", "core")
PUBLISHED = {
    "fpd": "FPD x 1000", "kpd": "KPD x 1000", "auc_low": "AUC low", "auc_high": "AUC high", "separation_layer": "separation layer, mean",
    "separation_total": "separation total",
}  # columns of what is published  # fmt: skip
OFFICIAL = Path(__file__).with_name("calochallenge.csv")


# -- two samples of numbers -------------------------------------------------------------------------------------------


def separation(real: np.ndarray, made: np.ndarray, bins: int = BINS) -> float:
    """The separation power of two samples of one number, (n,) and (m,), 0 to 1: bins of equal width over the middle 99 % of the real one, and
    one on each side for the rest."""
    real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
    low, high = np.quantile(real, [0.005, 0.995])
    edges = np.concatenate([[-np.inf], np.linspace(low, high, bins + 1) if high > low else [low], [np.inf]])
    h, g = (np.histogram(np.nan_to_num(one, nan=np.inf), edges)[0] / len(one) for one in (real, made))
    return float(0.5 * ((h - g) ** 2 / np.where(h + g > 0, h + g, 1)).sum())


def frechet(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians."""
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other) - 2 * cross)


def fpd(real: np.ndarray, made: np.ndarray, seed: int = 0, batches: int = 20, points: int = 10) -> tuple[float, float]:
    """Frechet physics distance of features (n, d), and its error: the distance of samples of n / 4 to n showers, as a line in 1 / n, at 0.

    Features are divided by the largest of the real ones.
    """
    real, made = _scaled(real, made)
    rng, most = np.random.default_rng(seed), min(len(real), len(made))
    sizes = (1 / np.linspace(4 / most, 1 / most, points)).astype(int)

    def moments(sample: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = sample[rng.integers(len(sample), size=n)]
        return drawn.mean(0), np.cov(drawn, rowvar=False)

    seen = [np.mean([frechet(*moments(real, n), *moments(made, n)) for _ in range(batches)]) for n in sizes]
    (_, start), covariance = np.polyfit(1 / sizes, seen, 1, cov=True)
    return float(max(start, 0.0)), float(np.sqrt(covariance[1, 1]))


def kpd(real: np.ndarray, made: np.ndarray, seed: int = 0, batches: int = 10, size: int = 5000) -> tuple[float, float]:
    """Kernel physics distance of features (n, d), the median over samples of 80 % of them, `size` at most, and half its inner 68 %."""
    real, made = _scaled(real, made)
    rng, n = np.random.default_rng(seed), min(size, int(0.8 * min(len(real), len(made))))
    values = [mmd(*(one[rng.permutation(len(one))[:n]] for one in (real, made))) for _ in range(batches)]
    low, high = np.quantile(values, [0.16, 0.84])
    return float(np.median(values)), float(high - low) / 2


def mmd(real: np.ndarray, made: np.ndarray, degree: int = DEGREE) -> float:
    """The unbiased squared maximum mean discrepancy of two samples (n, d), (m, d) under (x.y / d + 1)^degree."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** degree

    n, m = len(real), len(made)
    own, other = kernel(real, real), kernel(made, made)
    within = (own.sum() - np.trace(own)) / (n * (n - 1)) + (other.sum() - np.trace(other)) / (m * (m - 1))
    return float(within - 2 * kernel(real, made).mean())


def prdc(real: np.ndarray, made: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage of features (n, d), (m, d), standardised by the real ones; of the first 10,000 of each."""
    return {name: float(each.mean()) for name, each in _neighbours(real, made, k).items()}


def _neighbours(real: np.ndarray, made: np.ndarray, k: int = NEIGHBOURS) -> dict[str, np.ndarray]:
    """What `prdc` are means of: a number for each shower."""
    from scipy.spatial.distance import cdist

    real, made = real[:MOST], made[:MOST]
    mean, spread = real.mean(0), np.maximum(real.std(0), 1e-9)
    real, made = (real - mean) / spread, (made - mean) / spread
    between = cdist(real, made)
    radius = np.partition(cdist(real, real), k, axis=1)[:, k]  # the 0th neighbour is itself
    of_made = np.partition(cdist(made, made), k, axis=1)[:, k]
    inside = between < radius[:, None]
    return {
        "precision": inside.any(0),
        "recall": (between < of_made[None]).any(1),
        "density": inside.sum(0) / k,
        "coverage": between.min(1) < radius,
    }


# -- the classifier ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierTest:
    """How the classifier that tells showers apart is trained: three hidden layers of `width`, as CaloChallenge's (its num_layer=2 adds two)."""

    width: int = 256
    lr: float = 1e-3
    batch_size: int = 100
    epochs: int = 15


CLASSIFIERS = {"small": ClassifierTest(), "calochallenge": ClassifierTest(2048, 2e-4, 1000, 50)}


def inputs_of(cells: np.ndarray, energies: np.ndarray, kind: str = "low", visible: float = 1.0) -> np.ndarray:
    """What a classifier sees of showers (n, X, Y, Z) in MeV of energies (n,) in GeV: (n, d) float32, as in CaloChallenge.

    "low": log10 E, and 100 x cell / E, of showers calibrated to E: `visible` is the share of E that cells hold on average. "normalised": log10 E,
    cell / layer, log10 of the layers. "high": log10 E, log10 of the layers, and of each layer centre and width in x and y, in cells (there in
    100 mm). E and the layers are in MeV.
    """
    known("kind", kind, INPUTS)
    cells, mev = np.asarray(cells, np.float32), 1e3 * np.asarray(energies, np.float32)[:, None]
    seen, flat = by_layer(cells), cells.reshape(len(cells), -1)
    layers = np.log10(seen["layer"] + 1e-8)
    if kind == "low":
        return np.column_stack([np.log10(mev), np.float32(100 / visible) * flat / mev])
    if kind == "normalised":
        return np.column_stack([np.log10(mev), (cells / (seen["layer"][:, None, None] + 1e-16)).reshape(len(cells), -1), layers])
    return np.column_stack([np.log10(mev), layers, *(values for name, values in seen.items() if name != "layer")]).astype(
        np.float32
    )


def auc(real: np.ndarray, made: np.ndarray, how: str | ClassifierTest = "small", seed: int = 0) -> dict[str, float]:
    """How well a classifier tells inputs (n, d) from (m, d): "auc" on showers that it has not seen, calibrated, and its "jsd" (0 to 1; 0 also
    where its outputs say less than none).

    60 % train it, with 20 % the best epoch is chosen and outputs are calibrated (isotonic), 20 % judge it. Inputs are taken as they are: of numbers
    about 1, and not standardised, by which a cell that is hit in one shower of a thousand would count most. ProblemError for fewer than 50
    showers of either kind.
    """
    from sklearn.isotonic import IsotonicRegression
    from sklearn.metrics import roc_auc_score

    how = CLASSIFIERS[known("how", how, CLASSIFIERS)] if isinstance(how, str) else how
    n = min(len(real), len(made))
    if n < 50:
        raise ProblemError(f"a classifier test needs 50 showers of each kind at least; there are {len(real)} and {len(made)}.")
    rng = np.random.default_rng(seed)
    x = np.concatenate([one[rng.permutation(len(one))[:n]] for one in (real, made)]).astype(np.float32)
    y = np.repeat(np.float32([0, 1]), n)
    part = np.tile(np.digitize(np.arange(n) / n, [0.6, 0.8]), 2)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    train, choose, judge = (torch.from_numpy(np.flatnonzero(part == p)) for p in range(3))
    with seeded(seed):
        net = _classifier(x.shape[1], how.width)
        optimiser = torch.optim.Adam(net.parameters(), lr=how.lr)
        best, state = -1.0, None
        for _ in range(how.epochs):
            net.train()
            for batch in torch.split(train[torch.randperm(len(train))], how.batch_size):
                optimiser.zero_grad()
                nn.functional.binary_cross_entropy_with_logits(net(x[batch])[:, 0], y[batch]).backward()
                optimiser.step()
            net.eval()
            with torch.no_grad():
                right = float(((net(x[choose])[:, 0] > 0) == (y[choose] > 0.5)).float().mean())
            if right > best:
                best, state = right, {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(state)
        with torch.no_grad():
            chosen, judged = (net(x[some])[:, 0].sigmoid().numpy() for some in (choose, judge))
    calibrated = IsotonicRegression(out_of_bounds="clip", y_min=1e-6, y_max=1 - 1e-6).fit(chosen, y[choose].numpy()).predict(judged)
    truth = y[judge].numpy()
    entropy = -np.mean(truth * np.log(calibrated) + (1 - truth) * np.log(1 - calibrated))
    return {"auc": float(roc_auc_score(truth, judged)), "jsd": max(0.0, float(1 - entropy / np.log(2)))}


def _classifier(n_inputs: int, width: int) -> nn.Sequential:
    act = nn.LeakyReLU(0.01)
    inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), act)]
    return nn.Sequential(nn.Linear(n_inputs, width), act, *inner, nn.Linear(width, 1))


# -- 3DGAN's own ------------------------------------------------------------------------------------------------------


def objective(real: np.ndarray, made: np.ndarray, energies: np.ndarray, made_energies: np.ndarray, bins: int = 4) -> float:
    """The scalar of 3DGAN: over bins of the energy the mean of moment error + profile error; 0 is best.

    Moment error: of the mean position and of the variance along each axis, each relative to the real one. Profile error: of the mean energy
    in each slice of each axis, relative to the real one and weighted by it, so the sum of |real - made| over that of the real ones.

    It departs from 3DGAN's script in two points. There the slices are not weighted, and one that is empty in the real showers, as those at the
    edge are at few GeV, makes the whole infinite. And there the moment error is added twice, by a block that stands there twice.

    Examples
    --------
    >>> showers, energies = np.random.rand(40, 25, 25, 25), np.linspace(10, 100, 40)
    >>> float(labkit.showers.objective(showers, showers, energies, energies))
    0.0
    """
    return _objective(_along_axes(real), _along_axes(made), energies, made_energies, bins)


def negative_objective(run: Any) -> float:
    """-`objective` of a run on its score set, for `labkit.search(..., objective=negative_objective)`: more is better there.

    Examples
    --------
    >>> labkit.showers.negative_objective(gan) < 0
    True
    """
    problem, module = model_of(run)
    indices = problem.score_indices()
    x, y = problem.load(indices)
    energies, theta = (None if one is None else one.numpy() for one in problem.conditions(y))
    return -objective(x[:, 0].float().numpy(), generate((problem, module), energies, theta=theta), energies, energies)


def _along_axes(cells: np.ndarray) -> list[np.ndarray]:
    """The energy in each slice of each axis: three arrays (n, side)."""
    cells = np.asarray(cells, np.float32)
    layers = cells.sum(1), cells.sum(2)  # without x, without y
    return [layers[1].sum(2), layers[0].sum(2), layers[0].sum(1)]


def _objective(real: list, made: list, energies: np.ndarray, made_energies: np.ndarray, bins: int = 4) -> float:
    edges = np.quantile(energies, np.linspace(0, 1, bins + 1))
    number, of_made = (np.clip(np.searchsorted(edges, one, "right") - 1, 0, bins - 1) for one in (energies, made_energies))
    errors = []
    for b in range(bins):
        if not (number == b).any() or not (of_made == b).any():
            continue
        for one, other in zip(real, made, strict=True):
            (moments, along), (of_other, other_along) = _moments(one[number == b]), _moments(other[of_made == b])
            errors.append((abs(moments - of_other) / np.maximum(abs(moments), 1e-9)).mean() + _off(along, other_along))
    return float(np.mean(errors))


def _moments(along: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of energies in the slices of an axis (n, side): the means over showers of (position, variance), and the mean profile."""
    at, total = np.arange(along.shape[1]), np.maximum(along.sum(1), 1e-9)
    mean = along @ at / total
    return np.array([mean.mean(), (along @ at**2 / total - mean**2).mean()]), along.mean(0)


def _off(real: np.ndarray, made: np.ndarray) -> float:
    return float(np.abs(real - made).sum() / max(real.sum(), 1e-9))


# -- all of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """What `validate` found. `table` has a row for each number; `real`, `other` and `made` the observables of the three samples.

    Columns of the table: metric, value, spread (of bootstrap samples or batches; of precision to coverage the error of a mean), floor, n (showers
    of each sample). `data`: of what they are compared with.
    """

    title: str
    table: pd.DataFrame
    real: dict[str, np.ndarray]
    other: dict[str, np.ndarray]
    made: dict[str, np.ndarray]
    bins: pd.DataFrame
    data: str = ""

    def __getitem__(self, metric: str) -> float:
        return float(self.table.set_index("metric")["value"][known("metric", metric, list(self.table["metric"]))])

    def floor(self, metric: str) -> float:
        """Of simulated showers against others of them."""
        return float(self.table.set_index("metric")["floor"][known("metric", metric, list(self.table["metric"]))])


def validate(
    model: Any,
    data: Any = None,
    *,
    n: int | None = None,
    seed: int = 0,
    classifiers: Sequence[str] = INPUTS,
    how: str | ClassifierTest = "small",
    bootstrap: int = 20,
    version: int | str | None = None,
) -> Validation:
    """Compare generated showers with simulated ones.

    The test split is compared with as many other simulated showers, of the training split (the floor), and with showers generated for the
    energies of these: neither sample shares energies with the test split.

    Parameters
    ----------
    model
        A run of a problem that makes showers, or the pair (problem, module); or a function of (energies, seed) that returns showers.
    data
        What they are compared with: by default what the model was trained on; of a function it is needed.
    n
        Showers of each sample; by default all of the test split. Precision, recall, density and coverage are of 10,000 at most.
    classifiers
        Which classifier tests: of "low", "normalised", "high".
    how
        "small", or "calochallenge", the published one, which takes minutes; or a `ClassifierTest`.
    bootstrap
        Samples, drawn with replacement, from which the spread of separations, correlations and 3DGAN's objective comes.

    Raises
    ------
    ProblemError, ValueError
        The model makes no showers, a function returns others than it was asked for, or an argument makes no sense.

    Examples
    --------
    >>> found = labkit.showers.validate(gan, n=32, classifiers=[], bootstrap=2)
    >>> found.table.columns.tolist()
    ['metric', 'value', 'spread', 'floor', 'n']
    """
    import pandas as pd

    how = CLASSIFIERS[known("how", how, CLASSIFIERS)] if isinstance(how, str) else how
    classifiers = several("classifiers", classifiers, lambda name, one: known(name, one, INPUTS))
    bootstrap = whole("bootstrap", bootstrap, 2)
    make, data_set, title = _maker(model, data, seed, version)
    most = min(data_set.n_test, data_set.n_train)
    n = most if n is None else min(whole("n", n, 20), most)
    real, energies, _ = _loaded(data_set, n, "test")
    other, other_energies, theta = _loaded(data_set, n, "train")
    made = make(other_energies, theta)
    seen = [observables(*one) for one in ((real, energies), (other, other_energies), (made, other_energies))]
    rows = _separations(*seen, bootstrap, seed)
    high = [inputs_of(*one, "high") for one in ((real, energies), (other, other_energies), (made, other_energies))]
    for name, measure in (("FPD x 1000", fpd), ("KPD x 1000", kpd)):
        (value, spread), (floor, _) = (measure(high[0], one, seed) for one in (high[2], high[1]))
        rows.append((name, 1e3 * value, 1e3 * spread, 1e3 * floor))
    precisions, floor = _neighbours(high[0], high[2]), prdc(high[0], high[1])
    rows += [(name, each.mean(), each.std() / np.sqrt(len(each)), floor[name]) for name, each in precisions.items()]
    visible = float(real.sum(dtype=np.float64) / (1e3 * energies.sum(dtype=np.float64)))
    for kind in classifiers:
        x = [inputs_of(*one, kind, visible) for one in ((real, energies), (other, other_energies), (made, other_energies))]
        of_made, floor = ([auc(x[0], one, how, seed + s) for s in range(2)] for one in (x[2], x[1]))
        for name in ("auc", "jsd"):
            values, floors = ([one[name] for one in found] for found in (of_made, floor))
            rows.append((f"{name.upper()} {kind}", np.mean(values), np.ptp(values) / 2, np.mean(floors)))
    along, rng = [_along_axes(one) for one in (real, other, made)], np.random.default_rng(seed)

    def scalar(which: int, i: Any = slice(None), j: Any = slice(None)) -> float:
        return _objective([one[i] for one in along[0]], [one[j] for one in along[which]], energies[i], other_energies[j])

    about = np.std([scalar(2, rng.integers(n, size=n), rng.integers(n, size=n)) for _ in range(bootstrap)])
    rows.append(("3DGAN objective", scalar(2), about, scalar(1)))
    table = pd.DataFrame(rows, columns=["metric", "value", "spread", "floor"]).assign(n=n)
    table.loc[table["metric"].isin([*precisions]), "n"] = min(n, MOST)
    for sample, cells, e in zip(seen, (real, other, made), (energies, other_energies, other_energies), strict=True):
        sample |= {"energy": e, "across": cells.sum((2, 3)), "spectrum": _spectrum(cells)}
    about = f"{data_set.name}{' (synthetic, no simulation)' * data_set.synthetic}"
    return Validation(title, table, *seen, _by_energy(seen[0], seen[2]), about)


def official(found: Mapping[str, Validation] | None = None) -> pd.DataFrame:
    """The published results of CaloChallenge (arXiv:2410.21611, CaloChallenge/homepage), as orientation: another detector, other sample sizes.

    With `found`, validations by name, their numbers and the floor come first.

    Examples
    --------
    >>> "dataset" in labkit.showers.official()
    True
    """
    import pandas as pd

    published = pd.read_csv(OFFICIAL, comment="#")
    if not found:
        return published
    rows = []
    for name, one in found.items():
        table = one.table.set_index("metric")
        for model, column in ((name, "value"), *([("simulated against others", "floor")] if not rows else [])):
            row = {
                "dataset": f"{one.data}, {table['n'].max()} showers",
                "model": model,
                "kind": "here" if column == "value" else "floor",
            }
            rows.append(row | {key: table[column].get(metric) for key, metric in PUBLISHED.items()})
    return pd.concat([pd.DataFrame(rows), published], ignore_index=True)[list(published)]


def _maker(model: Any, data: Any, seed: int, version: Any) -> tuple[Callable[..., np.ndarray], Dataset, str]:
    """What makes showers of energies and angles, the data set, and a title."""
    if callable(model) and not isinstance(model, Run):
        if data is None:
            raise ProblemError("a function that makes showers was given; say with data= what they are to be compared with.")
        data_set, title = open_dataset(data), getattr(model, "__name__", "function")
        shape = tuple(data_set.shape[1:])
        return (lambda energies, theta: _checked(model(energies, seed), (len(energies), *shape), title)), data_set, title
    problem, module = model_of(model, version)
    data_set = problem.dataset if data is None else open_dataset(data)
    title = getattr(model, "label", None) or type(problem).__name__

    def make(energies: np.ndarray, theta: np.ndarray | None) -> np.ndarray:
        return generate((problem, module), energies, seed, theta=theta if problem.has_angle else None)

    return make, data_set, title


def _checked(showers: Any, shape: tuple[int, ...], title: str) -> np.ndarray:
    """What a function of the user's own returned, float32; ProblemError where these are no showers of this shape."""
    try:
        showers = np.asarray(showers, np.float32)
    except (TypeError, ValueError) as error:
        raise ProblemError(f"{title} returned a {type(showers).__name__}, and no array of showers: {error}.") from error
    if showers.shape != shape:
        raise ProblemError(f"{title} returned showers of shape {showers.shape}; asked for were {shape}, in MeV, depth last.")
    if not np.isfinite(showers).all() or showers.min() < 0:
        bad = np.flatnonzero(~(np.isfinite(showers) & (showers >= 0)).reshape(len(showers), -1).all(1))[0]
        raise ProblemError(f"{title}: shower {bad} has cells that are negative or no numbers.")
    return showers


def _loaded(data: Dataset, n: int, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    batch = data.batch(np.arange(n), split)
    return batch[data.inputs[0]][:, 0].astype(np.float32), batch["energy"], batch.get("theta")


def _separations(real: dict, other: dict, made: dict, bootstrap: int, seed: int) -> list[tuple[str, float, float, float]]:
    """A row for each feature, for the mean and the largest over layers, and for the correlations of these."""
    rng, rows = np.random.default_rng(seed), []

    def spread(measure: Callable[[np.ndarray, np.ndarray], float]) -> float:
        n, m = len(real["total"]), len(made["total"])
        return float(np.std([measure(rng.integers(n, size=n), rng.integers(m, size=m)) for _ in range(bootstrap)]))

    for name in SEPARATED:
        about = spread(lambda i, j, name=name: separation(real[name][i], made[name][j]))
        rows.append((f"separation {name}", separation(real[name], made[name]), about, separation(real[name], other[name])))
    of_layers = [
        [separation(real["layer"][:, z], one["layer"][:, z]) for z in range(real["layer"].shape[1])] for one in (made, other)
    ]
    for name, pick in (("mean", np.mean), ("largest", np.max)):
        about = spread(
            lambda i, j, pick=pick: pick([separation(*pair) for pair in zip(real["layer"][i].T, made["layer"][j].T, strict=True)])
        )
        rows.append((f"separation layer, {name}", float(pick(of_layers[0])), about, float(pick(of_layers[1]))))
    of_real, of_other, of_made = (one["layer"] / one["total"].clip(1e-9)[:, None] for one in (real, other, made))
    about = spread(lambda i, j: _correlations_apart(of_real[i], of_made[j]))
    rows.append(("correlation of layers", _correlations_apart(of_real, of_made), about, _correlations_apart(of_real, of_other)))
    return rows


def _correlations_apart(real: np.ndarray, made: np.ndarray) -> float:
    """The mean over pairs of columns of the difference of their correlation coefficients, of samples (n, d), (m, d)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        one, other = (np.nan_to_num(np.corrcoef(sample, rowvar=False)) for sample in (real, made))
    return float(np.abs(one - other)[np.triu_indices(len(one), 1)].mean())


def _spectrum(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges (MeV) and counts a shower and decade of the cells that are hit."""
    edges = np.logspace(-3, 3, 31)
    return edges, np.histogram(cells[cells > 0], edges)[0] / len(cells) * 5


def _by_energy(real: dict, made: dict, bins: int = 4) -> pd.DataFrame:
    """A row for each bin of the energy: fraction (MeV per GeV), its ratio, resolution and the layer of the shower maximum, of both."""
    import pandas as pd

    edges = np.linspace(min(real["energy"].min(), made["energy"].min()), max(real["energy"].max(), made["energy"].max()), bins + 1)
    rows = []
    for low, high in pairwise(edges):
        row = {"low": low, "high": high}
        for name, of in (("real", real), ("made", made)):
            some = (of["energy"] >= low) & (of["energy"] <= high)
            if not some.any():
                raise DataError(f"no shower has an energy of {low:.3g} to {high:.3g} GeV. Compare more of them.")
            fraction = of["fraction"][some]
            row |= {
                f"n_{name}": int(some.sum()),
                f"fraction_{name}": fraction.mean(),
                f"resolution_{name}": fraction.std() / max(fraction.mean(), 1e-9),
            }
            row[f"maximum_{name}"] = int(of["layer"][some].mean(0).argmax())
        rows.append({**row, "ratio": row["fraction_made"] / row["fraction_real"]})
    return pd.DataFrame(rows)


def _scaled(real: np.ndarray, made: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features divided by the largest of the real ones."""
    largest = np.abs(real).max(0)
    largest = np.where(largest > 0, largest, 1)
    return real / largest, made / largest
