"""A run: the handle that `train` returns, and what `load_run` reads back from a run directory.

Everything that it tells comes from the directory (`labkit.runs.events`), so a run can be read while it goes, after it, and from
another kernel. The handle never blocks the kernel except where it says so (`wait`).

Made by `labkit.training.train`; read by `labkit.plots`, `labkit.experiments.sweep` and users.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit.errors import RunError
from labkit.imports import rule_title
from labkit.partition import PARTITIONS
from labkit.runs import checkpoints
from labkit.runs import events as record
from labkit.runs import server_file as presence
from labkit.runs.config import RunConfig
from labkit.runs.files import read_json
from labkit.updates import UPDATES

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from labkit.problems.problem import Problem
    from labkit.training.attach import Attached
    from labkit.training.supervisor import Supervisor

_handles: weakref.WeakSet[Run] = weakref.WeakSet()


class Run:
    """One training: its directory, and while it goes the way to follow and stop it.

    Attributes
    ----------
    name, path, config
        The name, the directory and the settings of the run.
    """

    def __init__(self, path: str | Path, *, problem: Problem | None = None, session: Supervisor | None = None) -> None:
        self.path = Path(path)
        self.config = RunConfig.load(self.path)
        self.name = self.config.name or self.path.name
        self._problem = problem
        self._session: Supervisor | Attached | None = session
        self._events: tuple[int, pd.DataFrame] | None = None
        _handles.add(self)

    # -- while it goes -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "running", "done", "stopped" (by `stop`), or "failed" (also when it was cut off)."""
        return self._session.state if self._session else self.recorded()["state"]

    def status(self) -> dict:
        """Where the run stands: state, samples, budget, version, seconds, and loss and score of each worker."""
        return self._session.status() if self._session else self.recorded()

    def recorded(self) -> dict:
        """What the directory alone tells: how the run ended, or that its server lives, or that it was cut off."""
        status = self.path / "status.json"
        if not status.exists() and presence.alive(self.path) is not False:
            return {"state": "running", "reason": ""}
        if status.exists():  # also if it ended just now
            return read_json(status)
        return {"state": "failed", "reason": f"cut off; labkit.resume({str(self.path)!r}) goes on"}

    def attach(self) -> Run:
        """Follow and steer a run that goes in another kernel: its state, `status`, `wait`, `stop`, `progress`; returns the run.

        Raises
        ------
        RunError
            It does not go any more, or its server cannot be reached from here.
        """
        if self._session is None:
            from labkit.training.attach import Attached

            self._session = Attached(self)
        return self

    def wait(self, timeout: float = 3600.0) -> Run:
        """Block until the run has ended and its curve is measured; returns the run.

        An interrupt (Ctrl-C, or the square in the notebook) stops the run and keeps what there is.

        Raises
        ------
        WorkerError, LabError
            The run failed; the first failing worker's error with its traceback.
        RunError
            It still goes after `timeout` seconds, or in another kernel (`attach`).
        """
        self._check_attached()
        if self._session:
            try:
                if not self._session.wait(timeout):
                    raise RunError(f"run {self.name} still goes after {timeout:g} s. Wait again, or run.stop().")
            except KeyboardInterrupt:
                self.stop()
                raise
            self._session.raise_error()
        return self

    def stop(self, timeout: float = 30.0) -> Run:
        """End the run now; everything so far can be read. Stopping twice, or a run that has ended, is fine."""
        self._check_attached()
        if self._session:
            self._session.stop(timeout)
        return self

    def progress(self) -> None:
        """Show how far the run is: a bar that moves by itself in a notebook; elsewhere a line every few seconds until the end."""
        from labkit.plots.progress import show

        self._check_attached()
        show(self)

    def live(self) -> Any:
        """A figure that grows with the run (see `labkit.plots.live`)."""
        from labkit.plots.live import live

        return live(self)

    def _check_attached(self) -> None:
        if self._session is None and self.state == "running":
            raise RunError(f"run {self.name} goes in another kernel. Call run.attach() first.")

    # -- what happened -------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Name of the strategy, as figures show it: "FedBuff + IDPA"; a run that no cluster has made is marked."""
        return f"{self._strategy} ({self.origin})" if self.origin in ("counterfactual", "simulated") else self._strategy

    @property
    def _strategy(self) -> str:
        update, partition = (rule_title(self.config[what]) for what in ("update", "partition"))
        label = UPDATES[update].__name__ if update in UPDATES else update  # a rule of the user's own
        shares = PARTITIONS[partition].__name__ if partition in PARTITIONS else partition
        return label if update == "allreduce" and partition == "udpa" else f"{label} + {shares}"

    @property
    def origin(self) -> str:
        """ "live", "replay" (the same again), "counterfactual" (the same arrivals, another rule) or "simulated"."""
        return self.config.origin["kind"] if self.config.origin else "live"

    @property
    def events(self) -> pd.DataFrame:
        """One row an event, in order (columns: `labkit.runs.events.COLUMNS`)."""
        file = self.path / "events.jsonl"
        size = file.stat().st_size if file.exists() else 0
        if self._events is None or self._events[0] != size:
            self._events = (size, record.read_events(self.path))
        return self._events[1].copy()

    def curve(self) -> pd.DataFrame:
        """Learning curve of the global weights on the test set: seconds, samples, version, loss, score; a row a kept version.

        It is measured after the run, so that measuring it does not slow the run.
        """
        import pandas as pd

        file = self.path / "metrics.parquet"
        if file.exists():
            return pd.read_parquet(file)
        if self.state == "running":
            raise RunError(f"run {self.name} still goes; its curve is measured at the end. Use run.wait() first.")
        from labkit.training.evaluation import measure

        lab = self._session.lab if self._session else None
        return measure(self, self.problem(), lab if lab and not lab.closed and lab.free() else None)

    def allocations(self) -> pd.DataFrame:
        """Who was given how many samples: worker, pass (number of the allocation), samples (added), total (held then)."""
        events = self.events
        table = events.loc[events.kind == "allocate", ["worker", "pass", "samples", "total"]]
        return table.astype(int).reset_index(drop=True)

    def balance(self) -> pd.DataFrame:
        """How even the work was: mean_s, max_s and ratio = mean T / max T of each local pass that all who were here have reached.

        T is the time of the local pass: optimiser steps and score, emulated sleep included. A last pass that the end of the run
        has cut short does not count.
        """
        import pandas as pd

        events = record.effective(self.events)
        pushes = events[events.kind == "push"]
        by_worker = pushes.groupby("worker").samples
        pushes = pushes[(pushes.samples >= by_worker.shift(1, fill_value=0)) | by_worker.shift(-1).notna()]
        if pushes.empty:
            return pd.DataFrame(columns=["pass", "mean_s", "max_s", "ratio"])
        took = pushes.compute_s + (pushes.score_s if pushes.score.notna().all() else 0.0)  # now and then a score says nothing
        times = took.groupby([pushes["pass"], pushes.worker]).sum().unstack()
        away = times.isna() & times.bfill().notna()  # who comes counts on from the quickest: it was not here before
        lost = times.columns.intersection(record.lost(events))
        away[lost] = times[lost].isna()
        times = times[(times.notna() | away).all(axis=1) & (times.count(axis=1) >= min(2, times.shape[1]))]
        table = pd.DataFrame({"mean_s": times.mean(axis=1), "max_s": times.max(axis=1)})
        table["ratio"] = table.mean_s / table.max_s
        return table.reset_index().astype({"pass": int})

    def summary(self) -> dict:
        """The cost card: settings, final score and loss, time, throughput, waiting, staleness, balance, traffic.

        Samples count once, also where a run was cut off and made some again; time, waiting and traffic are all that it cost.
        """
        events = self.events
        merges = record.effective(events).query("kind == 'merge'")
        pushes, releases = (events[events.kind == kind] for kind in ("push", "release"))
        curve = self.curve() if self.state != "running" else None
        n_workers = max(1, self.config.n_workers)
        seconds = float(merges.seconds.max()) if len(merges) else 0.0
        samples = float(merges.samples.sum())
        worked = float(pushes.compute_s.sum() + events.score_s.sum())
        leaves = events[events.kind == "leave"]
        sent, waited = float(pushes.send_s.sum()), float(sum(table.wait_s.sum() for table in (releases, pushes, leaves)))
        busy = worked + sent + waited
        balance = self.balance()
        later = balance.loc[balance["pass"] >= 2, "ratio"]
        coefficients = merges.groupby("worker").coefficient.sum()
        total = float(coefficients.sum())
        return {
            "name": self.name,
            "update": rule_title(self.config.update),
            "partition": rule_title(self.config.partition),
            "state": self.state,
            "origin": self.origin,
            "score": None if curve is None or curve.empty else float(curve.score.iloc[-1]),
            "loss": None if curve is None or curve.empty else float(curve.loss.iloc[-1]),
            "seconds": seconds,
            "samples": int(samples),
            "samples_per_s": samples / seconds if seconds else 0.0,
            "versions": int(merges.version.max()) if len(merges) else 0,
            "wait_share": waited / busy if busy else 0.0,
            "send_share": sent / busy if busy else 0.0,
            "staleness_p50": float(merges.staleness.median()) if len(merges) else 0.0,
            "staleness_p95": float(merges.staleness.quantile(0.95)) if len(merges) else 0.0,
            "balance": float(later.mean()) if len(later) else None,
            "weight_per_worker": {int(w): float(c) / total for w, c in coefficients.items()} if total else {},
            "exchange": self.config.exchange,
            "overlap": self.config.overlap,
            "bytes": int(pushes.bytes.sum() + releases.bytes.sum()),
            "checkpoints": int((record.effective(events).kind == "checkpoint").sum()),
            "n_workers": n_workers,
            "seed": self.config.seed,
        }

    def time_to(self, score: float) -> float | None:
        """Seconds until the global weights first reached `score` on the test set; None if they never did.

        Between kept versions the curve is taken as straight.
        """
        curve = self.curve()
        reached = np.flatnonzero(curve.score.to_numpy() >= score)
        if not len(reached):
            return None
        last = reached[0]
        if last == 0:
            return float(curve.seconds.iloc[0])
        (t0, q0), (t1, q1) = curve[["seconds", "score"]].iloc[[last - 1, last]].to_numpy()
        return float(t0 + (t1 - t0) * (score - q0) / (q1 - q0))

    # -- the weights ---------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Any:
        """Which entries of the flat vector belong to which tensor (`labkit.runs.checkpoints.Layout`)."""
        stored = read_json(self.path / "layout.json")
        return checkpoints.Layout(
            tuple(stored["names"]), tuple(tuple(s) for s in stored["shapes"]), stored["n_params"], stored["n_buffers"]
        )

    def flat(self, version: int | None = None) -> np.ndarray:
        """The global weights as one flat float32 vector; the newest kept version unless told which."""
        if version is None:
            versions = checkpoints.versions(self.path)
            if not versions:
                raise RunError(f"run {self.name} has kept no weights in {self.path / 'checkpoints'}.")
            version = versions[-1]
        return checkpoints.read_weights(self.path, version, self.layout.size)

    def weights(self, version: int | None = None) -> dict[str, np.ndarray]:
        """The global weights by name; the newest kept version unless told which."""
        return {name: np.array(part) for name, part in self.layout.split(self.flat(version)).items()}

    def problem(self) -> Problem:
        """What was trained. A model that was written in a notebook cell is known only to the kernel that trained it."""
        if self._problem is None:
            from labkit.problems.problem import problem_from_config

            self._problem = problem_from_config(self.config.problem)
        return self._problem

    def model(self, version: int | None = None) -> torch.nn.Module:
        """The torch module that holds the global weights, on the CPU, in evaluation mode."""
        import torch

        from labkit.models.flat import flatten

        module = self.problem().build(self.config.seed)
        flat, *_ = flatten(module)
        flat.copy_(torch.from_numpy(np.array(self.flat(version))))
        return module.eval()

    def __repr__(self) -> str:
        status = self.status()
        done = f", {status['samples']} of {self.config.budget} samples" if "samples" in status else ""
        reason = f": {status['reason']}" if status.get("reason") else ""
        source = (self.config.origin or {}).get("run")
        label = f"{self._strategy} ({self.origin} of {source})" if source else self.label
        return f"<Run {self.name}: {label}, {self.state}{reason}{done}>"


def moved(old: Path, new: Path) -> None:
    """A run directory has been renamed: the handles that this process has on it follow it."""
    for run in list(_handles):
        if run.path.absolute() == old:
            run.path = new


def load_run(path: str | Path, *, problem: Problem | None = None) -> Run:
    """Read a run back from its directory; `problem` where its model was written in a notebook cell."""
    path = Path(path)
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.iterdir() if (p / "config.json").exists()) if path.parent.is_dir() else []
        raise RunError(f"there is no run at {path}." + (f" Runs beside it: {', '.join(near)}." if near else ""))
    return Run(path, problem=problem)


def compare(runs: Iterable[Run]) -> pd.DataFrame:
    """The cost cards of several runs, a row a run."""
    import pandas as pd

    table = pd.DataFrame([{"run": run.label, **run.summary()} for run in runs])
    return table.drop(columns="weight_per_worker").set_index("run") if len(table) else table
