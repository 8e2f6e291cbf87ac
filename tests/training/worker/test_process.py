"""How a process is set up before it trains."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import labkit
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


class Wide(nn.Module):
    """60 MB of weights by default, in layers of a sixteenth, and little to compute."""

    def __init__(self, rows=1831):
        super().__init__()
        self.first, self.last = nn.Linear(4, 512), nn.Linear(16, 2)
        self.parts = nn.ModuleList(nn.Linear(512, rows, bias=False) for _ in range(16))

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(torch.stack([part(x).mean(1) for part in self.parts], 1))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of a process")
def test_a_worker_holds_few_copies_of_the_weights_and_gives_them_back(tmp_path):
    """With momentum: weights, gradient, momentum, and what the curve is measured with after them; in the second run as in the first."""
    generator, peaks = np.random.default_rng(0), []
    data = generator.normal(size=(40, 1, 2, 2)).astype(np.float32), generator.integers(0, 2, 40)
    with labkit.connect("dask", 1) as lab:
        pid = lab.workers[0].pid
        for rows in (1, 1831, 1831):
            with open(f"/proc/{pid}/clear_refs", "w") as file:
                file.write("5")  # the high-water mark begins anew
            problem = labkit.Classifier(
                Wide, data, batch_size=4, lr=0.001, momentum=0.9, model_args={"rows": rows}, score_samples=8
            )
            labkit.train(problem, lab, update="agwu", passes=2, name=f"{rows}", runs=tmp_path, local_steps=4, checkpoints=2).wait()
            with open(f"/proc/{pid}/status") as file:
                peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
            peaks.append((peak, psutil.Process(pid).memory_info().rss))
    (_, base), *both = peaks
    weights = 4 * 16 * 512 * 1831
    for peak, left in both:
        assert (peak - base) / weights < 4.5 and (
            left - base
        ) / weights < 0.5  # half of one for what does not grow with the weights
