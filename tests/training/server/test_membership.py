"""How long a worker may be silent: a constant, or by its own silences so far."""

from __future__ import annotations

import pytest

from labkit.training.server.membership import FailureDetector


class Time:
    def __init__(self, timeout=None):
        self.now = 0.0
        self.detector = FailureDetector(timeout, lambda: self.now)

    def silences(self, *seconds):
        for silence in seconds:
            self.now += silence
            self.detector.heard()
        return self.detector


def test_a_constant_timeout_stays_as_it_is():
    time = Time(7.0)
    assert time.silences(0.5, 3.0, 0.5).timeout == 7.0
    time.now += 4.0
    assert time.detector.left == 3.0
    time.now += 4.0
    assert time.detector.left == 0.0


def test_an_adaptive_one_is_four_seconds_at_first_and_two_where_heartbeats_come_in_time():
    time = Time()
    assert time.detector.timeout == 4.0
    timeouts = [time.silences(0.5).timeout for _ in range(40)]
    assert timeouts == sorted(timeouts, reverse=True) and timeouts[-1] == 2.0


def test_where_heartbeats_come_late_it_is_four_times_as_long_as_the_longest_silence_of_late():
    time = Time()
    time.silences(*[0.5] * 40)
    assert time.silences(1.5).timeout == 6.0
    assert 5.0 < time.silences(0.5, 0.5).timeout < 6.0
    assert time.silences(*[0.5] * 40).timeout == 2.0
    assert time.silences(9.0).timeout == 10.0, "it was taken to be gone and came again: that is not to happen for ever"


def test_a_time_in_which_nobody_has_listened_is_no_silence():
    time = Time()
    time.silences(*[0.5] * 40)
    time.now += 30.0
    time.detector.begin()
    assert (time.detector.timeout, time.detector.left) == (2.0, pytest.approx(2.0))
