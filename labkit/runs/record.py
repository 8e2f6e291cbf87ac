"""A run, read from its directory: settings, events, curve, weights, and its state or end.

    config.json  environment.json  layout.json  events.jsonl  status.json  checkpoints/<version>.npz  metrics.parquet
    summary.json for other programs (`labkit.runs.summary`); server.json while the run is running (`labkit.runs.server_file`)

It can be read during the run, after it, and from another kernel. Tables and numbers are made of the events
(`labkit.runs.analysis`). Each file is checked when it is read, for itself and against the others: what is wrong is refused by name
(`RunError`), and what can be made anew from the rest is, which is printed.

Base of `labkit.training.run.Run`; every figure reads it.
"""

from __future__ import annotations

import contextlib
import os
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from labkit import locks
from labkit.cards import Card, Carded, Line, Summary
from labkit.errors import RunError, file_path, plain_scalar, real, whole
from labkit.imports import by_value, rule_title
from labkit.names import Public
from labkit.partition import PARTITIONS
from labkit.runs import analysis, checkpoints, metrics, server_file
from labkit.runs import status as how_it_ended
from labkit.runs.config import FILE as CONFIG
from labkit.runs.config import RunConfig
from labkit.runs.events import VERSIONS, Table, effective
from labkit.runs.files import find_json
from labkit.updates import UPDATES

if TYPE_CHECKING:
    import pandas as pd


LEVELS = 5  # below a folder on which runs are looked for: runs/sweep/row/search/trials/trial is the deepest that is made here


