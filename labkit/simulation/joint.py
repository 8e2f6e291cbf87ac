"""The ranks of an all-reduce in a replay: threads of this process that average their gradients through gloo, as those of the run did.

gloo adds up in an order that follows from the number of ranks and the size of what they exchange, on whatever hosts they are, so
that the sums have the bits of the run. The ranks of a group make each local pass side by side; the first push of it asks for it.

What a local pass had done when its group broke is not in the record, and need not be: it is made again from where it began
(`Replica.rewind`), by the replicas of the run as by these.

Used by `labkit.simulation.exact`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from labkit.errors import RunError
from labkit.locks import Scratch
from labkit.problems.problem import Problem
from labkit.runs.config import RunConfig
from labkit.simulation.offline import Incarnation, Replicas
from labkit.training.wire.protocol import MAX_WORKERS, Answer
from labkit.training.worker.allreduce import UNUSED, ProcessGroup, networks_of
from labkit.training.worker.heartbeat import Heartbeat
from labkit.training.worker.worker import probed


class Ranks(Replicas):
    """`answers` are those of who is at work, by worker: the other ranks of the group of a push. `computed` says of a worker how the steps
    of its next push were computed."""

    def __init__(
        self, problem: Problem, config: RunConfig, answers: Mapping[int, Answer], computed: Callable[[int], str | None]
    ) -> None:
        super().__init__(problem, config)
        self.answers, self.computed = answers, computed
        self.done: dict[int, dict] = {}  # what a local pass returned, of ranks that have not pushed yet
        self.lost: dict[int, tuple[Answer | None, Incarnation]] = {}  # incarnations that have gone, and what they were at
        self.unused: dict[int, bool] = {}  # do its steps leave parameters without a gradient?
        self.folder = Scratch("labkit-ranks-")
        self.pool = ThreadPoolExecutor(MAX_WORKERS, "labkit-rank")  # as many as ranks, which wait for each other

    def join(self, worker: int, *how: Any, **others: Any) -> None:
        if worker in self.lost:
            _close(self.lost.pop(worker)[1])
        if worker in self.workers:  # which others may have been through with: their pushes may still come
            self.lost[worker] = self.answers.get(worker), self.workers[worker]
        self.done.pop(worker, None)
        super().join(worker, *how, **others)
        with self._as(own := self.workers[worker]):
            self.unused[worker] = probed(self._built(worker, own.precision)[0])[1]

    def work(self, worker: int, answer: Answer, computed: str | None = None) -> tuple[dict, np.ndarray]:
        if answer.grant.settle:
            return super().work(worker, answer)
        if worker not in self.done:
            self._local_pass({**self.answers, worker: answer}, answer.grant.ranks, {worker: computed})
        buffers = self.workers[worker].buffers
        buffers.pack()
        return self.done.pop(worker), buffers.weights

    def give_up(self, worker: int, answer: Answer, why: str) -> None:
        """Its group broke before it had pushed."""
        own = self.workers[worker]
        with self._as(own):
            if self.done.pop(worker, None):  # another rank was through with it
                own.replica.rewind()
            else:
                self._receive(worker, own, answer)
        self.unused[worker] |= why == UNUSED
        _close(own)

    def close(self) -> None:
        for own in (*self.workers.values(), *(own for _, own in self.lost.values())):
            _close(own)
        self.pool.shutdown()
        self.folder.close()
        super().close()

    def _receive(self, worker: int, own: Incarnation, answer: Answer) -> None:
        if own.replica.shard is None:
            own.replica.begin(answer.grant.incarnation)
        self._take(own, answer)
        number = answer.grant.group
        if (own.group and own.group.number != number) or (not own.group and number > 1):  # as its worker does: fresh optimisers
            _close(own)
            before = own.replica
            own.replica, own.buffers = self._built(worker, own.precision)
            own.replica.go_on(before)

    def _local_pass(self, answers: Mapping[int, Answer], ranks: tuple[int, ...], computed: Mapping[int, str | None]) -> None:
        group, errors = {}, []
        if gone := [rank for rank in ranks if rank not in answers]:
            raise RunError(
                f"worker {gone[0]} asked for another group before all had pushed what they computed with it: such an all-reduce cannot be "
                "replayed."
            )
        for rank in ranks:
            at, lost = self.lost.get(rank, (None, None))
            group[rank] = own = lost if at is answers[rank] else self.workers[rank]
            with self._as(own):
                self._receive(rank, own, answers[rank])
                if how := computed.get(rank) or self.computed(rank):
                    own.replica.problem.compute_as(own.replica.module, how)
        before = torch.get_rng_state()
        made = {rank: self.pool.submit(self._of_rank, rank, group, errors) for rank in ranks}
        wait(made.values())
        drawn = not torch.equal(before, torch.get_rng_state())
        torch.set_rng_state(before)
        if errors:  # the first is what has broken the others
            raise errors[0]
        if drawn:
            raise RunError(
                "the model or the problem draws random numbers (dropout, say), and the ranks of an all-reduce are replayed side by side in "
                "one process, which has one generator. What a step draws from clock.generator is replayed."
            )
        # Who was lost and is back has not made this local pass: its next push is of another one.
        self.done |= {rank: one.result() for rank, one in made.items() if group[rank] is self.workers[rank]}

    def _of_rank(self, rank: int, group: Mapping[int, Incarnation], errors: list[BaseException]) -> dict:
        """In a thread of its own; an error is added to `errors`."""
        own = group[rank]
        try:
            torch.set_num_threads(own.threads)
            if own.group is None:
                where = {"meeting": f"{self.folder.path}/group", "one_process": True}
                how = {"unused": self.unused[rank], "sync_batchnorm": self.config.update.get("sync_batchnorm", False)}
                own.group = ProcessGroup(rank, own.grant.ranks, own.grant.group, Heartbeat(), **where, **how)
                own.group.wrap(own.replica.module, networks_of(own.replica.problem, own.replica.module))
            return own.replica.local_pass(own.grant, group=own.group)
        except BaseException as error:
            errors.append(error)
            for other in group.values():  # they would wait for it
                if other.group:
                    other.group.exchange.waiting.fail(str(error))
            raise


def _close(own: Incarnation) -> None:
    group, own.group = own.group, None
    if group:
        group.close()
