"""Schedules: the factor by which the learning rate is multiplied at each moment of a run.

With p = min(1, samples / total), the share of the run's samples that all workers together have trained on:

    constant    1
    cosine      (1 + cos(pi p)) / 2
    one-cycle   from `start` up to 1 while p < `warm`, then down to `end`, each along half a cosine (Smith and Topin 2017)
    warm-up     from `start` in a straight line up to 1 while p < `share`; then the schedule `then` over the rest
    step        `factor`, once more from each share in `at` on

A schedule of the user's own is a function of the `Clock` that returns the factor. All of them depend on the clock alone and have
no state, so a run that is resumed or replayed has the rates that it would have had.

Used by `labkit.problems.supervised`.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from labkit.errors import ProblemError, calling, real
from labkit.imports import check_settings, chosen, short
from labkit.problems.problem import Clock


def constant(p: float) -> float:
    return 1.0


def cosine(p: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * p))


def one_cycle(p: float, warm: float = 0.3, start: float = 0.04, end: float = 4e-6) -> float:
    if p < real("warm", warm, above=0, below=1):
        return 1 - (1 - real("start", start, least=0)) * cosine(p / warm)
    return end + (1 - real("end", end, least=0)) * cosine((p - warm) / (1 - warm))


def warm_up(p: float, share: float = 0.05, start: float = 0.01, then: Any = "constant") -> float:
    rest = _of_share(then)  # refused now, also where it comes later
    if p < real("share", share, above=0, below=1):
        return real("start", start, least=0) + (1 - start) * p / share
    return rest((p - share) / (1 - share))


def step(p: float, at: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> float:
    return real("factor", factor, least=0) ** sum(p >= real("at", share, least=0, most=1) for share in at)


SCHEDULES = {"constant": constant, "cosine": cosine, "one-cycle": one_cycle, "warm-up": warm_up, "step": step}


def make_schedule(given: Any) -> Callable[[Clock], float] | None:
    """The factor as a function of the clock; None where it stays 1. ValueError or TypeError for what is no schedule."""
    made, settings = chosen("schedule", given, SCHEDULES)
    if made is constant and not settings:
        return None
    if made not in SCHEDULES.values():
        if isinstance(made, type) and issubclass(made, LRScheduler):
            raise TypeError(
                f"schedule={short(made)} counts the steps of one process. Give a name, {', '.join(SCHEDULES)}, or a function of the clock "
                "of all workers: lambda clock: 0.9 ** clock.passes."
            )
        check_settings(f"schedule {short(made)}", made, settings)
        own = partial(made, **settings)
        return lambda clock: _factor(own, short(made), clock)
    factor = _of_share(given)
    factor(0.0), factor(1.0)  # settings out of range are refused now
    return lambda clock: factor(min(1.0, clock.samples / clock.total))


def _of_share(given: Any) -> Callable[[float], float]:
    made, settings = chosen("schedule", given, SCHEDULES)
    if made not in SCHEDULES.values():
        raise ValueError(f"schedule {short(made)!r} cannot follow another one. Known: {', '.join(SCHEDULES)}.")
    check_settings(f"schedule {(given['name'] if settings else given)!r}", made, settings, beside=("p",))
    return partial(made, **settings)


def _factor(own: Callable[[Clock], Any], title: str, clock: Clock) -> float:
    """What a schedule of the user's own returns, as a number."""
    with calling(f"schedule {title} at {clock.samples:,} of {clock.total:,} samples (pass {clock.passes:.3g})"):
        factor = own(clock)
    if hasattr(factor, "item"):  # a tensor, a numpy number
        factor = factor.item()
    if isinstance(factor, bool) or not isinstance(factor, numbers.Real) or not math.isfinite(factor) or factor < 0:
        raise ProblemError(
            f"schedule {title} gave {factor!r} after {clock.samples:,} of {clock.total:,} samples (pass {clock.passes:.3g}). The "
            "learning rate is lr times what it returns: a finite number of at least 0."
        )
    return float(factor)
