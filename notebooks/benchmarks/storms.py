"""Runs in storms: the same training undisturbed and under random faults, and what became of it.

Used by the chaos benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

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
        found = {p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in command(p)}
        if not found or time.monotonic() > limit:
            return {f"{p.pid} {command(p)[:60]}" for p in found}
        time.sleep(0.2)


def command(process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return "resource_tracker"  # it has ended
