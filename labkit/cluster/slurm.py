"""Workers as jobs of SLURM: a Dask cluster whose workers are submitted with sbatch, one worker a job.

dask-jobqueue writes and submits the job scripts; here it is given what labkit's workers need: one task at a time, torch's threads,
no sampling profiler, an end that a lab can wait for. Dask's own traffic is TLS with a key made for this cluster, unless it
stays on loopback, because the ports are reached by whoever shares the machines. When workers do not come, SLURM is asked why.

Found by `labkit.cluster.connect`; everything but the start is `labkit.cluster.dask_backend`.
"""

import inspect
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from labkit.cluster import dask_backend
from labkit.cluster.backend import THREAD_VARIABLES, Request
from labkit.errors import ClusterError, file_path, known, several, text, whole

LOGS = "runs/slurm"  # where the logs of the jobs go, seen from the folder of the notebook; on a disk that all machines share
POLL_S = 0.1
ASK_S = 2.0  # seconds between two questions to SLURM
TAIL = 15  # lines of a log that are shown
# States of a job that may still bring a worker.
ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING"}

# The last of two equal options counts: one task at a time on however many cores, and the memory is for SLURM to watch.
WORKER_OPTIONS = ["--nthreads", "1", "--memory-limit", "0", "--preload", "labkit.cluster.dask_backend"]
WORKER_OPTIONS += ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]


def check(request: Request) -> None:
    """Does this request make sense to SLURM?"""
    for name in request.job:
        known("connect(kind='slurm') argument", name, inspect.signature(start_cluster).parameters, error=ClusterError)
    dask_backend.check(replace(request, job={}))


def open(request: Request) -> dask_backend.DaskWorkers:
    """The workers of a running Dask cluster, or those of jobs that are submitted now."""
    if request.joins:
        return dask_backend.join_cluster(request)
    cluster = start_cluster(request.n_workers, threads=request.threads, timeout=request.timeout, **request.job)
    return dask_backend.own_cluster(cluster, request)


def start_cluster(
    n_workers: int,
    *,
    queue: str | None = None,
    cores: int = 1,
    memory: str = "2GB",
    walltime: str = "01:00:00",
    gpus: int = 0,
    account: str | None = None,
    interface: str | None = None,
    job_extra: Sequence[str] = (),
    log_directory: str | os.PathLike[str] | None = None,
    threads: int = 1,
    timeout: float = 300.0,
) -> Any:
    """A dask_jobqueue.SLURMCluster whose `n_workers` workers have come; its `close` cancels the jobs.

    Parameters
    ----------
    queue, account
        SLURM's partition and account; its defaults where None.
    cores, memory, walltime, gpus
        What each job asks for.
    interface
        Network interface between kernel and workers, such as "ib0". "lo", where all is one machine, does without TLS.
    job_extra
        Further options of sbatch, such as "--constraint=haswell".
    log_directory
        For the logs of the jobs, on a disk that all machines share; default `runs/slurm`.
    threads
        For OMP_NUM_THREADS and its like in the jobs.
    timeout
        Seconds until all workers must be there. How long a job waits in the queue is decided by SLURM.

    Raises
    ------
    ClusterError
        SLURM or dask-jobqueue is missing, a job was refused, or workers did not come: then with the reason that SLURM gives and
        the end of the newest log.
    """
    n_workers, cores, gpus = whole("n_workers", n_workers), whole("cores", cores), whole("gpus", gpus, 0)
    memory, walltime = text("memory", memory), text("walltime", walltime)
    named = {"queue": queue, "account": account, "interface": interface}
    queue, account, interface = (None if value is None else text(name, value) for name, value in named.items())
    job_extra, logs = several("job_extra", job_extra, text), file_path("log_directory", log_directory or LOGS).absolute()
    cluster_class, job_class = _slurm()
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClusterError(f"the logs of the jobs cannot be written to {logs}: {error}. Give another log_directory.") from error
    tls = None if re.fullmatch(r"lo\d*", interface or "") else _keys(logs)
    # Local workers take their settings from this process, a job from its environment.
    settings = {"DASK_" + name.upper().replace("-", "_").replace(".", "__"): v for name, v in dask_backend.SETTINGS.items()}
    exports = dict.fromkeys(THREAD_VARIABLES, threads) | settings
    import dask

    with dask.config.set(dask_backend.SETTINGS):
        cluster = cluster_class(
            job_cls=job_class,
            job_name="labkit",
            queue=queue,
            account=account,
            cores=cores,
            processes=1,
            memory=memory,
            walltime=walltime,
            interface=interface,
            job_extra_directives=[*job_extra, *([f"--gres=gpu:{gpus}"] if gpus else [])],
            job_script_prologue=["export " + " ".join(f"{name}={value}" for name, value in exports.items())],
            worker_extra_args=WORKER_OPTIONS,
            log_directory=str(logs),
            security=tls,
            protocol="tls://" if tls else None,
            scheduler_options={"dashboard_address": "127.0.0.1:0"},
            silence_logs="critical",
        )
    if tls:
        weakref.finalize(cluster, shutil.rmtree, Path(tls.tls_ca_file).parent, ignore_errors=True)
    try:
        print(cluster.job_script().strip())
        _submit(cluster, n_workers)
        _wait(cluster, n_workers, logs, timeout)
    except BaseException:
        cluster.close(timeout=10)
        raise
    return cluster


