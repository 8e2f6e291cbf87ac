"""The handle of a run: waited for, stopped, interrupted, shown, read back from its directory, with its model."""

from __future__ import annotations

import _thread
import copy
import importlib
import linecache
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from torch import nn

import labkit
from labkit import sources
from labkit.errors import RunError
from labkit.locks import DirectoryLock
from labkit.runs.files import read_json, write_json
from labkit.training.resume import problem_of
from tests.helpers import Slow, ended, problem, settings, until
from tests.test_cards import card_of

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("update", ["sgwu", "agwu", "allreduce"])
def test_stop_ends_a_run_at_once_and_keeps_what_there_is(update, train):
    run = train(problem(kind=Slow), update=update, passes=1000)
    until(lambda: run.status()["version"] >= 2)
    begun = time.monotonic()
    run.stop()
    assert time.monotonic() - begun < 40 and run.state == "stopped"
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
        assert time.monotonic() - begun < 40 and run.state == "stopped"
        counts.append(psutil.Process().num_threads())
    until(
        lambda: psutil.Process().num_threads() <= counts[0] + 1
    )  # those of a group in which an exchange was under way end with it


def test_stop_before_the_workers_are_there(train):
    run = train(problem(), passes=1000)
    run.stop()
    assert run.state == "stopped" and run.curve().version.iloc[0] == 0


def test_waiting_too_short_says_so(train):
    run = train(problem(kind=Slow), passes=1000)
    with pytest.raises(RunError, match=r"is still running after 0\.2 s"):
        run.wait(0.2)
    assert run.state == "running"
    with pytest.raises(RunError, match=r"is still running; its curve is measured at the end"):
        run.curve()


@pytest.mark.parametrize("call", ["wait", "progress"])
def test_an_interrupt_ends_the_waiting_alone(train, call):
    """In a notebook it is one line, which says how to follow the run, end it and go on with it."""
    run = train(problem(kind=Slow), passes=1000)
    until(lambda: run.status()["version"] >= 1)
    shell = InteractiveShell(user_ns={"run": run})
    main, house = threading.main_thread().ident, str(Path(labkit.__file__).parent)

    def interrupt():
        def is_inside():
            frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[main])]
            return any(frame.f_code.co_name == call and frame.f_code.co_filename.startswith(house) for frame in frames)

        until(is_inside)  # anywhere else it would end the tests
        time.sleep(0.3)
        _thread.interrupt_main()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with capture_output() as captured:
        result = shell.run_cell(f"run.{call}()")
    thread.join()
    assert isinstance(result.error_in_exec, KeyboardInterrupt) and run.state == "running"
    said = captured.stdout.splitlines()[-1]
    assert "goes on" in said and all(name in said for name in ("run.stop()", "attach()", f"labkit.resume('{run.path}')"))
    assert "Traceback" not in captured.stdout + captured.stderr
    version = run.status()["version"]
    until(lambda: run.status()["version"] > version)
    assert run.stop().state == "stopped" and len(run.curve())


def test_an_interrupt_that_ends_a_script_is_one_line_and_all_other_errors_are_shown_as_before(train, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.delattr(sys, "ps1", raising=False)  # of a shell in another test
    run = train(problem(kind=Slow), passes=1000)

    def wait(timeout):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(run._follower, "wait", wait)
        run.wait()
    run.stop()  # as the `with` block of its lab does
    capsys.readouterr()
    sys.excepthook(type(caught.value), caught.value, None)  # what Python calls with an error that ends it
    far = f"after {run.status()['samples']:,} of {run.config.budget:,} samples"
    line = (
        f"Interrupted: run {run.name} ends with this script, {far}. labkit.resume('{run.path}') goes on from its last checkpoint.\n"
    )
    assert capsys.readouterr().err == line and type(caught.value) is KeyboardInterrupt
    monkeypatch.setattr(run, "status", lambda: {"state": "failed", "reason": "the disk is full."})
    sys.excepthook(type(caught.value), caught.value, None)
    assert capsys.readouterr().err == f"Interrupted: run {run.name} failed: the disk is full.\n"
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt("another"), None)
    assert capsys.readouterr().err == "KeyboardInterrupt: another\n"


