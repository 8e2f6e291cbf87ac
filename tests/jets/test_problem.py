"""UCluster: the losses by their formulas, one clock for all schedules, k-means once, runs that are resumed and replayed bit for bit.

The tests of `clustering.py` and `defects.py` are here, too.

Used by pytest.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import labkit
from labkit.errors import ProblemError
from labkit.jets import UCluster, clustering
from labkit.jets.defects import DEFECTS, Replicas
from labkit.jets.files import write
from labkit.jets.problem import MASS_BINS
from labkit.problems import Clock
from labkit.problems.problem import noise, problem_from_config
from tests.helpers import ended, until
from tests.jets.helpers import bits, problem, sample

pytestmark = pytest.mark.usefixtures("cache")


def clock(passes, samples=None):
    return Clock(round(48 * passes) if samples is None else samples, 1000, passes, noise(0, 0))


# -- losses and schedules ----------------------------------------------------------------------------------------------


def test_the_problem_is_one_that_workers_can_train(few):
    of = problem(few)
    of.check()
    batch = of.load(np.arange(5))
    assert batch.x.shape == (5, 12, 8) and batch.bins.shape == (5, 1) and batch.label.shape == (5,)
    mass = of.dataset.batch(np.arange(5), fields=["mass"])["mass"]
    assert batch.bins[:, 0].tolist() == [int(np.floor(m / (200 / 19))) for m in mass] and len(MASS_BINS) == 19


def test_losses_are_those_of_the_papers(few):
    of = problem(few, cluster_weight=3.0, gamma=2.0, slope=2.0)
    module, batch = of.new_module(0), of.load(np.arange(16))
    with torch.no_grad():
        module.centres.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    module.eval()
    made = module(batch.x)
    p = made.logits.softmax(-1)[torch.arange(16), 0, batch.bins[:, 0]]
    focal = (10 * (1 - p) ** 2 * -p.log()).mean()
    found = of.losses(module, batch, clock(1.5))
    assert torch.isclose(found["pretext"], focal) and found["loss"] == found["pretext"]  # no k-means yet
    module.settled.fill_(1)
    d = ((made.embedding[:, None] - module.centres) ** 2).sum(-1)
    cluster = (d * torch.softmax(-4.0 * d, 1)).sum(1).mean()  # alpha is 2 slopes in the first epoch after k-means
    found = of.losses(module, batch, clock(1.5))
    assert torch.isclose(found["cluster"], cluster) and torch.isclose(found["loss"], focal + 3 * cluster)
    relative = problem(few, alpha_units="relative").losses(module, batch, clock(1.5))["cluster"]
    assert torch.isclose(relative, (d * torch.softmax(-4.0 * d / d.mean(), 1)).sum(1).mean())


def test_presets_are_those_of_the_script_and_of_the_run_that_was_logged(few):
    for preset, pretrain, first, later, weight in [("release", 11, 4.0, 6.0, 1), ("logged", 21, 10.0, 15.0, 10)]:
        of = problem(few, preset=preset, pretrain=None)
        assert (of.pretrain, of.cluster_weight, list(of.milestones())) == (pretrain, weight, [pretrain])
        assert of.alpha(clock(pretrain)) == first and of.alpha(clock(pretrain + 1.9)) == later
    assert problem(few, preset="logged", pretrain=2).pretrain == 2


def test_one_clock_drives_every_schedule(few):
    of = problem(few, halve_every=100, lr=1e-3)
    assert [of.rate(clock(0, n)) for n in (0, 99, 100, 250, 10_000)] == [1e-3, 1e-3, 5e-4, 2.5e-4, 1e-5]
    assert [of.momentum(clock(0, n)) for n in (0, 100, 10_000)] == [0.5, 0.25, 0.01]
    frozen = problem(few, halve_every=100, defects=["frozen-schedules", "frozen-alpha", "scaled-rate"], pretrain=10, slope=2)
    assert frozen.rate(clock(0, 250)) == 2e-3 and frozen.momentum(clock(0, 250)) == 0.5
    assert frozen.alpha(clock(12.0)) == frozen.alpha(clock(40.0)) == -16.0


def test_the_record_makes_the_problem_again(few):
    of = problem(few, preset="logged", pretext=["mass", "tau21"], defects=["frozen-alpha"])
    config = json.loads(json.dumps(of.config()))
    assert config["kind"] == "labkit.jets:UCluster" and config["slope"] == 5 and config["pretrain"] == 1
    again = problem_from_config(config)
    assert again.config() == of.config() and again.pretext == ["mass", "tau21"]


def test_other_numbers_are_sorted_into_bins_of_equal_size(few):
    of = problem(few, pretext=["mass", "trimmed", "n"], bins=5)
    batch = of.load(of.train_indices())
    counts = [np.bincount(batch.bins[:, at], minlength=5) for at in (1, 2)]
    assert batch.bins.shape[1] == 3 and all(len(c) == 5 and c.min() >= 3 for c in counts)
    assert of.new_module(0)(batch.x[:4]).logits.shape == (4, 3, 20)
    by_share = problem(few, mass_bins="share", bins=5)
    assert np.bincount(by_share.load(by_share.train_indices()).bins[:, 0]).min() >= 3 and by_share.new_module(0).bins == 5
    with pytest.raises(ValueError, match=r"pretext='tau12'.*Did you mean 'tau"):
        problem(few, pretext="tau12")
    for none in ([], ["mass", "n", "mass"]):
        with pytest.raises(ValueError, match=r"pretext=\[.*\]: give one number of a jet, or several, each once"):
            problem(few, pretext=none)
    with pytest.raises(ValueError, match=r"gamma=0\.5 must be 0 or at least 1"):
        problem(few, gamma=0.5)


def test_the_classes_of_jets_reach_no_loss(few):
    of = problem(few)
    batch, module = of.load(np.arange(16)), of.new_module(0)
    module.settled.fill_(1)
    found = [of.losses(module.eval(), batch._replace(label=label), clock(2.0))["loss"] for label in (batch.label, batch.label + 7)]
    assert found[0] == found[1] and of.dataset.label is None


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_clusters_are_assigned_to_classes_over_all_jets_at_once():
    clusters, label = np.array([2, 2, 2, 0, 0, 1, 1, 3]), np.array([0, 0, 1, 1, 1, 2, 2, 0])
    assert clustering.accuracy(clusters, label) == 6 / 8
    assert clustering.assignment(clustering.contingency(clusters, label)).tolist() == [1, 2, 0, -1]
    assert clustering.accuracy(label[::-1] * 0, label) == 3 / 8


def test_k_means_finds_clusters_and_copes_with_an_embedding_that_has_collapsed():
    generator = np.random.default_rng(0)
    z = np.concatenate([generator.normal(at, 0.1, (30, 2)) for at in (5, 0, 2)])
    centres = clustering.k_means(z, 3)
    assert np.abs(centres[:, 0] - [0, 2, 5]).max() < 0.1
    np.testing.assert_array_equal(centres, clustering.k_means(z, 3))
    assert clustering.k_means(np.zeros((10, 2)), 3).tolist() == [[0, 0]] * 3
    assert clustering.nearest(((z[:, None] - centres) ** 2).sum(-1)).tolist() == [2] * 30 + [0] * 30 + [1] * 30


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_settled_once_and_its_curve_knows_clusters(run):
    events, curve = run.events, run.curve()
    assert (events.kind == "settle").sum() == 1
    pushes = events[events.kind == "push"]
    assert {"pretext", "cluster"} <= set(
        json.loads(pushes.metrics.iloc[0]) if isinstance(pushes.metrics.iloc[0], str) else pushes.metrics.iloc[0]
    )
    settled = [bool(run.weights(version)["settled"]) for version in curve.version]
    assert settled == (curve.spread != 1).tolist() == (curve.accuracy > 0).tolist() and not settled[0] and settled[-1]
    first = run.weights(curve.version[settled.index(True)])["centres"]
    assert settled.count(True) > 1 and not np.array_equal(first, run.weights()["centres"])  # they are trained on


@pytest.mark.slow
@pytest.mark.parametrize("update", ["easgd", "allreduce"])
def test_updates_of_all_kinds_train_it_and_its_replicas_are_one(update, few, lab, tmp_path):
    of = problem(few, **{"easgd": {"pretext": "distill"}, "allreduce": {}}[update])
    equal = labkit.AllReduce(tolerance=0, sync_batchnorm=True)  # it fails where replicas differ in a bit
    rule = equal if update == "allreduce" else update
    run = ended(labkit.train(of, lab, update=rule, passes=2, runs=tmp_path, name=update, seed=3))
    assert (run.events.kind == "settle").sum() == 1 and run.weights()["settled"] == 1
    assert run.events.worker[run.events.kind == "push"].nunique() == 2
    np.testing.assert_array_equal(bits(run), bits(labkit.replay(run)))


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_from_its_centres_and_its_clock(few, lab, tmp_path):
    of = problem(few, padding="masked", attention="paper")
    run = labkit.train(of, lab, update="sgwu", passes=3, runs=tmp_path, name="stopped", seed=3, checkpoints=400)
    until(lambda: "settle" in run.events.kind.tolist(), 60)
    run.stop()
    again = ended(labkit.resume(run.path, lab))
    events = again.events
    assert (events.kind == "settle").sum() == 1 and again.weights()["settled"] == 1
    np.testing.assert_array_equal(bits(again), bits(labkit.replay(again)))


def test_ranks_that_differ_are_emulated_by_replicas(few):
    of = problem(few, defects=["kmeans-per-rank"])
    module = of.new_module(5)
    one, other = module
    assert isinstance(module, Replicas) and all(
        torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
    alone = problem(few, defects=["reinitialised"])
    apart = alone.new_module(5)
    assert not torch.equal(apart[0].a.linear.weight, apart[1].a.linear.weight) and torch.equal(
        apart[0].a.linear.weight, one.a.linear.weight
    )
    alone.settle(apart, clock(1.0))  # ranks of which k-means is not told are those of the first
    fitted = clustering.k_means(alone.embeddings(apart[0], alone.train_indices()), 3)
    assert all(network.settled == 1 and torch.equal(network.centres, torch.from_numpy(fitted).float()) for network in apart)
    of.settle(module, clock(1.0))
    assert not torch.equal(one.centres, other.centres) and one.settled == other.settled == 1
    orders = [np.lexsort(network.centres.detach().numpy().T[::-1]).tolist() for network in module]
    assert orders[0] != orders[1]  # cluster 0 of one rank is another of the next
    batch, optimisers = of.load(of.train_indices()[:16]), of.optimisers(module)
    before = one.centres.detach().clone(), other.centres.detach().clone()
    assert set(of.step(module, batch, optimisers, clock(1.0))) == {"loss", "pretext", "cluster"}
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)
    torch.testing.assert_close(one.centres - before[0], other.centres - before[1], rtol=0, atol=1e-6)  # they stay apart
    assert len(DEFECTS) == 7 and 0 <= of.evaluate(module, batch)["score"] <= 1


def test_a_rank_that_has_a_batch_more_is_alone_with_it(few):
    of, plain = problem(few, defects=["uneven-batches"]), problem(few)
    batch = of.load(of.train_indices()[:16])
    half = type(batch)(*(part[:8] for part in batch))
    for begins, alone in ((0, False), (32, True)):  # of 48 jets: the third step ends the pass
        module, single = of.new_module(5), plain.new_module(5)
        optimisers, weight, found = of.optimisers(module), module[0].a.linear.weight, []
        optimisers[0].register_step_pre_hook(lambda *_, weight=weight, found=found: found.append(weight.grad.clone()))
        of.step(module, batch, optimisers, clock(begins / 48))
        plain.losses(single, half, clock(begins / 48))["loss"].backward()
        assert torch.allclose(found[0], single.a.linear.weight.grad / 2) == alone


def test_jets_without_substructure_have_no_pretext_of_it(tmp_path):
    jets = sample()[:30]
    del jets.of_jet["substructure"]
    path = write(tmp_path / "plain.parquet", jets, rows=10)
    with pytest.raises(ProblemError, match="these jets have no substructure"):
        UCluster(path, pretext="trimmed", score_samples=5).load(np.arange(3))
    UCluster(path, score_samples=5).load(np.arange(3))
