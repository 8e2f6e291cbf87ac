"""Search: which settings of a problem, its model and its training win; each trial is a run of its own on a block of workers.

    sampler (Optuna)  -- ask -->  point  -->  problem, folds  -->  runs on free blocks  -- score set -->  tell  -- log -->  sampler

One coordinator, a thread of the kernel, asks and tells. A block that is free draws the next run at once, of a trial that has folds
left or of a new one; what is under way is known to the sampler. The score of a trial is that of its last weights on the score set
(or the mean over the folds): the test set stays unseen. A trial may be a notebook, whose results are its scores.

    runs/<search>/search.json   log.jsonl (what was asked and told)   trials/<number>[-<fold>]/ (runs, or executed notebooks)
                  optuna.log, optuna.db (copies for optuna-dashboard and jupyterlab-optuna)

Used in notebooks as `labkit.search` and `labkit.load_search`.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit import locks
from labkit.cards import Card, Carded, settings_text
from labkit.cluster.lab import Lab
from labkit.errors import SEEDS, ClusterError, RunError, did_you_mean, file_path, flag, instance, known, real, whole
from labkit.experiments import code
from labkit.experiments.coordinator import Coordinator, called
from labkit.experiments.copies import write_sqlite
from labkit.experiments.objectives import Goals
from labkit.experiments.pruning import PRUNERS
from labkit.experiments.space import Space
from labkit.experiments.study import METHODS, Study
from labkit.experiments.trials import OF_A_RUN, TRAINING, Maker, Notebook
from labkit.imports import plain, short
from labkit.names import Public, named
from labkit.partition import Partition, make_partition
from labkit.problems.problem import Problem
from labkit.runs import server_file
from labkit.runs.config import environment
from labkit.runs.events import read_rows
from labkit.runs.files import read_json, write_json
from labkit.training.run import Run
from labkit.training.train import check_lengths, check_traffic, choose, claim, run_name
from labkit.updates import Update, make_update

if TYPE_CHECKING:
    import pandas as pd

FILE = "search.json"
COPY = "optuna.db"
SAME = (
    "problem",
    "space",
    "method",
    "seed",
    "folds",
    "prune",
    "training",
    "objectives",
    "constraints",
    "sense",
)  # by which a search is found again
SINCE = ("sense", "code")  # what earlier records do not hold: whoever goes on with one is believed
RETRAIN = "labkit.train(found.problem(), lab, **found.training())"  # for the test score of what was found
COLUMNS = ("score", "state", "error", "seconds", "workers")  # of the table, behind the parameters
TRIALS = 40
ENDING_S = 10.0  # so long a server that was stopped may take to let go of its directory


@named
def search(
    problem: Problem | type[Problem] | Callable[..., Problem] | str | Path,
    space: Mapping[str, Any],
    lab: Lab,
    *,
    method: str = "gp",
    trials: int | None = None,
    workers_per_trial: int | None = None,
    folds: int | None = None,
    prune: str | None = None,
    objective: str | Callable[[Run], float] | Sequence[str | Callable[[Run], float]] | Mapping[str, str] | None = None,
    constraints: Mapping[str, float | tuple[float | None, float | None]] | None = None,
    target: float | None = None,
    partition: str | dict | Partition = "idpa",
    update: str | dict | Update = "agwu",
    passes: float = 5,
    local_steps: int | None = None,
    exchange: str = "float32",
    overlap: int = 0,
    seed: int = 0,
    name: str = "search",
    runs: str | Path = "runs",
    workers: Sequence[int] | None = None,
    fresh: bool = False,
    wait: bool = True,
    progress: bool = True,
) -> Search:
    """Search the best point of a space; returns when all trials have ended, with a `Search`.

        space = {"lr": (1e-3, 0.5, "log"), "width": (4, 32, "int"), "optimiser": {"sgd": {"momentum": (0.0, 0.95)}, "adam": {}}}
        found = labkit.search(labkit.Classifier(data="digits"), space, lab, trials=30, passes=2)
        found.best, found.table()

    Parameters
    ----------
    problem
        What to train: a problem, of which a point changes arguments; a class of problems, which is made with those of the point; or a
        function of the point that returns a problem, `lambda lr, width: labkit.Classifier(...)`. Or the path of a notebook with a
        cell tagged `parameters`, of which the space names some: each trial is executed as `labkit.sweep` does, on one worker and with
        an hour's limit, and what it gives to `labkit.report` is its score and whatever `objective` names. Of several rows that is
        their mean. It connects to a lab of its own; update, partition, passes and so on are then those of the notebook.
    space
        Values by name (`labkit.experiments.space`): (low, high), (low, high, "log"), (low, high, "int"), a range, a list of choices,
        or a dict of choices with parameters that only they have. A name is an argument of the problem, of its model, or of its
        training: partition, update, passes, local_steps, exchange, overlap.
    method
        "gp": a Gaussian process (where some points only have a parameter, "tpe" is taken, which is printed); "evolution": in
        generations of a fifth of the trials, CMA-ES where all parameters but for constants are ranges and there is one objective without constraints,
        else NSGA-II; "tpe": a tree of Parzen estimators; "random"; "grid": all points in turn.
    trials
        How many, 40 by default, or the whole grid. Of "gp" and "tpe" a fifth, 3 to 10, is drawn at random first.
    workers_per_trial
        Workers of a block, which trains one run at a time; 2 by default, where the lab has as many, and 1 for notebooks.
    folds
        Each trial is trained on so many folds (`Problem.fold`), each a run of its own; their scores are averaged.
    prune
        Trials that do badly end early (`labkit.experiments.pruning`): "asha", by successive halving after 1/9 and 1/3 of their passes,
        "hyperband", the same for 9 of 17 trials, while 5 are compared after 1/3 only and 3 never,
        "extrapolate", where a power law through their scores ends below the best one; or with `folds`, "wilcoxon", where they are
        worse than the best trial on those that they have had (by a test with p below 0.1, which four folds reach at the earliest: give five or
        more). For the sampler they have the score that they had reached. A run is
        looked at where it has a new version of the weights: of short ones that is often enough with `local_steps`.
    objective
        What is searched: by default the "score" on the score set (or the loss where it has none). Or another name: "loss", "time"
        (seconds of a run), "size" (parameters of the network), a metric of the problem, a result of the notebook. Or a function of a
        run that is done, in the sense in which its problem's score is better, called in this kernel; the coordinator waits for it.
        Several, ["score", "time"], have no single best but a front (`Search.front`); what is called score in tables is the first. Of
        loss, time and size less is better, of others more; a dict says it: {"score": "max", "error": "min"}. With folds each is a mean.
    constraints
        The highest value by name, {"size": 50_000}, or (lowest, highest), of which one may be None. Trials that break one are neither
        best nor on the front, and the sampler learns to keep away; "random" and "grid" do not.
    target
        No trial begins any more when one has reached this score.
    partition, update, passes, local_steps, exchange, overlap
        Of each run, as in `labkit.train`, where the space has no such name.
    seed
        Of the points; weights and orders of a trial derive from it and the number of the trial.
    name, runs
        All is recorded in `runs/name`. The same call goes on where an earlier one was cut off, also with more `trials`: trials that were
        under way are trained again, none is lost or made twice. Another problem, space, objective or constraint, also where only the code of
        a function or class of one's own is another one, is another search and refused; where it stands and its comments do not matter.
        `fresh=True` begins anew; what was there is kept under `name.1`.
    workers
        Indices of the workers to use, by default all that are free.
    wait
        False returns at once; the `Search` grows, and `search.wait()` or `search.stop()` end it.

    A trial whose model does not build, whose training fails or whose score is no number is a row with its error.

    Raises
    ------
    ValueError, TypeError, ClusterError, RunError
        The request makes no sense, or `runs/name` is another search; nothing has been started. ClusterError also when all
        workers are lost: the same call on a fresh lab goes on from there.

    Examples
    --------
    >>> space = {"lr": (0.001, 0.5, "log"), "optimiser": {"sgd": {"momentum": (0.0, 0.95)}, "adam": {}}}
    >>> some = labkit.search(problem, space, lab, method="random", trials=2, passes=1, name="some")
    >>> some.state
    'done'
    """
    space, method, goals = Space(space), known("method", method, METHODS), Goals(objective, constraints)
    if taken := [one for one in space.names if one in ("trial", *COLUMNS, "feasible", *goals.names[1:])]:
        raise ValueError(f"space {taken[0]!r}: the table of a search has a column of this name. Give the parameter another one.")
    if taken := [one for one in goals.names[1:] if one in ("trial", *COLUMNS, "feasible")]:
        raise ValueError(
            f'objective or constraint {taken[0]!r}: the table of a search has a column of this name, in which "score" is the first objective. '
            "Name it first, or give a function of a run that has another name."
        )
    update, partition = make_update(update), make_partition(partition)
    passes, local_steps, _ = check_lengths(passes, local_steps, 1).values()
    exchange, overlap = check_traffic(update, exchange, overlap).values()
    training = {"partition": partition, "update": update, "passes": passes, "local_steps": local_steps}
    is_notebook = isinstance(problem, str | Path)
    make = (
        Notebook(problem, space) if is_notebook else Maker(problem, space, {**training, "exchange": exchange, "overlap": overlap})
    )
    instance("lab", lab, Lab, " of labkit.connect(...)")
    seed, folds = whole("seed", seed, 0, SEEDS, error=ValueError), None if folds is None else whole("folds", folds, 2)
    prune = None if prune is None else known("prune", prune, PRUNERS)
    if is_notebook and (folds or prune):
        raise ValueError("a notebook is executed as a whole: leave out folds and prune.")
    if folds and isinstance(problem, Problem) and problem._fold:
        raise ValueError(f"folds={folds}: this problem is one fold of a cross-validation already. Give the whole one.")
    if prune and (prune == "wilcoxon") != (folds is not None):
        of = "compares folds: give folds=5, say" if folds is None else 'goes by the passes of one run: with folds take "wilcoxon"'
        raise ValueError(f"prune={prune!r} {of}, or leave it out.")
    if prune and prune != "wilcoxon" and not goals.plain:
        raise ValueError(f"prune={prune!r} goes by the score set, and objective= is known only in the end. Leave out one of them.")
    if prune and (goals.n > 1 or goals.bounds):
        raise ValueError(f"prune={prune!r} goes by one score. Leave it out, or further objectives and constraints.")
    target = None if target is None else real("target", target)
    fresh, wait, progress = (flag(*one) for one in {"fresh": fresh, "wait": wait, "progress": progress}.items())
    runs, name = file_path("runs", runs), run_name(name)
    n_grid = len(space.grid()) if method == "grid" else None
    trials = n_grid or TRIALS if trials is None else min(whole("trials", trials), n_grid or math.inf)
    if method == "gp" and space.conditional:
        print("method='tpe' is taken for 'gp', which draws parameters that only some points have at random.")
        method = "tpe"
    workers = choose(lab, workers, runs / name)
    if is_notebook or goals.missing(("score", "loss", *OF_A_RUN)):
        there = make.measured(goals)
        if there is not None and (missing := goals.missing(there)):
            raise ValueError(
                f"objective or constraint {missing[0]!r} is nothing that a trial is measured by.{did_you_mean(missing[0], there)} "
                f"There are {', '.join(there)}; or give a function of a run."
            )
    size = (
        min(1 if is_notebook else 2, len(workers)) if workers_per_trial is None else whole("workers_per_trial", workers_per_trial)
    )
    if (workers_per_trial := size) > len(workers):
        raise ClusterError(f"workers_per_trial={size}, and there are {len(workers)} workers: {workers}.")
    n_random = max(4, min(50, trials // 5)) if method == "evolution" else max(3, min(10, trials // 5))
    config = {"problem": make.reference(), "space": space.config(), "method": method, "seed": seed, "folds": folds, "prune": prune}
    config |= {"training": None if is_notebook else make.training_config(), **goals.config()}
    objects = {"problem": None if is_notebook else problem, "choice": space.objects(), "objective": goals.functions}
    config |= {"code": code.digests(**objects, training=None if is_notebook else {"update": update, "partition": partition})}
    config = plain(config | {"trials": trials, "target": target, "n_random": n_random, "counts_constants": False})
    path, config, lock = _claimed(runs, name, config, fresh)
    try:
        study = Study(space, method, seed, config["n_random"], path, **_about(config))
        study.continue_from(_trained(path, study))
        found = Search(path, config, study, make)
        Coordinator(found, goals, lab, workers, size, lock, progress).start()
    except BaseException:
        lock.release()
        raise
    return found.wait() if wait else found


def load_search(path: str | Path) -> Search:
    """Read a search back from its directory: its table, its points, its best run, its replay. One that is running elsewhere grows.

    Examples
    --------
    >>> len(labkit.load_search(found.path).table())
    4
    """
    path = file_path("path", path)
    config = read_json(path / FILE)
    space = Space.from_config(config["space"])
    study = Study(space, config["method"], config["seed"], config["n_random"], path, **_about(config), readonly=True)
    return Search(path, config, study)


def _about(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a search those that its study needs, by name."""
    n = len(config.get("objectives") or [None])
    about = {"prune": config["prune"], "n_objectives": n, "constrained": bool(config.get("constraints"))}
    return about | {"counts_constants": config.get("counts_constants", True)}


