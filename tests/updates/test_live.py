"""Every update rule in a real run: it ends, trains on every sample of its budget, learns, and survives the loss of a worker."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

import labkit
from labkit import chaos
from labkit.runs.events import effective
from labkit.training import supervisor
from labkit.updates import names
from tests.helpers import Slow, cut_off, ended, net_with_statistics, problem, shortened, stopped_at_last, until

pytestmark = pytest.mark.usefixtures("cache")
QUICK = ["easgd", "fedbuff", {"name": "sgwu", "quorum": 0.5, "grace": 0.05}]
REST = [name for name in names() if name not in (*QUICK, "sgwu", "agwu", "allreduce")]  # those are in training/test_train.py
REST += [{"name": "sgwu", "quorum": 0.5}, {"name": "ringmaster", "limit": 1}, {"name": "downpour", "optimiser": "adam"}]
REST += [{"name": "downpour", "optimiser": "momentum"}, {"name": "fedbuff", "size": 5}]
RULES = [*QUICK, *(pytest.param(rule, marks=pytest.mark.slow) for rule in REST)]


def called(rule):
    return "-".join(map(str, rule.values())) if isinstance(rule, dict) else rule


@pytest.fixture
def lab():
    with labkit.connect("threads", 3) as lab:
        yield lab


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(), recorded in a folder of the test."""
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    with stopped_at_last(runs=tmp_path, heartbeat_timeout=60.0) as begin:
        yield begin


def check(run, samples):
    """All samples of the budget were merged, once; each push was merged, thrown away or lost; the record is whole."""
    events = run.events
    merges, drops, pushes = (events[events.kind == kind] for kind in ("merge", "drop", "push"))
    assert merges.samples.sum() == samples == merges.total.iloc[-1] == run.status()["samples"] and chaos.audit(run) == []
    assert list(merges.version.drop_duplicates()) == list(range(1, int(merges.version.max()) + 1))
    assert (merges.staleness >= 0).all() and (merges.coefficient >= 0).all() and (drops.coefficient == 0).all()
    assert len(pushes) >= len(merges) + len(drops)
    weights = run.weights()
    assert all(np.isfinite(value).all() for value in weights.values())
    assert all((value >= 0).all() for name, value in weights.items() if name.endswith("running_var"))
    return merges, drops, pushes


@pytest.mark.parametrize("update", RULES, ids=called)
def test_a_run_with_this_rule_ends_with_its_budget_and_has_learnt_something(update, train, lab):
    a_problem = problem(net_with_statistics, lr=0.02)
    run = ended(train(a_problem, lab, update=update, passes=8, local_steps=2))
    merges, drops, pushes = check(run, 8 * len(a_problem.train_indices()))
    assert set(merges.worker) == {0, 1, 2} and len(pushes) == len(merges) + len(drops)
    curve = run.curve()
    assert curve.score.iloc[-1] > curve.score.iloc[0] + 0.2 and curve.loss.iloc[-1] < 1.3 * curve.loss.iloc[0]
    again = labkit.load_run(run.path)
    assert again.config["update"] == run.config["update"] and again.summary() == run.summary()


@pytest.mark.parametrize("update", RULES, ids=called)
def test_a_worker_that_is_lost_and_comes_again_holds_up_no_rule(update, train, lab, monkeypatch):
    """Worker 1 loses its link at every push; the others do its part."""
    cut_off(monkeypatch)
    a_problem = problem(kind=Slow)
    run = ended(train(a_problem, lab, update=update, passes=5, local_steps=3))
    check(run, 5 * len(a_problem.train_indices()))
    assert run.events.query("kind == 'leave' and worker == 1").message.iloc[0] != ""


@pytest.mark.slow
def test_a_slow_worker_is_a_backup_worker_and_its_late_pushes_are_thrown_away(train):
    """Half of two is enough after 0.1 s. What is thrown away is trained on again, and neither recorded nor counted as merged."""
    a_problem = problem(kind=Slow)
    with labkit.connect("threads", 2, slowdown=[1, 6]) as uneven:
        run = ended(train(a_problem, uneven, update=labkit.SGWU(quorum=0.5, grace=0.1), passes=6, local_steps=4))
    merges, drops, pushes = check(run, 6 * len(a_problem.train_indices()))
    assert run.config["update"] == {"name": "sgwu", "quorum": 0.5, "grace": 0.1}
    events = run.events
    assert len(drops) and set(drops.worker) == {1} and (drops.staleness > 0).all() and len(pushes) == len(merges) + len(drops)
    waited = events[events.kind == "expire"]
    assert len(waited) and (merges.groupby("version").worker.nunique() == 1).any()
    for expire in waited.itertuples():  # the time ran from the first push of the round
        first = pushes[(pushes.seq < expire.seq) & (pushes.base_version == expire.version)].seconds.min()
        assert 0.1 - 1e-3 <= expire.seconds - first < 5


@pytest.mark.slow
def test_steps_by_speed_under_delayed_nesterov_whatever_the_partition(train, monkeypatch):
    """Equal shards, speeds 1 : 4: the quick one makes four times as many steps; with dynamic=False as many."""
    monkeypatch.setattr(Slow, "pause", 0.05)
    with labkit.connect("threads", 2, slowdown=[1, 4]) as uneven:
        shares = {}
        for dynamic in (True, False):
            rule = labkit.updates.DelayedNesterov(dynamic=dynamic)
            run = ended(train(problem(kind=Slow), uneven, update=rule, passes=6, local_steps=5, name=f"dynamic-{dynamic}"))
            late = run.events[(run.events.kind == "push") & (run.events["pass"] > 1)].groupby("worker").samples.median()
            shares[dynamic] = late[0] / late[1]
    assert shares[True] > 2.2 and 0.7 < shares[False] < 1.4


@pytest.mark.parametrize(
    "update",
    [
        {"name": "downpour", "optimiser": "adam"},
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("easgd", "gem", "delayed-nesterov", "fedbuff", "diloco", "ssp")),
    ],
    ids=called,
)
def test_a_run_goes_on_from_its_checkpoint_under_a_rule_with_a_memory(update, train, lab):
    run = train(problem(kind=Slow), lab, update=update, passes=1000, checkpoints=10_000)
    until(lambda: run.status()["version"] >= 4)
    again = labkit.resume(shortened(run.stop(), 2000), lab)
    ended(again)
    merged = effective(again.events).query("kind == 'merge'")
    assert merged.samples.sum() == again.config.budget and chaos.audit(again) == []


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_killed_process_ends_no_run(train):
    a_problem = problem(kind=Slow)
    with labkit.connect("dask", 2) as lab:
        for update in ("fedbuff", "diloco", {"name": "sgwu", "quorum": 0.5}):
            run = train(a_problem, lab, update=update, passes=10, local_steps=3)
            until(lambda run=run: run.status()["version"] >= 4, 90)
            os.kill(lab.workers[1].pid, signal.SIGKILL)
            ended(run, timeout=110)
            check(run, 10 * len(a_problem.train_indices()))
            assert run.events.query("kind == 'leave'").worker.iloc[0] == 1
            until(lambda: lab.free() == [0, 1], 60)
