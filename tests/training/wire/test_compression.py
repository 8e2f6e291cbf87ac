"""Weights on the wire: what 16 bits keep, and what is done while they are under way; live, replayed and simulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import labkit
from labkit import chaos
from labkit.errors import LabError, UpdateError
from labkit.training import supervisor
from labkit.training.wire import compression
from labkit.updates import AGWU, FedAsync
from tests.helpers import Slow, cut_off, ended, net_with_statistics, problem, stopped_at_last
from tests.simulation.test_exact import same

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUMBERS = np.concatenate(
    [
        np.random.default_rng(0).standard_normal(70_001).astype(np.float32) * scale
        for scale in (1.0, 1e-3, 1e-6, 1e-9, 3e4, np.float32(1e-40))
    ]
    + [np.array([0.0, -0.0, 1.0, -1.0, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-11, 65504, 2**-24, 2**-25], np.float32)]
).clip(-65504, 65504)


# -- 16 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALVES)
def test_halves_are_those_of_torch_bit_for_bit(kind):
    wire = compression.pack(NUMBERS, kind)
    expected = torch.from_numpy(NUMBERS).to(HALVES[kind])
    assert wire.nbytes == compression.n_bytes(kind, len(NUMBERS)) == 2 * len(NUMBERS)
    np.testing.assert_array_equal(wire, expected.view(torch.int16).numpy().view(np.uint16))
    back = np.empty_like(NUMBERS)
    compression.unpack(wire, kind, back)
    np.testing.assert_array_equal(back.view(np.uint32), expected.float().numpy().view(np.uint32))


def test_float32_is_sent_as_it_is():
    assert compression.pack(NUMBERS, "float32") is NUMBERS and compression.n_bytes("float32", 7) == 28


@pytest.mark.parametrize("kind", HALVES)
def test_a_change_keeps_its_precision_however_small_it_is(kind):
    """Rounded weights would lose it: it is a ten-thousandth of them."""
    base = np.random.default_rng(1).uniform(1, 2, 5000).astype(np.float32)
    change = (1e-4 * np.random.default_rng(2).standard_normal(5000)).astype(np.float32)
    given, wire = compression.pack(base, kind), compression.buffer(kind, 5000)
    began, got = np.empty_like(base), np.empty_like(base)
    compression.unpack(given, kind, began)
    compression.add_change(base, wire, kind, compression.pack_change(began + change, given, kind, wire, 5000), got, 5000)
    rounding = {"bfloat16": 2**-8, "float16": 2**-10}[kind]
    assert (np.abs(got - base - change) <= rounding * np.abs(change) + 2e-7 * base).all()
    compression.add_change(base, wire, kind, compression.pack_change(began, given, kind, wire, 5000), got, 5000)
    np.testing.assert_array_equal(got, base), "nothing was trained: nothing moves, whatever the pull has rounded away"


@pytest.mark.parametrize("kind", HALVES)
def test_a_variance_that_all_but_vanishes_stays_above_zero(kind):
    """Sent as a change from its rounded old value it would end below zero, and the network in eval mode in NaN."""
    base, now = np.array([0.5, 1.0039, 3.0], np.float32), np.array([0.5, 1e-7, 2.9], np.float32)
    given, wire, got = compression.pack(base, kind), compression.buffer(kind, 3), np.empty(3, np.float32)
    compression.add_change(base, wire, kind, compression.pack_change(now, given, kind, wire, 1), got, 1)
    assert (got[1:] >= 0).all() and got[2] == pytest.approx(2.9, rel=2**-8) and got[0] == 0.5


@pytest.mark.parametrize("kind", HALVES)
def test_a_buffer_that_comes_back_as_it_was_sent_has_its_bits(kind):
    base, got, wire = np.array([0.1, 1 / 3, 0.7], np.float32), np.empty(3, np.float32), compression.buffer(kind, 3)
    compression.unpack(given := compression.pack(base, kind), kind, now := np.empty(3, np.float32))
    rounded, now[2] = now.copy(), 0.5
    shift = compression.pack_change(now, given, kind, wire, 0)
    compression.add_change(base, wire, kind, shift, got, 0)
    assert got.tolist() == [*base[:2].tolist(), 0.5] != rounded.tolist()
    compression.add_change(base, wire, kind, shift, got, 0, still=False)  # as in records of format 4
    assert got.tolist() == [*rounded[:2].tolist(), 0.5]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000])
def test_what_is_no_number_stays_so(kind, bits):
    bad = np.array([1.0, 0.0, 2.0], np.float32)
    bad.view(np.uint32)[1] = bits
    given, wire, got = compression.pack(np.ones(3, np.float32), kind), compression.buffer(kind, 3), np.empty(3, np.float32)
    compression.add_change(np.ones(3, np.float32), wire, kind, compression.pack_change(bad, given, kind, wire, 3), got, 3)
    assert not np.isfinite(got[1]) and np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-4, 1.0, 1e5, 1e30])
def test_a_float16_change_is_scaled_whatever_its_size(size):
    """Far below and far above what float16 can hold; those a million times smaller than the largest keep ten bits too."""
    change = (size * np.random.default_rng(3).uniform(0.5, 1, 3000)).astype(np.float32)
    change[::2] *= np.float32(1e-6)
    zero, wire, got = np.zeros(3000, np.float32), compression.buffer("float16", 3000), np.empty(3000, np.float32)
    shift = compression.pack_change(change, compression.pack(zero, "float16"), "float16", wire, 3000)
    compression.add_change(zero, wire, "float16", shift, got, 3000)
    if 1e-15 < size < 1e15:
        np.testing.assert_allclose(got, change, rtol=2**-10)
        assert 2.0**14 <= float(wire.view(np.float16).max()) < 2.0**15
    else:  # beyond that nobody trains: it may be lost, and it may be refused, but it is nothing else
        assert ((got == 0) | ~np.isfinite(got) | (np.abs(got / change - 1) < 2**-9)).all() and abs(shift) == compression.SHIFTS


def test_what_float16_cannot_hold_is_said_before_it_is_sent():
    with pytest.raises(UpdateError, match=r"7e\+04 does not fit into float16 \(65504\). Use exchange='bfloat16'"):
        compression.pack(np.array([1.0, -70_000], np.float32), "float16")
    assert compression.pack(np.array([-70_000], np.float32), "bfloat16").size == 1


# -- live, again, and simulated ----------------------------------------------------------------------------------------


@pytest.fixture
def lab():
    with labkit.connect("threads", 3, slowdown=[1, 1, 3]) as lab:
        yield lab


@pytest.fixture
def train(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    with stopped_at_last(runs=tmp_path) as begin:
        yield lambda *args, **options: ended(begin(args[0] if args else problem(net_with_statistics, lr=0.02), lab, **options))


ROUNDS = [("agwu", "bfloat16", 1)]
RARE = [
    ("sgwu", "float16", 0),
    ("fedbuff", "float16", 1),
    ("diloco", "bfloat16", 1),
    ("agwu", "bfloat16", 0),
    ("agwu", "float32", 1),
    ("easgd", "bfloat16", 2),
    ("localsgd", "float32", 1),
]
RARE += [("ringmaster", "float32", 1), ("downpour", "bfloat16", 1)]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("update", "kind", "overlap"), [*ROUNDS, *(pytest.param(*rare, marks=pytest.mark.slow) for rare in RARE)])
def test_a_run_counts_every_sample_learns_and_can_be_replayed(update, kind, overlap, train):
    run = train(update=update, exchange=kind, overlap=overlap, passes=8, local_steps=3, name="r", seed=5)
    events, samples = run.events, 8 * len(run.problem().train_indices())
    pushes, merges = (events[events.kind == what] for what in ("push", "merge"))
    assert merges.samples.sum() == samples == run.status()["samples"] and chaos.audit(run) == []
    assert set(pushes.bytes) == {compression.n_bytes(kind, run.layout.size)}
    assert (run.config["exchange"], run.config["overlap"]) == (kind, overlap)
    curve = run.curve()
    assert curve.score.iloc[-1] > curve.score.iloc[0] + 0.2
    assert pushes.hidden_s.notna().all() == (overlap > 0)
    if overlap:  # what is not asked for is measured while the push is under way, now and then
        late = events[events.kind == "score"]
        assert len(late) > 0 and pushes.score.isna().all() if update != "agwu" else pushes.score.notna().all()
    assert same(run, labkit.replay(run))


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("update", ["agwu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedasync", "localsgd"))])
@pytest.mark.slow
def test_a_simulation_with_real_numerics_exchanges_as_the_run_did(update, train):
    """One worker's arrivals leave nothing to chance: the same weights, in 16 bits and with steps ahead."""
    run = train(workers=[0], update=update, exchange="bfloat16", overlap=1, local_steps=3)
    again = labkit.simulate(run, numerics=True)
    np.testing.assert_array_equal(again.flat(), run.flat())
    assert again.events.query("kind == 'push'").bytes.tolist() == run.events.query("kind == 'push'").bytes.tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_half_the_bytes_cost_no_accuracy(train):
    scores = {
        kind: train(update="sgwu", exchange=kind, passes=8, local_steps=3, name=kind, seed=5).summary()["score"]
        for kind in compression.DTYPES
    }
    assert max(scores.values()) - min(scores.values()) < 0.06, scores


