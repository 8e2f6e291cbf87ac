"""Which trials of a search end early: rules by name, each a function of the scores that trials have reported so far.

    "asha"         after 1/9 and 1/3 of its passes (the rungs) a trial goes on if it is among the best third of those that came as far
                   (asynchronous successive halving: Li et al., MLSys 2020, arXiv:1810.05934); the first to come need only be the best
    "hyperband"    of 17 trials in turn 9 are halved as by "asha", 5 after 1/3 of their passes only, and 3 never, each among its own kind
                   (Hyperband: Li et al., JMLR 18, 2018): some go on whose first scores say little
    "extrapolate"  a power law through its scores, a - b t^-c, ends below the best score (Domhan et al., IJCAI 2015, have many such laws)
    "wilcoxon"     of folds: a signed-rank test says that it is worse than the best trial on the same folds

A report is a score, the more the better, at a step: the part of its passes that a run has done, or its fold. A run reports where it
has a new version of the weights, so that a step may be left out. What a rule decides depends on the reports before, in the order of
the log.

Used by `labkit.experiments.study` and `labkit.experiments.search`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

REDUCTION = 3  # of the trials at a rung, one goes on
LEAST = 5  # reports that a power law is drawn through
EXPONENTS = np.geomspace(0.1, 2.0, 16)
P_VALUE = 0.1
RUNGS = (1, REDUCTION)  # steps, of REDUCTION**2
SIZES = {s: math.ceil((len(RUNGS) + 1) * REDUCTION**s / (s + 1)) for s in range(len(RUNGS), -1, -1)}  # of the brackets of Hyperband
BRACKETS = [
    -s for _, s in sorted(((i + 0.5) / n, -s) for s, n in SIZES.items() for i in range(n))
]  # of trials in turn, evenly mixed

Trials = Sequence[Mapping[str, Any]]


class Pruner(NamedTuple):
    """A rule: `is_worse(trials, number)`, asked at each report, and in how many steps a run reports; 1 where folds do."""

    is_worse: Callable[[Trials, int], bool]
    steps: int


def asha(trials: Trials, number: int) -> bool:
    """Is the newest score of this trial, its first at a rung or beyond it, below the best third of those that came as far?"""
    return _halved(trials, trials[number]["reports"], RUNGS)


def hyperband(trials: Trials, number: int) -> bool:
    """The same among the trials of its bracket, at the rungs that its bracket has.

    Of R = eta^2 steps, with eta = `REDUCTION`, bracket s (2, 1 and 0) begins at rung R / eta^s with n_s = ceil(3 eta^s / (s + 1)) trials
    (Li et al. 2018, algorithm 1), here 9, 5 and 3. Trials are in a bracket by their numbers, so that each has its share at any time.
    """
    bracket = bracket_of(number)
    among = [trial for other, trial in enumerate(trials) if bracket_of(other) == bracket]
    return _halved(among, trials[number]["reports"], RUNGS[len(RUNGS) - bracket :])


def bracket_of(number: int) -> int:
    """At how many rungs a trial of this number is compared."""
    return BRACKETS[number % len(BRACKETS)]


def _halved(trials: Trials, own: Mapping[int, float], rungs: Sequence[int]) -> bool:
    step = max(own)
    rung = max((rung for rung in rungs if rung <= step < REDUCTION * rung), default=None)
    if rung is None or step != _at(own, rung):
        return False
    there = sorted((trial["reports"][at] for trial in trials if (at := _at(trial["reports"], rung)) is not None), reverse=True)
    return own[step] < there[max(1, len(there) // REDUCTION) - 1]


def _at(reports: Mapping[int, float], rung: int) -> int | None:
    """The step at which a trial was measured for a rung, where it was before the next one."""
    return min((step for step in reports if rung <= step < REDUCTION * rung), default=None)


def extrapolate(trials: Trials, number: int) -> bool:
    """Does a power law through the scores of this trial end below the best score of a trial that is done?"""
    done, own = [trial["value"] for trial in trials if trial["state"] == "done"], trials[number]["reports"]
    return bool(done) and len(own) >= LEAST and extrapolated(sorted(own), [own[at] for at in sorted(own)], STEPS) < max(done)


def extrapolated(steps: Sequence[float], scores: Sequence[float], end: float) -> float:
    """What a - b t^-c with b >= 0, through these points, may be at most at `end`.

    For each of some exponents c the line in t^-c of least squares; of those that fit about as well as the best one the highest
    end, and two standard deviations of what is left over.
    """
    t, y = np.asarray(steps, float), np.asarray(scores, float)
    ends, left = np.empty(len(EXPONENTS)), np.empty(len(EXPONENTS))
    for at, exponent in enumerate(EXPONENTS):
        x = t**-exponent
        slope = min(0.0, ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
        level = y.mean() - slope * x.mean()
        left[at], ends[at] = ((y - level - slope * x) ** 2).sum(), level + slope * end**-exponent
    noise = np.sqrt(left.min() / max(1, len(y) - 3))
    return float(ends[left <= 2 * left.min() + 1e-12].max() + 2 * noise)


def wilcoxon(trials: Trials, number: int) -> bool:
    """Is this trial worse than the best one on the folds that both have?"""
    from scipy.stats import wilcoxon as test

    done = [trial for trial in trials if trial["state"] == "done"]
    best, own = max(done, key=lambda trial: trial["value"], default={"reports": {}})["reports"], trials[number]["reports"]
    differences = np.array([own[fold] - best[fold] for fold in sorted(own) if fold in best])
    if len(differences) < 2 or not differences.any() or differences.mean() >= 0:
        return False
    return bool(test(differences, alternative="less", zero_method="zsplit").pvalue < P_VALUE)


STEPS = 12  # of a run that is extrapolated
PRUNERS = {
    "asha": Pruner(asha, REDUCTION**2),
    "hyperband": Pruner(hyperband, REDUCTION**2),
    "extrapolate": Pruner(extrapolate, STEPS),
    "wilcoxon": Pruner(wilcoxon, 1),
}
