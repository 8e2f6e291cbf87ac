"""Runs in storms: the same training undisturbed and under random faults, and what became of it.

Used by the chaos benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

import labkit
from labkit import chaos

FAULTS = ["kill", "freeze", "drop", "join"]


def trials(problem, kinds: list, updates: list, seeds: list, n_workers: int, storm: dict, **train) -> Iterator[dict]:
    """A row for each storm: kind, update, seed; what was injected; how it ended; the score, also of the undisturbed run."""
    slowdown = [2.0] * (n_workers - 1) + [3.0]
    for seed, update in product(seeds, updates):
        undisturbed, settings = None, {**train, "update": update, "seed": seed}
        for kind in kinds:
            before = children()
            with labkit.connect(kind, n_workers, slowdown=slowdown) as lab:  # a fresh one each time: a storm may make it grow
                if undisturbed is None:
                    calm = labkit.train(problem, lab, name=f"calm-{update}-{seed}", **settings).wait(300)
                    undisturbed = calm.summary()["score"]
                row = trial(problem, lab, f"{kind}-{update}-{seed}", {**storm, "seed": seed}, settings)
            if left := children() - before:
                row["wrong"] += f" left behind: {left}"
            yield {"kind": kind, "update": update, "seed": seed, **row, "undisturbed": undisturbed}


def trial(problem, lab, name: str, storm: dict, settings: dict) -> dict:
    run = labkit.train(problem, lab, name=name, **settings)
    wrong, begun = [], time.monotonic()
    with chaos.Storm(run, lab, **storm) as raged:
        try:
            run.wait(300)
        except labkit.LabError as error:
            wrong.append(f"{run.state}: {error}")
    table = raged.table
    wrong += chaos.audit(run) if run.state != "running" else ["it did not end"]
    waits = chaos.losses(run, table)
    pushes = run.events.query("kind == 'push'")  # a loss while all samples are handed out makes everybody wait for those
    early = waits[waits.left > pushes.samples.max() * pushes.worker.nunique()]
    return {
        **{fault: int((table.fault == fault).sum()) for fault in FAULTS},
        "losses": len(waits),
        "waited_s": float(early.waited_s.max()) if len(early) else 0.0,
        "waited_at_the_end_s": float(waits.waited_s.max()) if len(waits) else 0.0,
        "seconds": round(time.monotonic() - begun, 1),
        "score": run.summary()["score"] if run.state == "done" else None,
        "wrong": "; ".join(wrong),
        "run": str(Path(run.path)),
    }


def children() -> set:
    """Processes of this one, 10 s after whatever ends them at most; what Python itself starts is left out."""
    limit = time.monotonic() + 10
    while True:
        own = psutil.Process()
        found = {p for p in own.children(recursive=True) if "resource_tracker" not in command(p)}
        found -= {
            p for p in found & set(own.children()) if "forkserver" in command(p)
        }  # workers are its children, and look like it
        if not found or time.monotonic() > limit:
            return {f"{p.pid} {command(p)[:60]}" for p in found}
        time.sleep(0.2)


def command(process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "resource_tracker"  # it has ended


# -- simulated: workers that are away for a twelfth of the time -------------------------------------------------------------


def away(n_workers: int, seconds: float, life_s: float, away_s: float, seed: int) -> list[tuple[float, int, float]]:
    """(seconds, worker, away) for `simulate`: each worker is there and away by turns, exponentially distributed with these means."""
    chance, failures = np.random.default_rng(seed), []
    for worker in range(n_workers):
        at = chance.exponential(life_s)
        while at < seconds:
            failures.append((at, worker, gone := chance.exponential(away_s)))
            at += gone + chance.exponential(life_s)
    return sorted(failures)


def goodput(
    updates: list, n_workers: int, seeds: list, run_dir: str, *, pass_s: float = 4.0, seconds: float = 900.0
) -> pd.DataFrame:
    """Simulated: samples that were merged over those of workers that are always there; a row for each update and seed.

    Workers live for five minutes on average and are then away for as long as makes a cluster in lock-step, which stands still whenever one is
    missing, keep the 27 % that Decoupled DiLoCo's paper (arXiv:2604.21428) reports of data-parallel training in its chaos.
    """
    there = 0.27 ** (1 / n_workers)  # of the time
    speed, batch, life_s = 100.0, 64, 300.0  # samples/s of each
    rows = []
    for update, seed in product(updates, seeds):
        failures = away(n_workers, 3 * seconds, life_s, life_s * (1 - there) / there, seed)
        samples, steps = round(n_workers * speed * seconds), max(1, round(pass_s * speed / batch))
        settings = {"samples": samples, "passes": 1, "local_steps": steps, "failures": failures, "seed": seed, "partition": "udpa"}
        run = labkit.simulate([speed] * n_workers, update=update, runs=run_dir, name=f"goodput-{update}-{seed}", **settings)
        took = float(run.events.seconds[run.events.kind == "merge"].max())
        gone = sum(min(end, took) - min(at, took) for at, _, away_s in failures for end in [at + away_s])
        kept = seconds / took
        living = 1 - gone / (n_workers * took)
        rows.append({"update": update, "seed": seed, "goodput": kept, "there": living, "of_the_living": kept / living})
    return pd.DataFrame(rows)
