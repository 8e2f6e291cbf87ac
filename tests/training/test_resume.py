"""Going on with a run: from the newest whole checkpoint, in the same directory, with what was recorded; or clearly why not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from torch import nn

import labkit
from labkit.cluster import connect as connecting
from labkit.cluster.emulation import Unevenness
from labkit.errors import ClusterError, LabError, PartitionError, RunError
from labkit.models import lenet, vgg3
from labkit.partition import make_partition
from labkit.runs import checkpoints, server_file
from labkit.runs.events import Recorder, effective
from labkit.runs.files import write_json
from labkit.training import resume as resuming
from tests.helpers import data, net, shortened, until

pytestmark = pytest.mark.usefixtures("cache")
DONE = 60


def wide_net(shape, n_classes):
    return net(shape, n_classes, width=20_000)


def problem(model=net, n=231, kind=labkit.Classifier, **options):
    return kind(model, data(n), **{"batch_size": 16, "score_samples": 20, **options})


def cell():
    """A model function as a notebook cell defines it."""
    namespace = {"__name__": "__main__", "nn": nn}
    exec("def my_net(shape, n_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, n_classes))", namespace)
    return namespace["my_net"]


@pytest.fixture
def begun(monkeypatch):
    """What would be started: the spec that the server would get."""
    specs = []

    def begin(path, lab, problem, spec, lock, takes_newcomers, on_version=None):
        specs.append((spec, problem))
        lock.release()
        return labkit.load_run(path, problem=problem)

    monkeypatch.setattr(resuming, "begin", begin)
    return specs


def state(run, done, workers=(0, 1)):
    partition = make_partition(run.config["partition"])
    partition.start(run.config["n_train"], workers, seed=run.config["seed"])
    partition.allocate(workers, dict.fromkeys(workers, 0.01))
    numbers = {worker: 3 for worker in workers}
    return {"done": done, "seconds": 1.5, "update": {"version": 3}, "partition": partition.state_dict(), "incarnations": numbers}


@pytest.fixture
def cut(lab, tmp_path):
    """A run that was cut off: what train() has written, events and checkpoints, and nothing on how it ended."""

    def make(a_problem=None, versions=(0, 4, 9), **options):
        a_problem = a_problem or problem()
        run = labkit.train(a_problem, lab, runs=tmp_path / "runs", passes=4, name="cut", **options).stop()
        for name in ("status.json", "events.jsonl", server_file.FILE):
            (run.path / name).unlink(missing_ok=True)
        checkpoints.prune(run.path, ())
        recorder, weights = Recorder(run.path), np.arange(run.layout.size, dtype=np.float32)
        for version in versions:
            checkpoints.save(recorder, version, weights + np.float32(version), state(run, 10 * version))
        recorder.close()
        return labkit.load_run(run.path)

    return make


def file(run, version):
    return run.path / "checkpoints" / f"{version:08d}.npz"


# -- what the server is started with -----------------------------------------------------------------------------------


def test_the_server_is_started_with_all_that_it_was_started_with_at_first_and_the_state(cut, lab, begun, capsys):
    run = cut(update=labkit.AGWU("raw"), partition=labkit.IDPA(3), seed=5, local_steps=2, checkpoints=7)
    again = labkit.resume(run.path, lab)
    [(spec, _)] = begun
    config = spec.config
    assert again.path == run.path and (spec.path, config.budget, config.n_train) == (str(run.path), run.config.budget, 187)
    assert (config.seed, config.local_steps, config.checkpoints, config.batch_size, config.indices) == (5, 2, 7, 16, [0, 1])
    assert spec.update.config() == run.config["update"] and spec.partition.config() == run.config["partition"]
    assert (spec.weights == np.arange(run.layout.size) + 9).all() and spec.weights.flags.writeable
    assert spec.state["done"] == 90 and spec.state["incarnations"] == {0: 3, 1: 3}
    spec.partition.load_state_dict(spec.state["partition"])
    assert sum(spec.partition.held.values()) == 187 // 3
    assert "goes on from version 9, after 90 of 748 samples" in capsys.readouterr().out


class Named(labkit.AGWU):
    """A rule of the user's own, recorded by its `name` before format 3."""

    name = "named"


