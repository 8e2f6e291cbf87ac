"""Training from end to end on small labs: the promises about weights, samples, events, errors and endings."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit.errors import ClusterError, LabError, PartitionError, ProblemError, RunError, WireError, WorkerError
from labkit.partition import UDPA
from labkit.problems.problem import Clock
from labkit.problems.splits import batches
from labkit.training import supervisor
from labkit.training import train as training
from labkit.training.worker.sampler import pass_order, steps
from tests.problems.test_problem import TinyGan

pytestmark = pytest.mark.usefixtures("cache")
SEED, LR, MOMENTUM, DECAY = 5, 0.05, 0.9, 0.01


def data(n=231):
    generator = np.random.default_rng(0)
    y = np.arange(n) % 3
    x = generator.normal(size=(n, 1, 6, 6)).astype(np.float32)
    x[np.arange(n), 0, y] += 2
    return x, y


def net(shape, n_classes, width=7):
    n = int(np.prod(shape))
    return nn.Sequential(nn.Flatten(), nn.Linear(n, width), nn.ReLU(), nn.Linear(width, n_classes))


def net_with_statistics(shape, n_classes):
    n = int(np.prod(shape))
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(2 * (shape[1] - 2) * (shape[2] - 2), n // 4),
        nn.BatchNorm1d(n // 4),
        nn.ReLU(),
        nn.Linear(n // 4, n_classes),
    )


class Poisoned(labkit.Classifier):
    """Raises at one sample, which one worker alone holds; the others are slow enough to be in the middle of something."""

    def step(self, module, batch, optimisers, clock):
        time.sleep(0.01)
        if clock.total > 1 and (batch[0] > 8).any():
            raise RuntimeError("this sample is poisoned")
        return super().step(module, batch, optimisers, clock)


def cut_off(monkeypatch, after=0):
    """Worker 1 loses its link at every push once it has come past this version."""
    from labkit.training.worker.worker import _Worker

    push_and_pull = _Worker._push_and_pull

    def lossy(self, *push):
        if self.spec.index == 1 and self.version > after:
            self.connection.close()
        return push_and_pull(self, *push)

    monkeypatch.setattr(_Worker, "_push_and_pull", lossy)


class Slow(labkit.Classifier):
    def step(self, module, batch, optimisers, clock):
        time.sleep(0.01)
        return super().step(module, batch, optimisers, clock)


def problem(model=net, kind=labkit.Classifier, xy=None, **options):
    options = {"batch_size": 16, "lr": LR, "momentum": MOMENTUM, "score_samples": 20, **options}
    return kind(model, xy or data(), **options)


def poisoned(worker):
    """A problem with a sample in the middle of the shard of `worker` (of 2, with UDPA and SEED) that makes its step raise."""
    x, y = data()
    x /= np.abs(x).max()  # a lone bright image survives the normalisation
    indices = problem(xy=(x, y)).train_indices()
    partition = UDPA()
    partition.start(len(indices), [0, 1], seed=SEED)
    shard = pass_order(partition.allocate([0, 1])[worker], SEED, worker, 0)
    x[indices[shard[40]]] = 50
    return problem(xy=(x, y), kind=Poisoned)


def until(condition, limit=20.0):
    """Poll until the condition holds; fail when it does not within `limit` seconds."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit:g} s"
        time.sleep(0.01)


def ended(run, state="done", timeout=40):
    run.wait(timeout)
    assert run.state == state
    return run


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)


@pytest.fixture
def lab():
    with labkit.connect("threads", 2) as lab:
        yield lab


@contextlib.contextmanager
def stopped_at_last(**defaults):
    """train() with other defaults; what it has begun is stopped if the test fails on the way."""
    made = []

    def begin(a_problem, lab, **options):
        made.append(labkit.train(a_problem, lab, **{"seed": SEED, "partition": "udpa", **defaults, **options}))
        return made[-1]

    try:
        yield begin
    finally:
        for run in made:
            run.stop()


@pytest.fixture
def train(lab, tmp_path):
    """train() on two threads, recorded in a folder of the test."""
    with stopped_at_last(runs=tmp_path / "runs") as begin:
        yield lambda a_problem, **options: begin(a_problem, options.pop("lab", lab), **options)


