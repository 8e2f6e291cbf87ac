"""What the tests of figures share: a run that was played against a clock, and how to look into a figure.

Used by the tests of this folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from labkit.runs.events import COLUMNS
from labkit.runs.record import RunRecord
from tests.helpers import settings


class Recorded:
    """What the figures read of a run; made by playing `passes` local passes of uneven workers against a clock."""

    timeline, membership, staleness, contributions = (
        RunRecord.timeline,
        RunRecord.membership,
        RunRecord.staleness,
        RunRecord.contributions,
    )

    def __init__(self, path: Path, name="small", update="AGWU", slowdown=(1, 4), passes=7, seed=0, emulated=True):
        self.name, self.path, self.label, self.state = name, path / name, f"{update} + IDPA", "done"
        about = {"passes": passes, "seed": seed, "emulated": emulated, "problem": {"model": "lenet"}}
        about |= {"update": {"name": update.lower()}, "partition": {"name": "idpa"}, "n_workers": len(slowdown)}
        self.config = settings().replace(name=name, workers=[{"index": i, "slowdown": s} for i, s in enumerate(slowdown)], **about)
        self.rows, self.barrier, self.test_score = [], update == "SGWU", None
        if passes:
            self._play(np.random.default_rng(seed), passes, slowdown)
        self.events = pd.DataFrame(self.rows, columns=COLUMNS)
        self.path.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in self.rows]
        (self.path / "events.jsonl").write_text("".join(line + "\n" for line in lines))

    def _play(self, random, passes, slowdown):
        m = len(slowdown)
        clock, version, base = [0.0] * m, 0, [0] * m
        waiting = []  # (worker, pushed at)
        for i in range(m):
            self._event(0.0, "join", i)
            self._event(0.0, "release", i, version=0, wait_s=0.0)
        left = [passes] * m
        while any(left) or waiting:
            if any(left):
                i = min((i for i in range(m) if left[i] and i not in [w for w, _ in waiting]), key=lambda i: clock[i])
                compute, exchange = 0.5 * slowdown[i] ** 0.3 * random.uniform(0.9, 1.1), random.uniform(0.01, 0.03)
                clock[i] += exchange + compute + 0.02
                left[i] -= 1
                self._event(
                    clock[i], "push", i, **{"pass": passes - left[i]}, samples=300 // slowdown[i], base_version=base[i],
                    compute_s=compute, score_s=0.02, staleness=version - base[i], send_s=exchange,
                    score=1 - 0.9 * 0.9 ** (passes - left[i]), loss=0.5, bytes=900,
                )  # fmt: skip
                waiting.append((i, clock[i]))
            if self.barrier and len(waiting) < m:
                continue
            now = max(at for _, at in waiting)
            version += 1
            for i, _ in waiting:
                self._event(
                    now,
                    "merge",
                    i,
                    version=version,
                    coefficient=1 / m / slowdown[i] ** 0.5,
                    staleness=version - 1 - base[i],
                )
                base[i] = version
            for i, at in waiting:
                self._event(now + 0.01, "release", i, version=version, wait_s=now - at)
                clock[i] = now + 0.01
            waiting = []
        for i in range(m):
            self._event(clock[i], "leave", i)
        self.rows.sort(key=lambda row: row["seconds"])
        for seq, row in enumerate(self.rows):
            row["seq"] = seq

    def _event(self, seconds, kind, worker, **fields):
        self.rows.append({"time": 1e9 + seconds, "seconds": seconds, "kind": kind, "worker": worker, "incarnation": 0, **fields})

    def curve(self):
        if not self.rows:
            return pd.DataFrame(columns=["seconds", "samples", "version", "loss", "score"])
        pushes = self.events[self.events["kind"] == "push"]
        seconds = np.concatenate([[0.0], pushes["seconds"].astype(float)])
        score = (
            0.95 - 0.85 * np.exp(-seconds / (1.5 if not self.barrier else 2.5)) + 0.01 * np.sin(seconds * 7 + self.config["seed"])
        )
        return pd.DataFrame(
            {
                "seconds": seconds,
                "samples": np.concatenate([[0.0], pushes["samples"].astype(float).cumsum()]),
                "score": score,
            }
        )

    def balance(self):
        busy = self.events[self.events["kind"] == "push"].pivot(index="pass", columns="worker", values="compute_s")
        table = pd.DataFrame({"pass": busy.index, "mean_s": busy.mean(axis=1), "max_s": busy.max(axis=1)})
        return table.assign(ratio=table["mean_s"] / table["max_s"]).reset_index(drop=True)


def title(figure, backend="bokeh"):
    import holoviews as hv

    return hv.Store.lookup_options(backend, figure, "plot").kwargs["title"]


def note(figure):
    """The line under the title, as a page of the figure has it for who cannot see it."""
    import holoviews as hv

    return hv.render(figure, backend="bokeh").html_attributes["aria-label"].removeprefix(f"{title(figure)}. ")


def elements(figure, kind):
    """The elements of one kind in a figure, by label."""
    return {element.label: element for element in figure.traverse(lambda element: element, [kind])}


def rates(*samples_per_s, slowdown):
    return pd.DataFrame({"worker": range(len(samples_per_s)), "samples_per_s": samples_per_s, "slowdown": slowdown})
