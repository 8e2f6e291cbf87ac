"""Blocks of workers: the workers of a lab in groups of one size, and a queue of jobs, each a run of its own on a free block.

    workers 0 1 2 3 4, blocks of 2    (0, 1) and (2, 3), each with one job at a time, in the order of the jobs; worker 4 is idle

The workers stay leased to the caller from the first run to the last. A run goes on without a worker that is lost, as any run does;
the next ones on its block begin without it.

Used by `labkit.subnets.train`.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from labkit.cluster.lab import Lab
from labkit.errors import ClusterError
from labkit.training.run import Run

POLL_S = 0.05


def run_on_blocks(
    lab: Lab,
    workers: Sequence[int],
    size: int,
    jobs: Sequence[Any],
    start: Callable[[Any, list[int]], Run],
    each: Callable[[Any, Run], None],
    *,
    timeout: float,
) -> list[Run]:
    """A run for each job, in the order of the jobs; returns when all have ended.

    Parameters
    ----------
    workers, size
        The workers, leased by the caller, and how many of them a block has.
    start
        `start(job, workers)` begins the run of a job on the live workers of a block (`labkit.training.train.launch`).
    each
        `each(job, run)` is called again and again while a run lasts, and at least once when it has ended, done or not. It decides
        whether a run that failed or was stopped matters: whatever it raises stops all others.
    timeout
        Seconds for all of them.

    Raises
    ------
    ClusterError
        All workers are lost, or not all runs have ended in time; those that still run are stopped.
    """
    limit = time.monotonic() + timeout
    blocks = [list(workers[at : at + size]) for at in range(0, len(workers) - size + 1, size)]
    todo, ended = deque(enumerate(jobs)), {}
    busy: dict[int, tuple[int, Any, Run]] = {}  # by block: number of the job, the job, its run
    try:
        while len(ended) < len(jobs):
            for at in [at for at in range(len(blocks)) if at not in busy and todo]:
                if alive := [worker for worker in blocks[at] if worker not in lab.lost()]:
                    number, job = todo.popleft()
                    busy[at] = number, job, start(job, alive)
            if not busy:
                raise ClusterError("every worker of this lab is lost. connect() again for a full lab.")
            for at, (number, job, run) in list(busy.items()):
                over = run.state != "running"
                each(job, run)
                if over:
                    ended[number] = run
                    del busy[at]
            if time.monotonic() > limit and len(ended) < len(jobs):
                left = len(jobs) - len(ended)
                raise ClusterError(f"{left} of {len(jobs)} runs were not done within {timeout:g} s; they were stopped.")
            time.sleep(POLL_S)
    finally:
        for _, _, run in busy.values():
            run.stop()
    return [ended[number] for number in range(len(jobs))]
