"""`labkit/experiments/pruning.py`: what each rule decides of the scores so far."""

from __future__ import annotations

import numpy as np
import pytest

from labkit.experiments.pruning import PRUNERS, STEPS, asha, bracket_of, extrapolate, extrapolated, hyperband, wilcoxon


def trial(reports, value=None):
    return {"reports": dict(reports), "state": "running" if value is None else "done", "value": value}


def test_successive_halving_lets_the_best_third_of_those_that_came_as_far_go_on():
    trials = [trial({1: 0.5})]
    assert not asha(trials, 0)
    trials += [trial({1: score}) for score in (0.4, 0.6, 0.3, 0.55, 0.7)]
    assert [asha(trials, number) for number in range(6)] == [True, True, False, True, True, False]
    trials[2]["reports"] |= {2: 0.1}
    assert not asha(trials, 2)  # no rung
    trials[2]["reports"] |= {3: 0.1}
    assert not asha(trials, 2)  # alone so far
    trials[5]["reports"] |= {3: 0.8}
    assert asha(trials, 2) and not asha(trials, 5)


def test_a_rung_that_a_run_has_jumped_over_is_where_it_came_down():
    trials = [trial({1: score}) for score in (0.5, 0.6, 0.7)] + [trial({2: 0.4}), trial({4: 0.4}), trial({2: 0.6, 3: 0.6})]
    assert asha(trials, 3) and not asha(trials[:5], 4)  # alone at its rung so far
    assert not asha(trials, 5)  # the better of two at the second rung


def test_hyperband_has_a_share_of_the_trials_in_each_bracket_at_any_time():
    brackets = [bracket_of(number) for number in range(170)]
    assert [brackets.count(s) for s in (2, 1, 0)] == [90, 50, 30]  # n_s of Hyperband's table for R = 9, eta = 3
    for n in range(1, 171):
        assert all(abs(brackets[:n].count(s) - n * share / 17) < 1 for s, share in ((2, 9), (1, 5), (0, 3)))


def test_hyperband_halves_each_bracket_by_itself_at_its_own_rungs():
    random, n = np.random.default_rng(0), 68
    order = random.permutation(n)
    trials, ends = [trial({}) for _ in range(n)], {}
    for step in range(1, 10):  # all side by side
        for number in random.permutation(n):
            if number not in ends:
                trials[number]["reports"][step] = order[number] / n - 0.5 / step
                if hyperband(trials, number):
                    ends[number] = step
    for s, rungs in ((2, {1, 3, 9}), (1, {3, 9}), (0, {9})):
        own = [number for number in range(n) if bracket_of(number) == s]
        assert {ends.get(number, 9) for number in own} == rungs and max(own, key=lambda number: order[number]) not in ends
    own = [number for number in range(n) if bracket_of(number) == 2]  # where it is as if there were no others
    alone = [trials[number] for number in own]
    assert [hyperband(trials, number) for number in own] == [asha(alone, at) for at in range(len(own))]


def test_hyperband_keeps_a_trial_that_begins_badly_and_spends_half_of_the_passes():
    def spent_and_best(rule, seed):
        random, trials, spent, kept = np.random.default_rng(seed), [], 0, []
        for final in random.permutation(np.linspace(0, 1, 102)):
            trials.append(trial({}))
            for step in range(1, 10):
                trials[-1]["reports"][step] = final * step / 9 + (1 - final) * (1 - step / 9)  # the best ones begin worst
                spent += 1
                if rule(trials, len(trials) - 1):
                    break
            else:
                kept.append(final)
        return spent / (9 * 102), max(kept)

    found = np.array([[spent_and_best(rule, seed) for seed in range(20)] for rule in (asha, hyperband)])
    assert found[0, :, 1].mean() < 0.7 and found[1, :, 1].mean() > 0.9 and found[1, :, 0].mean() < 0.55


def test_extrapolation_spends_half_of_the_passes_and_keeps_the_best():
    random, spent, kept, trials = np.random.default_rng(0), 0, [], []
    for final in random.permutation(np.linspace(0, 1, 81)):
        exponent, scores = random.uniform(0.4, 1.2), {}
        trials.append(trial({}) | {"reports": scores})
        for step in range(1, STEPS + 1):
            scores[step] = final - 0.3 * (step**-exponent - STEPS**-exponent) + random.normal(scale=0.01)
            spent += 1
            if extrapolate(trials, len(trials) - 1):
                break
        else:
            kept.append(final)
            trials[-1] |= {"state": "done", "value": scores[STEPS]}
    assert spent / (STEPS * 81) < 0.5 and max(kept) == 1


def test_it_spends_a_third_of_the_passes_and_keeps_the_best():
    random, spent, kept = np.random.default_rng(0), 0, []
    trials = []
    for final in random.permutation(np.linspace(0, 1, 81)):
        trials.append(trial({}))
        for step in range(1, 10):
            trials[-1]["reports"][step] = final - 0.5 / step + random.normal(scale=0.01)
            spent += 1
            if asha(trials, len(trials) - 1):
                break
        else:
            kept.append(final)
    assert spent / (9 * 81) < 0.4 and max(kept) == 1


@pytest.mark.parametrize(("level", "slope", "exponent"), [(0.9, 0.5, 0.5), (0.7, 0.3, 1.0), (0.95, 1.2, 0.2)])
def test_a_power_law_is_continued(level, slope, exponent):
    steps = np.arange(1, 7)
    end = level - slope * 12.0**-exponent
    assert extrapolated(steps, level - slope * steps**-exponent, 12) == pytest.approx(end, abs=0.02)
    noisy = [
        extrapolated(steps, level - slope * steps**-exponent + np.random.default_rng(i).normal(0, 0.01, 6), 12) for i in range(20)
    ]
    assert np.mean(np.array(noisy) >= end) > 0.8  # at most


def test_a_trial_that_will_not_reach_the_best_one_ends():
    def reports(level, n=5):
        return {step: level - 0.3 / step for step in range(1, n + 1)}

    trials = [
        trial(reports(0.9, 12), 0.88),
        trial(reports(0.7)),
        trial(reports(0.95)),
        trial(reports(0.7, 4)),
        trial({1: 0.2, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.1}),
    ]
    assert [extrapolate(trials, number) for number in range(1, 5)] == [True, False, False, True]
    assert not extrapolate(trials[1:], 0)  # none is done


def test_folds_are_compared_with_those_of_the_best_trial():
    best = trial({fold: 0.9 + 0.01 * fold for fold in range(5)}, 0.92)
    worse = trial({fold: 0.8 + 0.005 * fold for fold in range(4)})
    mixed = trial({0: 0.8, 1: 0.95, 2: 0.93, 3: 0.90})
    assert [wilcoxon([best, other], 1) for other in (worse, mixed, trial({0: 0.1}), trial(best["reports"]))] == [
        True,
        False,
        False,
        False,
    ]
    assert not wilcoxon([trial({}, None), worse], 1)


def test_each_has_a_name():
    assert {name: pruner.steps for name, pruner in PRUNERS.items()} == {
        "asha": 9,
        "hyperband": 9,
        "extrapolate": 12,
        "wilcoxon": 1,
    }
