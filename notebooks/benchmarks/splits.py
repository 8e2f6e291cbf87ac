"""Steps in several ways, beside what the machine can do at all, and while another process takes a core.

Used by the benchmark notebooks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

import labkit

SHAPES = {"lenet": (1, 28, 28), "vgg9": (3, 32, 32), "resnet20": (3, 32, 32), "vgg3": (1, 25, 25, 25)}
MICRO = 32  # samples in a block of one thread


def machine(threads: int) -> pd.DataFrame:
    """GFLOP/s of products of matrices on one thread, and on all at once."""
    torch.set_num_threads(1)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = pd.DataFrame({kind: {"one": peak(1, dtype), "all": peak(threads, dtype)} for kind, dtype in kinds.items()}).T
    return found.assign(all_over_one=found["all"] / found.one)


def peak(n: int, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """GFLOP/s of n threads that each multiply matrices of 1024 x 1024."""
    done, here = [], threading.Barrier(n)

    def multiply() -> None:
        torch.set_num_threads(1)
        a, times = torch.ones(1024, 1024, dtype=dtype), 0
        a @ a
        here.wait()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            a @ a
            times += 1
        done.append(2 * 1024**3 * times / (time.perf_counter() - started) / 1e9)

    workers = [threading.Thread(target=multiply) for _ in range(n)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(1)
    return sum(done)


def problem(
    model: str, split: str, threads: int, precision: str = "float32", channels_last: bool = True, small: bool = False, seed: int = 0
) -> labkit.Classifier:
    """A network on 64 samples of random numbers; "micro" is one thread that takes blocks of 32 samples."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(64, *SHAPES[model])).astype(np.float32), np.arange(64) % 10
    n, kind = (1, "samples") if split == "micro" else (1 if split == "none" else threads, split)
    inner = labkit.Inner(threads=n, split=kind, block=MICRO if split == "micro" else None)
    options = {"model_args": {"width": 0.1}} if small else {}
    return labkit.Classifier(model, data, lr=0.01, inner=inner, precision=precision, channels_last=channels_last, **options)


def ways(model: str, threads: int, precisions: list[str], small: bool = False) -> dict[str, labkit.Classifier]:
    """By their names in the table: torch as it comes, and each split in each precision with channels last."""
    found = {"default": problem(model, "intra-op", threads, channels_last=False, small=small)}
    for precision in precisions:
        splits = ["none", "micro", "intra-op", "samples", "auto"] + (["rows"] if precision == "float32" else [])
        if model == "resnet20":
            splits.remove("micro")  # the statistics of a batch are those of all of it
        name = "" if precision == "float32" else f", {precision} precision"
        found |= {split + name: problem(model, split, threads, precision, small=small) for split in splits}
    return found


def ratios(wide: pd.DataFrame) -> pd.DataFrame:
    """Of times, a column a way: what each is to be compared with over it."""
    found = pd.DataFrame({"samples_over_intra_op": wide["intra-op"] / wide["samples"]})
    found["samples_over_one_thread"] = wide[[name for name in ("none", "micro") if name in wide]].min(axis=1) / wide["samples"]
    found["rows_over_intra_op"] = wide["intra-op"] / wide["rows"]
    found["auto_over_best"] = wide["auto"] / wide[["none", "intra-op", "samples"]].min(axis=1)
    found["best_over_default"] = wide["default"] / wide.drop(columns="default").min(axis=1)
    if (other := "none, auto precision") in wide:
        found["precision_auto_one_thread"] = wide["none"] / wide[other]
    return found


def compiled(model: str, batch_size: int, steps: int, small: bool = False) -> dict:
    """Gradients of a network on one thread, channels last, as it is and by torch.compile, whose first step takes `first_s`."""
    plain = problem(model, "none", 1, small=small)
    x, y = plain.load(np.resize(plain.train_indices(), batch_size))
    row = {"model": model, "batch_size": batch_size}
    for name, wrap in {"eager": lambda module: module, "compiled": torch.compile}.items():
        module, took = wrap(plain.new_module(0)), []
        for _ in range(steps + 1):
            started = time.perf_counter()
            torch.nn.functional.cross_entropy(module(x), y).backward()
            took.append(time.perf_counter() - started)
        row |= {f"{name}_ms": 1e3 * float(np.median(took[1:])), "first_s": took[0]}
    return row


@contextlib.contextmanager
def burner() -> Iterator[None]:
    """A process that takes a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def taken(model: str, threads: int, batch_size: int, steps: int) -> list[dict]:
    """Rows of times while the machine is free and while a core is taken, in times of one thread on the free one."""
    own = {split: problem(model, split, threads) for split in ("none", "intra-op", "samples", "auto")}
    free, rows = labkit.step_times({"none": own["none"]}, [batch_size], steps).ms.iloc[0], []
    for name, beside in {"free": contextlib.nullcontext(), "taken": burner()}.items():
        with beside:
            found = labkit.step_times(own, [batch_size], 3 * steps)
        rows.append({"model": model, "machine": name, **dict(zip(found.problem, found.ms / free, strict=True))})
    return rows


def load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
