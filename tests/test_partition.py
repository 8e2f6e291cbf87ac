import copy

import numpy as np
import pytest

from labkit.errors import PartitionError
from labkit.partition import IDPA, UDPA, largest_remainder, make_partition, shuffled


def course(partition, n, speeds, passes, seed=0, noise=0.0):
    """Run a partition under a barrier with true `speeds`; returns T per pass and worker."""
    workers, rng = list(range(len(speeds))), np.random.default_rng(seed)
    partition.start(n, workers, seed=seed)
    seconds, times = {}, []
    for _ in range(passes):
        partition.allocate(workers, seconds)
        true = [(1 / speed) * np.exp(noise * rng.standard_normal()) for speed in speeds]
        times.append([partition.held[w] * true[w] for w in workers])
        seconds = dict(zip(workers, true, strict=True))
    return np.array(times)


def assert_exact_cover(partition, n):
    everything = np.concatenate([partition.shard(worker) for worker in partition.workers])
    assert sorted(everything) == list(range(n))


def test_largest_remainder_by_hand():
    assert largest_remainder(10, [1, 1, 1]).tolist() == [4, 3, 3]
    assert largest_remainder(7, [1, 4]).tolist() == [1, 6]  # 1.4 and 5.6
    assert largest_remainder(5, [0, 0]).tolist() == [3, 2]  # no shares: equal


@pytest.mark.parametrize("rule", [UDPA(), UDPA(stratified=True), IDPA(3), IDPA(5, speeds=[1, 2, 9]), IDPA(1)])
@pytest.mark.parametrize("n", [17, 100, 101])
def test_shards_are_disjoint_and_cover_everything(rule, n):
    rule.start(n, [0, 1, 2], seed=3, labels=np.arange(n) % 2)
    for _ in range(rule.batches):
        rule.allocate([0, 1, 2], {0: 0.1, 1: 0.25, 2: 0.7})
    assert_exact_cover(rule, n)
    assert len(rule.pool) == 0


def test_udpa_gives_equal_shares_at_once():
    rule = UDPA()
    rule.start(17, [0, 1, 2])
    assert sorted(len(part) for part in rule.allocate([0, 1, 2]).values()) == [5, 6, 6]
    assert all(len(part) == 0 for part in rule.allocate([0, 1, 2]).values())


def test_idpa_by_hand():
    """N = 120, A = 3, speeds 1:3 declared equal: 20+20; then T = 80/(1+3) = 20, targets 20 and 60: 0 and 40; then 30 and 90."""
    rule = IDPA(3, speeds=[1, 1])
    rule.start(120, [0, 1])
    assert {w: len(i) for w, i in rule.allocate([0, 1]).items()} == {0: 20, 1: 20}
    measured = {0: 1.0, 1: 1 / 3}
    assert {w: len(i) for w, i in rule.allocate([0, 1], measured).items()} == {0: 0, 1: 40}
    assert {w: len(i) for w, i in rule.allocate([0, 1], measured).items()} == {0: 10, 1: 30}
    assert_exact_cover(rule, 120)


def test_idpa_clamps_and_rescales():
    """Worker 0 holds 30 of 60 when its target for 80 samples is 8: it gets nothing, the others share the 20 exactly."""
    rule = IDPA(2, speeds=[3, 1, 2])
    rule.start(80, [0, 1, 2])
    assert {w: len(i) for w, i in rule.allocate([0, 1, 2]).items()} == {0: 20, 1: 7, 2: 13}
    second = rule.allocate([0, 1, 2], {0: 9.0, 1: 1.0, 2: 1.0})
    assert len(second[0]) == 0 and sum(len(part) for part in second.values()) == 40
    assert_exact_cover(rule, 80)


@pytest.mark.parametrize("batches", [2, 4, 10])
def test_idpa_balances_from_the_second_allocation_on_and_is_never_below_udpa(batches):
    speeds = np.random.default_rng(1).uniform(0.5, 1.5, 8)
    idpa = course(IDPA(batches, speeds=np.ones(8)), 8000, speeds, batches + 2)
    udpa = course(UDPA(), 8000, speeds, batches + 2)
    balance, equal = idpa.mean(1) / idpa.max(1), udpa.mean(1) / udpa.max(1)
    assert (balance[1:] >= 0.95).all()
    assert (balance >= equal - 1e-3).all()


def test_smoothing_makes_idpa_steadier_under_noise():
    def final(smoothing, seed):
        rule = IDPA(8, smoothing=smoothing)
        course(rule, 4000, [1, 2], 8, seed, noise=0.3)
        return rule.seconds[0] / rule.seconds[1]

    noisy, smooth = (np.std([final(s, seed) for seed in range(40)]) for s in (1, 7))
    assert smooth < noisy


