"""ABCNet: parameters to the last one, logits by the formulas in loops, padding, neighbours across phi = pi, and what jets look like to it.

Used by pytest.
"""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from labkit.jets.networks import FEATURES, ABCNet, count, features
from labkit.models.batch_norm import Ranks, together
from tests.jets.helpers import plain, sample


def network(seed=0, **settings):
    torch.manual_seed(seed)
    made = ABCNet(**settings)
    for p in made.parameters():  # biases and normalisations that count
        p.data += 0.05 * torch.randn_like(p)
    return made


def jets(n=4, slots=14):
    torch.manual_seed(3)
    x = torch.randn(n, slots, 8)
    for at, held in enumerate([14, 9, 12, 5]):
        x[at, held:] = 0
    return x


def test_the_faithful_network_has_186057_parameters():
    made = ABCNet()
    assert count(made) == 186_057 and made.centres.numel() == 9
    assert sum(p.numel() for p in made.parameters() if not p.requires_grad) == 179 + 16_771  # they cancel in the softmax


def by_the_formulas(network, x, neighbours):
    """Logits (B, bins) in float64, a constituent after the other, normalised by the batch."""
    state = {name: value.double().numpy() for name, value in network.state_dict().items()}
    x = x.double().numpy()
    n_jets, n, k = *x.shape[:2], neighbours

    def layer(rows, name):
        y = rows @ state[f"{name}.linear.weight"].T + state.get(f"{name}.linear.bias", 0.0)
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-3) * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"]
        return np.maximum(y, 0)

    def nearest(points, empty=None):
        found = np.zeros((n_jets, n, k), int)
        for b in range(n_jets):
            for i in range(n):
                apart = points[b, i] - points[b]
                if empty is not None:  # eta and phi
                    apart[:, 1] = (apart[:, 1] + math.pi) % (2 * math.pi) - math.pi
                d = (apart**2).sum(1)
                if empty is not None:
                    d = [d[j] + 1000 * empty[b, i] + 1000 * empty[b, j] for j in range(n)]
                found[b, i] = np.argsort(d, kind="stable")[:k]
        return found

    def gap(rows, found, name):
        rows = rows.reshape(n_jets, n, -1)
        h = layer(rows.reshape(n_jets * n, -1), f"{name}.own")
        s = layer(h, f"{name}.of_own").reshape(n_jets, n)
        apart = np.array([[[rows[b, i] - rows[b, j] for j in found[b, i]] for i in range(n)] for b in range(n_jets)])
        e = layer(apart.reshape(n_jets * n * k, -1), f"{name}.edge")
        t = layer(e, f"{name}.of_edge").reshape(n_jets, n, k)
        e = e.reshape(n_jets, n, k, -1)
        v, largest = np.zeros(e.shape[:2] + e.shape[3:]), np.zeros(e.shape[:2] + e.shape[3:])
        for b in range(n_jets):
            for i in range(n):
                c = s[b, i] + t[b, i]
                a = np.exp(np.where(c > 0, c, 0.2 * c))
                v[b, i] = np.maximum((a / a.sum()) @ e[b, i], 0)
                largest[b, i] = e[b, i].max(0)
        return v.reshape(n_jets * n, -1), largest.reshape(n_jets * n, -1)

    flat = x.reshape(n_jets * n, 8)
    v_0, l_0 = gap(flat, nearest(x[..., :2], (x[..., 2] == 0).astype(float)), "gap_0")
    a = layer(np.hstack([flat, v_0]), "a")
    b = layer(a, "b")
    v_1, l_1 = gap(b, nearest(b.reshape(n_jets, n, -1)), "gap_1")
    c = layer(np.hstack([flat, v_1]), "c")
    z = layer(np.hstack([a, b, c, layer(c, "d"), l_0, l_1]), "together").reshape(n_jets, n, -1).mean(1)
    head = layer(layer(z, "head_0"), "head_1")
    return z, head @ state["logits.weight"].T + state["logits.bias"]


