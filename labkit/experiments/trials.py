"""What a trial of a search is made of: a problem, its model and its training, with the settings of the point; or a notebook.

Names of a space are checked here before anything begins, against the arguments of whoever takes them.

Used by `labkit.experiments.search` and `labkit.experiments.coordinator`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import json
import math
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from labkit.cluster.lab import Lab
from labkit.errors import RunError, calling, file_path
from labkit.experiments.executor import GRACE, check_kernel, execute, state
from labkit.experiments.notebook import conform, load, plain, read_parameters
from labkit.experiments.objectives import Goals
from labkit.experiments.space import Space, arguments, check_names
from labkit.imports import argument_names, constructor_arguments, imported, reference, short
from labkit.locks import parsed
from labkit.models import MODELS
from labkit.problems.problem import Problem
from labkit.runs.files import find_json

TRAINING = ("partition", "update", "passes", "local_steps", "exchange", "overlap")  # what a space may set beside the problem
OF_A_RUN = ("time", "size")  # what is measured of any run
PROBED, FEW = 16, 64  # points, and samples of each, that tell what else is
TIMEOUT_S = 3600.0  # of a notebook


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

    def measured(self, wanted: Goals) -> list[str] | None:
        """What a run of a trial is measured by, as far as an untrained network of some points tells on a few samples, looked for until
        nothing is missing of what is `wanted`; None where that does not tell."""
        found: list[str] | None = None
        for point in self.space.corners(PROBED):
            try:
                problem = self(point)[0]
                if list(problem.milestones()):  # behind one there may be more
                    return None
                module = problem.new_module(0)
                found = list(dict.fromkeys([*(found or OF_A_RUN), *problem.measure(module, problem.score_indices()[:FEW])]))
            except Exception:  # that of a trial is a row of the table
                continue
            if not wanted.missing(found):
                break
        return found

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


class Notebook:
    """A parameterised notebook as the trial of a search, executed as `labkit.sweep` does; SweepError where it cannot be read, or a
    value of the space is none of its parameter."""

    def __init__(self, path: str | Path, space: Space) -> None:
        self.path, self.space = file_path("problem", path).absolute(), space
        self.content = load(self.path)
        known = read_parameters(self.content, self.path.name)
        self.known = {parameter.name: parameter for parameter in known}
        check_names(space, {self.path.name: [name for name in self.known if name != "run_dir"]})
        for name, value in _ends(space):
            conform(plain(value, name), self.known[name], self.path.name)
        check_kernel("python3")

    def measured(self, wanted: Goals) -> list[str] | None:
        """What it reports, by what stands in its cells; None where that does not tell."""
        found, cells = ["time"], [cell["source"] for cell in self.content["cells"] if cell["cell_type"] == "code"]
        try:
            nodes = [node for cell in cells for node in ast.walk(parsed(ast.parse, cell))]
        except SyntaxError:  # commands of IPython
            return None
        for call in [node for node in nodes if isinstance(node, ast.Call) and _name_of(node.func) == "report"]:
            rows = call.args[1:2] or [keyword.value for keyword in call.keywords if keyword.arg == "results"]
            rows = rows[0].elts if rows and isinstance(rows[0], ast.List) else rows
            if not rows or not all(
                isinstance(row, ast.Dict) and all(isinstance(key, ast.Constant) for key in row.keys) for row in rows
            ):
                return None
            found += [key.value for row in rows for key in row.keys]
        return list(dict.fromkeys(found)) if len(found) > 1 else None

    def reference(self) -> dict[str, str]:
        """Of the notebook, for the record: what it computes, by a digest of its cells."""
        cells = [[cell["cell_type"], cell["source"]] for cell in self.content["cells"]]
        return {"notebook": str(self.path), "cells": hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]}

    def start(self, lab: Lab, point: Mapping[str, Any], folder: Path, workers: list[int]) -> NotebookRun:
        """Execute it on the first of these workers, with the values of the point and `folder` as its `run_dir`."""
        values = self.space.values(point)
        given = {name: conform(plain(value, name), self.known[name], self.path.name) for name, value in values.items()}
        defaults = {name: plain(one.default, name) for name, one in self.known.items() if name != "run_dir"}
        record = {"id": folder.name, "hash": folder.name, "notebook": str(self.path), "version": version("labkit")}
        job = {
            "id": folder.name, "folder": str(folder), "path": str(self.path), "cwd": str(self.path.parent), "content": self.content,
            "parameters": given | ({"run_dir": str(folder)} if "run_dir" in self.known else {}), "kernel_name": "python3",
            "record": record | {"given": list(given), "parameters": defaults | given}, "timeout": TIMEOUT_S,
            "flag": str(folder.with_name(f".{folder.name}")),
        }  # fmt: skip
        return NotebookRun(lab, job, workers[0])


class NotebookRun:
    """A notebook that is being executed on a worker, with what blocks ask of a run."""

    config = SimpleNamespace(lower_is_better=False, n_train=math.nan)

    def __init__(self, lab: Lab, job: dict[str, Any], worker: int) -> None:
        self.path, self.flag = Path(job["folder"]), Path(job["flag"])
        self.name = self.path.name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.flag.touch()
        self._reason, self._lost = "", False
        self._task = lab.start(worker, execute, job)

    @property
    def state(self) -> str:
        if not self._task.done:
            return "running"
        if error := self._task.error():
            return self._ended("failed", f"{type(error).__name__}: {error}")
        found = state(self.path)
        if found["state"] == "running":  # another process is at it still
            return "running"
        # One that was not stopped from here says by itself how it ended, unless its process was gone before.
        self._lost = self._lost or (found["state"] == "interrupted" and self.flag.exists())
        ended = {"done": "done", "interrupted": "stopped"}.get(found["state"], "failed")
        return self._ended(ended, found.get("error", ""))

    def _ended(self, state: str, reason: str) -> str:
        self.flag.unlink(missing_ok=True)
        self._reason = reason
        return state

    def status(self) -> dict[str, Any]:
        """Its state, the reason of that, and whether the worker was `lost` that executed it."""
        return {"state": self.state, "reason": self._reason, "lost": self._lost}

    def wait(self, timeout: float) -> NotebookRun:
        return self

    def stop(self) -> None:
        self.flag.unlink(missing_ok=True)
        limit = time.monotonic() + 6 * GRACE
        while self.state == "running" and time.monotonic() < limit:
            time.sleep(0.05)

    def results(self) -> dict[str, float]:
        """What it has reported, of several rows their mean, and its `time`; RunError where it has reported nothing."""
        rows = find_json(self.path / "results.json")
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise RunError("it reported no result: its last cell calls labkit.report(run_dir, {...})")
        found = {"time": float(state(self.path).get("seconds", math.nan))}
        for name in rows[0]:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found[name] = sum(float(row[name]) for row in rows) / len(rows)
        return found


def _name_of(function: ast.expr) -> str:
    """The last name of what is called."""
    return getattr(function, "attr", getattr(function, "id", ""))


def _ends(space: Space) -> list[tuple[str, Any]]:
    """Values by which the type of each parameter is seen: the ends of a range, and all choices."""
    found = []
    for name, parameter in space.parameters.items():
        about = parameter.distribution
        options = parameter.options(name) if hasattr(about, "choices") else (about.low, about.high)
        found += [(name, parameter.values.get(option, option)) for option in options]
        for below in parameter.spaces.values():
            found += _ends(below)
    return found
