"""Emulated slowness: how long a worker sleeps after its work."""

import time

import numpy as np
import pytest

from labkit.slowness import Slowness


def slept(monkeypatch, slowness, n=1, waited=0.0):
    """Seconds that `slowness` asks to sleep after work of 1 s."""
    naps, now = [], [0.0]
    monkeypatch.setattr(time, "sleep", naps.append)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for _ in range(n):
        now[0] += 1.0
        slowness.after(now[0] - 1.0, waited)
    monkeypatch.undo()
    return naps


def test_slowness_sleeps_in_proportion_to_the_work(monkeypatch):
    assert slept(monkeypatch, Slowness(4.0, 0.0, 0, 0, "cpu")) == [3.0]
    assert slept(monkeypatch, Slowness(4.0, 0.0, 0, 0, "cpu"), waited=0.75) == [0.75]  # waiting for others is no work
    assert slept(monkeypatch, Slowness(4.0, 0.0, 0, 0, "cpu"), waited=2.0) == [0.0]
    assert slept(monkeypatch, Slowness(1.0, 0.0, 0, 0, "cpu")) == []


def test_jitter_scatters_about_the_factor_and_repeats_with_the_seed(monkeypatch):
    naps = slept(monkeypatch, Slowness(4.0, 0.3, 7, 1, "cpu"), n=400)
    assert naps == slept(monkeypatch, Slowness(4.0, 0.3, 7, 1, "cpu"), n=400)
    assert naps != slept(monkeypatch, Slowness(4.0, 0.3, 7, 2, "cpu"), n=400)
    assert min(naps) >= 0 and np.std(np.log(np.array(naps) + 1)) == pytest.approx(0.3, rel=0.15)
    assert np.median(naps) == pytest.approx(3.0, rel=0.15)
    assert all(nap >= 0 for nap in slept(monkeypatch, Slowness(1.0, 0.5, 0, 0, "cpu"), n=50))
