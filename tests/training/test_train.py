"""Training from end to end on small labs: the promises about weights, samples, events, errors and endings."""

from __future__ import annotations

import importlib
import shutil
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import labkit
from labkit import chaos
from labkit.cluster.lab import Worker
from labkit.errors import ClusterError, LabError, PartitionError, ProblemError, RunError, RunningError
from labkit.locks import DirectoryLock
from labkit.partition import UDPA
from labkit.problems.problem import Clock
from labkit.problems.splits import batches
from labkit.runs.events import effective
from labkit.training import train as training
from labkit.training.worker.sampler import pass_order, steps
from tests.helpers import DECAY, LR, MOMENTUM, SEED, Settling, Slow, ended, net_with_statistics, problem, shortened, until
from tests.problems.test_problem import Gan, TinyGan

pytestmark = pytest.mark.usefixtures("cache")


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
    return {name: t.detach().numpy() for name, t in module.state_dict().items()}


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
        tolerance = 1e-6 if update == "sgwu" else 1e-5  # steps that are written out may be rounded otherwise
        np.testing.assert_allclose(weights[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_sgwu_with_the_same_seed_gives_the_same_bits(train):
    first, second = (ended(train(problem(), update="sgwu", passes=3, name=name)) for name in "ab")
    np.testing.assert_array_equal(first.flat(), second.flat())
    other = ended(train(problem(), update="sgwu", passes=3, name="c", seed=SEED + 1))
    assert not np.array_equal(first.flat(), other.flat())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_allreduce_equals_one_process_on_the_joint_batches(schedule, train):
    """Both shards in proportion, every step over the batches of both, at one time of the schedule: plain SGD on the union."""
    a_problem = problem(batch_size=8, schedule=schedule)
    run = ended(train(a_problem, update="allreduce", partition=labkit.IDPA(batches=1, speeds=[1, 3]), passes=1))
    indices, module = a_problem.train_indices(), a_problem.build(SEED)
    partition = labkit.IDPA(batches=1, speeds=[1, 3])
    partition.start(len(indices), [0, 1], seed=SEED)
    shards = [pass_order(shard, SEED, worker, 0) for worker, shard in partition.allocate([0, 1]).items()]
    assert len(shards[1]) > 2 * len(shards[0])
    grants, optimisers = [len(shard) for shard in shards], a_problem.optimisers(module)
    parts = [np.split(shard, np.cumsum(steps(grants, rank, 8)[0])[:-1]) for rank, shard in enumerate(shards)]
    seen = 0
    for joint in map(np.concatenate, zip(*parts, strict=True)):
        clock = Clock(seen, len(indices), seen / len(indices))
        a_problem.step(module, a_problem.load(indices[joint]), optimisers, clock)
        seen += len(joint)
    for name, tensor in module.state_dict().items():
        np.testing.assert_allclose(run.weights()[name], tensor.numpy(), atol=2e-5, err_msg=name)


def assert_gan(run):
    """Both networks have been trained, and it is the same again where it can be."""
    first, last = run.weights(0), run.weights()
    assert all(not np.array_equal(first[name], last[name]) for name in first) and run.curve().train_critic.notna().any()
    if run.config.update["name"] != "allreduce":
        np.testing.assert_array_equal(labkit.replay(run).flat(), run.flat())


@pytest.mark.parametrize("update", ["agwu", "allreduce", pytest.param("sgwu", marks=pytest.mark.slow)])
def test_two_networks_and_two_optimisers_are_trained_under_every_update(update, train):
    assert_gan(ended(train(Gan("digits", batch_size=64, train_samples=256), update=update, passes=1)))


@pytest.mark.slow
@pytest.mark.cluster
def test_noise_is_the_same_on_threads_and_processes_and_goes_on_when_a_run_is_resumed(train, tmp_path):
    a_problem, made = Gan("digits", batch_size=32, train_samples=128), {}
    with labkit.connect("dask", 2) as lab:
        for update in ("sgwu", "allreduce", "agwu"):
            made[update] = ended(train(a_problem, lab=lab, update=update, passes=1, name=update), timeout=80)
    with labkit.connect("threads", 2) as lab:
        for update in ("sgwu", "allreduce"):  # where the order of arrival makes no difference
            again = ended(train(a_problem, lab=lab, update=update, passes=1, name="again"))
            np.testing.assert_array_equal(again.flat(), made[update].flat())
        run = train(a_problem, lab=lab, update="agwu", passes=1000, local_steps=1, checkpoints=10_000, name="cut")
        until(lambda: run.status()["version"] > 4)
        made["cut"] = ended(labkit.resume(shortened(run.stop()), lab, problem=a_problem))
    for run in made.values():
        assert_gan(run)


@pytest.mark.parametrize("update", ["agwu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgwu", "allreduce"))])
def test_running_statistics_travel(update, train):
    a_problem = problem(net_with_statistics)
    run = ended(train(a_problem, update=update, passes=2))
    weights = run.weights()
    assert (run.layout.n_buffers, run.layout.n_exact) == (2 * (2 + 9) + 2 * 8, 2 * 8)
    assert weights["1.num_batches_tracked"] == weights["4.num_batches_tracked"] >= 2  # of the last push, whoever made it
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert not np.allclose(weights[name], run.weights(0)[name]), name
        assert np.isfinite(weights[name]).all()
    module = run.model().network
    assert not module.training
    np.testing.assert_array_equal(module[1].running_mean.numpy(), weights["1.running_mean"])
    test = a_problem.test_indices()
    measured = a_problem.evaluate(module, a_problem.load(test, "test"))
    assert measured["score"] == pytest.approx(run.summary()["score"])
    assert measured["loss"] == pytest.approx(run.summary()["loss"], rel=1e-4)


