"""Fields on a grid: resizing, smooth noise, lesions and vessels."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.data.synthetic import fields

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_lesion_is_a_blob_in_the_organ_and_tubes_are_thin():
    z, y, x = fields.axes((32, 64, 64))
    organ = ((z**2 + y**2 + x**2) < 0.5).astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(5):
        blob = fields.lesion(rng, organ, (0.2, 0.25), (300, 600))
        assert 200 < blob.max() <= 600 and not blob[organ == 0].any()
        volume = (blob > blob.max() / 2).mean() * 8  # in half widths
        assert 0.3 < volume / (4 / 3 * np.pi * 0.22**3) < 3
        thin = fields.tubes(rng, organ, 5)
        assert thin.min() >= 0 and 0.5 < thin.max() <= 1
        worn = fields.blur(thin, 2.0).max() / thin.max()
        assert worn < 0.6 * fields.blur(blob, 2.0).max() / blob.max()


def test_values_along_vessels_are_those_of_the_lesion_in_the_organ():
    z, y, x = fields.axes((32, 48, 40))
    organ = ((z**2 + y**2 + x**2) < 0.5).astype(np.float32)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        blob = fields.lesion(rng, organ, (0.2, 0.25), (300, 600))
        moved = fields.along_vessels(rng, organ, blob)
        values = blob[blob > 0.1 * blob.max()]
        np.testing.assert_array_equal(np.sort(moved[moved > 0]), np.sort(values))
        assert not moved[fields.blur(organ, 1.0) < 0.01].any()
        assert fields.blur(moved, 2.0).max() < 0.75 * fields.blur(blob, 2.0).max()


@pytest.mark.parametrize(("old", "new"), [(7, 7), (5, 13), (40, 8), (9, 4), (1, 3)])
def test_resizing_keeps_constants_and_centres(old, new):
    weights = fields.resize_weights(old, new)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (weights >= 0).all() and (old != new or np.array_equal(weights, np.eye(old)))
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)  # from either end
    field = np.full((old, 3, 4), 7.0)
    np.testing.assert_allclose(fields.resized(field, (new, 5, 2)), 7, rtol=1e-6)


def test_a_smooth_field_has_spread_one_and_no_jumps():
    rng = np.random.default_rng(0)
    drawn = np.stack([fields.smooth(rng, (20, 24, 28), 3) for _ in range(60)])
    np.testing.assert_allclose(drawn.std(axis=0).mean(), 1, atol=0.05)
    assert np.abs(np.diff(drawn, axis=3)).max() < 0.9
