"""Every update rule under whatever comes: workers that join, leave and push in any order, and pushes of any weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from labkit.updates import BadPush, Barrier, Push, make_update
from tests.fuzz.helpers import LIMIT, fuzzed
from tests.updates.test_base import ALL, bits, called

pytestmark = LIMIT

MEMBERS = st.integers(0, 4)
N_PARAMS, N_BUFFERS = 5, 2
WEIGHTS = st.tuples(st.integers(0, 999), st.sampled_from([1.0, 0.1, 0.0, 1e-45, 1e-38, 65504.0, 1e15, 1e30, 3e38]))  # seed, scale
BAD = st.sampled_from(["nan", "infinity", "shape", "type", "version", "score", "no member"])


def coefficient(rule, push, bases, scores):
    """What the docstring of the rule says of a push, by hand; None for a rule that says it of rounds, or of each weight."""
    late, m, now = rule.version - push.base_version, len(bases), max(1, rule.version)
    if rule.name == "agwu":
        latest = {**scores, push.worker: push.score}
        mean = sum(latest.values()) / len(latest)
        quality = push.score / mean if mean else 1.0
        return quality * math.exp(push.base_version / now) / sum(math.exp(base / now) for base in bases.values())
    if rule.name == "fedasync":
        fading = {"polynomial": (1 + late) ** -0.5, "hinge": 1 / (10 * max(0, late - 4) + 1)}[rule.fading]
        return 0.6 * fading
    if rule.name == "downpour":
        return {"sgd": rule.lr or 1 / m}.get(rule.optimiser, 1 / m)
    if rule.name in ("ssp", "ringmaster"):
        return 1 / m
    if rule.name == "rescaled":
        return min(rule.most, (late + 1) / m**2)
    if rule.name == "easgd":
        return rule.beta / m
    return {"heloco": 0.7 / m, "delayed-nesterov": 0.7 / (getattr(rule, "period", None) or m)}.get(rule.name)


def machine(rules):
    class Merging(RuleBasedStateMachine):
        """The rule, a second one that is saved and loaded now and then, and who may push, from which weights."""

        @initialize(of=st.sampled_from(rules), m=st.integers(1, 4), weights=WEIGHTS, exact=st.booleans())
        def begin(self, of, m, weights, exact):
            self.it, self.other, self.log = make_update(of), make_update(of), []
            self.exact = exact
            self.first = self.vector(weights)
            for made in (self.it, self.other):
                made.n_exact = 1 if exact else 0
                made.start(self.first, range(m), N_BUFFERS, [3, 2])
            self.m = m
            self.ready = dict.fromkeys(range(m), self.it.weights)
            self.held: dict[int, list[Push]] = {}  # pushed, and neither merged nor dropped nor lost
            self.scores: dict[int, float] = {}
            self.clocks = dict.fromkeys(range(m), 0)

        def vector(self, weights, base=0.0):
            """[parameters | buffers]: buffers are variances, the last one may be a byte."""
            seed, scale = weights
            made = np.clip(base + np.random.default_rng(seed).uniform(-scale, scale, 7), -3.4e38, 3.4e38).astype(np.float32)
            made[N_PARAMS:] = np.abs(made[N_PARAMS:])
            if self.exact:
                made[-1] = int(made[-1]) % 256
            return made

        def call(self, name, *arguments):
            """Of both; that they do the same, bit for bit, and what every call must leave behind."""
            it, before, version = self.it, self.it.weights, self.it.version
            bytes_before = before.tobytes()
            replies = getattr(it, name)(*arguments)
            again = getattr(self.other, name)(*arguments)
            self.log.append((name, arguments))
            assert bits(it.state_dict()) == bits(self.other.state_dict())
            assert (it.merges, it.drops) == (self.other.merges, self.other.drops)
            replies = replies or []
            assert [(r.worker, r.version, r.weights.tobytes()) for r in replies] == [
                (r.worker, r.version, r.weights.tobytes()) for r in again or []
            ]
            assert it.version - version in (0, 1) and (it.version > version) == bool(it.merges or name == "restart")
            assert it.weights is before or it.version > version
            assert before.tobytes() == bytes_before and not it.weights.flags.writeable, "a version is never written"
            for merge in it.merges:
                push = self.taken(merge.worker)  # of nobody who has left, and once
                assert (merge.version, merge.samples) == (it.version, push.samples)
                assert 0 <= merge.staleness <= it.version - 1 - push.base_version and 0 <= merge.coefficient < math.inf
            for drop in it.drops:
                assert drop.coefficient == 0 and drop.samples == self.taken(drop.worker).samples
            for reply in replies:
                assert reply.worker in it.bases and reply.worker not in self.ready, "released is who waits"
                assert reply.version == it.version == it.bases[reply.worker] and not reply.weights.flags.writeable
                assert np.isfinite(reply.weights).all()
                self.ready[reply.worker] = reply.weights
            return replies

        def taken(self, worker):
            first, *others = self.held.pop(worker)
            if others:
                self.held[worker] = others
            return first

        @rule(worker=MEMBERS, comes=st.booleans())
        def come_or_go(self, worker, comes):
            """Also who is here already, and who is not."""
            self.join(worker) if comes else self.leave(worker)

        def join(self, worker):
            self.ready.pop(worker, None)
            if it_waits(self.it):
                self.held.pop(worker, None)
            self.clocks.pop(worker, None)
            self.clocks[worker] = min(self.clocks.values(), default=0)
            self.call("join", worker)

        def leave(self, worker):
            self.ready.pop(worker, None)
            if it_waits(self.it):
                self.held.pop(worker, None)
            self.scores.pop(worker, None)
            self.clocks.pop(worker, None)
            replies = self.call("leave", worker)
            assert all(reply.worker != worker for reply in replies) and worker not in self.it.bases

        @precondition(lambda self: self.ready)
        @rule(data=st.data(), step=WEIGHTS, score=st.sampled_from([0.0, 1e-300, 0.3, 0.5, 1.0]), samples=st.integers(0, 9))
        def push(self, data, step, score, samples):
            self.hand_in(data.draw(st.sampled_from(sorted(self.ready))), step, score, samples)

        @precondition(lambda self: self.ready)
        @rule(seed=st.integers(0, 99), n=st.integers(2, 8))
        def work_on(self, seed, n):
            """Some pushes of whoever may."""
            chance = np.random.default_rng(seed)
            for _ in range(n):
                if self.ready:
                    who = int(chance.choice(sorted(self.ready)))
                    self.hand_in(who, (seed, 1.0), float(chance.random()), int(chance.integers(9)))

        def hand_in(self, worker, step, score, samples):
            base, it = self.ready[worker], self.it
            weights = self.vector((it.version, 1.0) if it.collective else step, base)  # replicas are equal
            push = Push(worker, it.bases[worker], weights, None if not it.scored and samples % 2 else score, samples)
            bases, before = dict(it.bases), it.version
            expected = coefficient(it, push, bases, self.scores)
            del self.ready[worker]
            self.held.setdefault(worker, []).append(push)
            try:
                replies = self.call("push", push)
            except BadPush as error:  # what comes out is beyond float32: only of very large weights
                assert "beyond the range" in str(error) and max(it.largest, 1) > 1e15
                with pytest.raises(BadPush):
                    self.other.push(push)
                self.held[worker].pop()
                return self.leave(worker)
            self.scores[worker] = score
            late = before - push.base_version
            if it.name == "ringmaster":
                assert bool(it.drops) == (late >= (it.limit or 4 * len(bases)))
            if isinstance(it, Barrier) and late:
                assert it.drops and not it.merges, "its round has closed without it"
            if expected is not None and not it.drops:
                (merge,) = it.merges
                assert merge.worker == worker and merge.staleness == late
                assert merge.coefficient == pytest.approx(expected, rel=1e-6, abs=1e-12)
            if it.name == "ssp":
                self.clocks[worker] += 1
                for reply in replies:
                    assert self.clocks[reply.worker] <= min(self.clocks.values()) + it.bound
            if not isinstance(it, Barrier) and it.name != "ssp":
                assert [reply.worker for reply in replies] == [worker], "nobody waits"

        @precondition(lambda self: self.ready)
        @rule(data=st.data(), kind=BAD)
        def bad_push(self, data, kind):
            it, worker = self.it, data.draw(st.sampled_from(sorted(self.ready)))
            weights, version, score = self.ready[worker].copy(), it.bases[worker], 0.5
            if kind in ("nan", "infinity"):
                weights[data.draw(st.integers(0, 6))] = math.nan if kind == "nan" else -math.inf
            weights = weights[:-1] if kind == "shape" else weights.astype(np.float64) if kind == "type" else weights
            version, score = version + (kind == "version"), math.nan if kind == "score" else score
            before = bits(it.state_dict())
            with pytest.raises(BadPush):
                it.push(Push(99 if kind == "no member" else worker, version, weights, score, 3))
            assert bits(it.state_dict()) == before

        @precondition(lambda self: self.it.deadline is not None)
        @rule()
        def expire(self):
            self.call("expire")

        @rule(weights=WEIGHTS, data=st.data())
        def restart(self, weights, data):
            """After a milestone: what is held back is merged before, and everybody begins anew."""
            if len(self.log) % 4 or not self.it.bases:
                return
            self.call("finish")
            self.ready, self.held, self.scores = {}, {}, {}
            weights = self.vector(weights)
            members = sorted(self.it.bases)
            self.clocks = dict.fromkeys(members, 0)
            self.call("restart", weights, members)
            assert set(self.ready) == set(members) and self.it.weights.tobytes() == weights.tobytes()

        @rule()
        def save_and_load(self):
            state, again = self.it.state_dict(), make_update(self.it.config())
            again.n_exact = self.it.n_exact
            again.load_state_dict(state)
            assert bits(again.state_dict()) == bits(state)
            again.largest = self.it.largest
            self.other = again

        @invariant()
        def weights_are_numbers(self):
            assert np.isfinite(self.it.weights).all()
            assert not self.exact or (self.it.weights[-1] % 1 == 0 and 0 <= self.it.weights[-1] < 256)

        @invariant()
        def somebody_is_at_work(self):
            """No barrier waits for one who has left: of the members one may push, or a deadline will end the wait."""
            assert self.ready or not self.it.bases or self.it.deadline is not None
            assert set(self.ready) <= set(self.it.bases) and (set(self.held) <= set(self.it.bases) or not it_waits(self.it))

        def teardown(self):
            if not hasattr(self, "it"):
                return
            self.call("finish")
            assert not any(self.held.values()), "every push is merged, dropped, or lost with its worker"
            again = make_update(self.it.config())
            again.n_exact = self.it.n_exact
            again.start(self.first, range(self.m), N_BUFFERS, [3, 2])
            for name, arguments in self.log:
                getattr(again, name)(*arguments)
            assert bits(again.state_dict()) == bits(self.it.state_dict()), "the same log, the same weights"

    return Merging


def it_waits(rule):
    """Is what a worker has pushed lost with it while it is not merged? FedBuff has summed it up already."""
    return rule.name != "fedbuff"


def test_whoever_comes_and_goes_each_push_counts_once_as_its_rule_says():
    run_state_machine_as_test(machine(ALL), settings=fuzzed(15))


@pytest.mark.slow
@pytest.mark.parametrize("of", ALL, ids=called)
def test_whoever_comes_and_goes_each_push_counts_once_as_the_rule_says(of):
    run_state_machine_as_test(machine([of]), settings=fuzzed(40))
