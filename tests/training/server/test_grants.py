"""How the budget of a run is granted: exact shares, by speed, and samples that are trained on ahead of a push."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from labkit.partition import IDPA, UDPA
from labkit.training.server.grants import ahead_of, by_speed, divide, end_of, speeds_of
from labkit.training.server.membership import Member
from labkit.updates import AGWU, SGWU, UPDATES, DelayedNesterov, make_update
from tests.helpers import SAMPLES, WORKERS, Course, begun


def test_faster_workers_are_given_more():
    course = Course(SGWU(), IDPA(batches=4), budget=10 * SAMPLES).join(*WORKERS)
    course.finish(speeds={0: 1.0, 1: 2.0, 2: 8.0})
    held = [len(course.indices[w]) for w in WORKERS]
    assert held[0] > held[1] > held[2] >= 1 and sum(held) == SAMPLES


def test_shares_are_exact_and_leave_nobody_with_one():
    for total in range(30):
        for shares in ([1, 1, 1], [100, 1, 0], [0, 0, 0], [5, 3, 9]):
            parts = divide(total, shares)
            assert sum(parts) == total and min(parts) >= min(2, total // 3)


def test_a_time_is_measured_once_and_declared_speeds_stand_until_the_first_pass():
    """While worker 1 is at its first pass, worker 0 comes back again and again: that says nothing new about worker 1."""
    course = Course(AGWU(), IDPA(batches=4, speeds=[1, 1], smoothing=2), budget=200, workers=[0, 1]).join(0, 1, seconds=9.0)
    work = {w: course.answer(w) for w in (0, 1)}
    for _ in range(3):
        course.push(0, work[0], seconds=2.0 * work[0].grant.samples)
        work[0] = course.answer(0)
        assert course.it.partition.seconds == {0: 2.0, 1: 1.0}
    for estimate, measured in [(4.0, 4.0), (6.0, 8.0)]:  # the first pass counts alone; the median of two is their mean
        course.push(1, work[1], seconds=measured * work[1].grant.samples)
        work[1] = course.answer(1)
        course.push(0, work[0], seconds=2.0 * work[0].grant.samples)
        work[0] = course.answer(0)
        assert course.it.partition.seconds == {0: 2.0, 1: pytest.approx(estimate)}


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("seed", range(8))
def test_the_last_local_passes_of_independent_workers_end_together(seed, overlap):
    """Within a quarter of a local pass; otherwise one stands idle for as long as another's whole one."""
    random.seed(seed)
    speeds, apart = {worker: random.uniform(0.5, 4.0) for worker in WORKERS}, {}
    for balanced in (True, False):
        course = Course(AGWU(), budget=1000, local_steps=20, overlap=overlap, balanced_end=balanced).join(*WORKERS, seconds=2.0)
        grants = course.finish(speeds=speeds)
        assert sum(row["samples"] for row in course.of("push")) == course.it.grants.merged == 1000
        ends = {row["worker"]: sum(grants[row["worker"]]) * speeds[row["worker"]] for row in course.of("push")}
        apart[balanced] = max(ends.values()) - min(ends.values())
    assert apart[True] <= 40 / 4 * max(speeds.values()) and apart[True] <= apart[False] + 1e-9


@pytest.mark.parametrize(
    ("samples", "free", "speeds", "end"),
    [
        (10, [0], [2], 5),
        (10, [0, 0], [2, 3], 2),
        (10, [0, 4], [2, 3], 4.4),
        (8, [0, 4], [2, 3], 4),
        (10, [7, 0, 1], [1, 1, 1], 5.5),
    ],
)
def test_when_all_are_through_if_they_end_together(samples, free, speeds, end):
    assert end_of(samples, free, speeds) == pytest.approx(end)
    assert sum(max(0, end - at) * speed for at, speed in zip(free, speeds, strict=True)) == pytest.approx(samples)


def member(index, seconds):
    return Member(index, 0, seconds=seconds)