SCRIPT = """
import os, signal, sys, time
import labkit, tests.helpers as t

def main(lab):
    run = labkit.train(t.problem(kind=t.Slow), lab, passes=1000, runs=sys.argv[1], name="r", update="agwu")
    t.until(lambda: run.status().get("version", 0) >= 2, 60)
    run._follower.wait = lambda timeout: os.kill(os.getpid(), signal.SIGINT) or time.sleep(60)  # Ctrl-C while it waits
    run.wait()

if __name__ == "__main__":
    if sys.argv[2] == "block":
        with labkit.connect("threads", 2) as lab:
            main(lab)
    main(labkit.connect("threads", 2))  # closed as the script exits
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["block", "exit"])
def test_an_interrupted_script_ends_by_the_signal_with_a_line_and_its_run_is_resumed(closed, tmp_path, lab):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path), closed]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert ended.returncode == -signal.SIGINT  # 130 in a shell
    (line,) = ended.stderr.splitlines()
    assert line.startswith("Interrupted: run r ends with this script, after ") and f"labkit.resume('{tmp_path / 'r'}')" in line
    again = labkit.resume(tmp_path / "r", lab, problem=problem(kind=Slow))
    until(lambda: again.status().get("started"))
    assert again.stop().state == "stopped"


def cell(width):
    """A model function as a notebook cell defines it."""
    layers = f"nn.Flatten(), nn.Linear(36, {width}), nn.Linear({width}, n_classes)"
    code = f"def my_net(shape, n_classes):\n    return nn.Sequential({layers})"
    namespace = {"__name__": "__main__", "nn": nn}
    exec(code, namespace)
    return namespace["my_net"]


class Misspelt(nn.Module):
    """Has a typo where it trains, which is not tried out in the kernel."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        return self.helped(x.flatten(1))

    def helped(self, x):
        return self.head(x) if threading.current_thread() is threading.main_thread() else self.haed(x)


def misspelt_loss(outputs, y):
    return torch.nn.functional.crossentropy(outputs, y)


def test_a_typo_on_a_worker_shows_the_frames_of_the_user_first_and_last(train):
    run = train(problem(Misspelt), passes=1)
    with pytest.raises(labkit.WorkerError) as raised:
        run.wait(100)
    lines = [line.strip() for line in raised.value.remote_traceback.splitlines()]
    files = [line for line in lines if line.startswith("File ")]
    assert all(f'"{__file__}"' in file for file in files) and files[0].endswith("in forward") and files[-1].endswith("in helped")
    assert any("self.haed(x)" in line for line in lines) and "has no attribute 'haed'" in str(raised.value)


def late_loss(outputs, y):
    """Has a typo that is met on workers alone."""
    if threading.current_thread() is threading.main_thread():
        return torch.nn.functional.cross_entropy(outputs, y)
    return misspelt_loss(outputs, y)


@pytest.mark.parametrize("update", ["agwu", "allreduce"])
def test_a_loss_that_fails_on_a_worker_shows_no_frame_of_labkit(train, update):
    run = train(problem(loss=late_loss), passes=1, update=update)
    with pytest.raises(labkit.WorkerError, match=r"loss 'late_loss' raised AttributeError: .* 'crossentropy'") as raised:
        run.wait(100)
    files = [line.strip() for line in raised.value.remote_traceback.splitlines() if line.strip().startswith("File ")]
    assert [f'"{__file__}"' in file for file in files] == [True, True] and files[-1].endswith("in misspelt_loss")


