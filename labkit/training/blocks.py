"""Blocks of workers: the workers of a lab in groups of one size, and a queue of jobs, each a run of its own on a free block.

    workers 0 1 2 3 4, blocks of 2    (0, 1) and (2, 3), each with one job at a time, in the order of the jobs; worker 4 is idle

The workers stay leased to the caller from the first run to the last. A run goes on without a worker that is lost, as any run does;
the next ones on its block begin without it, or with the process that has come in its place.

Used by `labkit.subnets.train` and `labkit.experiments.search`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from labkit.cluster.lab import Lab
from labkit.errors import ClusterError
from labkit.training.run import Run

POLL_S = 0.05
RETURN_S = 15.0  # so long a worker that is lost may take to come back, where no block has one any more
END = object()  # of the jobs


def run_on_blocks(
    lab: Lab,
    workers: Sequence[int],
    size: int,
    jobs: Iterable[Any],
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
    jobs
        Drawn one by one, each when a block is free for it; an iterator may make them of what has ended before.
    start
        `start(job, workers)` begins the run of a job on the live workers of a block (`labkit.training.train.launch`); all others wait for it.
    each
        `each(job, run)` is called again and again while a run lasts, and at least once when it has ended, done or not. It decides
        whether a run that failed or was stopped matters: whatever it raises stops all others.
    timeout
        Seconds for all of them, if there is an end of jobs.

    Raises
    ------
    ClusterError
        All workers are lost and none comes back, or not all runs have ended in time; those that still run are stopped.
    """
    limit = time.monotonic() + timeout
    blocks = [list(workers[at : at + size]) for at in range(0, len(workers) - size + 1, size)]
    jobs, ended = iter(jobs), []  # a run for each job that was drawn, None until it has ended
    busy: dict[int, tuple[int, Any, Run]] = {}  # by block: number of the job, the job, its run
    drawn, all_lost_at = END, None  # a job that no block was left for, and since when
    try:
        while True:
            if lab.lost():
                lab.refresh()
            lost = lab.lost()
            alive = {at: left for at, block in enumerate(blocks) if (left := [worker for worker in block if worker not in lost])}
            for at in [at for at in alive if at not in busy]:
                job, drawn = (next(jobs, END), END) if drawn is END else (drawn, END)
                if job is not END:
                    ended.append(None)
                    busy[at] = len(ended) - 1, job, start(job, alive[at])
            if not busy and not alive and (drawn := next(jobs, END) if drawn is END else drawn) is not END:
                all_lost_at = all_lost_at or time.monotonic()
                if time.monotonic() - all_lost_at >= RETURN_S:
                    raise ClusterError("every worker of this lab is lost. connect() again for a full lab.")
                time.sleep(POLL_S)
                continue
            all_lost_at = None
            if not busy:
                return ended
            n_busy = len(busy)
            for at, (number, job, run) in list(busy.items()):
                over = run.state != "running"
                each(job, run)
                if over:
                    ended[number] = run
                    del busy[at]
            if time.monotonic() > limit and busy:
                waiting = sum(1 for _ in jobs)
                left, total = len(busy) + waiting, len(ended) + waiting
                raise ClusterError(f"{left} of {total} runs were not done within {timeout:g} s; they were stopped.")
            if len(busy) == n_busy:  # else a block is free, and the next job begins at once
                time.sleep(POLL_S)
    finally:
        for _, _, run in busy.values():
            run.stop()
