"""A Parquet file as large as is asked for, workers that may not have more memory than is asked for, and what they use of it.

The images are drawn: a pattern for each class, in noise that repeats itself from row group to row group, as random numbers would take
longer than all the rest. Used by 13-streaming.
"""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

SIDE, N_CLASSES = 28, 10
POLL_S = 0.2


def draw(path: Path, megabytes: float, rows: int, seed: int = 0) -> Path:
    """A file of float32 images of 28x28 (column x, lists) and classes (y), in row groups of `rows`; what is there is taken as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, pixels, drawn = np.random.default_rng(seed), SIDE * SIDE, path.with_suffix(".part")
    patterns = rng.standard_normal((N_CLASSES, pixels), np.float32)
    noise = rng.standard_normal((2 * rows, pixels), np.float32)
    schema = pa.schema({"x": pa.list_(pa.float32()), "y": pa.int64()}, {"shape": f"[1, {SIDE}, {SIDE}]"})
    if path.exists():
        return path
    with pq.ParquetWriter(drawn, schema, use_dictionary=["y"], compression="none") as writer:
        for _ in range(max(10, round(megabytes * 1e6 / (4 * pixels * rows)))):
            y, at = rng.integers(0, N_CLASSES, rows), int(rng.integers(rows))
            x = noise[at : at + rows] + 0.3 * patterns[y]
            lists = pa.ListArray.from_arrays(np.arange(0, rows * pixels + 1, pixels, dtype=np.int32), pa.array(x.ravel()))
            writer.write_table(pa.table([lists, y], schema=schema), row_group_size=rows)
    return drawn.rename(path)


def limit(megabytes: float) -> int:
    """Runs on a worker: from here on it may have no more memory of its own (0: as before). Returns its process id."""
    if megabytes:
        resource.setrlimit(resource.RLIMIT_DATA, (int(megabytes * 1e6), resource.RLIM_INFINITY))
    return psutil.Process().pid


class Usage(threading.Thread):
    """What processes use while a `with` block lasts: `seen` is a list of (seconds, the MB of memory of the one that has most), `cpu_s` the
    processor time of all."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(name="usage", daemon=True)
        self.processes, self.over, self.seen = [psutil.Process(pid) for pid in pids], threading.Event(), []

    def __enter__(self) -> Usage:
        self.began, self.cpu_s = time.perf_counter(), -self._cpu()
        self.start()
        return self

    def run(self) -> None:
        while not self.over.wait(POLL_S):
            now = time.perf_counter() - self.began
            self.seen.append((now, max(process.memory_info().rss for process in self.processes) / 1e6))

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()
        self.cpu_s += self._cpu()

    def _cpu(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.processes)

    def most(self) -> float:
        return max((megabytes for _, megabytes in self.seen), default=0.0)


def thirds(seen: list[tuple[float, float]]) -> tuple[float, float]:
    """The most in the first third and in the last one."""
    n = max(1, len(seen) // 3)
    return tuple(max(megabytes for _, megabytes in part) for part in (seen[:n], seen[-n:]))
