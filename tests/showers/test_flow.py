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
    n = sum(p.numel() for p in Flows(Profile.of(cells, energies), given.channels, given.blocks, given.width).parameters())
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


def test_the_loss_is_that_of_velocities(small):
    """Networks that say nothing: the loss is the mean square of x1 - x0, by hand."""
    problem = tiny(small)
    module = problem.new_module(0)
    for p in (*module.of_layers[-1].parameters(), *module.of_cells.last.parameters(), *module.of_cells.direct.parameters()):
        torch.nn.init.zeros_(p)
    cells, energy = (torch.from_numpy(one) for one in showers(6))
    found = module(cells, energy / 100, torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    torch.rand(6, 1, generator=draw)
    _, mean = module.condition(energy[:, None] / 100)
    layers = ((cells.sum((1, 2)) / 0.1).log1p() - mean) / module.condition.spread
    expected = [(layers - torch.randn(6, 6, generator=draw)).square().mean(1)]
    one = flow.encoded(cells, torch.randn(cells.shape, generator=draw))
    expected.append((one - torch.randn(cells.shape, generator=draw)).square().mean((1, 2, 3)))
    torch.testing.assert_close(found, torch.stack(expected, 1), rtol=1e-4, atol=1e-5)


def test_a_shower_has_the_energies_of_its_layers_and_nothing_below_a_kev(small):
    problem = tiny(small)
    module = problem.new_module(0)
    made_noise, energies = torch.randn(7, problem.n_noise(module)), torch.linspace(5, 40, 7)
    with torch.no_grad():
        made = problem.make(module, energies, made_noise)
        standard = module.layers_from(made_noise[:, :6], energies[:, None] / 100, 2)
    assert made.shape == (7, 9, 9, 6) and ((made == 0) | (made > 1e-3)).all()
    torch.testing.assert_close(made.sum((1, 2)), flow.in_mev(*standard), rtol=1e-2, atol=0.1)


def test_training_lowers_the_loss_and_raises_the_score(small):
    problem = tiny(small, lr=5e-3)
    module = problem.new_module(0)
    before, optimisers = problem.measure(module, problem.score_indices()), problem.optimisers(module)
    assert before == problem.measure(module, problem.score_indices())
    for step in range(30):
        batch = problem.load(problem.train_indices()[step % 3 * 12 :][:12])
        problem.step(module, batch, optimisers, Clock(12 * step, 360, 0, noise(0, step)))
    after = problem.measure(module, problem.score_indices())
    assert after["loss"] < 0.9 * before["loss"] and after["score"] > before["score"]


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
    with pytest.raises(ProblemError, match=f"the generator has collapsed after 0.40 passes: {words}.*Lower lr"):
        problem.step(module, problem.load(np.arange(4)), problem.optimisers(module), Clock(20, 360, 0.4, noise(0, 0)))


def test_data_with_angles_are_refused(small, monkeypatch):
    monkeypatch.setattr(ShowerFlow, "has_angle", True)
    with pytest.raises(ProblemError, match="knows of no angles"):
        tiny(small).build(0)
