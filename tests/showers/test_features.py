"""Observables against a plain loop over cells, and the distance between samples against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from labkit.showers.features import by_layer, compared, distance, observables
from tests.showers.helpers import showers


def test_observables_are_those_of_a_loop_over_cells():
    cells, energies = showers(6)
    cells[2] = 0
    seen, layers = observables(cells, energies), by_layer(cells)
    for i, shower in enumerate(cells):
        total = x = y = z = zz = rr = hits = core = 0.0
        for (a, b, c), value in np.ndenumerate(shower):
            a, b = a - 4, b - 4
            total, x, y, z = total + value, x + value * a, y + value * b, z + value * (c + 0.5)
            zz, rr, hits = zz + value * (c + 0.5) ** 2, rr + value * (a * a + b * b), hits + (value > 1e-3)
            core += value if max(abs(a), abs(b)) <= 1 else 0
        safe = total or 1
        x, y, z = x / safe, y / safe, z / safe
        expected = {"total": total, "fraction": total / energies[i], "x": x, "y": y, "depth": z, "hits": hits, "core": core / safe}
        expected |= {"length": np.sqrt(max(zz / safe - z * z, 0)), "width": np.sqrt(max(rr / safe - x * x - y * y, 0))}
        for name, value in expected.items():
            assert seen[name][i] == pytest.approx(value, rel=1e-3, abs=1e-3), name
        assert seen["layer"][i] == pytest.approx(shower.sum((0, 1)), rel=1e-5) and seen["peak"][i] == shower.sum((0, 1)).argmax()
        assert layers["centre_x"][i, 2] == pytest.approx(
            (shower[:, :, 2].sum(1) * (np.arange(9) - 4)).sum() / max(shower[:, :, 2].sum(), 1e-9), abs=1e-3
        )
    assert not np.isnan(np.column_stack([v.reshape(6, -1) for v in (*seen.values(), *layers.values())])).any()


def test_the_distance_is_the_mean_wasserstein_distance_in_standard_deviations():
    rng = np.random.default_rng(0)
    real, made = rng.normal(size=(50, 3)), rng.normal(0.3, 1.2, (50, 3))
    expected = np.mean([wasserstein_distance(real[:, k], made[:, k]) / real[:, k].std() for k in range(3)])
    assert distance(real, made) == pytest.approx(expected)
    assert distance(real, real[::-1]) == 0 and distance(real, made[:40]) == pytest.approx(expected, rel=0.2)
    cells, energies = showers(20)
    assert compared(cells, energies).shape == (20, 5 + 6)