TYPO = """import os
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        return self.helped(x.flatten(1))

    def helped(self, x):
        return self.head(x) if os.getpid() == {pid} else self.haed(x)
"""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("kind", ["dask", "ipyparallel"])
def test_a_typo_in_another_process_shows_them_too(kind, tmp_path, monkeypatch):
    """Of a module of the user's own, and of a cell, whose text is in no file."""
    pytest.importorskip("ipyparallel" if kind == "ipyparallel" else "distributed")
    text, file = TYPO.format(pid=os.getpid()), tmp_path / f"net_with_a_typo_on_{kind}.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(linecache.cache, "a-cell", (len(text), None, text.splitlines(True), "a-cell"))
    namespace = {"__name__": "__main__"}
    exec(compile(text, "a-cell", "exec"), namespace)
    with labkit.connect(kind, 1) as lab:
        for net, where in ((importlib.import_module(file.stem).Net, str(file)), (namespace["Net"], "a-cell")):
            with pytest.raises(labkit.WorkerError) as raised:
                labkit.train(problem(net), lab, passes=1, runs=tmp_path / "runs").wait(100)
            lines = [line.strip() for line in raised.value.remote_traceback.splitlines()]
            files = [line for line in lines if line.startswith("File ")]
            assert files[0] == f'File "{where}", line 11, in forward' and files[-1] == f'File "{where}", line 14, in helped'
            assert all(where in own for own in files) and any("self.haed(x)" in line for line in lines)


def test_a_typo_that_is_found_before_shows_them_too(train):
    with pytest.raises(labkit.ProblemError, match="crossentropy") as raised:
        train(problem(loss=misspelt_loss), passes=1)
    frames = traceback.extract_tb(raised.value.__cause__.__traceback__)
    assert [frame.name for frame in frames] == ["misspelt_loss"] and frames[0].filename == __file__
    house = str(Path(labkit.__file__).parent)
    assert not any(frame.filename.startswith(house) for frame in traceback.extract_tb(raised.value.__traceback__))


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
    assert 2 <= len(run.curve()) <= 6  # of a run so short the disk may miss some
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
    np.testing.assert_array_equal(module.network[1].weight.detach().numpy(), run.weights()["1.weight"])


def test_what_a_record_names_is_imported_by_nothing_that_only_reads(train, tmp_path, monkeypatch, capsys):
    """A run of somebody else, whose settings name a module that says when it is imported, and whose curve and layout are missing."""
    (tmp_path / "of_others.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\nMine = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = train(problem(), passes=2, name="theirs").wait(100).path
    stored = read_json(path / "config.json")
    theirs = dict.fromkeys(("kind", "model", "loss", "optimiser", "augment", "data"), "of_others:Mine")
    stored |= {what: {"name": "of_others:Mine"} for what in ("update", "partition")} | {"problem": theirs}
    write_json(path / "config.json", stored, run=stored["id"])
    figures = [getattr(labkit.plots, name) for name in ("curves", "membership", "live")]
    run = labkit.load_run(path)
    whole = labkit.compare([run, path])
    assert list(whole.state) == ["done", "done"] and run.weights()
    for name in ("metrics.parquet", "layout.json"):
        (path / name).unlink()
    readers = [run.summary, run.curve, run.weights, run.flat, run.status, run.balance, run.allocations, lambda: run.test_score]
    readers += [lambda: run.time_to(0.1), lambda: labkit.compare([run, path]), lambda: labkit.plots.confusion(run)]
    for read in (*readers, lambda: labkit.plots.worst(run), *(partial(figure, run) for figure in figures)):
        with suppress(RunError):
            read()
        assert not (tmp_path / "imported").exists()
    card, table = run.summary(), labkit.compare([run, path])
    assert card["score"] is card["loss"] is None and card["samples"] == run.config.budget and run.test_score is None
    assert table.state.tolist() == ["done", "done"] and table.score.isna().all() and "reason" not in table
    assert "No score of run theirs is measured yet. run = labkit.load_run(" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"\(of_others:Mine, of_others:Mine\). Call run.problem\(\) first, if you trust"):
        run.curve()
    with pytest.raises(RunError, match="is not a Problem"):
        run.problem()
    assert (tmp_path / "imported").exists()


def test_a_curve_that_its_kernel_measures_just_now_is_said_to_be(train, capsys):
    path = ended(train(problem(), passes=1, name="theirs")).path
    (path / "metrics.parquet").unlink()
    run = labkit.load_run(path)
    lock = DirectoryLock(path, run.config.id)  # as the kernel that trains it has it, until the curve is measured
    try:
        assert run.summary()["score"] is None
        assert capsys.readouterr().out == (
            "No score of run theirs is measured yet. The kernel that has trained it is measuring it now: ask again in a moment.\n"
        )
        with pytest.raises(RunError, match="is measuring it now"):
            run.curve()
    finally:
        lock.release()
    run.summary()
    assert "No score of run theirs is measured yet. run = labkit.load_run(" in capsys.readouterr().out