def test_logits_are_those_of_the_formulas():
    made, x = network(neighbours=3).double().train(), jets().double()
    z, logits = by_the_formulas(made, x, 3)
    got = made(x, 0.1)
    assert np.abs(got.embedding.detach().numpy() - z).max() < 1e-9
    single = network(neighbours=3).train()(jets(), 0.1)
    assert np.abs(single.logits.detach().numpy()[:, 0] - logits).max() < 1e-5
    wanted = ((z[:, None] - made.centres.detach().numpy()) ** 2).sum(-1)
    assert np.abs(got.distances.detach().numpy() - wanted).max() < 1e-9


@pytest.mark.parametrize(
    "settings", [{}, {"attention": "paper"}, {"padding": "masked"}, {"padding": "masked", "attention": "paper"}]
)
def test_a_step_has_the_gradients_of_plain_tensors(settings):
    found = []
    for make in (lambda: network(neighbours=4, **settings), lambda: plain(network(neighbours=4, **settings))):
        made = make().double()
        out = made.train()(jets().double(), 0.1)
        (out.logits.square().mean() + out.distances.mean()).backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in found[0].values())
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)


def test_masked_padding_does_not_count_empty_slots():
    made, x = network(padding="masked", neighbours=4), jets()
    longer = torch.cat([x, torch.zeros(4, 6, 8)], 1)
    for training in (True, False):
        made.train(training)
        torch.testing.assert_close(made.embed(longer), made.embed(x), rtol=1e-4, atol=1e-5)
    summed = network(padding="summed", neighbours=4).eval()
    summed.load_state_dict(made.state_dict())
    n = (x[..., 2] != 0).sum(1, keepdim=True)
    torch.testing.assert_close(summed.embed(x), made.embed(x) * n / 14, rtol=1e-4, atol=1e-5)
    faithful = network(neighbours=4).eval()
    assert (faithful.embed(longer) - faithful.embed(x)).abs().max() > 1e-3


def test_masked_neighbours_are_never_empty_and_the_constituent_itself_stands_for_missing_ones():
    made, x = network(padding="masked", neighbours=6), jets()
    assert torch.isfinite(made.train()(x, 0.1).logits).all()  # one of the jets has 5 constituents
    one = x[3:, :5].clone()
    torch.testing.assert_close(made.eval().embed(x)[3:], made.embed(torch.cat([one, torch.zeros(1, 9, 8)], 1)))


def test_neighbours_wrap_around_in_phi():
    made = ABCNet(neighbours=2)
    x = torch.ones(1, 3, 8)
    x[0, :, 0], x[0, :, 1] = 0.0, torch.tensor([3.1, -3.1, 1.0])
    near = made._near(x, x[..., 2] != 0)
    assert [set(row.tolist()) for row in near[0]] == [{0, 1}, {0, 1}, {0, 2}]


def test_a_single_jet_is_trained_on_with_the_running_statistics():
    made = network().train()
    assert torch.isfinite(made(jets()[:1], 0.1).logits).all() and made.head_0.norm.running_var.unique().item() == 1