def by_hand(a_problem, passes):
    """The same training as a plain loop, with SGD written out."""
    module = a_problem.build(SEED)
    parameters, indices = list(module.parameters()), a_problem.train_indices()
    partition, momenta = UDPA(), {}
    partition.start(len(indices), [0], seed=SEED)
    shard = partition.allocate([0])[0]
    for epoch in range(passes):
        for part in batches(pass_order(shard, SEED, 0, epoch), a_problem.batch_size):
            x, y = a_problem.load(indices[part])
            grads = torch.autograd.grad(F.cross_entropy(module(x), y), parameters)
            with torch.no_grad():
                for i, (p, g) in enumerate(zip(parameters, grads, strict=True)):
                    g = g.add(p, alpha=DECAY)
                    momenta[i] = momenta[i].mul_(MOMENTUM).add_(g) if i in momenta else g.clone()
                    p.add_(momenta[i], alpha=-LR)
    return {name: t.detach().numpy() for name, t in module.state_dict().items() if t.is_floating_point()}


# -- the weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
def test_one_worker_is_plain_training(update, train):
    """Three passes with momentum: this also says that the optimiser's state is kept across pulls."""
    a_problem = problem(net_with_statistics, weight_decay=DECAY)
    with labkit.connect("threads", 1) as one:
        run = ended(train(a_problem, lab=one, update=update, passes=3))
    weights, expected = run.weights(), by_hand(a_problem, 3)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        if update == "sgwu":
            np.testing.assert_array_equal(weights[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


def test_sgwu_with_the_same_seed_gives_the_same_bits(train):
    first, second = (ended(train(problem(), update="sgwu", passes=3, name=name)) for name in "ab")
    np.testing.assert_array_equal(first.flat(), second.flat())
    other = ended(train(problem(), update="sgwu", passes=3, name="c", seed=SEED + 1))
    assert not np.array_equal(first.flat(), other.flat())


def test_allreduce_equals_one_process_on_the_joint_batches(train):
    """Both shards in proportion, every step over the batches of both: plain SGD on the union."""
    a_problem = problem(batch_size=8)
    run = ended(train(a_problem, update="allreduce", partition=labkit.IDPA(batches=1, speeds=[1, 3]), passes=1))
    indices, module = a_problem.train_indices(), a_problem.build(SEED)
    partition = labkit.IDPA(batches=1, speeds=[1, 3])
    partition.start(len(indices), [0, 1], seed=SEED)
    shards = [pass_order(shard, SEED, worker, 0) for worker, shard in partition.allocate([0, 1]).items()]
    assert len(shards[1]) > 2 * len(shards[0])
    grants, optimisers = [len(shard) for shard in shards], a_problem.optimisers(module)
    parts = [np.split(shard, np.cumsum(steps(grants, rank, 8)[0])[:-1]) for rank, shard in enumerate(shards)]
    for joint in zip(*parts, strict=True):
        a_problem.step(module, a_problem.load(indices[np.concatenate(joint)]), optimisers, Clock(0, 1, 0.0))
    for name, tensor in module.state_dict().items():
        np.testing.assert_allclose(run.weights()[name], tensor.numpy(), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
def test_running_statistics_travel(update, train):
    a_problem = problem(net_with_statistics)
    run = ended(train(a_problem, update=update, passes=2))
    weights = run.weights()
    assert run.layout.n_buffers == 2 * (2 + 9)
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert not np.allclose(weights[name], run.weights(0)[name]), name
        assert np.isfinite(weights[name]).all()
    module = run.model()
    assert not module.training
    np.testing.assert_array_equal(module[1].running_mean.numpy(), weights["1.running_mean"])
    test = a_problem.test_indices()
    measured = a_problem.evaluate(module, a_problem.load(test, "test"))
    assert measured["score"] == pytest.approx(run.summary()["score"])
    assert measured["loss"] == pytest.approx(run.summary()["loss"], rel=1e-4)


# -- the samples and the events ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
@pytest.mark.parametrize(
    ("partition", "local_steps"),
    [
        ("udpa", 3),
        ("idpa", None),
        pytest.param("udpa", None, marks=pytest.mark.slow),
        pytest.param("idpa", 3, marks=pytest.mark.slow),
    ],
)
def test_every_sample_of_the_budget_is_trained_on_and_every_event_fits(update, partition, local_steps, train):
    a_problem = problem(net_with_statistics)  # a lone sample in a batch would raise
    run = ended(train(a_problem, update=update, partition=partition, passes=2.3, local_steps=local_steps))
    events, n = run.events, len(a_problem.train_indices())
    kind = {name: events[events.kind == name] for name in events.kind.unique()}
    merges, pushes, budget = kind["merge"], kind["push"], round(2.3 * n)
    if update == "allreduce":
        assert budget - 2 < merges.samples.sum() <= budget
    else:
        assert merges.samples.sum() == budget
    assert list(merges.version.drop_duplicates()) == list(range(1, int(merges.version.max()) + 1))
    assert (merges.staleness >= 0).all() and (pushes.staleness >= 0).all()
    assert (merges.total.diff().dropna() >= 0).all() and merges.total.iloc[-1] == merges.samples.sum()
    assert len(merges) == len(pushes) and (pushes.bytes == 4 * run.layout.size).all()
    for worker in (0, 1):
        mine = events[events.worker == worker]
        assert list(mine.kind)[:3] == ["join", "allocate", "pull"] and list(mine.kind)[-1] == "leave"
        assert (mine.kind == "join").sum() == (mine.kind == "leave").sum() == 1
        # Each release is followed by one push, and after the last push there is none: the worker was told to stop.
        turns = [k for k in mine.kind if k in ("release", "push")]
        assert turns == ["release", "push"] * (len(turns) // 2)
        assert list(mine[mine.kind == "push"]["pass"]) == list(range(1, len(turns) // 2 + 1))
    allocations = run.allocations()
    assert (allocations.groupby("worker").samples.cumsum() == allocations.total).all()
    assert allocations.samples.sum() <= n
    if partition == "udpa":
        assert allocations.samples.sum() == n
    assert list(events.seq) == list(range(len(events)))
    curve = run.curve()
    assert curve.version.iloc[0] == 0 and curve.version.iloc[-1] == merges.version.max()
    assert curve.samples.iloc[-1] == merges.total.iloc[-1] and np.isfinite(curve[["loss", "score"]]).all(axis=None)
    assert run.status()["samples"] == merges.samples.sum()


def test_local_steps_is_the_number_of_optimiser_steps(train):
    run = ended(train(problem(), update="sgwu", local_steps=3, passes=2))
    pushes = run.events.query("kind == 'push'")
    assert (pushes.groupby("pass").samples.sum().iloc[:-1] == 2 * 3 * 16).all()


@pytest.mark.parametrize("update", ["sgwu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("agwu", "allreduce"))])
def test_budgets_that_leave_a_few_samples_over(update, train):
    """Whatever is left for the last pass, no worker gets a batch of one sample, or of none."""
    n = len(problem().train_indices())
    for extra in (1, 2, 3):
        run = ended(train(problem(net_with_statistics), update=update, passes=1 + extra / n, name=f"extra{extra}"))
        assert run.events.query("kind == 'merge'").samples.sum() == n + extra


def test_a_budget_smaller_than_the_number_of_workers_ends(train):
    run = ended(train(problem(), update="sgwu", passes=1e-6))
    assert run.events.query("kind == 'merge'").samples.sum() == 1
    assert np.isfinite(run.flat()).all()


def test_a_stratified_partition_gives_each_shard_every_class(train):
    run = ended(train(problem(), partition=labkit.UDPA(stratified=True), passes=1))
    assert run.config["partition"] == {"name": "udpa", "stratified": True}
    assert list(run.allocations().total) in ([93, 94], [94, 93])


def test_emulated_slowness_is_in_the_record(tmp_path):
    with labkit.connect("threads", 2, slowdown=[1, 4], jitter=0.1) as uneven:
        run = ended(labkit.train(problem(), uneven, runs=tmp_path, passes=4, partition=labkit.IDPA(batches=2), seed=SEED))
    assert run.config["emulated"] and [w["slowdown"] for w in run.config["workers"]] == [1, 4] and run.config["jitter"] == 0.1
    assert run.config["drift"] == 0 and run.config["stalls"] is None
    pushes = run.events.query("kind == 'push'")
    speed = pushes.groupby("worker").samples.sum() / pushes.groupby("worker").compute_s.sum()
    assert speed[0] > 1.5 * speed[1]
    held = run.allocations().groupby("worker").total.max()
    assert held[0] > held[1]


def test_stalls_and_drift_are_in_the_record_and_in_the_times(tmp_path):
    """Worker 1 begins slow and ends quick; and somebody stands still half of the time, without being taken to be lost."""
    options = {"runs": tmp_path, "local_steps": 2, "partition": "udpa", "update": "agwu", "heartbeat_timeout": 1.5, "seed": SEED}
    with labkit.connect("threads", 2, slowdown=[1, 6], drift=2.0) as drifting:
        run = ended(labkit.train(problem(kind=Slow), drifting, name="drift", passes=12, **options))
    assert run.config["emulated"] and run.config["drift"] == 2 and [w["drifts_to"] for w in run.config["workers"]] == [6, 1]
    pushes = run.events.query("kind == 'push' and worker == 1")
    speed = pushes.compute_s / pushes.samples
    begun, turned = (speed[(pushes.seconds % 2 - at).abs() < 0.3].median() for at in (0.2, 1.0))
    assert begun > 2 * turned
    with labkit.connect("threads", 2, stalls=(2, 2)) as stalling:
        run = ended(labkit.train(problem(kind=Slow), stalling, name="stalls", passes=6, **options))
    assert run.config["emulated"] and run.config["stalls"] == [2, 2] and run.config["drift"] == 0
    pushes = run.events.query("kind == 'push'")
    assert (pushes.compute_s + pushes.score_s).max() > 2 and set(run.events.query("kind == 'join'").incarnation) == {0}


def test_a_stall_does_not_keep_a_stop_waiting(tmp_path):
    with labkit.connect("threads", 1, stalls=(0.001, 30)) as stalling:  # after the first step
        run = labkit.train(problem(kind=Slow), stalling, runs=tmp_path, passes=1000, local_steps=9, seed=SEED)
        until(lambda: run.status().get("started"))
        time.sleep(0.5)
        assert run.status()["samples"] <= 16
        begun = time.monotonic()
        run.stop()
        assert time.monotonic() - begun < 8 and run.state == "stopped"


# -- endings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
def test_stop_ends_a_run_at_once_and_keeps_what_there_is(update, train):
    run = train(problem(kind=Slow), update=update, passes=1000)
    until(lambda: run.status()["version"] >= 2)
    begun = time.monotonic()
    run.stop()
    assert time.monotonic() - begun < 8 and run.state == "stopped"
    run.stop()
    assert run.wait(1).state == "stopped"
    version = run.events.query("kind == 'merge'").version.max()
    assert version >= 2 and run.curve().version.iloc[-1] == version
    assert np.isfinite(run.flat()).all() and run.summary()["state"] == "stopped"
    assert labkit.load_run(run.path).state == "stopped"


@pytest.mark.slow
def test_stopping_many_times_in_the_middle_of_an_exchange(train):
    """The ranks of an all-reduce never stop at the same step: whoever goes on must hear of it, and nothing may pile up."""
    counts = []
    for i in range(5):
        run = train(problem(kind=Slow), update="allreduce", passes=1000, name=f"r{i}")
        until(lambda run=run: run.status()["samples"] > 40 * (i + 1))  # noqa: B023
        begun = time.monotonic()
        run.stop()
        assert time.monotonic() - begun < 8 and run.state == "stopped"
        counts.append(psutil.Process().num_threads())
    assert counts[-1] <= counts[1] + 1, "threads of the groups pile up"


def test_stop_before_the_workers_are_there(train):
    run = train(problem(), passes=1000)
    run.stop()
    assert run.state == "stopped" and run.curve().version.iloc[0] == 0


def test_waiting_too_short_says_so(train):
    run = train(problem(kind=Slow), passes=1000)
    with pytest.raises(RunError, match=r"still goes after 0\.2 s"):
        run.wait(0.2)
    assert run.state == "running"
    with pytest.raises(RunError, match=r"still goes; its curve is measured at the end"):
        run.curve()


def test_two_runs_at_once_hold_workers_of_their_own(train, lab):
    first = train(problem(kind=Slow), passes=1000, workers=[1], name="first")
    until(lambda: first.status()["version"] >= 1)
    second = train(problem(kind=Slow), passes=1000, name="second")  # what is free
    assert [[w["index"] for w in run.config["workers"]] for run in (first, second)] == [[1], [0]] and lab.free() == []
    with pytest.raises(ClusterError, match=r"still trains 'first' and 'second'\. Call run\.wait\(\) or run\.stop\(\)"):
        train(problem(), name="third")
    with pytest.raises(ClusterError, match=r"worker 0 by 'second'\. Wait for that run"):
        train(problem(), workers=[0], name="third")
    with pytest.raises(ClusterError, match="there is no worker 2"):
        train(problem(), workers=[2], name="third")
    assert second.stop().state == "stopped" and first.state == "running" and lab.free() == [0] and lab.runs == [first]
    assert {*ended(train(problem(), passes=1, name="third")).events.query("kind == 'push'").worker} == {0}
    assert first.stop().state == "stopped" and lab.free() == [0, 1] and lab.runs == []
    assert {*first.events.query("kind == 'push'").worker} == {1} and len(first.curve())


def test_two_runs_of_one_name_in_two_folders_do_not_stop_each_other(train, lab, tmp_path, capsys):
    first = train(problem(kind=Slow), passes=1000, workers=[0], name="same", runs=tmp_path / "x")
    second = train(problem(kind=Slow), passes=1000, name="same", runs=tmp_path / "y")  # what is free
    assert [[w["index"] for w in run.config["workers"]] for run in (first, second)] == [[0], [1]] and lab.free() == []
    until(lambda: min(first.status()["version"], second.status()["version"]) >= 1)
    with pytest.raises(ClusterError, match=r"still trains 'same' and 'same'\."):
        train(problem(), name="same", runs=tmp_path / "z")
    with pytest.raises(ClusterError, match=r"worker 0 by 'same', worker 1 by 'same'\. Wait for that run"):
        train(problem(), workers=[0, 1], name="same", runs=tmp_path / "z")
    assert first.state == second.state == "running" and capsys.readouterr().out == ""
    third = train(problem(kind=Slow), passes=1000, name="same", runs=tmp_path / "x" / ".." / "x")  # the cell again
    assert (first.state, second.state, third.state) == ("stopped", "running", "running") and lab.runs == [second, third]
    assert [w["index"] for w in third.config["workers"]] == [0] and capsys.readouterr().out.startswith("Stopping 'same'")
    assert second.stop().state == "stopped" and third.state == "running" and lab.free() == [1]
    assert third.stop().state == "stopped" and lab.free() == [0, 1]


def test_an_interrupt_while_waiting_stops_the_run(train):
    run = train(problem(kind=Slow), passes=1000)
    until(lambda: run.status()["version"] >= 1)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run.wait(30)
    timer.join()
    assert run.state == "stopped" and len(run.curve())


def test_running_the_cell_again_begins_again_and_keeps_the_earlier_run(train, capsys):
    first = train(problem(kind=Slow), passes=1000, name="x")
    until(lambda: first.status()["version"] >= 1)
    with pytest.raises(ClusterError, match=r"still trains 'x'\. Call run\.wait\(\) or run\.stop\(\)"):
        train(problem(), name="y")
    second = ended(train(problem(), passes=1, name="x"))
    assert first.state == "stopped" and capsys.readouterr().out.splitlines() == [
        "Stopping 'x', which is begun again.",
        "The earlier run 'x' is kept as x.1.",
    ]
    assert second.path.name == "x" and first.path == second.path.with_name("x.1")
    assert first.config["passes"] == 1000 and first.events.time.max() < second.events.time.min()  # each handle its own run
    third = ended(train(problem(), passes=1, name="x"))
    assert second.path.name == "x.2" and third.path.name == "x" and first.path.name == "x.1"
    assert sorted(path.name for path in third.path.parent.iterdir()) == ["x", "x.1", "x.2"]


@pytest.mark.slow
def test_a_process_that_ends_without_closing_leaves_nothing(tmp_path, cache):
    """Exit while a run goes: no traceback, no process, and the record says how it ended."""
    script = f"""
import labkit, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import tests.training.test_train as t
lab = labkit.connect("threads", 2)
run = labkit.train(t.problem(kind=t.Slow), lab, passes=1000, runs={str(tmp_path)!r}, name="left", update="sgwu")
t.until(lambda: run.status()["version"] >= 1)
print(run._session.server.pid)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    until(lambda: not psutil.pid_exists(int(done.stdout)))
    assert labkit.load_run(tmp_path / "left").state in ("stopped", "failed")


# -- errors of workers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
@pytest.mark.parametrize("worker", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_step_that_raises_ends_the_run_with_the_first_error_and_its_traceback(update, worker, train):
    a_problem = poisoned(worker)
    run = train(a_problem, update=update, passes=50)
    with pytest.raises(WorkerError) as caught:
        run.wait(30)
    text = str(caught.value)
    assert caught.value.worker == worker
    assert f"worker {worker} (cpu) failed at version 0: RuntimeError: this sample is poisoned" in text
    assert "Traceback" in text and "in step" in text and "test_train.py" in text
    assert run.state == "failed" and f"worker {worker}" in run.status()["reason"]
    errors = run.events.query("kind == 'error'")
    assert len(errors) == 1 and "poisoned" in errors.message.iloc[0]
    assert labkit.load_run(run.path).state == "failed"
    ended(train(problem(), update=update, passes=1, name="after"))  # the lab is as good as before


def test_weights_that_become_nan_fail_the_run(train):
    for update in ("sgwu", "agwu", "allreduce"):
        run = train(problem(lr=1e9), update=update, passes=3, name=update)
        with pytest.raises(LabError, match=r"worker [01] at version \d+: .*NaN or infinity\. Lower the learning rate") as caught:
            run.wait(30)
        assert "failed" in str(caught.value) and run.state == "failed"
        assert np.isfinite(run.flat()).all()  # what came before is kept, and is good


def test_a_model_that_fails_on_one_worker_before_the_start_frees_the_others(train, monkeypatch):
    from labkit.training.worker.worker import _Worker

    probe = _Worker._probe
    monkeypatch.setattr(_Worker, "_probe", lambda self: 1 / 0 if self.spec.index == 1 else probe(self))
    for update in ("sgwu", "allreduce"):
        run = train(problem(), update=update, name=update)
        with pytest.raises(WorkerError, match=r"worker 1 \(cpu\) failed at version 0: ZeroDivisionError"):
            run.wait(20)


@pytest.mark.parametrize("update", ["sgwu", "agwu"])
def test_a_worker_that_loses_the_server_does_not_end_the_run(update, train, monkeypatch):
    """As one that was frozen for too long and comes back: the others have gone on without it."""
    cut_off(monkeypatch)
    a_problem = problem(kind=Slow)  # so that both have their turns
    run = ended(train(a_problem, update=update, passes=6))
    events = run.events
    merges = events[events.kind == "merge"]
    assert merges.samples.sum() == 6 * len(a_problem.train_indices())
    assert events.query("kind == 'leave' and worker == 1").message.iloc[0] != ""
    assert run.allocations().query("worker == 0").total.max() == len(a_problem.train_indices())  # nothing is lost


def test_a_server_that_dies_fails_the_run(train):
    run = train(problem(kind=Slow), passes=1000)
    until(lambda: run.status()["version"] >= 1)
    run._session.server.kill()
    with pytest.raises(RunError, match=r"the server of run .* ended with code -9"):
        run.wait(30)
    assert run.state == "failed" and labkit.load_run(run.path).state == "failed"
    ended(train(problem(), passes=1, name="after"))


def test_a_connection_to_the_server_that_breaks_is_made_again(train, monkeypatch):
    """The kernel's own connection: a pause of the kernel must not end a healthy run."""
    asked, watch = [], supervisor.watch

    @contextlib.contextmanager
    def flaky(*server, **options):
        with watch(*server, **options) as ask:

            def ask_flaky(**request):
                asked.append(1)
                if len(asked) == 2:
                    raise WireError("as after a long pause")
                return ask(**request)

            yield ask_flaky

    monkeypatch.setattr(supervisor, "watch", flaky)
    monkeypatch.setattr(supervisor, "RETRY_S", 0.1)
    ended(train(problem(kind=Slow), passes=15))
    assert len(asked) > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("update", ["sgwu", "agwu"])
def test_a_full_disk_fails_the_run_and_says_so(update, train, monkeypatch):
    begin = training.begin

    def on_a_full_disk(path, *rest):
        (path / "events.jsonl").symlink_to("/dev/full")
        return begin(path, *rest)

    monkeypatch.setattr(training, "begin", on_a_full_disk)
    run = train(problem(), update=update, passes=2)
    with pytest.raises(LabError, match=r"cannot be written: .*No space left on device"):
        run.wait(20)
    assert run.state == "failed"
    monkeypatch.undo()


# -- requests that make no sense ---------------------------------------------------------------------------------------


def test_bad_requests_start_nothing(train, tmp_path, lab):
    file = tmp_path / "file"
    file.write_text("")
    few = problem(train_samples=1)
    for error, words, a_problem, options in [
        (ValueError, "update='agw' is not known. Known: .*Did you mean 'agwu'", problem(), {"update": "agw"}),
        (ValueError, "partition='ipda' is not known. Known: .*Did you mean", problem(), {"partition": "ipda"}),
        (ValueError, "passes=0 must be a positive number", problem(), {"passes": 0}),
        (ValueError, "passes=nan must be a positive number", problem(), {"passes": float("nan")}),
        (ValueError, "passes=inf must be a positive number", problem(), {"passes": float("inf")}),
        (ValueError, "local_steps=0 must be a whole number of at least 1", problem(), {"local_steps": 0}),
        (ValueError, "local_steps=2.5 must be a whole number", problem(), {"local_steps": 2.5}),
        (ValueError, "seed=-1 must be", problem(), {"seed": -1}),
        (ValueError, "checkpoints=0", problem(), {"checkpoints": 0}),
        (PartitionError, "1 samples cannot fill 2 shards .* Use n_workers <= 1", few, {}),
        (PartitionError, r"speeds has 3 entries for 2 workers", problem(), {"partition": labkit.IDPA(speeds=[1, 2, 3])}),
        (RunError, "cannot be recorded in .*file.* Give train\\(\\) another folder", problem(), {"runs": file}),
        (RunError, "'a/b' cannot be the name of a run", problem(), {"name": "a/b"}),
        (RunError, "'..' cannot be the name of a run", problem(), {"name": ".."}),
        (TypeError, "problem is a str; give a labkit.Problem", "lenet", {}),
        (ProblemError, "TinyGan cannot be trained with update='allreduce'.*: 'sgwu'", TinyGan("digits"), {"update": "allreduce"}),
    ]:
        with pytest.raises(error, match=words):
            train(a_problem, **options)
        assert lab.runs == [] and lab.free() == [0, 1]
    assert not (tmp_path / "runs").exists()


def test_a_closed_lab_is_refused(tmp_path):
    with labkit.connect("threads", 1) as lab:
        pass
    with pytest.raises(ClusterError, match="this lab is closed"):
        labkit.train(problem(), lab, runs=tmp_path)


def test_a_server_that_cannot_start_leaves_the_lab_free(train, monkeypatch, lab, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(supervisor.sys, "executable", str(broken))
    with pytest.raises(RunError, match="the server did not start"):
        train(problem())
    monkeypatch.undo()
    assert lab.runs == [] and lab.free() == [0, 1]
    ended(train(problem(), passes=1))


def test_the_server_is_reachable_from_other_hosts_only_when_there_are_any(lab):
    assert training._host(lab) == "127.0.0.1"
    lab.workers[0] = types.SimpleNamespace(host="somewhere-else")
    assert training._host(lab) not in ("127.0.0.1", "0.0.0.0", "")


# -- models of notebooks, reading back ---------------------------------------------------------------------------------


def cell(width):
    """A model function as a notebook cell defines it."""
    layers = f"nn.Flatten(), nn.Linear(36, {width}), nn.Linear({width}, n_classes)"
    code = f"def my_net(shape, n_classes):\n    return nn.Sequential({layers})"
    namespace = {"__name__": "__main__", "nn": nn}
    exec(code, namespace)
    return namespace["my_net"]


def test_an_edited_cell_takes_effect_at_the_next_train(train):
    for width in (3, 5):
        run = ended(train(problem(cell(width)), passes=1, name=f"w{width}"))
        assert run.weights()["1.weight"].shape == (width, 36)


def test_a_run_is_read_back_whole(train):
    a_problem = problem(train_samples=150)
    run = ended(train(a_problem, passes=3, checkpoints=4))
    again = labkit.load_run(run.path)
    assert (again.name, again.state, again.label, again.config) == (run.name, "done", "AGWU + UDPA", run.config)
    assert again.events.equals(run.events) and again.curve().equals(run.curve())
    assert again.summary() == run.summary() and again.balance().equals(run.balance())
    for name, value in run.weights().items():
        np.testing.assert_array_equal(again.weights()[name], value)
    assert 4 <= len(run.curve()) <= 6
    table = labkit.compare([run, again])
    assert list(table.index) == ["AGWU + UDPA"] * 2 and table.score.nunique() == 1
    assert repr(again).startswith("<Run agwu-udpa-seed5: AGWU + UDPA, done")
    assert again.time_to(-1.0) == 0.0 and again.time_to(1.1) is None


def test_a_model_of_a_notebook_needs_its_problem_to_be_read_back(train):
    a_problem = problem(cell(3))
    run = ended(train(a_problem, passes=1))
    again = labkit.load_run(run.path)
    np.testing.assert_array_equal(again.flat(), run.flat())  # the weights need no model
    with pytest.raises(RunError, match=r"labkit\.load_run\(\.\.\., problem=problem\)"):
        again.model()
    module = labkit.load_run(run.path, problem=a_problem).model()
    np.testing.assert_array_equal(module[1].weight.detach().numpy(), run.weights()["1.weight"])


def test_reading_what_is_no_run(tmp_path, train):
    run = ended(train(problem(), passes=1, name="mine"))
    with pytest.raises(RunError, match=r"there is no run at .*Runs beside it: mine"):
        labkit.load_run(run.path.with_name("mein"))
    with pytest.raises(RunError, match=r"config\.json is missing"):
        labkit.load_run(tmp_path)


def test_progress_prints_lines_until_the_end(train, capsys, monkeypatch):
    monkeypatch.setenv("LABKIT_PLOTS", "static")
    run = train(problem(), passes=2)
    run.progress()
    lines = capsys.readouterr().out.splitlines()
    assert run.state == "done" and lines and lines[-1].startswith("AGWU + UDPA: 100%") and lines[-1].endswith("done")


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_real_processes(tmp_path):
    """Both ways of exchange end well, a poisoned step is heard of, and a killed worker leaves an asynchronous run going."""
    with labkit.connect("dask", 2) as lab:
        options = {"lab": lab, "runs": tmp_path, "seed": SEED}
        n = len(problem().train_indices())
        for update, partition in (("agwu", "idpa"), ("allreduce", "udpa")):
            run = ended(
                labkit.train(problem(net_with_statistics), update=update, partition=partition, passes=2, **options), timeout=90
            )
            assert run.events.query("kind == 'merge'").samples.sum() >= 2 * n - 1
            assert len({worker["pid"] for worker in run.config["workers"]} | {os.getpid()}) == 3
        run = labkit.train(poisoned(1), update="allreduce", partition="udpa", passes=50, **options)
        with pytest.raises(WorkerError, match=r"worker 1 .* poisoned"):
            run.wait(30)

        run = labkit.train(problem(kind=Slow), update="agwu", partition="idpa", passes=30, name="killed", **options)
        until(lambda: run.status()["version"] >= 6)
        os.kill(lab.workers[1].pid, signal.SIGKILL)
        ended(run)  # decided: the run goes on with the others and ends as "done"
        assert run.events.query("kind == 'merge'").samples.sum() == 30 * n
        assert run.events.query("kind == 'leave'").worker.iloc[0] == 1
        assert run.allocations().query("worker == 0").total.max() == n
        until(lambda: not lab.refresh() and not lab.lost())  # Dask has started it again, at its old place
        run = ended(labkit.train(problem(), passes=1, **options), timeout=90)
        assert {*run.events.query("kind == 'join'").worker} == {0, 1}


@pytest.mark.cluster
def test_a_worker_that_stays_frozen_does_not_keep_the_run_from_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "ENDING_S", 0.5)
    with labkit.connect("dask", 2) as lab:
        run = labkit.train(
            problem(kind=Slow), lab, update="agwu", partition="udpa", passes=20, heartbeat_timeout=3.0, runs=tmp_path, seed=SEED
        )
        until(lambda: run.status()["version"] >= 4, 60)
        os.kill(lab.workers[1].pid, signal.SIGSTOP)
        try:
            ended(run, timeout=60)
            assert len(run.curve()) > 1 and not run.status()["reason"]  # measured, and not by the frozen one
            assert run.events.query("kind == 'leave' and worker == 1").message.iloc[0].startswith("no sign of life")
        finally:
            os.kill(lab.workers[1].pid, signal.SIGCONT)


class Pausing(labkit.Classifier):
    """A step that takes longer than the silence after which a worker is taken to be gone."""

    def step(self, module, batch, optimisers, clock):
        time.sleep(2.0 if 60 <= clock.samples < 80 else 0.0)
        return super().step(module, batch, optimisers, clock)


def test_a_worker_that_is_slow_to_answer_is_not_taken_to_be_gone(train):
    run = train(problem(kind=Pausing), update="sgwu", partition="udpa", passes=2, heartbeat_timeout=1.0).wait(60)
    assert run.state == "done" and run.events.query("kind == 'push'").compute_s.max() > 2
    assert set(run.events.query("kind == 'leave'").message) == {""} and run.events.query("kind == 'join'").incarnation.max() == 0


@pytest.mark.parametrize(
    ("wait", "words"), [({"heartbeat_timeout": 0.3}, "give them 1 s at least"), ({"join_timeout": 0}, "join_timeout=0")]
)
def test_waits_that_make_no_sense(train, wait, words):
    with pytest.raises(ValueError, match=words):
        train(problem(), **wait)
