"""Blocks of workers: a queue of jobs on disjoint blocks; what is lost, fails or takes too long. Runs are stand-ins here; real ones
are trained on blocks in tests/subnets/test_train.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from labkit.errors import ClusterError
from labkit.training import blocks
from labkit.training.blocks import run_on_blocks


class Course:
    """A lab whose runs end after as many looks as their job says; "end" is what a job's run becomes then."""

    def __init__(self, lost=()):
        self.lab, self.started, self.going, self.together, self.stopped = (
            SimpleNamespace(lost=lambda: lost, refresh=list),
            [],
            {},
            0,
            [],
        )

    def start(self, job, workers):
        assert not {worker for held in self.going.values() for worker in held} & set(workers)
        self.started.append((job, workers))
        self.going[job], looks = workers, iter(range(job))
        self.together = max(self.together, len(self.going))
        run = SimpleNamespace(state="running", stop=lambda: self.stopped.append(job))

        def look():
            if next(looks, None) is None:
                run.state = "done"
                del self.going[job]

        run.look = look
        return run

    def each(self, job, run):
        if run.state == "running":
            run.look()

    def __call__(self, workers, size, jobs, each=None, timeout=20):
        return run_on_blocks(self.lab, workers, size, jobs, self.start, each or self.each, timeout=timeout)


def test_blocks_are_disjoint_work_at_the_same_time_and_draw_jobs_in_order():
    course = Course()
    runs = course([0, 1, 2, 4, 5], 2, [3, 1, 2, 4])
    assert course.together == 2 and {tuple(workers) for _, workers in course.started} == {(0, 1), (2, 4)}
    assert [job for job, _ in course.started] == [3, 1, 2, 4] and course.started[2][1] == [2, 4]  # the block that was free first
    assert [run.state for run in runs] == ["done"] * 4 and not course.stopped


def test_a_block_that_is_free_draws_the_next_job_at_once(monkeypatch):
    course, slept = Course(), []
    monkeypatch.setattr(blocks.time, "sleep", lambda seconds: slept.append(len(course.started)))
    course([0], 1, [2, 1, 3])
    assert slept == [1] * 3 + [2] * 2 + [3] * 4  # once for each look that found its run under way


def test_lost_workers_are_in_no_block(monkeypatch):
    monkeypatch.setattr(blocks, "RETURN_S", 0.0)
    course = Course(lost=[1, 2])
    course([0, 1, 2], 2, [1, 1])
    assert [workers for _, workers in course.started] == [[0], [0]]
    course = Course(lost=[1])
    course([0, 1], 1, [2, 1])
    assert [workers for _, workers in course.started] == [[0], [0]]
    with pytest.raises(ClusterError, match="every worker of this lab is lost"):
        Course(lost=[0, 1])([0, 1], 1, [1])


def test_a_worker_that_comes_back_is_in_its_block_again_and_no_job_is_lost():
    lost, course, looks = [0], Course(), iter([False, False, True])
    course.lab.lost, course.lab.refresh = lambda: lost, lambda: next(looks) and lost.clear()
    assert [run.state for run in course([0], 1, [1, 2])] == ["done"] * 2 and course.started == [(1, [0]), (2, [0])]


def test_what_each_raises_stops_the_others_and_is_called_once_a_run_has_ended():
    course, seen = Course(), []

    def each(job, run):
        course.each(job, run)
        seen.append((job, run.state))
        if run.state == "done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        course([0, 1], 1, [900, 2], each)
    assert seen[-1] == (2, "done") and 900 in course.stopped and len(course.started) == 2


def test_runs_that_take_too_long_are_stopped():
    course = Course()
    with pytest.raises(ClusterError, match=r"3 of 3 runs were not done within 0.2 s; they were stopped"):
        course([0, 1], 1, [900, 901, 902], timeout=0.2)
    assert course.stopped == [900, 901]


def test_a_run_that_failed_is_left_to_the_caller():
    course = Course()

    def fail(job, run):
        course.each(job, run)
        if run.state == "done" and job == 2:
            run.state = "failed"

    assert [run.state for run in course([0, 1], 1, [2, 3], fail)] == ["failed", "done"]
