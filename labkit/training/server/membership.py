"""The members of a run: what is known about each worker that is here, who makes an all-reduce, and what a worker is told.

Used by `labkit.training.server.coordinator` and `labkit.training.server.grants`; answers and standing by whoever drives a course.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labkit.training.server.coordinator import Coordinator

FRUITLESS = 10  # how often the group of an all-reduce may break in a row before the run is given up


@dataclass
class Member:
    """What is known about one worker that is here."""

    index: int
    incarnation: int
    passes: int = 0
    busy: bool = False  # a local pass is under way
    granted: int = 0  # samples that it has been given and not pushed
    ahead: int = 0  # of these, those that it trains on while its push is under way: they belong to its next one
    group: int = 0  # number of the group of an all-reduce in which that is
    seen: int = 0  # of these, trained on so far
    unmerged: int = 0  # samples of a push that waits for the others
    seconds: float | None = None  # per sample: probed at first, then half of it is the latest pass
    held_since: float | None = None
    waited: float = 0.0  # seconds, before it was told to stop
    held: int = 0  # samples of its shard, as it knows them
    loss: float | None = None
    score: float | None = None


class Group:
    """Who makes an all-reduce: `ranks` as (index, incarnation), and `number`, which grows whenever they change."""

    def __init__(self) -> None:
        self.ranks: list[tuple[int, int]] = []
        self.number = self.fruitless = 0  # fruitless: how often it was formed without a new version

    def form(self, members: list[Member]) -> bool:
        """These make the coming local pass; False when groups have broken too often in a row."""
        ranks = [(member.index, member.incarnation) for member in members]
        if ranks != self.ranks:
            self.ranks, self.number, self.fruitless = ranks, self.number + 1, self.fruitless + 1
        return self.fruitless <= FRUITLESS

    def disband(self) -> None:
        """It has broken, or one of it is gone: the next one is another, even if the same workers make it."""
        self.ranks = []


def standing(course: Coordinator) -> dict:
    """Where a run stands, as its kernel is told."""
    return {
        "state": course.state,
        "reason": course.reason,
        "started": course.started,
        "version": course.update.version,
        "samples": course.samples.done + sum(member.seen for member in course.members.values()),
        "budget": course.samples.budget,
        "workers": {m.index: {"loss": m.loss, "score": m.score, "passes": m.passes} for m in course.members.values()},
    }