@pytest.mark.slow
def test_a_run_of_format_2_with_a_rule_and_a_model_by_the_names_of_then_is_resumed_again_and_again(cut, begun, lab):
    run = cut(problem(lenet), update=Named())
    config = {**run.config, "format": 2, "update": {"name": "named", "quality": "normalised"}}
    config["problem"] = {**config["problem"], "kind": "labkit.problems:Classifier", "model": "labkit.models.cnn:lenet"}
    write_json(run.path / "config.json", config | {"silence": 4.0, "patience": 60.0})
    for number in (1, 2):
        again = labkit.resume(run.path, lab, problem=problem(lenet), update=Named())
        assert len(again.config["resumed"]) == number
        lab.release(run.config.id)  # nothing has begun
    with pytest.raises(RunError, match="this problem is not the one of run cut: model="):
        labkit.resume(run.path, lab, problem=problem(vgg3), update=Named())


def test_what_said_that_the_run_had_ended_is_gone_and_the_settings_say_where_it_goes_on(cut, begun):
    run = cut()
    write_json(run.path / "status.json", {"state": "stopped", "reason": ""})
    for name in ("metrics.parquet", "summary.json"):
        (run.path / name).write_bytes(b"of then")
    (run.path / ".ranks-12ab-1").write_bytes(b"of a kernel that was killed")
    with labkit.connect("threads", 3) as other:
        again = labkit.resume(run.path, other)
    gone = ("status.json", "metrics.parquet", "summary.json", ".ranks-12ab-1", server_file.FILE)
    assert not any((run.path / name).exists() for name in gone)
    assert (again.config["n_workers"], len(again.config["workers"]), begun[0][0].config.indices) == (3, 3, [0, 1, 2])
    [note] = again.config["resumed"]
    assert (note["version"], note["samples"], note["before"]["n_workers"]) == (9, 90, 2)
    assert {**again.config, **note["before"], "resumed": 0} == {**run.config, "resumed": 0}


def test_a_damaged_newest_checkpoint_is_named_and_set_aside(cut, lab, begun, capsys):
    run = cut()
    file(run, 9).write_bytes(file(run, 9).read_bytes()[:-30])
    labkit.resume(run.path, lab)
    assert begun[0][0].state["done"] == 40
    assert "Not used: " in (said := capsys.readouterr().out) and "00000009.npz is damaged" in said and "version 4" in said
    assert checkpoints.versions(run.path) == [0, 4] and (run.path / "checkpoints" / "00000009.refused").exists()


def test_without_a_lab_the_one_of_this_kernel_is_taken_or_one_as_before(cut, lab, begun):
    run = cut()
    labkit.resume(run.path)
    assert connecting.current() is lab and begun[-1][0].config.indices == [0, 1]
    lab.close()
    labkit.resume(run.path)
    with connecting.current() as made:
        assert (made.kind, len(made), made.emulated) == ("threads", 2, False)
    assert connecting.current() is None
    workers = [{**worker, "slowdown": slow} for worker, slow in zip(run.config["workers"], (1.0, 3.0), strict=True)]
    config = {**run.config, "workers": workers, "jitter": 0.1, "drift": 9.0, "stalls": [20.0, 1.0]}
    write_json(run.path / "config.json", config)
    labkit.resume(run.path)
    with connecting.current() as made:
        assert made.unevenness(1) == Unevenness(3.0, 0.1, 9.0, 1.0, (20.0, 1.0))


def test_a_lab_that_was_elsewhere_must_be_given(cut, lab, begun):
    run = cut()
    config = {**run.config, "workers": [{**worker, "host": "node7"} for worker in run.config["workers"]]}
    write_json(run.path / "config.json", config)
    lab.close()
    with pytest.raises(RunError, match=r"had a lab of kind 'threads' elsewhere.*labkit\.resume\(.*cut', lab\)"):
        labkit.resume(run.path)


