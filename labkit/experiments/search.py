"""Search: which settings of a problem, its model and its training win; each trial is a run of its own on a block of workers.

    sampler (Optuna)  -- ask -->  point  -->  problem, folds  -->  runs on free blocks  -- score set -->  tell  -- log -->  sampler

One coordinator, a thread of the kernel, asks and tells. A block that is free draws the next run at once, of a trial that has folds
left or of a new one; what is under way is known to the sampler. The score of a trial is that of its last weights on the score set
(or the mean over the folds): the test set stays unseen.

    runs/<search>/search.json   log.jsonl (what was asked and told)   optuna.log (for optuna-dashboard)   trials/<number>[-<fold>]/ (runs)

Used in notebooks as `labkit.search` and `labkit.load_search`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import secrets
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.cluster.lab import Lab
from labkit.errors import SEEDS, ClusterError, LabError, RunError, calling, file_path, flag, instance, known, real, whole
from labkit.experiments.pruning import PRUNERS
from labkit.experiments.space import Space, arguments, check_names
from labkit.experiments.study import METHODS, Study
from labkit.imports import argument_names, constructor_arguments, imported, plain, reference, short
from labkit.models import MODELS
from labkit.partition import Partition, make_partition
from labkit.problems.problem import Problem
from labkit.runs import checkpoints, server_file
from labkit.runs.config import environment
from labkit.runs.files import read_json, write_json
from labkit.training.blocks import run_on_blocks
from labkit.training.run import Run
from labkit.training.train import (
    check_lengths,
    check_shards,
    check_traffic,
    check_travels,
    check_under,
    choose,
    claim,
    configure,
    launch,
    leased,
    run_name,
)
from labkit.updates import Update, make_update

if TYPE_CHECKING:
    import pandas as pd

FILE = "search.json"
TRAINING = ("partition", "update", "passes", "local_steps", "exchange", "overlap")  # what a space may set beside the problem
SAME = ("problem", "space", "method", "seed", "folds", "prune", "training")  # by which a search is found again
COLUMNS = ("score", "state", "error", "seconds", "workers")  # of the table, behind the parameters
TRIALS = 40
ATTEMPTS = 2  # of a run that the end of the kernel has cut off


def search(
    problem: Problem | type[Problem] | Callable[..., Problem],
    space: Mapping[str, Any],
    lab: Lab,
    *,
    method: str = "gp",
    trials: int | None = None,
    workers_per_trial: int | None = None,
    folds: int | None = None,
    prune: str | None = None,
    objective: Callable[[Run], float] | None = None,
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
        function of the point that returns a problem, `lambda lr, width: labkit.Classifier(...)`.
    space
        Values by name (`labkit.experiments.space`): (low, high), (low, high, "log"), (low, high, "int"), a range, a list of choices,
        or a dict of choices with parameters that only they have. A name is an argument of the problem, of its model, or of its
        training: partition, update, passes, local_steps, exchange, overlap.
    method
        "gp": a Gaussian process (where some points only have a parameter, "tpe" is taken, which is printed); "evolution": in
        generations of a fifth of the trials, CMA-ES where all parameters are ranges, else NSGA-II; "tpe": a tree of Parzen estimators; "random"; "grid": all points in turn.
    trials
        How many, 40 by default, or the whole grid. Of "gp" and "tpe" a fifth, 3 to 10, is drawn at random first.
    workers_per_trial
        Workers of a block, which trains one run at a time; 2 by default, where the lab has as many.
    folds
        Each trial is trained on so many folds (`Problem.fold`), each a run of its own; their scores are averaged.
    prune
        Trials that do badly end early (`labkit.experiments.pruning`): "asha", by successive halving after 1/9 and 1/3 of their passes,
        "extrapolate", where a power law through their scores ends below the best one; or with `folds`, "wilcoxon", where they are
        worse than the best trial on those that they have had. For the sampler they have the score that they had reached.
    objective
        A number of a run that is done, in the sense in which its problem's score is better; by default its score on the score set
        (less the loss where it has none). Called in this kernel; the coordinator waits for it.
    target
        No trial begins any more when one has reached this score.
    partition, update, passes, local_steps, exchange, overlap
        Of each run, as in `labkit.train`, where the space has no such name.
    seed
        Of the points; weights and orders of a trial derive from it and the number of the trial.
    name, runs
        All is recorded in `runs/name`. The same call goes on where an earlier one was cut off, also with more `trials`: trials that were
        under way are trained again, none is lost or made twice. `fresh=True` begins anew; what was there is kept under `name.1`.
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
    """
    space, method = Space(space), known("method", method, METHODS)
    if taken := [one for one in space.names if one in ("trial", *COLUMNS)]:
        raise ValueError(f"space {taken[0]!r}: the table of a search has a column of this name. Give the parameter another one.")
    update, partition = make_update(update), make_partition(partition)
    passes, local_steps, _ = check_lengths(passes, local_steps, 1).values()
    exchange, overlap = check_traffic(update, exchange, overlap).values()
    training = {"partition": partition, "update": update, "passes": passes, "local_steps": local_steps}
    make = Maker(problem, space, {**training, "exchange": exchange, "overlap": overlap})
    instance("lab", lab, Lab, " of labkit.connect(...)")
    seed, folds = whole("seed", seed, 0, SEEDS, error=ValueError), None if folds is None else whole("folds", folds, 2)
    prune = None if prune is None else known("prune", prune, PRUNERS)
    if folds and isinstance(problem, Problem) and problem._fold:
        raise ValueError(f"folds={folds}: this problem is one fold of a cross-validation already. Give the whole one.")
    if prune and (prune == "wilcoxon") != (folds is not None):
        of = "compares folds: give folds=5, say" if folds is None else 'goes by the passes of one run: with folds take "wilcoxon"'
        raise ValueError(f"prune={prune!r} {of}, or leave it out.")
    if prune and prune != "wilcoxon" and objective is not None:
        raise ValueError(f"prune={prune!r} goes by the score set, and objective= is known only in the end. Leave out one of them.")
    objective = None if objective is None else instance("objective", objective, Callable, ", objective(run)")
    target = None if target is None else real("target", target)
    fresh, wait, progress = (flag(*one) for one in {"fresh": fresh, "wait": wait, "progress": progress}.items())
    runs, name = file_path("runs", runs), run_name(name)
    n_grid = len(space.grid()) if method == "grid" else None
    trials = n_grid or TRIALS if trials is None else min(whole("trials", trials), n_grid or math.inf)
    if method == "gp" and space.conditional:
        print("method='tpe' is taken for 'gp', which draws parameters that only some points have at random.")
        method = "tpe"
    workers = choose(lab, workers, runs / name)
    size = min(2, len(workers)) if workers_per_trial is None else whole("workers_per_trial", workers_per_trial)
    if (workers_per_trial := size) > len(workers):
        raise ClusterError(f"workers_per_trial={size}, and there are {len(workers)} workers: {workers}.")
    n_random = max(4, min(50, trials // 5)) if method == "evolution" else max(3, min(10, trials // 5))
    config = {"problem": make.reference(), "space": space.config(), "method": method, "seed": seed, "folds": folds, "prune": prune}
    config = plain(config | {"training": make.training_config(), "trials": trials, "target": target, "n_random": n_random})
    path, config, lock = _claimed(runs, name, config, fresh)
    try:
        study = Study(space, method, seed, config["n_random"], path, prune=prune)
        found = Search(path, config, study, make)
        _Blocks(found, lab, workers, size, objective, lock, progress).start()
    except BaseException:
        lock.release()
        raise
    return found.wait() if wait else found


def load_search(path: str | Path) -> Search:
    """Read a search back from its directory: its table, its points, its best run, its replay."""
    path = file_path("path", path)
    config = read_json(path / FILE)
    return Search(path, config, _study_of(config, path, readonly=True))


class Search:
    """A search: what was tried, and what came out. `path`, `name` and `config` are its directory, name and settings."""

    def __init__(self, path: Path, config: Mapping[str, Any], study: Study, make: Maker | None = None) -> None:
        self.path, self.name, self.config = path, path.name, dict(config)
        self._study, self._make, self._blocks = study, make, None

    # -- while it goes -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "running", "done", "stopped" (by `stop`), or "failed"."""
        if self._blocks:
            return self._blocks.state
        return "done" if self._n_told() >= self.config["trials"] or self._has_reached() else "stopped"

    def wait(self, timeout: float = math.inf) -> Search:
        """Block until all trials have ended; returns the search. An interrupt stops it, and the same call of `labkit.search` goes on."""
        if self._blocks:
            self._blocks.wait(real("timeout", timeout, least=0, finite=False))
        return self

    def stop(self, timeout: float = 60.0) -> Search:
        """End it now. Trials under way are stopped, and trained again when the same call of `labkit.search` goes on."""
        if self._blocks:
            self._blocks.stop(real("timeout", timeout, least=0, finite=False))
        return self

    # -- what came out -------------------------------------------------------------------------------------------

    @property
    def points(self) -> list[dict[str, Any]]:
        """The points in the order in which they were asked for, a dict a trial; choices that are objects by their names."""
        return self._study.points

    def table(self) -> pd.DataFrame:
        """One row a trial.

        Columns: `trial` (its number), the parameters (None where a point has none), `score` (the mean over the folds), `state` (running, done, pruned, failed),
        `error`, `seconds` (from its first run's begin to its last one's end), and `workers` of its latest run.
        """
        import pandas as pd

        rows = [self._row(number, trial) for number, trial in enumerate(list(self._study.trials))]
        return pd.DataFrame(rows, columns=["trial", *self._study.space.names, *COLUMNS])

    def timeline(self) -> pd.DataFrame:
        """One row a run and worker: trial, fold, worker, start and end (seconds of the search), passes (of the run), score, error."""
        import pandas as pd

        columns = ["trial", "fold", "worker", "start", "end", "passes", "score", "error"]
        rows = [
            (number, fold, worker, unit["begun"], unit["ended"], unit["passes"], unit["score"], unit["error"])
            for number, trial in enumerate(list(self._study.trials))
            for fold, unit in list(trial["units"].items())
            for worker in unit["workers"]
        ]
        return pd.DataFrame(rows, columns=columns)

    @property
    def lower_is_better(self) -> bool:
        """Is a score of which less is better searched?"""
        return any(unit["sign"] == -1 for trial in self._study.trials for unit in trial["units"].values())

    def importance(self) -> pd.Series:
        """By parameter, the largest first: how much it decides whether a trial is among the best tenth (PED-ANOVA, Watanabe et al., IJCAI
        2023); they sum to 1. RunError with too few trials."""
        import pandas as pd

        if sum(trial["state"] in ("done", "pruned") for trial in self._study.trials) < 4:
            raise RunError(f"search {self.name} has too few trials with a score to say what matters; it needs 4 at least.")
        return pd.Series(self._study.importance(), name="importance", dtype=float)

    @property
    def best(self) -> pd.Series:
        """The row of `table()` with the best score; RunError while none has one."""
        return self.table().iloc[self._best()]

    def run(self, trial: int | None = None, fold: int | None = None) -> Run:
        """The run of a trial, by default of the best one, with its weights, its curve and its record."""
        number = self._number(trial)
        units = self._study.trials[number]["units"]
        fold = next(iter(units), None) if fold is None else whole("fold", fold, 0)
        if fold not in units:
            raise RunError(f"trial {number} of {self.name} has no run" + ("." if fold is None else f" of fold {fold}."))
        return Run(self.path / "trials" / _called(number, fold), problem=self._problem_of(number, fold))

    def problem(self, trial: int | None = None) -> Problem:
        """The problem of a trial, by default of the best one, as `labkit.train` takes it: on all samples, without folds."""
        number = self._number(trial)
        return self._problem_of(number, None) or self.run(number).problem()._folded(None)

    def training(self, trial: int | None = None) -> dict[str, Any]:
        """What `labkit.train` gets beside the problem in a trial, by default in the best one: update, partition, passes and so on."""
        number = self._number(trial)
        if self._make:
            return self._make(self._study.trials[number]["point"])[1]
        return {name: self.config["training"][name] for name in TRAINING} | {
            name: value for name, value in self._study.trials[number]["point"].items() if name in TRAINING
        }

    def replay(self) -> Search:
        """The same search, asked and told in the order of its log, with points that the sampler makes anew: the same ones, however
        many blocks there were. Nothing is trained."""
        return Search(self.path, self.config, self._study.replay(), self._make)

    def __repr__(self) -> str:
        trials = self._study.trials
        try:
            best = f", best score {self.best.score:.4g}"
        except RunError:
            best = ""
        return f"<Search {self.name}: {self.config['method']}, {self.state}, {len(trials)} of {self.config['trials']} trials{best}>"

    def _row(self, number: int, trial: dict) -> dict[str, Any]:
        units = list(trial["units"].values())
        scores = [unit["score"] for unit in units if unit["score"] is not None]
        ends = [unit["ended"] for unit in units if unit["ended"] is not None]
        seconds = max(ends) - min(unit["begun"] for unit in units) if ends else math.nan
        score = sum(scores) / len(scores) if scores and trial["state"] in ("done", "pruned") else math.nan
        last = {"score": score, "state": trial["state"], "error": trial["error"], "seconds": seconds}
        return {"trial": number, **trial["point"], **last, "workers": units[-1]["workers"] if units else []}

    def _has_reached(self) -> bool:
        """Has a trial reached the target?"""
        target, sign = self.config["target"], -1 if self.lower_is_better else 1
        return target is not None and any(one["state"] == "done" and one["value"] >= sign * target for one in self._study.trials)

    def _n_told(self) -> int:
        return sum(trial["told"] is not None for trial in self._study.trials)

    def _best(self) -> int:
        told = {number: trial["value"] for number, trial in enumerate(self._study.trials) if trial["state"] == "done"}
        if not told:
            errors = [f" Trial {number}: {trial['error']}" for number, trial in enumerate(self._study.trials) if trial["error"]]
            raise RunError(f"no trial of search {self.name} has a score.{errors[0] if errors else ''}")
        return max(told, key=told.__getitem__)

    def _number(self, trial: int | None) -> int:
        return self._best() if trial is None else whole("trial", trial, 0, len(self._study.trials) - 1)

    def _problem_of(self, number: int, fold: int | None) -> Problem | None:
        if self._make is None:
            return None
        problem = self._make(self._study.trials[number]["point"])[0]
        return problem if fold is None else problem.fold(fold, self.config["folds"], self.config["seed"])


class Maker:
    """Makes of a point the problem and the settings of its training."""

    def __init__(self, problem: Any, space: Space, training: dict[str, Any]) -> None:
        self.given, self.space, self.training = problem, space, training
        if isinstance(problem, Problem):
            self.cls, self.defaults, needed = type(problem), constructor_arguments(problem), []
        elif isinstance(problem, type) and issubclass(problem, Problem):
            self.cls, self.defaults, needed = problem, {}, arguments(problem)[1]
        elif callable(problem):
            self.cls, self.defaults = None, {}
            self.names, needed, free = arguments(problem)
            check_names(space, None if free else {"the function": self.names, "the training": TRAINING}, needed)
            self.names += [name for name in space.names if free and name not in TRAINING]
            return
        else:
            what = "a labkit.Problem, a class of them, or a function of the point that returns one"
            raise TypeError(f"problem is a {type(problem).__name__}; give {what}.")
        self.names = argument_names(self.cls)
        self.of_model = self._model_arguments() if "model_args" in self.names else []
        accepted = {self.cls.__name__: self.names, "its model": [name for name in self.of_model if name not in self.names]}
        check_names(space, accepted | {"the training": TRAINING}, needed)

    def __call__(self, point: Mapping[str, Any]) -> tuple[Problem, dict[str, Any]]:
        values = self.space.values(point)
        own = {name: value for name, value in values.items() if name in self.names}
        training = self.training | {name: value for name, value in values.items() if name in TRAINING and name not in own}
        if self.cls is None:
            with calling(f"{short(self.given)} of {values}"):
                problem = self.given(**own)
            if not isinstance(problem, Problem):
                raise RunError(f"{short(self.given)} returned a {type(problem).__name__}, no labkit.Problem.")
            return problem, training
        made = self.defaults | own
        if more := {name: value for name, value in values.items() if name not in self.names and name not in TRAINING}:
            made["model_args"] = {**(made.get("model_args") or {}), **more}
        problem = self.cls(**made)
        return problem.fold(*self.given._fold) if self.defaults and self.given._fold else problem, training

    def reference(self) -> Any:
        """Of the problem, for the record."""
        return self.given.config() if isinstance(self.given, Problem) else reference(self.given)

    def training_config(self) -> dict[str, Any]:
        return self.training | {rule: self.training[rule].config() for rule in ("update", "partition")}

    def _model_arguments(self) -> list[str]:
        """The arguments of every model that there may be, but for shape and number of outputs."""
        given = self.space.parameters.get("model")
        models = [self.defaults.get("model", _default(self.cls, "model"))]
        if given:
            models = [given.values.get(choice, choice) for choice in given.options("model")]
        found: dict[str, None] = {}
        for model in models:
            make = MODELS.get(model) or (imported(model) if ":" in model else None) if isinstance(model, str) else model
            if callable(make) and not hasattr(make, "parameters"):
                names, needed, _ = arguments(make)
                found |= dict.fromkeys(name for name in names if name not in needed[:2])
        return list(found)


def _default(cls: type, name: str) -> Any:
    """What an argument of a class is where it is not given; None where it has to be."""
    parameter = inspect.signature(cls).parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


class _Blocks:
    """The coordinator of a search: asks, starts runs on free blocks, and tells what they gave, in a thread of its own."""

    def __init__(
        self, found: Search, lab: Lab, workers: list[int], size: int, objective: Callable | None, lock: Any, progress: bool
    ) -> None:
        self.found, self.lab, self.workers, self.size = found, lab, workers, size
        self.objective, self.lock, self.progress = objective, lock, progress
        self.study, self.config = found._study, found.config
        self.state, self.error = "running", None
        self.pending = deque(self._cut_off())
        self.measured: dict[tuple, dict[int, tuple[int, dict]]] = {}  # by run and version: the step, what it gave on the score set
        self.attempts, self.ending = Counter(), set()  # of runs whose block was lost; names of runs that are being stopped
        self._stop, self._over = threading.Event(), threading.Event()
        found._blocks = self

    def start(self) -> None:
        id = self.config["id"]
        with leased(self.lab, self.workers, id, self.found.path):
            threading.Thread(target=self._follow, name=f"labkit-{self.found.name}", daemon=True).start()

    def wait(self, timeout: float) -> None:
        limit = time.monotonic() + timeout
        try:
            while not self._over.wait(0.1):
                if time.monotonic() > limit:
                    raise RunError(f"search {self.found.name} is still running after {timeout:g} s. Wait again, or stop() it.")
        except KeyboardInterrupt:
            self.stop(60)
            raise
        if self.error:
            raise self.error.with_traceback(None)

    def stop(self, timeout: float) -> None:
        self._stop.set()
        if not self._over.wait(timeout):
            raise RunError(f"search {self.found.name} has not ended within {timeout:g} s.")

    # -- the jobs of the blocks ----------------------------------------------------------------------------------

    def __iter__(self) -> _Blocks:
        return self

    def __next__(self) -> tuple[int, int | None]:
        """The next run: of a trial that was cut off, of a fold that is left, or of a new trial; StopIteration while there is none."""
        left = self.config["trials"] - len(self.study.trials)
        if not self.pending and not self._stop.is_set() and left > 0 and not self.found._has_reached():
            number = self.study.ask()
            self.pending.extend((number, fold) for fold in self._folds())
        if not self.pending:
            raise StopIteration
        return self.pending.popleft()

    def _folds(self) -> Sequence[int | None]:
        return range(self.config["folds"]) if self.config["folds"] else (None,)

    def _cut_off(self) -> list[tuple[int, int | None]]:
        """The runs of trials that were under way when the search was cut off; a trial that was so too often has failed."""
        left = []
        for number, trial in enumerate(self.study.trials):
            if trial["told"] is not None:
                continue
            units = trial["units"]
            if any(unit["ended"] is None and unit["times"] >= ATTEMPTS for unit in units.values()):
                self.study.tell(number, "failed", error=f"it was cut off {ATTEMPTS} times, with the kernel")
            elif trial["worse"]:
                reports = [trial["reports"][step] for step in sorted(trial["reports"])]
                self.study.tell(number, "pruned", reports[-1] if units.keys() <= {None} else sum(reports) / len(reports))
            elif runs := [(number, fold) for fold in self._folds() if fold not in units or units[fold]["ended"] is None]:
                left += runs
            else:
                self._tell(number)
        return left

    def _begin(self, job: tuple[int, int | None], workers: list[int]) -> Run | None:
        number, fold = job
        self.study.begin(number, fold, workers)
        try:
            problem, settings = self.found._make(self.study.trials[number]["point"])
            problem = problem if fold is None else problem.fold(fold, self.config["folds"], self.config["seed"])
            return self._launch(problem, settings, number, fold, workers)
        except ClusterError as error:
            if self.lab.closed:
                raise
            return self._again(job, error)
        except Exception as error:
            return self._end(job, None, None, error)

    def _launch(self, problem: Problem, settings: dict[str, Any], number: int, fold: int | None, workers: list[int]) -> Run:
        seed, update, partition = self.study.seed_of(number), make_update(settings["update"]), make_partition(settings["partition"])
        steps = PRUNERS[self.study.prune].steps if self.study.prune else 1
        lengths = check_lengths(settings["passes"], settings["local_steps"], steps)
        traffic = check_traffic(update, settings["exchange"], settings["overlap"])
        check_under(problem, update, seed, scored=False)
        check_shards(problem, workers, partition)
        check_travels(problem, update, partition)
        named = {"name": _called(number, fold), "seed": seed}
        config = configure(problem, self.lab, workers, update, partition, **named, **lengths, **traffic)
        measured = self.measured[number, fold] = {}

        def note(run: Run, version: int, values: dict[str, float]) -> None:
            done = int(checkpoints.read_state(run.path, version)[1].get("done", 0))
            measured[version] = done * steps // config.budget, values

        return launch(problem, self.lab, config, update, partition, self.found.path / "trials", on_version=note)

    def _each(self, job: tuple[int, int | None], run: Run) -> None:
        if self._stop.is_set():
            raise _Stopped
        if self.lab.closed:
            raise ClusterError("the lab was closed. The same call on another lab goes on from here.")
        number, fold = job
        unit = self.study.trials[number]["units"].get(fold)
        if unit is None or unit["ended"] is not None:  # seen at the last look, when it had ended just then
            return
        is_lost = not set(unit["workers"]) - set(self.lab.lost())
        if run.state == "running":
            if is_lost or self._is_worse(job, run):
                self._end_early(run)
            return
        try:
            if is_lost and run.state != "done":
                return self._again(job, ClusterError("the workers of its block were lost"))
            if run.wait(10).state != "done" and not self.study.trials[number]["worse"]:
                raise RunError(f"run {run.name} was {run.state}: {run.status().get('reason', '')}")
            self._end(job, run, self._value(job, run), None)
        except Exception as error:
            self._end(job, run, None, error)

    def _again(self, job: tuple[int, int | None], error: Exception) -> None:
        """A run whose block was lost is made again on another one, once."""
        self.attempts[job] += 1
        if self.attempts[job] >= ATTEMPTS:
            self._end(job, None, None, error)
        else:
            self.study.leave(*job)
            self.pending.append(job)

    def _is_worse(self, job: tuple[int, int | None], run: Run) -> bool:
        """Report what is new of a run; is it to end early?"""
        number, _ = job
        trial = self.study.trials[number]
        if self.study.prune in ("asha", "extrapolate"):
            for step, values in [self.measured[job][version] for version in sorted(list(self.measured[job]))]:
                value = _score(values, run) * _sign(run)
                if step > max(trial["reports"], default=0) and math.isfinite(value) and not trial["worse"]:
                    self.study.report(number, step, value)
        return trial["worse"]

    def _end_early(self, run: Run) -> None:
        """Stop a run, without waiting for it here."""
        if run.name not in self.ending:
            self.ending.add(run.name)
            threading.Thread(target=run.stop, name=f"labkit-stop-{run.name}", daemon=True).start()

    def _value(self, job: tuple[int, int | None], run: Run) -> float:
        """What a run that has ended is worth, in the sense of its problem."""
        measured = self.measured[job]
        if self.objective:
            with calling(f"objective={short(self.objective)}", RunError):
                value = float(self.objective(run))
        else:
            value = _score(measured[max(measured)][1], run)
        if not math.isfinite(value):
            raise RunError(f"its score is {value}")
        return value

    def _end(self, job: tuple[int, int | None], run: Run | None, value: float | None, error: Exception | None) -> None:
        number, fold = job
        self.measured.pop(job, None)
        text = "" if error is None else _line(error)
        passes = None if run is None else run.status().get("samples", 0) / run.config.n_train
        self.study.end(number, fold, value, 1 if run is None else _sign(run), text, passes)
        trial = self.study.trials[number]
        if self.study.prune == "wilcoxon" and not text:
            self.study.report(number, fold, value * _sign(run))
        if text or trial["worse"]:  # what is left of the trial is not trained
            self.pending = deque(left for left in self.pending if left[0] != number)
        if all(unit["ended"] is not None for unit in trial["units"].values()) and all(left[0] != number for left in self.pending):
            whole = run is None or (run.state == "done" and len(trial["units"]) == len(self._folds()))
            self._tell(number, "done" if whole else "pruned")

    def _tell(self, number: int, state: str = "done") -> None:
        units = self.study.trials[number]["units"]
        errors = [unit["error"] for unit in units.values() if unit["error"]]
        if errors:
            self.study.tell(number, "failed", error=errors[0])
        else:
            values = [unit["score"] * unit["sign"] for unit in units.values()]
            self.study.tell(number, state, sum(values) / len(values))
        if self.progress:
            print(self._said(number), flush=True)

    def _said(self, number: int) -> str:
        row = self.found._row(number, self.study.trials[number])
        point = ", ".join(f"{name} {_short(value)}" for name, value in self.study.trials[number]["point"].items())
        came = row["error"] if row["error"] else f"score {row['score']:.4g}" + " (pruned)" * (row["state"] == "pruned")
        if row["state"] == "done" and self.found._best() == number:
            came += " (the best so far)"
        on = "" if not row["workers"] else f", {row['seconds']:.1f} s on workers {', '.join(map(str, row['workers']))}"
        return f"trial {number + 1} of {self.config['trials']}: {point}: {came}{on}"

    # -- from the first to the last ------------------------------------------------------------------------------

    def _follow(self) -> None:
        try:
            run_on_blocks(self.lab, self.workers, self.size, self, self._begin, self._each, timeout=math.inf)
            self.state = "stopped" if self._stop.is_set() else "done"
        except _Stopped:
            self.state = "stopped"
        except BaseException as error:  # whatever it is, `wait` raises it
            self.state, self.error = "failed", error
            if not isinstance(error, LabError):
                self.error = RunError(f"search {self.found.name} failed: {error!r}\n{traceback.format_exc()}")
        finally:
            with contextlib.ExitStack() as last:  # all of it, the last line first
                last.callback(self._over.set)
                last.callback(self.lab.release, self.config["id"])
                last.callback(self.lock.release)
                for number, trial in enumerate(self.study.trials):
                    for fold in [fold for fold, unit in trial["units"].items() if unit["ended"] is None]:
                        self.study.leave(number, fold)


class _Stopped(Exception):
    """The search was stopped."""


def _claimed(runs: Path, name: str, config: dict[str, Any], fresh: bool) -> tuple[Path, dict[str, Any], Any]:
    """The directory of a search, its settings and its lock: of an earlier one that goes on, or a new one."""
    path = (runs / name).absolute()
    if (path / FILE).exists() and not fresh:
        lock = server_file.hold(path)
        try:
            earlier = read_json(path / FILE)
            if other := [key for key in SAME if earlier.get(key) != config[key]]:
                was = f"its {other[0]} is {short(earlier.get(other[0]))}, not {short(config[other[0]])}"
                raise RunError(f"{path} is another search: {was}. Give another name=..., or fresh=True to begin anew.")
            length = {name: config[name] for name in ("trials", "target")}
            if any(earlier[name] != value for name, value in length.items()):
                write_json(path / FILE, earlier | length, run=earlier["id"])
        except BaseException:
            lock.release()
            raise
        return path, earlier | length, lock
    id = secrets.token_hex(8)
    path, lock = claim(runs, name, id)
    config = {"id": id, "name": name, **config}
    write_json(path / "environment.json", environment(), run=id)
    write_json(path / FILE, config, run=id)
    return path, config, lock


def _study_of(config: Mapping[str, Any], path: Path, readonly: bool) -> Study:
    space = Space.from_config(config["space"])
    return Study(space, config["method"], config["seed"], config["n_random"], path, prune=config["prune"], readonly=readonly)


def _called(number: int, fold: int | None) -> str:
    return f"{number}" if fold is None else f"{number}-{fold}"


def _score(values: Mapping[str, float], run: Run) -> float:
    """Of what was measured the score, or where there is none the loss, less it where more is to be better."""
    return values.get("score", values["loss"] * -_sign(run))


def _sign(run: Run) -> int:
    return -1 if run.config.lower_is_better else 1


def _line(error: Exception) -> str:
    """An error in one line of the table."""
    text = str(error.args[0] if error.args else error).strip().partition("\n")[0]
    return text if isinstance(error, LabError) else f"{type(error).__name__}: {text}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
