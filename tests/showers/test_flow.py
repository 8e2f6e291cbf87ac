"""The flow as a problem: its size, its loss, its steps from noise, and that training brings it closer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import labkit
from labkit.errors import ProblemError
from labkit.problems.problem import Clock, noise, problem_from_config
from labkit.showers import flow
from labkit.showers.flow import Flows, ShowerFlow
from labkit.showers.networks import Profile
from tests.helpers import ended
from tests.showers.helpers import showers

pytestmark = pytest.mark.usefixtures("cache")


def tiny(small, **options):
    return ShowerFlow(
        small, **{"batch_size": 12, "score_samples": 10, "channels": 8, "blocks": 1, "width": 32, "steps": 2, **options}
    )


def test_the_network_for_25_cubed_is_small_and_takes_eight_steps_at_most(small):
    cells, energies = np.random.default_rng(0).random((4, 25, 25, 25), np.float32), np.float32([0.1, 0.2, 0.3, 0.4])
    given = ShowerFlow(small)
    n = sum(p.numel() for p in Flows(Profile.of([(cells, energies)]), given.channels, given.blocks, given.width).parameters())
    assert 70_000 <= n <= 500_000 and given.steps <= 8
    with pytest.raises(ValueError, match="steps=9 must be at most 8"):
        ShowerFlow(small, steps=9)


def test_cells_come_back_from_their_encoding_and_the_sign_says_which_are_hit():
    cells = torch.from_numpy(showers(5)[0])
    coded = flow.encoded(cells, torch.randn(cells.shape))
    assert torch.equal(coded > 0, cells > 0)
    torch.testing.assert_close(flow.decoded(coded), cells, rtol=1e-4, atol=1e-6)


def test_midpoint_steps_are_of_second_order():
    def error(steps):
        return abs(float(flow.midpoint(lambda x, t: x * t, torch.ones(1, 1), steps)) - math.exp(0.5))

    assert error(8) < 0.3 * error(4) < 0.1 * error(2)


def test_the_velocity_of_a_normal_is_its_expectation_by_sampling():
    x0, x1 = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
    for t in (0.1, 0.5, 0.95):
        one, x = 0.7 + 0.4 * x1, None
        x = (1 - t) * x0 + t * one
        near = (x - 0.6).abs() < 0.02
        found, density = flow.velocity(torch.tensor(0.6), torch.tensor(t), torch.tensor(0.7), torch.tensor(0.4))
        assert float(found) == pytest.approx(float((one - x0)[near].mean()), abs=0.05)
        other = flow.velocity(torch.tensor(0.0), torch.tensor(t), torch.tensor(0.7), torch.tensor(0.4))[1]
        normal = torch.distributions.Normal(t * 0.7, math.hypot(0.4 * t, 1 - t))
        expected = normal.log_prob(torch.tensor(0.6)) - normal.log_prob(torch.tensor(0.0))
        assert float(density - other) == pytest.approx(float(expected), abs=1e-4)


def test_the_loss_is_that_of_velocities(small, monkeypatch):
    """Networks that say nothing: the loss is the mean square of x1 - x0, by hand."""
    problem = tiny(small)
    module = problem.new_module(0)
    monkeypatch.setattr(module, "_speed", lambda x, t, seen: 0)
    monkeypatch.setattr(module.of_cells, "forward", lambda x, *_: torch.zeros_like(x))
    cells, energy = (torch.from_numpy(one) for one in showers(6))
    found = module(cells, energy / 100, torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    _, mean, spread = module.condition(energy[:, None] / 100)
    layers = cells.sum((1, 2))
    layers, empty = torch.column_stack([layers, layers.sum(1)]), -0.5 + 0.1 * torch.randn(6, 7, generator=draw)
    standard = (torch.where(layers > 1e-3, (layers / 0.1).log1p(), empty) - mean) / spread
    at = torch.arange(9) - 4.0
    centres = torch.stack([cells.sum((2, 3)) @ at, cells.sum((1, 3)) @ at], 1) / cells.sum((1, 2, 3))[:, None] / module.sway
    sums = torch.cat([torch.linalg.solve(module.root.T, standard.T).T, centres], 1)
    apart = (sums.repeat(8, 1) - torch.randn(48, 9, generator=draw)).square().mean(1)
    torch.rand(48, 1, generator=draw)
    one = flow.encoded(cells, torch.randn(cells.shape, generator=draw))
    expected = [apart.view(8, 6).mean(0), (one - torch.randn(cells.shape, generator=draw)).square().mean((1, 2, 3))]
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-3, atol=1e-4)


def test_before_it_is_trained_it_has_the_mean_shower_and_hits_of_the_data(small):
    problem = tiny(small, steps=8)
    module = problem.new_module(0)
    cells, energies = showers(400)
    with torch.no_grad():
        made = problem.make(module, torch.from_numpy(energies), torch.randn(400, problem.n_noise(module))).numpy()
    np.testing.assert_allclose(made.sum((1, 2)).mean(0), cells.sum((1, 2)).mean(0), rtol=0.2)
    assert (made > 0).sum() == pytest.approx((cells > 0).sum(), rel=0.15)


def test_a_shower_has_the_energies_of_its_layers_and_nothing_below_a_kev(small):
    problem = tiny(small)
    module = problem.new_module(0)
    made_noise, energies = torch.randn(7, problem.n_noise(module)), torch.linspace(5, 40, 7)
    with torch.no_grad():
        made = problem.make(module, energies, made_noise)
        layers, _ = module.layers_from(made_noise[:, :9], energies[:, None] / 100, 2)
    assert made.shape == (7, 9, 9, 6) and ((made == 0) | (made > 1e-3)).all()
    torch.testing.assert_close(made.sum((1, 2)), layers, rtol=1e-2, atol=0.1)


def test_training_lowers_the_loss_and_raises_the_score(small):
    problem = tiny(small, lr=5e-3)
    module = problem.new_module(0)
    before, optimisers = problem.measure(module, problem.score_indices()), problem.optimisers(module)
    assert before == problem.measure(module, problem.score_indices())
    for step in range(30):
        batch = problem.load(problem.train_indices()[step % 3 * 12 :][:12])
        problem.step(module, batch, optimisers, Clock(12 * step, 360, 0, noise(0, step)))
    after = problem.measure(module, problem.score_indices())
    assert after["loss"] < before["loss"] and after["cells"] < 0.995 * before["cells"]


@pytest.mark.slow
def test_it_is_checked_recorded_trained_and_replayed(small, train):
    problem = tiny(small)
    problem.check()
    assert problem_from_config(problem.config()).config() == problem.config()
    run = ended(train(problem, update="sgwu", passes=1))
    np.testing.assert_array_equal(labkit.replay(run).flat(), run.flat())
    assert {"layers", "cells", "distance"} <= set(run.curve().columns)


@pytest.mark.parametrize(("bias", "words"), [(math.nan, "its loss is no number"), (-1e3, "its layers are empty")])
def test_a_collapse_ends_the_run(bias, words, small):
    problem = tiny(small)
    module = problem.new_module(0)
    torch.nn.init.constant_(module.of_layers[-1].bias, bias)
    module.root.copy_(torch.eye(7))
    with pytest.raises(ProblemError, match=f"the generator has collapsed after 0.40 passes: {words}.*Lower lr"):
        problem.step(module, problem.load(np.arange(4)), problem.optimisers(module), Clock(20, 360, 0.4, noise(0, 0)))


def test_data_with_angles_are_refused(small, monkeypatch):
    monkeypatch.setattr(ShowerFlow, "has_angle", True)
    with pytest.raises(ProblemError, match="knows of no angles"):
        tiny(small).build(0)