def test_by_speed():
    """Speeds 4 : 1 and 10 samples: 8 and 2. Who has no speed yet has the mean of the others; who holds nothing gets nothing."""
    assert by_speed({0: 5, 1: 5}, {0: member(0, 0.25), 1: member(1, 1.0)}) == {0: 8, 1: 2}
    assert by_speed({0: 4, 1: 4, 2: 4}, {0: member(0, 1.0), 1: member(1, None), 2: member(2, 1.0)}) == {0: 4, 1: 4, 2: 4}
    assert by_speed({0: 0, 1: 6}, {0: member(0, 0.1), 1: member(1, 1.0)}) == {1: 6}
    assert by_speed({0: 5, 1: 1}, {0: member(0, 1.0), 1: member(1, 1e9)}) == {0: 6, 1: 1}


@pytest.mark.parametrize("local_steps", [None, 3])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_paced_rule_gives_passes_by_speed_where_shards_are_equal(local_steps, dynamic):
    """Speeds 6 : 3 : 1. On average a pass is as long as without it: `local_steps`, or a pass over a shard."""
    course = Course(DelayedNesterov(dynamic=dynamic), UDPA(), budget=60 * SAMPLES, local_steps=local_steps)
    for worker, seconds in {0: 1.0, 1: 2.0, 2: 6.0}.items():
        course.join(worker, seconds=seconds)
    grants = course.finish(speeds={0: 1.0, 1: 2.0, 2: 6.0})
    later = [np.mean(grants[w][2:-2]) for w in WORKERS]
    size = SAMPLES / 3 if local_steps is None else local_steps * 2
    assert sum(later) == pytest.approx(3 * size, abs=1)
    assert later == pytest.approx(3 * size * (np.array([6, 3, 1]) / 10 if dynamic else np.full(3, 1 / 3)), abs=1)
    counts = [len(grants[w]) for w in WORKERS]
    assert max(counts) <= (1.4 if dynamic else 7) * min(counts) and course.it.grants.done == 60 * SAMPLES


def test_speeds_are_those_of_the_latest_passes():
    course, work = begun(DelayedNesterov(), partition=IDPA(batches=1), budget=60 * SAMPLES)
    assert [course.members[w].seconds for w in WORKERS] == [1.0, 1.0, 1.0]  # as probed
    course.push(0, work[0], seconds=3.0 * work[0].grant.samples)
    assert course.members[0].seconds == 2.0
    answer = course.answer(0)
    assert answer.grant.pace == pytest.approx(SAMPLES / by_speed(course.it.partition.held, course.it.members)[0])


@pytest.mark.parametrize("seconds", [5e-324, 0.0, float("inf"), float("nan"), 1e10])
def test_absurd_speeds_give_finite_ends_and_whole_shares(seconds):
    members = {worker: Member(worker, 0, seconds=each) for worker, each in enumerate((seconds, 1e-3, None))}
    speeds = speeds_of(members.values())
    assert np.isfinite(speeds).all() and min(speeds) > 0
    shares = by_speed({0: 10, 1: 10, 2: 10}, members)
    assert min(shares.values()) > 0 and 30 <= sum(shares.values()) <= 32
    assert np.isfinite(end_of(30, [0.0, 1.0, 2.0], speeds))


class Ahead(Course):
    """A course whose workers train on while their pushes are under way."""

    def push(self, worker, answer, seconds=1.0, **changes):
        grant = answer.grant
        samples = grant.carry + grant.samples - grant.ahead
        assert 0 <= grant.ahead <= grant.samples
        assert grant.samples == 1 or 1 not in (grant.samples - grant.ahead, grant.ahead)
        self.pushed.append((worker, samples, grant))
        super().push(worker, answer, seconds, samples=samples, **changes)


def ahead(rule, overlap=1, **options):
    made = Ahead(make_update(rule), options.pop("partition", None), overlap=overlap, **options)
    made.pushed = []
    return made


