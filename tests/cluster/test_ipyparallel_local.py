"""Engines of our own: beside a notebook, and gone with it. Under MPI: `test_backend`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from labkit.cluster.ipyparallel_local import mpiexec
from labkit.errors import ClusterError
from tests.cluster.test_backend import until

NOTEBOOK = """
import os, sys, time
from IPython.core.interactiveshell import InteractiveShell
import labkit

shell = InteractiveShell.instance()
lab = labkit.connect("ipyparallel", 2)
task = lab.start(0, time.sleep, 60)
shell.run_cell_magic("px", "", "import os; print('engine', os.getpid())")
assert not task.done
try:
    print(*(worker.pid for worker in lab.workers), *(process.pid for process in lab._backend._local.processes), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", lab.map(abs, [-1], workers=[1], timeout=60), lab.lost(), flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_engines_beside_a_notebook_that_is_interrupted_and_killed(tmp_path):
    """%%px works while a task runs; an interrupt is for the kernel alone; engines and controller do not outlive it."""
    (tmp_path / "script.py").write_text(NOTEBOOK)
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = []
        while not lines or not lines[-1][:1].isdigit():
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        pids = [int(pid) for pid in lines[-1].split()]
        assert all(any(f"engine {pid}" in line for line in lines) for pid in pids[:2]), lines
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "interrupted [1] []\n"
    finally:
        process.kill()
        process.communicate(timeout=60)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert [file.name for file in tmp_path.iterdir()] == ["script.py"]


def test_without_mpi_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"needs MPI, and there is no mpiexec\. Install one .* pip install labkit\[mpi\]"):
        mpiexec(2)
