"""Events of two jets: how they are made, the network by its shapes and masks, runs with a milestone, and the LHC Olympics' file.

Used by pytest.
"""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

import labkit
from labkit.errors import DataError
from labkit.jets.anomaly import LEAST_EVENTS, MASS_EDGES, Anomalies, AnomalyNet, events, pairs, signal_shares
from labkit.jets.files import SUBSTRUCTURE, together, write
from labkit.problems import Clock
from labkit.problems.problem import noise
from tests.helpers import ended
from tests.jets.helpers import sample

pytestmark = pytest.mark.usefixtures("cache")


def of_classes(names, n):
    jets = sample()
    return jets[np.flatnonzero(np.isin(np.array(jets.classes)[jets.label], list(names)))[: 2 * n]]


def made(n=40, n_signal=20, particles=14):
    """Pairs of quarks and gluons, and of tops."""
    background, signal = of_classes("qg", n), of_classes("t", n_signal)
    ones, others = (np.arange(at, 2 * n, 2) for at in (0, 1))
    some = pairs(background[ones], background[others], np.zeros(n, int), particles)
    rare = pairs(signal[ones[:n_signal]], signal[others[:n_signal]], np.ones(n_signal, int), particles)
    both = np.random.default_rng(0).permutation(n + n_signal)
    return together([some, rare])[both]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("events") / "events.parquet", made(), rows=20)


def problem(file, **settings):
    return Anomalies(file, **{"clusters": 4, "pretrain": 1.0, "batch_size": 10, "score_samples": 8, "neighbours": 4, **settings})


def test_events_hold_the_hardest_of_both_jets_and_the_heavier_jet_first():
    jets = made()
    pair = jets.of_jet["pair"].reshape(-1, 2, 5)
    assert (pair[:, 0, 0] >= pair[:, 1, 0]).all() and jets.classes == ("background", "signal")
    assert set(np.unique(jets.of_jet["member"])) == {0, 1} and jets.constituents.shape[1:] == (14, 4)
    phi = np.arctan2(jets.constituents[..., 1], jets.constituents[..., 0])
    own = np.take_along_axis(pair[..., 3], jets.of_jet["member"].astype(int), 1)
    assert np.abs((phi - own + np.pi) % (2 * np.pi) - np.pi).max() < 1.2  # rad: each is near the axis of its own jet
    bare = sample()[:4]
    del bare.of_jet["substructure"]
    with pytest.raises(DataError, match="need their substructure"):
        pairs(bare, bare, [0] * 4)
    many = sample()[np.flatnonzero(sample().of_jet["n"] > 100)[:4]]
    with pytest.raises(DataError, match="4 jets have more constituents than the 100 that are stored, so that the 150 hardest"):
        pairs(many, many, [0] * 4, 150)


def test_each_constituent_is_to_be_said_the_mass_of_its_own_jet(file):
    of = problem(file)
    of.check()
    batch, read = of.load(np.arange(6)), of.dataset.batch(np.arange(6))
    pair = read["pair"].reshape(6, 2, 5)
    for event in range(6):
        for slot in range(14):
            mass = pair[event, int(read["member"][event, slot]), 0]
            assert batch.bins[event, slot] == (mass >= MASS_EDGES).sum()
    assert batch.x.shape == (6, 14, 7) and batch.event.shape == (6, 4)
    torch.testing.assert_close(batch.event[:, 0], torch.from_numpy(np.log(pair[:, 0, 0])))