@pytest.mark.usefixtures("cache")
@pytest.mark.slow
def test_a_worker_that_is_lost_in_the_middle_of_an_exchange_holds_up_nobody(train, monkeypatch):
    cut_off(monkeypatch, after=2)
    run = train(problem(kind=Slow), update="agwu", exchange="bfloat16", overlap=1, passes=6, local_steps=2)
    assert run.status()["samples"] == 6 * len(run.problem().train_indices()) and chaos.audit(run) == []
    assert len(run.events.query("kind == 'leave' and worker == 1 and message != ''"))


@pytest.mark.usefixtures("cache")
def test_a_weight_that_float16_cannot_hold_fails_the_run_by_name(train):
    with pytest.raises(LabError, match=r"version 0: a weight or buffer of 1e\+05 does not fit into float16"):
        train(problem(huge), exchange="float16", passes=1)


def huge(shape, n_classes):
    made = net_with_statistics(shape, n_classes)
    made.register_buffer("steps", torch.tensor([1e5]))
    return made


@pytest.mark.usefixtures("cache")
def test_what_cannot_be_is_refused_before_anything_starts(lab, tmp_path):
    refused = {
        r"exchange='bf16' is not known. Known: float32, bfloat16, float16. Did you mean 'bfloat16'": {"exchange": "bf16"},
        r"overlap=-1 must be at least 0": {"overlap": -1},
        r"overlap=True must be": {"overlap": True},
        r"with sgwu nothing can be done while a push is under way": {"overlap": 1, "update": "sgwu"},
        r"allreduce exchanges gradients within every step": {"exchange": "bfloat16", "update": "allreduce"},
    }
    for words, options in refused.items():
        with pytest.raises(ValueError, match=words):
            labkit.train(problem(), lab, runs=tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_a_rule_that_asks_for_the_score_must_get_it():
    rule = AGWU()
    rule.start(np.zeros(3, np.float32), [0])
    with pytest.raises(UpdateError, match="its score is None"):
        rule.push(labkit.updates.Push(0, 0, np.ones(3, np.float32), None, 5))


@pytest.mark.usefixtures("cache")
def test_whatever_goes_wrong_in_a_rule_fails_the_run_by_name(train):
    """A user's rule that weighs by the score, and does not say that it asks for it."""

    class Curious(FedAsync):
        name = "curious"

        def _merge(self, push):
            self._publish(push.weights.copy(), [(push, push.score)])
            return self._release([push.worker])

    with pytest.raises(LabError, match=r"worker \d at version \d+: TypeError\(.*NoneType"):
        train(update=Curious(), passes=20, local_steps=1)
