"""What only some rules ask of the course of a run: pushes thrown away or kept back, a time limit of waiting, passes by speed."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.partition import IDPA, UDPA
from labkit.training.server.grants import by_speed
from labkit.training.server.membership import Member
from labkit.updates import EASGD, SGWU, SSP, DelayedNesterov, FedBuff, Ringmaster
from tests.training.server.test_coordinator import SAMPLES, WORKERS, Course


def begun(update, **options):
    course = Course(update, **options).join(*WORKERS)
    return course, {worker: course.answer(worker) for worker in WORKERS}


# -- thrown away -------------------------------------------------------------------------------------------------------


def test_what_a_rule_throws_away_is_recorded_and_is_for_somebody_to_train_on_again():
    course, work = begun(Ringmaster(1), budget=50)
    course.push(0, work[0])
    done, granted = course.it.grants.done, course.it.grants.granted
    course.answers[0].clear()
    course.push(1, work[1])  # one version late
    (drop,) = course.of("drop")
    assert drop["worker"] == 1 and (drop["version"], drop["staleness"], drop["coefficient"]) == (1, 1, 0.0)
    assert drop["samples"] == work[1].grant.samples
    assert drop["total"] == done == course.it.grants.done == course.it.grants.merged
    answer = course.answer(1)
    assert answer.grant and answer.grant.version == 1 and course.it.grants.granted == granted


def test_a_budget_is_met_although_the_last_push_of_all_is_thrown_away():
    """Nothing was left for 0 and 1; what comes back is for 2, and what 2 cannot take is for them."""
    course, work = begun(Ringmaster(1), budget=SAMPLES)
    course.push(0, work[0])
    course.push(1, work[1])
    assert course.of("drop") and course.answer(1).grant
    course.push(2, work[2])
    pending = {worker: answer for worker in WORKERS if (answer := course.answer(worker))}
    assert 2 in pending or 1 in pending
    course = Course(Ringmaster(1), budget=5 * SAMPLES).join(*WORKERS)
    course.finish(speeds={0: 1, 1: 3, 2: 20})
    assert course.it.state == "done" and course.it.grants.done == course.it.grants.merged == 5 * SAMPLES
    assert len(course.of("drop")) > 2


def test_a_late_push_under_a_quorum_releases_its_worker_into_the_round_under_way():
    course, work = begun(SGWU(quorum=0.5), budget=200)
    course.push(0, work[0])
    course.push(1, work[1])
    assert [course.answer(w).grant.version for w in (0, 1)] == [1, 1]
    course.push(2, work[2])
    assert course.answer(2).grant.version == 1 and course.of("drop")[0]["worker"] == 2 and not course.of("hold", worker=2)


# -- kept back ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_back_counts_when_it_is_merged_and_at_the_end_at_the_latest():
    course, work = begun(FedBuff(4), budget=3 * SAMPLES)
    course.push(0, work[0])
    assert not course.of("merge") and course.answers[0] and not course.of("hold")  # its worker goes on
    assert course.it.state_dict()["done"] == 0 and course.it.status()["samples"] == work[0].grant.samples
    course.answers[0].clear()
    course.it.leave(course.members[0])  # what it has pushed is in the buffer
    assert course.it.grants.done == work[0].grant.samples
    del work[0]
    course.finish(work)
    merges = course.of("merge")
    assert merges[0]["worker"] == 0 and merges[-1]["total"] == sum(row["samples"] for row in merges) == 3 * SAMPLES
    assert course.it.state == "done" and len(merges) % 4  # a last version of fewer than four


def test_a_checkpoint_holds_what_is_merged():
    course = Course(FedBuff(2), budget=5 * SAMPLES, checkpoints=20).join(*WORKERS)
    states = []
    course.it.save = lambda version, weights, state: states.append((version, state["done"]))
    course.finish()
    course.it.checkpoint()
    totals = {row["version"]: row["total"] for row in course.of("merge")}
    assert len(states) > 5 and all(totals[version] == done for version, done in states)


def test_who_is_held_at_the_end_is_told_to_stop():
    """SSP holds the quick one when nothing is left for the slow one that it waits for."""
    course = Course(SSP(0), budget=7 * SAMPLES).join(*WORKERS)
    course.finish(speeds={0: 1, 1: 1, 2: 30})
    assert course.it.state == "done" and course.it.grants.merged == 7 * SAMPLES and course.of("hold")


def test_who_comes_again_when_its_leave_was_the_end_is_told_to_stop():
    """The grants of a small budget leave worker 2 nothing to train on, and nobody else is under way."""
    course = Course(SGWU(), budget=2).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    assert sorted(answer.grant.samples for answer in work.values()) == [0, 1, 1]
    (idle,) = (w for w in WORKERS if not work[w].grant.samples)
    for worker in set(WORKERS) - {idle}:
        course.push(worker, work[worker])
    assert not course.it.finished
    course.join(idle)
    assert course.it.finished and all(course.answer(w).grant is None for w in WORKERS)
    for worker in WORKERS:
        course.it.leave(course.members[worker])
    assert course.it.state == "done" and course.it.grants.merged == 2


# -- waiting for a time ------------------------------------------------------------------------------------------------


def test_a_rule_that_waits_for_a_time_only_is_told_when_it_is_over():
    course, work = begun(SGWU(quorum=0.5, grace=3.0), budget=200)
    alarms = []
    course.it.alarm = alarms.append
    assert course.it.expires is None
    course.now = 10.0
    course.push(0, work[0])
    course.now = 12.0
    course.push(2, work[2])
    assert alarms == [13.0] and course.it.expires == 13.0
    course.now = 12.9
    course.it.tick()
    assert not any(course.answers.values())
    course.now = 13.25
    course.it.tick()
    assert [course.answer(w).grant.wait_s for w in (0, 2)] == [3.25, 1.25] and course.it.expires is None
    assert len(course.of("expire", version=0)) == 1 and {row["worker"] for row in course.of("merge")} == {0, 2}
    course.it.tick()
    assert len(course.of("expire")) == 1


def test_a_time_that_is_over_without_a_quorum_ends_with_the_push_that_makes_it():
    course, work = begun(SGWU(quorum=0.6, grace=3.0), budget=200)
    course.push(0, work[0])
    course.now = 4.0
    course.it.tick()
    assert not any(course.answers.values()) and course.it.expires is None and course.of("expire")
    course.push(1, work[1])
    assert {course.answer(w).grant.version for w in (0, 1)} == {1}


def test_nobody_is_told_of_a_time_when_the_run_has_ended():
    course, work = begun(SGWU(quorum=0.5, grace=3.0), budget=200)
    course.push(0, work[0])
    course.it.stop("stopped", "")
    course.now = 9.0
    course.it.tick()
    assert not course.of("expire") and not course.of("merge")


# -- passes by speed, weights of one's own -----------------------------------------------------------------------------


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


def test_under_easgd_each_worker_is_answered_with_its_own_weights_and_the_centre_is_kept():
    course, work = begun(EASGD(0.9), budget=200)
    course.push(1, work[1])  # 2 in every weight: alpha = 0.3
    answer = course.answer(1)
    assert answer.weights == pytest.approx(np.full(5, 1.4)) and answer.grant.version == 1
    assert course.it.update.weights == pytest.approx(np.full(5, 0.6))
    course.it.checkpoint()
    assert course.saved[-1][0] == 1 and course.saved[-1][1] is course.it.update.weights
    course.push(1, answer)  # (1.4 + 2) - 0.6 = 2.8, of which 0.3
    assert course.it.update.weights == pytest.approx(np.full(5, 0.6 + 0.84))
