"""The coordinator of a search: asks for points, starts their runs on free blocks, and tells what they gave; a thread of the kernel.

    job = (trial, fold)   begin -> run -> reports -> end;  the last run of a trial that ends tells of it

A Gaussian process needs up to seconds for a point. So with several blocks it is asked ahead, in a thread of its own, while all blocks
train: a free block begins at once with the point that is there. What ends meanwhile is logged when the point is there, so that a point
depends on the lines before it and on nothing else. Each run is started in a thread of its own: its server takes a part of a second to
come, for which no other block waits.

What has happened is in the log before anything follows from it, so that whatever ends the kernel, and wherever, the next
coordinator goes on from there (`_left`): runs that had begun are made again, runs that had ended are not. A kernel may be killed as often as
anybody likes; but a run that ends it itself (a crash in a lab of threads) would do so for ever. So a run that was cut off twice is
made again with no other one beside it, and one that was cut off like this SAME_END times in a row after about the same time has failed.

Used by `labkit.experiments.search`.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from labkit.cluster.lab import Lab
from labkit.errors import ClusterError, LabError, RunError, interrupted, traceback_of
from labkit.experiments.objectives import Goals, merit
from labkit.experiments.pruning import PRUNERS
from labkit.experiments.trials import Notebook, NotebookRun
from labkit.partition import make_partition
from labkit.problems.problem import Problem
from labkit.runs import checkpoints
from labkit.runs.files import find_json, write_json
from labkit.training.blocks import run_on_blocks
from labkit.training.run import Run
from labkit.training.train import (
    check_lengths,
    check_shards,
    check_traffic,
    check_travels,
    check_under,
    configure,
    launch,
    leased,
)
from labkit.updates import make_update

ATTEMPTS = 2  # of a run whose block was lost
SAME_END = 3  # so often the kernel ends after about the same time of a run that is alone, before that run is taken to have ended it
MOST_ENDS = 10  # or so often after any time
ALIVE = "alive.json"  # how long each run has been under way: what a kernel that was killed leaves of it
ALIVE_S = 1.0  # between two of these
CLOSED = "the lab was closed. The same call on another lab goes on from here."
LOST_S = 5.0  # so long the workers of a block that are all lost may take to come back, before its run goes to another one

Job = tuple[int, int | None]  # trial and fold, None without folds


class Coordinator:
    """One search in the kernel that has started it, from `start` to its end."""

    def __init__(self, found: Any, goals: Goals, lab: Lab, workers: list[int], size: int, lock: Any, progress: bool) -> None:
        self.found, self.goals, self.lab, self.workers, self.size = found, goals, lab, workers, size
        self.lock, self.progress = lock, progress
        self.study, self.config, self.make = found._study, found.config, found._make
        self.state, self.error = "running", None
        self.alone: set[Job] = set()  # jobs whose runs may have ended a kernel: no other one is under way beside them
        self.pending = deque(self._left())
        self.current: dict[Job, _Launch] = {}  # the run of a job that is under way
        self.measured: dict[Job, dict[int, tuple[int, dict]]] = {}  # by version: the step, what it gave on the score set
        self.attempts: Counter[Job] = Counter()  # of runs whose block was lost
        self.lost_at: dict[Job, float] = {}  # since when all workers of a job are lost
        self.ending: set[Job] = set()  # whose runs are being stopped
        # A target ends the search with the first trial that reaches it: then none may be asked for before it can begin.
        self.asks_ahead = self.study.method == "gp" and len(workers) >= 2 * size and self.config["target"] is None
        self.asked: Future[int] | None = None  # the next trial, which is being asked for
        self.late: deque[tuple[Job, _Launch]] = deque()  # runs that have ended meanwhile
        self._asker = ThreadPoolExecutor(1, f"labkit-ask-{found.name}")
        self._launcher = ThreadPoolExecutor(len(workers) // size, f"labkit-launch-{found.name}")
        self._making = threading.Lock()  # a function of the point is called by one thread at a time
        self._said_at = 0.0  # when it was last written what is under way
        self._stop, self._over = threading.Event(), threading.Event()
        found._coordinator = self

    def start(self) -> None:
        with leased(self.lab, self.workers, self.config["id"], self.found.path):
            threading.Thread(target=self._follow, name=f"labkit-{self.found.name}", daemon=True).start()

    def wait(self, timeout: float) -> None:
        limit = time.monotonic() + timeout
        try:
            while not self._over.wait(0.1):
                if time.monotonic() > limit:
                    raise RunError(f"search {self.found.name} is still running after {timeout:g} s. Wait again, or stop() it.")
        except KeyboardInterrupt:
            self.stop(60)
            raise interrupted(f"search {self.found.name} has stopped. The same call of labkit.search goes on with it.") from None
        if self.error:
            raise self.error.with_traceback(None)

    def stop(self, timeout: float) -> None:
        self._stop.set()
        if not self._over.wait(timeout):
            raise RunError(f"search {self.found.name} has not ended within {timeout:g} s.")

    # -- the jobs of the blocks ----------------------------------------------------------------------------------

    def __iter__(self) -> Coordinator:
        return self

    def __next__(self) -> Job:
        """The next run: of a trial that was cut off, of a fold that is left, or of a new trial; StopIteration while none may begin."""
        if self._stop.is_set():
            raise _Stopped
        if not self.pending and self._asks_more() and self.asked is None:
            self._ask()
        if not self.pending:
            self._collect(wait=len(self.current) == len(self.late))
        together = (job for job in self.pending if job not in self.alone)
        job = None if self.alone.intersection(self.current) else next(together, None)
        if job is None and self.pending and not self.current:
            job = self.pending[0]
        if job is None:
            raise StopIteration
        self.pending.remove(job)
        return job

    def _asks_more(self) -> bool:
        return len(self.study.trials) < self.config["trials"] and not self.found._has_reached()

    def _ask(self) -> None:
        self.asked = self._asker.submit(self.study.ask)
        if not self.asks_ahead:
            self._collect(wait=True)

    def _collect(self, wait: bool = False) -> None:
        """The jobs of the trial that was asked for, if it is there, and the ends of runs that had to wait for it."""
        if self.asked is not None and (wait or self.asked.done()):
            number, self.asked = self.asked.result(), None
            self.pending.extend((number, fold) for fold in self._folds())
        while self.late and self.asked is None:
            self._ended(*self.late.popleft())

    def _folds(self) -> Sequence[int | None]:
        return range(self.config["folds"]) if self.config["folds"] else (None,)

    def _left(self) -> list[Job]:
        """The runs that are left of trials that were under way when the search was cut off. Of one that needs none more it is told; so
        it is of one that ends the kernel itself, which has failed."""
        left: list[Job] = []
        self._log_cuts()
        for number, trial in enumerate(self.study.trials):
            if trial["told"] is not None:
                continue
            units, cuts = trial["units"], trial["cuts"]
            runs = [(number, fold) for fold in self._folds() if fold not in units]
            if not runs or trial["worse"] or any(unit["error"] for unit in units.values()):
                self._tell(number)
            elif reason := next(filter(None, (_crashes(cuts.get(fold, ())) for _, fold in runs)), ""):
                self.study.tell(number, "failed", error=reason)
            else:
                left += runs
                self.alone.update((number, fold) for _, fold in runs if len(cuts.get(fold, ())) > 1)
        return left

    def _log_cuts(self) -> None:
        """Log of the runs that were under way when the kernel ended how long they were, and how many there were beside them."""
        file = self.found.path / ALIVE
        seconds = find_json(file) or {}
        cut = [(n, fold) for n, it in enumerate(self.study.trials) for fold, unit in it["units"].items() if unit["ended"] is None]
        for job in cut:
            self.study.leave(*job, cut=(seconds.get(called(*job), 0.0), len(cut) - 1))
        file.unlink(missing_ok=True)

    def _say_alive(self) -> None:
        if (now := time.monotonic()) - self._said_at >= ALIVE_S:
            self._said_at = now
            write_json(self.found.path / ALIVE, {called(*job): round(now - it.begun, 1) for job, it in self.current.items()})

    def _begin(self, job: Job, workers: list[int]) -> _Launch:
        workers = workers[:1] if isinstance(self.make, Notebook) else workers
        self.study.begin(*job, workers)
        launch = self.current[job] = _Launch(self._launcher.submit(self._start, *job, workers))
        return launch

    def _start(self, number: int, fold: int | None, workers: list[int]) -> Run | NotebookRun:
        point = self.study.trials[number]["point"]
        if isinstance(self.make, Notebook):
            return self.make.start(self.lab, point, self.found.path / "trials" / called(number, fold), workers)
        with self._making:
            problem, settings = self.make(point)
            problem = problem if fold is None else problem.fold(fold, self.config["folds"], self.config["seed"])
        return self._launch(problem, settings, number, fold, workers)

    def _launch(self, problem: Problem, settings: dict[str, Any], number: int, fold: int | None, workers: list[int]) -> Run:
        seed, update, partition = self.study.seed_of(number), make_update(settings["update"]), make_partition(settings["partition"])
        steps = PRUNERS[self.study.prune].steps if self.study.prune else 1
        lengths = check_lengths(settings["passes"], settings["local_steps"], steps)
        traffic = check_traffic(update, settings["exchange"], settings["overlap"])
        check_under(problem, update, seed, scored=False)
        check_shards(problem, workers, partition)
        check_travels(problem, update, partition)
        named = {"name": called(number, fold), "seed": seed}
        config = configure(problem, self.lab, workers, update, partition, **named, **lengths, **traffic)
        measured = self.measured[number, fold] = {}

        def note(run: Run, version: int, values: dict[str, float]) -> None:
            with contextlib.suppress(OSError, RunError):  # pruned meanwhile; the last one never is
                done = int(checkpoints.read_state(run.path, version)[1].get("done", 0))
                measured[version] = done * steps // config.budget, values

        folder = self.found.path / "trials"
        return launch(
            problem, self.lab, config, update, partition, folder, on_version=note, curve=False
        )  # no trial sees the test set

    def _each(self, job: Job, launch: _Launch) -> None:
        if self._stop.is_set():
            raise _Stopped
        if self.lab.closing:
            raise ClusterError(CLOSED)
        self._say_alive()
        self._collect()
        if self.current.get(job) is not launch:  # seen at the last look, when it had ended just then
            return
        if launch.state == "running":
            if self.asks_ahead and self.asked is None and not self.pending and self._asks_more():
                self._ask()
            elif self.asked is None and launch.run:
                self._report(job, launch.run)
            if self.study.trials[job[0]]["worse"] or self._is_lost(job):
                self._end_early(job, launch)
        elif self.asked is not None:
            if (job, launch) not in self.late:
                self.late.append((job, launch))
        else:
            self._ended(job, launch)

    def _ended(self, job: Job, launch: _Launch) -> None:
        trial, state, run = self.study.trials[job[0]], launch.state, launch.run
        if state != "done" and self.lab.closing:
            raise ClusterError(CLOSED)
        try:
            if run is None:
                raise launch.error
            if state != "done" and trial["worse"]:
                return self._end(job, run, None, None)
            if state != "done" and (job in self.lost_at or job in self.ending or run.status().get("lost")):
                raise ClusterError("the workers of its block were lost")
            if (state := run.wait(10).state) != "done":
                reason = run.status().get("reason")
                raise RunError(f"run {run.name} was {state}" + (f": {reason}" if reason else ", and not by this search"))
            self._report(job, run)
            self._end(job, run, self.goals.measure(run, self._results(job, run)), None)
        except ClusterError as error:
            self._again(job, error)
        except (Exception, SystemExit) as error:  # also a user's exit() is the end of the trial alone
            self._end(job, run, None, error)

    def _is_lost(self, job: Job) -> bool:
        """Have all workers of a run been lost for too long? The run goes on where one comes back in time."""
        number, fold = job
        if set(self.study.trials[number]["units"][fold]["workers"]) - set(self.lab.lost()):
            self.lost_at.pop(job, None)
            return False
        return time.monotonic() - self.lost_at.setdefault(job, time.monotonic()) >= LOST_S

    def _again(self, job: Job, error: Exception) -> None:
        """A run whose block was lost is made again on another one, once."""
        self.attempts[job] += 1
        if self.attempts[job] >= ATTEMPTS:
            self._end(job, None, None, ClusterError(f"{_line(error)}, {ATTEMPTS} times"))
        else:
            self.study.leave(*job)
            self._forget(job)
            self.pending.append(job)

    def _forget(self, job: Job) -> None:
        for of in (self.current, self.measured, self.lost_at):
            of.pop(job, None)
        self.ending.discard(job)

    def _report(self, job: Job, run: Run | NotebookRun) -> None:
        """Report what is new of a run, where trials are compared while they go."""
        number, _ = job
        trial = self.study.trials[number]
        if self.study.prune and PRUNERS[self.study.prune].steps > 1:
            for step, values in [self.measured[job][version] for version in sorted(self.measured[job].copy())]:
                value = merit(values, self.goals.signs(run)[0])
                if step > max(trial["reports"], default=0) and math.isfinite(value) and not trial["worse"]:
                    self.study.report(number, step, value)

    def _end_early(self, job: Job, launch: _Launch) -> None:
        """Stop a run, without waiting for it here."""
        if job not in self.ending:
            self.ending.add(job)
            threading.Thread(target=launch.stop, name=f"labkit-stop-{called(*job)}", daemon=True).start()

    def _results(self, job: Job, run: Run | NotebookRun) -> Mapping[str, float]:
        """What the end of a run gave on the score set, or what a notebook has reported."""
        if isinstance(run, NotebookRun):
            return run.results()
        if not (measured := self.measured[job]):
            raise RunError("its last weights could not be measured")
        return measured[max(measured)][1]

    def _end(self, job: Job, run: Run | NotebookRun | None, found: dict[str, float] | None, error: Exception | None) -> None:
        """A run has ended: with what was `found` by name, or an error, or, stopped on its way, neither."""
        number, fold = job
        self._forget(job)
        signs = [1] if run is None else self.goals.signs(run)
        passes = None if run is None or isinstance(run, NotebookRun) else run.status().get("samples", 0) / run.config.n_train
        measured = dict(found or {})
        score, text = measured.pop(self.goals.names[0], None), "" if error is None else _line(error)
        if self.study.prune == "wilcoxon" and found:
            self.study.report(number, fold, score * signs[0])
        self.study.end(number, fold, score, signs, text, passes, measured, whole=bool(found or error))
        trial = self.study.trials[number]
        if text or trial["worse"]:  # what is left of the trial is not trained
            self.pending = deque(left for left in self.pending if left[0] != number)
        if all(unit["ended"] is not None for unit in trial["units"].values()) and all(left[0] != number for left in self.pending):
            self._tell(number)

    def _tell(self, number: int) -> None:
        """A trial has ended: by an error, whole, or stopped on its way with the score that it had reached."""
        trial = self.study.trials[number]
        units = [unit for unit in trial["units"].values() if unit["ended"] is not None]
        whole = [unit for unit in units if unit["score"] is not None and unit["whole"]]
        if errors := [unit["error"] for unit in units if unit["error"]]:
            self.study.tell(number, "failed", error=errors[0])
        elif len(whole) == len(self._folds()):
            self._tell_whole(number, whole)
        else:
            reports = [trial["reports"][step] for step in sorted(trial["reports"])]
            self.study.tell(number, "pruned", sum(reports) / len(reports) if self.config["folds"] else reports[-1])
        if self.progress:
            print(self._said(number), flush=True)

    def _tell_whole(self, number: int, units: Sequence[Mapping[str, Any]]) -> None:
        """Means over the folds."""
        rows = [{self.goals.names[0]: unit["score"], **unit["measured"]} for unit in units]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in self.goals.names}
        values = [means[name] * sign for name, sign in zip(self.goals.senses, units[0]["signs"], strict=True)]
        self.study.tell(number, "done", values, violations=self.goals.violations(means))

    def _said(self, number: int) -> str:
        row = self.found._row(number, self.study.trials[number])
        point = ", ".join(f"{name} {_short(value)}" for name, value in self.study.trials[number]["point"].items())
        others = "".join(f", {name} {row[name]:.4g}" for name in self.goals.names[1:] if row["state"] == "done")
        score = f"{self.found._score_name} {row['score']:.4g}{others}"
        came = row["error"] if row["error"] else score + " (pruned)" * (row["state"] == "pruned")
        if row["state"] == "done" and (standing := self.found._standing(number)):
            came += f" ({standing})"
        on = "" if not row["workers"] else f", {row['seconds']:.1f} s on workers {', '.join(map(str, row['workers']))}"
        return f"trial {number} ({number + 1} of {self.config['trials']}): {point}: {came}{on}"

    # -- from the first to the last ------------------------------------------------------------------------------

    def _follow(self) -> None:
        state = "failed"
        try:
            with contextlib.suppress(_Stopped):
                run_on_blocks(self.lab, self.workers, self.size, self, self._begin, self._each, timeout=math.inf)
            state = "done" if self.found._is_done() else "stopped"
            if self.progress:
                with contextlib.suppress(RunError):  # no trial has a score, as the line of each says
                    print(self.found._result(), flush=True)
        except BaseException as error:  # whatever it is, `wait` raises it
            self.error = error
            if not isinstance(error, LabError):
                self.error = RunError(f"search {self.found.name} failed: {error!r}\n{traceback_of(error)}")
        finally:
            with contextlib.ExitStack() as last:  # all of it, the last line first
                last.callback(self._over.set)
                last.callback(setattr, self, "state", state)
                last.callback(self.lab.release, self.config["id"])
                last.callback(self.lock.release)
                last.callback(self.found._copy)
                self._asker.shutdown()  # a point that is being made is logged before what is left
                self._launcher.shutdown()
                for number, trial in enumerate(self.study.trials):
                    for fold in [fold for fold, unit in trial["units"].items() if unit["ended"] is None]:
                        self.study.leave(number, fold)
                (self.found.path / ALIVE).unlink(missing_ok=True)


class _Launch:
    """A run that is being started in another thread, and from then on that run, with what blocks ask of one."""

    def __init__(self, made: Future[Run | NotebookRun]) -> None:
        self._made, self.begun = made, time.monotonic()

    @property
    def state(self) -> str:
        if not self._made.done():
            return "running"
        return self.run.state if self.run else "failed"

    @property
    def run(self) -> Run | NotebookRun | None:
        """None while it is being started, or where that failed."""
        return self._made.result() if self._made.done() and self.error is None else None

    @property
    def error(self) -> BaseException | None:
        """Why it could not be started; waits until that is known."""
        return self._made.exception()

    def stop(self) -> None:
        if self.error is None:
            self._made.result().stop()


class _Stopped(Exception):
    """The search was stopped."""


def _crashes(cuts: Sequence[tuple[float, int]]) -> str:
    """Does a run end the kernel itself, which was cut off so many times, each after some seconds and with so many others beside it? Then
    why that is thought. Whoever kills a kernel does so at another time each time."""
    alone = [seconds for seconds, others in cuts if not others]
    last = alone[-SAME_END:]
    if len(last) == SAME_END and max(last) <= 1.1 * min(last) + 2 * ALIVE_S:
        return f"it was cut off with the kernel {SAME_END} times in a row, each time after {min(last):.0f} to {max(last):.0f} s and alone"
    if len(alone) >= MOST_ENDS:
        return f"it was cut off with the kernel {len(alone)} times, while nothing else was trained"
    return ""


def called(number: int, fold: int | None) -> str:
    """The name of a run, and its folder."""
    return f"{number}" if fold is None else f"{number}-{fold}"


def _line(error: Exception) -> str:
    """An error in one line of the table."""
    text = str(error.args[0] if error.args else error).strip().partition("\n")[0]
    return text if isinstance(error, LabError) else f"{type(error).__name__}: {text}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
