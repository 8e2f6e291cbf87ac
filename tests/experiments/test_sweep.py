"""Sweeps: what is refused before a kernel starts, what names a run, what is reused, and what is in the table.

No kernel is started here (tests/experiments/test_executor.py does); the lab is a stand-in with `workers` and `map`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest

from labkit.errors import SweepError
from labkit.experiments import executor as kernels
from labkit.experiments import sweep as sweeps
from labkit.experiments.sweep import report, summary, sweep
from tests.experiments.helpers import write
from tests.helpers import until


@pytest.fixture
def no_kernel(monkeypatch):
    """Fails the test when a kernel is started."""
    monkeypatch.setattr(kernels, "_attempt", lambda *_: pytest.fail("a kernel was started"))
    monkeypatch.setattr(sweeps, "execute", lambda *_: pytest.fail("a run was started"))


@pytest.fixture
def instant(monkeypatch):
    """Runs end at once and without a kernel, as done or, where the seed is 13, as failed. Gives the seeds that ran."""
    ran = []

    def attempt(job, folder, flag):
        seed = job["record"]["parameters"]["seed"]
        ran.append(seed)
        report(folder, {"score": seed / 2})
        return True, *(("In [3]: ValueError: unlucky", "all of it") if seed == 13 else ("", ""))

    monkeypatch.setattr(kernels, "_attempt", attempt)
    return ran


# -- sweep: before a kernel starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"stratgy": "a"}, r"^n.ipynb has no parameter 'stratgy'. It has: seed, lr, .*. Did you mean 'strategy'\?$"),
        ({"zzz": 1}, r"has no parameter 'zzz'\. It has: seed, lr, sizes, strategy, extra\.$"),
        ({"seed": ["many"]}, r"'seed' is int \(default 0\), and 'many' is str"),
        ({"seed": [True]}, "'seed' is int"),
        ({"seed": [0.5]}, "'seed' is int"),
        ({"lr": "0.1"}, "'lr' is float"),
        ({"sizes": [[1, "2"]]}, "'sizes' is int"),
        ({"strategy": [1]}, "'strategy' is str"),
        ({"extra": [object()]}, "'extra' has a value of type object"),
        ({"extra": [{1: 2}]}, "'extra' has a value of type dict"),
        ({"seed": []}, "no value for 'seed'"),
        ({"run_dir": "here"}, "'run_dir' is set by the sweep"),
        ([], "give a dict of lists"),
        ("seed", "give a dict of lists"),
        ([{"seed": 1}, 2], "give a dict of lists"),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused_before_a_kernel_starts(tmp_path, no_kernel, grid, message):
    with pytest.raises(SweepError, match=message):
        sweep(write(tmp_path / "n.ipynb", "1"), grid, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_request_is_refused_before_a_kernel_starts(tmp_path, no_kernel, monkeypatch):
    notebook = write(tmp_path / "n.ipynb", "1")
    (tmp_path / "file").touch()
    for settings, message in [
        ({"out": tmp_path / "file" / "out"}, "cannot be written to"),
        ({"kernel_name": "fortran"}, "there is no Jupyter kernel 'fortran' here. Installed: .*python3"),
        ({"parallel": 0}, "parallel=0 must be at least 1"),
        ({"timeout": 0}, "timeout=0 must be above 0"),
    ]:
        with pytest.raises(SweepError, match=message):
            sweep(notebook, {}, **({"out": tmp_path / "out"} | settings))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 3 * 10**6))
    with pytest.raises(SweepError, match="only 3 MB are free"):
        sweep(notebook, {}, out=tmp_path / "out")


def test_rows_of_a_grid():
    rows = sweeps._rows
    assert rows({"a": [1, 2], "b": (3, 4)}) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert rows({"a": "agwu", "b": 3, "c": None, "d": {"k": 1}}) == [{"a": "agwu", "b": 3, "c": None, "d": {"k": 1}}]
    assert rows({"a": range(2)}) == [{"a": 0}, {"a": 1}]
    assert rows({"a": np.array(5)}) == [{"a": 5}]
    assert rows({}) == [{}]
    assert rows([{"a": 1}, {"b": 2}]) == [{"a": 1}, {"b": 2}]


def test_the_id_is_of_source_parameters_and_version_and_nothing_else(tmp_path, monkeypatch):
    def ids(grid, *cells, **metadata):
        path = write(tmp_path / "n.ipynb", *cells, **metadata)
        return [job["id"] for job in sweeps._jobs(path, grid, tmp_path / "out", "python3", 9)]

    one = ids({"seed": 1}, "1")
    assert ids({"seed": [1, 1, 1]}, "1") == one  # identical rows are one run
    assert ids({"seed": 1, "lr": 0.1}, "1") == one  # the default, given
    assert ids({"seed": np.int64(1)}, "1") == one
    assert ids({"lr": 1, "seed": 1}, "1") == ids({"lr": 1.0, "seed": 1}, "1")
    assert ids({"seed": 1}, "1", kernelspec={"name": "other", "display_name": "x"}) == one
    assert ids({"seed": 2}, "1") != one
    assert ids({"seed": 1}, "2") != one
    notebook = json.loads(write(tmp_path / "n.ipynb", "1").read_text())
    notebook["cells"][-1].update(outputs=[{"output_type": "stream", "name": "stdout", "text": "x"}], execution_count=4)
    (tmp_path / "n.ipynb").write_text(json.dumps(notebook))
    for out in ("out", "elsewhere"):
        assert [job["id"] for job in sweeps._jobs(tmp_path / "n.ipynb", {"seed": 1}, tmp_path / out, "python3", 9)] == one
    monkeypatch.setattr(sweeps, "version", lambda package: "9")
    assert ids({"seed": 1}, "1") != one


# -- sweep: reuse ------------------------------------------------------------------------------------------------------


def test_finished_runs_are_reused_and_failed_ones_kept_until_asked_for(tmp_path, instant, capsys):
    notebook, out = write(tmp_path / "n.ipynb", "1"), tmp_path / "out"
    table = sweep(notebook, {"seed": [1, 13]}, out=out)
    assert list(table.columns) == ["seed", "score", "status", "error", "seconds", "notebook", "id"]
    assert list(table["status"]) == ["done", "failed"]
    assert table["error"][1] == "In [3]: ValueError: unlucky"
    assert Path(table["notebook"][1]).with_name("error.txt").read_text() == "all of it\n"
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"\[1/2\] seed=1  done in \d\.\d s  score 0\.5, about \d s left", line) for line in lines)
    assert any(re.fullmatch(r"\[2/2\] seed=13  failed after \d\.\d s: In \[3\]: ValueError: unlucky", line) for line in lines)
    assert lines[-1] == "2 runs: 1 new, 0 reused, 1 failed"

    table = sweep(notebook, {"seed": [2, 1, 13]}, out=out)
    assert list(table["seed"]) == [2, 1, 13]
    assert instant == [1, 13, 2]
    assert "3 runs: 1 new, 1 reused, 1 failed (1 of the failed are from before;" in capsys.readouterr().out
    sweep(notebook, {"seed": [2, 1, 13]}, out=out, retry_failed=True, progress=False)
    assert instant[3:] == [13]
    sweep(notebook, {"seed": [1, 13]}, out=out, fresh=True, progress=False)
    assert instant[4:] == [1, 13]
    assert capsys.readouterr().out == ""
    assert len(summary(out)) == 3


def test_a_run_whose_process_is_gone_was_interrupted_and_runs_again(tmp_path, instant):
    notebook, out = write(tmp_path / "n.ipynb", "1"), tmp_path / "out"
    table = sweep(notebook, {"seed": 1}, out=out, progress=False)
    status = Path(table["notebook"][0]).with_name("status.json")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    running = json.loads(status.read_text()) | {"state": "running"}
    status.write_text(json.dumps(running))  # of this process, which lives: somebody else's sweep is at it
    assert list(sweep(notebook, {"seed": 1}, out=out, progress=False)["status"]) == ["running"]
    assert instant == [1]
    for stale in ({"pid": gone.pid}, {"born": 1.0}, {"host": "elsewhere"}):
        status.write_text(json.dumps(running | stale))
        if "host" in stale:
            os.utime(status, (1, 1))  # no sign of life for long
        assert list(summary(out)["status"]) == ["interrupted"]
        assert list(sweep(notebook, {"seed": 1}, out=out, progress=False)["status"]) == ["done"]
    status.write_text("{ half a fi")
    assert list(summary(out)["status"]) == ["interrupted"]


def test_another_run_of_the_same_name_is_not_taken_for_this_one(tmp_path, instant):
    notebook, out = write(tmp_path / "n.ipynb", "1"), tmp_path / "out"
    table = sweep(notebook, {"seed": 1}, out=out, progress=False)
    record = Path(table["notebook"][0]).with_name("params.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"hash": "0"}))
    with pytest.raises(SweepError, match="is of another run"):
        sweep(notebook, {"seed": 1}, out=out)


def test_two_sweeps_into_one_folder_share_its_runs(tmp_path, monkeypatch):
    notebook, ran, both = write(tmp_path / "n.ipynb", "1"), [], threading.Barrier(2)

    def attempt(job, folder, flag):
        ran.append(job["record"]["parameters"]["seed"])
        if ran[-1] == 0 or len(ran) == 2:  # neither goes on before the other has begun a run
            both.wait(90)
        report(folder, {"score": ran[-1]})
        return True, "", ""

    monkeypatch.setattr(kernels, "_attempt", attempt)
    with ThreadPoolExecutor(2) as pool:
        grid, out = {"seed": range(6)}, tmp_path / "out"
        tables = list(pool.map(lambda lr: sweep(notebook, grid, out=out, progress=False, retry_failed=True), range(2)))
    assert sorted(ran) == list(range(6))
    seen = {"done", "running", "interrupted"}  # the last: for a moment, what the other has claimed and not yet begun
    assert all(len(table) == 6 and set(table["status"]) <= seen for table in tables)
    assert list(summary(out)["status"]) == ["done"] * 6 and list(summary(out)["seed"]) == list(range(6))


def test_what_another_sweep_is_at_or_has_done_is_left_to_it(tmp_path, instant):
    notebook, out = write(tmp_path / "n.ipynb", "1"), tmp_path / "out"
    (job,) = sweeps._jobs(notebook, {"seed": 1}, out, "python3", 9)
    out.mkdir()
    (flag := out / "flag").touch()
    assert kernels.execute(job | {"flag": str(flag)}) == "done"
    assert kernels.execute(job | {"flag": str(flag)}) == "done"
    status = Path(job["folder"]) / "status.json"
    running = json.loads(status.read_text()) | {"state": "running"}
    status.write_text(json.dumps(running))
    assert kernels.execute(job | {"flag": str(flag)}) == "running"
    assert instant == [1]
    status.write_text(json.dumps(running | {"born": 1.0}))  # its process is gone, its kernel is not
    kernel = subprocess.Popen(["sleep", "60"], env=os.environ | {kernels.RUN: job["folder"]})
    until(lambda: kernels.RUN in psutil.Process(kernel.pid).environ())  # it has none for a moment, between two programs
    assert kernels.execute(job | {"flag": str(flag)}) == "done"
    assert instant == [1, 1] and kernel.wait(timeout=60) == -signal.SIGKILL


class FakeLab:
    """Two workers that are threads; `map` breaks down when asked to."""

    workers = (0, 1)

    def __init__(self, error: BaseException | None = None) -> None:
        self.error, self.timeouts = error, []

    def map(self, fn, items, timeout=None):
        self.timeouts.append(timeout)
        with ThreadPoolExecutor(len(self.workers)) as pool:
            results = list(pool.map(fn, [json.loads(json.dumps(item)) for item in items]))
        if self.error:
            raise self.error
        return results


def test_a_lab_executes_the_runs_and_its_breakdown_is_an_error(tmp_path, instant):
    notebook, lab = write(tmp_path / "n.ipynb", "1"), FakeLab()
    table = sweep(notebook, {"seed": range(3)}, lab=lab, out=tmp_path / "out", timeout=100)
    assert list(table["score"]) == [0, 0.5, 1]
    assert lab.timeouts == [2 * 400]  # three runs on two workers are two rounds
    with pytest.raises(SweepError, match=r"the lab broke down after 1 of 1 runs \(OSError: gone\)"):
        sweep(notebook, {"seed": 7}, lab=FakeLab(OSError("gone")), out=tmp_path / "out", progress=False)


# -- summary -----------------------------------------------------------------------------------------------------------


def test_summary_shows_each_reported_row_and_keeps_names_apart(tmp_path, instant, monkeypatch, capsys):
    notebook = write(tmp_path / "n.ipynb", "1")
    table = sweep(notebook, {"seed": [1, 2]}, out=tmp_path / "out", progress=False)
    report(Path(table["notebook"][0]).parent, [{"seed": 7, "status": "x"}, {"seed": 8, "q": None}])
    table = summary(tmp_path / "out")
    assert list(table["seed"]) == [1, 1, 2] and list(table["status"]) == ["done"] * 3
    assert list(table["seed_result"][:2]) == [7, 8] and table["status_result"][0] == "x"
    assert "seconds" in table and "notebook_seconds" not in table
    report(Path(table["notebook"][0]).parent, {"seconds": 0.75})
    timed = summary(tmp_path / "out")
    assert (
        timed["seconds"].dropna().tolist() == [0.75] and timed["notebook_seconds"].notna().all() and "seconds_result" not in timed
    )
    report(Path(table["notebook"][0]).parent, [{"seed": 7}, {"seed": 8}])
    sweep(notebook, {"lr": 1}, out=tmp_path / "out", progress=False)  # another grid in the same folder
    assert list(summary(tmp_path / "out")["seed"]) == [0, 1, 1, 2]
    with pytest.raises(SweepError, match="no folder"):
        summary(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert list(summary(tmp_path / "empty")["status"]) == []
    assert "is no folder of a sweep: it holds no runs." in capsys.readouterr().out
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    assert summary(tmp_path / "runs").empty
    assert f"2 runs, of which labkit.compare({str(tmp_path / 'runs')!r}) is the table" in capsys.readouterr().out


def test_a_parameter_called_seconds_has_its_column(tmp_path, instant):
    code = "seconds: float = 1.0\nseed: int = 0\nrun_dir: str = ''"
    cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    table = sweep(tmp_path / "n.ipynb", {"seconds": [5.0, 7.0]}, out=tmp_path / "out", progress=False)
    assert table.columns.is_unique and table["seconds"].tolist() == [5, 7] and "notebook_seconds" in table


def test_the_first_columns_are_what_was_varied_what_came_out_and_the_status(tmp_path, instant):
    grid = {"strategy": "agwu", "seed": [1, 2], "lr": 0.5}
    table = sweep(write(tmp_path / "n.ipynb", "1"), grid, out=tmp_path / "out", progress=False)
    assert list(table.columns) == ["seed", "score", "status", "error", "seconds", "strategy", "lr", "notebook", "id"]
    assert max(map(len, repr(table).splitlines()[:-1])) <= 80 and "status" in repr(table).splitlines()[0]


@pytest.mark.parametrize(
    ("first", "last", "missing"),
    [
        ("seed: int = 0", "1", ["run_dir: str", "labkit.report(run_dir"]),
        ("seed: int = 0", "report(run_dir, {})", ["run_dir: str"]),
        ('seed: int = 0\nrun_dir: str = "runs"', "1", ["labkit.report(run_dir"]),
        ('seed: int = 0\nrun_dir: str = "runs"', "labkit.report(run_dir, {})", []),
    ],
)
def test_what_a_notebook_lacks_to_report_results_is_said(tmp_path, instant, capsys, first, last, missing):
    sweep(write(tmp_path / "n.ipynb", last, first=first), {"seed": 1}, out=tmp_path / "out")
    said = [line for line in capsys.readouterr().out.splitlines() if "reports no results" in line]
    assert len(said) == bool(missing) and all(words in said[0] for words in missing)
    assert all(words in "".join(said) for words in missing) and "".join(said).count("`") == 2 * len(missing)


def test_notebooks_of_one_name_do_not_share_a_folder(tmp_path, instant, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tables = []
    for folder in ("a", "b", "a", "b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / "n.ipynb", f"'{folder}'")
        tables.append(sweep(Path(folder) / "n.ipynb", {"seed": [1]}))
    assert len(instant) == 2 and [len(table) for table in tables] == [1] * 4
    assert "holds runs of" in capsys.readouterr().out and len(list((tmp_path / "runs").iterdir())) == 2


# -- report ------------------------------------------------------------------------------------------------------------


def test_notebooks_of_one_folder_leave_each_other_their_results(tmp_path, monkeypatch, capsys):
    for name, value in (("a.ipynb", 1), ("b.ipynb", 2), ("a.ipynb", 3), ("b.ipynb", 4)):
        monkeypatch.setenv("JPY_SESSION_NAME", f"/home/me/{name}")
        report(tmp_path, {"value": value})
    assert json.loads((tmp_path / "results.json").read_text()) == [{"value": 3}]
    assert json.loads((tmp_path / "results-b.json").read_text()) == [{"value": 4}]
    assert "holds the results of /home/me/a.ipynb; these are in results-b.json" in capsys.readouterr().out
    monkeypatch.delenv("JPY_SESSION_NAME")
    report(tmp_path, {"value": 5})
    assert json.loads((tmp_path / "results.json").read_text()) == [{"value": 5}]


def test_notebooks_of_one_name_leave_each_other_their_results_too(tmp_path, monkeypatch):
    for name, value in (("a/x", 1), ("b/y", 2), ("c/y", 3), ("d/y", 4), ("b/y", 5), ("c/y", 6), ("a/x", 7)):
        monkeypatch.setenv("JPY_SESSION_NAME", f"/home/me/{name}.ipynb")
        report(tmp_path, {"value": value})
    found = {file.name: json.loads(file.read_text())[0]["value"] for file in tmp_path.glob("*.json")}
    assert found == {"results.json": 7, "results-y.json": 5, "results-y-2.json": 6, "results-y-3.json": 4}


def test_what_differs_between_two_sweeps_into_one_folder_is_in_the_table(tmp_path, instant):
    """A default that was changed in the notebook: the rows would else be equal."""
    for lr in (0.1, 0.2):
        path = write(tmp_path / "n.ipynb", "1", first=f"seed: int = 0\nlr: float = {lr}\nsteps: int = 5")
        table = sweep(path, {"seed": [1, 2]}, out=tmp_path / "out", progress=False)
    assert table[["seed", "lr"]].to_numpy().tolist() == [[1, 0.2], [2, 0.2], [1, 0.1], [2, 0.1]] and "steps" not in table


@pytest.mark.parametrize("given", [("runs/s",), ("runs/s", "out.html"), (object(), {"score": 1}), (["runs/a", "runs/b"], {})])
def test_who_wants_the_page_of_runs_is_led_to_it(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SweepError, TypeError), match=r"labkit\.plots\.report\(runs, "):
        report(*given)
    assert not list(tmp_path.iterdir()) and "labkit.plots.report(" in report.__doc__


def test_report_accepts_dicts_and_frames_and_foreign_values(tmp_path):
    def reported(results):
        report(tmp_path / "a" / "run", results)
        return json.loads((tmp_path / "a" / "run" / "results.json").read_text())

    assert reported({"x": np.float32(0.5), "p": pd.Timestamp("2020-01-02"), "a": np.arange(2)}) == [
        {"x": 0.5, "p": "2020-01-02 00:00:00", "a": [0, 1]}
    ]
    assert reported(pd.DataFrame({"x": [1, 2], "y": ["a", "b"]})) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]
    assert reported([{"x": 1}, {"y": None}]) == [{"x": 1}, {"y": None}]
    for wrong in (3, "text", [1]):
        with pytest.raises(SweepError, match="a dict, a list of dicts or a DataFrame, and got a "):
            report(tmp_path, wrong)
    (tmp_path / "file").touch()
    with pytest.raises(SweepError, match="cannot be written"):
        report(tmp_path / "file" / "run", {})
