"""A partition under whatever comes: workers that join and leave, in any order, with any measured speed."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from labkit.partition import IDPA, UDPA, make_partition
from tests.fuzz.helpers import LIMIT, few_or_many, fuzzed
from tests.updates.test_base import bits

pytestmark = LIMIT

WORKERS = st.integers(0, 6)
SECONDS = st.one_of(
    st.floats(1e-3, 1e3),
    st.sampled_from([0.0, 5e-324, 1e-300, 1e300, 1.7e308, math.inf, math.nan, 1e-18, 1e18]),
    st.floats(min_value=0.0),
)


class Partitioned(RuleBasedStateMachine):
    """Each sample is held by one worker or by none, whatever happens, and a log of it leads to the same again."""

    @initialize(
        n=st.integers(9, 60),
        m=st.integers(1, 3),
        seed=st.integers(0, 3),
        batches=st.integers(1, 3),
        smoothing=st.integers(1, 3),
        declared=st.one_of(st.none(), st.lists(st.floats(1e-3, 1e3) | st.sampled_from([1e-300, 1e300]), min_size=3, max_size=3)),
        uniform=st.booleans(),
        stratified=st.booleans(),
        grouped=st.booleans(),
    )
    def begin(self, n, m, seed, batches, smoothing, declared, uniform, stratified, grouped):
        made = UDPA(stratified=stratified and not grouped)
        if not uniform:
            made = IDPA(batches, speeds=declared and declared[:m], smoothing=smoothing, stratified=stratified and not grouped)
        units = None
        if grouped:
            chance = np.random.default_rng(n)
            units = [0, *sorted(chance.choice(np.arange(1, n), size=min(n - 1, 7), replace=False).tolist()), n]
        self.start = {"seed": seed, "labels": np.arange(n) % 3, "units": units}
        self.n, self.m, self.units, self.it, self.log = n, m, units, made, []
        made.start(n, range(m), **self.start)
        given = self.call("allocate", list(range(m)))  # a run begins when all are there
        self.known = {worker: given[worker].tolist() for worker in given}  # the shard of each, as its worker holds it
        assert all(self.known.values()), "nobody begins with nothing"

    def call(self, name, *arguments):
        self.log.append((name, arguments))
        return getattr(self.it, name)(*arguments)

    @precondition(lambda self: self.it.workers)
    @rule(data=st.data())
    def release(self, data):
        """Some workers are about to begin their next local passes, as the coordinator has it."""
        workers = data.draw(st.lists(st.sampled_from(self.it.workers), min_size=1, unique=True))
        seconds = {worker: data.draw(SECONDS) for worker in workers if data.draw(st.booleans())}
        pool, whole = len(self.it.pool), {worker: self.it.shard(worker) for worker in workers}
        for worker in workers:
            n = self.call("reclaim", worker)
            assert 0 <= n < max(1, len(whole[worker])), "nobody is left without samples"
            pool += n
            self.known[worker] = whole[worker][: len(whole[worker]) - n].tolist()
        given = self.call("allocate", workers, seconds)
        assert set(given) == set(workers)
        for worker in workers:
            assert given[worker].dtype == np.int64
            self.known[worker] += given[worker].tolist()
        assert len(self.it.pool) == pool - sum(map(len, given.values())), "a batch is what leaves the pool"

    @rule(worker=WORKERS, seconds=st.one_of(st.none(), SECONDS))
    def join(self, worker, seconds):
        if worker not in self.it.workers:
            self.known[worker] = []
        self.call("join", worker, seconds)

    @rule(worker=WORKERS)
    def leave(self, worker):
        self.call("leave", worker)
        self.known.pop(worker, None)

    @rule()
    def save_and_load(self):
        state, again = self.it.state_dict(), make_partition(self.it.config())
        again.load_state_dict(state)
        assert bits(again.state_dict()) == bits(state)
        self.it = again

    @invariant()
    def each_sample_is_held_once(self):
        shards = {worker: self.it.shard(worker) for worker in self.it.workers}
        together = np.concatenate([self.it.pool, *shards.values()])
        assert len(together) == self.n and (np.bincount(together.astype(int), minlength=self.n) == 1).all()
        assert {worker: len(shard) for worker, shard in shards.items()} == self.it.held
        assert {worker: shard.tolist() for worker, shard in shards.items()} == self.known, "a worker holds what it was given"

    @invariant()
    def units_are_whole(self):
        if self.units is None:
            return
        begins = dict(zip(self.units, np.diff(self.units).tolist(), strict=False))
        for part in [self.it.pool, *map(self.it.shard, self.it.workers)]:
            at, part = 0, part.tolist()
            while at < len(part):
                n = begins[part[at]]
                assert part[at : at + n] == list(range(part[at], part[at] + n))
                at += n

    @invariant()
    def what_is_known_is_a_speed(self):
        assert all(0 < seconds < math.inf for seconds in self.it.seconds.values())
        assert set(self.it.seconds) <= set(self.it.workers) and self.it.late <= set(self.it.workers)

    def teardown(self):
        if not hasattr(self, "it"):
            return
        again = make_partition(self.it.config())
        again.start(self.n, range(self.m), **self.start)
        for name, arguments in self.log:
            getattr(again, name)(*arguments)
        assert bits(again.state_dict()) == bits(self.it.state_dict()), "the same log, the same partition"
        for _ in range(60):  # whoever is here goes on: all that is to be had is handed out
            for worker in list(self.it.workers):
                self.it.reclaim(worker)
                self.it.allocate([worker])
        assert not self.it.workers or not len(self.it.pool), "samples lie idle for ever"
        assert all(self.it.held.values()) or len(self.it.workers) > self.n or self.units, "a worker waits for ever"


@few_or_many(10, 200)
def test_whoever_comes_and_goes_each_sample_is_held_once(examples):
    run_state_machine_as_test(Partitioned, settings=fuzzed(examples))
