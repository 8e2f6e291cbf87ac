"""Emulated heterogeneity: what makes equal workers uneven.

    slowdown    all work lasts so many times as long
    jitter      times exp(jitter z) with a normal z, anew for each step
    drift       within a period of so many seconds each worker moves to the slowdown of the worker at the other end of the list,
                and back:  log s(t) = (1 - w) log s(0) + w log s',  w = (1 - cos(2 pi t / drift)) / 2
    stalls      after times of work that are exponentially distributed, a worker stands still, while its heartbeat goes on

After work that took t seconds the worker sleeps (factor - 1) t with factor = max(1, s exp(jitter z)), so that its
results are those of a slow machine, and only its speed is made up. In t does not count how long its thread was ready to run and had no
core (Linux says it): on a busy machine a worker that wakes from its sleep waits more often for one than those that never sleep, and
would be slowed more than was asked. What a sleep lasted too long is taken off the next one. The same seed gives the same factors after the same number of
steps and the same stalls after the same time of work, whatever update is used. Drift goes by the clock, from a worker's first
step.

Used by the workers of `labkit.training` (with sleep), and by `labkit.simulation` (without).
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from labkit.errors import real, several

SEGMENTS = 16  # of a local pass, in which drift is taken as constant, where only its length is asked for
NAP_S = 0.2  # sleep is cut into such intervals
LONGEST_S = 30.0  # of a stall: an exchange of an all-reduce waits for 60 s
OFTENEST_S = 1e-3  # between two stalls, on average
SLOWEST, WILDEST = 1e6, 10.0  # a slowdown, and a jitter, at most

slowdown_of = partial(real, least=1, most=SLOWEST)
jitter_of = partial(real, least=0, most=WILDEST)


@dataclass(frozen=True)
class Unevenness:
    """How one worker is made slower than it is; by default not at all."""

    slowdown: float = 1.0
    jitter: float = 0.0
    drift: float = 0.0  # seconds of a period; 0: none
    drifts_to: float = 1.0  # slowdown half a period later
    stalls: tuple[float, float] | None = None  # mean seconds of work between two, seconds of each

    @property
    def drifting(self) -> bool:
        return self.drift > 0 and self.drifts_to != self.slowdown

    @property
    def on(self) -> bool:
        return self.slowdown != 1 or self.drifting or self.jitter > 0 or self.stalls is not None

    def at(self, age: Any) -> Any:
        """The slowdown at this age of the worker, in seconds (a number or an array of them)."""
        if not self.drifting:
            return self.slowdown + 0.0 * age
        weight = (1 - np.cos(2 * np.pi * age / self.drift)) / 2
        return self.slowdown ** (1 - weight) * self.drifts_to**weight


def unsteadiness(jitter: float, drift: float, stalls: Sequence[float] | None) -> str:
    """For readers: "jitter 0.3, drift with a period of 20 s, stalls of 1 s every 20 s"; empty where there is none."""
    ways = [f"jitter {jitter:g}"] if jitter else []
    ways += [f"drift with a period of {drift:g} s"] if drift else []
    ways += [f"stalls of {stalls[1]:g} s every {stalls[0]:g} s"] if stalls else []
    return ", ".join(ways)


def opposite(slowdown: Sequence[float], drift: float) -> list[float]:
    """Where each worker drifts to; without drift it stays where it is. ValueError where nothing would change."""
    here, there = list(slowdown), list(slowdown)[::-1]
    if drift and here == there:
        raise ValueError(
            f"drift={drift:g} moves each worker to the slowdown of the one at the other end of the list, and {here} is the same "
            "from both ends. Give uneven ones, slowdown=[1, 4], or drift=0."
        )
    return there if drift else here


def make_stalls(stalls: Sequence[float] | None) -> tuple[float, float] | None:
    """(every, seconds), both above 0, a millisecond at least and half a minute at most; None and an empty list are none. ValueError or TypeError otherwise."""
    given = [] if stalls is None else several("stalls", stalls, partial(real, finite=False))
    if not given:
        return None
    if len(given) != 2 or not (OFTENEST_S <= given[0] < np.inf and 0 < given[1] <= LONGEST_S):
        raise ValueError(
            f"stalls={stalls}: give (every, seconds), such as (20, 1), and at most {LONGEST_S:g} s of standing still: an "
            "all-reduce gives up a worker that is silent for a minute."
        )
    return given[0], given[1]


def waited_for_a_core() -> float:
    """Seconds that this thread has been ready to run without a core, since it began; 0 where the system does not say it."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


class Slowness:
    """The emulated speed of one worker as it goes on: which factor comes next, and when the next stall.

    `synchronise()` waits for the device before work is timed; a sleep ends early where `woken()` is true.
    """

    def __init__(
        self,
        uneven: Unevenness,
        seed: int,
        worker: int,
        synchronise: Callable[[], object] = lambda: None,
        woken: Callable[[], object] = lambda: False,
    ) -> None:
        self.uneven, self.synchronise, self.woken, self.started_at = uneven, synchronise, woken, None
        self.on = uneven.on
        self.delay: tuple[int, float] = 0, 0.0  # the thread, and its `waited_for_a_core` after the latest sleep
        self.overslept = 0.0  # seconds that it lasted too long
        self.generator = np.random.default_rng(np.random.SeedSequence([seed, worker, 1 << 20]))
        if uneven.stalls:
            self.moments = np.random.default_rng(np.random.SeedSequence([seed, worker, 1 << 22]))
            self.left = self.moments.exponential(uneven.stalls[0])  # seconds of work until the next stall

    def become(self, uneven: Unevenness) -> None:
        """Another unevenness from now on; stalls stay as they are."""
        self.uneven, self.on = replace(uneven, stalls=self.uneven.stalls), uneven.on or self.uneven.stalls is not None

    def stretched(self, work: float, age: float, steps: int = 1) -> float:
        """Seconds, stalls included, that `work` seconds of work last, which begin at this age and are so many equal steps."""
        seconds = work * self.uneven.slowdown
        if self.uneven.drifting or self.uneven.jitter:
            seconds = self._unsteady(work, age, steps)
        if self.uneven.stalls:
            every, stall = self.uneven.stalls
            self.left -= seconds
            while self.left <= 0:
                seconds += stall
                self.left += self.moments.exponential(every)
        return seconds

    def _unsteady(self, work: float, age: float, steps: int) -> float:
        noise = np.exp(self.uneven.jitter * self.generator.standard_normal(steps)) if self.uneven.jitter else np.ones(steps)
        segments = np.array_split(noise, min(steps, SEGMENTS)) if self.uneven.drifting else [noise]
        seconds = 0.0
        for segment in segments:
            seconds += work / steps * float(np.maximum(1.0, self.uneven.at(age + seconds) * segment).sum())
        return seconds

    def after(self, started: float, waited: float = 0.0) -> None:
        """Sleep for work that began at `started` (perf_counter), of which `waited` seconds were spent on others."""
        if not self.on:
            return
        self.synchronise()
        self.started_at = started if self.started_at is None else self.started_at
        now, (thread, before) = time.perf_counter(), self.delay
        delay = waited_for_a_core() - before if thread == threading.get_ident() else 0.0
        work = max(0.0, now - started - waited - max(0.0, delay))
        left = end = self.stretched(work, started - self.started_at) - work - self.overslept
        while left > 1e-6 and not self.woken():
            time.sleep(min(left, NAP_S))
            left = end - (time.perf_counter() - now)
        self.overslept = min(NAP_S, max(0.0, -left))
        self.delay = threading.get_ident(), waited_for_a_core()
