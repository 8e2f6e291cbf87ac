"""Replays of an all-reduce: the bits of the run, also where its group broke, in a local pass or after it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import labkit
from labkit import chaos
from labkit.errors import RunError
from labkit.runs.events import read_rows
from labkit.runs.files import read_json, write_json
from labkit.training import supervisor
from labkit.training.worker.replica import Replica
from labkit.training.worker.worker import _Worker
from tests.helpers import Settling, Slow, ended, net_with_statistics, problem, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)


@pytest.fixture(scope="module")
def lab():
    with labkit.connect("threads", 3, slowdown=[1, 2, 3]) as lab:
        yield lab


def train(a_problem, lab, folder, **options):
    options = {"update": "allreduce", "partition": "udpa", "passes": 3, "local_steps": 2, "seed": 5, "name": "r", **options}
    return labkit.train(a_problem, lab, runs=folder, **options)


def same(run):
    again = labkit.replay(run, problem=run.problem())
    np.testing.assert_array_equal(run.flat().view(np.uint32), again.flat().view(np.uint32))
    assert "bit for bit the same" in again.status()["reason"] and read_rows(again.path) == read_rows(run.path)
    return True


def noisy(x):
    return x + 0.01 * torch.randn_like(x)


def test_three_ranks_with_random_batches_statistics_and_milestones(lab, tmp_path, monkeypatch):
    a_problem = problem(net_with_statistics, kind=Settling, schedule="cosine", augment=noisy)
    run = ended(train(a_problem, lab, tmp_path))
    assert (run.events.kind == "settle").sum() == 2 and same(run)
    with pytest.raises(RunError, match="exchange gradients within every step"):
        labkit.replay(run, update="sgwu")
    with monkeypatch.context() as patch:
        patch.setattr(Replica, "step", lambda self, *rest, step=Replica.step: step(self, *rest) if self.worker < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):  # and not what the other ranks make of it
            labkit.replay(run, problem=a_problem)
    write_json(run.path / "config.json", {**read_json(run.path / "config.json"), "format": 4})
    with pytest.raises(RunError, match="an all-reduce of format 4, in which a local pass that was broken off"):
        labkit.replay(labkit.load_run(run.path, problem=a_problem))


@pytest.mark.slow
def test_a_group_that_breaks_in_the_middle_of_a_local_pass(lab, tmp_path, monkeypatch):
    """Of which each rank has done as much as it had: its random numbers are drawn again."""
    step, lost = Replica.step, threading.Event()

    def breaking(self, indices, clock, group=None):
        if self.worker == 2 and clock.samples > 250 and not lost.is_set():
            lost.set()
            chaos.drop_link(run, 2)
            until(lambda: group.exchange.waiting.broken)
        return step(self, indices, clock, group)

    monkeypatch.setattr(Replica, "step", breaking)
    run = train(problem(net_with_statistics, augment=noisy), lab, tmp_path)
    ended(run)
    assert {"regroup", "leave"} <= {*run.events.kind} and same(run)


@pytest.mark.slow
@pytest.mark.parametrize("first", [{2}, {0, 1}])
def test_a_rank_that_is_lost_after_the_local_pass_and_back_before_the_others_push(first, lab, tmp_path, monkeypatch):
    """The local pass counts for those who push it; the lost one has been a rank of it. Of the next pass the `first` ones push first."""
    exchange, through = _Worker._exchange, set()

    def losing(self, done, grant):
        if self.version == 3 and self.spec.index not in first:
            until(lambda: first <= {*run.events.query("kind == 'push' and base_version == 3").worker})
        if grant.group == 1 and self.version == 2:
            through.add(self.spec.index)
            if self.spec.index == 2:
                until(lambda: len(through) == 3)
                self.connection.close()
            else:
                until(lambda: (run.events.query("worker == 2").kind == "join").sum() == 2)
        return exchange(self, done, grant)

    monkeypatch.setattr(_Worker, "_exchange", losing)
    run = train(problem(net_with_statistics), lab, tmp_path)
    ended(run)
    merged = run.events.query("kind == 'merge' and version == 3")
    assert sorted(merged.worker) == [0, 1] and same(run)


@pytest.mark.slow
def test_numbers_from_the_one_generator_of_torch_are_refused(lab, tmp_path):
    a_problem = problem(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(36, 3)))
    run = ended(train(a_problem, lab, tmp_path, passes=1))
    with pytest.raises(RunError, match=r"draws random numbers \(dropout, say\), and the ranks of an all-reduce"):
        labkit.replay(run)


@pytest.mark.slow
def test_more_ranks_than_a_pool_has_threads_by_default(tmp_path, monkeypatch):  # its lab takes the place of the one of three
    """They wait for each other."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # 5 threads, then
    with labkit.connect("threads", 7) as lab:
        assert same(ended(train(problem(), lab, tmp_path, passes=1)))


@pytest.mark.slow
@pytest.mark.cluster
def test_processes_that_are_killed_in_a_local_pass(tmp_path):
    with labkit.connect("dask", 3) as lab:
        run = train(problem(net_with_statistics, kind=Slow, augment=noisy), lab, tmp_path, passes=6)
        until(lambda: run.status().get("version", 0) >= 2, 60)
        chaos.kill(lab, 2)
        ended(run, timeout=90)
    assert "leave" in {*run.events.kind} and same(run)
