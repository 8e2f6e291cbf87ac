"""List scheduling: what holds for every graph, priority and assignment; known graphs; what cannot be scheduled.

Used by pytest.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from labkit.inner.scheduler import ASSIGNMENTS, PRIORITIES, Schedule, levels, schedule, successors, upward_rank

WAYS = [(priority, assignment) for priority in PRIORITIES for assignment in ASSIGNMENTS]


def drawn(seed):
    """A graph of up to 40 tasks, of any shape: chains, layers, tasks of no cost."""
    draw = random.Random(seed)
    n, density = draw.randint(1, 40), draw.choice([0.02, 0.1, 0.5])
    predecessors = [[earlier for earlier in range(task) if draw.random() < density] for task in range(n)]
    return predecessors, [draw.choice([0.0, draw.random(), 10 * draw.random()]) for _ in range(n)]


def overlaps(plan):
    for thread in range(plan.threads):
        own = sorted((plan.start[task], plan.end[task]) for task in range(len(plan.start)) if plan.thread[task] == thread)
        yield from (later[0] < earlier[1] for earlier, later in pairwise(own))


@pytest.mark.parametrize(("priority", "assignment"), WAYS)
def test_what_holds_for_every_graph(priority, assignment):
    for seed in range(30):
        predecessors, costs = drawn(seed)
        for threads in (1, 2, 3, 7):
            plan = schedule(predecessors, costs, threads, priority=priority, assignment=assignment)
            assert plan.costs == pytest.approx(costs) and set(plan.thread) <= set(range(threads))
            assert all(plan.end[earlier] <= plan.start[task] for task, before in enumerate(predecessors) for earlier in before)
            assert not any(overlaps(plan))
            assert plan.makespan >= max(plan.bounds.values()) - 1e-9
            assert plan.makespan <= (2 - 1 / threads) * plan.bound + 1e-9  # Graham 1969
            assert plan.idle_share == pytest.approx(1 - sum(costs) / (threads * plan.makespan) if plan.makespan else 0)
            assert threads > 1 or plan.makespan == pytest.approx(sum(costs))
            assert plan == schedule(predecessors, costs, threads, priority=priority, assignment=assignment)


def test_the_critical_path_is_the_longest_way_through_the_graph():
    for seed in range(30):
        predecessors, costs = drawn(seed)
        plan = schedule(predecessors, costs, 2)
        path = plan.critical_path
        assert all(earlier in predecessors[task] for earlier, task in pairwise(path))
        longest = [0.0] * len(costs)
        for task, before in enumerate(predecessors):
            longest[task] = costs[task] + max((longest[earlier] for earlier in before), default=0)
        assert sum(costs[task] for task in path) == pytest.approx(max(longest)) == pytest.approx(plan.bounds["critical path"])


#      0 (1 s) -> 1 (9 s)      and six tasks of 1 s without any edge: whoever begins with the long way is done first
FORK = [[], [0], [], [], [], [], [], []], [1.0, 9.0, *[1.0] * 6]


def test_upward_rank_follows_the_critical_path_and_level_does_not():
    assert levels(FORK[0]) == [0, 1, *[0] * 6] and upward_rank(*FORK) == [10, 9, *[1] * 6]
    assert schedule(*FORK, 2, priority="upward-rank").makespan == 10
    last = [[] for _ in range(7)] + [[6]], [*[1.0] * 7, 9.0]  # the long way begins with the last of seven that are equal in level
    assert schedule(*last, 2, priority="upward-rank").makespan == 10
    assert schedule(*last, 2, priority="level").makespan == 13


def test_given_priorities_are_followed():
    plan = schedule([[], [], []], [1.0, 1.0, 1.0], 1, priority=[1, 3, 2])
    assert plan.start == [2, 0, 1]


def test_least_loaded_evens_the_work_out():
    plan = schedule([[]] * 3 + [[0, 1, 2]] * 2, [3.0, 1.0, 2.0, 1.0, 1.0], 2)
    assert plan.thread[:3] == [0, 1, 1] and plan.makespan == 4


def test_work_stealing_leaves_a_task_to_the_thread_that_made_it_ready_until_another_is_idle():
    chain = [[], [], [0], [1], [2], [3]]
    plan = schedule(chain, [1.0] * 6, 2, assignment="work-stealing")
    assert plan.thread == [0, 1, 0, 1, 0, 1]
    stolen = schedule([[], [0], [0], [0]], [1.0] * 4, 2, assignment="work-stealing")
    assert stolen.makespan == 3 and set(stolen.thread[1:]) == {0, 1}


def test_a_schedule_without_tasks():
    plan = schedule([], [], 2)
    assert plan == Schedule(2, [], [], [], []) and plan.makespan == 0 and plan.critical_path == [] and plan.idle_share == 0
    assert successors([]) == []


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (([[]], [1.0, 2.0], 2), ValueError, "2 costs were given for 1 tasks"),
        (([[1], []], [1.0, 1.0], 2), ValueError, "task 0 has predecessor 1"),
        (([[-1]], [1.0], 2), ValueError, "task 0 has predecessor -1"),
        (([[]], [-1.0], 2), ValueError, r"costs\[0\]"),
        (([[]], [float("nan")], 2), ValueError, r"costs\[0\]"),
        (([[]], [1.0], 0), ValueError, "threads"),
        (([[]], [1.0], 1.5), TypeError, "threads"),
    ],
)
def test_what_cannot_be_scheduled(given, error, words):
    with pytest.raises(error, match=words):
        schedule(*given)


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="Did you mean 'upward-rank'"):
        schedule([[]], [1.0], 1, priority="upward rank")
    with pytest.raises(ValueError, match="Did you mean 'work-stealing'"):
        schedule([[]], [1.0], 1, assignment="stealing")