@pytest.mark.parametrize("rule", [name for name, rule in UPDATES.items() if rule.ahead])
@pytest.mark.parametrize("local_steps", [None, 1, 3])
@pytest.mark.parametrize("budget", [17, 35, 101])
def test_every_sample_of_the_budget_is_pushed_once(rule, local_steps, budget):
    course = ahead(rule, budget=budget, local_steps=local_steps).join(*WORKERS)
    course.finish(speeds={0: 1, 1: 2, 2: 4})
    assert course.it.state == "done" and course.it.grants.done == course.it.grants.granted == budget
    assert sum(samples for _, samples, _ in course.pushed) == budget == sum(row["samples"] for row in course.of("merge"))
    assert rule == "ssp" or all(samples >= 2 for _, samples, _ in course.pushed)  # BatchNorm
    for worker in WORKERS:  # what is left for the next push is carried into it
        mine = [grant for who, _, grant in course.pushed if who == worker]
        assert mine[0].carry == 0 == mine[-1].ahead
        assert all(now.carry == before.ahead for before, now in itertools.pairwise(mine))


def test_after_the_first_each_grant_is_a_local_pass_and_so_is_each_push():
    course = ahead("agwu", budget=100 * SAMPLES, local_steps=3).join(*WORKERS)
    first = course.answer(0)
    course.push(0, first)
    then = course.answer(0)
    one_pass = then.grant.samples
    assert (first.grant.samples, first.grant.ahead, first.grant.carry) == (one_pass + 2, 2, 0)
    assert (then.grant.ahead, then.grant.carry) == (2, 2) and one_pass == course.pushed[0][1] == 7  # of 18, with 6 of 17


def test_who_has_not_measured_its_score_again_stands_with_the_latest():
    course = ahead("fedasync", budget=100).join(*WORKERS)
    course.push(0, course.answer(0), score=0.25)
    course.push(0, course.answer(0), score=None)
    assert course.it.status()["workers"][0]["score"] == 0.25
    assert [row["score"] for row in course.of("push")] == [0.25, None]


def test_who_is_lost_loses_what_it_has_trained_on_ahead():
    course = ahead("agwu", budget=60, local_steps=2).join(*WORKERS)
    answers = {w: course.answer(w) for w in WORKERS}
    course.push(1, answers.pop(1))
    assert course.answer(1).grant.carry == 2
    course.it.leave(course.members.pop(1), "gone")
    course.finish(pending=answers)
    assert course.it.grants.done == 60 == sum(samples for _, samples, _ in course.pushed)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(
    "rule", ["agwu", "fedbuff", "ringmaster", {"name": "ssp", "bound": 0}, {"name": "ssp", "bound": 1}], ids=str
)
def test_whoever_comes_and_goes_each_sample_of_the_budget_is_pushed_once(rule, seed):
    chance = random.Random(seed)
    partition = chance.choice([UDPA(), IDPA(batches=2)])
    options = {"budget": chance.choice([17, 34, 50, 101]), "local_steps": chance.choice([None, 1, 2, 3])}
    course, working, faults = ahead(rule, chance.choice([1, 3]), partition=partition, **options).join(*WORKERS), {}, 4
    while not course.it.over:
        for worker in list(course.it.members):
            if worker not in working and (answer := course.answer(worker)):
                working[worker] = answer
        stopped = [worker for worker, answer in working.items() if not answer.grant]
        if faults and chance.random() < 0.1 and not course.it.finished:
            faults, worker = faults - 1, chance.choice(WORKERS)
            working.pop(worker, None)
            if chance.random() < 0.5 and set(course.it.members) - {worker}:
                if worker in course.it.members:
                    course.it.leave(course.members[worker], "gone")
            else:
                course.join(worker)
        elif stopped:
            del working[stopped[0]]
            course.it.leave(course.members[stopped[0]])
        else:
            worker = chance.choice(sorted(working))
            course.push(worker, working.pop(worker))
        owed = sum(member.granted for member in course.it.members.values())
        assert course.it.grants.granted == course.it.grants.done + owed
    assert course.it.state == "done" and course.it.grants.merged == course.it.grants.done == options["budget"]


def test_no_single_sample_is_left_over():
    for samples, most in itertools.product(range(40), range(20)):
        part = ahead_of(samples, most)
        assert 0 <= part <= min(samples, most)
        if most != 1:
            assert 1 not in (part, samples - part) or samples == 1


def test_a_rule_that_waits_for_all_has_nothing_done_ahead():
    course = ahead("localsgd", overlap=3, budget=50).join(*WORKERS)
    course.finish()
    assert all(grant.ahead == grant.carry == 0 for _, _, grant in course.pushed)