def test_the_seconds_of_a_worker_are_the_median_of_its_last_measurements():
    """The first is a probe, which the first true pass replaces."""
    rule, measured = IDPA(8, smoothing=3), [1.0, 9.0, 2.0, 8.0, 30.0, 7.0]
    rule.start(1000, [0, 1], seed=0)
    for number, seconds in enumerate(measured):
        rule.allocate([0, 1], {0: seconds, 1: 1.0})
        assert rule.seconds[0] == np.median(measured[max(min(1, number), number - 2) : number + 1]) and rule.seconds[1] == 1.0


def test_without_a_barrier_each_worker_follows_its_own_count():
    """Worker 1 is four times slower: worker 0 is at its third batch when worker 1 comes for its second. Nothing is lost."""
    rule = IDPA(4)
    rule.start(1000, [0, 1], seed=0)
    rule.allocate([0, 1], {0: 1.0, 1: 4.0})
    held = [rule.held[0]]
    for _ in range(3):
        rule.allocate([0], {0: 1.0})
        held.append(rule.held[0])
    assert held == [200, 400, 600, 800] and rule.held[1] == 50
    for _ in range(3):
        rule.allocate([1], {1: 4.0})
    assert rule.held == {0: 800, 1: 200}
    assert_exact_cover(rule, 1000)


@pytest.mark.parametrize("seed", range(5))
def test_without_a_barrier_whatever_the_order_everything_is_handed_out_in_the_end(seed):
    rng, rule = np.random.default_rng(seed), IDPA(5)
    rule.start(997, [0, 1, 2], seed=seed)
    rule.allocate([0, 1, 2], {0: 1.0, 1: 1.0, 2: 1.0})
    for _ in range(200):
        worker = int(rng.integers(3))
        rule.allocate([worker], {worker: float(rng.uniform(0.2, 5))})
    assert_exact_cover(rule, 997)


@pytest.mark.parametrize("make", [UDPA, lambda: IDPA(2)])
def test_when_all_is_handed_out_a_thousand_exchanges_change_and_keep_nothing(make):
    rule = make()
    rule.start(17, [0, 1, 2])
    for _ in range(2):
        rule.allocate([0, 1, 2], {0: 1.0, 1: 2.0, 2: 3.0})
    shards = {worker: rule.shard(worker).tolist() for worker in rule.workers}
    for number in range(1000):
        some = [0, 1, 2] if number % 3 else [number % 2]
        assert not any(len(part) for part in rule.allocate(some, dict.fromkeys(some, 0.5)).values())
    assert {worker: rule.shard(worker).tolist() for worker in rule.workers} == shards
    assert all(len(pieces) <= 2 for pieces in rule.shards.values())
    assert min(rule.count.values()) > 600


def test_a_lost_worker_s_samples_go_to_the_others():
    rule = IDPA(2)
    rule.start(100, [0, 1, 2])
    rule.allocate([0, 1, 2], {0: 1.0, 1: 1.0, 2: 2.0})
    rule.leave(1)
    for _ in range(4):
        rule.allocate([0, 2], {0: 1.0, 2: 2.0})
    assert_exact_cover(rule, 100)
    assert rule.held[0] > rule.held[2]


def test_nobody_begins_with_nothing():
    rule = IDPA(2)
    rule.start(20, [0, 1])
    rule.allocate([0, 1], {0: 1.0, 1: 1e6})
    assert rule.held == {0: 9, 1: 1}


def test_the_same_seed_gives_the_same_shards_and_another_seed_others():
    def shard(seed):
        rule = UDPA()
        rule.start(50, [0, 1], seed=seed)
        return rule.allocate([0, 1])[0].tolist()

    assert shard(1) == shard(1) != shard(2)


def test_stratified_batches_hold_the_classes_in_their_shares():
    labels = np.array([0] * 80 + [1] * 20)
    rule = IDPA(4, stratified=True)
    rule.start(100, [0, 1], labels=labels)
    for part in rule.allocate([0, 1], {0: 1.0, 1: 1.5}).values():
        assert abs(np.mean(labels[part]) - 0.2) < 0.1
    order = shuffled(100, 0, labels)
    assert all(labels[order[i : i + 10]].sum() == 2 for i in range(0, 100, 10))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["int64", "uint8", "float32", "<U3"])