# -- why not -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(lab, begun):
    """resume() raises, and nothing is started or changed in the directory."""

    def check(run, match, error=RunError, **options):
        before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
        with pytest.raises(error, match=match):
            labkit.resume(run.path, options.pop("lab", lab), **options)
        assert begun == [] and {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before

    return check


def test_a_run_that_goes_or_may_go_or_is_done_is_not_begun_again(cut, refused, monkeypatch):
    run = cut()
    server_file.announce(run.path, ("127.0.0.1", 1), b"x")
    refused(run, r"run cut is still running\. Use labkit\.load_run\(.*\)\.attach\(\)")
    monkeypatch.setattr(resuming, "ENDING_S", 0.1)
    write_json(run.path / "status.json", {"state": "failed", "reason": "its kernel gave it up"})
    refused(run, "run cut is still running")  # its server does not know
    (run.path / "status.json").unlink()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    refused(run, r"run cut may still go on another machine\. Look there; delete .*server\.json")
    monkeypatch.undo()
    server_file.withdraw(run.path)
    write_json(run.path / "status.json", {"state": "done", "reason": ""})
    refused(run, r"run cut is done: all of its 748 samples")


def test_a_run_without_a_whole_checkpoint_or_without_state(cut, refused):
    run = cut(versions=(0, 4))
    for version in (0, 4):
        file(run, version).write_bytes(b"")
    refused(run, r"(?s)holds no whole checkpoint.*Train it again\..*00000004.*00000000")
    recorder = Recorder(run.path)
    checkpoints.save(recorder, 5, np.zeros(run.layout.size, np.float32))
    recorder.close()
    refused(run, "holds weights alone: version 5 has no state to go on from")


def test_another_run_s_checkpoint_is_not_taken(cut, refused, tmp_path):
    run = cut(versions=(4,))
    weights = np.zeros(run.layout.size, np.float32)
    (tmp_path / "other").mkdir()
    run.config.replace(id="of-another").save(tmp_path / "other")
    (tmp_path / "other" / "checkpoints").mkdir()
    checkpoints.write(tmp_path / "other", 4, weights, state(run, 40))
    file(run, 4).write_bytes(file(SimpleNamespace(path=tmp_path / "other"), 4).read_bytes())
    refused(run, r"(?s)no whole checkpoint.*belongs to another run")
    path = run.path
    write_json(path / "config.json", {**run.config, "id": "of-another"})
    refused(
        SimpleNamespace(path=path),
        r"config\.json belongs to another run: it has the id 'of-another', and environment\.json, layout\.json beside it",
    )


def test_a_model_of_a_notebook_needs_its_problem(cut, refused, begun, lab):
    a_problem = problem(cell())
    run = cut(a_problem)
    refused(run, r"'my_net' of run cut was written in a notebook.*labkit\.resume\(.*cut', problem=problem\)")
    labkit.resume(run.path, lab, problem=a_problem)
    assert begun[0][1] is a_problem


def test_a_model_of_a_script_is_the_same_when_it_is_imported(cut, begun, refused, lab, monkeypatch):
    run = cut(problem(cell()))
    module = types.ModuleType("the_script")
    module.my_net, module.other_net = cell(), cell()
    for name in ("my_net", "other_net"):
        function = getattr(module, name)
        function.__module__, function.__qualname__ = "the_script", name
    monkeypatch.setitem(sys.modules, "the_script", module)
    refused(run, r"model='the_script:other_net' for \{'by_value': 'my_net'\}", problem=problem(module.other_net))
    labkit.resume(run.path, lab, problem=problem(module.my_net))
    assert begun[0][1].config()["model"] == "the_script:my_net"


def test_another_problem_is_not_the_one_of_the_run(cut, refused):
    run = cut()
    refused(
        run, r"this problem is not the one of run cut: lr=0\.5 for 0\.05\. A changed problem is a new run", problem=problem(lr=0.5)
    )
    refused(run, "the data have 115 training samples, and run cut was begun with 187", problem=problem(n=150))
    refused(run, "must be a Problem .*, not str", TypeError, problem="lenet")


def test_an_edited_model_of_a_notebook_is_found_by_its_tensors(cut, refused):
    run = cut(problem(cell()))
    namespace = {"__name__": "__main__", "nn": nn}
    exec("def my_net(shape, n_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False))", namespace)
    with pytest.warns(UserWarning, match="what was written in a notebook for its problem is not what run cut was trained with"):
        refused(run, "other tensors than run cut was begun with", problem=problem(namespace["my_net"]))


def test_a_lab_that_cannot_is_refused(cut, refused, lab, monkeypatch):
    run = cut()
    with monkeypatch.context() as many:
        many.setattr(resuming, "choose", lambda *_: list(range(200)))
        refused(run, "187 samples cannot fill 200 shards. Use fewer workers", PartitionError)
    lab.close()
    refused(run, "this lab is closed", ClusterError, lab=lab)


def test_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match="there is no run at"):
        labkit.resume(tmp_path / "nothing")


