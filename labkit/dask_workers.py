"""Dask's side of a lab: a client and, where none is given, a local cluster; the workers in order; silence.

Used by `labkit.lab`; Dask loads it in each local worker process (`dask_setup`).
"""

from __future__ import annotations

import glob
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from labkit.errors import ClusterError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start_client(kind, n_workers, threads, address, client, timeout, scratch) -> tuple[Any, list[Any]]:
    """A Dask client, and what this lab has to close (the client first)."""
    import dask
    from distributed import Client, LocalCluster

    if client is not None:
        if isinstance(client, Client):
            return client, []
        made = Client(client, timeout=timeout, set_as_default=False)
        return made, [made]
    if address:
        try:
            made = Client(address, timeout=timeout, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterError(f"no Dask scheduler answers at {address}: {error}.") from error
        return made, [made]
    settings = {
        "temporary-directory": scratch,  # the scheduler's too
        "distributed.worker.profile.enabled": False,  # it samples every 10 ms and would be timed too
        "distributed.admin.system-monitor.gil.enabled": False,
        "distributed.scheduler.worker-ttl": None,  # a long step that holds the GIL is no dead worker
        "distributed.comm.timeouts.connect": f"{timeout:g}s",
    }
    with dask.config.set(settings):
        processes = {
            "host": "127.0.0.1",
            "env": dict.fromkeys(THREAD_VARIABLES, str(threads)),
            "preload": ["labkit.dask_workers"],  # calls dask_setup there
        }
        cluster = LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,  # one task at a time; torch's threads are set by the worker
            processes=kind != "threads",
            dashboard_address="127.0.0.1:0",
            memory_limit=None,
            local_directory=scratch,
            silence_logs=logging.CRITICAL,
            **(processes if kind != "threads" else {}),
        )
        made = Client(cluster, timeout=timeout, set_as_default=False)
    return made, [made, cluster]


def dask_setup(worker: Any) -> None:
    """Dask calls this in each worker process. An interrupt of the notebook reaches the whole process group; it is for the kernel,
    and the workers have to outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def find_workers(client: Any, n_workers: int | None, slowdown: Sequence[float] | None, timeout: float) -> dict[str, tuple]:
    """Wait until the workers are there; address -> (name, host, process id, number of GPUs), in the order of their names."""
    wanted = n_workers or len(slowdown or [0])
    limit = time.monotonic() + timeout
    while len(known := client.scheduler_info(n_workers=-1)["workers"]) < wanted:
        if time.monotonic() > limit:
            raise ClusterError(
                f"{len(known)} of {wanted} workers arrived in {timeout:g} s. Try connect(n_workers=1, kind='threads'), "
                "or give a longer timeout."
            )
        time.sleep(0.05)
    addresses = sorted(known, key=lambda address: (isinstance(known[address]["name"], str), known[address]["name"], address))
    addresses = addresses[: n_workers or len(addresses)]
    if slowdown is not None and len(slowdown) != len(addresses):
        raise ClusterError(f"slowdown has {len(slowdown)} entries for {len(addresses)} workers. Give one factor for each worker.")
    about = client.run(_describe, workers=addresses)
    return {address: (str(known[address]["name"]), *about[address]) for address in addresses}


def _describe() -> tuple[str, int, int]:
    """Runs on a worker: host, process id, number of GPUs. torch is asked only where a GPU driver is there."""
    gpus = 0
    if glob.glob("/dev/nvidia[0-9]*"):
        import torch

        gpus = torch.cuda.device_count()
    return socket.gethostname(), os.getpid(), gpus


def gather(client: Any, futures: list[Any], timeout: float) -> list[Any]:
    from distributed import wait

    try:
        with client.as_current():
            wait(futures, timeout=timeout)
    except TimeoutError as error:
        left = sum(not future.done() for future in futures)
        client.cancel(futures)
        raise ClusterError(f"{left} of {len(futures)} tasks were not done within {timeout:g} s; they were cancelled.") from error
    return client.gather(futures)


@contextmanager
def quiet():
    """Dask says a lot about workers that come and go; in a notebook that reads like failure."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado", "asyncio", "bokeh")]
    names = [name for name in logging.root.manager.loggerDict if name.startswith("distributed.")]
    loggers += [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