def test_a_run_is_pickled_by_its_directory(train, tmp_path, monkeypatch):
    """Also one that is running: elsewhere it is as `load_run` reads it."""
    monkeypatch.chdir(tmp_path)
    run = train(problem(), passes=1)
    going = pickle.loads(pickle.dumps(run))
    run.wait(100)
    monkeypatch.chdir("/")
    for again in (going, pickle.loads(pickle.dumps(run)), copy.deepcopy(run)):
        assert again.state == "done" and again.path == run.path and again.curve().equals(run.curve())
        assert again.predict(np.zeros((2, 6, 6), np.uint8)).shape == (2,)


@pytest.mark.filterwarnings("ignore:what was written in a notebook")
def test_weights_are_not_read_into_another_model(train):
    """Neither of another size nor of the same one."""
    run = ended(train(problem(cell(3)), passes=1))
    namespace = {"__name__": "__main__", "nn": nn}
    layers = "nn.Flatten(), nn.Linear(36, 3, bias=False), nn.PReLU(3), nn.Linear(3, 3)"
    exec(f"def my_net(shape, n_classes):\n    return nn.Sequential({layers})", namespace)
    for model in (cell(5), namespace["my_net"]):
        again = labkit.load_run(run.path, problem=problem(model))
        with pytest.raises(RunError, match=f"has other tensors than that of run {run.name}"):
            again.model()


def test_reading_what_is_no_run(tmp_path, train):
    run = ended(train(problem(), passes=1, name="mine"))
    with pytest.raises(RunError, match=r"there is no run at .*Runs beside it: mine"):
        labkit.load_run(run.path.with_name("mein"))
    with pytest.raises(RunError, match=r"is no run but a folder of 1: runs/mine\."):
        labkit.load_run(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"config\.json is missing"):
        labkit.load_run(tmp_path / "empty")


def test_progress_prints_lines_until_the_end(train, capsys, monkeypatch):
    monkeypatch.setenv("LABKIT_PLOTS", "static")
    run = train(problem(), passes=2)
    run.progress()
    lines = capsys.readouterr().out.splitlines()
    assert run.state == "done" and lines and lines[-1].startswith("AGWU + UDPA: 100%") and lines[-1].endswith("done")


# -- raw samples -------------------------------------------------------------------------------------------------------

DIGITS = Path(__file__).parent.parent / "fixtures" / "runs" / "format-2-agwu"


def test_raw_samples_are_predicted_and_measured_as_in_the_curve(cache):
    run = labkit.load_run(DIGITS)
    data, last = run.problem().dataset, run.curve().iloc[-1]
    measured = run.evaluate()
    assert measured["samples"] == 100 and measured["score"] == pytest.approx(last.score, abs=0.02)
    assert run.evaluate("digits") == run.evaluate(data) == measured  # its own test set
    table = run.predictions()
    assert table["loss"].mean() == pytest.approx(measured["loss"], rel=1e-5) and table["loss"].is_monotonic_decreasing
    assert (table["label"] == table["predicted"]).mean() == pytest.approx(measured["score"])
    at = run.problem().test_indices()
    x, y = data.raw(at, "test"), data.labels("test")[at]
    again = run.evaluate((x, y))
    assert again == measured
    for given in (x, x[:, 0], torch.from_numpy(x), x.astype(float).tolist()):
        assert (run.predict(given) == y).mean() == pytest.approx(measured["score"])
    chances = run.predict_proba(x)
    assert chances.shape == (100, 10) and np.allclose(chances.sum(1), 1, atol=1e-5)
    assert np.array_equal(chances.argmax(1), run.predict(x)) and run.predict(x).dtype == np.int64
    model = run.model()
    for given in (x, x[:, 0]):
        assert np.array_equal(model(torch.from_numpy(given)).argmax(1).numpy(), run.predict(x)) and not model.training
    for name, tensor in model.network.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), run.weights()[name])
    assert len(run.predict("digits")) == data.n_test
    with pytest.raises(labkit.DataError, match=r"needs \(n, 1, 8, 8\)"):
        run.predict(np.zeros((3, 9, 8)))