def _slurm() -> tuple[type, type]:
    """dask-jobqueue's cluster, and its job with one thing mended."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "there is no sbatch on the PATH: kind='slurm' needs to run where jobs can be submitted (a login node; Debian: "
            "apt-get install slurm-wlm). Elsewhere try connect(kind='dask')."
        )
    interrupted = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue import SLURMCluster
        from dask_jobqueue.slurm import SLURMJob
    except ImportError as error:
        raise ClusterError(f"kind='slurm' needs dask-jobqueue ({error}). pip install 'labkit[slurm]'") from error
    finally:  # dask-jobqueue 0.9 makes Ctrl-C end the whole process when it is imported
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, interrupted)
    from distributed.core import Status

    class Job(SLURMJob):
        """Says what became of it: at the end Dask insists on that, and dask-jobqueue 0.9 leaves it out."""

        async def start(self) -> None:
            self.status = Status.failed  # unless it is submitted
            await super().start()

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return SLURMCluster, Job


def _keys(logs: Path) -> Any:
    """Security settings for TLS with a new key, which only this user can read; the jobs find it beside their logs."""
    from distributed.security import Security

    try:
        made = Security.temporary()
    except ImportError as error:
        raise ClusterError(
            "Dask's ports are open to the network, so they need TLS, and that needs cryptography. pip install 'labkit[slurm]', "
            "or give interface='lo' where SLURM is this one machine."
        ) from error
    folder = Path(tempfile.mkdtemp(prefix=".tls-", dir=logs))  # mode 0700
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_text(made.tls_ca_file)
    key.write_text(made.tls_worker_key)
    roles = ("scheduler", "worker", "client")
    files = {f"tls_{role}_{kind}": str(file) for role in roles for kind, file in (("cert", cert), ("key", key))}
    return Security(require_encryption=True, tls_ca_file=str(cert), **files)


def _submit(cluster: Any, n_workers: int) -> None:
    # Not cluster.scale(): that submits in the background, and the error message of sbatch is lost.
    while len(cluster.worker_spec) < n_workers:
        cluster.worker_spec.update(cluster.new_worker_spec())
    try:
        cluster.sync(cluster._correct_state)
    except RuntimeError as error:
        reason = str(error).partition("stderr:")[2].strip() or str(error)
        raise ClusterError(
            f"sbatch refused the job: {reason}. Its script is printed above; `sinfo` shows what there is."
        ) from error


def _wait(cluster: Any, n_workers: int, logs: Path, timeout: float) -> None:
    limit, asked = time.monotonic() + timeout, time.monotonic()
    while (n := len(cluster.scheduler.workers)) < n_workers:
        ids = [str(job.job_id) for job in cluster.workers.values()]
        if time.monotonic() - asked > ASK_S:
            asked, states = time.monotonic(), _states(ids)
            if states and not any(state in ALIVE for _, state, _ in states):
                raise ClusterError(f"{n} of {n_workers} workers arrived, and no more can come.\n{_why(ids, logs)}")
        if time.monotonic() > limit:
            raise ClusterError(
                f"{n} of {n_workers} workers arrived in {timeout:g} s; the jobs are cancelled.\n{_why(ids, logs)}\n"
                "Give a longer timeout, ask for less, or try connect(kind='dask')."
            )
        time.sleep(POLL_S)


def _states(ids: Sequence[str]) -> list[tuple[str, str, str]]:
    """(job, state, reason) of each job that SLURM still knows; nothing when it does not answer."""
    command = ["squeue", "--noheader", "--states=all", "--jobs=" + ",".join(ids), "--format=%i|%T|%r"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [(job, state, reason) for job, state, reason in (line.strip().split("|", 2) for line in lines if line.count("|") >= 2)]


def _why(ids: Sequence[str], logs: Path) -> str:
    """The states of the jobs by `squeue`, and the end of the newest log among them."""
    lines = [f"  job {job}: {state}, reason: {reason}" for job, state, reason in _states(ids)]
    lines = lines or ["  squeue lists none of the jobs " + ", ".join(ids)]
    written = [file for job in ids for file in logs.glob(f"*-{job}.*") if file.stat().st_size]
    if written:
        newest = max(written, key=lambda file: file.stat().st_mtime)
        tail = newest.read_text(errors="replace").splitlines()[-TAIL:]
        lines += [f"The last lines of {newest}:", *(f"  {line}" for line in tail)]
    else:
        lines.append(f"No job has written a log to {logs}.")
    return "\n".join(lines)