def test_many_classes_are_spread_as_one_after_the_other_was(kind, seed):
    labels = np.random.default_rng(seed).integers(0, 100, 999).astype(kind)
    generator = np.random.default_rng(np.random.SeedSequence([seed, 999]))
    order, rank = generator.permutation(999), np.empty(999)
    for label in np.unique(labels):  # records of earlier versions are replayed by this order
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + generator.random()) / len(members)
    assert np.array_equal(shuffled(999, seed, labels), np.argsort(rank, kind="stable"))


def test_as_many_classes_as_samples_are_no_more_work():
    rule = UDPA(stratified=True)  # it took a pass over all samples for each class
    rule.start(300_000, range(3), labels=np.arange(300_000))
    rule.allocate(range(3))
    assert_exact_cover(rule, 300_000)


@pytest.mark.parametrize("make", [UDPA, lambda: IDPA(3), lambda: IDPA(5, speeds=[1, 2, 9]), lambda: IDPA(4, stratified=True)])
@pytest.mark.parametrize("seed", range(6))
def test_saved_half_way_and_loaded_it_has_the_same_future(make, seed):
    """Random allocations, joins and leaves; at a random moment a copy is made from the state as JSON would keep it.

    One that is made from the state at each moment knows nothing else: what a partition remembers for speed changes nothing.
    """
    rng, rule, other, n = np.random.default_rng(seed), make(), make(), 211
    rule.start(n, [0, 1, 2], seed=seed, labels=np.arange(n) % 3)
    for moment in range(30):
        if moment == 4 + 3 * seed:
            other.load_state_dict(copy.deepcopy(rule.state_dict()))
        fresh = make()
        fresh.load_state_dict(copy.deepcopy(rule.state_dict()))
        now = [rule, fresh] if moment < 4 + 3 * seed else [rule, fresh, other]
        some = sorted(int(w) for w in rng.choice(rule.workers, int(rng.integers(1, len(rule.workers) + 1)), replace=False))
        seconds = {worker: float(rng.uniform(0.2, 5)) for worker in some}
        given = [each.allocate(some, seconds) for each in now]
        assert all(given[0][w].tolist() == part[w].tolist() for w in some for part in given)
        if moment % 7 == 5:
            [each.leave(some[0]) for each in now]
            [each.join(some[0] if moment % 2 else 3 + moment) for each in now]
    assert [other.held, other.count, other.seconds, other.workers] == [rule.held, rule.count, rule.seconds, rule.workers]
    assert all(other.shard(worker).tolist() == rule.shard(worker).tolist() for worker in rule.workers)
    assert other.pool.tolist() == rule.pool.tolist() and other.pool.dtype == rule.pool.dtype


def test_a_state_is_a_copy_and_a_wrong_one_is_refused():
    rule, other = IDPA(2), IDPA(2)
    rule.start(20, [0, 1])
    rule.allocate([0, 1], {0: 1.0, 1: 1.0})
    state = rule.state_dict()
    rule.allocate([0, 1], {0: 1.0, 1: 3.0})
    other.load_state_dict(state)
    assert other.held == {0: 5, 1: 5} and len(other.pool) == 10
    for wrong in (np.arange(9), np.zeros(10, int), np.arange(100, 110)):
        with pytest.raises(PartitionError, match=r"the saved partition holds .* different samples of 20"):
            IDPA(2).load_state_dict({**state, "pool": wrong})


def test_config_round_trip():
    for rule in (UDPA(stratified=True), IDPA(7, speeds=[1, 2], smoothing=3)):
        assert make_partition(rule.config()).config() == rule.config()
    assert isinstance(make_partition("IDPA"), IDPA)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UDPA().start(10, range(16)), PartitionError, "10 samples cannot fill 16 shards.*n_workers <= 10"),
        (lambda: IDPA(8).start(10, range(4)), PartitionError, "in 8 batches.*or fewer batches"),
        (lambda: IDPA(speeds=[1, 2]).start(100, range(3)), PartitionError, "speeds has 2 entries for 3 workers"),
        (lambda: UDPA(stratified=True).start(10, range(2)), PartitionError, "needs labels"),
        (lambda: make_partition("ipda"), ValueError, "Did you mean 'idpa'"),
        (lambda: IDPA(0), ValueError, "batches=0"),
        (lambda: IDPA(2.5), ValueError, "batches=2.5"),
        (lambda: IDPA(speeds=[1, -1]), ValueError, "speeds=-1 must be above 0"),
        (lambda: IDPA(smoothing=0), ValueError, "smoothing=0"),
    ],
)
def test_bad_requests(make, error, message):
    with pytest.raises(error, match=message):
        make()