def test_the_network_gives_logits_for_each_constituent_and_counts_no_empty_slot():
    torch.manual_seed(0)
    x, event = torch.randn(4, 12, 7), torch.randn(4, 4)
    x[1, 7:] = 0
    network = AnomalyNet(2, 5, 4, "faithful", "masked").eval()
    made = network(x, event)
    assert made.embedding.shape == (4, 2) and made.logits.shape == (4, 12, 21) and made.distances.shape == (4, 5)
    longer = network(torch.cat([x, torch.zeros(4, 5, 7)], 1), event)
    torch.testing.assert_close(longer.embedding, made.embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(longer.logits[:, :12][x[..., 2] != 0], made.logits[x[..., 2] != 0], rtol=1e-4, atol=1e-5)
    assert not made.logits[1, 7:].any()


@pytest.mark.slow
def test_a_run_is_settled_and_knows_its_purest_cluster(file, lab, tmp_path):
    how = {"update": "fedasync", "passes": 1.5, "checkpoints": 3, "runs": tmp_path, "name": "events"}
    run = ended(labkit.train(problem(file), lab, **how))
    assert (run.events.kind == "settle").sum() == 1
    assert run.problem().dataset.n_test < LEAST_EVENTS and (run.curve().signal_share == 0).all()  # too few to say


def test_the_purest_cluster_of_a_set(file):
    of = problem(file, clusters=2)
    module, indices = of.new_module(0), of.train_indices()
    of.settle(module, Clock(0, 100, 1.0, noise(0, 0)))
    z, label = of.embeddings(module, indices), of.dataset.batch(indices, fields=["label"])["label"]
    clusters = ((z[:, None] - module.centres.detach().numpy()) ** 2).sum(-1).argmin(1)
    shares = [label[clusters == at].mean() for at in (0, 1) if (clusters == at).sum() >= LEAST_EVENTS]
    assert of.measure(module, indices)["signal_share"] == pytest.approx(max(shares)) and max(shares) > 0


def test_the_purest_cluster():
    assert signal_shares(np.array([0, 0, 2, 2, 2]), np.array([0, 1, 1, 1, 0])).tolist() == [0.5, 0, 2 / 3]
    assert signal_shares(np.array([0, 0, 0, 1]), np.array([0, 1, 0, 1]), 2).tolist() == [1 / 3, 0]  # one event is no cluster
    assert signal_shares(np.array([0, 1]), np.array([0, 0])).tolist() == [0, 0]


def test_jets_are_no_events():
    with pytest.raises(DataError, match="are jets, not events of two"):
        Anomalies("jets")


def test_the_file_of_the_lhc_olympics(tmp_path):
    pytest.importorskip("fastjet", reason="needs labkit[jets]")
    jets, n = of_classes("qgt", 6), 6
    table = np.zeros((n + 1, 2101))
    for event in range(n):
        momenta = []
        for turned, at in ((0.0, 2 * event), (2.5, 2 * event + 1)):
            px, py, pz, _ = jets.constituents[at][jets.constituents[at][:, 3] > 0].astype(float).T
            pt = np.hypot(px, py)
            phi = (np.arctan2(py, px) - jets.of_jet["phi"][at] + turned + np.pi) % (2 * np.pi) - np.pi
            momenta += np.stack([pt, np.arcsinh(pz / pt), phi], 1).tolist()
        table[event, : 3 * len(momenta)] = np.ravel(momenta)
        table[event, -1] = event % 2
    table[n, :3] = 100.0, 0.1, 0.2  # one jet alone
    with h5py.File(tmp_path / "events.h5", "w") as file:
        file["df/block0_values"] = table
    (found,) = events(tmp_path / "events.h5")
    assert found.label.tolist() == [0, 1] * 3
    mass = found.of_jet["pair"].reshape(-1, 2, 5)[..., 0]
    wanted = np.sort(jets.of_jet["mass"][: 2 * n].reshape(n, 2), 1)[:, ::-1]
    few = (jets.of_jet["n"][: 2 * n].reshape(n, 2) <= 100).all(1)
    np.testing.assert_allclose(mass[few], wanted[few], atol=12)  # GeV: massless hadrons, another radius
    assert "tau21" in SUBSTRUCTURE and (found.of_jet["pair"][:, [4, 9]] > 0).all()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(DataError, match="no table of 700 hadrons"):
        list(events(tmp_path / "other.h5"))
