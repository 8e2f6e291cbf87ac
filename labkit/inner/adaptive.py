"""Which of several ways of computing a step is the quickest now, found out while steps are made.

    try each, in turn -> stay with the quickest -> its steps take longer or shorter than they did? try again
                                                -> now and then a step of another, in case that has become quicker

All of them compute the same step, so that trying costs the difference in time alone. Ways that wait for all their threads in each
operator (torch's own threads) may take ten times as long once somebody else uses a core: a single step of these says whether they
are worth more, and they are probed less often.

Used by `labkit.inner.engine`.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from statistics import median
from typing import Generic, TypeVar

Way = TypeVar("Way")

TRIALS = 3  # steps of each way, after a first one that is not counted
CHANGED = 1.3  # times as long, or as short, as expected: the machine has changed
IN_A_ROW = 3  # steps that say so
SOON, LATE = 16, 256  # steps before the next probe: at first, and once nothing has changed for long
CLEARLY = 1.05  # times as quick: what a way that suffers more from others must be
RARELY = 8  # probes to one of a way that suffers more from others
WORTH = 2.0  # times as long as the quickest: other ways are not probed


class Adaptive(Generic[Way]):
    """Chooses among `ways`, the first of which has one thread; `fragile` are those that suffer most where cores are shared."""

    def __init__(self, ways: Sequence[Way], fragile: Collection[Way] = ()) -> None:
        self.current, self.ways, self.fragile = ways[0], list(ways), set(fragile)
        self._best: dict[Way, float] = {}  # seconds of a step, ever
        self._warm: set[Way] = set()
        self._probe_after, self._probes, self._expected = SOON, 0, math.inf
        self._explore(self.ways)

    def next(self) -> Way:
        """The way to compute the next step."""
        return self._plan[0] if self._plan else self.current

    def note(self, way: Way, seconds: float) -> None:
        """A step computed this way took so many seconds."""
        if way not in self._warm:  # a first step makes what later ones use
            self._warm.add(way)
            return
        self._recent.setdefault(way, deque(maxlen=TRIALS)).append(seconds)
        self._best[way] = min(seconds, self._best.get(way, seconds))
        if self._plan:
            self._plan.pop(0)
            if not self._plan:
                self._choose()
        else:
            self._watch(seconds)

    def _explore(self, ways: Sequence[Way]) -> None:
        self._recent: dict[Way, deque[float]] = {}
        plan = [way for _ in range(TRIALS) for way in ways if way not in self.fragile]
        self._plan = plan or [self.current] * TRIALS  # where no other is likely, what it takes now is expected from here on
        self._steps, self._odd = 0, 0

    def _choose(self) -> None:
        """From what was tried; more trials first where they are too few."""
        times = {way: median(seconds) for way, seconds in self._recent.items()}
        quickest = min(times, key=lambda way: times[way] * (CLEARLY if way in self.fragile else 1.0))
        few = [] if len(self._recent[quickest]) == TRIALS else [quickest] * TRIALS  # a single quick step is no proof
        if times[quickest] * CHANGED < self._expected < math.inf:  # the machine is freer than it was
            self._expected = times[quickest]
            for way in self.fragile - {quickest}:
                for known in (times, self._recent, self._best):
                    known.pop(way, None)
        few += [way for way in self.fragile if way not in times and self._best.get(way, 0.0) <= times[quickest]]
        self._plan = few
        if not few:
            could_be_better = min(self._best.values()) * CHANGED < times[quickest]  # it was, when the machine was free
            self._probe_after = SOON if could_be_better or quickest != self.current else min(LATE, 2 * self._probe_after)
            self.current, self._expected, self._steps, self._odd = quickest, times[quickest], 0, 0

    def _watch(self, seconds: float) -> None:
        """Of a step that was no trial: is it as expected, and is it time to try another?"""
        self._steps += 1
        self._odd = 0 if self._expected / CHANGED < seconds < self._expected * CHANGED else self._odd + 1
        limit = WORTH * median(self._recent[self.current])
        likely = sorted((way for way in self.ways if self._best.get(way, math.inf) < limit), key=self._best.__getitem__)
        others = [way for way in likely if way != self.current and (way not in self.fragile or self._probes % RARELY == 0)]
        if self._odd == IN_A_ROW:
            self._probe_after = SOON
            self._explore(likely)
        elif self._steps >= self._probe_after and others:
            self._plan, self._probes = others[:1], self._probes + 1
            self._recent.pop(others[0], None)  # how long it takes now