@pytest.mark.parametrize("padding", ["faithful", "masked"])
def test_bfloat16_is_near_float32(padding):
    made, x = network(padding=padding, neighbours=4).train(), jets()
    wanted = made(x, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made(x, 0.1)
    assert got.embedding.dtype == torch.float32 and (got.embedding - wanted.embedding).abs().max() < 0.1
    got.logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_features_are_those_of_the_jet():
    some = sample()[:50]
    x = features(torch.from_numpy(some.constituents), {name: torch.from_numpy(v) for name, v in some.of_jet.items()})
    real = some.constituents[..., 3] > 0
    assert x.shape == (50, 100, 8) and len(FEATURES) == 8 and not x[torch.from_numpy(~real)].any()
    px, py, pz, e = (some.constituents[..., at].astype(float)[real] for at in range(4))
    of = {name: np.broadcast_to(v[:, None], real.shape)[real].astype(float) for name, v in some.of_jet.items() if v.ndim == 1}
    pt = np.hypot(px, py)
    eta, phi = np.arcsinh(pz / pt) - of["eta"], (np.arctan2(py, px) - of["phi"] + math.pi) % (2 * math.pi) - math.pi
    energy = np.sqrt(of["mass"] ** 2 + (of["pt"] * np.cosh(of["eta"])) ** 2)
    jet = [of["pt"] * np.cos(of["phi"]), of["pt"] * np.sin(of["phi"]), of["pt"] * np.sinh(of["eta"])]
    cosine = (px * jet[0] + py * jet[1] + pz * jet[2]) / np.sqrt(px**2 + py**2 + pz**2) / np.sqrt(sum(p**2 for p in jet))
    wanted = [eta, phi, np.log(pt / of["pt"]), np.hypot(eta, phi), np.log(e), np.log(e / energy), np.log(pt), cosine]
    for at, values in enumerate(wanted):
        assert np.abs(x.numpy()[..., at][real] - values).max() < 2e-4, FEATURES[at]


def test_jets_may_be_clustered_by_the_bins_that_the_network_says():
    made, x = network(cluster_by="bins", pretexts=2, bins=5, neighbours=4).eval(), jets()
    got = made(x)
    p = got.logits.softmax(-1)
    torch.testing.assert_close(got.embedding, (p * torch.tensor([0, 0.25, 0.5, 0.75, 1])).sum(-1))
    torch.testing.assert_close(made.embed(x), got.embedding)
    assert made.centres.shape == (3, 2) and got.distances.shape == (4, 3) and count(made) == count(network(pretexts=2, bins=5))


def test_jets_may_be_clustered_by_the_whole_distribution_over_bins():
    made, x = network(cluster_by="distribution", pretexts=2, bins=5, neighbours=4).eval(), jets()
    got = made(x)
    torch.testing.assert_close(got.embedding, got.logits.softmax(-1).sqrt().reshape(4, 10))
    torch.testing.assert_close(made.embed(x), got.embedding)
    assert made.centres.shape == (3, 10) and got.distances.shape == (4, 3) and count(made) == count(network(pretexts=2, bins=5))
    certain = torch.tensor([[[0.0, 200.0], [0.0, 0.0]]], requires_grad=True)  # a probability of 0 in float32
    made.place(certain).sum().backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize(
    "settings", [{}, {"padding": "summed", "attention": "paper", "cluster_by": "bins"}, {"cluster_by": "distribution"}]
)
def test_jets_on_several_workers_are_normalised_as_one_batch(settings):
    """Statistics, gradients and embeddings in float64, of three jets here and one there."""
    x, weights = jets().double(), (0.75, 0.25)
    joint = network(**settings).double()
    copies = [copy.deepcopy(joint) for _ in weights]
    meet, given = threading.Barrier(2, timeout=90), {}

    def add_up(rank, values):
        given[rank] = values
        meet.wait()
        total = given[0] + given[1]
        meet.wait()
        return total

    def step(rank, part):
        with together(Ranks(partial(add_up, rank), weights[rank])):
            found = copies[rank](part, 0.3)
            (found.logits.square().mean((1, 2)) + found.embedding.sum(1)).mean().backward()
            return found.embedding

    with ThreadPoolExecutor(2) as pool:
        apart = torch.cat(list(pool.map(step, range(2), (x[:3], x[3:]))))
    found = joint(x, 0.3)
    (found.logits.square().mean((1, 2)) + found.embedding.sum(1)).mean().backward()
    exact = {"rtol": 1e-8, "atol": 1e-10}
    in_float32 = settings.get("cluster_by") == "bins"
    torch.testing.assert_close(apart, found.embedding, **({"rtol": 1e-5, "atol": 1e-6} if in_float32 else exact))
    for other in copies:
        torch.testing.assert_close(dict(other.named_buffers()), dict(joint.named_buffers()), **exact)
    trained = [p.grad is not None for p in joint.parameters()]
    assert sum(trained) > 20 and trained == [p.grad is not None for p in copies[0].parameters()]
    for whole, *parts in zip(*(one.parameters() for one in (joint, *copies)), strict=True):
        if whole.grad is not None:
            mean = sum(weight * part.grad for weight, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(mean, whole.grad, rtol=1e-5, atol=1e-7)  # as above
