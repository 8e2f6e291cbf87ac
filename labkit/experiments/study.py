"""What a search has asked and been told: the log on the disk, and the sampler (Optuna's) that makes the next point of it.

    log.jsonl    {"ask": 3, "point": {"lr": 0.01}}   {"begin": 3, "workers": [0, 1]}   {"report": 3, "step": 1, "value": 0.4}
                 {"end": 3, "score": 0.9}   {"tell": 3, "state": "done", "value": 0.9}

The log is the truth. Each line is on the disk before anything follows from it; Optuna's study is made of it. The sampler is made
anew for each trial, with a seed from the number of the trial: a point depends on the lines before it in the log and on nothing
else. So a search that was cut off goes on as if it had not been, and `replay` asks a new study the same questions in the
same order, and gets the same points, however many blocks there were.

Used by `labkit.experiments.search`.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from labkit.errors import RunError
from labkit.experiments.pruning import PRUNERS
from labkit.experiments.space import Parameter, Space, suggest
from labkit.runs.files import read_lines_since

FILE = "log.jsonl"
STORAGE = "optuna.log"  # a copy that optuna-dashboard opens
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
    path, readonly
        The folder of the search; without one nothing is written. Another process may be at work in one that is only read.

    Attributes
    ----------
    trials
        A dict a trial, in the order of their numbers: point, state, value, error, asked and told (seconds), reports (value by step),
        `worse` (it is to end early), and its `units`: a dict by fold (None without folds) with workers, begun, ended, score and error.
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
        readonly: bool = False,
    ) -> None:
        self.space, self.method, self.seed, self.n_random, self.prune = space, method, seed, n_random, prune
        self.trials: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self._file = None if path is None else path / FILE
        self._grid = space.grid() if method == "grid" else []
        self._before, self._started = 0.0, time.monotonic()
        with _quiet():
            self._study = optuna.create_study(direction="maximize")
        if path is not None:
            self._read(readonly)
        if path is not None and not readonly:
            self._copy = _copied(path / STORAGE, self._frozen, self.trials)

    # -- the sampler ---------------------------------------------------------------------------------------------

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed, samplers = _seed(self.seed, number, 1), optuna.samplers
        if self.method == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=self.n_random, warn_independent_sampling=False)
        if self.method == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=self.n_random)
        if self.method == "evolution" and self.space.numeric:
            return samplers.CmaEsSampler(seed=seed, popsize=self.n_random, warn_independent_sampling=False)
        if self.method == "evolution":
            return samplers.NSGAIISampler(seed=seed, population_size=self.n_random)
        return samplers.RandomSampler(seed=seed)

    def _sample(self) -> dict[str, Any]:
        number = len(self.trials)
        self._study.sampler = self._sampler(number)
        if self.method == "grid":
            self._study.enqueue_trial(self._params(self._grid[number])[0])
        with _quiet():
            trial = self._study.ask()
            return self.space.walk(lambda _, parameter: suggest(trial, parameter))

    def _params(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values and the distributions of a point, by Optuna's names."""
        found: dict[str, Parameter] = {}
        self.space.walk(lambda name, parameter: found.setdefault(name, parameter) and point[name])
        return {p.key: point[name] for name, p in found.items()}, {p.key: p.distribution for p in found.values()}

    def _frozen(self, trial: Mapping[str, Any]) -> Any:
        """A trial as Optuna has it."""
        params, distributions = self._params(trial["point"])
        about = {"state": STATES[trial["state"]], "value": trial["value"] if trial["state"] == "done" else None}
        return optuna.trial.create_trial(**about, params=params, distributions=distributions)

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
        self, number: int, fold: int | None, score: float | None, sign: int = 1, error: str = "", passes: float | None = None
    ) -> None:
        """A run has ended after so many passes, with this score or an error; `sign` is -1 where less is better."""
        self._write(end=number, fold=fold, score=score, sign=sign, error=error, passes=passes)

    def leave(self, number: int, fold: int | None) -> None:
        """A run was stopped with the search, or its block was lost: it is to be made again."""
        self._write(leave=number, fold=fold)

    def tell(self, number: int, state: str, value: float | None = None, error: str = "") -> None:
        """A trial has ended: "done" or "pruned", with a value, of which more is better, or "failed".

        For the samplers a trial that was pruned has the value that it had reached: most of them see nothing of those without one."""
        self._write(tell=number, state=state, value=value, error=error)

    def seed_of(self, number: int) -> int:
        """The seed of a trial's training."""
        return _seed(self.seed, number, 0)

    @property
    def points(self) -> list[dict[str, Any]]:
        return [dict(trial["point"]) for trial in self.trials]

    # -- the log -------------------------------------------------------------------------------------------------

    def _write(self, **line: Any) -> None:
        line["seconds"] = round(self._before + time.monotonic() - self._started, 4)
        if self._file is not None:
            with open(self._file, "ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self._apply(line, sampled=True)
        if self._file is not None:
            self._copy(line)

    def _apply(self, line: dict[str, Any], *, sampled: bool) -> None:
        """What a line of the log does; `sampled`: Optuna has made the point, and need not be given it."""
        self.lines.append(line)
        if "ask" in line:
            trial = {"point": line["point"], "state": "running", "value": None, "error": "", "asked": line["seconds"]}
            self.trials.append(trial | {"told": None, "reports": {}, "worse": False, "units": {}})
            if not sampled:
                self._study.add_trial(self._frozen(self.trials[-1]))
        elif "begin" in line:
            begun = self.trials[line["begin"]]["units"].get(line["fold"], {"times": 0})["times"] + 1
            unit = {"workers": line["workers"], "begun": line["seconds"], "times": begun}
            unit |= {"ended": None, "score": None, "sign": 1, "error": "", "passes": None}
            self.trials[line["begin"]]["units"][line["fold"]] = unit
        elif "report" in line:
            trial = self.trials[line["report"]]
            trial["reports"][line["step"]] = line["value"]
            trial["worse"] = PRUNERS[self.prune].is_worse(self.trials, line["report"])
        elif "end" in line:
            unit = self.trials[line["end"]]["units"][line["fold"]]
            unit |= {name: line[name] for name in ("score", "sign", "error", "passes")} | {"ended": line["seconds"]}
        elif "leave" in line:
            del self.trials[line["leave"]]["units"][line["fold"]]
        elif "tell" in line:
            number, state = line["tell"], line["state"]
            self._study.tell(number, line["value"], TrialState.FAIL if state == "failed" else TrialState.COMPLETE)
            self.trials[number] |= {name: line[name] for name in ("state", "value", "error")} | {"told": line["seconds"]}

    def _read(self, readonly: bool) -> None:
        """What is in the log; a line that was cut off is cut away."""
        lines, size = read_lines_since(self._file)
        for at, text in enumerate(lines):
            try:
                line = json.loads(text)
                if "ask" in line and self.method == "evolution":  # its generations are in no log: it makes them again
                    self._again(line)
                self._apply(line, sampled=self.method == "evolution")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise RunError(f"line {at + 1} of {self._file} is damaged: {error}. Put a copy of the file back.") from error
            self._before = line["seconds"]
        if not readonly and self._file.exists() and self._file.stat().st_size > size:
            os.truncate(self._file, size)

    def _again(self, line: dict[str, Any]) -> None:
        if (point := self._sample()) != line["point"]:
            raise RunError(f"trial {line['ask']} of {self._file} is {line['point']}, and the sampler makes {point} now.")

    def importance(self) -> dict[str, float]:
        """By parameter, the largest first: how much it decides whether a trial is among the best tenth; they sum to 1."""
        with _quiet():
            shares = optuna.importance.get_param_importances(self._study)
        names: dict[str, float] = {}
        for key, share in shares.items():
            names[key.partition(" ")[0]] = names.get(key.partition(" ")[0], 0.0) + share
        return dict(sorted(names.items(), key=lambda pair: -pair[1]))

    def replay(self) -> "Study":
        """A new study that is asked and told the same in the same order; its points are those that its sampler makes."""
        other = Study(self.space, self.method, self.seed, self.n_random, prune=self.prune)
        for line in self.lines:
            other._apply(line | ({"point": other._sample()} if "ask" in line else {}), sampled=True)
        return other


def _copied(file: Path, frozen: Callable[[dict], Any], trials: list[dict]) -> Callable[[dict], None]:
    """A copy of a study in a file of Optuna's own, made anew from here; call what is returned with each further line of the log."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    file.unlink(missing_ok=True)
    with _quiet():
        storage = JournalStorage(JournalFileBackend(str(file)))
        copy = optuna.create_study(study_name=file.parent.name, direction="maximize", storage=storage)
    for trial in trials:
        copy.add_trial(frozen(trial))

    def follow(line: dict[str, Any]) -> None:
        if "ask" in line:
            copy.add_trial(frozen(trials[line["ask"]]))
        elif "tell" in line:
            copy.tell(line["tell"], line["value"] if line["state"] == "done" else None, STATES[line["state"]])

    return follow


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces each study, and which optional package of its own is not there."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
