"""Parametrised showers: the same for the same seed, labelled, like Geant4's in what they were fitted to; and the fit finds what it is given."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.data import open_dataset
from labkit.showers import geant4, parametrised
from labkit.showers.features import observables

pytestmark = pytest.mark.usefixtures("cache")


def test_a_shower_is_the_same_for_every_number_of_them_and_says_what_it_is():
    data, more = (open_dataset("parametrised-showers", n=n, seed=3) for n in (20, 30))
    assert data.synthetic and "no simulation" in data.note and data.fields.keys() == {"x", "energy"}

    def of(data):
        parts = [data.batch(np.arange(n), split) for split, n in (("train", data.n_train), ("test", data.n_test))]
        energy = np.concatenate([part["energy"] for part in parts])
        return dict(zip(energy.tolist(), np.concatenate([part["x"] for part in parts]).sum((1, 2, 3, 4)).tolist(), strict=True))

    few, many = of(data), of(more)
    assert few.items() <= many.items() and len(many) == 30
    assert of(open_dataset("parametrised-showers", n=20, seed=4)) != few


def test_they_are_like_those_of_geant4():
    real = open_dataset("showers-wsi", n=400).batch(np.arange(300))
    made = parametrised.draw(real["energy"], np.random.default_rng(0))
    one, other = observables(real["x"][:, 0], real["energy"]), observables(made, real["energy"])
    for name, within in (("fraction", 0.02), ("depth", 0.05), ("length", 0.08), ("hits", 0.1), ("core", 0.05), ("width", 0.1)):
        assert other[name].mean() == pytest.approx(one[name].mean(), rel=within), name
    assert other["fraction"].std() == pytest.approx(one["fraction"].std(), rel=0.25)
    profile = [of["layer"].mean(0) for of in (one, other)]
    assert abs(profile[0].argmax() - profile[1].argmax()) <= 1 and np.abs(profile[0] - profile[1]).sum() < 0.08 * profile[0].sum()


@pytest.mark.slow
def test_the_constants_are_those_that_are_fitted_and_a_fit_finds_what_was_drawn():
    packed = geant4._packed()
    again = parametrised.fit(packed.energy[:400], packed.showers(0, 400))
    assert again.visible[0] == pytest.approx(parametrised.FITTED.visible[0], rel=0.03)
    assert again.ln_t == pytest.approx(parametrised.FITTED.ln_t, abs=0.1)
    energies = np.random.default_rng(1).uniform(2, 50, 250)
    found = parametrised.fit(energies, parametrised.draw(energies, np.random.default_rng(2)))
    assert found.visible[0] == pytest.approx(parametrised.FITTED.visible[0], rel=0.03)
    assert found.core[0] == pytest.approx(parametrised.FITTED.core[0], abs=0.1)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="n="):
        open_dataset("parametrised-showers", n=3)
    with pytest.raises(ValueError, match="has no option size"):
        open_dataset("parametrised-showers", size=3)