class RunRecord(Carded, Public):
    """One training, read from its directory.

    Attributes
    ----------
    name, path, config
        The name (with the number, where another run of its name has taken its place), the directory and the settings of the run.
    """

    internal: ClassVar = frozenset(
        (
            "being_measured",
            "card",
            "kept_curve",
            "layout",
            "opened_problem",
            "read_curve",
            "read_summary",
            "recorded",
            "tested",
            "trained",
            "warn_of_edits",
        )
    )

    def __init__(self, path: str | Path) -> None:
        self._path, self._seen = file_path("path", path), None
        self.config = RunConfig.load(self._path)
        self._table: Table | None = None
        self._checked: tuple | None = None  # the table and the end that were found to fit each other
        self._said: set[str] = set()  # of what was made anew

    @property
    def name(self) -> str:
        """Its name; "first-run.1" where another run has taken its directory since, and it is kept beside that."""
        try:
            folder = self.path.name
        except RunError:  # it is gone
            folder = self._path.name
        name = self.config.name or folder
        return folder if folder.startswith(f"{name}.") and folder.removeprefix(f"{name}.").isdigit() else name

    @property
    def path(self) -> Path:
        """Where the run is now. Another run of its name may have taken its place; then it is kept under a number beside that."""
        path = self._path  # once: other threads may follow the run, too
        seen = _identity(path)
        if seen is None or seen != self._seen:  # another file than the last time: of this run still, as when it is resumed?
            id = _id(path)
            if id != self.config.id:
                kept = [it for it in path.absolute().parent.glob(f"{path.name}.*") if _id(it) == self.config.id]
                if kept:
                    path, seen = kept[0], _identity(kept[0])
                elif id is not None:
                    raise RunError(f"{path} holds another run now, and run {self.config.name} is not beside it any more.")
            self._path, self._seen = path, seen
        return path

    # -- its state -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "running", "done", "stopped" (by `stop`), or "failed" (also when it was cut off)."""
        return self.status()["state"]

    def status(self) -> dict:
        """State of the run with the reason, and the samples and versions that it reached once it has ended."""
        return self.recorded()

    def recorded(self) -> dict:
        """The status by the directory alone: how the run ended, or that its server is alive, or that it was cut off."""
        ended = self._ended() or {"state": "running", "reason": ""}
        call = self.config.resume_call(self.path)  # the run may have been moved, or set aside, since that was written
        ended = {**ended, "reason": re.sub(r"""labkit\.resume\(('[^']*'|"[^"]*")(, \w+=\w+)*\)""", lambda _: call, ended["reason"])}
        return {key: value for key, value in ended.items() if key != "events"}

    def _ended(self) -> dict | None:
        """`labkit.runs.status` of the run, made anew where it can be, or that it was cut off; None while it is running."""
        file = self.path / how_it_ended.FILE
        if not file.exists() and server_file.alive(self.path) is not False:
            return None
        try:
            if (ended := how_it_ended.read(self.path, self.config.id)) is not None:  # also if it ended just now
                return ended
            why = RunError(f"{file} is missing.")
        except RunError as error:
            why = error
        saved = checkpoints.versions(self.path)
        try:
            anew = how_it_ended.anew(self._fitting(None, saved), self.config, saved)
        except RunError:  # a crash may have left something at the end of the events
            anew = None
        if anew is None and file.exists():
            raise RunError(f"{why} No other file says how the run ended. Delete this one: the run then counts as cut off.") from why
        if anew is None:
            return {"state": "failed", "reason": f"cut off; {self.config.resume_call(self.path)} continues it"}
        with contextlib.suppress(OSError):
            how_it_ended.write(self.path, self.config.id, anew)
        self._say(f"{why} It was made anew from the events of the run: {anew['state']}.")
        return anew

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            print(what)

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

    # -- what happened -------------------------------------------------------------------------------------------

    @property
    def events(self) -> pd.DataFrame:
        """One row an event, in order (columns: `labkit.runs.events.COLUMNS`)."""
        while True:
            ended, saved = self._ended(), checkpoints.versions(self.path)  # before the table, which may grow meanwhile
            try:
                return _table(self._fitting(ended, saved).copy())
            except RunError:
                if self._ended() == ended:
                    raise
                # else it was resumed meanwhile, or has ended: the one was read before that, the other after it

    def _fitting(self, ended: dict | None, saved: list[int]) -> pd.DataFrame:
        """The events, of which only what was added is read, and which fit how the run `ended` and the versions `saved`."""
        path = self.path
        reader, checked = self._table, self._checked  # once: other threads may read the run, too
        if reader is None or reader.path != path:
            reader = self._table = Table(path)
        table = reader.read()
        if checked is None or checked[0] is not table or checked[1:] != (ended, saved):
            how_it_ended.check(path, table, self.config, ended, saved)
            self._checked = table, ended, saved
        return table

    def curve(self) -> pd.DataFrame:
        """Learning curve of the global weights: seconds, samples, version, and loss, score and whatever else the problem measures on the
        test set; a row a retained version.

        With `ema=` columns `ema_score`, `ema_loss` and so on are the same of the average of the global weights. It is measured after the run, so that measuring it does not slow the run. Where steps returned more than a loss, columns
        `train_...` have the means of what they returned since the row before (`train_loss` for the loss).

            run.curve().hvplot.line("seconds", "score")     # after labkit.plots.extension(), or import hvplot.pandas
        """
        curve = self._curve()
        if curve.empty and self.config.without_weights:
            self._say(f"{self._timed_alone()} Its curve is empty.")
        return curve

    def _timed_alone(self) -> str:
        return (
            f"Run {self.name} was simulated without numerics: it has times alone, no weights and no scores. labkit.simulate(..., "
            "numerics=True) trains the network, too."
        )

    def _curve(self) -> pd.DataFrame:
        why = None
        if (self.path / metrics.FILE).exists():
            try:
                return _table(self._with_training(self.kept_curve()))
            except RunError as error:
                why = error
        elif self.state == "running":
            raise RunError(f"run {self.name} is still running; its curve is measured at the end. Use run.wait() first.")
        try:
            curve = self._measured()
        except Exception as error:
            if why is None:
                raise
            raise RunError(f"{why} It cannot be measured anew: {error}") from error
        if why is not None:
            self._say(f"{why} It was measured anew.")
        return _table(self._with_training(curve))

    def kept_curve(self) -> pd.DataFrame:
        """The curve as it was measured and kept, without what steps of training returned; RunError where it is damaged or an older one."""
        file, (*_, newest) = self.path / metrics.FILE, (-1, *checkpoints.versions(self.path))
        curve = metrics.read(self.path, self.config.id, self.config.format > 3)
        if newest > (curve.version.max() if len(curve) else -1) and self.state == "done":
            raise RunError(f"{file} is an older one: the run goes on to version {newest}.")
        if self.config.format <= 3 and len(curve):  # it holds no digest
            events = effective(self.events)
            merges = events[events.kind.isin(VERSIONS)].groupby("version")[["seconds", "total"]].max()
            merges.loc[0] = 0.0
            if not (merges.reindex(curve.version).to_numpy() == curve[["seconds", "samples"]].to_numpy()).all():
                raise RunError(f"{file} is damaged: its seconds and samples are not those of the events.")
        return curve

    def read_curve(self) -> tuple[pd.DataFrame | None, str]:
        """The curve, as far as it is measured already; where it is not, None and why it cannot be read, "" where there is none."""
        try:
            return self.kept_curve() if (self.path / metrics.FILE).exists() else None, ""
        except RunError as error:
            return None, str(error)

    def _with_training(self, curve: pd.DataFrame) -> pd.DataFrame:
        if not self.events.metrics.notna().any():
            return curve
        trained = self.trained(curve)
        return curve.join(trained[[name for name in trained if name not in curve]])  # a problem may measure one of its name

    def trained(self, curve: pd.DataFrame) -> pd.DataFrame:
        """What the steps of training returned, `train_loss` and so on, for each row of the curve: means since the row before."""
        return analysis.trained(self.events, curve)

    @property
    def _measurable(self) -> bool:
        """Can the curve be measured here, without importing what the record names?"""
        return False

    @property
    def being_measured(self) -> bool:
        """Does the kernel that has trained it still hold the directory of the run that has ended, as it does until the curve is measured?"""
        if (self.path / metrics.FILE).exists() or not locks.held(self.path, self.config.id):
            return False
        return self.recorded()["state"] != "running"

    @property
    def _how_to_measure(self) -> str:
        if self.being_measured:
            return "The kernel that has trained it is measuring it now: ask again in a moment."
        path = repr(str(self.path))
        if (lost := by_value(self.config.problem)) is not None:
            return f"{lost!r} is in the record by its name alone: make its problem again, and labkit.load_run({path}, problem=problem).curve() does it."
        return f"run = labkit.load_run({path}), run.problem() and run.curve() do it, if you trust who made this run."

    def _measured(self) -> pd.DataFrame:
        raise RunError(f"the curve of run {self.name} is not measured yet. {self._how_to_measure}")

    @property
    def test_score(self) -> float | None:
        """Score of the newest version on the test set: the last of `curve()`, `summary()["score"]`; None until the curve is measured, and
        where the problem has no score."""
        if not (self.path / "metrics.parquet").exists():
            return None
        curve = self.curve()
        return float(curve.score.iloc[-1]) if len(curve) and curve.score.notna().iloc[-1] else None

    def allocations(self) -> pd.DataFrame:
        """Samples by worker: worker, pass (number of the allocation), samples (added), total (held then)."""
        events = self.events
        table = events.loc[events.kind == "allocate", ["worker", "pass", "samples", "total"]]
        return _table(table.astype(int).reset_index(drop=True))

    def balance(self) -> pd.DataFrame:
        """How even the work was: mean_s, max_s and ratio = mean T / max T of each local pass that all who were here have reached.

        T is the time of the local pass: optimiser steps and score, emulated sleep included. A last pass that the end of the run
        has cut short does not count.

            run.balance().hvplot.line("pass", "ratio", ylim=(0, 1))     # after labkit.plots.extension(), or import hvplot.pandas
        """
        return _table(analysis.balance(self.events))

    def timeline(self) -> pd.DataFrame:
        """What each worker did when: worker, activity ("compute", "wait" or "exchange"), start, end (s of the run); a row an interval.

        How a worker's time is divided: `labkit.runs.analysis`. It can be read while the run is running.

            table = run.timeline().assign(seconds=lambda table: table.end - table.start)
            table.pivot_table(index="worker", columns="activity", values="seconds", aggfunc="sum").hvplot.barh(stacked=True)
        """
        table = analysis.spans(self.events)
        return table.loc[table.kind != "refill", ["worker", "activity", "start", "end"]].reset_index(drop=True)

    def membership(self) -> pd.DataFrame:
        """Who was here when: worker, incarnation, start, end (s of the run), message (why it was gone; "" for an ordinary end)."""
        table = analysis.intervals(self.events)
        here = table.loc[table.kind == "here", ["worker", "incarnation", "start", "end", "message"]]
        return here.astype({"incarnation": int}).reset_index(drop=True)

    def staleness(self) -> pd.DataFrame:
        """How stale each merge was: worker, seconds (of the run), version (that it made), staleness (versions that others had made since
        its worker began from one); a row a merge. Merges that a resumed run has made again count once.

            run.staleness().hvplot.hist("staleness", by="worker", bins=range(10))
        """
        return analysis.staleness(self.events)

    def contributions(self) -> pd.DataFrame:
        """What each worker gave: worker, samples (its share of those that were trained on), weight (its share of the absolute coefficients
        with which pushes were merged); shares from 0 to 1, a row a worker. Empty until something has been merged.

            run.contributions().hvplot.bar("worker", ["samples", "weight"])
        """
        return analysis.contributions(self.events)

    def summary(self) -> dict:
        """The cost card: settings, final score and loss on the test set, time, throughput, waiting, staleness, balance, traffic.

        Samples count once, also where a run was cut off and made some again; time, waiting and traffic are all that it cost. Of the
        workers' time `wait_share` went into waiting for each other, `send_share` into exchanges and `load_share` into reading batches
        (None where that was not recorded). Half of the merges have a staleness of at most `staleness_p50`, 95 % of at most `staleness_p95`,
        each one that occurred, as in figures. Where no curve was measured, and it cannot be without importing what the record names, score and
        loss are None, which is printed.
        """
        card, is_measured = self.read_summary()
        if not is_measured:
            self._say(f"No score of run {self.name} is measured yet. {self._how_to_measure}")
        return card

    def read_summary(self) -> tuple[dict, bool]:
        """`summary()`, of which nothing is printed, and whether the curve is there, if the run has ended."""
        state = self.state
        measured = state != "running" and (self._measurable or (self.path / metrics.FILE).exists())
        return self.card(state, self._curve() if measured else None), measured or state == "running"

    def card(self, state: str, curve: pd.DataFrame | None) -> dict:
        """`summary()` of a run in this state with this curve; without a curve no score and no loss."""
        return Summary(
            {
                "name": self.name,
                "update": rule_title(self.config.update),
                "partition": rule_title(self.config.partition),
                "state": state,
                "origin": self.origin,
                **analysis.summary(self.events, self.config, curve),
            }
        )

    def time_to(self, score: float) -> float | None:
        """Seconds until the global weights first reached `score` on the test set; None if they never did.

        Between retained versions the curve is interpolated.
        """
        score, curve, sign = real("score", score), self.curve(), -1 if self.config.lower_is_better else 1
        seconds = analysis.crossing(curve.seconds.to_numpy(), sign * curve.score.to_numpy(), sign * score)
        return None if np.isnan(seconds) else seconds

    # -- the weights ---------------------------------------------------------------------------------------------

    @property
    def layout(self) -> checkpoints.Layout:
        """Which entries of the flat vector belong to which tensor (`labkit.runs.checkpoints.Layout`)."""
        try:
            return checkpoints.Layout.load(self.path, self.config.id)
        except RunError as error:
            return self._layout_anew(error)

    def _layout_anew(self, why: RunError) -> checkpoints.Layout:
        raise why

    def flat(self, version: int | str | None = None) -> np.ndarray:
        """The global weights as one flat float32 vector, by default of the newest version; "ema" for their average up to there."""
        return self._read(version)

    def _read(self, version: int | str | None, writable: bool = False) -> np.ndarray:
        version = plain_scalar(version)
        if (average := isinstance(version, str) and version == "ema") and not self.config.ema:
            raise RunError(f"run {self.name} makes no average of its weights. Give its problem ema=0.999, say, and train it again.")
        if version is None or average:
            versions = checkpoints.versions(self.path)
            if not versions and self.config.without_weights:
                raise RunError(self._timed_alone())
            if not versions:
                raise RunError(f"run {self.name} has no weights in {self.path / checkpoints.FOLDER}.")
            if (last := self._last_saved()) > versions[-1]:
                versions = checkpoints.versions(self.path)  # it may have ended since
            version = versions[-1]
            if last > version:
                raise RunError(
                    f"{checkpoints.file_of(self.path, last)} is missing, the last version of run {self.name}. Put a copy of it back; "
                    f"the newest that is there is version {version}."
                )
        version = whole("version", version, 0)
        if average:
            return checkpoints.read_average(self.path, version, self.layout.size, writable=writable)
        return checkpoints.read_weights(self.path, version, self.layout.size, writable=writable)

    def _last_saved(self) -> int:
        """The last version that was saved, by the record; -1 while the run is running, or where it does not say."""
        ended = self._ended()
        if ended is None:
            return -1
        if ended["state"] in ("done", "stopped") and "version" in ended:
            return ended["version"]
        events = effective(self.events)
        saved = events.version[events.kind == "checkpoint"].max()
        return -1 if np.isnan(saved) else int(saved)

    def weights(self, version: int | str | None = None) -> dict[str, np.ndarray]:
        """The global weights by name, by default of the newest version: float32 arrays are parts of one that was read for them."""
        return self.layout.split(self._read(version, writable=True))

    def _card(self) -> Card:
        status, config = self.status(), self.config
        state, running = status["state"], status["state"] == "running"
        reason = f": {status['reason']}" if status.get("reason") else ""
        title, rows, line = f"Run {self.name}: {self.label}", {"state": f"{state}{reason}"}, None
        curve, unread = self.read_curve()
        try:
            events, results = self.events, self.card(state, curve)
        except RunError as error:
            return Card(title, rows=rows | {"events": str(error), "directory": str(self.path)})
        rows |= {"samples": f"{status.get('samples', results['samples']):,} of {config.budget:,}"}
        rows |= {"curve": unread} if unread else {}
        scored = events[events.kind.isin(["push", "score"]) & events.score.notna()]
        if curve is not None and curve.score.notna().sum():
            rows["test score"] = f"{results['score']:.3f}"
            line = _line("test score", curve.score.dropna(), f"{len(curve)} versions")
        elif len(scored):
            rows["held-out score"] = f"{scored.groupby('worker').score.last().mean():.3f} (mean over the workers)"
            line = _line("held-out score", scored.score.rolling(max(1, config.n_workers), 1).mean(), f"{len(scored)} local passes")
        rows |= {"loss on the test set": results["loss"]} if results["loss"] is not None else {}
        rows |= {"seconds": results["seconds"], "samples/s": results["samples_per_s"], "versions": results["versions"]}
        rows |= {"simulated range": self._spread()} if self._spread() else {}
        rows |= {"workers": f"{config.n_workers} ({config.kind}{', emulated speeds' if config.emulated else ''})"}
        rows |= {"data": "synthetic"} if config.synthetic else {}
        rows["directory"] = str(self.path)
        return Card(title, rows=rows, line=line, calls=self._next(running, state))

    def _next(self, running: bool, state: str) -> dict[str, str]:
        """What to do with the run now, by the calls."""
        if running:
            return {
                "run.progress()": "follows it",
                "run.live()": "draws it while it goes",
                "run.wait()": "waits until it has ended",
                "run.stop()": "ends it",
            }
        again = (
            {self.config.resume_call(self.path): "goes on from its last checkpoint"}
            if state != "done" and self.origin == "live"
            else {}
        )
        network = {"run.predict(x)": "applies it to raw samples"}
        if "problem" in self.config.by_name_alone and not self._measurable:
            network = {
                f"labkit.load_run({str(self.path)!r}, problem=problem)": "reads it with its model, of which the record has the name"
            }
        return {
            **again,
            "run.summary()": "the cost card",
            "run.curve()": "the learning curve",
            "labkit.plots.curves(run)": "draws it",
            **network,
        }

    def __repr__(self) -> str:
        try:
            status = self.status()
        except RunError as error:
            return f"<Run {self.name}: damaged: {error}>"
        done = f", {status['samples']} of {self.config.budget} samples" if "samples" in status else ""
        reason = f": {status['reason']}" if status.get("reason") else ""
        source = (self.config.origin or {}).get("run")
        label = f"{self._strategy} ({self.origin} of {source})" if source else self.label
        spread = f", {self._spread()}" if self._spread() else ""
        return f"<Run {self.name}: {label}, {self.state}{reason}{done}{spread}>"

    def _spread(self) -> str:
        """Of a simulated run: between which times it lies, by the spread of what was recorded."""
        low, high = (self.config.origin or {}).get("range_s") or (None, None)
        return "" if low is None else f"{low:.3g} to {high:.3g} s by the spread of what was recorded"


