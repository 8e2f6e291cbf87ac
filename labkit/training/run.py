"""A run: the handle that `train` returns, and what `load_run` reads back from a run directory.

All that it reads comes from the directory (`labkit.runs.record`). While it is running, it is followed and controlled through a
`Follower`: its supervisor in the kernel that started it, a client of its server in another one (`attach`). Only `wait` blocks.

Made by `labkit.training.train` and `labkit.simulation`; used by `labkit.experiments` and users.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from labkit import locks
from labkit.cluster.emulation import slowdown_of
from labkit.cluster.notice import telling
from labkit.errors import ProblemError, RunError, file_path, flag, instance, interrupted, real, whole
from labkit.runs import checkpoints, summary, unfinished
from labkit.runs.checkpoints import Layout
from labkit.runs.files import is_folder, replacing
from labkit.runs.record import RunRecord, directories
from labkit.sources import changed
from labkit.training.attach import ANSWER_S, kill, request, slow_down
from labkit.training.inspection import Inspection, inspection
from labkit.training.wire.protocol import MAX_WORKERS, SERVER_TIMEOUT_S

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from labkit.cluster.lab import Lab
    from labkit.models.flat import Flat
    from labkit.problems.problem import Problem


class Follower(Protocol):
    """What follows and controls a running run."""

    lab: Lab | None  # on which its curve can be measured

    @property
    def state(self) -> str: ...
    def status(self) -> dict: ...
    def wait(self, timeout: float) -> bool:
        """Has it ended within `timeout` seconds?"""

    def stop(self, timeout: float) -> None: ...
    def raise_error(self) -> None:
        """If it has failed, the error."""


class Run(RunRecord):
    """One training: its directory (attributes name, path, config), and the way to follow and stop it while it is running.

    Examples
    --------
    >>> run.state, run.curve().columns[:3].tolist()
    ('done', ['seconds', 'samples', 'version'])
    >>> run.predict(np.zeros((5, 1, 8, 8), np.uint8)).shape
    (5,)
    >>> run.save("lenet.pt2").exists()
    True
    """

    def __init__(self, path: str | Path, *, problem: Problem | None = None, follower: Follower | None = None) -> None:
        super().__init__(path)
        self._problem = problem
        self._follower = follower
        self._changed: set[str] = set()  # files that were warned of

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what another process gets, is read from the directory; while the run is running, `attach` follows it from there."""
        afresh = {"_path": self.path.absolute(), "_seen": None, "_table": None, "_checked": None, "_follower": None}
        return {**self.__dict__, **afresh}

    # -- while it runs -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "running", "done", "stopped" (by `stop`), or "failed" (also when it was cut off)."""
        return self._follower.state if self._follower else super().state

    def status(self) -> dict:
        """State, samples, budget, version and seconds of the run; of each worker loss, passes and `held_out_score`.

        That is the score of its own weights on the score set, which is held out of the training samples, and it is `score` in events
        (and here, too). The score of the global weights on the test set is another: `test_score`, `curve()`, `summary()["score"]`.

        `dropped` says, by worker, why it is not let in again: it was lost, or sent what cannot be meant, five times in a row. `reason`
        says why the run has ended.
        """
        status = self._follower.status() if self._follower else super().status()
        if workers := status.get("workers"):
            status = status | {"workers": {i: {**own, "held_out_score": own.get("score")} for i, own in workers.items()}}
        return status

    def attach(self) -> Run:
        """Follow and control a run of another kernel: its state, `status`, `wait`, `stop`, `progress`; returns the run.

        Raises
        ------
        RunError
            It is not running any more, or its server cannot be reached from here.
        """
        if self._follower is None:
            from labkit.training.attach import Attached

            self._follower = Attached(self)
        return self

    def wait(self, timeout: float = 3600.0) -> Run:
        """Block until the run has ended and its curve is measured; returns the run.

        An interrupt (Ctrl-C, or the square in the notebook) ends the waiting alone, and the run goes on; `stop` ends it. A script that does not
        catch it ends, and the run with it: a line says so, and by which call it is resumed.

        Raises
        ------
        WorkerError, LabError
            The run failed; the first failing worker's error with its traceback.
        RunError
            It is still running after `timeout` seconds, or in another kernel (`attach`).
        """
        timeout = real("timeout", timeout, least=0, finite=False)
        self._check_attached()
        if self._follower:
            try:
                if not self._follower.wait(timeout):
                    raise RunError(f"run {self.name} is still running after {timeout:g} s. Wait again, or run.stop().")
            except KeyboardInterrupt:
                raise self._interrupted() from None
            self._follower.raise_error()
        return self

    def stop(self, timeout: float = 30.0) -> Run:
        """End the run now; everything so far can be read. Stopping twice, or a run that has ended, is fine."""
        timeout = real("timeout", timeout, least=0, finite=False)
        self._check_attached()
        if self._follower:
            self._follower.stop(timeout)
        return self

    def checkpoint(self, timeout: float = 30.0) -> int:
        """Save the newest version of the global weights now, with all that `labkit.resume` needs; its number once it is on the disk.

        Raises
        ------
        RunError
            The run is not running, is that of another kernel (`attach`), or its disk takes longer than `timeout` seconds.
        """
        timeout = real("timeout", timeout, above=0, most=SERVER_TIMEOUT_S)
        self._check_attached()
        version = request(self, "checkpoint", timeout + ANSWER_S, within=timeout).get("saved")
        if version is None:
            raise RunError(f"run {self.name} did not save a version within {timeout:g} s: it has ended, or its disk is busy.")
        return version

    def inspect(self, worker: int, timeout: float = 5.0) -> Inspection:
        """What a worker does now, as it says itself: the stacks of its threads, its latest exchange, its memory and device.

        It is asked over its connection to the server, and goes on meanwhile; on every back end.

        Raises
        ------
        ClusterError
            There is no such worker in the run, or it does not answer within `timeout` seconds; then with what the server knows of it. Or
            what is asked for cannot be found out; then with the traceback.
        RunError
            The run is not running, or is that of another kernel (`attach`).
        """
        worker, timeout = whole("worker", worker, 0, MAX_WORKERS - 1), real("timeout", timeout, above=0, most=SERVER_TIMEOUT_S)
        self._check_attached()
        return inspection(request(self, "inspect", timeout + ANSWER_S, worker=worker, within=timeout), worker, timeout)

    def slow_down(self, worker: int, factor: float) -> Run:
        """Make a worker slower while the run goes: all its work lasts `factor` times as long as on its machine alone; returns the run.

        It takes the place of the `slowdown` with which the lab was connected (and of its drift): with 1 the worker is as quick as its
        machine. The record says that it was emulated, and so do figures. It holds for this run, also for a process that takes the place of a
        worker that was lost; the lab, and a run that is resumed, keep the lab's own.

        Raises
        ------
        ValueError
            The factor is below 1.
        ClusterError
            There is no such worker in the run.
        RunError
            The run is not running, or is that of another kernel (`attach`).

        Examples
        --------
        >>> run = labkit.train(problem, lab, passes=20, name="slowed")
        >>> while not run.status().get("started"):  # until the workers are there
        ...     pass
        >>> slowed = run.slow_down(1, 4.0)
        >>> run.stop().events.query("kind == 'slow'").worker.tolist()
        [1]
        """
        worker, factor = whole("worker", worker, 0, MAX_WORKERS - 1), slowdown_of("factor", factor)
        self._check_attached()
        slow_down(self, worker, factor)
        return self

    def kill(self, worker: int) -> int:
        """End the process of a worker of this machine at once (SIGKILL), to see what the run does; returns its process id.

        The run goes on with the others. Where the lab starts the process again, as Dask does, the worker comes back. `labkit.chaos`
        has more faults.

        Raises
        ------
        ClusterError
            There is no such worker in the run, it is on another machine, or it is a thread of its kernel.
        RunError
            The run is not running, or is that of another kernel (`attach`).
        """
        worker = whole("worker", worker, 0, MAX_WORKERS - 1)
        self._check_attached()
        return kill(self, worker)

    def progress(self) -> None:
        """Show progress: a bar that moves by itself in a notebook; elsewhere a line every few seconds until the end.

        An interrupt ends the lines alone, as in `wait`.
        """
        from labkit.plots.progress import show

        self._check_attached()
        try:
            show(self.label, lambda: {"budget": self.config.budget, **self.status(), "test_score": self.test_score})
        except KeyboardInterrupt:
            raise self._interrupted() from None

    def _interrupted(self) -> KeyboardInterrupt:
        where = repr(str(self.path))
        text = (
            f"run {self.name} goes on, as long as its lab is there. run.progress() follows it, run.stop() ends it; another kernel follows it by "
            f"labkit.load_run({where}).attach(), and once its workers are gone {self.config.resume_call(self.path)} goes on from its last checkpoint."
        )
        if self._follower is None or self._follower.lab is None:  # it is trained elsewhere
            return interrupted(
                text, lambda: f"run {self.name} goes on. labkit.load_run({where}).attach() follows it, and can stop it."
            )
        return interrupted(text, self._ended_with_script)

    def _ended_with_script(self) -> str:
        """What is said when the interrupt of waiting has ended the script that trains it; its lab is closed then, or is at its exit."""
        status = self.status()
        if status["state"] in ("done", "failed"):
            reason = (status.get("reason") or "").rstrip(".")
            return f"run {self.name} {'is done' if status['state'] == 'done' else 'failed'}{': ' * bool(reason)}{reason}."
        far = f"after {status.get('samples', 0):,} of {self.config.budget:,} samples"
        return (
            f"run {self.name} ends with this script, {far}. {self.config.resume_call(self.path)} goes on from its last checkpoint."
        )

    def live(self) -> Any:
        """A figure that grows with the run (see `labkit.plots.live`)."""
        from labkit.plots.live import live

        return live(self)

    # -- for other programs --------------------------------------------------------------------------------------

    def export(self, tracker: str, where: str | Path | None = None, *, project: str = "labkit") -> str:
        """Copy the record into a tracker: curve, losses and staleness by worker, cost card and settings (`labkit.runs.export`).

        The step of each point is the number of samples that all workers had trained on. An export that is made again takes the place
        of the one before.

        Parameters
        ----------
        tracker : "mlflow", "tensorboard", "wandb" or "trackio"; each needs its library: `pip install 'labkit[mlflow]'`, say.
        where : of MLflow a tracking URI, by default its own setting; of TensorBoard the folder above that of this run, by default its
            run directory, so that `tensorboard --logdir runs` shows all; of Weights & Biases the folder for its files.
        project : the project, which MLflow calls experiment. TensorBoard has none.

        Returns
        -------
        str
            What the tracker knows it by: the id of the run, its name in Trackio, or TensorBoard's folder.

        Raises
        ------
        ValueError
            There is no such tracker.
        RunError
            The run is still running, its curve cannot be measured, or the library is missing.
        """
        from labkit.runs.export import export

        return export(self, tracker, where, project)

    def _check_attached(self) -> None:
        if self._follower is None and self.state == "running":
            raise RunError(f"run {self.name} is running in another kernel. Call run.attach() first.")

    # -- what was trained ----------------------------------------------------------------------------------------

    @property
    def _measurable(self) -> bool:
        return self._problem is not None

    def _measured(self) -> pd.DataFrame:
        from labkit.training.evaluation import as_recorded, measure

        if self._problem is None and self.being_measured:
            raise RunError(f"the curve of run {self.name} is not measured yet. {self._how_to_measure}")
        lab = self._follower.lab if self._follower else None
        problem = as_recorded(self.opened_problem("its curve is measured"), self)
        self._untrained()
        with locks.alone(self.path):  # one thread or kernel at a time: the others read what it has measured
            with contextlib.suppress(RunError):
                return self.kept_curve()
            curve = measure(self, problem, lab if lab and not lab.closed and lab.free() else None)
        summary.write(self)
        return curve

    def _layout_anew(self, why: RunError) -> Layout:
        """From the model, where its size is that of the newest version."""
        from labkit.models.flat import Flat

        problem = self.opened_problem("layout.json is made anew", f"{why} ")
        try:
            layout = Layout.of(*Flat(problem.new_module(self.config.seed), exact=self.config.exact_buffers).shapes)
            checkpoints.read_weights(self.path, checkpoints.newest(self.path)[0], layout.size)
        except Exception as error:  # whatever becomes of a model of the user's own
            raise RunError(f"{why} It cannot be made anew from the model: {error}") from error
        with contextlib.suppress(OSError):
            layout.save(self.path, self.config.id)
        self._say(f"{why} It was made anew from the model.")
        return layout

    def problem(self) -> Problem:
        """What was trained; made again, where this kernel has not trained it, by importing what config.json names.

        A model that was written in a notebook cell is known only to the kernel that trained it.
        """
        if self._problem is None:
            from labkit.problems.problem import problem_from_config

            self._problem = problem_from_config(self.config.problem)
        self.warn_of_edits()
        return self._problem

    def opened_problem(self, what: str, before: str = "") -> Problem:
        """The problem, if this kernel has trained it or has opened it; RunError where `what` would have to import it for the first time."""
        if self._problem is None:
            names = ", ".join(str(self.config.problem[name]) for name in ("kind", "model") if name in self.config.problem)
            raise RunError(
                f"{before}Before {what}, the problem of run {self.name} has to be imported as config.json names it ({names}). Call "
                "run.problem() first, if you trust who made this run."
            )
        return self.problem()

    def warn_of_edits(self, **values: Any) -> None:
        """Warn, once, of files of the user's own, and of what of a notebook is in `values` (problem=, update=, partition=), that are not
        what the run was trained with."""
        files = [file for file in changed(self.config.sources, **{"problem": self._problem, **values}) if file not in self._changed]
        self._changed.update(files)
        for file in files:
            warnings.warn(
                f"{file} is not what run {self.name} was trained with; what is made from it now may differ.", stacklevel=3
            )

    def flat(self, version: int | str | None = None) -> np.ndarray:
        """The global weights as one flat float32 vector: of a retained version, of the newest, or of the "best" by the score set.

        With "ema" their average up to the newest version, where the problem asked for one (`ema=`).
        """
        return super().flat(version)

    def _read(self, version: int | str | None, writable: bool = False) -> np.ndarray:
        if isinstance(version, str) and version == "best":
            from labkit.training.monitor import best

            version = best(self, self.problem())
        return super()._read(version, writable)

    def model(self, version: int | str | None = None, *, normalised: bool = True) -> torch.nn.Module:
        """The trained network as a torch module that takes raw samples, on the CPU, in evaluation mode; `version` as in `flat`.

        Its first layer normalises: it takes what was given as data, in its units, channels first, as a tensor (n, *shape) of any
        type; a single channel may be left out, as for `predict`. With `normalised=False`, or as `run.model().network`, it is the network alone, which takes normalised samples, as
        `run.problem().load(indices)` gives them; the names in its `state_dict()` are those
        of `run.weights()`, those of the whole have "network." in front. A problem with a `load` of its own is the only one to know
        what it makes of raw samples: there the first layer does nothing, and a warning says so.
        """
        import torch

        from labkit.models.normalised import Normalise, Normalised

        if not flag("normalised", normalised):
            return self._network(version)
        problem, layers, shapes = self.problem(), [torch.nn.Identity()], []
        if problem.is_own_load:
            warnings.warn(
                f"{type(problem).__name__} loads its samples itself, so that run.model() cannot normalise raw ones: give it what "
                "run.problem().load() gives.",
                stacklevel=2,
            )
        else:
            layers, data = [], problem.dataset
            shapes = [data.fields[name].shape for name in data.inputs]
            for name in data.inputs:
                window = problem.window if name == data.inputs[0] else ()
                affine, n_axes = data.affine_of(name), len(data.fields[name].shape)
                layers.append(Normalise(*affine, n_axes, window) if affine else torch.nn.Identity())
        return Normalised(self._network(version), layers, shapes).eval()

    def save(self, path: str | Path, version: int | str | None = None, *, normalised: bool = True) -> Path:
        """Write the trained network to a file that is opened without labkit; returns its path. Its ending says what it is:

            .pt2     a program:       torch.export.load(path).module()(x)
            .onnx    the same:        onnxruntime.InferenceSession(path).run(None, {"x": x})[0]      pip install 'labkit[onnx]'
            .pt      the weights:     net.load_state_dict(torch.load(path)), saved with normalised=False

        Weights that are saved with `normalised=False` have the names of your own network, which was trained on normalised samples: it is
        called as `net.eval()(run.model().normalise(x))`. By default the file holds what normalises raw samples as well, and
        its names are those of `run.model()`. Without labkit, of one input:

            saved = torch.load("model.pt")
            net.load_state_dict({name.removeprefix("network."): saved[name] for name in saved if name.startswith("network.")})
            outputs = net.eval()((x - saved["normalise.centre"]) * saved["normalise.rate"])

        Data that are not normalised, such as token ids, have no such entries: their network takes x itself. Missing folders are made.

        Programs take raw samples of any number, (n, *shape) with the channels first, a single one included: (n, 1, 8, 8) where `predict` and
        `run.model()` take (n, 8, 8) too, as a program has inputs of one number of axes. They take them as float32 where they are
        normalised, and give what `run.model()` gives; with `normalised=False` normalised ones, as `run.model(normalised=False)` does. So does each
        of a problem with a `load` of its own.

        Raises
        ------
        ValueError
            The path has another ending.
        ProblemError
            The network cannot be made a program, or a package for that is missing; what torch said is in the message.
        """
        from labkit.models.saved import contents, ending

        path, problem = file_path("path", path), self.problem()
        kind, normalised = ending(path), flag("normalised", normalised) and not problem.is_own_load
        inputs, names = self._example(normalised)
        made = contents(self.model(version, normalised=normalised), inputs, names, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(made)
        return path

    def _example(self, normalised: bool) -> tuple[Any, list[str]]:
        """Two samples as `run.model()` is called with them, and the names of their tensors."""
        import torch

        problem, two = self.problem(), np.arange(2)
        data = problem.dataset
        if not normalised:
            x = problem.load(problem.train_indices()[:2])[0]
            return x if isinstance(x, tuple) else (x,), [*data.inputs]
        x = [torch.from_numpy(data.raw(two, field=name)) for name in data.inputs]
        x = [part.float() if data.affine_of(name) else part for name, part in zip(data.inputs, x, strict=True)]
        return (tuple(x) if len(x) > 1 else x[0],), [*data.inputs]

    def _network(self, version: int | str | None = None) -> torch.nn.Module:
        import torch

        weights = torch.from_numpy(self._read(version, writable=True))
        module, flat = self._untrained()
        flat.load(weights)
        return module.eval()

    def _untrained(self) -> tuple[torch.nn.Module, Flat]:
        """The network before the training; RunError where the problem that was given is not that of the run."""
        from labkit.models.flat import Flat

        problem = self.problem()
        module = problem.new_module(self.config.seed)
        flat = Flat(module, exact=self.config.exact_buffers)
        try:
            recorded = Layout.load(self.path, self.config.id)
        except RunError:  # it is made anew from this model, or refused, by `layout`
            return module, flat
        settings = self.config.problem
        trained = ", ".join(f"{name}={settings[name]!r}" for name in ("model", "model_args", "data") if settings.get(name))
        advice = f"It was trained with {trained}; without problem= it is made from the record, where that holds more than a name."
        made = Layout.of(*flat.shapes)
        if made.shapes != recorded.shapes or (recorded.names and made.names != recorded.names):
            raise RunError(f"the network of this problem has other tensors than that of run {self.name}. {advice}")
        others = problem.config().get("data") != settings.get("data")  # what holds an array knows its name alone
        if others and (n := len(problem.train_indices())) != self.config.n_train:
            raise RunError(
                f"the data of this problem have {n} training samples, and run {self.name} had {self.config.n_train}: samples would be "
                f"normalised by others. {advice} Other data are for run.evaluate(data) and run.predict(x)."
            )
        return module, flat

    def predict(self, x: Any, version: int | str | None = None) -> np.ndarray:
        """What the trained network says of raw samples: of a `Classifier` their classes, int64 (n,); else its outputs, float32.

        Parameters
        ----------
        x : samples as they were given for the training, in their own units: an array, tensor, list or DataFrame of shape (n, *shape),
            channels first or last; a single channel may be left out. They are converted and normalised as those of the training
            were, and filled up as those were where they are shorter (`pad=`). Of several inputs a tuple, or a dict by name. Or a data set: its name, its path, or what `open_dataset` returns, with
            a row for each sample of its test split, or of the whole where it came without one, in the order of its files or rows.
        version : as in `flat`.

        Raises
        ------
        DataError
            The samples do not fit those of the training.
        ProblemError
            The problem loads its samples itself: what it makes of raw ones is not known.
        """
        return self.problem().predicted(self._outputs(x, version))

    def predict_proba(self, x: Any, version: int | str | None = None) -> np.ndarray:
        """The probability of each class, float32 (n, K), of raw samples `x` as in `predict`."""
        return self.problem().probabilities(self._outputs(x, version))

    def evaluate(self, data: Any = None, version: int | str | None = None) -> dict[str, float]:
        """Loss and score on raw samples with their labels: {"loss": ..., "score": ..., "samples": n}.

        `data` is what `data=` of the problem takes: (x, y), a dict by field, a name, a path, or a `Dataset`; x as in `predict`, y with
        the numbers that classes had in the training. All samples are measured; of what comes with a test split, that split. By
        default, and for the data set of the training, it is the test set of the run: `score` is then that of `run.curve()`.
        """
        from labkit.training.evaluation import BATCH

        problem, indices = self.tested(data)
        with _telling(self.name, len(indices)):
            measured = problem.measure(self._network(version), indices, "test", batch_size=BATCH)
        return {**measured, "samples": len(indices)}

    def predictions(self, data: Any = None, version: int | str | None = None) -> pd.DataFrame:
        """One row for each of the samples that `evaluate(data)` measures, those with the largest loss first.

        Columns: "sample" (its number in the test split), "label" (of a `Classifier`) or "target", "predicted" as of `predict`,
        "probability" of the predicted class (NaN where there is none), and the "loss" of this sample alone. What is an array for
        each sample is one in its cell. `labkit.plots.confusion` and `labkit.plots.worst` draw them.
        """
        import pandas as pd

        problem, indices = self.tested(data)
        with _telling(self.name, len(indices)):
            columns = problem.each(self._network(version), indices, "test")
        cells = {name: list(values) if values.ndim > 1 else values for name, values in columns.items()}
        table = pd.DataFrame({"sample": indices, **cells})
        return table.sort_values("loss", ascending=False, kind="stable").reset_index(drop=True)

    def tested(self, data: Any = None) -> tuple[Problem, np.ndarray]:
        """The problem on the samples that `evaluate(data)` measures, and their numbers in its test split."""
        from labkit.data.given import given
        from labkit.training.evaluation import as_recorded

        problem = as_recorded(self.problem(), self)
        samples = None if data is None else given(data, problem.dataset, answers=True)
        if samples is not None and samples.is_own:
            self._say(
                f"This is the data set of the training of run {self.name}: its test split is measured, {len(problem.test_indices()):,} of "
                f"{problem.dataset.n_train + problem.dataset.n_test:,} samples."
            )
        if samples is None or samples.is_own:
            return problem, problem.test_indices()
        return self._on(samples), np.arange(samples.n_test)

    def _on(self, samples: Any) -> Problem:
        from labkit.training.evaluation import as_recorded

        problem = as_recorded(self.problem(), self)
        if problem.is_own_load:
            raise ProblemError(
                f"{type(problem).__name__} loads its samples itself (load), so that what it makes of raw ones is not known here. Give "
                "run.model() what problem.load() gives, or run.evaluate() without data."
            )
        return problem.on(samples)

    def _outputs(self, x: Any, version: int | str | None) -> np.ndarray:
        import torch

        from labkit.data.given import given
        from labkit.training.local import outputs

        problem = self._on(given(x, self.problem().dataset, answers=False))

        def forward(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            with problem.autocast(torch.device("cpu")):
                made = network(*x) if isinstance(x, tuple) else network(x)
            if not isinstance(made, torch.Tensor):
                raise ProblemError(
                    f"this network gives a {type(made).__name__}, no tensor with a row a sample. Call run.model() itself."
                )
            return made

        return outputs(problem, self._network(version), np.arange(problem.dataset.n_test), "test", forward=forward)


def load_run(path: str | Path, *, problem: Problem | None = None) -> Run:
    """Read a run back from its directory; `problem` where its model was written in a notebook cell.

    Where the run still goes on, or was cut off, a notebook, and a script in a terminal on standard error, is told in a line how far it is, and
    which call follows or continues it.

    Every file is checked when it is read: what is damaged, missing or of another run is a RunError with its name. Runs of formats 1 to
    3 (`run.config.format`) hold no digests: their files are checked against each other, and one changed digit of a loss, a score or a
    time in them cannot be noticed, but by `labkit.replay`, which computes losses and scores again.

    Examples
    --------
    >>> labkit.load_run(run.path).state
    'done'
    """
    run = read_run(path, problem)
    unfinished.tell_of(run.path, run.config)
    return run


def read_run(path: str | Path, problem: Problem | None = None) -> Run:
    """As `load_run`, and nothing is printed."""
    path = file_path("path", path)
    if not is_folder(path):
        near = sorted(p.name for p in path.parent.iterdir() if (p / "config.json").exists()) if is_folder(path.parent) else []
        raise RunError(f"there is no run at {path}." + (f" Runs beside it: {', '.join(near)}." if near else ""))
    if (inside := directories(path)) != [path]:
        names = ", ".join(str(run.relative_to(path)) for run in inside[:8]) + ", ..." * (len(inside) > 8)
        raise RunError(
            f"{path} is no run but a folder of {len(inside)}: {names}. "
            f"labkit.load_run({str(inside[0])!r}) reads one; labkit.compare({str(path)!r}) and labkit.plots.curves({str(path)!r}) take all."
        )
    if problem is not None:
        from labkit.problems.problem import Problem

        instance("problem", problem, Problem, " such as labkit.Classifier(...)")
    return Run(path, problem=problem)


def _telling(name: str, n: int) -> contextlib.AbstractContextManager[None]:
    """Tell a notebook and a terminal of measuring a run of this name on `n` samples, where that takes long."""
    from labkit.training.evaluation import TOLD_S

    return telling(f"Run {name} is being measured on {n:,} samples; fewer, as by test_samples=, take less.", TOLD_S)