ABSURD = (5e-324, 0.0, -1.0, float("inf"), float("nan"), 1e308, 1e-300)


@pytest.mark.parametrize("first", ABSURD)
@pytest.mark.parametrize("then", ABSURD)
def test_no_time_is_too_absurd_for_a_partition(first, then):
    """Each worker measures another one, then the next; somebody leaves, another comes, and all samples stay dealt out."""
    for rule in (IDPA(3), IDPA(3, stratified=True), IDPA(2, speeds=[5e-324, 1e308, 1.0, 1e-9]), IDPA(1), UDPA()):
        rule.start(1000, range(4), labels=np.arange(1000) % 7)
        for seconds in ({0: first}, {0: then, 1: first}, {2: 1e-3, 3: then}, {1: 1e-3, 3: 1e-3}):
            rule.allocate(range(4), seconds)
            assert_exact_cover_with_pool(rule, 1000)
        assert min(rule.held.values()) > 0 and not len(rule.pool)
        again = copy.deepcopy(rule)
        again.load_state_dict(rule.state_dict())
        again.leave(2)
        again.join(5, first)
        for worker in 6 * (0, 1, 3, 5):
            again.reclaim(worker)
            again.allocate([worker], {worker: then})
            assert_exact_cover_with_pool(again, 1000)
        assert not len(again.pool) and min(again.held.values()) > 0


def assert_exact_cover_with_pool(partition, n):
    held = np.concatenate([partition.pool, *(partition.shard(worker) for worker in partition.workers)])
    assert np.array_equal(np.sort(held), np.arange(n))


def test_a_time_that_is_no_number_leaves_what_was_known():
    rule = IDPA(1)
    rule.start(100, [0, 1])
    shards = rule.allocate([0, 1], {0: 1.0, 1: 4.0})
    rule.allocate([0, 1], {0: float("nan"), 1: float("nan")})
    assert (len(shards[0]), len(shards[1])) == (80, 20) and rule.seconds == {0: 1.0, 1: 4.0}
    rule.start(100, [0, 1])
    assert {worker: len(shard) for worker, shard in rule.allocate([0, 1], {0: 0.0, 1: 1.0}).items()} == {0: 99, 1: 1}


@pytest.mark.parametrize("total", [0, 7, 10**12])
def test_shares_of_any_size_are_dealt_out_whole(total):
    nan, inf = float("nan"), float("inf")
    for shares in (
        [1e308, 1e308, 1],
        [5e-324, 0, 5e-324],
        [inf, 1, inf],
        [nan, 1, 3],
        [nan, nan, nan],
        [nan, inf, 1e308],
        [0, 0, 1e-300],
    ):
        counts = largest_remainder(total, shares)
        assert counts.sum() == total and counts.min() >= 0
    assert largest_remainder(6, [nan, 1, 2]).tolist() == [0, 2, 4] and largest_remainder(6, [inf, 1, inf]).tolist() == [3, 0, 3]


# -- units: runs of samples that are read together ---------------------------------------------------------------------


def offsets(n_units, seed=0, least=5, most=12):
    return np.cumsum([0, *np.random.default_rng(seed).integers(least, most, n_units)])


def assert_whole(samples, units):
    """Whole units, each in its order."""
    begins = np.flatnonzero(np.isin(samples, units[:-1]))
    for part in np.split(samples, begins)[1:]:
        at = np.searchsorted(units, part[0])
        assert part.tolist() == list(range(units[at], units[at + 1]))


@pytest.mark.parametrize("rule", [UDPA(), IDPA(1), IDPA(3), IDPA(5, speeds=[1, 2, 9])])
@pytest.mark.parametrize("n_units", [3, 4, 40])
def test_units_are_handed_out_whole_and_cover_everything(rule, n_units):
    units = offsets(n_units)
    rule.start(units[-1], [0, 1, 2], seed=3, units=units)
    for _ in range(rule.batches):
        rule.allocate([0, 1, 2], {0: 0.1, 1: 0.25, 2: 0.7})
        for worker in (0, 1, 2):
            assert_whole(rule.shard(worker), units)
            assert len(rule.shard(worker))  # nobody begins with nothing
    assert_exact_cover(rule, units[-1])
    assert not len(rule.pool)


def test_targets_are_samples_to_the_nearest_unit():
    units = offsets(400, seed=1)
    rule, target = IDPA(4, speeds=[1, 1, 2]), units[-1] / np.array([4, 4, 2])
    rule.start(units[-1], [0, 1, 2], units=units)
    for _ in range(4):
        rule.allocate([0, 1, 2], {0: 2.0, 1: 2.0, 2: 1.0})
    assert np.abs([rule.held[w] for w in (0, 1, 2)] - target).max() <= 12
    times = np.array([2.0, 2.0, 1.0]) * [rule.held[w] for w in (0, 1, 2)]
    assert times.mean() / times.max() > 0.98


