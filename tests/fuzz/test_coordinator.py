"""The course of a run under whatever comes: joins, leaves, pushes, heartbeats, broken groups, deadlines, stops and crashes in any
order, on a clock that only the test moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from labkit.errors import ClusterError
from labkit.partition import IDPA, UDPA
from labkit.updates import BadPush, make_update
from tests.fuzz.helpers import LIMIT, fuzzed
from tests.helpers import WORKERS, Course
from tests.updates.test_base import ALL, called

pytestmark = LIMIT

INDICES = st.integers(0, 4)
SECONDS = st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 60.0, 1e9])


class Log(Course):
    """A course that notes what it was asked, so that another one can be asked the same."""

    def __init__(self, *arguments, **options):
        self.log = []
        super().__init__(*arguments, **options)

    def ask(self, name, *arguments):
        self.log.append((self.now, name, arguments))
        return self.obey(name, *arguments)

    def obey(self, name, *arguments):
        if name == "join":
            return self.join(arguments[0], seconds=arguments[1])
        if name == "push":
            worker, header, weights = arguments
            return self.it.push(self.members[worker], header, weights, weights.nbytes)
        if name in ("leave", "regroup"):
            return getattr(self.it, name)(self.members[arguments[0]], *arguments[1:])
        return getattr(self.it, name)(*arguments)


def machine(rules):
    class Running(RuleBasedStateMachine):
        @initialize(
            of=st.sampled_from(rules),
            batches=st.sampled_from([0, 1, 2]),
            budget=st.sampled_from([17, 34, 61, 200]),
            local_steps=st.sampled_from([None, 1, 3]),
            overlap=st.sampled_from([0, 2]),
            milestones=st.sampled_from([(), (9,), (5, 16)]),
            ema=st.sampled_from([None, 0.9]),
            balanced=st.booleans(),
            there=st.sampled_from([3, 3, 3, 2, 0]),
        )
        def begin(self, of, batches, budget, local_steps, overlap, milestones, ema, balanced, there):
            self.of, self.batches = of, batches
            self.options = {"budget": budget, "local_steps": local_steps, "overlap": overlap, "milestones": milestones}
            self.options |= {"ema": ema, "balanced_end": balanced}
            self.course = Log(make_update(of), self.partition(), **self.options)
            self.begun_with, self.seen, self.begun_at = None, 0, 0
            self.work, self.pushed, self.merged, self.version = {}, {}, 0, 0
            for worker in WORKERS[:there]:
                self.ask("join", worker, 1.0 + worker)

        def partition(self):
            return IDPA(self.batches) if self.batches else UDPA()

        @property
        def it(self):
            return self.course.it

        def ask(self, name, *arguments):
            """And what every call must leave behind: rows that add up."""
            course, it = self.course, self.it
            out = course.ask(name, *arguments)
            for row in course.rows[self.seen :]:
                kind, worker = row["kind"], row.get("worker")
                if kind == "push" and it.state == "running":
                    self.pushed.setdefault(worker, []).append(row["samples"])
                elif kind == "leave" and it.update.name != "fedbuff":  # which has summed it up already
                    self.pushed.pop(worker, None)
                elif kind in ("merge", "drop"):
                    assert row["samples"] == self.pushed[worker].pop(0), "what counts was pushed, once, by a member"
                    if not self.pushed[worker]:
                        del self.pushed[worker]
                if kind == "merge":
                    self.merged += row["samples"]
                    assert row["version"] - self.version in (0, 1) and row["total"] <= it.grants.merged
                    self.version = row["version"]
                elif kind == "settle":
                    assert row["version"] == self.version + 1
                    self.version = row["version"]
                elif kind == "drop":
                    assert row["coefficient"] == 0
            self.seen = len(course.rows)
            for worker in list(it.members):
                if answer := course.answer(worker):
                    assert worker not in self.work, "an answer is for who waits"
                    self.work[worker] = answer
            return out

        # -- what comes ------------------------------------------------------------------------------------------------

        @rule(worker=INDICES, seconds=SECONDS, comes=st.booleans())
        def come_or_go(self, worker, seconds, comes):
            if comes:
                self.join(worker, seconds)
            elif worker in self.it.members:
                self.work.pop(worker, None)
                self.ask("leave", worker, "killed")

        def join(self, worker, seconds):
            if self.it.state != "running" or self.it.finished:
                with pytest.raises(ClusterError, match="has ended"):
                    self.it.join(worker)
                return
            self.work.pop(worker, None)
            self.ask("join", worker, seconds)

        @rule(worker=INDICES, samples=st.integers(0, 20))
        def what_changes_nothing(self, worker, samples):
            """A heartbeat, a leave of an earlier incarnation, a saved version."""
            member, before = self.course.members.get(worker), len(self.course.rows)
            if self.it.members.get(worker) is member is not None:
                member.seen = min(samples, member.granted)  # as the server does
            elif member is not None:
                self.it.leave(member)
            assert len(self.course.rows) == before
            self.ask("checkpoint")

        @precondition(lambda self: self.work)
        @rule(seed=st.integers(0, 99), n=st.integers(2, 8))
        def work_on(self, seed, n):
            """Some pushes of whoever may."""
            chance = np.random.default_rng(seed)
            for _ in range(n):
                if self.work:
                    self.course.now += float(chance.integers(0, 3))
                    self.hand_in(int(chance.choice(sorted(self.work))), float(chance.random()), int(chance.integers(0, 6)))

        @precondition(lambda self: self.work)
        @rule(data=st.data(), seconds=SECONDS, step=st.integers(0, 5), score=st.sampled_from([0.0, 0.5, 1.0]))
        def push(self, data, seconds, step, score):
            self.course.now += min(seconds, 100.0)
            self.hand_in(data.draw(st.sampled_from(sorted(self.work))), seconds, step, score)

        def hand_in(self, worker, seconds=1.0, step=1, score=0.5):
            """What its grant has asked for; who was told to stop leaves."""
            answer, it = self.work.pop(worker), self.it
            if answer.grant is None:
                return self.ask("leave", worker, "")
            weights = answer.weights + np.float32(1 if it.update.collective else 0.25 * (worker + step))  # replicas are equal
            samples = answer.grant.carry + answer.grant.samples - answer.grant.ahead
            header = {"samples": samples, "version": answer.grant.version, "loss": 1.0}
            header |= {"score": score if it.update.scored or step % 2 else None, "op": "push"}
            header |= {"compute_s": seconds, "score_s": 0.0, "wait_s": 0.0, "send_s": 0.0}
            try:
                self.ask("push", worker, header, weights)
            except BadPush:
                pytest.fail("a push that was asked for is refused")

        @precondition(lambda self: self.work and self.it.state == "running")
        @rule(data=st.data(), kind=st.sampled_from(["nan", "size", "samples", "version", "score"]))
        def bad_push(self, data, kind):
            """It changes nothing, and costs its worker its membership."""
            worker = data.draw(st.sampled_from(sorted(self.work)))
            grant = self.work[worker].grant
            if grant is None or grant.settle:
                return
            weights = self.work[worker].weights.copy()
            weights[0] = np.nan if kind == "nan" else weights[0]
            header = {"samples": grant.carry + grant.samples - grant.ahead + (kind == "samples"), "loss": 1.0, "op": "push"}
            header |= {"version": grant.version + (kind == "version"), "score": 2.0 if kind == "score" else 0.5}
            header |= {"compute_s": 1.0, "score_s": 0.0, "wait_s": 0.0, "send_s": 0.0}
            before = self.it.status()
            with pytest.raises(BadPush):
                self.it.push(self.course.members[worker], header, None if kind == "size" else weights, 3)
            assert self.it.status() == before
            del self.work[worker]
            self.ask("leave", worker, "a bad push")

        @precondition(lambda self: self.it.update.collective and self.it.state == "running")
        @rule(data=st.data())
        def regroup(self, data):
            busy = [worker for worker, answer in self.work.items() if answer.grant and answer.grant.group]
            if busy:
                worker = data.draw(st.sampled_from(sorted(busy)))
                del self.work[worker]
                self.ask("regroup", worker, "the group has broken")

        @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 1e6]))
        def time_passes(self, seconds):
            self.course.now += seconds
            self.ask("tick")

        @precondition(lambda self: not self.it.started and self.it.members)
        @rule()
        def begin_without_the_others(self):
            self.ask("expect", sorted(self.it.members))

        @precondition(lambda self: len(self.course.log) > 20)
        @rule(state=st.sampled_from(["stopped", "failed"]))
        def stop(self, state):
            self.ask("stop", state, "enough")

        @precondition(lambda self: self.it.state == "running" and not self.it.finished)
        @rule(others=st.booleans())
        def crash(self, others):
            """The run goes on from its newest version, under other workers perhaps, and what was not merged is made again."""
            self.same_again()
            it, course = self.it, self.course
            self.begun_with = {**it.state_dict(), "update": it.update.lasting()}, it.update.weights
            workers = [0, 3] if others else WORKERS
            self.course = self.resumed(workers)
            self.course.now, self.resumed_with = course.now, workers
            assert self.it.update.version == self.version and self.it.grants.done == self.it.grants.merged == it.grants.merged
            self.work, self.pushed, self.seen, self.begun_at = {}, {}, len(self.course.rows), self.course.now

        def resumed(self, workers):
            state, weights = self.begun_with
            course = Log(make_update(self.of), self.partition(), workers=workers, state=state, **self.options)
            course.it.update.weights = weights  # the helper begins with zeros
            if course.it.average:
                course.it.average.load_state_dict(state["ema"], course.it.grants.merged)
            return course

        # -- what always holds -----------------------------------------------------------------------------------------

        @invariant()
        def counts_hold(self):
            it, grants = self.it, self.it.grants
            assert grants.merged == self.merged and grants.merged <= grants.done <= grants.budget
            assert grants.limits[0] >= grants.granted >= grants.done and grants.remaining >= 0
            assert sum(member.granted for member in it.members.values()) + grants.done == grants.granted
            assert it.update.version == self.version and np.isfinite(it.update.weights).all()
            assert not it.average or np.isfinite(it.average.weights).all()

        @invariant()
        def nobody_waits_for_who_has_left(self):
            it = self.it
            assert {worker for worker, answer in self.work.items() if answer.grant} == {
                member.index for member in it.members.values() if member.busy
            }
            if it.state == "running" and it.started and it.members:
                assert self.work or it.expires is not None or it.finished, "everybody waits, and for nobody"
                assert it.finished or set(it.update.bases) <= set(it.members)
            assert it.over == (it.state != "running" and not it.members)

        @invariant()
        def what_is_saved_can_be_gone_on_from(self):
            for version, weights in self.course.saved:
                assert version <= self.version and np.isfinite(weights).all()
            versions = [version for version, _ in self.course.saved]
            assert versions == sorted(set(versions)), "each version is saved once"

        def same_again(self):
            """The log of the course leads another one to the same rows, answers and weights, bit for bit."""
            if self.begun_with is None:
                again = Log(make_update(self.of), self.partition(), **self.options)
            else:
                again = self.resumed(self.resumed_with)
            again.now = self.begun_at
            for again.now, name, arguments in self.course.log:
                again.obey(name, *arguments)
                again.answers = {worker: [] for worker in again.answers}
            assert again.rows == self.course.rows
            assert again.it.update.weights.tobytes() == self.it.update.weights.tobytes()
            assert [(v, w.tobytes()) for v, w in again.saved] == [(v, w.tobytes()) for v, w in self.course.saved]

        def teardown(self):
            """Whoever is here makes the rest of the run, and then it is over."""
            if not hasattr(self, "course"):
                return
            it = self.it
            if it.state == "running" and not it.finished:
                if not it.started:
                    for worker in set(it.workers) - set(it.members):
                        self.join(worker, 1.0)
                elif not it.members:
                    self.join(1, 1.0)
            for _ in range(2000):
                if not it.members:
                    break
                self.course.now += 1.0
                if self.work:
                    self.hand_in(min(self.work))
                else:
                    self.ask("tick")
                self.counts_hold()
            assert it.over and not it.members, f"it does not end: {it.state} {it.reason}"
            if it.state == "done":
                left = it.grants.budget - it.grants.merged
                assert left == 0 or (it.update.collective and left < 5), "the budget is met"
                assert len(it.grants.limits) == 1, "no milestone is left out"
            else:
                assert it.state in ("stopped", "failed") and (it.reason == "enough" or "broke" in it.reason), it.reason
            self.same_again()

    return Running


def test_whatever_comes_a_run_counts_each_sample_once_and_ends():
    run_state_machine_as_test(machine(ALL), settings=fuzzed(15))


@pytest.mark.slow
@pytest.mark.parametrize("of", ALL, ids=called)
def test_whatever_comes_a_run_under_each_rule_counts_each_sample_once_and_ends(of):
    run_state_machine_as_test(machine([of]), settings=fuzzed(40))