def directories(path: str | Path) -> list[Path]:
    """What a path means: of a folder of runs, or of folders with runs, as sweeps and searches are, their directories, the nearest first and by
    name; else itself, whether there is a run or not. Not looked into are runs, what is hidden, folders that may not be read, and what a link
    leads to once more."""
    path, inside = file_path("path", path), []
    level, seen = [] if _is_run(path) else [path], {os.path.realpath(path)}
    for _ in range(LEVELS):
        below = sorted(chain.from_iterable(map(_folders, level)), reverse=True)
        new = {real: folder for folder in below if (real := os.path.realpath(folder)) not in seen}  # of two ways the first by name
        seen |= new.keys()
        inside += sorted(filter(_is_run, new.values()))
        level = [folder for folder in new.values() if not _is_run(folder)]
    return inside or [path]


def _is_run(folder: Path) -> bool:
    try:
        return (folder / CONFIG).exists()
    except OSError:  # a name that is too long
        return False


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry) for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
    except OSError:  # no folder, or none that may be read, or it has gone meanwhile
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Also a link to one; not a link to itself, of which `DirEntry.is_dir` raises an error."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry))


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    """A table that is shown rounded; the module with it needs pandas, which a server does without."""
    from labkit.tables import Table

    return Table(frame)


def _line(name: str, values: pd.Series, over: str) -> Line:
    first, last = (float(values.iloc[at]) for at in (0, -1))
    return Line(values.tolist()[:: max(1, len(values) // 200)], f"{name} over {over}: from {first:.3f} to {last:.3f}")


def _identity(run: Path) -> tuple[int, int] | None:
    """Of the file with the settings, which is another one when it is written again."""
    try:
        about = os.stat(run / CONFIG)
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def _id(run: Path) -> str | None:
    found = find_json(run / CONFIG)
    return found.get("id", "") if isinstance(found, dict) else None
