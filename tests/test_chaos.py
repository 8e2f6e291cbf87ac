"""Faults do what they say, a storm is as it was planned, and a run that has gone through them is whole."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest

import labkit
from labkit import chaos
from labkit.errors import ClusterError, LabError, RunError
from labkit.runs import checkpoints
from labkit.runs.events import COLUMNS, read_rows
from labkit.training import supervisor
from tests.helpers import until

pytestmark = pytest.mark.usefixtures("cache")


def problem():
    return labkit.Classifier("lenet", "digits", train_samples=400, test_samples=60, score_samples=20, batch_size=16, lr=0.02)


def train(lab, folder, update="agwu", passes=400, **options):
    run = labkit.train(
        problem(), lab, update=update, partition="idpa", passes=passes, local_steps=4, runs=folder, name="r", **options
    )
    until(lambda: run.status().get("version", 0) >= 3)
    return run


@pytest.fixture
def threads(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    with labkit.connect("threads", 2) as lab:
        yield lab


@pytest.fixture
def processes():
    with labkit.connect("dask", 2, slowdown=[3, 3]) as lab:
        yield lab


# -- the server of a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dropped_link_costs_one_incarnation_and_nothing_else(threads, tmp_path):
    run = train(threads, tmp_path, passes=24, heartbeat_timeout=60.0)
    chaos.drop_link(run, 1)
    with pytest.raises(ClusterError, match=r"worker 7 has no link to run r; workers \[.*\] have one"):
        chaos.drop_link(run, 7)
    run.wait(100)
    events = run.events
    assert events.query("kind == 'join' and worker == 1").incarnation.tolist() == [0, 1] and chaos.audit(run) == []
    assert events.query("kind == 'leave' and worker == 1").message.iloc[0] and not events.query("worker == 0").incarnation.any()
    assert len(chaos.losses(run)) == 1 and chaos.losses(run).waited_s.max() < 5


def test_a_run_is_resumed_after_a_killed_server_and_a_corrupt_checkpoint(threads, tmp_path, capsys):
    run = train(threads, tmp_path, checkpoints=200)
    until(lambda: len(checkpoints.versions(run.path)) > 2)
    chaos.kill_server(run)
    with pytest.raises(LabError):
        run.wait(100)
    before = checkpoints.versions(run.path)
    assert chaos.corrupt_checkpoint(run).stem == f"{before[-1]:08d}" and chaos.audit(run)
    with pytest.raises(RunError, match="run r has no version 12345; it has"):
        chaos.corrupt_checkpoint(run, 12345)
    again = labkit.resume(run.path, threads)
    assert f"{before[-1]:08d}.npz is damaged" in capsys.readouterr().out
    again.stop()


@pytest.mark.parametrize("version", [None, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_is_always_found(version, seed, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for kept in (3, 4):
        checkpoints.write(tmp_path, kept, np.linspace(-1, 1, 1000, dtype=np.float32), {"pool": np.arange(500)})
    chaos.corrupt_checkpoint(SimpleNamespace(path=tmp_path, name="r"), version, seed)
    assert checkpoints.newest(tmp_path)[0] == (3 if version is None else 4)
    with pytest.raises(RunError):
        checkpoints.read_state(tmp_path, version or 4)


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit() is Linux's")
@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_a_freed_one_does_not(threads, tmp_path):
    run = train(threads, tmp_path)
    chaos.fill_disk(run)
    with pytest.raises(LabError, match="cannot be written"):
        run.wait(100)
    run = train(threads, tmp_path / "freed")
    pid = chaos._server(run)["pid"]
    os.kill(pid, signal.SIGSTOP)  # frozen: nothing is written in between
    try:
        chaos.fill_disk(run)
        chaos.free_disk(run)
    finally:
        os.kill(pid, signal.SIGCONT)
    version = run.status()["version"]
    until(lambda: run.status()["version"] > version + 3)
    assert run.stop().state == "stopped"


def test_a_run_that_has_ended_has_no_server(threads, tmp_path):
    run = train(threads, tmp_path).stop()
    for fault in (lambda: chaos.drop_link(run, 0), lambda: chaos.kill_server(run), lambda: chaos.fill_disk(run)):
        with pytest.raises(RunError, match="run r is not running: it has no server"):
            fault()
    with pytest.raises(RunError, match="run r is not running: it is stopped"):
        chaos.Storm(run, threads, faults=["drop"])


def test_what_is_impossible_is_refused(threads):
    with pytest.raises(ClusterError, match=r"worker 0 is a thread of this process. Use connect\(kind='dask'\)"):
        chaos.kill(threads, 0)
    with pytest.raises(ClusterError, match="there is no worker 2; this lab has workers 0 to 1"):
        chaos.freeze(threads, 2)
    run = SimpleNamespace(state="running", name="r")
    with pytest.raises(ClusterError, match=r"threads of this process: Storm\(faults=\['drop'\]\)"):
        chaos.Storm(run, threads)
    with pytest.raises(ValueError, match=r"faults='flood' is not known. Known: kill, freeze, drop, join"):
        chaos.Storm(run, threads, faults=["flood"])
    threads.workers[1] = replace(threads.workers[1], host="node7")
    with pytest.raises(ClusterError, match="worker 1 is on node7, not here"):
        chaos.thaw(threads, 1)
    threads.close()
    with pytest.raises(ClusterError, match="this lab is closed"):
        chaos.kill(threads, 0)


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
def test_workers_freeze_thaw_die_and_come_back_and_a_storm_can_be_stopped_with_every_worker_thawed(processes, tmp_path):
    process = psutil.Process(processes.workers[1].pid)
    for _ in range(20):  # it stands still when `freeze` returns, also on a busy machine
        chaos.freeze(processes, 1)
        assert process.status() == psutil.STATUS_STOPPED
        chaos.thaw(processes, 1)
    chaos.freeze(processes, 1)
    task = processes.start(1, os.getpid)
    with pytest.raises(ClusterError, match="did not finish within"):
        task.result(0.5)
    chaos.thaw(processes, 1)
    assert task.result(60) == processes.workers[1].pid

    run = train(processes, tmp_path)
    with chaos.Storm(run, processes, faults=["freeze", "drop"], every=0.2, seed=1) as storm:
        until(lambda: {"freeze", "drop"} <= set(storm.table.fault))
        begun = time.monotonic()
        storm.stop()
    assert time.monotonic() - begun < 30 and list(storm.table.columns) == ["seconds", "fault", "worker"]
    frozen, thawed = (sorted(storm.table.query(f"fault == '{name}'").worker) for name in ("freeze", "thaw"))
    assert frozen == thawed and storm.table.seconds.is_monotonic_increasing
    assert all(psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED for worker in processes.workers)
    run.stop()
    assert storm.stop() is storm

    before = processes.workers[1].pid
    chaos.kill(processes, 1)
    until(lambda: not psutil.pid_exists(before))
    with pytest.raises(ClusterError, match="worker 1 was lost already"):
        chaos.kill(processes, 1)
    until(lambda: 1 in processes.refresh("test") or processes.workers[1].pid != before)
    assert processes.start(1, os.getpid).result(60) == processes.workers[1].pid != before


def test_a_storm_is_planned_by_its_seed():
    plan = chaos.draw(chaos.FAULTS, 2.0, 400, 3)
    assert plan == chaos.draw(chaos.FAULTS, 2.0, 400, 3) != chaos.draw(chaos.FAULTS, 2.0, 400, 4)
    assert {fault for _, fault, _, _ in plan} == set(chaos.FAULTS) and 1.6 < np.mean([step[0] for step in plan]) < 2.4


# -- what must hold all the same ---------------------------------------------------------------------------------------


def test_the_audit_finds_what_is_wrong(threads, tmp_path):
    run = train(threads, tmp_path, passes=5).wait(60)
    assert chaos.audit(run) == [] and chaos.losses(run).empty
    file = run.path / "events.jsonl"
    rows, whole = read_rows(run.path), file.read_bytes()

    def tampered(change):
        table = [dict(row) for row in rows]
        change(table)
        file.write_text("".join(json.dumps(row) + "\n" for row in table))
        return " ".join(chaos.audit(labkit.load_run(run.path)))

    merge, push = (next(i for i, row in enumerate(rows) if row["kind"] == kind) for kind in ("merge", "push"))
    assert "is missing or out of place" in tampered(lambda table: table.pop(push))
    assert "has no push" in tampered(lambda table: table[push].update(kind="hold"))
    n, more = run.config["budget"], {"samples": rows[merge]["samples"] + 1}
    assert f"{n + 1} of {n} samples were merged" in tampered(lambda table: table[merge].update(more))
    assert "versions are not numbered" in tampered(lambda table: table[merge].update(version=9999))
    assert tampered(lambda table: None) == ""
    file.write_bytes(whole)
    damaged = run.path / "layout.json"
    damaged.write_text(damaged.read_text().replace("2", "3", 1))
    assert "layout.json is damaged" in " ".join(chaos.audit(run))
    chaos.corrupt_checkpoint(run)
    assert "is damaged" in " ".join(chaos.audit(run))


def test_losses_measure_how_long_the_others_waited():
    def event(seconds, kind, worker, message=""):
        return {"seq": 0, "seconds": seconds, "kind": kind, "worker": worker, "message": message}

    rows = [event(0.0, "release", w) for w in (0, 1, 2)]
    rows += [event(1.0, "push", 0), event(1.5, "push", 1)]  # a barrier; worker 2 was killed at 0.7
    rows += [event(3.0, "leave", 2, "gone"), event(3.1, "release", 0), event(3.2, "release", 1)]
    rows += [event(4.0, "leave", 1, "gone"), event(5.0, "regroup", 0), event(5.5, "release", 0)]  # an all-reduce, broken off
    rows += [event(6.0, "merge", 0) | {"samples": 30, "version": 1}, event(7.0, "leave", 0, "after the end")]
    events = pd.DataFrame(rows, columns=COLUMNS).assign(seq=range(len(rows)))
    run = SimpleNamespace(events=events, config=SimpleNamespace(budget=40))
    assert chaos.losses(run).left.tolist() == [40, 40] and chaos.losses(run)[["worker", "waited_s"]].to_numpy().tolist() == [
        [2, 2.1],
        [1, 2.4],
    ]
    faults = pd.DataFrame([(2.0, "kill", 2), (3.5, "freeze", 1)], columns=["seconds", "fault", "worker"])
    assert chaos.losses(run, faults).waited_s.tolist() == [1.2, 2.0]
