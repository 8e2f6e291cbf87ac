"""The networks of 3DGAN against a slow reference that is written from their table, in numpy, channels last as in Keras; and the reduced pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.utils.parametrizations import spectral_norm

from labkit.showers import networks
from labkit.showers.networks import Profile
from tests.showers.helpers import showers

# What happens, layer by layer; "same" kernels have the odd zero behind.
FULL_GENERATOR = (
    "dense 3136; shape 7 7 8 8; conv 64 6 6 8 same; leaky; norm; up 2 2 2; pad 2 2 0; conv 6 6 5 8; leaky; norm; up 2 2 3; "
)
FULL_GENERATOR += "pad 1 0 3; conv 6 3 3 8; leaky; conv 1 2 2 2 no-bias; relu"
ANGLE_GENERATOR = (
    "dense 5184; shape 9 9 8 8; up 6 6 6; conv 8 6 6 8; relu; norm; pad 2 2 1; conv 6 4 4 6; relu; norm; pad 2 2 1; conv 6 4 4 6; "
)
ANGLE_GENERATOR += (
    "relu; norm; pad 2 2 1; conv 6 4 4 6; relu; norm; pad 1 1 0; conv 6 3 3 5; relu; norm; pad 1 1 0; conv 6 3 3 3; relu; "
)
ANGLE_GENERATOR += "conv 1 2 2 2; relu"
FULL_CRITIC = "conv 32 5 5 5 same; leaky; pad 2 2 2; conv 8 5 5 5; leaky; norm; pad 2 2 2; conv 8 5 5 5; leaky; norm; pad 1 1 1; conv 8 5 5 5; "
FULL_CRITIC += "leaky; norm; pool; flat"
ANGLE_CRITIC = "conv 16 5 6 6 same; leaky; pad 0 0 1; conv 8 5 6 6; leaky; norm; pad 0 0 1; conv 8 5 6 6; leaky; norm; conv 8 5 6 6; leaky; norm; "
ANGLE_CRITIC += "pool; flat"


def reference(text, x, state):
    """The outputs (n, ...) of x, channels last; `state` holds the tensors of a module in their order."""
    tensors = iter(state)
    for step in text.split("; "):
        what, *rest = step.split()
        sizes = [int(word) for word in rest if word.isdigit()]
        if what == "dense":
            x = x @ next(tensors).T + next(tensors)
        elif what == "shape":
            x = x.reshape(len(x), *sizes)
        elif what == "conv":
            kernel = next(tensors)
            if "same" in rest:
                x = np.pad(x, [(0, 0), *(((k - 1) // 2, k - 1 - (k - 1) // 2) for k in sizes[1:]), (0, 0)])
            out = [side - k + 1 for side, k in zip(x.shape[1:4], sizes[1:], strict=True)]
            y = np.zeros((len(x), *out, sizes[0]))
            for a, b, c in np.ndindex(*sizes[1:]):
                y += x[:, a : a + out[0], b : b + out[1], c : c + out[2]] @ kernel[:, :, a, b, c].T
            x = y if "no-bias" in rest else y + next(tensors)
        elif what == "norm":
            weight, bias, mean, variance, _ = (next(tensors) for _ in range(5))
            x = weight * (x - mean) / np.sqrt(variance + 1e-3) + bias
        elif what == "up":
            for axis, times in enumerate(sizes, 1):
                x = x.repeat(times, axis)
        elif what == "pad":
            x = np.pad(x, [(0, 0), *((side, side) for side in sizes), (0, 0)])
        elif what == "pool":
            n, a, b, c, channels = x.shape
            x = x[:, : a // 2 * 2, : b // 2 * 2, : c // 2 * 2].reshape(n, a // 2, 2, b // 2, 2, c // 2, 2, channels).mean((2, 4, 6))
        elif what == "flat":
            x = x.reshape(len(x), -1)
        else:
            x = np.where(x > 0, x, (0.3 if what == "leaky" else 0) * x)
    return x


def trained(module, seed=0):
    """The module as if after training: weights and statistics that are not those it began with."""
    torch.manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.uniform_(-0.2, 0.3)
    return module.eval()


def n_trained(module):
    return sum(parameter.numel() for parameter in module.parameters())


def arrays(module):
    return [tensor.double().numpy() for tensor in module.state_dict().values()]


def compare_generator(module, text, noise, condition, latent):
    with torch.no_grad():
        module.layers[-2].weight.abs_()  # else it may be all zeros
        made = module(noise, condition)
    expected = reference(text, latent.double().numpy(), arrays(module.layers))
    assert made.shape[1:] == (1, *expected.shape[1:4]) and expected.max() > 0
    np.testing.assert_allclose(made[:, 0].numpy(), expected[..., 0], rtol=1e-3, atol=1e-5 * expected.max())


def compare_critic(module, text, cells, power=1.0):
    with torch.no_grad():
        said = module(cells, torch.ones(len(cells), 2))
    h = reference(text, cells.movedim(1, -1).double().numpy(), arrays(module.features))
    (w_real, b_real), (w_energy, b_energy) = (arrays(head) for head in (module.real, module.energy))
    np.testing.assert_allclose(said.logits.numpy(), h @ w_real.T + b_real, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(said.energy.numpy(), (h @ w_energy.T + b_energy)[:, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(said.total.numpy(), (cells.double().numpy() ** (1 / power)).sum((1, 2, 3, 4)), rtol=1e-4)
    return said


def test_the_25_cubed_networks_have_the_published_parameters_and_are_equal_to_the_reference():
    generator, critic = networks.full_generator(), networks.full_critic()
    assert (n_trained(generator), n_trained(critic)) == (872_808, 73_402)
    noise, energy = torch.randn(1, 200), torch.tensor([[0.4]])
    compare_generator(trained(generator), FULL_GENERATOR, noise, energy, noise * energy)
    assert compare_critic(trained(critic), FULL_CRITIC, 5 * torch.rand(1, 1, 25, 25, 25)).angle is None


def test_the_networks_for_angles_have_the_published_parameters():
    assert n_trained(networks.angle_generator()) == 1_364_983 and n_trained(networks.angle_critic()) == 87_354


@pytest.mark.slow
def test_the_networks_for_angles_are_equal_to_the_reference():
    noise, condition = torch.randn(1, 254), torch.tensor([[0.4, 1.2]])
    compare_generator(trained(networks.angle_generator()), ANGLE_GENERATOR, noise, condition, torch.cat([condition, noise], 1))
    said = compare_critic(trained(networks.angle_critic()), ANGLE_CRITIC, torch.rand(1, 1, 51, 51, 25), power=0.85)
    assert said.angle.item() == pytest.approx(math.pi / 2, abs=0.1)


def test_statistics_move_by_a_hundredth_as_those_of_keras():
    layer = networks._norm(3)
    x = 2 + 3 * torch.randn(8, 3, 4, 4, 4)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.01 * x.mean((0, 2, 3, 4)))
    torch.testing.assert_close(layer.running_var, 0.99 + 0.01 * x.var((0, 2, 3, 4)))


def by_loops(cells):
    """The angle of one shower, by its definition."""
    x, y, z = (np.arange(side) + 0.5 for side in cells.shape)
    total, layers = cells.sum(), cells.sum((0, 1))
    middle = [(cells.sum((1, 2)) * x).sum() / total, (cells.sum((0, 2)) * y).sum() / total, (layers * z).sum() / total]
    angles, weights = 0.0, 0.0
    for k, energy in enumerate(layers):
        if energy > 0:
            at = (cells[:, :, k].sum(1) * x).sum() / energy, (cells[:, :, k].sum(0) * y).sum() / energy
            slope = (at[1] - middle[1]) / math.hypot(at[0] - middle[0], z[k] - middle[2])
            angles += z[k] * (math.pi / 2 - math.atan(slope if z[k] >= middle[2] else -slope))
            weights += z[k]
    return angles / weights


def test_the_angle_is_measured_from_the_image():
    cells = torch.from_numpy(showers(3)[0].astype(np.float64))
    assert networks.measured_angle(cells).tolist() == pytest.approx([by_loops(one) for one in cells.numpy()], abs=1e-5)
    straight, tilted = torch.zeros(2, 21, 21, 8)
    for k in range(8):
        straight[10, 10, k] = tilted[10, 6 + k, k] = 1
    found = networks.measured_angle(torch.stack([straight, tilted, 0 * straight])).tolist()
    assert found == pytest.approx([math.pi / 2, math.pi / 4, 100], abs=1e-5)


def test_the_reduced_generator_begins_at_the_mean_shower_and_a_gradient_reaches_all_of_it():
    cells, energies = showers(200)
    profile = Profile.of([(cells, energies / 100)])
    torch.manual_seed(0)
    generator, critic = networks.Reduced(profile), networks.ReducedCritic(profile)
    noise, condition = torch.randn(200, generator.n_noise), torch.from_numpy(energies / 100)[:, None]
    made = generator(noise, condition)
    assert made.shape == (200, 1, 9, 9, 6) and ((made == 0) | (made > 1e-3)).all()
    layers = made.detach()[:, 0].sum((1, 2)).mean(0).numpy()
    np.testing.assert_allclose(layers, cells.sum((1, 2)).mean(0), rtol=0.3)
    said = critic(made, condition)
    assert said.logits.shape == (200, 2) and said.angle is None
    torch.testing.assert_close(said.total, made.sum((1, 2, 3, 4)))
    (said.logits.mean() + said.energy.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for m in (generator, critic) for p in m.parameters())


@pytest.mark.parametrize("far", [-1000.0, 100.0, 1000.0])
def test_a_shower_of_any_logits_has_its_energy_and_a_gradient(far):
    """Of all cells, and of one of each layer."""
    torch.manual_seed(0)
    profile = Profile.of([(torch.rand(50, 9, 9, 4).numpy() * 100, np.linspace(0.02, 0.5, 50))])
    whole, peaked = (networks.Reduced(profile, 8) for _ in range(2))
    peaked.load_state_dict(whole.state_dict())
    noise, energies = torch.randn(20, whole.n_noise), torch.full((20, 1), 0.3)
    layers = whole(noise, energies).sum((1, 2, 3)).detach()
    with torch.no_grad():
        whole.basis[0] += far
        peaked.basis[0, 40] += far
    for one in (whole, peaked):
        cells = one(noise, energies)
        torch.testing.assert_close(cells.sum((1, 2, 3)).detach(), layers, rtol=0.01, atol=0.1)
        (cells.square().mean()).backward()
        assert all(p.grad.isfinite().all() for p in one.parameters() if p.grad is not None)


def test_layers_come_back_from_their_standardised_form():
    layers, mean, spread = torch.tensor([[0.0, 0.05, 3, 900]]), torch.tensor([[1.0, 2, 3, 4, 5]]), torch.tensor([0.5, 1, 2, 1, 0.1])
    torch.testing.assert_close(
        networks.in_mev(networks.standardised(layers, mean, spread), mean, spread), layers, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("made", "layer", "shape"),
    [
        (networks.SpectralLinear, torch.nn.Linear, (5, 7)),
        (lambda *args: networks.SpectralConv2d(*args, 3, 2, 1), lambda *args: torch.nn.Conv2d(*args, 3, 2, 1), (5, 7, 9, 9)),
    ],
    ids=["linear", "convolution"],
)
def test_weights_are_divided_by_their_largest_singular_value_as_by_torch(made, layer, shape):
    own, published = made(7, 4), spectral_norm(layer(7, 4))
    with torch.no_grad():
        published.parametrizations.weight.original.copy_(own.weight), published.bias.copy_(own.bias)
    published.parametrizations.weight[0]._u.copy_(own.left), published.parametrizations.weight[0]._v.copy_(own.right)
    for step in range(20):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for one in (own, published):
            one.zero_grad()
            one(x).square().sum().backward()
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter -= 0.01 * parameter.grad
        torch.testing.assert_close(own(x), published(x))
    own.eval()
    left = own.left.clone()
    assert torch.equal(own(x), own(x)) and torch.equal(own.left, left)
    assert torch.linalg.matrix_norm(own.divided().detach().flatten(1), 2) == pytest.approx(1, abs=0.05)