def _unpickled(path: Path, id: str, make: Maker | Notebook | None) -> Search:
    found = load_search(path)
    if found.config["id"] != id:
        raise RunError(f"{path} holds another search now than the one that was pickled.")
    found._make = make
    return found


class Search(Carded, Public):
    """A search: what was tried, and what came out. `path`, `name` and `config` are its directory, name and settings.

    A copy, and what another process gets of it (pickle), is read from its directory, as `labkit.load_search` does.

    Examples
    --------
    >>> len(found.table()), sorted(found.best.index.intersection(["lr", "momentum"]))
    (4, ['lr', 'momentum'])
    >>> found.replay().points == found.points
    True
    """

    def __init__(self, path: Path, config: Mapping[str, Any], study: Study, make: Maker | Notebook | None = None) -> None:
        self.path, self.name, self.config = path, path.name, dict(config)
        self._study, self._make = study, make
        self._coordinator: Coordinator | None = None

    def __reduce__(self) -> tuple:
        return _unpickled, (self.path.absolute(), self.config["id"], self._make)

    # -- while it goes -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "running", "done", "stopped" (by `stop`, or cut off), or "failed"."""
        if self._coordinator:
            return self._coordinator.state
        if self._study.readonly and locks.held(self.path):
            return "running"
        return "done" if self._is_done() else "stopped"

    def wait(self, timeout: float = math.inf) -> Search:
        """Block until all trials have ended; returns the search. An interrupt stops it, and the same call of `labkit.search` goes on."""
        if self._coordinator:
            self._coordinator.wait(real("timeout", timeout, least=0, finite=False))
        return self

    def stop(self, timeout: float = 60.0) -> Search:
        """End it now. Trials under way are stopped, and trained again when the same call of `labkit.search` goes on."""
        if self._coordinator:
            self._coordinator.stop(real("timeout", timeout, least=0, finite=False))
        return self

    def live(self, timeout: float = 86400) -> Any:
        """A figure that grows with the search (see `labkit.plots.search_live`)."""
        from labkit.plots.search import search_live

        return search_live(self, timeout)

    # -- what came out -------------------------------------------------------------------------------------------

    @property
    def points(self) -> list[dict[str, Any]]:
        """The points in the order in which they were asked for, a dict a trial; choices that are objects by their names."""
        return [dict(trial["point"]) for trial in self._trials()]

    def table(self) -> pd.DataFrame:
        """One row a trial.

        Columns: `trial` (its number), the parameters (NaN where a point has none; a choice None is None), `score` (the first objective, the mean over the
        folds), further objectives and what is constrained by their names, `feasible` where there are constraints, `state` (running,
        done, pruned, failed), `error`, `seconds` (from its first run's begin to its last one's end), and `workers` of its latest run.
        """
        import pandas as pd

        from labkit.tables import Table

        feasible = ["feasible"] if self.config.get("constraints") else []
        trials = [dict(trial) for trial in self._trials()]  # as they are now: the search may go on meanwhile
        signs = self._signs()  # afterwards: a run ends before its trial has a value
        rows = [self._row(number, trial, signs) for number, trial in enumerate(trials)]
        score, *last = COLUMNS
        names = self._study.space.names
        table = Table(rows, columns=["trial", *names, score, *self._others(), *feasible, *last])
        for name in names:
            if any(row.get(name, ...) is None for row in rows):  # a choice, of which pandas makes NaN beside numbers
                table[name] = pd.Series([row.get(name, math.nan) for row in rows], dtype=object)
        return table

    def timeline(self) -> pd.DataFrame:
        """One row a run and worker: trial, fold, worker, start and end (seconds of the search), passes (of the run), score, error."""
        from labkit.tables import Table

        columns = ["trial", "fold", "worker", "start", "end", "passes", "score", "error"]
        rows = [
            (number, fold, worker, unit["begun"], unit["ended"], unit["passes"], unit["score"], unit["error"])
            for number, trial in enumerate(self._trials())
            for fold, unit in list(trial["units"].items())
            for worker in unit["workers"]
        ]
        return Table(rows, columns=columns)

    def history(self) -> pd.DataFrame:
        """The rows of `table()` with a score that keep the constraints, in the order in which they ended.

        Columns besides: `seconds` (of the search, when the trial ended), `trials` (how many had ended by then), `best` (score of those that
        were done by then; NaN before the first).

            found.history().hvplot.step("seconds", "best", where="post") * found.history().hvplot.scatter("seconds", "score", by="state")
        """
        from labkit.plots.search import history

        return history(self)

    @property
    def objectives(self) -> list[str]:
        """What is searched, by name; the first is `score` in tables."""
        return [name for name, _ in self.config.get("objectives") or [("score", None)]]

    @property
    def lower_is_better(self) -> bool:
        """Is a score of which less is better searched?"""
        return self._signs()[0] == -1

    def front(self) -> pd.DataFrame:
        """The rows of `table()` that no other one is better than in every objective (the Pareto front), the best score first; of those
        that keep the constraints. Of a single objective that is the best one."""
        numbers = self._front()  # before the table, in which these are then told
        return self.table().iloc[numbers]

    def importance(self) -> pd.Series:
        """By parameter, the largest first: how much it decides whether a trial is among the best tenth (PED-ANOVA, Watanabe et al., IJCAI
        2023); they sum to 1. RunError with too few trials."""
        import pandas as pd

        if sum(trial["state"] in ("done", "pruned") for trial in self._trials()) < 4:
            raise RunError(f"search {self.name} has too few trials with a score to say what matters; it needs 4 at least.")
        return pd.Series(self._study.importance(), name="importance", dtype=float)

    @property
    def best(self) -> pd.Series:
        """The row of `table()` with the best score, of those that keep the constraints; of several objectives the best by the first one
        alone. RunError while none has one.

        As the best of all trials it is an optimistic score: `labkit.train(found.problem(), lab, **found.training())` measures it on the
        test set.
        """
        number = self._best()
        return self.table().iloc[number]

    def run(self, trial: int | pd.Series | None = None, fold: int | None = None) -> Run:
        """The run of a trial, by its number or its row of `table()`, by default of the best one, with its weights and its record. Its curve is measured when it is asked for:
        no trial sees the test set."""
        number = self._number(trial)
        units = self._trials()[number]["units"]
        fold = next(iter(units), None) if fold is None else whole("fold", fold, 0)
        if fold not in units:
            raise RunError(f"trial {number} of {self.name} has no run" + ("." if fold is None else f" of fold {fold}."))
        path = self.path / "trials" / called(number, fold)
        if self._is_notebook:
            raise RunError(f"trial {number} of {self.name} is a notebook: {path / 'notebook.ipynb'}")
        return Run(path, problem=self._problem_of(number, fold))

    def problem(self, trial: int | pd.Series | None = None) -> Problem:
        """The problem of a trial, by default of the best one, as `labkit.train` takes it: on all samples, without folds."""
        number = self._number(trial)
        return self._problem_of(number, None) or self.run(number).problem()._folded(None)

    def training(self, trial: int | pd.Series | None = None) -> dict[str, Any]:
        """What `labkit.train` gets beside the problem in a trial, by default in the best one: update, partition, passes and so on."""
        number = self._number(trial)
        if self._is_notebook:
            raise RunError(f"the trials of {self.name} are notebooks, which train as they say.")
        if self._make:
            return self._make(self._trials()[number]["point"])[1]
        return {name: self.config["training"][name] for name in TRAINING} | {
            name: value for name, value in self._trials()[number]["point"].items() if name in TRAINING
        }

    def replay(self) -> Search:
        """The same search, asked and told in the order of its log, with points that the sampler makes anew: the same ones, however
        many blocks there were. Nothing is trained. On another kind of CPU the last digits of a point may be others; up to a millionth of
        a range counts as the same, and is given as logged."""
        self._trials()
        return Search(self.path, self.config, self._study.replay(), self._make)

    def to_sqlite(self, path: str | Path) -> Path:
        """Write a copy as a SQLite file, which optuna-dashboard and jupyterlab-optuna open; values have the sense in which more is better.

            optuna-dashboard sqlite:///runs/search/optuna.db

        The end of a search writes one to `optuna.db` in its directory. Returns the path.
        """
        path = file_path("path", path).absolute()
        self._trials()
        path.parent.mkdir(parents=True, exist_ok=True)
        began = datetime.fromtimestamp((self.path / "environment.json").stat().st_mtime)
        write_sqlite(path, self.name, self._study.n_objectives, self._study.frozen(began))
        return path

    def __repr__(self) -> str:
        n = len(self._trials())
        try:
            best = f", {self._best_text()}"
        except RunError:
            best = ""
        return f"<Search {self.name}: {self.config['method']}, {self.state}, {n} of {self.config['trials']} trials{best}>"

    def _card(self) -> Card:
        n, best = len(self._trials()), {}
        with contextlib.suppress(RunError):
            number = self._best()
            best = {
                self._best_name: f"{self.best.score:.4g}, of {self._n_scored()} trials",
                "at": settings_text(self._trials()[number]["point"]),
            }
            best |= {"on the front": f"{len(self._front())} trials"} if len(self.objectives) > 1 else {}
        rows = {"method": self.config["method"], "state": self.state, "trials": f"{n} of {self.config['trials']}", **best}
        calls = {
            "found.table()": "all trials",
            "found.best": "the best one",
            "labkit.plots.search_history(found)": "the best score over them",
        }
        calls |= {RETRAIN: "train the best one, for its test score"} if best and not self._is_notebook else {}
        return Card(f"Search {self.name}", rows={**rows, "directory": str(self.path)}, calls=calls)

    @property
    def _score_name(self) -> str:
        """What the column `score` is, in words."""
        from labkit.plots.search import score_name

        return score_name(self)

    @property
    def _best_name(self) -> str:
        """Of several objectives there is no single best, but one by the first of them."""
        return f"best {'by ' * (len(self.objectives) > 1)}{self._score_name}"

    def _best_text(self) -> str:
        """ "best held-out score 0.98"; RunError where there is none."""
        front = f", {len(self._front())} on the front" if len(self.objectives) > 1 else ""
        return f"{self._best_name} {self.best.score:.4g}{front}"

    def _result(self) -> str:
        """What came out, in a line: a score that is the best of many is an optimistic one. RunError where no trial has one."""
        n, number = self._n_scored(), self._best()
        said = f"Search {self.name}: {self._best_text()}, trial {number}"
        if n == 1 or not self._score_name.startswith("held-out"):
            return f"{said}, of {n} trial{'s' * (n > 1)}."
        return f"{said}. As the best of {n} trials it is optimistic: {RETRAIN} measures the test score."

    def _n_scored(self) -> int:
        return sum(trial["value"] is not None for trial in self._trials())

    def _trials(self) -> list[dict[str, Any]]:
        """All trials, with what another process has written meanwhile."""
        self._study.refresh()
        return list(self._study.trials)

    def _signs(self) -> list[int]:
        """Of each objective: -1 where less is better; as the first run that ended without an error says."""
        units = (unit for trial in self._trials() for unit in list(trial["units"].values()))
        return next(
            (unit["signs"] for unit in units if unit["ended"] is not None and not unit["error"]), [1] * self._study.n_objectives
        )

    def _others(self) -> list[str]:
        """What is measured beside the score, by name."""
        return [
            name
            for name in dict.fromkeys([*self.objectives, *(self.config.get("constraints") or ())])
            if name != self.objectives[0]
        ]

    @property
    def _is_notebook(self) -> bool:
        return isinstance(self.config["problem"], Mapping) and "notebook" in self.config["problem"]

    def _row(self, number: int, trial: Mapping[str, Any], signs: Sequence[int] | None = None) -> dict[str, Any]:
        units = list(trial["units"].values())
        ends = [unit["ended"] for unit in units if unit["ended"] is not None]
        seconds = max(ends) - min(unit["begun"] for unit in units) if ends else math.nan
        row = {"trial": number, **trial["point"], "state": trial["state"], "error": trial["error"], "seconds": seconds}
        row |= {"score": math.nan, "workers": units[-1]["workers"] if units else []}
        if trial["value"] is not None:
            row["score"] = trial["value"] * (signs or self._signs())[0]
            measured = [unit["measured"] for unit in units if unit["measured"]]
            row |= {name: sum(one[name] for one in measured) / len(measured) for name in self._others() if measured}
        if self.config.get("constraints"):
            row["feasible"] = trial["state"] == "done" and _counts(trial)
        return row

    def _has_reached(self) -> bool:
        """Has a trial reached the target?"""
        target = self.config["target"]
        if target is None:
            return False
        sign = self._signs()[0]
        return any(_counts(trial) and trial["value"] >= sign * target for trial in self._trials())

    def _is_done(self) -> bool:
        trials = self._trials()
        n_told = sum(trial["told"] is not None for trial in trials)
        return n_told >= self.config["trials"] or (n_told == len(trials) and self._has_reached())

    def _front(self) -> list[int]:
        """The numbers of the trials that no other one is better than in every objective, the best score first."""
        told = {number: trial["values"] for number, trial in enumerate(self._trials()) if _counts(trial)}
        values = np.array(list(told.values())).reshape(len(told), self._study.n_objectives)
        best = [number for number, own in told.items() if not ((values >= own).all(1) & (values > own).any(1)).any()]
        return sorted(best, key=lambda number: [-value for value in told[number]])

    def _standing(self, number: int) -> str:
        """What a trial is of which was told just now: the best so far (none that another one equals), or on the front; else ""."""
        front = self._front()
        if len(self.objectives) > 1:
            return "on the front so far" if number in front else ""
        return "the best so far" if front == [number] else ""

    def _best(self) -> int:
        trials = self._trials()
        told = {number: trial["value"] for number, trial in enumerate(trials) if _counts(trial)}
        if not told:
            if any(trial["state"] == "done" for trial in trials):
                raise RunError(f"no trial of search {self.name} keeps the constraints: {short(self.config['constraints'])}.")
            errors = [f" Trial {number}: {trial['error']}" for number, trial in enumerate(trials) if trial["error"]]
            raise RunError(f"no trial of search {self.name} has a score.{errors[0] if errors else ''}")
        return max(told, key=told.__getitem__)

    def _number(self, trial: Any) -> int:
        """Of a trial by its number, or by its row of a table; by default of the best one."""
        if hasattr(trial, "keys") and "trial" in trial:
            trial = trial["trial"]
        return self._best() if trial is None else whole("trial", trial, 0, len(self._trials()) - 1)

    def _problem_of(self, number: int, fold: int | None) -> Problem | None:
        if self._make is None or self._is_notebook:
            return None
        problem = self._make(self._trials()[number]["point"])[0]
        return problem if fold is None else problem.fold(fold, self.config["folds"], self.config["seed"])

    def _copy(self) -> None:
        """The copy at the end of a search; where it cannot be written, that is printed."""
        try:
            self.to_sqlite(self.path / COPY)
        except Exception as error:
            print(f"Search {self.name}: {COPY} could not be written: {error}")


