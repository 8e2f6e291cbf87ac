"""Runs with real kernels: what arrives in the kernel, what a failure leaves, and that nothing else is left.

A kernel takes about a second, so a test starts as few as it can, several at once.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.exceptions import PapermillExecutionError

from labkit.experiments.executor import _explain
from labkit.experiments.sweep import summary, sweep
from tests.experiments.helpers import write

REPORT = "import os\nfrom labkit.experiments.sweep import report\n"


@pytest.mark.slow
def test_four_at_once_get_their_values_their_folder_and_leave_nothing(tmp_path, monkeypatch, recwarn):
    books = tmp_path / "books"
    books.mkdir()
    (books / "beside.py").write_text("answer = 42\n")
    seen = "{'values': [seed, lr, sizes, extra], 'cwd': os.getcwd(), 'here': run_dir, 'beside': beside.answer, "
    seen += "'plots': E['LABKIT_PLOTS'], 'sockets': E['LABKIT_KERNEL'], 'threads': E['OMP_NUM_THREADS']}"
    notebook = write(books / "a {b}.ipynb", REPORT + f"import beside\nE = os.environ\nreport(run_dir, {seen})")
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    extras = [(1, 2), np.float32(0.5), Path("data"), float("nan")]
    table = sweep("books/a {b}.ipynb", [{"seed": i, "extra": e} for i, e in enumerate(extras)], out="out", parallel=4)
    assert list(table["status"]) == ["done"] * 4
    assert list(table["values"])[:3] == [[i, 0.1, [1, 2], e] for i, e in enumerate([[1, 2], 0.5, str(tmp_path / "data")])]
    assert math.isnan(table["values"][3][3])
    assert set(table["cwd"]) == {str(books)} and set(table["beside"]) == {42} and set(table["plots"]) == {"static"}
    assert [Path(path).parent for path in table["notebook"]] == [Path(path) for path in table["here"]]
    assert set(table["threads"]) == {os.environ["OMP_NUM_THREADS"]}
    assert os.environ == before and Path.cwd() == tmp_path
    assert len(set(table["sockets"])) == 4 and not any(map(os.path.exists, table["sockets"]))
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*(f"a {{b}}-{i}" for i in table["id"]), "sweep.json"])
    assert not recwarn.list
    executed = nbformat.read(table["notebook"][0], 4)
    assert executed.metadata.papermill.input_path == str(notebook)
    assert all(cell.execution_count for cell in executed.cells)


FAILURES = {
    "error": "def f():\n    return 1 / 0\nf()",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "remote": "from labkit import errors as E\nraise E.WorkerError('worker 2 failed: KeyError: 7', 2, 'T:\\nfar away')",
    "long": "import subprocess, time\nsubprocess.Popen(['sleep', '77'], start_new_session=True)\ntime.sleep(60)",
    "chatty": "for i in range(12000): print('line', i)\nfor i in range(1200): display(i)",
}  # fmt: skip


@pytest.mark.slow
def test_a_failing_run_is_a_row_with_its_error_and_the_others_go_on(tmp_path):
    cell = f"FAILURES = {FAILURES!r}\nget_ipython().run_cell(FAILURES[strategy]).raise_error()"
    notebook = write(tmp_path / "n.ipynb", cell, REPORT + "report(run_dir, {'score': 1})")
    *failing, last = FAILURES
    sweep(notebook, {"strategy": [name for name in failing if name != "long"]}, out=tmp_path / "out", parallel=3)
    sweep(notebook, {"strategy": "long"}, out=tmp_path / "out", timeout=8)  # in which a kernel may not even have started
    table = sweep(notebook, {"strategy": [*failing, last]}, out=tmp_path / "out").set_index("strategy")
    assert list(table["status"]) == ["failed"] * 4 + ["done"]
    assert table["error"]["error"] == "In [3]: ZeroDivisionError: division by zero"
    assert table["error"]["killed"].startswith("In [3]: DeadKernelError: Kernel died of SIGKILL")
    assert table["error"]["remote"] == "In [3]: WorkerError: worker 2 failed: KeyError: 7"
    assert table["error"]["long"] == "took longer than 8 s (timeout) and was stopped"
    folders = {name: Path(path).parent for name, path in table["notebook"].items()}
    assert "return 1 / 0" in (folders["error"] / "error.txt").read_text()
    assert "far away" in (folders["remote"] / "error.txt").read_text()
    assert nbformat.read(table["notebook"]["error"], 4).cells[0].cell_type == "markdown"  # papermill's banner
    assert (folders["chatty"] / "cell-03-stdout.txt").read_text().endswith("line 11999\n")
    outputs = nbformat.read(table["notebook"]["chatty"], 4).cells[2].outputs
    assert sum(output.output_type == "display_data" for output in outputs) == 1200
    assert len(outputs[0].text) < 60_000 and "cell-03-stdout.txt" in outputs[0].text


@pytest.mark.slow
def test_a_kernel_that_does_not_come_up_is_started_once_more(tmp_path, monkeypatch):
    import jupyter_client.provisioning.local_provisioner as provisioner

    launch, commands = provisioner.launch_kernel, []

    def flaky(command, **options):
        commands.append(command)
        return launch(["false"] if len(commands) == 1 else command, **options)

    monkeypatch.setattr(provisioner, "launch_kernel", flaky)
    table = sweep(write(tmp_path / "n.ipynb", "1"), {}, out=tmp_path / "out", progress=False)
    assert list(table["status"]) == ["done"] and len(commands) == 2


@pytest.mark.slow
def test_an_interrupt_stops_the_kernels_and_the_same_call_goes_on(tmp_path):
    notebook = write(tmp_path / "n.ipynb", "import time\ntime.sleep(60 if not lr else 0)", REPORT + "report(run_dir, {})")
    call = f"sweep({str(notebook)!r}, {{'lr': [0, 1]}}, out={str(tmp_path / 'out')!r})"
    script = "from labkit.experiments.sweep import sweep\n" + call
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "out").glob("*/status.json")):
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert "interrupted after" in text and "KeyboardInterrupt" in text, text
    table = summary(tmp_path / "out")
    assert list(table["status"]) == ["interrupted"] and not list((tmp_path / "out").glob(".sweep-*"))
    table = sweep(notebook, {"lr": [1]}, out=tmp_path / "out", progress=False)
    assert sorted(table["status"]) == ["done", "interrupted"]


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            "  + Exception Group Traceback (most recent call last):\n  | ExceptionGroup: g (2 sub-exceptions)\n",
            "ExceptionGroup: g (2 ",
        ),
        ("", "an error that the kernel could not send"),
    ],
)
def test_an_error_that_was_not_put_out_is_told_as_far_as_it_is_known(printed, said, tmp_path):
    cell = new_code_cell("raise it", outputs=[new_output("stream", name="stderr", text=printed)] if printed else [])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "notebook.ipynb")
    line, _ = _explain(PapermillExecutionError(0, 3, "raise it", "CellExecutionError", "", []), tmp_path)
    assert line.startswith(f"In [3]: {said}")


@pytest.mark.slow
def test_the_engines_error_is_told_where_ipython_says_two_errors(tmp_path):
    start = "import ipyparallel as ipp\nengines = ipp.Cluster(n=2).start_and_connect_sync(activate=True)"
    notebook = write(tmp_path / "n.ipynb", start, "%%px\n1 / 0")
    table = sweep(notebook, {}, out=tmp_path / "out")
    assert table["error"][0].endswith("ZeroDivisionError: division by zero")


@pytest.mark.slow
def test_many_at_once(tmp_path):
    notebook = write(tmp_path / "n.ipynb", REPORT + "report(run_dir, {'score': seed})")
    table = sweep(notebook, {"seed": range(24)}, out=tmp_path / "out", parallel=6, progress=False)
    assert list(table["score"]) == list(range(24))
