"""`generate`: a shower depends on seed, number and energy alone; files are those of the readers; workers share; bad energies are refused."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

import labkit
from labkit.errors import DataError, ProblemError
from labkit.showers import generate, generation, negative_objective, open_showers
from labkit.showers.gan import ShowerGAN
from tests.helpers import ended

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def model(small, monkeypatch):
    monkeypatch.setattr(generation, "BLOCK", 8)
    problem = ShowerGAN(small, latent=5, batch_size=12, score_samples=10)
    return problem, problem.new_module(0)


def test_a_shower_depends_on_neither_batch_nor_company(model):
    energies = np.linspace(3, 45, 30)
    made = generate(model, energies, seed=4, batch_size=5)
    assert made.shape == (30, 9, 9, 6) and made.dtype == np.float32
    for batch_size in (1, 8, 24, 100):
        np.testing.assert_allclose(generate(model, energies, 4, batch_size=batch_size), made, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(generate(model, energies[:11], 4), made[:11], rtol=1e-3, atol=1e-4)
    assert np.abs(generate(model, energies, 5) - made).max() > 0.1
    assert model[1].training  # as it was


def test_what_is_streamed_to_a_file_is_what_stays_in_memory(model, tmp_path):
    energies = np.linspace(3, 45, 25).astype(np.float32)
    made = generate(model, energies)
    for layout in ("lcd", "showerdata"):
        path = generate(model, energies, batch_size=8, out=tmp_path / f"{layout}.h5", layout=layout)
        data = open_showers(path)
        assert data.n_train + data.n_test == 25 and data.shape == (1, 9, 9, 6)
        batch = data.batch(np.arange(data.n_train))
        rows = np.searchsorted(energies, batch["energy"])
        np.testing.assert_allclose(batch["x"][:, 0], made[rows], rtol=1e-3, atol=1e-4)


def test_no_batch_is_kept_when_the_next_one_is_written(model, tmp_path, monkeypatch):
    made, alive = [], []

    class Watched(generation.Writer):
        def append(self, showers, *of):
            made.append((len(showers), weakref.ref(showers)))
            alive.append(sum(one() is not None for _, one in made))
            super().append(showers, *of)

    monkeypatch.setattr(generation, "Writer", Watched)
    generate(model, np.full(60, 10.0), batch_size=8, out=tmp_path / "made.h5")
    assert [n for n, _ in made] == [8] * 7 + [4] and max(alive) <= 2


def test_blocks_have_noise_of_their_own_by_all_of_the_seed():
    noise = generation._noise(2**32 + 3, 5, 40)
    assert torch.equal(noise, generation._noise(2**32 + 3, 5, 40)) and noise.shape == (generation.BLOCK, 40)
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1, abs=0.05)
    for seed, block in ((3, 5), (2**32 + 3, 6), (5, 2**32 + 3)):
        assert not torch.equal(noise, generation._noise(seed, block, 40))


@pytest.mark.slow
def test_workers_make_a_part_each(small, train, lab, tmp_path):
    run = ended(train(ShowerGAN(small, latent=5, batch_size=12, score_samples=10), update="sgwu", passes=1))
    energies = np.linspace(3, 45, 600).astype(np.float32)
    paths = generate(run, energies, out=tmp_path / "made.h5", lab=lab)
    assert [path.name for path in paths] == ["made-00.h5", "made-01.h5"]
    data, made = open_showers(paths), generate(run, energies)
    batch = data.batch(np.arange(data.n_train))
    np.testing.assert_allclose(batch["x"][:, 0], made[np.searchsorted(energies, batch["energy"])], rtol=1e-3, atol=1e-4)
    assert negative_objective(run) < 0
    with pytest.raises(ValueError, match="with lab= give a run and out="):
        generate(run, energies, lab=lab)
    with pytest.raises(DataError, match="an energy alone"):
        generate(run, energies, theta=energies, out=tmp_path / "angles.h5", lab=lab)


def test_angles_are_for_the_models_that_know_them(model, monkeypatch):
    with pytest.raises(DataError, match="makes showers of an energy alone"):
        generate(model, [5.0], theta=[1.0])
    monkeypatch.setattr(ShowerGAN, "has_angle", True)
    for theta, words in ((None, r"give theta=\(2,\)"), ([1.0], r"give theta=\(2,\)"), ([1.0, np.nan], "theta 1 is nan")):
        with pytest.raises(DataError, match=words):
            generate(model, [5.0, 6.0], theta=theta)


def test_what_makes_no_showers_and_energies_that_are_none_are_refused(model):
    for energies, words in (([], "shape"), ([[1.0]], "shape"), ([5, -1], "energy 1 is -1 GeV"), ([np.nan], "energy 0 is nan")):
        with pytest.raises(DataError, match=words):
            generate(model, energies)
    with pytest.raises(TypeError, match="model is a int"):
        generate(5, [1.0])
    classifier = labkit.Classifier(data="digits")
    with pytest.raises(ProblemError, match="Classifier makes no showers"):
        generate((classifier, classifier.build(0)), [1.0])
    with pytest.raises(ValueError, match="layout='root' is not known"):
        generate(model, [1.0], layout="root")
