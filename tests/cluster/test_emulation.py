"""Emulated slowdown: how much longer work lasts, and how long a worker sleeps after it."""

import time

import numpy as np
import pytest

from labkit.cluster import emulation
from labkit.cluster.emulation import NAP_S, SEGMENTS, Slowness, Unevenness, make_stalls, opposite, unsteadiness

JITTERY, STALLING = Unevenness(4.0, 0.3), Unevenness(2.0, stalls=(5.0, 1.0))
DRIFTING = Unevenness(1.0, drift=20.0, drifts_to=4.0)


def slept(monkeypatch, slowness, n=1, waited=0.0):
    """Seconds that `slowness` asks to sleep after work of 1 s."""
    naps, now = [], [0.0]

    def sleep(seconds):
        assert 0 < seconds <= NAP_S
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(emulation, "waited_for_a_core", lambda: 0.0)
    for _ in range(n):
        now[0] = begun = now[0] + 1.0
        slowness.after(begun - 1.0, waited)
        naps.append(now[0] - begun)
    monkeypatch.undo()
    return naps


def test_sleep_is_in_proportion_to_the_work(monkeypatch):
    assert slept(monkeypatch, Slowness(Unevenness(4.0), 0, 0)) == pytest.approx([3.0])
    assert slept(monkeypatch, Slowness(Unevenness(4.0), 0, 0), waited=0.75) == pytest.approx(
        [0.75]
    )  # waiting for others is no work
    assert slept(monkeypatch, Slowness(Unevenness(4.0), 0, 0), waited=2.0) == [0.0]
    assert slept(monkeypatch, Slowness(Unevenness(4.0), 0, 0, woken=lambda: True)) == [0.0], "it is wanted"


def test_waiting_for_a_core_is_no_work_and_what_a_sleep_lasted_too_long_is_taken_off_the_next(monkeypatch):
    now, delay, late, naps = [0.0], [100.0], [0.0], []

    def sleep(seconds):
        now[0] += seconds + late[0]
        naps[-1] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(emulation, "waited_for_a_core", lambda: delay[0])
    slowness = Slowness(Unevenness(4.0), 0, 0)
    for waited, late[0] in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.1), (0.0, 0.0)):  # 1 s each, of which it has waited so long
        naps.append(0.0)
        now[0] += 1.0
        delay[0] += waited
        slowness.after(now[0] - 1.0)
    monkeypatch.undo()
    assert naps[:2] == pytest.approx([3.0, 1.5]) and naps[2] + naps[3] == pytest.approx(6.0 - 1.0, abs=0.15)
    assert naps[2] < 2.1, "ten sleeps of 0.1 s too long are no longer than 3 s together"


def test_the_wait_for_a_core_is_read_from_the_system():
    before = emulation.waited_for_a_core()
    assert 0 <= before <= emulation.waited_for_a_core()


def test_what_a_device_has_begun_is_waited_for_before_it_is_timed(monkeypatch):
    calls = []
    assert slept(monkeypatch, Slowness(Unevenness(4.0), 0, 0, lambda: calls.append(1)), n=2) == pytest.approx([3.0, 3.0])
    assert slept(monkeypatch, Slowness(Unevenness(), 0, 0, lambda: calls.append(1))) == [0.0] and len(calls) == 2, "none: no wait"


def test_none_is_the_default_and_costs_nothing(monkeypatch):
    assert not Unevenness().on and slept(monkeypatch, Slowness(Unevenness(), 0, 0), n=3) == [0.0] * 3
    assert not Unevenness(drift=20.0).on, "with nowhere to go"
    assert all(uneven.on for uneven in (JITTERY, DRIFTING, STALLING, Unevenness(jitter=0.1), Unevenness(stalls=(1, 1))))


def test_jitter_scatters_about_the_factor_and_repeats_with_the_seed(monkeypatch):
    naps = slept(monkeypatch, Slowness(JITTERY, 7, 1), n=400)
    assert naps == slept(monkeypatch, Slowness(JITTERY, 7, 1), n=400)
    assert naps != slept(monkeypatch, Slowness(JITTERY, 7, 2), n=400)
    assert min(naps) >= 0 and np.std(np.log(np.array(naps) + 1)) == pytest.approx(0.3, rel=0.15)
    assert np.median(naps) == pytest.approx(3.0, rel=0.15)
    assert all(nap >= 0 for nap in slept(monkeypatch, Slowness(Unevenness(jitter=0.5), 0, 0), n=50))