def test_a_fold_is_trained_on_the_others_and_replayed_from_the_record_alone(train, lab):
    run = train(problem().fold(1, 3), update="agwu", passes=1000, local_steps=2, checkpoints=30_000)
    until(lambda: run.status()["version"] > 1)
    run = ended(labkit.resume(shortened(run.stop()), lab))
    again = labkit.load_run(run.path)
    held, n = again.problem().score_indices(), len(problem().dataset.labels("train"))
    assert len(held) == n // 3 and run.config.n_train == n - n // 3 and run.config.problem["cross_validation"]["of"] == 3
    np.testing.assert_array_equal(labkit.replay(again).flat(), run.flat())
    with pytest.raises(RunError, match=r"this problem is not the one of run .*: cross_validation"):
        labkit.replay(run, problem=problem().fold(2, 3))


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
        # Each release is followed by one push, and after the last push there is none: the worker was sent "stop".
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
@pytest.mark.slow
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


def test_emulated_slowdown_is_in_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(Slow, "pause", 0.05)
    with labkit.connect("threads", 2, slowdown=[1, 4], jitter=0.1) as uneven:
        slow = problem(kind=Slow)  # steps of which a busy machine makes little
        run = ended(labkit.train(slow, uneven, runs=tmp_path, passes=4, partition=labkit.IDPA(batches=2), seed=SEED))
    assert run.config["emulated"] and [w["slowdown"] for w in run.config["workers"]] == [1, 4] and run.config["jitter"] == 0.1
    assert run.config["drift"] == 0 and run.config["stalls"] is None
    pushes = run.events.query("kind == 'push'")
    speed = pushes.groupby("worker").samples.sum() / pushes.groupby("worker").compute_s.sum()
    assert speed[0] > 1.5 * speed[1]
    held = run.allocations().groupby("worker").total.max()
    assert held[0] > held[1]


@pytest.mark.slow
def test_stalls_and_drift_are_in_the_record_and_in_the_times(tmp_path, monkeypatch):
    """Worker 1 begins slow and ends quick; and a worker stands still half of the time, without being taken to be lost."""
    options = {"runs": tmp_path, "local_steps": 2, "partition": "udpa", "update": "agwu", "heartbeat_timeout": 4.0, "seed": SEED}
    with labkit.connect("threads", 2, slowdown=[1, 6], drift=4.0) as drifting, monkeypatch.context() as longer:
        longer.setattr(Slow, "pause", 0.04)
        run = ended(labkit.train(problem(kind=Slow), drifting, name="drift", passes=10, **options))
    assert run.config["emulated"] and run.config["drift"] == 4 and [w["drifts_to"] for w in run.config["workers"]] == [6, 1]
    pushes = run.events.query("kind == 'push' and worker == 1")
    speed = pushes.compute_s / pushes.samples
    begun, turned = (speed[(pushes.seconds % 4 - at).abs() < 0.6].median() for at in (0.4, 2.0))
    assert begun > 2 * turned
    with labkit.connect("threads", 2, stalls=(1, 6)) as stalling:
        run = ended(labkit.train(problem(kind=Slow), stalling, name="stalls", passes=4, **options))
    assert run.config["emulated"] and run.config["stalls"] == [1, 6] and run.config["drift"] == 0
    pushes = run.events.query("kind == 'push'")
    assert (pushes.compute_s + pushes.score_s).max() > 6 and set(run.events.query("kind == 'join'").incarnation) == {0}