def test_units_without_a_barrier_are_all_handed_out_and_survive_a_loss_a_newcomer_and_a_checkpoint():
    units = offsets(30, seed=2)
    rule, rng = IDPA(3), np.random.default_rng(0)
    rule.start(units[-1], [0, 1, 2], units=units)
    rule.allocate([0, 1, 2], {0: 1.0, 1: 1.0, 2: 3.0})
    for worker in rng.integers(0, 3, 24).tolist():
        rule.allocate([worker], {worker: [1.0, 1.0, 3.0][worker]})
    assert_exact_cover(rule, units[-1])
    rule.leave(1)
    again = IDPA(3)
    again.load_state_dict(rule.state_dict())
    assert again.units.tolist() == units.tolist()
    given = []
    for one in (rule, again):
        one.join(7, 1.0)
        for _ in range(8):
            for worker in list(one.workers):
                one.reclaim(worker)
                given.append((worker, one.allocate([worker], {worker: 1.0})[worker].tolist()))
        assert_exact_cover(one, units[-1])
        assert not one.late
        for worker in one.workers:
            assert_whole(one.shard(worker), units)
    assert given[: len(given) // 2] == given[len(given) // 2 :]
    assert min(rule.held.values()) > 12


@pytest.mark.parametrize("seconds", [1.0, 0.25])
def test_a_newcomer_gets_a_sample_where_nobody_holds_more_than_its_share(seconds):
    it = IDPA(1, smoothing=1)
    it.start(9, range(2))
    it.allocate([0, 1], {0: 1 / 32, 1: 1.0})
    for worker in (0, 1, 0):  # 8 and 1, of which the targets are 9 and 0, or 8 and 0
        it.reclaim(worker)
        it.allocate([worker], {0: 1 / 32, 1: 1e6 if seconds < 1 else 1.0})
    it.join(2, seconds)
    for worker in [0, 1, 2] * 3:
        it.reclaim(worker)
        it.allocate([worker])
    assert all(it.held.values()) and not it.late


def test_of_two_newcomers_that_hold_nothing_and_are_slow_one_begins():
    """The one sample that there was had been set aside for the other by each of them, for ever."""
    it = IDPA(1, speeds=[1.0, 1e300], smoothing=1)
    it.start(9, range(2))
    it.allocate([0, 1])
    for worker in (3, 2):
        it.join(worker)
    it.allocate([2], {2: 1.0})
    for worker in [0, 1, 2, 3] * 4:
        it.reclaim(worker)
        it.allocate([worker])
    assert all(it.held.values()) and not len(it.pool)


def test_who_came_late_itself_gives_a_sample_to_one_that_holds_nothing():
    """Where nobody else holds more than one; it would have waited for ever."""
    it = IDPA(1, smoothing=1)
    it.start(9, [0])
    it.allocate([0])
    it.leave(0)
    it.join(1)
    it.join(2)
    for workers, seconds in (([2], {2: 1e300}), ([1], {1: 1.0}), ([1, 2], {})):
        for worker in workers:
            it.reclaim(worker)
        it.allocate(workers, seconds)
    it.join(0, 1e300)
    for worker in [1, 2, 0] * 4:
        it.reclaim(worker)
        it.allocate([worker])
    assert all(it.held.values()) and sum(it.held.values()) + len(it.pool) == 9


def test_a_newcomer_gets_a_unit_where_there_are_few():
    units = offsets(4)
    rule = UDPA()
    rule.start(units[-1], [0, 1], units=units)
    rule.allocate([0, 1])
    rule.join(2)
    assert sum(rule.reclaim(worker) for worker in (0, 1)) > 0
    assert len(rule.allocate([2])[2])


def test_units_that_cannot_be_dealt_out_are_refused():
    with pytest.raises(PartitionError, match=r"2 units \(row groups\) cannot fill 3 shards"):
        UDPA().start(20, [0, 1, 2], units=[0, 9, 20])
    with pytest.raises(PartitionError, match="picks single samples"):
        UDPA(stratified=True).start(20, [0, 1], units=[0, 9, 20], labels=np.zeros(20))
    for wrong in ([0, 9], [1, 20], [0, 9, 9, 20], [0]):
        with pytest.raises(PartitionError, match="offsets that grow from 0 to 20"):
            UDPA().start(20, [0, 1], units=wrong)