# -- from end to end ---------------------------------------------------------------------------------------------------


def assert_whole(run):
    """Every version once, in order, and as many samples as the run was to be trained on."""
    merges = effective(run.events).query("kind == 'merge'")
    versions = merges.version.drop_duplicates().astype(int).tolist()
    assert versions == list(range(1, len(versions) + 1)) and merges.samples.sum() == run.config["budget"]
    assert list(run.events.seq) == list(range(len(run.events))) and run.events.seconds.dropna().is_monotonic_increasing
    curve = run.curve()
    assert curve.version.is_unique and curve.samples.is_monotonic_increasing and run.summary()["samples"] == run.config["budget"]


def until_version(run, version, limit=90.0):
    end = time.monotonic() + limit
    while run.status().get("version", 0) < version:
        assert time.monotonic() < end and run.state == "running", f"no version {version} within {limit:g} s: {run.status()}"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("update", "partition"), [("agwu", "idpa"), pytest.param("sgwu", "udpa", marks=pytest.mark.slow), ("allreduce", "udpa")]
)
def test_a_stopped_run_goes_on_and_is_whole(lab, tmp_path, update, partition):
    run = labkit.train(problem(), lab, update=update, partition=partition, passes=4000, runs=tmp_path, name="r")
    until_version(run, 5)
    run.stop()
    before = run.summary()["samples"]
    again = labkit.resume(shortened(run, 3000), lab).wait(100)
    assert again.state == "done" and before < run.config["budget"]
    assert_whole(again)


@pytest.mark.parametrize(
    ("update", "n_workers"),
    [("agwu", 3), ("sgwu", 1), *(pytest.param(*rare, marks=pytest.mark.slow) for rare in [("agwu", 1), ("sgwu", 3)])],
)
def test_a_run_whose_server_was_killed_goes_on_with_another_number_of_workers(lab, tmp_path, update, n_workers):
    run = labkit.train(problem(), lab, update=update, partition="idpa", passes=400, runs=tmp_path, name="r", checkpoints=400)
    until_version(run, 8)
    until(lambda: checkpoints.versions(run.path)[-1])
    run._follower.server.kill()
    with pytest.raises(LabError):
        run.wait(100)
    assert labkit.load_run(run.path).state == "failed"
    with labkit.connect("threads", n_workers) as other:
        again = labkit.resume(run.path, other)
        shown = again.status()  # before its server has said anything
        assert (
            shown["samples"] >= again.config.resumed[-1]["samples"] > 0 and shown["version"] >= again.config.resumed[-1]["version"]
        )
        again.wait(100)
    assert again.state == "done"
    assert_whole(again)