def test_a_stall_does_not_keep_a_stop_waiting(tmp_path):
    with labkit.connect("threads", 1, stalls=(0.001, 30)) as stalling:  # after the first step
        run = labkit.train(problem(kind=Slow), stalling, runs=tmp_path, passes=1000, local_steps=9, seed=SEED)
        until(lambda: run.status().get("started"))
        time.sleep(0.5)
        assert run.status()["samples"] <= 16
        begun = time.monotonic()
        run.stop()
        assert time.monotonic() - begun < 25 and run.state == "stopped"


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_directory_whose_run_lives_is_not_taken(train, tmp_path, lab, capsys):
    """A kernel that was killed leaves a server that holds it, as this lock does; a default name gives way, a given one is refused."""
    path = tmp_path / "runs" / "agwu-udpa-seed0"
    (inside := path.with_name("s") / "parts" / "one").mkdir(parents=True)
    path.mkdir()
    DirectoryLock(path.with_name("s")).release()
    (path / "config.json").write_text("its own")
    locks = DirectoryLock(path, "dead"), DirectoryLock(inside, "of a subnet")
    before = sorted(path.parent.rglob("*"))
    for name, what in ((path.name, path), ("s", inside)):
        with pytest.raises(
            RunningError, match=rf"run {what.name} is still running.*load_run\('{what}'\)\.attach\(\) .* name="
        ) as refused:
            train(problem(), passes=1, name=name)
        assert isinstance(refused.value, RunError) and lab.free() == [0, 1] and sorted(path.parent.rglob("*")) == before
    run = ended(train(problem(), passes=1, seed=0))
    assert run.path.name == run.config["name"] == "agwu-udpa-seed0-2" and run.state == "done"
    assert "This one is recorded as 'agwu-udpa-seed0-2': run agwu-udpa-seed0 is still running" in capsys.readouterr().out
    with pytest.raises(RunningError):
        labkit.replay(run, name=path.name)
    assert path.joinpath("config.json").read_text() == "its own" and len(list(path.iterdir())) == 2
    [lock.release() for lock in locks]
    assert ended(train(problem(), passes=1, seed=0)).path == path and path.with_name(f"{path.name}.1").exists()


def test_a_run_whose_directory_was_replaced_by_hand_does_not_write_into_the_other_one(train):
    run = train(problem(kind=Slow), passes=1000, name="x")
    until(lambda: run.status()["version"] >= 1)
    path = run.path
    path.rename(path.with_name("x.1"))
    shutil.copytree(path.with_name("x.1"), path, ignore=shutil.ignore_patterns("server.json"))
    run.config.replace(id="of another").save(path)
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(LabError, match="x holds another run now"):
        run.stop().wait(100)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == files


# -- requests that make no sense ---------------------------------------------------------------------------------------


