"""One run of a sweep: a notebook executed by a kernel of its own.

papermill and nbclient execute; what is added here are the guarantees. Kernels at once are isolated: each has IPC sockets in
a short folder of its own, so that there are no ports to race for, and starts in the notebook's folder, as in JupyterLab,
without this process changing directory. A run is monitored while it lasts: it ends by its time limit or when the sweep is
stopped, and its kernel, with everything that the kernel started, ends with it. What its cells put out, however much that is,
delays none of this (`labkit.experiments.outputs`).

Used by `labkit.experiments.sweep`; `execute` runs in a thread of the sweep or on a worker of a lab.
"""

import asyncio
import contextvars
import functools
import os
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.cluster.notice import EXECUTED
from labkit.errors import SweepError
from labkit.experiments.notebook import import_nbformat, quiet
from labkit.locks import Scratch, alone
from labkit.runs.files import find_json, replacing, write_json

ENGINE = "labkit"  # papermill's name for the engine of `labkit.experiments.outputs`
SCHEME = "labkit://"  # papermill's own file handler changes the directory of the whole process at each write
GRACE = 5.0  # seconds that an interrupted kernel has for closing what it opened, before it is killed
HEARTBEAT = 60.0  # seconds without a heartbeat after which a run on another host counts as dead
LOG = 10_000_000  # bytes of a kernel's log, into which goes what is written to its file descriptors; a longer one starts anew
ENVIRONMENT = {"IPP_NONINTERACTIVE": "1", "TQDM_MININTERVAL": "5", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
RUN = "LABKIT_SWEEP_RUN"  # in the environment of a kernel, beside `EXECUTED`: the folder of its run

_kernels: dict[str, subprocess.Popen] = {}  # socket folder -> its kernel
_starting = threading.Lock()  # kernels start one after another, a little apart


# -- the state of a run ------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict:
    """status.json of a run; one recorded as running, but whose process is gone, was interrupted."""
    import psutil

    status = find_json(folder / "status.json")
    if not isinstance(status, dict) or status.get("state") not in ("running", "done", "failed", "interrupted"):
        damaged = {"error": f"{folder / 'status.json'} is damaged"} if (folder / "status.json").exists() else {}
        return {"state": "interrupted", **damaged}
    if status["state"] == "running":
        try:
            alive = time.time() - (folder / "status.json").stat().st_mtime < HEARTBEAT
            if status["host"] == socket.gethostname():
                alive = alive and psutil.Process(status["pid"]).create_time() == status["born"]
        except (OSError, KeyError, psutil.Error):
            alive = False
        if not alive:
            status["state"] = "interrupted"
    return status


def check_kernel(name: str) -> None:
    """`SweepError` for a Jupyter kernel that is not installed, with those that are."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        KernelSpecManager().get_kernel_spec(name)
    except NoSuchKernel:
        there = ", ".join(sorted(KernelSpecManager().find_kernel_specs())) or "none"
        raise SweepError(f"there is no Jupyter kernel {name!r} here. Installed: {there}.") from None


# -- execution ---------------------------------------------------------------------------------------------------------


def execute(job: dict) -> str:
    """Execute one run of a sweep in its folder; its end state, which is also in status.json there.

    `job` holds folder, content (of the notebook), path, cwd, kernel_name, parameters (to be set), record (params.json),
    flag (a file; the run is ended when it is gone) and timeout. Never raises for what the notebook does. A run that another sweep
    is at, or has done since, is left to it, and its state there is returned.
    """
    import psutil

    folder, flag = Path(job["folder"]), Path(job["flag"])
    if not flag.exists():
        return "interrupted"
    status = {"state": "running", "started": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
    status["born"] = psutil.Process().create_time()
    error = details = ""
    try:
        if found := _claim(folder, job["record"], status):
            return found
        for attempt in range(2):
            write_json(folder / "notebook.ipynb", job["content"])
            came_up, error, details = _attempt(job, folder, flag)
            if came_up or attempt or not error or not flag.exists():
                break
        _tidy(folder, job["path"])
    except Exception as problem:  # a full disk, a folder that went away: this run fails, the others go on
        error = details = f"{type(problem).__name__}: {problem}"
    status["state"] = "done" if not error else "interrupted" if not flag.exists() else "failed"
    status.update(ended=time.time(), seconds=time.time() - status["started"], error=error)
    with suppress(OSError):
        if error:
            (folder / "error.txt").write_text(details + "\n", encoding="utf-8")
        write_json(folder / "status.json", status)
    return status["state"]


def _claim(folder: Path, record: dict, status: dict) -> str:
    """Begin a run in its folder, unless a sweep is at it or has ended it; the state that it has then, else ""."""
    with alone(folder.parent):
        if (folder / "status.json").exists() and (found := state(folder)["state"]) != "interrupted":
            return found
        if folder.exists():
            _kill(RUN, str(folder))  # a kernel can outlive its sweep
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [folder / "results.json", folder / "error.txt", *folder.glob("cell-*.txt")]:
            leftover.unlink(missing_ok=True)
        write_json(folder / "params.json", record)  # here: who holds the lock sees both or neither
        write_json(folder / "status.json", status)
    return ""


def _attempt(job: dict, folder: Path, flag: Path) -> tuple[bool, str, str]:
    """One kernel, from its start to its end: did it come up, the error in a line, the error in full ("" for none)."""
    # macOS allows a socket's path about 100 characters, and its own temporary folder uses half of them.
    scratch = Scratch("lk", "/tmp" if os.access("/tmp", os.W_OK) else None)
    sockets = str(scratch.path)
    came_up, caught = threading.Event(), []
    arguments = (job, folder, sockets, came_up, caught)
    # A thread of its own, and an empty context: nbclient then finds no event loop of the caller's to run in.
    thread = threading.Thread(target=contextvars.Context().run, args=(_papermill, *arguments), daemon=True)
    deadline, ended, asked, heartbeat = time.monotonic() + job["timeout"], "", 0.0, 0.0
    try:
        thread.start()
        while thread.is_alive():
            thread.join(0.25)
            now = time.monotonic()
            if now - heartbeat > HEARTBEAT / 10:
                heartbeat = now
                with suppress(OSError):
                    os.utime(folder / "status.json")
            with suppress(OSError):
                if os.path.getsize(f"{sockets}/kernel.log") > LOG:
                    os.truncate(f"{sockets}/kernel.log", 0)
            if not ended and (now > deadline or not flag.exists()):
                ended, asked = f"took longer than {job['timeout']:g} s (timeout) and was stopped", now
                if not flag.exists():
                    ended = "stopped together with the sweep"
                _signal(sockets, signal.SIGINT)
            elif ended and now - asked > GRACE:
                _signal(sockets, signal.SIGKILL)
                if now - asked > 6 * GRACE:
                    break
        log = _tail(Path(sockets) / "kernel.log")
    finally:
        _end(sockets)
        kernel = _kernels.pop(sockets, None)
        scratch.close()
    if not caught and not thread.is_alive():
        return True, "", ""
    error, details = _explain(caught[0] if caught else RuntimeError("the kernel could not be stopped"), folder)
    died = bool(caught) and type(caught[0]).__name__ == "DeadKernelError"  # after another error a slow kernel is ended by us
    if died and kernel is not None and (kernel.poll() or 0) < 0 and not ended:  # ended by a signal, and not by ours
        name = signal.Signals(-kernel.returncode).name
        error += f" of {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
        details = f"{error}\n\n{details}"
    if log:
        details += f"\n\nThe kernel's log, the last lines:\n{log}"
    return came_up.is_set(), ended or error, f"{ended}\n\n{details}" if ended else details


def _papermill(job: dict, folder: Path, sockets: str, came_up: threading.Event, caught: list) -> None:
    """Have papermill execute the notebook in place; an exception goes into `caught`."""
    import_nbformat()
    import papermill
    from jupyter_core.utils import ensure_event_loop
    from papermill.engines import papermill_engines
    from papermill.iorw import papermill_io
    from traitlets.config import Config

    from labkit.experiments.outputs import Engine

    with _starting:
        if all(scheme != SCHEME for scheme, _ in papermill_io._handlers):
            papermill_io.register(SCHEME, _Files())
            papermill_engines.register(ENGINE, Engine)
        time.sleep(0.1)
    connection = {"connection_file": f"{sockets}/c.json", "folder": sockets, "run": str(folder)}
    if os.name == "posix":
        connection |= {"transport": "ipc", "ip": f"{sockets}/k"}
    path = SCHEME + str(folder / "notebook.ipynb").replace("{", "{{").replace("}", "}}")
    try:
        with quiet():
            papermill.execute_notebook(
                path, path, parameters=job["parameters"], kernel_name=job["kernel_name"], language="python",
                progress_bar=False, start_timeout=60, kernel_manager_class=_kernel_class(),
                config=Config(SweepKernel=connection), resources={"metadata": {"path": job["cwd"]}},
                engine_name=ENGINE, iopub_timeout=120, on_notebook_start=lambda **_: came_up.set(),
            )  # fmt: skip
    except BaseException as error:
        caught.append(error.with_traceback(None))
    finally:
        loop = ensure_event_loop()  # the one that nbclient made for this thread
        for task in (tasks := asyncio.all_tasks(loop)):
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()


class _Files:
    """papermill's files without its changes of directory, each written whole or not at all."""

    def read(self, path: str) -> str:
        return Path(path.removeprefix(SCHEME)).read_text(encoding="utf-8")

    def write(self, text: str, path: str) -> None:
        with replacing(Path(path.removeprefix(SCHEME))) as file:
            file.write(text.encode(errors="backslashreplace"))  # a half of a surrogate pair; in JSON that is how it is written

    def pretty_path(self, path: str) -> str:
        return path


@functools.cache
def _kernel_class() -> type:
    """The kernel manager of a run; made on first use, so that importing labkit does not import Jupyter."""
    import zmq
    from jupyter_client import AsyncKernelManager
    from traitlets import Unicode

    class SweepKernel(AsyncKernelManager):
        folder = Unicode(config=True)  # of its sockets, its connection file and its log
        run = Unicode(config=True)  # the run's folder

        async def start_kernel(self, **options: Any) -> None:
            # Called "session name" by a Jupyter server; with it the figures of a kernel would take it for a lab's.
            inherited = {name: value for name, value in os.environ.items() if name != "JPY_SESSION_NAME"}
            environment = ENVIRONMENT | inherited | {"LABKIT_PLOTS": "static", EXECUTED: self.folder, RUN: self.run}
            self.context.setsockopt(zmq.RCVHWM, 0)  # a cell with many outputs must not lose the message that it has ended
            with open(f"{self.folder}/kernel.log", "ab") as log:
                await super().start_kernel(env=environment, stdout=log, stderr=log, **options)
            _kernels[self.folder] = self.provisioner.process

    return SweepKernel


def _signal(sockets: str, number: int) -> None:
    """Send a signal to the kernel of a socket folder and to all that it started (it leads its own process group)."""
    if sockets in _kernels:
        with suppress(OSError):
            getattr(os, "killpg", os.kill)(_kernels[sockets].pid, number)


def _end(sockets: str) -> None:
    """Kill the kernel of a socket folder, and what it started and left, also where that leads a group of its own."""
    _signal(sockets, signal.SIGKILL)
    _kill(EXECUTED, sockets)


def _kill(variable: str, value: str) -> None:
    """Kill all that has this in its environment."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # another user's, or gone by now
            if process.environ().get(variable) == value:
                process.kill()


# -- what went wrong, in a line and in full ----------------------------------------------------------------------------


def _explain(error: BaseException, folder: Path) -> tuple[str, str]:
    """(one line, everything) about an exception of papermill; of a cluster's errors the first engine's."""
    from papermill.exceptions import PapermillExecutionError

    cells = (find_json(folder / "notebook.ipynb") or {}).get("cells", [])
    if not isinstance(error, PapermillExecutionError):
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        began = [n for n, cell in enumerate(code, 1) if cell["metadata"].get("papermill", {}).get("start_time")]
        where = f"In [{began[-1]}]: " if began else "starting the kernel: "
        text = f"{where}{type(error).__name__}: {_first_line(str(error))}"
        return text, text
    cell = next((c for c in cells if "".join(c["source"]) == error.source), {})
    printed = "".join("".join(o["text"]) for o in cell.get("outputs", []) if o.get("name") == "stderr")
    value, printed = COLOUR.sub("", str(error.evalue)), COLOUR.sub("", printed)
    cause = f"{error.ename}: {_first_line(value)}"
    if error.ename == "AlreadyDisplayedError":  # a failing %px raises "2 errors" and prints the rest
        raised = re.findall(r"^(?:\[\d+:\w+\]:? *)?\w+(?:Error|Exception)\b.*", printed, re.MULTILINE)
        cause = f"{_first_line(value)}: {raised[-1].strip()}" if raised else cause
    elif error.ename == "CompositeError":  # "one or more exceptions from ...", then a line for each engine
        engines = [line.strip() for line in value.splitlines() if re.match(r"\s*\[\d+:\w+\]", line)]
        cause = f"{error.ename}: {engines[0]}" if engines else cause
    elif error.ename == "CellExecutionError" and not value.strip():  # the kernel sent no error: IPython prints a group's to stderr
        raised = re.search(r"^[ |+]*(\w*(?:Error|Exception|Group)\b: .*)", printed, re.MULTILINE)
        cause = raised[1].strip() if raised else "an error that the kernel could not send"
    line = f"In [{error.exec_count}]: {cause[:400]}"
    text = [line, f"The cell:\n{error.source}", "Traceback:\n" + COLOUR.sub("", "\n".join(error.traceback))]
    if "\n" in value.strip():  # WorkerError carries the traceback of its worker, CompositeError a line for each engine
        text.insert(1, value.strip())
    if printed.strip():
        text.append("Printed to stderr, the last lines:\n" + "\n".join(printed.rstrip().splitlines()[-40:]))
    return line, "\n\n".join(text)


COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # papermill's own looks for the end through the whole line, from each beginning


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def _tail(log: Path, lines: int = 15) -> str:
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def _tidy(folder: Path, source: str) -> None:
    """The notebook as it is stored: with the path of its source."""
    path = folder / "notebook.ipynb"
    content = find_json(path)
    content["metadata"].setdefault("papermill", {}).update(input_path=source, output_path=str(path))
    write_json(path, content)