def is_writing(pid, folder):
    """Stops the server while a checkpoint is half there; otherwise it goes on."""
    if any(folder.glob(".*")):
        os.kill(pid, signal.SIGSTOP)
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        if any(folder.glob(".*")):
            return True
        os.kill(pid, signal.SIGCONT)
    return False


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_killed_at_random_moments_never_more_than_one_interval_is_lost(lab, tmp_path):
    """12 kills of the server, half of them while it writes a checkpoint: the run goes on at most one interval behind. After every
    fourth kill the newest file is only half there, as on a disk that lied: it is refused, and one interval more is lost."""
    rng, n, torn, folder = np.random.default_rng(0), 40, 0, tmp_path / "r" / "checkpoints"
    wide = problem(wide_net, lr=0.01)  # 3 MB: a write takes long enough to be hit
    run = labkit.train(wide, lab, update="agwu", partition="idpa", passes=200, runs=tmp_path, name="r", checkpoints=n)
    for kill in range(12):
        until_version(run, int(run.status().get("version", 0)) + int(rng.integers(1, 20)))
        assert run.state == "running", f"it ended before kill {kill}"
        if kill % 2:
            until(partial(is_writing, run._follower.server.pid, folder))
        run._follower.server.kill()
        with pytest.raises(LabError):
            run.wait(100)
        cut = any(folder.glob(".*"))
        torn += cut
        versions, lied = checkpoints.versions(run.path), kill % 4 == 3
        if lied:
            os.truncate(file(run, versions[-1]), file(run, versions[-1]).stat().st_size // 2)
        merges = run.events.query("kind == 'merge'")
        reached, largest = merges.total.iloc[-1], merges.samples.max()
        run = labkit.resume(run.path, lab)
        resumed = run.config["resumed"][-1]
        assert resumed["version"] == versions[-2 if lied else -1] and not any(folder.glob(".*"))
        lost = reached - resumed["samples"]
        assert lost <= (1 + lied) * (run.config["budget"] / n + 2 * largest), f"{lost} samples lost, {cut=}, {lied=}"
    run.wait(100)
    assert run.state == "done" and torn >= 3, f"{torn} writes were cut off"
    assert_whole(run)


NOTEBOOK = """
import sys, labkit
from tests.training import test_resume
with labkit.connect("threads", 2) as lab:
    run = labkit.train(test_resume.problem(), lab, update="agwu", passes=4000, runs=sys.argv[1], name="r", checkpoints=2000)
    print(run.path, flush=True)
    run.wait(100)
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_whose_notebook_was_killed_is_stopped_from_here_and_goes_on_here(lab, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as notebook:
        try:
            path = Path(notebook.stdout.readline().strip())
            run = labkit.load_run(path).attach()
            until_version(run, 20)
            with pytest.raises(RunError, match="run r is still running"):
                labkit.resume(path, lab)
        finally:
            notebook.kill()
    assert run.stop(90).state == "stopped"
    run.problem()  # before its curve is measured here
    done = run.summary()["samples"]
    write_json(path / "config.json", {**run.config, "budget": done + 1000})  # not all of it here
    again = labkit.resume(path, lab).wait(100)
    assert again.state == "done"
    assert_whole(again)


CELLS = """
import sys, labkit
from tests.helpers import Slow
from tests.training.test_resume import problem

if __name__ == "__main__":
    kind, lr, passes, runs = sys.argv[1:]
    with labkit.connect(kind, 2) as lab:
        run = labkit.train(problem(kind=Slow, lr=float(lr)), lab, update="agwu", partition="udpa", passes=float(passes), runs=runs, checkpoints=int(float(passes)))
        print("began", run.path, run.config.id, flush=True)
        run.wait(100)
"""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_a_kernel_that_is_killed_and_the_same_cells_run_again_leave_each_run_its_own(lab, tmp_path):
    kind, n_events = "dask", 4  # until the kill
    runs, began = tmp_path / "runs", {}
    (tmp_path / "cells.py").write_text(CELLS)

    def run_cells(lr, passes):
        command = [sys.executable, str(tmp_path / "cells.py"), kind, str(lr), str(passes), str(runs)]
        kernel = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        )
        _, path, id = next(line for line in kernel.stdout if line.startswith("began ")).split()
        began[id] = lr
        return kernel, Path(path)

    kernel, path = run_cells(0.01, 2000)
    with kernel:
        until(lambda: len(labkit.load_run(path).events) >= n_events, 100)
        kernel.kill()
    with run_cells(0.1, 2)[0] as kernel:
        assert kernel.wait(100) == 0
    paths = {labkit.load_run(file.parent).config.id: file.parent for file in runs.glob("*/config.json")}
    for id, lr in began.items():
        run = labkit.load_run(paths[id])
        if run.state == "running":  # on threads it soon ends by itself
            run.attach().stop()
        until(lambda run=run: not server_file.alive(run.path), 100)
        run.problem()  # before its curve is measured here
        if run.state != "done":
            write_json(run.path / "config.json", {**run.config, "budget": run.summary()["samples"] + 500})  # not all of it here
            run = labkit.resume(run.path, lab).wait(100)
        assert run.config.id == id and run.config["problem"]["lr"] == lr and run.state == "done"
        assert_whole(run)
        np.testing.assert_array_equal(labkit.replay(run).flat(), run.flat())
