"""What a search has asked and been told: the log on the disk, and the sampler (Optuna's) that makes the next point of it.

    log.jsonl    {"ask": 3, "point": {"lr": 0.01}}   {"begin": 3, "workers": [0, 1]}   {"report": 3, "step": 1, "value": 0.4}
                 {"end": 3, "score": 0.9}   {"tell": 3, "state": "done", "value": 0.9}   {"leave": 3} (its run is to be made again)

The log is the truth. Each line is on the disk before anything follows from it; Optuna's study is made of it. The sampler is made
anew for each trial, with a seed from the number of the trial: a point depends on the lines before it in the log and on nothing
else. So a search that was cut off goes on as if it had not been, and `replay` asks a new study the same questions in the
same order, and gets the same points, however many blocks there were.

Used by `labkit.experiments.search`.
"""

import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import TrialState

from labkit.errors import RunError
from labkit.experiments.copies import CONSTRAINT, Journal, quiet
from labkit.experiments.pruning import PRUNERS
from labkit.experiments.space import Parameter, Space, suggest
from labkit.runs.files import read_lines_since

FILE = "log.jsonl"
STORAGE = "optuna.log"  # a copy that optuna-dashboard opens
# Of a sampler: the parameters that all trials have, found so far. Each new one would go through all trials for them.
CARRIED = ("_search_space", "_intersection_search_space")
ROUNDING = 1e-6  # of a range (of its logarithm): what other CPUs may make of a point. Two points that were drawn are further apart.
METHODS = ("gp", "evolution", "tpe", "random", "grid")
STATES = {"running": TrialState.RUNNING, "done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}


class Study:
    """The trials of one search.

    Parameters
    ----------
    space, method, seed
        As of `labkit.search`.
    n_random
        So many trials are drawn at random before "gp" and "tpe" have enough to go by; of "evolution" it is the size of a generation.
    prune
        A name of `labkit.experiments.pruning`.
    n_objectives, constrained
        How many values a trial is told, and whether it may break a constraint.
    counts_constants
        Whether a parameter of one value keeps "evolution" from CMA-ES, as it did in earlier records.
    path, readonly
        The folder of the search; without one nothing is written. Another process may be at work in one that is only read: `refresh`.
    clock
        Seconds, by which lines of the log are dated.

    Attributes
    ----------
    trials
        A dict a trial, in the order of their numbers: point, state, value (of the first objective, the more the better) and values (of
        all), violations (by constraint, at most 0 where it holds), error, asked and told (seconds), reports (value by step),
        `worse` (it is to end early), and its `units`: a dict by fold (None without folds) with workers, begun, ended, score, measured
        (by name), whole (it was not stopped on its way) and error. `cuts` are by fold the ends of the kernel that cut it off, as of `leave`.
    """

    def __init__(
        self,
        space: Space,
        method: str,
        seed: int,
        n_random: int,
        path: Path | None = None,
        *,
        prune: str | None = None,
        n_objectives: int = 1,
        constrained: bool = False,
        counts_constants: bool = False,
        readonly: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.space, self.method, self.seed, self.n_random, self.prune = space, method, seed, n_random, prune
        self.n_objectives, self.constrained, self.counts_constants = n_objectives, constrained, counts_constants
        self.readonly, self.clock = readonly, clock
        self.trials: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self._file, self._offset, self._journal = None if path is None else path / FILE, 0, None
        self._grid = space.grid() if method == "grid" else []
        self._before, self._started = 0.0, clock()
        self._reading = threading.Lock()  # a live figure and a cell may both look
        self._storage = optuna.storages.InMemoryStorage()
        with quiet():
            self._study = optuna.create_study(directions=["maximize"] * n_objectives, storage=self._storage)
        if path is not None:
            self.refresh()
        if path is not None and not readonly:
            if self._file.exists() and self._file.stat().st_size > self._offset:  # a line that was cut off
                os.truncate(self._file, self._offset)
            self._journal = Journal(path / STORAGE, n_objectives)
            for trial in self.trials:
                self._journal.add(self._frozen(trial))

    # -- the sampler ---------------------------------------------------------------------------------------------

    def _next_sampler(self, number: int) -> optuna.samplers.BaseSampler:
        sampler, before = self._sampler(number), self._study.sampler
        if type(sampler) is type(before):
            vars(sampler).update({name: value for name, value in vars(before).items() if name in CARRIED})
        return sampler

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed, samplers = _seed(self.seed, number, 1), optuna.samplers
        if self.method == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=self.n_random, warn_independent_sampling=False)
        if self.method == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=self.n_random)
        if (
            self.method == "evolution"
            and self.space.is_numeric(self.counts_constants)
            and self.n_objectives == 1
            and not self.constrained
        ):
            return samplers.CmaEsSampler(seed=seed, popsize=self.n_random, warn_independent_sampling=False)
        if self.method == "evolution":
            return samplers.NSGAIISampler(seed=seed, population_size=self.n_random)
        return samplers.RandomSampler(seed=seed)

    def _sample(self) -> dict[str, Any]:
        number = len(self.trials)
        self._study.sampler = self._next_sampler(number)
        if self.method == "grid":
            self._study.enqueue_trial(self._params(self._grid[number])[0])
        with quiet():
            trial = self._study.ask()
            return self.space.walk(lambda _, parameter: suggest(trial, parameter))

    def _sample_as(self, logged: dict[str, Any]) -> dict[str, Any]:
        """What the sampler makes, or the logged point where that is the same but for rounding: another kind of CPU computes other last
        digits, and what comes after is made of what is in the log."""
        point = self._sample()
        if not self._is_same(point, logged):
            return point
        params, distributions = self._params(logged)
        id = self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, len(self.trials))
        for key, value in params.items():
            self._storage.set_trial_param(id, key, distributions[key].to_internal_repr(value), distributions[key])
        return dict(logged)

    def _is_same(self, point: Mapping[str, Any], logged: Mapping[str, Any]) -> bool:
        """Are two points equal, real numbers to `ROUNDING` of their range, whole numbers and choices exactly?"""
        if list(point) != list(logged):
            return False
        distributions = self._params(point)[1]
        about = dict(zip(point, distributions.values(), strict=True))
        return all(value == logged[name] or _is_near(value, logged[name], about[name]) for name, value in point.items())

    def _params(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values and the distributions of a point, by Optuna's names."""
        found: dict[str, Parameter] = {}
        self.space.walk(lambda name, parameter: found.setdefault(name, parameter) and point[name])
        return {p.key: point[name] for name, p in found.items()}, {p.key: p.distribution for p in found.values()}

    def _frozen(self, trial: Mapping[str, Any]) -> Any:
        """A trial as Optuna has it."""
        params, distributions = self._params(trial["point"])
        about = {"state": STATES[trial["state"]], "values": trial["values"] if trial["state"] == "done" else None}
        about |= {"constraints": trial["violations"], "intermediate_values": dict(trial["reports"])}
        return optuna.trial.create_trial(**about, params=params, distributions=distributions)

    def frozen(self, began: datetime) -> list[Any]:
        """All trials as Optuna has them, for a copy; `began` is when the clock of the search was 0."""
        found = []
        for trial in self.trials:
            frozen = self._frozen(trial)
            frozen.datetime_start = began + timedelta(seconds=trial["asked"])
            if trial["told"] is not None:
                frozen.datetime_complete = began + timedelta(seconds=trial["told"])
            for fold, unit in list(trial["units"].items()):
                frozen.set_user_attr("workers" if fold is None else f"workers of fold {fold}", unit["workers"])
            if trial["error"]:
                frozen.set_user_attr("error", trial["error"])
            found.append(frozen)
        return found

    def continue_from(self, seconds: float) -> None:
        """The clock goes on from there, unless the log is further."""
        self._before, self._started = max(self._before, seconds), self.clock()

    # -- asking and telling --------------------------------------------------------------------------------------

    def ask(self) -> int:
        """A new trial; its number."""
        self._write(ask=len(self.trials), point=self._sample())
        return len(self.trials) - 1

    def begin(self, number: int, fold: int | None, workers: list[int]) -> None:
        """A run of a trial begins on these workers."""
        self._write(begin=number, fold=fold, workers=workers)

    def report(self, number: int, step: int, value: float) -> bool:
        """A score so far, of which more is better; is the trial to end?"""
        self._write(report=number, step=step, value=value)
        return self.trials[number]["worse"]

    def end(
        self,
        number: int,
        fold: int | None,
        score: float | None,
        sign: int | Sequence[int] = 1,
        error: str = "",
        passes: float | None = None,
        measured: Mapping[str, float] | None = None,
        whole: bool = True,
    ) -> None:
        """A run has ended after so many passes, with this score or an error; `sign` (one for each objective) is -1 where less is better,
        `measured` what else there is of it by name, and `whole` says that it was not stopped on its way."""
        signs = list(sign) if isinstance(sign, Sequence) else [sign]
        more = ({"measured": dict(measured)} if measured else {}) | ({} if whole else {"whole": False})
        more |= {"signs": signs} if len(signs) > 1 else {}
        self._write(end=number, fold=fold, score=score, sign=signs[0], error=error, passes=passes, **more)

    def leave(self, number: int, fold: int | None, cut: tuple[float, int] | None = None) -> None:
        """A run was stopped with the search, or its block was lost, or the kernel's end has `cut` it off, after so many seconds and with so
        many others beside it: it is to be made again."""
        self._write(leave=number, fold=fold, **({} if cut is None else {"cut": list(cut)}))

    def tell(
        self,
        number: int,
        state: str,
        value: float | Sequence[float] | None = None,
        error: str = "",
        violations: Mapping[str, float] | None = None,
    ) -> None:
        """A trial has ended: "done" or "pruned", with a value (or one for each objective), of which more is better, or "failed".

        For the samplers a trial that was pruned has the value that it had reached: most of them see nothing of those without one."""
        values = list(value) if isinstance(value, Sequence) else [value]
        more = ({"values": values} if len(values) > 1 else {}) | ({"violations": dict(violations)} if violations else {})
        self._write(tell=number, state=state, value=values[0], error=error, **more)

    def seed_of(self, number: int) -> int:
        """The seed of a trial's training."""
        return _seed(self.seed, number, 0)

    @property
    def points(self) -> list[dict[str, Any]]:
        return [dict(trial["point"]) for trial in self.trials]

    # -- the log -------------------------------------------------------------------------------------------------

    def _write(self, **line: Any) -> None:
        line["seconds"] = round(self._before + self.clock() - self._started, 4)
        if self._file is not None:
            with open(self._file, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self._apply(line, sampled=True)
        if self._journal:
            self._copy(line)

    def _copy(self, line: Mapping[str, Any]) -> None:
        if "ask" in line:
            self._journal.add(self._frozen(self.trials[line["ask"]]))
        elif "report" in line:
            self._journal.report(line["report"], line["step"], line["value"])
        elif "tell" in line:
            trial = self.trials[line["tell"]]
            values = trial["values"] if trial["state"] == "done" else None
            self._journal.tell(line["tell"], STATES[trial["state"]], values, trial["violations"])

    def _apply(self, line: dict[str, Any], *, sampled: bool) -> None:
        """What a line of the log does; `sampled`: Optuna has made the point, and need not be given it."""
        self.lines.append(line)
        if "ask" in line:
            trial = {"point": line["point"], "state": "running", "value": None, "values": None, "violations": {}, "error": ""}
            trial |= {"asked": line["seconds"], "told": None, "reports": {}, "worse": False, "units": {}, "cuts": {}}
            self.trials.append(trial)
            if not sampled:
                self._study.add_trial(self._frozen(self.trials[-1]))
        elif "begin" in line:
            unit = {"workers": line["workers"], "begun": line["seconds"]}
            unit |= {"ended": None, "score": None, "sign": 1, "error": "", "passes": None}
            unit |= {"measured": {}, "whole": True, "signs": [1]}
            self.trials[line["begin"]]["units"][line["fold"]] = unit
        elif "report" in line:
            trial = self.trials[line["report"]]
            trial["reports"][line["step"]] = line["value"]
            trial["worse"] = PRUNERS[self.prune].is_worse(self.trials, line["report"])
        elif "end" in line:
            unit = self.trials[line["end"]]["units"][line["fold"]]
            ended = {name: line[name] for name in ("score", "sign", "error", "passes")} | {"ended": line["seconds"]}
            more = {"measured": {}, "whole": True, "signs": [line["sign"]]}
            unit |= ended | {name: line.get(name, default) for name, default in more.items()}  # at once, for who looks meanwhile
        elif "leave" in line:
            trial = self.trials[line["leave"]]
            del trial["units"][line["fold"]]
            if "cut" in line:
                trial["cuts"].setdefault(line["fold"], []).append(line["cut"])
        elif "tell" in line:
            number, has_failed = line["tell"], line["state"] == "failed"
            values, violations = None if has_failed else line.get("values", [line["value"]]), line.get("violations", {})
            id = self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)
            for name, violation in violations.items():
                self._storage.set_trial_system_attr(id, CONSTRAINT + name, violation)
            self._study.tell(number, values, TrialState.FAIL if has_failed else TrialState.COMPLETE)
            about = {name: line[name] for name in ("state", "value", "error")} | {"values": values, "violations": violations}
            self.trials[number] |= about | {"told": line["seconds"]}

    def refresh(self) -> None:
        """Read what has been added to the log; of one that is written here that is nothing."""
        if self._file is None or self._journal:
            return
        with self._reading:
            self._read()

    def _read(self) -> None:
        lines, self._offset = read_lines_since(self._file, self._offset)
        again = self.method == "evolution" and not self.readonly  # its generations are in no log: it makes them again
        for at, text in enumerate(lines, len(self.lines) + 1):
            try:
                line = json.loads(text)
                if "ask" in line and again:
                    self._again(line)
                self._apply(line, sampled=again)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise RunError(f"line {at} of {self._file} is damaged: {error}. Put a copy of the file back.") from error
            self._before = line["seconds"]

    def _again(self, line: dict[str, Any]) -> None:
        if (point := self._sample_as(line["point"])) != line["point"]:
            raise RunError(
                f"trial {line['ask']} of {self._file} is {line['point']}, and the sampler makes {point} now: its generations are not those "
                "of before, by which it would go on. Is Optuna another version? Else give fresh=True to begin anew."
            )

    def importance(self) -> dict[str, float]:
        """By parameter, the largest first: how much it decides whether a trial is among the best tenth; they sum to 1."""
        with quiet():
            shares = optuna.importance.get_param_importances(self._study)
        names: dict[str, float] = {}
        for key, share in shares.items():
            names[key.partition(" ")[0]] = names.get(key.partition(" ")[0], 0.0) + share
        return dict(sorted(names.items(), key=lambda pair: -pair[1]))

    def replay(self) -> "Study":
        """A new study that is asked and told the same in the same order; its points are those that its sampler makes, of which those that
        differ from the log by rounding alone are as logged."""
        about = {"prune": self.prune, "n_objectives": self.n_objectives, "constrained": self.constrained}
        about |= {"counts_constants": self.counts_constants}
        other = Study(self.space, self.method, self.seed, self.n_random, **about)
        for line in self.lines:
            other._apply(line | ({"point": other._sample_as(line["point"])} if "ask" in line else {}), sampled=True)
        return other


def _is_near(value: Any, logged: Any, about: BaseDistribution) -> bool:
    if not isinstance(about, FloatDistribution) or not isinstance(logged, int | float):
        return False
    low, high, value, logged = ((math.log(one) if about.log else one) for one in (about.low, about.high, value, logged))
    return abs(value - logged) <= ROUNDING * (high - low)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
