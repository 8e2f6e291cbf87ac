"""Engines of our own: ipyparallel's controller and engines as processes on this machine, under MPI or not.

Engines, controller and their files end with the lab. When the kernel dies instead, a small process that reads a pipe from it (the
keeper) sees the pipe end and kills them. An interrupt of the kernel does not reach them.

Used by `labkit.cluster.ipyparallel_backend`.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from labkit.cluster.backend import THREAD_VARIABLES
from labkit.errors import ClusterError
from labkit.locks import Scratch

CONTROLLER = (
    "--nodb",  # the controller keeps no results
    "--usethreads",  # its schedulers are threads: one process and 300 MB less
    "--ip=127.0.0.1",
    "--HeartMonitor.period=300",  # milliseconds; an engine is there after its second heartbeat
    "--HeartMonitor.max_heartmonitor_misses=2000",  # an engine that was frozen may thaw; one that died is reported by its nanny
    "--log-level=40",
)
ENGINE = ("--log-level=40", "--IPEngine.wait_for_url_file=60")
MPI_ADVICE = "Install one beside labkit, pip install labkit[mpi], or put the system's on PATH."
MPI_AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",  # Open MPI 4
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # Open MPI 5
}
# Reads the ids of process groups, a line each. The pipe ends when the kernel dies: then they are killed.
_KEEPER = """
import os, signal, sys
groups = []
for line in sys.stdin:
    groups.append(int(line))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class LocalEngines:
    """A controller and sets of engines on this machine, their files in a `scratch` folder."""

    def __init__(self, scratch: Scratch, threads: int, mpi: bool) -> None:
        self.scratch, self.folder, self.threads, self.mpi = scratch, scratch.path, threads, mpi
        self.processes: list[subprocess.Popen] = []
        self.keeper = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _KEEPER],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    @property
    def connection(self) -> Path:
        return self.folder / "security" / "ipcontroller-client.json"

    def start_controller(self, timeout: float) -> None:
        self.controller = self._popen([sys.executable, "-m", "ipyparallel.controller", *CONTROLLER], "controller")
        limit = time.monotonic() + timeout
        while not self.connection.exists():
            if self.controller.poll() is not None or time.monotonic() > limit:
                raise ClusterError(f"ipyparallel's controller did not start in {timeout:g} s. Its last lines:\n{self.log()}")
            time.sleep(0.02)

    def start(self, n: int) -> None:
        engine = [sys.executable, "-m", "ipyparallel.engine", *ENGINE]
        if self.mpi:
            self._popen([*mpiexec(n), *engine, "--mpi"], "engines")
        else:
            for _ in range(n):
                self._popen(engine, "engine")

    def ended(self) -> bool:
        return self.controller.poll() is not None

    def log(self) -> str:
        files = sorted(self.folder.glob("*.log"), key=lambda file: file.stat().st_mtime)
        text = "\n".join(file.read_text(errors="replace").strip() for file in files)
        return "\n".join(text.splitlines()[-20:])

    def close(self) -> None:
        """End everybody, frozen or not; they hold nothing that has to be saved. Twice is fine."""
        import psutil

        below = []  # each engine has a nanny in a session of its own, which would spend seconds on deregistering
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                below += psutil.Process(process.pid).children(recursive=True)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        for other in below:
            with contextlib.suppress(psutil.Error):
                other.kill()
        for process in self.processes:
            process.wait()
        self.processes.clear()
        self.keeper.kill()
        self.keeper.wait()
        self.keeper.stdin.close()
        self.scratch.close()

    def _popen(self, command: list[str], name: str) -> subprocess.Popen:
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.threads)) | {"IPP_NONINTERACTIVE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))  # as here
        if self.mpi and os.geteuid() == 0:
            environment |= MPI_AS_ROOT
        with open(self.folder / f"{name}.{len(self.processes)}.log", "wb") as log:
            process = subprocess.Popen(
                [*command, f"--profile-dir={self.folder}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # an interrupt of the kernel is for the kernel
            )
        self.processes.append(process)
        self.keeper.stdin.write(f"{process.pid}\n")
        self.keeper.stdin.flush()
        return process


def mpiexec(n: int) -> list[str]:
    """The beginning of a command that runs n ranks: the launcher of MPI beside this Python, or else on PATH.

    MPI ends all ranks when one dies. mpich's launcher does not notice: the shell above each engine outlives it, and keeps the
    connection open that the launcher listens to (its own -disable-auto-cleanup was tried: all ranks were gone a second later).
    """
    found = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if not found:
        raise ClusterError(f"engines='mpi' needs MPI, and there is no mpiexec. {MPI_ADVICE}")
    try:
        import mpi4py  # noqa: F401
    except ImportError as error:
        raise ClusterError(f"engines='mpi' needs mpi4py, which is not installed. {MPI_ADVICE}") from error
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout
    shell = ["sh", "-c", '"$0" "$@" || exec sleep 100000000'] if "HYDRA" in version else []
    return [found, "-n", str(n), *shell]