# -- drift -------------------------------------------------------------------------------------------------------------


def test_drift_goes_to_the_other_end_and_back():
    assert DRIFTING.at(np.array([0.0, 5.0, 10.0, 15.0, 20.0, 40.0])) == pytest.approx([1, 2, 4, 2, 1, 1])
    back = Unevenness(4.0, drift=20.0, drifts_to=1.0)
    ages = np.linspace(0, 60, 101)
    assert DRIFTING.at(ages) * back.at(ages) == pytest.approx(np.full(101, 4.0)), "what one loses the other gains"
    assert opposite([1, 2, 4], 20.0) == [4, 2, 1] and opposite([1, 2, 4], 0.0) == [1, 2, 4]
    for same in ([1], [3, 3], [1, 4, 1]):
        assert opposite(same, 0.0) == same
        with pytest.raises(
            ValueError, match=r"drift=20 .* the same from both ends. Give uneven ones, slowdown=\[1, 4\], or drift=0"
        ):
            opposite(same, 20.0)


def test_drift_follows_the_clock_of_the_worker(monkeypatch):
    naps = slept(monkeypatch, Slowness(DRIFTING, 0, 0), n=12)
    begun = np.cumsum([0.0, *(1 + np.array(naps))])[:-1]
    assert naps == pytest.approx(DRIFTING.at(begun) - 1) and max(naps) > 2.5 and naps[0] == 0


def test_a_long_pass_drifts_as_its_steps_do():
    steps, at_once = Slowness(DRIFTING, 0, 0), Slowness(DRIFTING, 0, 0)
    seconds = 0.0
    for _ in range(200):
        seconds += steps.stretched(0.02, 3.0 + seconds)
    assert at_once.stretched(4.0, 3.0, steps=200) == pytest.approx(seconds, rel=0.03) and seconds > 1.5 * 4
    assert at_once.stretched(0.1, 3.0, steps=SEGMENTS + 1) == pytest.approx(0.1 * DRIFTING.at(3.0), rel=0.05)


# -- stalls ------------------------------------------------------------------------------------------------------------


def test_stalls_come_as_often_as_asked_and_repeat_with_the_seed():
    def course(seed, worker, work):
        slowness = Slowness(STALLING, seed, worker)
        return np.array([slowness.stretched(work, 0.0) for _ in range(int(4000 / work))])

    seconds = course(3, 1, 0.5)
    assert set(np.round(seconds - 1.0, 9)) <= {0, 1, 2, 3, 4, 5} and np.array_equal(seconds, course(3, 1, 0.5))
    assert seconds.sum() / 4000 == pytest.approx(2 * (1 + 1 / 5), rel=0.03), "of work as it is slowed down"
    assert not np.array_equal(seconds, course(3, 2, 0.5)) and not np.array_equal(seconds, course(4, 1, 0.5))
    assert course(3, 1, 0.1).sum() == pytest.approx(seconds.sum()), "after the same work, in whatever pieces"
    gaps = np.diff(np.flatnonzero(course(3, 1, 0.01) > 0.5)) * 0.02
    assert gaps.mean() == pytest.approx(5, rel=0.1) and gaps.std() == pytest.approx(5, rel=0.15), "an exponential's"


def test_a_worker_sleeps_through_its_stalls(monkeypatch):
    naps = slept(monkeypatch, Slowness(STALLING, 0, 0), n=100)
    assert min(naps) == pytest.approx(1.0) and sum(naps) == pytest.approx(100 * 1.4, rel=0.25)


@pytest.mark.parametrize("stalls", [(1,), (1, 2, 3), (0, 1), (1, 0), (5, 31), (float("inf"), 1)])
def test_stalls_that_make_no_sense_are_refused(stalls):
    with pytest.raises(ValueError, match=r"stalls=\(.*\): give \(every, seconds\), such as \(20, 1\), and at most 30 s"):
        make_stalls(stalls)
    with pytest.raises(ValueError, match="stalls=nan"):
        make_stalls((float("nan"), 1))


def test_what_is_emulated_is_described_for_readers():
    assert unsteadiness(0, 0, None) == ""
    assert unsteadiness(0.3, 20.0, (20, 1)) == "jitter 0.3, drift with a period of 20 s, stalls of 1 s every 20 s"