def test_progress_of_a_run_that_is_read_back_is_of_its_budget(capsys):
    run = labkit.load_run(DIGITS)
    run.progress()
    assert f"100%, {run.config.budget:,} of {run.config.budget:,} samples" in capsys.readouterr().out


def test_a_network_whose_outputs_are_several_is_left_to_its_model(cache, monkeypatch):
    run = labkit.load_run(DIGITS)
    monkeypatch.setattr(run, "_network", lambda version: torch.nn.Flatten(), raising=True)
    assert run._outputs(np.zeros((3, 8, 8)), None).shape == (3, 64)
    monkeypatch.setattr(torch.nn.Flatten, "forward", lambda self, x: (x, x))
    with pytest.raises(labkit.ProblemError, match=r"gives a tuple, no tensor with a row a sample. Call run.model\(\)"):
        run.predict(np.zeros((3, 8, 8)))


class Loading(labkit.Classifier):
    """Reads its samples in a way of its own."""

    def load(self, indices, split="train", device="cpu"):
        x, y = super().load(indices, split, device)
        return x / 3, y


def test_of_a_problem_that_loads_its_samples_itself_it_is_said_that_raw_ones_are_unknown(cache):
    problem = Loading("lenet", "digits", model_args={"width": 0.08}, train_samples=200, test_samples=100, score_samples=40)
    run = labkit.load_run(DIGITS, problem=problem)
    with pytest.raises(labkit.ProblemError, match="Loading loads its samples itself"):
        run.predict(np.zeros((3, 1, 8, 8)))
    with pytest.raises(labkit.ProblemError, match="Loading loads its samples itself"):
        run.evaluate((np.zeros((3, 1, 8, 8)), [0, 1, 2]))
    assert run.evaluate()["samples"] == 100
    with pytest.warns(UserWarning, match="cannot normalise raw ones"):
        model = run.model()
    x = problem.load(problem.test_indices()[:4], "test")[0]
    assert torch.equal(model(x), model.network(x))


def test_what_is_made_from_a_file_that_was_edited_since_is_said(tmp_path, monkeypatch):
    """In this kernel, and where its module is not loaded yet."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (file := tmp_path / "net_of_run.py").write_text(
        "from tests.helpers import net as made\ndef net(shape, n): return made(shape, n)\n"
    )
    own = problem(model=importlib.import_module("net_of_run").net)
    found = sources.digests(sources.needed(own))
    assert "net_of_run" in found
    (tmp_path / "r").mkdir()
    settings(problem=own.config(), sources=found).save(tmp_path / "r")
    labkit.load_run(tmp_path / "r").problem()
    file.write_text(file.read_text() + "# edited\n")
    labkit.load_run(tmp_path / "r").problem()  # not loaded again
    del sys.modules["net_of_run"]
    assert sources.changed(found) == [str(file)]
    importlib.import_module("net_of_run")
    run = labkit.load_run(tmp_path / "r")
    with pytest.warns(UserWarning, match="net_of_run.py is not what run r was trained with"):
        run.problem()
    run.problem()  # said once
    with pytest.warns(UserWarning, match="net_of_run.py is not what run r was trained with"), pytest.raises(labkit.RunError):
        problem_of(labkit.load_run(tmp_path / "r"), own)  # as resume and replay do
    del sys.modules["net_of_run"]


def test_a_run_and_its_lab_show_a_card(train, lab):
    run = ended(train(problem(), passes=2, name="shown"))
    text = " ".join(card_of(run).split())
    assert f"test score {run.summary()['score']:.3f}" in text and f"test score {run.test_score:.3f}" in text  # as the bar says
    assert f"to {run.test_score:.3f}" in text and "state done" in text and "run.predict(x)" in text and str(run.path) in text
    lab = " ".join(card_of(lab).split())
    assert "worker host device threads process" in lab and "labkit.train(problem, lab)" in lab
    (run.path / "events.jsonl").write_text("{")
    assert "events.jsonl holds 0 of" in card_of(labkit.load_run(run.path))
    (run.path / "status.json").write_text("{")
    damaged = labkit.load_run(run.path)
    assert damaged._repr_html_() is None and "damaged" in repr(damaged)