def test_bad_requests_start_nothing(train, tmp_path, lab):
    file = tmp_path / "file"
    file.write_text("")
    few = problem(train_samples=1)
    for error, words, a_problem, options in [
        (ValueError, "update='agw' is not known. Known: .*Did you mean 'agwu'", problem(), {"update": "agw"}),
        (ValueError, "partition='ipda' is not known. Known: .*Did you mean", problem(), {"partition": "ipda"}),
        (ValueError, "passes=0 must be above 0", problem(), {"passes": 0}),
        (ValueError, "passes=nan must be above 0 and at most", problem(), {"passes": float("nan")}),
        (ValueError, "passes=inf must be above 0 and at most", problem(), {"passes": float("inf")}),
        (ValueError, "local_steps=0 must be at least 1", problem(), {"local_steps": 0}),
        (ValueError, "local_steps=2.5 must be a whole number", problem(), {"local_steps": 2.5}),
        (ValueError, "seed=-1 must be", problem(), {"seed": -1}),
        (ValueError, "checkpoints=0", problem(), {"checkpoints": 0}),
        (PartitionError, "1 samples cannot fill 2 shards .* Use n_workers <= 1", few, {}),
        (PartitionError, r"speeds has 3 entries for 2 workers", problem(), {"partition": labkit.IDPA(speeds=[1, 2, 3])}),
        (RunError, "cannot be recorded in .*file.* Give another folder", problem(), {"runs": file}),
        (RunError, "'a/b' cannot be the name of a run", problem(), {"name": "a/b"}),
        (RunError, "'..' cannot be the name of a run", problem(), {"name": ".."}),
        *(
            (RunError, "cannot be the name of a run: it holds characters", problem(), {"name": f"a{c}b"})
            for c in "\0\n\x1b\x7f\u202e"
        ),
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


def test_the_server_is_reachable_from_other_hosts_only_when_there_are_any(lab):
    assert training.server_host(lab) == "127.0.0.1"
    lab.workers[0] = types.SimpleNamespace(host="somewhere-else")
    assert training.server_host(lab) not in ("127.0.0.1", "0.0.0.0", "")


@pytest.mark.parametrize(
    ("wait", "words"), [({"heartbeat_timeout": 0.3}, "give 1 s at least"), ({"join_timeout": 0}, "join_timeout=0")]
)
def test_waits_that_make_no_sense(train, wait, words):
    with pytest.raises(ValueError, match=words):
        train(problem(), **wait)


def test_a_module_that_is_not_what_its_file_says_is_refused_before_anything_is_written(lab, tmp_path, monkeypatch):
    """A rule by any lab, as its server is a process; a problem by workers that are processes. In threads it is what is trained."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "import labkit\nfrom tests.helpers import net\nWIDTH = 3\nclass Rule(labkit.AGWU): pass\ndef mine(s, n): return net(s, n, WIDTH)\n"
    (file := tmp_path / "mine_edited.py").write_text(text)
    mine = importlib.import_module("mine_edited")
    own = problem(model=mine.mine)
    mine.WIDTH = 5
    with pytest.raises(ClusterError, match=r"mine_edited.py is not what this kernel has loaded: 'WIDTH'"):
        labkit.train(own, lab, update=mine.Rule(), runs=tmp_path / "runs")
    with monkeypatch.context() as patched, pytest.raises(ClusterError, match=r"mine_edited.py is not what .*importlib.reload"):
        patched.setattr(Worker, "here", False)
        labkit.train(own, lab, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists() and lab.free() == [0, 1]
    run = labkit.train(own, lab, passes=0.1, runs=tmp_path / "runs").wait(60)
    assert run.config.sources["mine_edited"] == "" and run.weights()["1.weight"].shape[0] == 5
    with pytest.warns(UserWarning, match=r"mine_edited.py is not what run .* was trained with"):
        run.problem()
    importlib.reload(mine)
    file.unlink()
    del sys.modules["mine_edited"]


def test_what_cannot_travel_is_refused_by_name_before_anything_is_begun(tmp_path):
    lock = threading.Lock()

    def model():
        with lock:
            return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    class Waiting(labkit.SGWU):
        def __init__(self):
            super().__init__()
            self.lock = lock

    with labkit.connect("threads", 1) as lab:
        with pytest.raises(
            ProblemError, match=r"Classifier cannot be sent to workers and server: its 'model' holds.*_thread\.lock.*Make locks"
        ):
            labkit.train(problem(model), lab, runs=tmp_path)
        with pytest.raises(ProblemError, match="Waiting cannot be sent to workers and server: its 'lock' holds"):
            labkit.train(problem(), lab, update=Waiting(), runs=tmp_path)

        class Counted(labkit.Classifier):
            def step(self, *given):
                return {**super().step(*given), "workers": len(lab)}

        with pytest.raises(
            ProblemError, match=r"Counted cannot .*: it cannot be pickled \(TypeError: a lab holds connections.* n = len\(lab\)"
        ):
            labkit.train(problem(kind=Counted), lab, runs=tmp_path)
    assert not list(tmp_path.iterdir())


# -- milestones --------------------------------------------------------------------------------------------------------


def assert_settled(run, ranks=1):
    """Each milestone once, in its place, and the weights of its version are those that were settled."""
    events, milestones = run.events, run.config.milestones
    settled = events[events.kind == "settle"]
    merged = events[events.kind == "merge"]
    assert len(settled) == len(milestones) and run.state == "done"
    for row, milestone in zip(settled.itertuples(), milestones, strict=True):
        assert milestone - ranks < row.total <= milestone and merged[merged.seq < row.seq].samples.sum() == row.total
        busy = events[(events.seq < row.seq) & events.kind.isin(["push", "release", "join", "leave"])].groupby("worker").tail(1)
        assert (busy[busy.worker != row.worker].kind != "release").all()  # everybody waits
    assert chaos.audit(run) == []
    return settled


def who_settles(log):
    """The process that has begun to."""
    until(lambda: log.exists() and log.read_text(), 60)
    return int(log.read_text().split()[0])


@pytest.mark.parametrize(
    "update", ["agwu", *(pytest.param(rare, marks=pytest.mark.slow) for rare in ("sgwu", "allreduce", "easgd"))]
)
def test_a_milestone_is_settled_once_and_all_go_on_from_it(update, train, tmp_path):
    a_problem = problem(kind=Settling, lr=1e-30)
    a_problem.log = tmp_path / "log"
    run = ended(train(a_problem, update=update, passes=3))
    n = run.config.n_train
    assert run.config.milestones == [n, 2 * n] and len(a_problem.log.read_text().splitlines()) == 2
    settled = assert_settled(run, 2 if update == "allreduce" else 1)
    np.testing.assert_allclose(run.weights()["3.bias"], settled.total.iloc[-1], rtol=1e-6)  # and so little was learnt since
    assert not ended(train(problem(kind=Settling), update=update, passes=0.5)).config.milestones


def test_a_milestone_whose_worker_is_lost_is_settled_by_another(train, tmp_path):
    a_problem = problem(kind=Settling)
    a_problem.log, a_problem.go_on, a_problem.at = tmp_path / "log", tmp_path / "go-on", (1.0,)
    run = train(a_problem, update="agwu", passes=2, checkpoints=400)
    until(lambda: a_problem.log.exists())
    chaos.drop_link(run, 0)
    until(lambda: len(a_problem.log.read_text().splitlines()) == 2)
    a_problem.go_on.touch()
    ended(run)
    assert_settled(run)
    assert len(a_problem.log.read_text().splitlines()) == 2


def test_a_run_that_is_stopped_and_resumed_settles_the_milestones_that_are_left(train, lab):
    a_problem = problem(kind=Settling)
    a_problem.pause = 0.2
    run = train(a_problem, update="sgwu", passes=1000, checkpoints=100_000)
    until(lambda: "settle" in run.events.kind.tolist())
    run.stop()
    n = (run.events.kind == "settle").sum()
    again = ended(labkit.resume(shortened(run), lab, problem=a_problem))
    counted = effective(again.events)
    assert n >= 1 and (counted.kind == "settle").sum() == 2 and chaos.audit(again) == []


@pytest.mark.parametrize("at", [(0.0,), (-1.0,), ("first",), (float("nan"),)])
def test_milestones_that_make_no_sense_start_nothing(at, train):
    a_problem = problem(kind=Settling)
    a_problem.at = at
    with pytest.raises(ProblemError, match=r"milestones\(\) of Settling must give passes above 0"):
        train(a_problem)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_milestone_in_whose_midst_a_process_is_killed_is_settled_once_and_replayed(tmp_path):
    with labkit.connect("dask", 2) as lab:
        for update in ("agwu", "sgwu", "allreduce"):
            a_problem = problem(kind=Settling)
            a_problem.log, a_problem.pause, a_problem.at = tmp_path / f"{update}.log", 1.0, (1.0,)
            run = labkit.train(a_problem, lab, update=update, partition="udpa", passes=2, runs=tmp_path, name=update, seed=SEED)
            pid = who_settles(a_problem.log)
            chaos.kill(lab, next(index for index, worker in enumerate(lab.workers) if worker.pid == pid))
            ended(run, timeout=90)
            assert_settled(run, 2 if update == "allreduce" else 1)
            np.testing.assert_array_equal(labkit.replay(run).flat(), run.flat())
            until(lambda: len(lab.free()) == 2, 120)
