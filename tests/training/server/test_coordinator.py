"""The course of a run, without sockets, threads and clock: barriers, budgets, losses, members, ranks (`membership.py`), ends;
and what only some rules do: drop pushes, hold them back, wait up to a deadline."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from labkit.errors import ClusterError
from labkit.partition import IDPA, UDPA
from labkit.training.wire import compression
from labkit.updates import AGWU, EASGD, SGWU, SSP, AllReduce, BadPush, FedBuff, Ringmaster, make_update, names
from tests.helpers import SAMPLES, SIZE, WORKERS, Course, begun

RULES = [SGWU, AGWU, AllReduce]
OTHERS = [name for name in names() if name not in ("sgwu", "agwu", "allreduce")]
OTHERS += [{"name": "sgwu", "quorum": 0.5}, {"name": "sgwu", "quorum": 0.6, "grace": 7.0}, {"name": "ringmaster", "limit": 1}]
OTHERS += [{"name": "ssp", "bound": 0}, {"name": "fedbuff", "size": 7}]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("partition", [UDPA, IDPA])
@pytest.mark.parametrize("local_steps", [None, 1, 3])
@pytest.mark.parametrize("budget", [17, 34, 35, 50, 101])
def test_every_sample_of_the_budget_is_granted_once(rule, partition, local_steps, budget):
    rule, partition = rule(), partition(batches=2) if partition is IDPA else partition()
    course = Course(rule, partition, budget=budget, local_steps=local_steps).join(*WORKERS)
    grants = course.finish(speeds={0: 1, 1: 2, 2: 4})
    total = sum(itertools.chain(*grants.values()))
    assert total == sum(row["samples"] for row in course.of("merge")) == course.it.grants.done
    assert total == budget if not rule.collective else budget - len(WORKERS) < total <= budget
    assert all(n >= 2 for n in itertools.chain(*grants.values()))  # BatchNorm cannot train on one sample
    assert (course.it.state, course.it.reason) == ("done", "")
    shards = [course.indices[w] for w in WORKERS]
    together = list(itertools.chain(*shards))
    assert len(set(together)) == len(together) <= SAMPLES and set(together) <= set(range(SAMPLES))
    versions = [row["version"] for row in course.of("merge")]
    assert versions == sorted(versions) and set(versions) == set(range(1, versions[-1] + 1))
    totals = [row["total"] for row in course.of("merge")]
    assert totals == sorted(totals)


def test_nobody_begins_before_everyone_is_there():
    course = Course(AGWU()).join(0, 2)
    assert not any(course.answers.values()) and not course.it.started and not course.of("start")
    course.join(1)
    assert course.it.started and len(course.of("start")) == 1
    answers = [course.answer(w) for w in WORKERS]
    assert all(a.grant for a in answers)
    assert sorted(itertools.chain(*course.indices.values())) == list(range(SAMPLES))
    assert [a.grant.samples for a in answers] == [len(course.indices[w]) for w in WORKERS]
    assert all(a.grant.ranks == a.grant.rank_samples == () for a in answers)
    assert [row["kind"] for row in course.rows[:4]] == ["join", "join", "join", "start"]


def test_a_barrier_holds_until_all_have_pushed_and_then_releases_all():
    course = Course(SGWU()).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.push(0, work[0])
    course.now = 2.0
    course.push(2, work[2])
    assert not any(course.answers.values()) and len(course.of("hold")) == 2 and not course.of("merge")
    course.now = 5.0
    course.push(1, work[1])
    answers = [course.answer(w).header() for w in WORKERS]
    assert [a["wait_s"] for a in answers] == [5.0, 0.0, 3.0]
    assert {a["version"] for a in answers} == {1} and len(course.of("merge")) == 3 and len(course.of("hold")) == 2
    assert [row["total"] for row in course.of("merge")] == [SAMPLES] * 3


def test_an_asynchronous_push_is_answered_at_once():
    course = Course(AGWU(), budget=200).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    for number, worker in enumerate([2, 2, 0, 2, 1], 1):
        course.push(worker, work[worker])
        work[worker] = course.answer(worker)
        assert work[worker].grant.version == number and work[worker].grant.wait_s == 0.0
    assert not course.of("hold")
    assert [row["staleness"] for row in course.of("merge")] == [0, 0, 2, 1, 4]


@pytest.mark.parametrize("rule", [SGWU, AGWU])
def test_who_leaves_gives_its_samples_to_the_others(rule):
    course = Course(rule(), budget=60).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    mine = set(course.indices.pop(1))
    course.it.leave(course.members[1], "killed")
    assert course.of("leave")[0]["message"] == "killed"
    work.pop(1)
    course.indices[1] = []
    course.finish(work)
    assert (course.it.state, course.it.grants.done) == ("done", 60)
    assert mine <= set(course.indices[0]) | set(course.indices[2])
    assert sorted(course.indices[0] + course.indices[2]) == list(range(SAMPLES))


def test_who_leaves_while_the_others_wait_for_it_releases_them():
    course = Course(SGWU()).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.push(0, work[0])
    course.push(2, work[2])
    course.it.leave(course.members[1])
    assert [course.answer(w).grant.version for w in (0, 2)] == [1, 1]
    assert [row["worker"] for row in course.of("merge")] == [0, 2]


def test_a_push_that_is_never_merged_is_not_counted():
    """Its worker is lost while it waits: the budget is made by the others."""
    course = Course(SGWU(), budget=40).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.push(0, work.pop(0))
    assert course.it.grants.done > 0
    course.it.leave(course.members[0])
    assert course.it.grants.done == 0
    course.finish(work)
    assert course.it.grants.done == sum(row["samples"] for row in course.of("merge")) == 40 and course.it.state == "done"
    assert {row["worker"] for row in course.of("merge")} == {1, 2}


def test_what_a_lost_worker_leaves_undone_at_the_end_is_done_by_the_others():
    course = Course(AGWU(), budget=SAMPLES).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.push(0, work[0])
    course.push(1, work[1])
    assert not any(course.answers.values())  # nothing is left for them, but 2 may be lost
    course.it.leave(course.members[2])
    assert course.answers[0] or course.answers[1]
    course.finish()
    assert (course.it.state, course.it.grants.done) == ("done", SAMPLES)


def test_all_are_answered_with_stop_when_the_last_push_has_come():
    course = Course(AGWU(), budget=SAMPLES).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    for worker in WORKERS:
        assert not any(course.answers.values())
        course.push(worker, work[worker])
    assert [course.answer(w).header() for w in WORKERS] == [{"op": "stop", "reason": "", "wait_s": 0.0}] * 3
    assert course.it.state == "running" and not course.it.over
    for worker in WORKERS:
        course.it.leave(course.members[worker])
    assert course.it.state == "done" and course.it.over


@pytest.mark.parametrize("rule", RULES)
def test_all_workers_lost(rule):
    """The run waits for somebody to come, and goes on with whoever does."""
    course = Course(rule(), IDPA(batches=2)).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    if not rule.collective:
        course.push(2, work[2])
    course.now = 7.0
    for worker in WORKERS:
        assert course.it.last_lost_at is None
        course.it.leave(course.members[worker])
    assert (course.it.state, course.it.over, course.it.last_lost_at) == ("running", False, 7.0)
    course.join(1)
    assert course.it.last_lost_at is None
    course.join(5)
    course.finish()
    assert course.it.state == "done" and sum(row["samples"] for row in course.of("merge")) == course.it.grants.done


def test_leaving_twice_and_leaving_of_an_earlier_incarnation_are_nothing():
    course = Course(AGWU(), budget=100).join(*WORKERS)
    first = course.members[1]
    course.it.leave(first)
    course.it.leave(first)
    course.join(1)
    course.it.leave(first)
    assert len(course.of("leave")) == 1 and course.it.members[1].incarnation == 1
    assert course.of("join", worker=1)[-1]["incarnation"] == 1


def test_who_comes_back_gets_samples_at_once():
    course = Course(AGWU(), IDPA(batches=2), budget=100).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.it.leave(course.members[1])
    work.pop(1)
    course.indices[1] = []
    course.join(1)
    back = course.answer(1)
    assert back.grant and len(back.indices) == back.grant.samples > 0
    work[1] = back
    course.finish(work)
    assert course.it.grants.done == 100


def test_who_leaves_before_the_start_may_come_back_before_it():
    course = Course(SGWU()).join(0, 1)
    course.it.leave(course.members[0])
    course.join(2, 0)
    assert course.it.started and all(len(course.answers[w]) == 1 for w in WORKERS)
    course.finish()
    assert course.it.state == "done"


def test_who_comes_again_replaces_its_earlier_incarnation_and_nobody_comes_after_the_end():
    course = Course(AGWU()).join(0)
    course.join(0)
    assert course.it.members[0].incarnation == 1 and len(course.of("leave")) == 1
    course.it.stop("stopped", "enough")
    with pytest.raises(ClusterError, match="the run has ended"):
        course.join(1)


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_stop_dismisses_who_waits_and_not_who_works(state):
    course = Course(SGWU()).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.now = 1.0
    course.push(0, work[0])
    course.now = 3.0
    course.it.stop(state, "why")
    busy = [member for member in course.it.members.values() if member.granted]
    assert [member.index for member in busy] == [1, 2]
    assert course.answer(0).header() == {"op": "stop", "reason": "why", "wait_s": 2.0}
    course.it.stop("failed", "later")
    assert course.it.reason == "why" and course.rows[-1] == {
        "kind": {"stopped": "stop", "failed": "error"}[state],
        "message": "why",
    }
    course.push(1, work[1])
    assert course.answer(1).grant is None and not course.of("merge")
    for worker in WORKERS:
        assert not course.it.over
        course.it.leave(course.members[worker])
    assert course.it.over and course.it.state == state
    assert [row["message"] for row in course.of("error")] == (["why"] if state == "failed" else [])


def test_stop_before_anybody_has_come_is_over_at_once():
    course = Course(AGWU())
    course.it.stop("stopped", "")
    assert course.it.over


def test_a_record_that_cannot_be_written_does_not_keep_a_held_worker_waiting():
    course = Course(SGWU()).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    course.push(0, work[0])

    def full(kind, **fields):
        raise OSError(28, "No space left on device")

    course.it.record = full
    with pytest.raises(OSError, match="No space"):
        course.it.stop("failed", "full")
    assert course.answer(0).grant is None and course.it.state == "failed"


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_push_is_refused_and_its_worker_may_leave_and_come_back(rule):
    course = Course(rule()).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    with pytest.raises(BadPush, match="worker 1 at version 0: push of worker 1"):
        course.push(1, work.pop(1), score=2.0)
    assert course.it.state == "running" and not course.of("push") and course.it.grants.done == 0
    course.it.leave(course.members[1], "bad")
    course.join(1)
    course.finish(work)
    assert course.it.state == "done" and course.it.grants.done >= course.it.grants.budget - len(WORKERS)


BAD = {  # what a worker may push: changes of the header, and its weights
    "NaN": ({}, np.nan),
    "infinity": ({}, np.inf),
    "minus infinity": ({}, -np.inf),
    "a score above 1": ({"score": 1.5}, 0),
    "a score below 0": ({"score": -0.1}, 0),
    "a score of NaN": ({"score": float("nan")}, 0),
    "a version from the future": ({"version": 7}, 0),
    "too many samples": ({"samples": 10_000}, 0),
    "no samples": ({"samples": 0}, 0),
    "half the weights": ({}, np.zeros(SIZE // 2, np.float32)),
    "too many weights": ({}, np.zeros(2 * SIZE, np.float32)),
    "double precision": ({}, np.zeros(SIZE)),
    "no weights": ({}, None),
}


@pytest.mark.parametrize("rule", names())
def test_a_bad_push_of_one_worker_disturbs_nobody_under_any_rule(rule):
    """It leaves and comes back, and does it again; the others do not wait for it, and nothing of it is in any version."""
    for what, (changes, weights) in BAD.items():
        course, work = begun(make_update(rule))
        for _ in range(2):
            bad = work.pop(1)
            header = {"samples": bad.grant.samples, "version": bad.grant.version, "loss": 1.0, "score": 0.5, "wait_s": 0.0}
            pushed = np.full(SIZE, weights, np.float32) if np.isscalar(weights) else weights
            with pytest.raises(BadPush, match="worker 1 at version "):
                course.it.push(course.members[1], header | {"compute_s": 1.0, "score_s": 0.0, "send_s": 0.0} | changes, pushed, 0)
            course.it.leave(course.members[1], what)
            if rule == "allreduce":  # its group has broken
                for other in [worker for worker in work if worker != 1]:
                    course.it.regroup(course.members[other], what)
            course.join(1)
            work = {worker: course.answer(worker) or work.get(worker) for worker in WORKERS}
            work = {worker: answer for worker, answer in work.items() if answer and course.members[worker].busy}
            if 1 not in work:  # it begins with the next round
                break
        course.finish(work)
        assert (course.it.state, course.it.reason) == ("done", ""), what
        assert not course.of("push", worker=1, incarnation=0) and sum(row["samples"] for row in course.of("merge")) >= 32, what
        assert np.isfinite(course.it.update.weights).all(), what


FAULTS = {  # what a worker pushes, or that it is gone without a word
    "NaN": {"weights": np.nan},
    "huge": {"weights": 3.4e38},
    "minus huge": {"weights": -3.4e38},
    "score": {"score": 2.0},
    "version": {"version": 9},
    "gone": None,
}


def fails(course, worker, answer, what):
    """A worker pushes what cannot be meant: is it refused?"""
    if (fault := FAULTS[what]) is None or answer is None:
        return True
    header = {"samples": answer.grant.samples, "version": answer.grant.version, "loss": 1.0, "score": 0.5, "wait_s": 0.0}
    header |= {"compute_s": 1.0, "score_s": 0.0, "send_s": 0.0} | {name: fault[name] for name in fault if name != "weights"}
    weights = np.full(SIZE, fault.get("weights", 1.0), np.float32)
    try:
        course.it.push(course.members[worker], header, weights, weights.nbytes)
    except BadPush:
        return True
    return False


@pytest.mark.parametrize("rule", [*names(), *OTHERS[-5:]], ids=str)
def test_two_bad_workers_at_once_disturb_nobody_under_any_rule(rule):
    """Both are bad before either has left; they leave and come back in any order, are bad again, and stay away in the end."""
    workers = [0, 1, 2, 3]
    for number, (one, other) in enumerate([*itertools.combinations_with_replacement(FAULTS, 2)][::3]):
        course = Course(make_update(rule), workers=workers, budget=5 * SAMPLES).join(*workers)
        work = {worker: course.answer(worker) for worker in workers}
        for turn in range(2):
            bad = [(1, one), (2, other)][:: 1 - 2 * ((number + turn) % 2)]
            refused = [worker for worker, what in bad if fails(course, worker, work.pop(worker, None), what)]
            for worker in refused[:: 1 - 2 * (number // 2 % 2)]:
                course.it.leave(course.members[worker], "bad")
            if turn == 0:
                course.join(*refused)
            else:  # also who was not refused: what is large is no NaN
                for worker in {1, 2} & set(course.it.members):
                    course.it.leave(course.members[worker], "bad")
            if course.it.update.collective:  # its group has broken
                for worker in set(work) & set(course.it.members) - set(refused):
                    course.it.regroup(course.members[worker], "somebody is gone")
            work = {worker: course.answer(worker) or work.get(worker) for worker in course.it.members}
            work = {worker: answer for worker, answer in work.items() if answer and course.members[worker].busy}
        course.finish(work)
        assert (course.it.state, course.it.reason) == ("done", ""), (one, other)
        assert sum(row["samples"] for row in course.of("merge")) >= 5 * SAMPLES - 4, (one, other)
        never = {worker for worker, what in ((1, one), (2, other)) if "huge" not in what}
        assert not never & {row["worker"] for row in course.of("merge")}, (one, other)
        assert np.isfinite(course.it.update.weights).all(), (one, other)


@pytest.mark.parametrize("rule", names())
@pytest.mark.parametrize("large", [1e16, 1e38, 3e38])
def test_large_finite_weights_are_no_nan(rule, large):
    """They are merged, or refused for what the rule would make of them; the run goes on with finite weights."""
    course, work = begun(make_update(rule), budget=8 * SAMPLES)
    for _ in range(3):
        for worker in list(work):
            answer = work.pop(worker)
            header = {"samples": answer.grant.samples, "version": answer.grant.version, "loss": 1.0, "score": 0.5, "wait_s": 0.0}
            header |= {"compute_s": 1.0, "score_s": 0.0, "send_s": 0.0}
            weights = np.full(SIZE, large if worker == 1 or course.it.update.collective else 1.0, np.float32)
            try:
                course.it.push(course.members[worker], header, weights, 0)
            except BadPush as error:
                assert "beyond the range of float32" in str(error) and "NaN" not in str(error)
                course.it.leave(course.members[worker], str(error))
                course.join(worker)
        work = {worker: answer for worker in WORKERS if (answer := course.answer(worker)) and answer.grant}
        assert course.it.state == "running" and np.isfinite(course.it.update.weights).all()
    state = [value for value in vars(course.it.update).values() if isinstance(value, np.ndarray)]
    assert all(np.isfinite(array).all() for array in state)


def test_a_rule_that_makes_nan_of_good_weights_is_what_is_at_fault():
    class Mine(AGWU):
        def _merge(self, push):
            self._publish(push.weights * np.float32("nan"), [(push, 1.0)])
            return self._release([push.worker])

    course, work = begun(Mine(), budget=200)
    course.push(0, work[0])
    course.push(0, course.answer(0))
    assert course.it.state == "failed" and "version 1 holds NaN or infinity, which no push did" in course.it.reason


def test_float16_refuses_what_it_cannot_send_to_the_others():
    course, work = begun(AGWU(), budget=200)
    course.it.limit = compression.largest("float16")
    with pytest.raises(BadPush, match=r"as large as 1e\+06 do not fit into float16 \(65504\)"):
        course.it.push(course.members[0], {"samples": work[0].grant.samples, "version": 0, "loss": 1.0, "score": 0.5},
                       np.full(SIZE, 1e6, np.float32), 0)  # fmt: skip


def test_versions_are_kept_evenly_over_the_run():
    """Twice as often as asked for, so that a kill while one is being written costs one interval at most."""
    course = Course(AGWU(), budget=20 * SAMPLES, checkpoints=5).join(*WORKERS)
    course.finish()
    course.it.checkpoint()
    versions = [version for version, _ in course.saved]
    assert versions[0] == 0 and versions[-1] == course.it.update.version and 10 <= len(versions) <= 12
    at = {row["version"]: row["total"] for row in course.of("merge")}
    for due, version in zip(range(1, 11), versions[1:], strict=False):
        assert 0 <= at[version] - due * 2 * SAMPLES < 2 * SAMPLES
    course.it.checkpoint()
    assert [version for version, _ in course.saved] == versions  # not twice


def test_the_status_counts_what_is_under_way():
    course = Course(AGWU(), budget=100).join(*WORKERS)
    answer = course.answer(0)
    course.members[0].seen, course.members[0].loss = 3, 0.25
    status = course.it.status()
    assert (status["samples"], status["version"], status["state"], status["started"]) == (3, 0, "running", True)
    assert status["workers"][0] == {"loss": 0.25, "score": None, "passes": 0, "host": "", "pid": None}
    course.push(0, answer)
    assert course.it.status()["samples"] == answer.grant.samples and course.it.status()["workers"][0]["passes"] == 1


@pytest.mark.parametrize("partition", [UDPA, lambda: IDPA(batches=1)])
@pytest.mark.parametrize("rule", RULES)
def test_who_comes_when_all_samples_are_handed_out_gets_its_share(rule, partition):
    """The others give back what exceeds theirs at their next release; nothing is lost, nothing is held twice."""
    course = Course(rule(), partition(), budget=400, workers=[0, 1]).join(0, 1)
    course.join(7)
    course.finish(speeds={0: 1, 1: 1, 7: 1})
    shares = course.it.partition.held
    assert sum(shares.values()) == SAMPLES and shares == {w: len(course.indices[w]) for w in (0, 1, 7)}
    assert all(4 <= n <= 8 for n in shares.values()), shares
    assert sorted(itertools.chain(*course.indices.values())) == list(range(SAMPLES))
    assert course.of("merge", worker=7) and sum(row["samples"] for row in course.of("reclaim")) >= 4


def test_a_latecomer_does_not_hold_up_a_round_that_is_under_way():
    course = Course(SGWU(), budget=200, workers=[0, 1]).join(0, 1)
    work = {w: course.answer(w) for w in (0, 1)}
    course.join(2)
    assert course.answer(2) is None
    course.push(0, work[0])
    course.push(1, work[1])
    assert {w: course.answer(w).grant.version for w in (0, 1, 2)} == {0: 1, 1: 1, 2: 1}


def test_the_run_begins_without_those_who_are_lost_before_the_start():
    course = Course(SGWU(), budget=100).join(0, 2)
    assert not course.it.started
    course.it.expect([0, 2])
    assert course.it.started and sorted(course.it.partition.held) == [0, 2]
    assert course.of("missing") == [{"kind": "missing", "worker": 1}] and course.of("join", worker=2)[0]["probe_s"] == 1.0
    work = {w: course.answer(w) for w in (0, 2)}
    course.join(1)  # it has come after all
    course.finish(work)
    assert course.it.state == "done" and course.of("merge", worker=1)


@pytest.mark.parametrize("of", ["agwu", "fedbuff", "delayed-nesterov"])
def test_a_latecomer_for_whom_nothing_is_left_lets_the_next_one_begin(of):
    """The one sample in the pool was set aside for the slower one; the server offered it to the other without end."""
    course = Course(make_update(of), IDPA(1), budget=6 * SAMPLES, balanced_end=False)
    for worker in WORKERS:
        course.join(worker, seconds=1.0 + worker)
    course.join(3, seconds=0.0).join(4, seconds=3.0)
    first = course.answer(0)
    course.push(0, first)
    assert course.of("allocate", worker=4)[0]["total"] == 1 and not course.of("allocate", worker=3)
    assert course.answer(4).grant.samples and course.it.shardless == {3} and not len(course.it.partition.pool)
    for worker in (1, 2):  # which hold more than their shares now
        course.push(worker, course.answer(worker))
    assert course.of("allocate", worker=3) and course.answer(3).grant.samples and not course.it.shardless


def test_an_all_reduce_whose_group_breaks_begins_anew_from_the_latest_version():
    course = Course(AllReduce(), budget=100).join(*WORKERS)
    work = {w: course.answer(w) for w in WORKERS}
    assert [work[w].grant.group for w in WORKERS] == [1, 1, 1] and work[0].grant.ranks == tuple(WORKERS)
    assert all(a.grant.rank_samples == tuple(work[w].grant.samples for w in WORKERS) for a in work.values())
    for worker in WORKERS:
        course.push(worker, work[worker])
    work = {w: course.answer(w) for w in WORKERS}
    assert [work[w].grant.group for w in WORKERS] == [1, 1, 1]  # nobody has changed: the group stays
    course.it.regroup(course.members[0], "the connection was closed")
    assert course.answer(0) is None
    course.it.leave(course.members[1])
    course.it.regroup(course.members[2], "the connection was closed")
    work = {w: course.answer(w) for w in (0, 2)}
    assert all(a.grant.ranks == (0, 2) and a.grant.group == 2 and a.grant.version == 1 for a in work.values())
    course.join(1)
    for worker in (0, 2):
        course.push(worker, work[worker])
    assert {course.answer(w).grant.group for w in WORKERS} == {3}


def test_a_group_that_breaks_for_ever_ends_the_run():
    course = Course(AllReduce(), budget=100).join(*WORKERS)
    for _ in range(100):
        if course.it.state != "running":
            break
        for worker in WORKERS:
            assert course.answer(worker).grant
        for worker in WORKERS:
            course.it.regroup(course.members[worker], "no luck")
    assert course.it.state == "failed" and "broke 10 times in a row at version 0" in course.it.reason


@pytest.mark.parametrize("workers", [[0], [0, 1, 2], [1, 2, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("partition", [UDPA, lambda: IDPA(batches=2)])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_goes_on_with_other_workers_gives_each_of_them_its_whole_shard(rule, partition, workers):
    first = Course(rule(), partition(), budget=200).join(*WORKERS)
    for _ in range(3):
        work = {w: answer for w in WORKERS if (answer := first.answer(w))}
        for worker, answer in work.items():
            first.push(worker, answer, answer.grant.samples * (1.0 + worker))
    state = first.it.state_dict()
    course = Course(rule(), partition(), budget=200, workers=workers, state=state).join(*workers, seconds=2.0)
    course.finish(speeds=dict.fromkeys(workers, 1.0))  # at every answer: what the worker holds is what the partition says
    assert sorted(itertools.chain(*course.indices.values())) == list(range(SAMPLES))
    assert course.it.state == "done" and course.it.grants.done > 200 - len(workers)
    numbers = [(row["worker"], row["pass"]) for row in [*first.of("push"), *course.of("push")]]
    assert len(set(numbers)) == len(numbers)


def test_a_newcomer_s_probe_counts_also_when_a_run_goes_on():
    first = Course(AGWU(), IDPA(batches=1), budget=200, workers=[0, 1]).join(0, 1)
    for worker in (0, 1):
        first.push(worker, work := first.answer(worker), 1.0 * work.grant.samples)
        first.answer(worker)
    course = Course(AGWU(), IDPA(batches=1), budget=200, workers=[0, 1, 2], state=first.it.state_dict()).join(0, 1, 2, seconds=4.0)
    assert course.it.partition.seconds[2] == 4.0


@pytest.mark.parametrize("rule", RULES)
def test_who_comes_back_never_counts_a_pass_twice(rule):
    """Worker 0 is far ahead when it is lost; its passes go on from there, so that each number is one pass in the record."""
    course = Course(rule(), budget=300, workers=[0, 1]).join(0, 1)
    work = {w: course.answer(w) for w in (0, 1)}
    for _ in range(3):
        course.push(0, work[0])
        if rule is not AGWU:
            course.push(1, work[1])
            work[1] = course.answer(1)
        work[0] = course.answer(0)
    course.it.leave(course.members[0], "lost")
    if rule is AllReduce:
        course.it.regroup(course.members[1], "a rank is gone")
        work[1] = course.answer(1)
    course.join(0)
    course.finish({1: work[1]})
    numbers = [(row["worker"], row["pass"]) for row in course.of("push")]
    assert len(set(numbers)) == len(numbers) and course.it.state == "done"


@pytest.mark.parametrize(
    ("rule", "seed"),
    [
        *itertools.product(RULES, range(12)),
        *(pytest.param(*rare, marks=pytest.mark.slow) for rare in itertools.product(RULES, range(12, 40))),
        *itertools.product(OTHERS, range(3)),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
@pytest.mark.parametrize("partition", [UDPA, lambda: IDPA(batches=3)])
def test_whoever_comes_and_goes_the_budget_is_met_and_no_sample_is_lost_or_doubled(rule, partition, seed):
    """Random pushes, losses, returns, newcomers and broken groups; at every moment the shards and the pool are the data set."""
    rule = rule() if isinstance(rule, type) else make_update(rule)
    chance = np.random.default_rng(seed)
    course = Course(rule, partition(), budget=300, local_steps=[None, 3][seed % 2]).join(*WORKERS)
    working, faults = {}, 0
    for _ in range(5000):
        course.now += 1.0
        course.it.tick()
        here = sorted(course.it.members)
        for worker in here:
            if worker not in working and (answer := course.answer(worker)):
                working[worker] = answer
        if course.it.over:
            break
        dice = chance.random()
        if faults < 25 and dice < 0.08 and here:
            lost = int(chance.choice(here))
            working.pop(lost, None)
            course.it.leave(course.members[lost], "lost")
            faults += 1
        elif (faults < 25 and dice < 0.16) or not here:
            if course.it.state == "running" and not course.it.finished:
                newcomer = int(chance.integers(0, 6))  # also one that is here: it comes again
                working.pop(newcomer, None)
                course.join(newcomer, seconds=float(chance.uniform(0.5, 2)))
                faults += 1
        elif working:
            worker = int(chance.choice(sorted(working)))
            answer = working.pop(worker)
            if answer.grant is None:
                course.it.leave(course.members[worker])
            elif rule.collective and any(i not in course.it.members for i in answer.grant.ranks):
                course.it.regroup(course.members[worker], "a rank is gone")
            else:
                course.push(worker, answer, answer.grant.samples * (1 + worker))
        else:
            assert len(course.it.members) < len(WORKERS) or faults == 25 or rule.collective, "everybody waits"
        partition_now = course.it.partition
        together = np.concatenate([partition_now.pool, *(partition_now.shard(w) for w in partition_now.workers)])
        assert sorted(together.tolist()) == list(range(SAMPLES))
    assert course.it.over and course.it.state == "done", course.it.status()
    left = 300 - course.it.grants.done
    assert left == 0 if not rule.collective else left < 6
    assert course.it.grants.done == sum(r["samples"] for r in course.of("merge"))


# -- dropped pushes ----------------------------------------------------------------------------------------------------


def test_what_a_rule_throws_away_is_recorded_and_is_granted_again():
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
    """Nothing was left for 0 and 1; what comes back is for 2, and what 2 cannot hold is for them."""
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


# -- pushes that are held back -----------------------------------------------------------------------------------------


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


def test_a_worker_that_is_held_at_the_end_is_sent_stop():
    """SSP holds the quick one when nothing is left for the slow one that it waits for."""
    course = Course(SSP(0), budget=7 * SAMPLES).join(*WORKERS)
    course.finish(speeds={0: 1, 1: 1, 2: 30})
    assert course.it.state == "done" and course.it.grants.merged == 7 * SAMPLES and course.of("hold")


def test_a_worker_that_joins_again_when_its_leave_was_the_end_is_sent_stop():
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


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_a_stop_when_all_have_been_answered_answers_nobody_again(state):
    course = Course(AGWU()).join(*WORKERS)
    working = {w: course.answer(w) for w in WORKERS}
    while not course.it.finished:
        course.push(worker := min(working), working.pop(worker))
        working |= {w: answer for w in WORKERS if (answer := course.answer(w)) and answer.grant}
    course.it.stop(state, "enough")
    assert not any(course.answer(w) for w in WORKERS)
    for worker in WORKERS:
        course.it.leave(course.members[worker])
    assert course.it.over and course.it.state == state


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_rule_with_a_deadline_is_called_when_that_is_over():
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


def test_a_deadline_after_the_end_of_the_run_does_nothing():
    course, work = begun(SGWU(quorum=0.5, grace=3.0), budget=200)
    course.push(0, work[0])
    course.it.stop("stopped", "")
    course.now = 9.0
    course.it.tick()
    assert not course.of("expire") and not course.of("merge")


def test_a_deadline_after_the_last_push_ends_nobody_twice():
    course = Course(SGWU(quorum=0.5, grace=3.0), budget=SAMPLES, balanced_end=False).join(*WORKERS)
    course.push(2, course.answer(2))
    course.now = 5.0
    course.it.tick()
    for worker in (0, 1, 1):
        course.push(worker, course.answer(worker))
    assert course.it.finished and course.it.expires == 8.0
    course.now = 55.0
    course.it.tick()
    assert [course.answer(worker).grant for worker in WORKERS] == [None] * 3 and len(course.of("expire")) == 1


# -- weights of each worker's own --------------------------------------------------------------------------------------


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


# -- milestones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [*RULES, *OTHERS], ids=lambda rule: getattr(rule, "__name__", None) or str(rule))
@pytest.mark.parametrize("overlap", [0, 2])
def test_at_a_milestone_everybody_waits_until_one_worker_has_settled(rule, overlap):
    rule = rule() if isinstance(rule, type) else make_update(rule)
    course = Course(rule, IDPA(batches=2), budget=80, milestones=(20, 50), overlap=overlap, local_steps=2).join(*WORKERS)
    course.finish(speeds={0: 3, 1: 1, 2: 2})
    assert (course.it.state, course.it.reason) == ("done", "")
    settled, few = course.of("settle"), len(WORKERS) - 1 if rule.collective else 0
    assert len(settled) == 2 and {row["worker"] for row in settled} == {0} and {row["samples"] for row in settled} == {0}
    for row, milestone in zip(settled, (20, 50), strict=True):
        before = course.rows[: course.rows.index(row)]
        merged = sum(other["samples"] for other in before if other["kind"] == "merge")
        thrown = sum(other["samples"] for other in before if other["kind"] == "drop")
        assert row["total"] == merged and milestone - few - thrown <= merged <= milestone
        assert row["version"] == row["base_version"] + 1
    merged = sum(row["samples"] for row in course.of("merge"))
    assert 80 - few <= merged <= 80
    versions = [row["version"] for row in course.rows if row["kind"] in ("merge", "settle")]
    assert sorted(set(versions)) == list(range(1, max(versions) + 1))


@pytest.mark.parametrize("rule", [SGWU, AGWU, AllReduce, EASGD])
def test_a_milestone_is_settled_once_whoever_is_lost_meanwhile(rule):
    course = Course(rule(), budget=60, milestones=(30,)).join(*WORKERS)
    answers = {w: course.answer(w) for w in WORKERS}

    def work():
        """Everybody works until one is to settle."""
        while not any(answer.grant.settle for answer in answers.values()):
            for worker in [w for w in answers if w in course.it.members]:
                course.push(worker, answers.pop(worker))
            answers.update({w: answer for w in course.it.members if (answer := course.answer(w))})
        return next(worker for worker, answer in answers.items() if answer.grant.settle)

    assert work() == 0
    course.it.leave(course.members[0], "killed")
    answers = {1: course.answer(1)}
    assert answers[1].grant.settle and not course.answers[2] and not course.of("settle")
    course.it.leave(course.members[1], "killed")
    course.it.leave(course.answer(2) and course.members[2], "killed")
    assert not course.of("settle") and course.it.last_lost_at is not None
    course.join(2, 0)
    answers = {2: course.answer(2)}
    assert answers[2].grant.settle and not course.answers[0]
    course.push(2, answers.pop(2))
    assert len(course.of("settle")) == 1
    course.finish()
    assert course.it.state == "done" and len(course.of("settle")) == 1
    assert 60 - (len(WORKERS) - 1) * rule.collective <= sum(row["samples"] for row in course.of("merge")) <= 60


def test_who_drops_a_milestone_in_its_midst_leaves_it_for_the_next_one():
    """A group that broke before it, say: with one who settles for ever everybody would wait for ever."""
    course = Course(AllReduce(), budget=60, milestones=(SAMPLES,)).join(*WORKERS)
    for worker, answer in {w: course.answer(w) for w in WORKERS}.items():
        course.push(worker, answer)
    assert course.answer(0).grant.settle
    course.it.regroup(course.members[0], "the group is gone")
    answer = course.answer(0)
    assert answer.grant.settle and not course.answers[1] and not course.answers[2]
    course.push(0, answer)
    course.finish()
    assert course.it.state == "done" and len(course.of("settle")) == 1


def test_a_checkpoint_knows_which_milestones_are_behind_it():
    course = Course(SGWU(), budget=60, milestones=(20, 40)).join(*WORKERS)
    states, save = [], course.it.save
    course.it.save = lambda version, weights, state: (states.append(state), save(version, weights, state))
    course.finish()
    assert sorted({state["settled"] for state in states}) == [0, 1, 2]
    for state in states:
        again = Course(SGWU(), UDPA(), budget=60, milestones=(20, 40), state=state).join(*WORKERS)
        again.finish()
        assert again.it.state == "done" and len(again.of("settle")) == 2 - state["settled"]


def test_weights_that_are_nan_after_a_milestone_fail_the_run():
    course = Course(AGWU(), budget=60, milestones=(SAMPLES,)).join(*WORKERS)
    answers = {w: course.answer(w) for w in WORKERS}
    for worker in WORKERS:
        course.push(worker, answers[worker])
    answer = course.answer(0)
    assert answer.grant.settle
    course.it.push(course.members[0], {"compute_s": 1.0}, answer.weights * np.float32(np.nan), answer.weights.nbytes)
    assert course.it.state == "failed" and "worker 0 settled version 3" in course.it.reason