def _counts(trial: Mapping[str, Any]) -> bool:
    """Is it done, and does it keep the constraints?"""
    return trial["state"] == "done" and all(violation <= 0 for violation in trial["violations"].values())


def _claimed(runs: Path, name: str, config: dict[str, Any], fresh: bool) -> tuple[Path, dict[str, Any], Any]:
    """The directory of a search, its settings and its lock: of an earlier one that goes on, or a new one."""
    path = (runs / name).absolute()
    if (path / FILE).exists() and not fresh:
        _end_trials(path)
        lock = server_file.hold(path)
        try:
            recorded = read_json(path / FILE)
            earlier = {name: config[name] for name in SINCE} | recorded
            if other := [key for key in SAME if earlier.get(key) != config[key]]:
                was = f"its {other[0]} is {short(earlier.get(other[0]))}, not {short(config[other[0]])}"
                raise RunError(f"{path} is another search: {was}. Give another name=..., or fresh=True to begin anew.")
            if other := code.differing(earlier["code"], config["code"]):
                of, part = other
                raise RunError(
                    f"{path} is another search: the code of its {of} is another one, in {part!r}. Give what it was before, or another "
                    "name=..., or fresh=True to begin anew."
                )
            earlier |= {name: config[name] for name in ("trials", "target")}
            if earlier != recorded:
                write_json(path / FILE, earlier, run=earlier["id"])
        except BaseException:
            lock.release()
            raise
        return path, earlier, lock
    id = secrets.token_hex(8)
    _end_trials(path)
    path, lock = claim(runs, name, id)
    config = {"id": id, "name": name, **config}
    write_json(path / "environment.json", environment(), run=id)
    write_json(path / FILE, config, run=id)
    return path, config, lock


def _trained(path: Path, study: Study) -> float:
    """Seconds of the search until which the runs that were cut off with the kernel had been trained, by their own records."""
    found = [0.0]
    for number, trial in enumerate(study.trials):
        for fold, unit in trial["units"].items():
            if unit["ended"] is None:
                with contextlib.suppress(RunError):  # it had no record yet, or a damaged one
                    rows = read_rows(path / "trials" / called(number, fold))
                    found.append(unit["begun"] + max((row.get("seconds") or 0.0 for row in rows), default=0.0))
    return max(found)


def _end_trials(path: Path) -> None:
    """End what still goes on of a search whose kernel has died: the servers of its runs outlive it for a while."""
    if locks.held(path) is not False:
        return
    for lock in path.glob(f"trials/*/{locks.LOCK}"):
        with contextlib.suppress(RunError):  # who cannot be reached is named by whoever holds the directory next
            if locks.held(lock.parent):
                Run(lock.parent).attach().stop()
        limit = time.monotonic() + ENDING_S
        while locks.held(lock.parent) and time.monotonic() < limit:
            time.sleep(0.05)
