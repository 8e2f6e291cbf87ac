"""The members of a run: what is known about each worker that has joined, which of them are the ranks of an all-reduce, how long each
may be silent, and how often each was lost.

Used by `labkit.training.server.coordinator`, `labkit.training.server.grants` and `labkit.training.server.server`.
"""

from collections.abc import Callable
from dataclasses import dataclass

FRUITLESS = 10  # how often the group of an all-reduce may break in a row before the run fails
LOSSES = 5  # a worker that was lost, or dropped, so often in a row without a push that counts is not let in again
PAUSE_S = 0.25  # of a worker that comes back for the second time; twice as long each time after that
SILENCE_S = (2.0, 10.0)  # the shortest and the longest adaptive heartbeat time-out: four heartbeats, and twenty
FIRST_SILENCE_S = 4.0  # that of a worker of which little is known
SILENCES = 4.0  # the time-out over the longest silence of late, of which each sign of life forgets so much:
FORGOTTEN = 0.05


@dataclass
class Member:
    """What is known about one worker that has joined."""

    index: int
    incarnation: int
    passes: int = 0
    busy: bool = False  # a local pass is under way, or
    settles: bool = False  # what a milestone asks for
    granted: int = 0  # samples that it has been granted and has not pushed
    ahead: int = 0  # of these, those that it trains on while its push is under way: they belong to its next one
    group: int = 0  # number of the group of an all-reduce in which that is; 0: in none
    seen: int = 0  # of these, trained on so far
    unmerged: int = 0  # samples of a push that waits for the others
    seconds: float | None = None  # per sample: probed at first, then half of it is the latest pass
    elapsed: float = 0.0  # seconds of the run, as its own reports add up
    sent: float = 0.0  # seconds of them that the latest exchange has taken
    held_since: float | None = None
    waited: float = 0.0  # seconds, before it was sent "stop"
    held: int = 0  # samples of its shard, as the worker holds them
    loss: float | None = None
    score: float | None = None
    host: str = ""  # where it is, as it says
    pid: int | None = None
    heard: str = "join"  # its latest message,
    heard_at: float = 0.0  # and when that came


class Ranks:
    """The workers of an all-reduce: `members` as (index, incarnation), and `number`, which grows whenever they change."""

    def __init__(self) -> None:
        self.members: list[tuple[int, int]] = []
        self.number = self.fruitless = 0  # fruitless: how often a group was formed without a new version

    def form(self, members: list[Member]) -> bool:
        """These make the coming local pass; False when groups have broken too often in a row."""
        ranks = [(member.index, member.incarnation) for member in members]
        if ranks != self.members:
            self.members, self.number, self.fruitless = ranks, self.number + 1, self.fruitless + 1
        return self.fruitless <= FRUITLESS

    def disband(self) -> None:
        """The group has broken, or a rank is gone: the next one is another, even if the same workers make it."""
        self.members = []


class FailureDetector:
    """When is a worker taken to be gone? After `timeout` seconds without a sign of life.

    That is a constant, or with None adaptive: four times its longest silence of late, from 2 to 10 s. On a quiet machine a frozen worker
    is noticed sooner, and on a busy one a worker whose heartbeats come late is not taken to be gone. One that came again after it was
    taken to be gone was silent for that long: it is given more time from then on.
    """

    def __init__(self, timeout: float | None, clock: Callable[[], float]) -> None:
        self.constant, self.clock = timeout, clock
        self.longest = FIRST_SILENCE_S / SILENCES  # seconds; the longest silence of late
        self.heard_at = clock()

    @property
    def timeout(self) -> float:
        """Seconds."""
        shortest, longest = SILENCE_S
        return min(longest, max(shortest, SILENCES * self.longest)) if self.constant is None else self.constant

    @property
    def left(self) -> float:
        """Seconds until it is taken to be gone; not below 0."""
        return max(0.0, self.heard_at + self.timeout - self.clock())

    def begin(self) -> None:
        """What was before is no silence: a new connection, or the server itself was busy."""
        self.heard_at = self.clock()

    def heard(self) -> None:
        """A sign of life has come."""
        now = self.clock()
        silence, self.heard_at = now - self.heard_at, now
        self.longest = max(silence, (1 - FORGOTTEN) * self.longest)


class Losses:
    """How often in a row each worker was lost, dropped for a message that cannot be meant, or broke its group, without a push that counts."""

    def __init__(self) -> None:
        self.reasons: dict[int, list[str]] = {}  # by worker, since its latest push that counts
        self.diverged: set[int] = set()  # whose weights became NaN, since the latest push of anybody that counts

    def add(self, worker: int, why: str) -> str:
        """One more; returns why, and how often it has happened."""
        self.reasons.setdefault(worker, []).append(why)
        return self.out(worker) or (f"{why.rstrip('.')} ({n} times in a row)" if (n := len(self.reasons[worker])) > 1 else why)

    def counts(self, worker: int) -> None:
        """A push of this worker counts."""
        self.reasons.pop(worker, None)
        self.diverged.clear()

    def pause(self, worker: int) -> float:
        """Seconds that it waits before it is let in again."""
        n = len(self.reasons.get(worker, ()))
        return PAUSE_S * 2 ** (n - 2) if n > 1 else 0.0

    def out(self, worker: int) -> str:
        """Why it is not let in again; empty if it is."""
        reasons = self.reasons.get(worker, [])
        if len(reasons) < LOSSES:
            return ""
        often = f"{len(reasons)} times in a row without a push that counts"
        return f"{reasons[-1].rstrip('.')} ({often}: worker {worker} is not let in again)"

    def said(self) -> str:
        """Why each worker was lost last, and how often, since its latest push that counts: for the reason of a run that fails."""
        whys = {worker: self.out(worker) or f"{why[-1].rstrip('.')} ({len(why)} times)" for worker, why in self.reasons.items()}
        return "".join(f" Worker {worker}: {why}." for worker, why in sorted(whys.items()))

    def all_out(self) -> dict[int, str]:
        """By worker, why it is not let in again."""
        return {worker: why for worker in sorted(self.reasons) if (why := self.out(worker))}
