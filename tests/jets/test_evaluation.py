"""What clusters are worth: the version chosen without labels, the table of runs, and what simple methods give on the sample.

Used by pytest.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from labkit.errors import DataError, ProblemError
from labkit.jets import evaluation
from labkit.jets.clustering import accuracy, k_means
from labkit.jets.evaluation import agreement, baselines, chosen, confusion, network, poisson_mixture, silhouette, table
from tests.jets.helpers import problem, sample

pytestmark = pytest.mark.usefixtures("cache")


def of_classes(names):
    jets = sample()
    return jets[np.isin(np.array(jets.classes)[jets.label], list(names))]


@pytest.mark.slow
def test_simple_methods_tell_w_z_and_t_apart_to_some_degree():
    jets = of_classes("WZt")
    made = baselines(jets[::2], jets[1::2]).set_index("method")
    assert list(made.index) == [name for name in evaluation.UNSUPERVISED + evaluation.CEILINGS if "Poisson" not in name]
    assert made.labels.tolist() == [False] * 4 + [True] * 2
    assert (made.accuracy > 0.4).all() and made.accuracy["ten numbers: boosted trees"] > made.accuracy["mass: k-means"]
    assert ((made.ari > 0) & (made.nmi > 0)).all()
    with pytest.raises(DataError, match="all jets are 'W'"):
        baselines(of_classes("W"), jets)


def test_quarks_and_gluons_are_told_apart_by_how_many_particles_they_have():
    jets = of_classes("qg")
    made = baselines(jets[::2], jets[1::2], names=["multiplicity: Poisson mixture"])
    assert made.accuracy[0] > 0.6
    generator = np.random.default_rng(0)
    counts = np.concatenate([generator.poisson(40, 600), generator.poisson(80, 400)])
    share, mean = poisson_mixture(counts, 2)
    assert np.abs(mean - [40, 80]).max() < 1 and np.abs(share - [0.6, 0.4]).max() < 0.02


def test_they_are_measured_on_the_jets_that_a_problem_is_measured_on(few):
    of = problem(few)
    (made,) = baselines(of, names=["mass: k-means"]).accuracy
    train = of.dataset.batch(of.train_indices(), fields=["mass"])["mass"]
    test = of.dataset.batch(of.test_indices(), "test", fields=["mass", "label"])
    centres = k_means(train[:, None], 3)
    assert made == accuracy(np.abs(test["mass"][:, None] - centres.T).argmin(1), test["label"])
    with pytest.raises(TypeError, match=r"are of labkit\.jets\.Jets, to train and to test, or of a problem"):
        baselines(of, sample())


def test_agreement_and_confusion():
    clusters, label = np.array([1, 1, 0, 0, 2, 2]), np.array([0, 0, 1, 1, 2, 1])
    found = agreement(clusters, label)
    assert found["accuracy"] == 5 / 6 and 0 < found["ari"] < 1 and 0 < found["nmi"] < 1
    np.testing.assert_allclose(confusion(clusters, label), [[1, 0, 0], [0, 2 / 3, 1 / 3], [0, 0, 1]])


@pytest.mark.slow
def test_a_row_for_each_run_at_the_version_that_is_chosen_without_labels(run):
    version, curve = chosen(run), run.curve()
    after = curve[curve.spread != 1]
    assert version == after.version[after.spread.idxmin()]
    made = table(run)
    row = made.iloc[0]
    assert row.version == version and row.oracle == curve.accuracy.max()
    right = row[["knn", "linear"]].astype(float) * len(run.problem().test_indices())  # of some jets, maybe of none
    assert right.tolist() == pytest.approx(right.round().tolist()) and right.between(0, len(run.problem().test_indices())).all()
    assert row.accuracy == pytest.approx(curve.accuracy[curve.version == version].iloc[0])
    assert "centres" in network(run, version).state_dict() and -1 <= silhouette(run) <= 1


def test_a_run_without_clusters_has_no_version_to_choose():
    curve = pd.DataFrame({"version": [0, 1], "pretext": [3.0, 2.0], "spread": [1.0, 1.0]})
    run = SimpleNamespace(curve=lambda: curve, config={"name": "short", "problem": {"pretrain": 5.0}})
    with pytest.raises(ProblemError, match="'short' has no version after k-means, which comes after pretrain=5"):
        chosen(run)
    run.curve = lambda: curve.drop(columns="spread")
    with pytest.raises(ProblemError, match=r"'short' is none of labkit\.jets\.UCluster"):
        chosen(run)
