"""Tasks: spread over workers, and what becomes of those whose worker is lost (`test_backend`: on their workers, errors, limits)."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

import labkit
from labkit.cluster.backend import Again
from labkit.cluster.tasks import Task, spread
from labkit.errors import ClusterError

pytestmark = pytest.mark.usefixtures("closed")


def test_map_reports_who_works_and_what_is_done():
    seen = []
    with labkit.connect("threads", 2, slowdown=[1, 3]) as lab:
        places = lab.map(
            lambda item, worker: (item, worker.index, worker.slowdown),
            range(5),
            placed=True,
            each=lambda *row: seen.append(row),
        )
        assert [item for item, *_ in places] == list(range(5)) and {row[1:] for row in places} <= {(0, 1), (1, 3)}
        assert sorted(seen) == list(enumerate(places))


class Workers:
    """A back end whose workers answer when a test says so."""

    def __init__(self, *ids):
        self.ids, self.submitted = set(ids), []

    def alive(self):
        return {id: id for id in self.ids}

    def start(self, worker, item):
        future = Future()
        future.release = future.cancel
        self.submitted.append((worker, item, future))
        return Task(future, worker, self, worker)


def test_an_item_whose_worker_is_lost_goes_to_another_one_at_most_three_times():
    workers = Workers(0, 1)

    def idle():  # asked once a round: the end of a worker, or of a task
        for worker, item, future in workers.submitted:
            if item == "dies" and len(workers.submitted) < 4:
                workers.ids.discard(worker)
            elif not future.done() and worker in workers.ids:
                future.set_result(item.upper())
        workers.ids |= {len(workers.submitted) + 10}  # somebody comes
        return set(workers.ids)

    assert spread(["dies", "lives"], idle, workers.start, 10) == ["DIES", "LIVES"]
    assert [item for _, item, _ in workers.submitted].count("dies") > 1
    workers = Workers(0)

    def all_die():
        workers.ids = {len(workers.submitted)}
        return set(workers.ids)

    with pytest.raises(ClusterError, match="item 0 was given to 3 workers, and each was lost"):
        spread(["dies"], all_die, workers.start, 10)
    with pytest.raises(ClusterError, match="every worker of this lab is lost"):
        spread(["waits"], set, workers.start, 10)


def test_a_task_that_would_have_run_twice_is_lost_and_not_failed():
    workers = Workers(0)
    task = workers.start(0, "x")
    task.future.set_exception(Again("it is not run again"))
    assert task.done and task.error() is None and not task.lost
