"""`labkit.inner.adaptive` on a machine of its own: steps take the seconds that a function says, in virtual time."""

import itertools

import pytest

from labkit.inner.adaptive import Adaptive

FREE = {"none": 2.0, "samples": 1.1, "intra-op": 1.2}
TAKEN = {"none": 2.0, "samples": 2.9, "intra-op": 15.0}  # somebody else computes on one of two cores


def course(machine, steps, adaptive=None):
    """The ways of `steps` steps and their seconds; `machine(step)` gives the seconds of each way."""
    adaptive = adaptive or Adaptive(["none", "samples", "intra-op"], fragile=["intra-op"])
    made = []
    for step in range(steps):
        way = adaptive.next()
        seconds = machine(step)[way]
        adaptive.note(way, seconds)
        made.append((way, seconds))
    return made


@pytest.mark.parametrize("best", FREE)
def test_the_quickest_is_found_and_what_it_costs_is_little(best):
    machine = {**dict.fromkeys(FREE, 1.6), "none": 2.0, best: 1.0}
    made = course(lambda _: machine, 2000)
    assert {way for way, _ in made[:20]} >= {"none", "samples"}
    assert sum(way == best for way, _ in made) > 0.95 * len(made)
    assert sum(seconds for _, seconds in made) < 1.03 * 1.0 * len(made)


def test_it_falls_back_while_a_core_is_taken_and_comes_back():
    made = course(lambda step: TAKEN if 300 <= step < 900 else FREE, 2000)
    during, after = made[300:900], made[900:]
    assert sum(seconds for _, seconds in during) < 1.15 * 2.0 * len(during)
    assert sum(way == "none" for way, _ in during[20:]) > 0.85 * len(during[20:])
    assert sum(way == "samples" for way, _ in after) > 0.9 * len(after)


def test_where_the_core_is_taken_from_the_beginning_torchs_own_threads_are_hardly_tried():
    made = course(lambda step: TAKEN if step < 500 else FREE | {"intra-op": 0.8}, 1000)
    assert sum(way == "intra-op" for way, _ in made[:500]) <= 2
    assert sum(way == "intra-op" for way, _ in made[780:]) > 200, "once the core is free, and that is seen"


def test_torchs_own_threads_may_be_the_only_ones_that_are_quicker():
    made = course(lambda _: {"none": 1.0, "samples": 1.2, "intra-op": 0.8}, 500)
    assert sum(way == "intra-op" for way, _ in made) > 450


def test_what_was_slow_by_chance_when_it_was_tried_is_tried_again():
    machine = {"none": 2.0, "samples": 1.2, "intra-op": 1.0}
    made = course(lambda step: machine | ({"intra-op": 1.6} if step < 25 else {}), 500)
    assert made[24][0] == "samples" and sum(way == "intra-op" for way, _ in made) > 400


def test_torchs_own_threads_that_become_slow_are_left_at_once():
    machine = {"none": 2.0, "samples": 1.3, "intra-op": 1.0}
    made = course(lambda step: TAKEN if step >= 300 else machine, 600)
    assert made[299][0] == "intra-op"
    assert sum(way == "intra-op" for way, _ in made[300:350]) <= 4
    assert sum(seconds for _, seconds in made[300:]) < 1.2 * 2.0 * 300


def test_single_odd_steps_change_nothing():
    noisy = [{way: seconds * (3.0 if step % 7 == 0 else 1.0) for way, seconds in FREE.items()} for step in range(1000)]
    made = course(lambda step: noisy[step], 1000)
    assert sum(way == "samples" for way, _ in made) > 0.9 * len(made)


def test_one_way_needs_no_trials():
    adaptive = Adaptive(["none"])
    assert {way for way, _ in course(lambda step: {"none": 1.0 + (step % 90 > 45)}, 200, adaptive)} == {"none"}
    assert len(list(itertools.islice(iter(adaptive.next, None), 3))) == 3


def test_where_torchs_own_threads_alone_are_likely_what_they_take_is_expected_anew():
    """Once they are quicker than ever, others are looked at again from time to time, and slower steps are noticed."""
    then, now = {"none": 2.4, "samples": 2.2, "intra-op": 2.0}, {"none": 2.4, "samples": 2.2, "intra-op": 0.9}
    adaptive = Adaptive(list(then), fragile=["intra-op"])
    course(lambda _: then, 300, adaptive)
    assert adaptive.current == "intra-op"
    made = course(lambda step: now if step < 60 else {**now, "intra-op": 1.9, "samples": 1.0}, 200, adaptive)
    assert {way for way, _ in made[5:60]} == {"intra-op"} and made[-1][0] == "samples"
    assert sum(way == "intra-op" for way, _ in made[60:]) < 10
