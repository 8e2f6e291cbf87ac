"""List scheduling of tasks with dependencies over threads: who does which task when, and how near that is to the best possible.

    while a thread is free and a task is ready:  the ready task of highest priority  ->  a free thread

Priorities by name: "level", BPT-CNN's (Chen et al. 2019): entry tasks first, each level before the next; "upward-rank", of HEFT
(Topcuoglu et al. 2002): what is left to do on the longest way from the start of a task to the end, so that the critical path goes
first. Threads by name: "least-loaded", BPT-CNN's: the free thread with the least work so far; "work-stealing": a task goes into the
queue of the thread that made it ready, and a thread whose queue is empty takes from the one with most work. No thread is idle while a task
is ready, so that Graham's bound (1969) holds for all of them:

    max(work / threads, critical path)  <=  makespan  <=  (2 - 1 / threads) x that

Python alone, without torch: tasks are numbers 0 ... n - 1, in an order in which predecessors come first.

Used by `labkit.inner.executor` and `labkit.inner.profiling`.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from labkit.errors import known, real, whole

PRIORITIES = ("level", "upward-rank")
ASSIGNMENTS = ("least-loaded", "work-stealing")
Edges = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Schedule:
    """Thread, start and end (s) of each task, planned or measured.

    Attributes
    ----------
    threads : how many there are.
    thread, start, end : for each task; times from the start of the step.
    predecessors : for each task, of earlier numbers.
    """

    threads: int
    thread: list[int]
    start: list[float]
    end: list[float]
    predecessors: Edges

    @property
    def costs(self) -> list[float]:
        """Seconds of each task."""
        return [end - start for start, end in zip(self.start, self.end, strict=True)]

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first task to the end of the last."""
        return max(self.end, default=0.0) - min(self.start, default=0.0)

    @property
    def critical_path(self) -> list[int]:
        """The tasks of the longest way through the dependencies, first to last: no number of threads makes a step shorter."""
        costs = self.costs
        rank = upward_rank(self.predecessors, costs)
        following = successors(self.predecessors)
        task = max(range(len(costs)), key=rank.__getitem__, default=None)
        path = []
        while task is not None:
            path.append(task)
            task = max(following[task], key=rank.__getitem__, default=None)
        return path

    @property
    def bounds(self) -> dict[str, float]:
        """What no schedule of these tasks can be shorter than (s): all work over all threads; the critical path."""
        costs = self.costs
        return {"work / threads": sum(costs) / self.threads, "critical path": sum(costs[task] for task in self.critical_path)}

    @property
    def bound(self) -> float:
        """The greater of the two `bounds`."""
        return max(self.bounds.values())

    @property
    def idle_share(self) -> float:
        """Of the threads' time from the start to the end of the step, 0 to 1."""
        return 1 - sum(self.costs) / (self.threads * self.makespan) if self.makespan else 0.0


def schedule(
    predecessors: Edges,
    costs: Sequence[float],
    threads: int,
    *,
    priority: str | Sequence[float] = "upward-rank",
    assignment: str = "least-loaded",
) -> Schedule:
    """Plan tasks of known costs (s) by list scheduling.

    Parameters
    ----------
    predecessors : of each task, numbers smaller than its own.
    priority : "level", "upward-rank", or a number for each task; the highest goes first, the earlier of equals.
    assignment : "least-loaded" or "work-stealing".
    """
    threads, assignment = whole("threads", threads), known("assignment", assignment, ASSIGNMENTS)
    _check(predecessors, costs)
    rank = priorities(predecessors, costs, priority) if isinstance(priority, str) else list(priority)
    n, following = len(costs), successors(predecessors)
    waiting = [len(set(before)) for before in predecessors]
    plan = Schedule(threads, [0] * n, [0.0] * n, [0.0] * n, predecessors)
    free, load, running = set(range(threads)), [0.0] * threads, []
    # One queue for all, or one for each thread, of (-priority, task).
    stealing = assignment == "work-stealing"
    queues: list[list[tuple[float, int]]] = [[] for _ in range(threads if stealing else 1)]
    for number, task in enumerate(task for task in range(n) if not waiting[task]):
        heapq.heappush(queues[number % len(queues)], (-rank[task], task))

    def choose() -> tuple[int, int]:
        """A free thread, and the task that it takes."""
        if not stealing:
            return min(free, key=lambda thread: (load[thread], thread)), heapq.heappop(queues[0])[1]
        own = [thread for thread in free if queues[thread]]
        thread = min(own or free)
        fullest = max(
            range(threads), key=lambda other: (sum(costs[task] for _, task in queues[other]), bool(queues[other]), -other)
        )
        return thread, heapq.heappop(queues[thread if own else fullest])[1]

    now = 0.0
    while True:
        while free and any(queues):
            thread, task = choose()
            free.discard(thread)
            load[thread] += costs[task]
            plan.thread[task], plan.start[task], plan.end[task] = thread, now, now + costs[task]
            heapq.heappush(running, (plan.end[task], task))
        if not running:
            return plan
        now = running[0][0]
        while running and running[0][0] == now:  # all that end now, before anything starts
            done = heapq.heappop(running)[1]
            free.add(plan.thread[done])
            for task in following[done]:
                waiting[task] -= 1
                if not waiting[task]:
                    heapq.heappush(queues[plan.thread[done] if stealing else 0], (-rank[task], task))


def priorities(predecessors: Edges, costs: Sequence[float], name: str) -> list[float]:
    """Of each task by the rule of that name; the highest goes first."""
    if known("priority", name, PRIORITIES) == "upward-rank":
        return upward_rank(predecessors, costs)
    depth = levels(predecessors)
    return [float(max(depth) - level) for level in depth]


def levels(predecessors: Edges) -> list[int]:
    """0 for a task without predecessors, else 1 more than the greatest level of these."""
    level: list[int] = []
    for before in predecessors:
        level.append(1 + max((level[task] for task in before), default=-1))
    return level


def upward_rank(predecessors: Edges, costs: Sequence[float]) -> list[float]:
    """Seconds from the start of each task to the end of the step on the longest way: its cost + the greatest rank of its successors."""
    rank = list(costs)
    for task in reversed(range(len(rank))):  # by then its successors have added theirs
        for earlier in predecessors[task]:
            rank[earlier] = max(rank[earlier], costs[earlier] + rank[task])
    return rank


def successors(predecessors: Edges) -> list[list[int]]:
    """The same dependencies from the other end."""
    following: list[list[int]] = [[] for _ in predecessors]
    for task, before in enumerate(predecessors):
        for earlier in sorted(set(before)):
            following[earlier].append(task)
    return following


def _check(predecessors: Edges, costs: Sequence[float]) -> None:
    if len(predecessors) != len(costs):
        raise ValueError(f"{len(costs)} costs were given for {len(predecessors)} tasks; give one for each.")
    for task, (before, cost) in enumerate(zip(predecessors, costs, strict=True)):
        real(f"costs[{task}]", cost, least=0)
        if bad := [earlier for earlier in before if not 0 <= earlier < task]:
            raise ValueError(
                f"task {task} has predecessor {bad[0]}: give tasks in an order in which predecessors come first, from 0 on."
            )
