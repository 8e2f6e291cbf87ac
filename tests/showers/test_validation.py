"""Each measure against its formula written out, or against a case whose answer is known; and the whole table on small showers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from labkit.errors import ProblemError
from labkit.showers import validation
from labkit.showers.gan import ShowerGAN
from labkit.showers.validation import ClassifierTest
from tests.showers.helpers import data, showers

QUICK = ClassifierTest(32, 1e-2, 20, 4)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_separation_power_is_that_of_histograms(rng):
    real, made = rng.normal(size=2000), rng.normal(0.5, 1, 2000)
    low, high = np.quantile(real, [0.005, 0.995])
    edges = [-np.inf, *np.linspace(low, high, 11), np.inf]
    h, g = (np.histogram(one, edges)[0] / 2000 for one in (real, made))
    expected = sum((a - b) ** 2 / (a + b) for a, b in zip(h, g, strict=True) if a + b) / 2
    assert validation.separation(real, made, bins=10) == pytest.approx(expected)
    assert validation.separation(real, real) == 0 and validation.separation(real, real + 100) == pytest.approx(1, abs=0.02)
    assert validation.separation(real, np.full(2000, np.nan)) > 0.9 and validation.separation(np.ones(9), np.ones(9)) == 0


def test_the_frechet_distance_is_that_of_gaussians(rng):
    a, b = (rng.normal(size=(5, 5)) for _ in range(2))
    one, other, apart = a @ a.T, b @ b.T, rng.normal(size=5)
    expected = apart @ apart + np.trace(one + other - 2 * np.real(sqrtm(one @ other)))
    assert validation.frechet(apart, one, np.zeros(5), other) == pytest.approx(expected)
    assert validation.frechet(apart, one, apart, one) == pytest.approx(0, abs=1e-9)


def test_fpd_extrapolates_to_the_distance_of_infinitely_many(rng):
    real, made = rng.normal(1, 0.1, (3000, 4)), rng.normal(1.05, 0.1, (3000, 4))
    largest = np.abs(real).max(0)
    expected = float(((0.05 / largest) ** 2).sum())
    value, error = validation.fpd(real, made)
    assert value == pytest.approx(expected, rel=0.25) and error < 0.2 * expected
    assert validation.fpd(real, rng.normal(1, 0.1, (3000, 4)))[0] < 0.1 * expected


def test_kpd_is_the_unbiased_mmd_of_the_polynomial_kernel(rng):
    real, made = rng.normal(size=(12, 3)), rng.normal(size=(9, 3)) + 1

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 3 + 1) ** 4

    expected = sum(kernel(real[i], real[j]) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    expected += sum(kernel(made[i], made[j]) for i in range(9) for j in range(9) if i != j) / (9 * 8)
    expected -= 2 * sum(kernel(x, y) for x in real for y in made) / (12 * 9)
    assert validation.mmd(real, made) == pytest.approx(expected)
    one, other, far = rng.normal(1, 0.2, (300, 3)), rng.normal(1, 0.2, (300, 3)), rng.normal(1.2, 0.2, (300, 3))
    assert abs(validation.kpd(one, other)[0]) < 0.1 * validation.kpd(one, far)[0]


def test_precision_recall_density_and_coverage_are_those_of_loops(rng, monkeypatch):
    real, made, k = rng.normal(size=(30, 2)), rng.normal(0.5, 1, (20, 2)), 3
    mean, spread = real.mean(0), real.std(0)
    real_ones, others = (real - mean) / spread, (made - mean) / spread
    radius = [sorted(np.linalg.norm(real_ones - x, axis=1))[k] for x in real_ones]
    of_made = [sorted(np.linalg.norm(others - x, axis=1))[k] for x in others]
    near = np.array([[np.linalg.norm(x - y) < r for y in others] for x, r in zip(real_ones, radius, strict=True)])
    recall = np.mean([any(np.linalg.norm(x - y) < r for y, r in zip(others, of_made, strict=True)) for x in real_ones])
    expected = {"precision": near.any(0).mean(), "recall": recall, "density": near.sum() / (k * 20), "coverage": near.any(1).mean()}
    assert validation.prdc(real, made, k) == pytest.approx(expected)
    assert set(validation.prdc(real, real + 50).values()) == {0}
    monkeypatch.setattr(validation, "MOST", 15)
    assert validation.prdc(real, made, k) == validation.prdc(real[:15], made[:15], k)


def test_a_classifier_cannot_tell_the_same_apart_and_tells_others(rng):
    one, other = rng.normal(size=(300, 6)), rng.normal(size=(300, 6))
    assert abs(validation.auc(one, other, QUICK)["auc"] - 0.5) < 0.15
    far = validation.auc(one, other + 1.5, QUICK)
    assert far["auc"] > 0.97 and 0.5 < far["jsd"] <= 1 and validation.auc(one, other + 1.5, QUICK) == far
    with pytest.raises(ProblemError, match="50 showers of each kind"):
        validation.auc(one[:40], other, QUICK)


def test_a_classifier_has_the_layers_of_the_published_one_and_takes_inputs_as_they_are(rng):
    layers = [type(layer).__name__ for layer in validation._classifier(5, 8)]
    assert layers == 3 * ["Linear", "LeakyReLU"] + ["Linear"]
    one, other = rng.normal(size=(2, 100, 6))
    assert validation.auc(one, other + 0.3, QUICK) != validation.auc(3 * one, 3 * (other + 0.3), QUICK)


def test_what_a_classifier_sees():
    cells, energies = showers(5)
    low, normalised, high = (validation.inputs_of(cells, energies, kind) for kind in ("low", "normalised", "high"))
    assert low.shape == (5, 487) and normalised.shape == (5, 493) and high.shape == (5, 1 + 5 * 6)
    assert low[2, 0] == pytest.approx(np.log10(1000 * energies[2])) and low[2, 1:].sum() == pytest.approx(
        100 * cells[2].sum() / (1000 * energies[2]), rel=1e-4
    )
    calibrated = validation.inputs_of(cells, energies, "low", cells.sum() / (1e3 * energies.sum()))
    assert np.average(calibrated[:, 1:].sum(1), weights=energies) == pytest.approx(100, rel=1e-3)
    assert normalised[2, 1:487].sum() == pytest.approx((cells[2].sum((0, 1)) > 0).sum(), rel=1e-4)
    with pytest.raises(ValueError, match="kind='all' is not known"):
        validation.inputs_of(cells, energies, "all")


def test_the_objective_of_3dgan_counts_moments_and_profiles_once():
    cells, energies = showers(80)
    assert validation.objective(cells, cells, energies, energies) == 0
    assert validation.objective(cells, 1.1 * cells, energies, energies) == pytest.approx(
        0.1, rel=1e-3
    )  # moments stay, profiles do not
    at = np.arange(6)
    moved = np.roll(cells, 1, axis=3)
    moved[..., 0] = 0
    one = validation._moments(validation._along_axes(cells)[2])[0][0]
    along = cells.sum((1, 2))
    assert one == pytest.approx((along @ at / along.sum(1)).mean(), rel=1e-5)
    assert validation.objective(cells, moved, energies, energies) > 0.15


def test_slices_that_are_empty_leave_the_objective_near_its_floor():
    (cells, energies), (others, of_others) = showers(300), showers(300, seed=1)
    cells[:, 0] = 0
    others[1:, 0] = 0
    assert validation.objective(cells, others, energies, of_others) < 0.3


def test_correlations_are_told_apart(rng):
    one, other = rng.normal(size=(2, 4000, 5))
    assert validation._correlations_apart(one, other) < 0.04
    other[:, 1] = other[:, 0]
    assert validation._correlations_apart(one, other) == pytest.approx(0.1, abs=0.03)  # of one pair in ten


@pytest.mark.usefixtures("cache")
def test_the_table_has_every_measure_beside_its_floor():
    problem = ShowerGAN(data(700), batch_size=16)
    module = problem.new_module(0)
    found = validation.validate((problem, module), n=60, classifiers=["high"], how=QUICK, bootstrap=3)
    names = list(found.table["metric"])
    assert {
        "separation total",
        "separation layer, largest",
        "FPD x 1000",
        "KPD x 1000",
        "coverage",
        "AUC high",
        "JSD high",
        "3DGAN objective",
        "correlation of layers",
    } <= set(names)
    assert found.data == problem.dataset.name and 0 <= found["JSD high"] <= 1
    assert (found.table["n"] == 60).all() and found.table[["value", "spread", "floor"]].notna().all(axis=None)
    beside = validation.official({"GAN": found}).set_index("model")
    assert beside.loc["GAN", "separation_total"] == found["separation total"] and beside.loc["MDMA", "auc_low"] == 0.942
    assert list(beside.index[:2]) == ["GAN", "simulated against others"] and "60 showers" in beside.loc["GAN", "dataset"]
    assert found["separation hits"] > found.floor("separation hits") and found["FPD x 1000"] > found.floor("FPD x 1000")
    assert {"ratio", "maximum_real", "maximum_made"} <= set(found.bins.columns) and len(found.bins) == 4
    again = validation.validate((problem, module), n=60, classifiers=[], bootstrap=3)
    assert again["KPD x 1000"] == found["KPD x 1000"]
    with pytest.raises(ValueError, match=r"metric='separation totl' is not known.*separation total"):
        found["separation totl"]
    with pytest.raises(ValueError, match="classifiers"):
        validation.validate((problem, module), classifiers=["all"])


@pytest.mark.usefixtures("cache")
def test_what_a_function_returns_is_looked_at():
    simulated = data(200)
    for spoil, words in (
        (lambda made: made[1:], r"returned showers of shape \(19, 9, 9, 6\); asked for were \(20, 9, 9, 6\)"),
        (lambda made: np.where(made == made.max(), np.nan, made), "has cells that are negative or no numbers"),
        (lambda made: made - 1, "shower 0 has cells that are negative"),
        (lambda made: None, "asked for were"),
        (lambda made: ["a"], "returned a list, and no array of showers"),
    ):
        with pytest.raises(ProblemError, match=words):
            validation.validate(lambda energies, seed, spoil=spoil: spoil(showers(len(energies))[0]), simulated, n=20)


def test_the_official_results_are_there_as_published():
    table = validation.official()
    assert set(table["dataset"]) == {"2", "1 photons"} and table.set_index("model").loc["CaloDREAM", "fpd"] == 24.6
    assert table.set_index("model").loc["MDMA", ["auc_low", "auc_high", "auc_resnet"]].tolist() == [0.942, 0.987, 1.0]
