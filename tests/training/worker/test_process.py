"""How a process is set up before it trains."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import pytest
import torch

from labkit.training.worker.process import keep_memory, prepare, prepare_alone

UNEVEN = {"jitter": 0.0, "drift": 0.0, "stalls": None}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_those_of_the_worker_and_stay_where_none_are_given():
    prepare(threads=2)
    assert torch.get_num_threads() == 2
    prepare()
    assert torch.get_num_threads() == 2


def test_a_device_is_made_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    prepare("cpu", 1)
    prepare("cuda:1", 1)
    assert current == ["cuda:1"]


@pytest.mark.parametrize("missing", [OSError, AttributeError])
def test_another_c_library_is_no_error(missing, monkeypatch):
    asked = []

    def none(name):
        asked.append(name)
        raise missing("no mallopt")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", none)
    keep_memory()
    assert asked == [None]


def test_to_train_alone_a_process_has_its_seed_and_its_slowdown():
    """Threads of one process share a generator, so nobody may seed it."""
    worker = SimpleNamespace(index=1, device="cpu", threads=1, slowdown=3.0, drifts_to=3.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        slowness = prepare_alone(worker, {"one_process": True, **UNEVEN}, 7)
        assert torch.equal(before, torch.get_rng_state()) and slowness.uneven.slowdown == 3.0
        prepare_alone(worker, {"one_process": False, **UNEVEN}, 7)
        assert torch.initial_seed() == 7
