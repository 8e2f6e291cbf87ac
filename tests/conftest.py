"""What every test shares: a quiet machine, places to write that are thrown away, and the proof that nothing is left.

A lab starts processes and threads, and its promise is that closing it ends them. So each test, and the session as a
whole, is followed by a count: whatever runs now and did not run before gets a minute, then the test fails and the
process is killed. What a fixture of wider scope started (a lab shared by a module) was there before the test, and is
counted when the session ends.

Used by pytest for every file in this folder.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from labkit.experiments.notebook import import_nbformat

GRACE = 60.0  # seconds that a process or thread has to end by itself after its test, on a machine that is busy
SCRATCH = Path(tempfile.mkdtemp(prefix="labkit-tests-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)  # first in, last out: after the libraries' own

# Set here and not in a fixture: OpenMP reads its variable when torch is imported, Dask and matplotlib theirs too.
os.environ.update(
    OMP_NUM_THREADS="1",  # 2 cores, several workers
    DASK_CONFIG=str(SCRATCH / "dask"),  # nobody's own settings, nothing written at home
    IPYTHONDIR=str(SCRATCH / "ipython"),
    JUPYTER_CONFIG_DIR=str(SCRATCH / "jupyter-config"),
    JUPYTER_DATA_DIR=str(SCRATCH / "jupyter-data"),  # a kernel spec at home would hide the one of this environment
    JUPYTER_RUNTIME_DIR=str(SCRATCH / "jupyter-runtime"),
    MATPLOTLIBRC=str(SCRATCH / "matplotlibrc"),  # no windows; MPLBACKEND would also reach the kernels of notebooks
)
(SCRATCH / "matplotlibrc").write_text("backend: agg\n")
import_nbformat()  # before a test does

# A runner in the background ignores interrupts, and every process that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OTHERS = set(
    psutil.process_iter()
)  # these ran before, or are another job's; to read about all of them after each test takes minutes

# One for the whole Python process, and they live as long as it does.
LASTING_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "loky.backend.resource_tracker")
LASTING_THREADS = ("Dask-Offload",)


def pytest_configure() -> None:
    """Dask forks its workers from a process that has loaded torch, as each would need seconds for that. On Linux users' workers are, too; where they are spawned this is for the tests alone."""
    import multiprocessing.util

    import dask
    import distributed.utils

    multiprocessing.util.get_temp_dir()  # where the two find each other: not in the folder of whichever test is the first
    context = distributed.utils.get_mp_context  # sets its own list of modules, once
    environ = {"LABKIT_CACHE": "", "LABKIT_DATA": ""}  # as they are when a worker starts
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver", "distributed.nanny.environ": environ})
    context().set_forkserver_preload(["distributed", "torch", "labkit.training.worker.worker", "labkit.cluster.dask_backend"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: item.path.name != "test_notebooks.py"
    )  # the longest first: at the end one job would be left with them
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))  # seconds: for those that start processes, on a machine that is busy


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch.cuda.is_available() is False here")


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LABKIT_CACHE for the tests that ask: one folder for the session, so that a data set is converted once."""
    folder = tmp_path_factory.getbasetemp() / "labkit-cache"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("LABKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For a test with a cache of its own, no data folder, no package, no network, and nothing printed before."""
    from labkit.data import cache, fetch

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LABKIT_DATA", raising=False)
    monkeypatch.setattr(fetch, "ROOT", tmp_path / "no-debian")
    monkeypatch.setattr(fetch, "fetch", lambda *args, **kwargs: ["no network in this test"])
    monkeypatch.setattr(cache, "_PRINTED", set())
    monkeypatch.setattr(fetch, "_FAILED", {})
    return tmp_path / "cache"


@pytest.fixture(scope="session", autouse=True)
def _session_leaves_nothing() -> Iterator[None]:
    with nothing_left("the session"):
        yield


@pytest.fixture(autouse=True)
def _test_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # whatever the test before has set
    with nothing_left(request.node.name):
        yield


@contextmanager
def nothing_left(who: str) -> Iterator[None]:
    """Fail if a process or a non-daemon thread that was started inside is still there GRACE seconds after the end."""
    processes, threads = _processes(), _threads()
    yield
    deadline = time.monotonic() + GRACE
    left = []
    if started := _processes() - processes:
        _, alive = psutil.wait_procs(list(started), timeout=GRACE)
        for process in _processes() & set(alive):
            left.append(f"process {process.pid}: {_command(process)[:200]}")
            process.kill()
    for thread in _threads() - threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            left.append(f"thread {thread.name!r} (not a daemon)")
    if left:
        pytest.fail(f"{who} left behind, {GRACE:g} s after its end:\n  " + "\n  ".join(left), pytrace=False)


def _processes() -> set[psutil.Process]:
    """Living descendants of this process, also those whose parent has died: they carry this session's IPYTHONDIR."""
    me, found = psutil.Process(), set()
    for process in psutil.process_iter():
        if process in OTHERS:
            continue
        environ, parents = {}, None
        with suppress(psutil.Error, OSError):  # another user's
            environ = process.environ()
        with suppress(psutil.Error, OSError):  # it ended just now
            parents = process.parents()
        if environ.get("IPYTHONDIR") == str(SCRATCH / "ipython") or me in (parents or ()):
            found.add(process)
        elif parents is not None:
            OTHERS.add(process)  # another job's, and it will stay so
    commands = {process: _command(process) for process in found}
    return {
        p
        for p, command in commands.items()
        if command and not (any(map(command.__contains__, LASTING_PROCESSES)) and not _forked(p))
    }


def _forked(process: psutil.Process) -> bool:
    """Is it a worker that looks like the process it was forked from?"""
    try:
        return _command(process) == _command(process.parent())
    except (psutil.Error, AttributeError):
        return False


def _command(process: psutil.Process) -> str:
    """The command line; "" for a process that has ended, zombies too."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _threads() -> set[threading.Thread]:
    return {
        thread
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread() and not thread.name.startswith(LASTING_THREADS)
    }
