"""The GAN as a problem: its losses, flips and steps by hand, training under every update, replays bit for bit, and a collapse that ends a run."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

import labkit
from labkit.errors import DataError, ProblemError, WorkerError
from labkit.problems.problem import Clock, noise, problem_from_config
from labkit.showers import ShowerFlow, gan, generate, negative_objective
from labkit.showers.gan import LOSSES, ShowerGAN
from labkit.showers.networks import Verdict
from tests.helpers import ended
from tests.showers.helpers import data, showers

pytestmark = pytest.mark.usefixtures("cache")


def tiny(small, **options):
    return ShowerGAN(small, **{"batch_size": 12, "score_samples": 10, "latent": 5, **options})


def clock(samples=0, total=100):
    return Clock(samples, total, samples / 50, noise(0, 0))


def stepped(problem, steps=1, seed=0):
    """The module after some steps, and what the last one returned."""
    module = problem.new_module(seed)
    optimisers, batch, at = problem.optimisers(module), problem.load(problem.train_indices()[:12]), clock()
    for _ in range(steps):
        made = problem.step(module, batch, optimisers, at)
    return module, made


def test_the_presets_are_the_published_weights():
    published = {
        "3dgan": (2, 0.1, 0.1, 0),
        "3dgan-master": (6, 0.2, 0.1, 0),
        "3dgan-horovod": (8, 0.2, 0.1, 0),
        "3dgan-angle": (3, 0.1, 0.1, 25),
    }
    for name, weights in published.items():
        how = LOSSES[name]
        assert (how.validity, how.energy, how.total, how.angle) == weights
        assert (how.flips, how.generator_steps, how.optimiser["name"], how.lr) == (0.05, 2, "rmsprop", 1e-3)
    assert {"hinge", "hinge-sums", "wgan-gp"} < LOSSES.keys()


@pytest.mark.parametrize(("loss", "weights"), [("3dgan", (2, 0.1, 0.1, 0)), ("3dgan-angle", (3, 0.1, 0.1, 25))])
def test_a_loss_is_the_weighted_sum_of_its_terms(loss, weights, small):
    said = Verdict(torch.tensor([[0.3], [-1.0]]), torch.tensor([0.2, 0.5]), torch.tensor([3.0, 8.0]), torch.tensor([1.0, 1.5]))
    true = Verdict(None, torch.tensor([0.25, 0.4]), torch.tensor([4.0, 5.0]), torch.tensor([1.1, 1.2]))
    labels = torch.tensor([[1.0], [0.0]])
    losses = tiny(small, loss=loss)._losses(said, true, labels)
    cross = [-math.log(1 / (1 + math.exp(-0.3))), -math.log(1 - 1 / (1 + math.exp(1)))]
    terms = (sum(cross) / 2, 100 * (0.05 / 0.25 + 0.1 / 0.4) / 2, 100 * (1 / 4 + 3 / 5) / 2, (0.1 + 0.3) / 2)
    assert float(losses["loss"]) == pytest.approx(sum(w * term for w, term in zip(weights, terms, strict=True)), rel=1e-5)
    assert [float(value) for name, value in losses.items() if name != "loss"] == pytest.approx(terms, rel=1e-5)
    own = tiny(small, loss=loss, validity=1, energy=0, total=0.5)
    assert float(own._losses(said, true, labels)["loss"]) == pytest.approx(
        terms[0] + 0.5 * terms[2] + weights[3] * terms[3], rel=1e-5
    )


def test_the_critic_is_told_wrong_labels_and_the_generator_steps_twice_on_fresh_noise(small, monkeypatch):
    told, noises = [], []
    monkeypatch.setitem(LOSSES, "3dgan", LOSSES["3dgan"]._replace(flips=0.25))
    problem = tiny(small, loss="3dgan", batch_size=48)
    module = problem.new_module(0)
    module["generator"].register_forward_pre_hook(lambda _, given: noises.append((torch.is_grad_enabled(), given[0].clone())))
    losses = problem._losses
    monkeypatch.setattr(problem, "_losses", lambda said, true, labels: (told.append(labels), losses(said, true, labels))[1])
    critic = [p.detach().clone() for p in module["critic"].parameters()]
    optimisers, batch, at = problem.optimisers(module), problem.load(np.arange(40)), clock()
    for _ in range(5):
        problem.step(module, batch, optimisers, at)
    kinds = [grad for grad, _ in noises]
    assert kinds == 5 * [False, True, True]  # one for the critic, two steps
    assert len({float(z[0, 0]) for _, z in noises}) == len(noises)
    reals, fakes, first, second = (told[i::4] for i in range(4))
    assert 0.6 < torch.cat(reals).mean() < 0.9 and 0.1 < torch.cat(fakes).mean() < 0.4
    assert set(first) == set(second) == {1.0}
    assert any(not torch.equal(a, b) for a, b in zip(critic, module["critic"].parameters(), strict=True))


@pytest.mark.parametrize("loss", ["3dgan", "hinge-sums", "wgan-gp"])
def test_the_steps_of_a_network_leave_the_other_one_alone(loss, small):
    problem = tiny(small, loss=loss, lr=1e-4)
    module, made = stepped(problem, 2)
    assert {"loss", "critic", "validity"} <= made.keys() and all(math.isfinite(value) for value in made.values())
    assert all(p.requires_grad for p in module.parameters())

    def state():
        """Without the estimates of singular vectors, which each forward pass improves."""
        return {
            name: value.clone() for name, value in module["critic"].state_dict().items() if not name.endswith((".left", ".right"))
        }

    before = state()
    with gan._frozen(module["critic"]) as judge:
        judge(
            module["generator"](torch.randn(4, problem.n_noise(module)), torch.full((4, 1), 0.2)), torch.full((4, 1), 0.2)
        ).logits.sum().backward()
    assert all(p.grad is not None for p in module["generator"].parameters())
    torch.testing.assert_close(before, state(), rtol=0, atol=0)


def test_the_gradient_penalty_is_that_of_a_linear_critic(small):
    weight = torch.randn(1, 1, 3, 3, 3)

    class Linear(torch.nn.Module):
        def forward(self, cells, condition):
            return Verdict((cells * weight).sum((1, 2, 3, 4))[:, None], None, None)

    found = gan._penalty(Linear(), torch.rand(4, 1, 3, 3, 3), torch.ones(4, 1))
    assert float(found) == pytest.approx((float(weight.norm()) - 1) ** 2, rel=1e-4)


def test_mirrored_showers_are_in_one_of_eight_positions():
    cells, draw = torch.rand(2, 1, 4, 4, 3), torch.Generator().manual_seed(0)
    seen = {tuple(gan.mirrored(cells, draw).flatten().tolist()) for _ in range(80)}
    squares = [
        cells.flip(axes).transpose(2, 3) if swap else cells.flip(axes) for axes in ([], [2], [3], [2, 3]) for swap in (False, True)
    ]
    assert seen == {tuple(one.flatten().tolist()) for one in squares} and len(seen) == 8


def test_the_sliced_distance_is_that_of_sorted_projections():
    real, made = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    found = float(gan.sliced(torch.from_numpy(real), torch.from_numpy(made), torch.Generator().manual_seed(1)))
    drawn = F.normalize(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)), dim=0).numpy()
    expected = [wasserstein_distance(real @ one, made @ one) for one in np.concatenate([np.eye(3), drawn.T])]
    assert found == pytest.approx(np.mean(expected), rel=1e-4)


def test_percentage_errors_are_relative_to_the_true_value():
    assert float(gan.percentage(torch.tensor([2.0, -4.0]), torch.tensor([1.0, -5.0]))) == pytest.approx(37.5)


def test_the_score_is_one_for_the_real_showers_and_falls_with_the_distance(small, monkeypatch):
    problem = tiny(small)
    module, indices = problem.new_module(0), problem.score_indices()
    first = problem.measure(module, indices)
    assert first == problem.measure(module, indices) and first["score"] == pytest.approx(math.exp(-first["loss"]))
    assert problem.quality(module, indices) == first["score"] and 0 < first["score"] < 1
    real = problem.load(indices)[0][:, 0].float()
    monkeypatch.setattr(problem, "make", lambda module, energies, noise, theta: real[: len(energies)])
    assert problem.measure(module, indices)["score"] == 1
    monkeypatch.setattr(problem, "make", lambda module, energies, noise, theta: 0 * real[: len(energies)])
    assert problem.measure(module, indices)["score"] < first["score"]
    monkeypatch.setattr(problem, "make", lambda module, energies, noise, theta: math.nan * real[: len(energies)])
    assert problem.measure(module, indices)["score"] == 0


def test_training_brings_the_showers_closer(small):
    problem = tiny(small, lr=2e-3)
    module = problem.new_module(0)
    with torch.no_grad():
        module["generator"].layers.bias.fill_(1.5)  # all layers far above
    before = problem.measure(module, problem.train_indices())["loss"]
    optimisers, at = problem.optimisers(module), clock()
    for step in range(30):
        problem.step(module, problem.load(problem.train_indices()[step % 3 * 12 :][:12]), optimisers, at)
    assert problem.measure(module, problem.train_indices())["loss"] < 0.9 * before


def test_it_is_checked_recorded_and_made_again(small):
    problem = tiny(small, loss="3dgan", dropout=0.1, total=0.3, critic_lr=1e-4, decay=0.1)
    problem.check()
    config = json.loads(json.dumps(problem.config()))
    assert config["kind"] == "labkit.showers:ShowerGAN" and config["total"] == 0.3
    again = problem_from_config(config)
    assert again.config() == config and again.objective == problem.objective
    module = again.new_module(1)
    assert [group["lr"] for one in again.optimisers(module) for group in one.param_groups] == [1e-3, 1e-4]
    optimisers = again.optimisers(module)
    again._schedule(optimisers, clock(100))
    assert [group["lr"] for one in optimisers for group in one.param_groups] == pytest.approx([1e-4, 1e-5])


def test_what_does_not_fit_is_refused_by_what_it_is(small):
    for options, words in (
        ({"network": "full"}, "is for 25x25x25 cells, and data .* have 9x9x6. Take 'reduced'"),
        ({"network": "angle"}, "is for 51x51x25 cells"),
        ({"data": "digits"}, "data 'digits' are no showers"),
        ({"data": data(30, shape=(9, 7, 6))}, "No network here fits them"),
    ):
        with pytest.raises(ProblemError, match=words):
            ShowerGAN(**{"data": small, **options}).check()
    for options in (
        {"network": "big"},
        {"loss": "mse"},
        {"loss": "hinge-sums", "network": "full"},
        {"lr": 0},
        {"dropout": 1},
        {"decay": 2},
        {"latent": 1},
        {"energy": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ShowerGAN(small, **options)


@pytest.mark.parametrize("kind", [ShowerGAN, ShowerFlow])
def test_arrays_that_are_no_showers_are_refused_by_what_is_wrong(kind):
    cells, energies = showers(60)
    last = np.arange(60) % 7 == 3
    for x, energy, words in (
        (cells, np.where(last, -3, energies), r"energy \d+ of the training split is -3 GeV"),
        (cells, np.where(last, 0, energies), r"energy \d+ of the training split is 0 GeV"),
        (np.where(last[:, None, None, None], cells - 0.5, cells), energies, r"x \d+ of the training split has cells of -0.5 MeV"),
        (0 * cells, energies, "all showers are empty"),
    ):
        given = labkit.open_dataset({"x": x[:, None], "energy": energy}, target="energy", inputs="x", as_given="x")
        with pytest.raises(DataError, match=words):
            kind(given, batch_size=12, score_samples=10).check()


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (lambda x: (0 * x, (x.flip(0), x)), "the showers of a batch are empty"),
        (lambda x: (x, (x, x)), "the showers of an energy are all alike, whatever the noise"),  # of many energies
        (lambda x: (x * math.nan, (x.flip(0), x)), "the showers of a batch hold cells that are no numbers"),
        (lambda x: (x.flip(0), (x * math.nan, x)), "the showers of a batch hold cells that are no numbers"),
    ],
)
def test_a_collapse_is_seen_in_its_batch(spoiled, words, small):
    problem = tiny(small)
    for n in (2, 12):
        x = problem.load(np.arange(n))[0].float()
        problem._check_collapse(x.flip(0), (x.flip(0), x), x, clock())
        with pytest.raises(ProblemError, match=f"collapsed after 0.40 passes: {words}"):
            problem._check_collapse(*spoiled(x), x, clock(20))


@pytest.mark.parametrize("ignored", [5, None], ids=["latent", "all"])
def test_a_generator_that_ignores_its_noise_has_collapsed(ignored, small):
    problem = tiny(small)
    module = problem.new_module(0)
    kept = torch.arange(problem.n_noise(module)) >= (ignored or math.inf)
    module["generator"].register_forward_pre_hook(lambda _, given: (given[0] * kept, given[1]))
    with pytest.raises(ProblemError, match="all alike, whatever the noise"):
        problem.step(module, problem.load(problem.train_indices()[:4]), problem.optimisers(module), clock())


def test_every_sixteenth_step_of_a_worker_is_due_whatever_the_others_do(small):
    problem, one, other = tiny(small), torch.nn.Identity(), torch.nn.Identity()
    for number in range(33):
        assert problem._is_due(one) == (number % 16 == 0)
    assert problem._is_due(other)


def test_cells_below_a_kev_are_not_made(small):
    problem = tiny(small)
    problem.network = "full"  # whose unit is 10 MeV
    cells = torch.tensor([0.0, 5e-4, 2e-3, 3.0]).view(1, 1, 1, 1, 4)
    made = problem.make({"generator": lambda noise, condition: 0.1 * cells}, torch.tensor([10.0]), torch.zeros(1, 5))
    torch.testing.assert_close(made.flatten(), torch.tensor([0.0, 0.0, 2e-3, 3.0]))


def test_a_fold_begins_from_its_own_showers_also_after_a_check(small):
    used = tiny(small)
    used.check()
    expected = [tiny(small).fold(k, 2).profile.image for k in range(2)]
    assert not np.array_equal(*expected)
    for k in range(2):
        np.testing.assert_array_equal(used.fold(k, 2).profile.image, expected[k])
        np.testing.assert_array_equal(used._folded((k, 2, 0)).profile.image, expected[k])


@pytest.mark.parametrize("kind", [ShowerGAN, ShowerFlow])
def test_what_a_network_begins_from_is_read_in_blocks(kind, small, monkeypatch):
    whole = kind(small).profile
    given, asked = kind(small), []
    read = given.dataset.batch
    monkeypatch.setattr(given.dataset, "batch", lambda indices, **more: asked.append(len(indices)) or read(indices, **more))
    monkeypatch.setattr(gan, "BLOCK", 16)
    for one, other in zip(given.profile, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert max(asked) == 16 and sum(asked) == len(given.train_indices())


class Collapsing(ShowerGAN):
    """Its generator makes nothing more after the first pass."""

    def step(self, module, batch, optimisers, clock):
        if clock.passes >= 1 and clock.total > 1:
            with torch.no_grad():
                module["generator"].layers.bias.fill_(-1e4)
        return super().step(module, batch, optimisers, clock)


@pytest.mark.slow
def test_a_collapse_ends_the_run_with_the_reason_and_what_was_good_stays(small, train):
    run = train(Collapsing(small, batch_size=12, score_samples=10), update="sgwu", passes=4)
    with pytest.raises(WorkerError, match=r"the generator has collapsed after 1.* passes: the showers of a batch are empty"):
        run.wait(100)
    assert run.state == "failed" and np.isfinite(run.flat()).all()
    kept = run.model()
    assert kept.network["generator"].layers.bias.min() > -1e3


def test_two_threads_train_it_and_a_replay_has_the_same_bits(small, train):
    run = ended(train(tiny(small), update="agwu", passes=1))
    np.testing.assert_array_equal(labkit.replay(run).flat(), run.flat())
    assert {"critic", "validity"} <= {name for row in run.events.metrics.dropna() for name in row} and run.curve().score.between(
        0, 1
    ).all()


def _saved(module):
    torch.save(module, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def test_the_trained_networks_are_copied_pickled_and_saved_whole(small, train):
    problem = tiny(small)
    module = ended(train(problem, update="sgwu", passes=0.5)).model().network
    cells = torch.from_numpy(generate((problem, module), [5.0, 20.0]))[:, None]
    condition = torch.tensor([[0.05], [0.2]])
    expected = module["critic"](cells, condition).logits
    for again in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), _saved):
        other = again(module)
        np.testing.assert_array_equal(generate((problem, other), [5.0, 20.0])[:, None], cells)
        torch.testing.assert_close(
            other["critic"](cells, condition).logits, expected, rtol=1e-4, atol=1e-6
        )  # where its weights lie in memory


@pytest.mark.slow
@pytest.mark.parametrize(("update", "loss"), [("allreduce", "wgan-gp"), ("easgd", "3dgan")])
def test_every_update_and_loss_trains_both_networks(update, loss, small, train):
    run = ended(train(tiny(small, loss=loss, lr=1e-3), update=update, passes=1))
    first, last = run.weights(0), run.weights()
    moved = [name for name in first if not np.array_equal(first[name], last[name])]
    assert any(name.startswith("generator") for name in moved) and any(name.startswith("critic") for name in moved)
    if update != "allreduce":
        np.testing.assert_array_equal(labkit.replay(run).flat(), run.flat())


@pytest.mark.slow
def test_its_settings_are_searched_over_folds_by_the_objective_of_3dgan(small, lab, tmp_path):
    space = {"latent": (4, 16, "int"), "total": (0.0, 0.2), "energy": [0, 0.1], "lr": (1e-5, 1e-3, "log")}
    how = {"trials": 1, "folds": 2, "passes": 0.5, "update": "sgwu", "workers_per_trial": 1, "objective": negative_objective}
    found = labkit.search(tiny(small, loss="3dgan"), space, lab, method="random", runs=tmp_path, progress=False, **how)
    assert list(found.table().state) == ["done"] and found.best.score < 0
    assert found.problem().latent == found.points[found.best.trial]["latent"]


@pytest.mark.slow
def test_the_full_networks_make_their_steps():
    problem = ShowerGAN(labkit.open_dataset("showers-wsi", n=40), network="full", batch_size=2)
    module = problem.new_module(0)
    made = problem.step(module, problem.load(problem.train_indices()[:2]), problem.optimisers(module), clock())
    assert all(math.isfinite(value) for value in made.values())


def test_a_step_is_that_of_plain_code(small):
    """Hinge: the same numbers from a loop that is written out."""
    problem = tiny(small, loss="hinge", mirror=False)
    module, other = problem.new_module(0), problem.new_module(0)
    batch = problem.load(problem.train_indices()[:12])
    problem.step(module, batch, problem.optimisers(module), clock())
    draw, (of_generator, of_critic) = noise(0, 0), problem.optimisers(other)
    x, condition = batch[0].float(), batch[1][:, None] / 100
    with torch.no_grad():
        fake = other["generator"](torch.randn(12, problem.n_noise(other), generator=draw), condition)
    reals, fakes = other["critic"](torch.cat([x, fake]), torch.cat([condition, condition])).logits.split(12)
    of_critic.zero_grad()
    (F.relu(1 - reals).mean() + F.relu(1 + fakes).mean()).backward()
    for p in other["critic"].energy.parameters():
        p.grad = torch.zeros_like(p)
    of_critic.step()
    fake = other["generator"](torch.randn(12, problem.n_noise(other), generator=draw), condition)
    of_generator.zero_grad()
    (-other["critic"](fake, condition).logits.mean()).backward()
    of_generator.step()
    for (name, one), two in zip(module["generator"].state_dict().items(), other["generator"].state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=name)
