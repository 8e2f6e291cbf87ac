"""What is trained: `Problem`, the interface that a worker drives.

A problem builds the module and its optimisers, makes one optimiser step, and measures loss and score. It travels to the workers
with its data set by reference. Every seed is an argument, so the same seed gives the same weights in every process.

Used by `labkit.training` and whatever stands on it; `labkit.problems.classifier` and a user's own problem are subclasses.
"""

import contextlib
import copy
import inspect
import math
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from labkit.cards import Card, Carded, call_text, settings_text
from labkit.data import Dataset, open_dataset
from labkit.data import names as data_names
from labkit.data.items import Items, is_items_path, seed_of_items, seeding
from labkit.errors import (
    SEEDS,
    DataError,
    LabError,
    ProblemError,
    RunError,
    calling,
    did_you_mean,
    file_path,
    flag,
    is_own_code,
    known,
    own_line,
    plain_scalar,
    real,
    whole,
)
from labkit.imports import by_value, constructor_arguments, import_path, imported, plain, short
from labkit.inner.precision import SAMPLES, Precision, choose, host, laid_out, layers_of
from labkit.models import seeded
from labkit.models.flat import Flat
from labkit.names import named
from labkit.problems import splits
from labkit.problems.metrics import OF_A_CURVE, check_names, one_number
from labkit.problems.splits import batches, first, hold_out, shuffled
from labkit.problems.trial import (
    Fingerprint,
    check_equal,
    check_outputs,
    check_rebuilt,
    check_same,
    copied,
    eagerly,
    fingerprint,
    initialise,
    is_of_compiler,
    numbers_of,
    shared,
)
from labkit.sources import needed

Optimisers = tuple[torch.optim.Optimizer, ...]
Metrics = dict[str, torch.Tensor | float]

MEASURED = 256  # samples that are measured at once


class Clock(NamedTuple):
    """Where the run stands, and what a step may use of its worker.

    samples, total, passes : samples seen by all workers, the budget of the run, and samples / n_train.
    generator : random numbers of this worker, on its device, seeded by the seed of the run, its index and its incarnation: what a
        step draws from it, such as the noise of a GAN, is repeated by a run of the same seed where that is repeatable, and by
        every replay, also where workers are threads.
    threads : the threads that torch computes with in this worker.

    Examples
    --------
    >>> labkit.problems.Clock(samples=600, total=1_000, passes=2.0).passes  # of the whole run at this step
    2.0
    """

    samples: int
    total: int
    passes: float
    generator: torch.Generator | None = None
    threads: int = 1


class Problem(Carded):
    """What a worker trains. A subclass gives `build`, `optimisers`, `step` and `evaluate`; the rest has defaults.

    Store each constructor argument as an attribute of the same name, hand the common ones on with `**common`, and the
    record of a run can name the settings and make the problem again. A GAN has both networks in one module
    (`nn.ModuleDict`), returns two optimisers, its `step` uses one after the other, and `networks` returns both; a loss whose
    weight changes during training reads `clock.passes` in `step`.

    Parameters
    ----------
    data : what `labkit.data.open_dataset` reads: a registered name, arrays, a dict of them, a DataFrame, a torch Dataset of your own or
        the import path of what makes it, a path, or a Dataset of labkit. Names and paths are opened on first use, and a path need only
        be there on the workers.
    batch_size : samples in one optimiser step on one worker.
    train_samples, test_samples : use only so many, chosen once for all runs; None means all.
    score_samples : size of the score set, which is held out of the training split, class by class in proportion; it
        is never more than a fifth of that split.
    precision : "float32"; "bfloat16" for autocast over float32 weights; or "auto", by which each worker decides when it begins:
        bfloat16 and channels last where its device has instructions for it (AMX, AVX512-BF16, a GPU's) and the layers of the network
        are quicker in it, else float32. With both, convolutions and linear layers are compared with float32 on the worker, once a
        process and shape, and what bfloat16 computes wrongly, with "auto" also more slowly, stays in float32. That is printed, by the
        names of the layers, and is in the record (`precision` of events "join"), so that replays and resumed runs do the same;
        workers on different hosts may decide differently. Curves, `predict`, simulations and `train_subnets` take "auto" as float32.
    channels_last : give batches to the module with the channels as the innermost axis in memory; with precision="auto" False means
        where that is quicker.
    augment : a function of a batch that is trained on, or its import path: `augment(x)` gives x, `augment(x, y)` gives (x, y), as many
        samples of the same types. It runs on the workers; random numbers that it draws from torch's global generator, numpy's or
        Python's are seeded for each batch, so that a run can be replayed.
    ema : decay of an average of the global weights, for each optimiser step (on one batch, by whichever worker): 0.999 averages
        over the last 1,000 steps or so. It is made beside training, from the first version on, under every update:
        `run.model("ema")`, and columns `ema_score`, `ema_loss` and so on of the curve. `score` and `loss` remain those of the
        global weights themselves, by which also `target`, `patience` and `run.model("best")` go.

    Examples
    --------
    >>> class OneLayer(labkit.Problem):
    ...     def build(self, seed):
    ...         with labkit.models.seeded(seed):
    ...             return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    ...     def optimisers(self, module):
    ...         return [torch.optim.SGD(module.parameters(), lr=0.1)]
    ...     def step(self, module, batch, optimisers, clock):
    ...         loss = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
    ...         optimisers[0].zero_grad()
    ...         loss.backward()
    ...         optimisers[0].step()
    ...         return {"loss": loss.detach()}
    ...     def evaluate(self, module, batch):
    ...         outputs = module(batch[0])
    ...         loss = torch.nn.functional.cross_entropy(outputs, batch[1]).item()
    ...         return {"loss": loss, "score": (outputs.argmax(1) == batch[1]).float().mean().item()}
    >>> labkit.train(OneLayer("digits"), lab, passes=1).wait().state
    'done'
    """

    augment: str | Callable[..., Any] | None = None
    answers: ClassVar[str | None] = None  # "target" where what is to be learned are numbers, whatever their type
    # Arguments that the record leaves out at these values, as it did before they were there.
    ema: float | None = None
    unwritten: ClassVar[Mapping[str, Any]] = {"augment": None, "ema": None}
    lower_is_better: bool = False  # is the score an error or a distance? See `evaluate`
    window: tuple[slice, ...] = ()  # what `load` reads of each sample: slices of the axes behind the channels

    @named
    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 64,
        train_samples: int | None = None,
        test_samples: int | None = None,
        score_samples: int = 256,
        precision: str = "float32",
        channels_last: bool = False,
        augment: str | Callable[..., Any] | None = None,
        ema: float | None = None,
    ) -> None:
        self.batch_size = whole("batch_size", batch_size)
        self.train_samples = None if train_samples is None else whole("train_samples", train_samples)
        self.test_samples = None if test_samples is None else whole("test_samples", test_samples)
        self.score_samples = whole("score_samples", score_samples)
        self.precision = known("precision", precision, ("float32", "bfloat16", "auto"))
        self.channels_last = flag("channels_last", channels_last)
        if not (augment is None or callable(augment) or (isinstance(augment, str) and ":" in augment)):
            raise TypeError(f'augment={augment!r}: give a function of a batch of inputs, or its import path, "my_module:flip".')
        self.augment = augment
        self.ema = None if ema is None else real("ema", ema, above=0, below=1)
        # last: arrays go into the cache, and a call that is refused leaves nothing there
        self.data = _reference(data, self.answers)
        needed(self)  # from here on it is known what the modules of the user's own were loaded from

    # What a subclass must give.

    def build(self, seed: int) -> nn.Module:
        """A module on the CPU whose weights depend on `seed` alone; a worker makes it inside `seeded(seed)`."""
        raise NotImplementedError(f"{type(self).__name__} must define build(seed).")

    def optimisers(self, module: nn.Module) -> Optimisers:
        """The optimisers of `module`, in the order in which `step` expects them."""
        raise NotImplementedError(f"{type(self).__name__} must define optimisers(module).")

    def step(self, module: nn.Module, batch: Any, optimisers: Optimisers, clock: Clock) -> Metrics:
        """One optimiser step; returns at least "loss", a tensor without gradient (no `.item()`: it waits for a GPU).

        Other numbers by name are recorded with it, each as its mean over the samples of a local pass. Random numbers of the step's
        own come from `clock.generator`.

        With all-reduce `module`, or each of its `networks`, is wrapped by DistributedDataParallel: call it rather than its parts.
        All that it is must be in its parameters and buffers. Their memory may be replaced (`p.data = ...`), which costs a copy; the Parameters must stay.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(module, batch, optimisers, clock).")

    def evaluate(self, module: nn.Module, batch: Any) -> dict[str, float]:
        """Means over the batch: "loss", "score" in [0, 1], and other numbers by name; use `evaluating(module)` around the forward
        pass. A score, of which more is better, may be left out where no rule weighs pushes by it.

        A problem with the attribute `lower_is_better = True` has a score of which less is better, and which may be any number, such
        as an error or a distance between distributions: target, patience, the best version and curves go by that. Only rules
        that do not weigh pushes can train it, as its score is no Q.
        """
        raise NotImplementedError(f"{type(self).__name__} must define evaluate(module, batch).")

    # What a subclass may replace.

    def load(self, indices: np.ndarray, split: str = "train", device: str | torch.device = "cpu") -> Any:
        """The samples `indices` of `split` on `device` as (x, y): tensors (n, *shape) of the types that the fields have.

        x is the only input, or a tuple of them in the order of the fields; y is the only label or target, a dict of them by name,
        or None where there is none.
        """
        data = self.dataset
        with seeded(seed_of_items()) if isinstance(data, Items) else contextlib.nullcontext():
            batch = {name: torch.from_numpy(part) for name, part in data.batch(indices, split, self.window).items()}
        x = tuple(self._laid_out(batch[name]).to(device) for name in data.inputs)
        y = {name: batch[name].to(device) for name in data.answers}
        return x[0] if len(x) == 1 else x, y if len(y) > 1 else next(iter(y.values()), None)

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor:
        return laid_out(x) if self.channels_last else x

    def draw(self, indices: np.ndarray, device: str | torch.device = "cpu", generator: torch.Generator | None = None) -> Any:
        """A batch to train on: `load` of the samples `indices` of the training split, augmented.

        Whatever random numbers the data set's own code and `augment` draw from the global generators depend on `generator` (on the CPU)
        alone, which gives one number a batch where there are any.
        """
        if self.augment is None and not isinstance(self.dataset, Items):
            return self.load(indices, "train", device)
        seed = 0 if generator is None else int(torch.randint(1 << 31, (), generator=generator))
        with seeding(seed):
            batch = self.load(indices, "train", device)
        if self.augment is None:
            return batch
        with seeded(seed + 1):
            return self._augmented(batch)

    def _augmented(self, batch: Any) -> Any:
        augment, (x, y) = self._augment, batch
        with calling(f"augment={short(self.augment)}"):
            made = augment(x, y) if self._augments_pairs else (augment(x), y)
        if not isinstance(made, tuple) or len(made) != 2 or type(made[0]) is not type(x):
            got = type(made).__name__ if self._augments_pairs else type(made[0]).__name__
            raise ProblemError(
                f"augment={short(self.augment)} gave a {got}. Return what it is given: x, or (x, y) where it takes both."
            )
        for before, after in zip(
            x if isinstance(x, tuple) else (x,), made[0] if isinstance(x, tuple) else (made[0],), strict=False
        ):
            if len(after) != len(before) or after.dtype != before.dtype:
                raise ProblemError(
                    f"augment={short(self.augment)} made {tuple(after.shape)} {after.dtype} of {tuple(before.shape)} {before.dtype}. "
                    "It gets a batch and returns as many samples of the same type."
                )
        return made

    @property
    def _augment(self) -> Callable[..., Any]:
        return imported(self.augment) if isinstance(self.augment, str) else self.augment

    @cached_property
    def _augments_pairs(self) -> bool:
        """Does `augment` take x and y?"""
        with contextlib.suppress(TypeError, ValueError):
            positional = [
                p
                for p in inspect.signature(self._augment).parameters.values()
                if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
            ]
            return len(positional) == 2
        return False

    def measure(
        self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu", batch_size: int = MEASURED
    ) -> dict[str, float]:
        """Over all samples `indices` of `split`: "loss", "score" in [0, 1] and whatever other numbers `evaluate` gives.

        By default means of what `evaluate` gives for batches of `batch_size`. A measure that is no mean over samples (a distance
        between distributions, an assignment over the whole set) replaces it.
        """
        parts = batches(indices, batch_size)
        return self._mean((self.evaluate(module, self.load(part, split, device)) for part in parts), parts)

    def quality(self, module: nn.Module, indices: np.ndarray, device: str = "cpu") -> float | None:
        """Q in [0, 1], by which a rule may weigh a push: the score of `measure`, or the mean of `score` where that is replaced.

        None where there is no score, or lower is better.
        """
        if self.lower_is_better:
            return None
        if not len(indices):
            return 0.0
        if getattr(self.score, "__func__", None) is Problem.score:
            score = self.measure(module, indices, "train", device).get("score")
            return None if score is None else float(score)  # a measure of the user's own may give a tensor
        parts = batches(indices, MEASURED)
        return self._mean(({"score": self.score(module, self.load(part, "train", device))} for part in parts), parts)["score"]

    def score(self, module: nn.Module, batch: Any) -> float:
        """Q in [0, 1] on one batch."""
        return self.evaluate(module, batch)["score"]

    def _mean(self, measured: Iterable[Mapping[str, Any]], parts: list[np.ndarray]) -> dict[str, float]:
        """The means over samples of the numbers that were `measured` of each of `parts`."""
        found: dict[str, list[tuple[Any, int]]] = {}
        for values, part in zip(measured, parts, strict=True):
            for name in (name for name in values if name in ("loss", "score") or one_number(values[name]) is not None):
                found.setdefault(name, []).append((values[name], len(part)))
        if not found:
            raise ProblemError(f"{self._title()} is measured on no samples. Give some to its score set and its test split.")
        return {name: float(sum(value * n for value, n in own) / sum(n for _, n in own)) for name, own in found.items()}

    def networks(self, module: nn.Module) -> Sequence[nn.Module]:
        """The parts of `module` whose gradients an all-reduce averages on their own; by default the module as a whole.

        A GAN returns both of its networks, as `step` calls them one after the other: (module["generator"], module["critic"]). `step`
        is then given the same container with each of them wrapped by DistributedDataParallel, so it calls them, module["critic"](x);
        what else they have is behind `.module`. Each trained parameter belongs to one of them. A network that is called twice
        before a backward pass must use all of its parameters. Other updates make no use of this.
        """
        return (module,)

    def milestones(self) -> Iterable[float]:
        """Passes over the training samples, by all workers together, after which `settle` is called once: none by default."""
        return ()

    def settle(self, module: nn.Module, clock: Clock) -> None:
        """Change the weights of `module` in place, once for the whole run, from the newest global ones: clusters by k-means, say.

        One worker does so when everything up to the milestone is merged; its weights are the next version, from which all workers
        go on, under every update. The rule begins anew; the optimisers of the workers stay as they are. If that worker is lost,
        another one does it.
        """
        raise NotImplementedError(f"{type(self).__name__} has milestones, and must define settle(module, clock).")

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The precision asked for, around forward pass and loss; of "auto", what this worker has decided (`in_precision`)."""
        if self.precision == "bfloat16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def choose_precision(self, seed: int, device: str = "cpu", earlier: Iterable[Mapping[str, Any]] = ()) -> Precision | None:
        """What a worker is to compute in here, by a step on a module of its own whose layers are then compared with float32; None
        where float32 is asked for. Of `earlier` decisions (`precision` of events "join") one for such a host holds."""
        if self.precision == "float32":
            return None
        here = host(device)
        if found := next((Precision(**one) for one in earlier if one["host"] == here), None):
            return found
        plain = self.in_precision(Precision("float32", self.channels_last))
        vars(plain)["inner"] = None  # one thread, as the layers are compared
        with seeded(seed), eagerly():  # what is compiled need not be once more for this
            module = plain.new_module(seed).to(device)
            batch = plain.draw(self.train_indices()[: min(self.batch_size, SAMPLES)], device, draws(seed, 0))
            optimisers, clock = plain.optimisers(module), Clock(0, 1, 0.0, noise(seed, 0, device=device), torch.get_num_threads())
            layers = layers_of(module, lambda: plain.step(module, batch, optimisers, clock), device)
        return choose(layers, self.precision, self.channels_last, device)

    def in_precision(self, precision: Precision) -> Self:
        """The same problem as one worker computes it. Layers that stay in float32 are those of its module: `keep`."""
        other = copy.copy(self)
        other.precision, other.channels_last = precision.dtype, precision.channels_last
        return other

    def new_module(self, seed: int) -> nn.Module:
        """A module as `build` makes it, ready to be trained, and nobody else's.

        Where `build` returns a module that exists (or one with tensors of such), it is a copy. Lazy layers have their sizes, by an
        evaluation of two samples.
        """
        with seeded(seed, alone=True):
            module = self.build(seed)
            if self._existing is None:
                self._existing = shared(module, self.build(seed))
            if self._existing:
                module = copied(module, self._title())
            initialise(module, lambda: self.evaluate(module, self.load(self.train_indices()[:2])))
        return module

    _existing: bool | None = None  # does `build` return what exists? Found out once, and known to the workers

    def check(self, seed: int = 0, scored: bool = True) -> None:
        """Try out on a few samples, on the CPU, what each worker will do: build the module, evaluate it, make a step, push it.

        Raises ProblemError (or DataError), by the name of what is wrong, where they do not fit each other, where two builds are
        different networks, or where a module cannot be made again from its parameters and buffers; where it is not `scored` by
        anything, a score may be missing.
        """
        train, test, title = self.train_indices(), self.test_indices(), self._title()
        failed = "cannot be built for"
        try:
            with seeded(seed, alone=True):
                module, other = self.new_module(seed), self.new_module(seed)
                failed = "does not fit"
                batch = self.load(train[: min(2, self.batch_size)])
                state, rebuilt = self._flat(module), self._flat(other)
                check_equal(state, rebuilt, title)
                optimisers = self.optimisers(module)
                measured = _numbers_by_name(title, "evaluate()", self.evaluate(module, batch))
                evaluate = self._measured_on(batch, seed)
                before = check_outputs(module, other, evaluate, title)
                self.evaluate(module, self.load(test[:2], "test"))
                drawn = self.draw(train[: min(2, self.batch_size)])
                stepped = _numbers_by_name(title, "step()", self.step(module, drawn, optimisers, Clock(0, 1, 0.0, noise(seed, 0))))
                check_rebuilt(state, rebuilt, evaluate, before, title)
        except LabError:
            raise
        except Exception as error:
            data = f"data {self.dataset.name!r} of shape {self.dataset.shape}"
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if is_of_compiler(error):
                raise ProblemError(
                    f"{title} cannot be compiled here: {reason}. Leave out torch.compile, or compile with what every machine of the "
                    "lab has: a C++ compiler for the default backend, none for backend='aot_eager'."
                ) from error
            if (line := own_line(error)) and _is_of_code(error):
                raise ProblemError(
                    f"{title} has an error of its own, whatever the data, in {line}: {reason}{_meant(error)}"
                ) from error
            raise ProblemError(f"{title} {failed} {data}: {reason}{_layer_of(error)}{self._advice(error)}") from error
        score = measured.get("score", math.nan if scored else 0.0)
        fits = math.isfinite(score) if self.lower_is_better else 0 <= score <= 1
        if "loss" not in measured or "loss" not in stepped or not fits:
            raise ProblemError(
                f"{title}: evaluate() gave {measured} and step() gave {stepped}. evaluate() must return "
                '{"loss": float, "score": float in [0, 1]} and step() at least {"loss": tensor}. Without a score go rules that do '
                "not weigh pushes by it, such as 'fedasync', with neither target nor patience; of an error or a distance as score "
                "say lower_is_better = True."
            )
        self._check_columns("evaluate()", measured)
        check_names(f"{title}: step()", stepped)
        for of, name, value in [("step()", *one) for one in stepped.items()] + [("evaluate()", *one) for one in measured.items()]:
            if one_number(value) is None or (of == "step()" and isinstance(value, torch.Tensor) and value.dim()):
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]
                raise ProblemError(f"{title}: {name!r} of {of} is {got}. Each entry is one number or a tensor with one, shape ().")
        if not math.isfinite(loss := one_number(stepped["loss"])):
            warnings.warn(f"{title}: the loss of the first step, on two samples, is {loss:g}.", stacklevel=3)

    def _check_columns(self, of: str, measured: Mapping[str, Any]) -> None:
        """ProblemError for a number of a whole set that cannot be a column of the curve, beside those of the average."""
        averaged = [f"ema_{name}" for name in measured] if self.ema else []
        check_names(f"{self._title()}: {of}", measured, (*OF_A_CURVE, *averaged))

    def _advice(self, error: Exception) -> str:
        """What the network was given, where that explains an error of its own; "" elsewhere."""
        data, name = self.dataset, self.dataset.inputs[0]
        shape = data.fields[name].shape
        if "forward()" in str(error):
            return (
                f". It is called with the inputs of the data, {', '.join(data.inputs)}; they have {data.described()}. Which are inputs is "
                "said by open_dataset(data, inputs=[...])."
            )
        if isinstance(data, Items) and data.fields[name].dtype == np.uint8:
            return (
                f". Items go to the network as they are, here bytes of shape {shape}. Make them floats, channels first, in __getitem__ (as "
                "ToTensor of torchvision does)."
            )
        if len(shape) == 3 and shape[0] == 1 and data.affine_of(name) and _met(error, shape):
            return (
                f". Arrays (n, {shape[1]}, {shape[2]}) are pictures of one channel. Sequences (n, steps, features) keep their shape, and are "
                f"not normalised, with open_dataset(..., as_given={name!r})."
            )
        return ""

    def fingerprint(self, seed: int) -> Fingerprint:
        """What `new_module(seed)` is in this process, on the CPU."""
        state, batch = Flat(self.new_module(seed)), self.load(self.train_indices()[:8])
        return fingerprint(state, self._measured_on(batch, seed), seed)

    def check_same(self, seed: int, other: Fingerprint) -> None:
        """ProblemError where another process, of which this is the fingerprint, builds another network with this seed."""
        check_same(self.fingerprint(seed), other, self._title())

    def _measured_on(self, batch: Any, seed: int) -> Callable[[nn.Module], dict[str, float]]:
        def measured(module: nn.Module) -> dict[str, float]:
            with seeded(seed):
                return numbers_of(self.evaluate(module, batch))

        return measured

    def _flat(self, module: nn.Module) -> Flat:
        try:
            return Flat(module)
        except ProblemError as error:
            raise ProblemError(f"{self._title()}: {error}") from error

    # Samples that come after the training.

    def each(self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu") -> dict[str, np.ndarray]:
        """Of each sample its "loss" and what the network says of it, arrays of (n, ...): see `Run.predictions`."""
        raise ProblemError(f"{self._title()} gives no loss of single samples; use predict().")

    @property
    def is_own_load(self) -> bool:
        """Does `load` differ from labkit's, so that what becomes of raw samples is known to it alone?"""
        return type(self).load is not Problem.load

    def on(self, dataset: Dataset) -> "Problem":
        """The same problem on the samples of another data set."""
        other = copy.copy(self)  # by `__getstate__`: what was made of the samples is made anew
        other.__dict__ |= {"dataset": dataset}
        return other

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """What `Run.predict` makes of the outputs of the network: here nothing."""
        return outputs

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """What `Run.predict_proba` makes of the outputs of the network."""
        raise ProblemError(f"{self._title()} gives no probabilities; use predict().")

    # The inner layer.

    def computed(self, module: nn.Module) -> str | None:
        """How the steps of a module since the last call were computed, where that was chosen by the time that they take."""
        return None

    def compute_as(self, module: nn.Module, computed: str) -> None:
        """Compute the next steps of a module as these were, whatever is quickest here."""

    # The data: what is trained on, scored on, tested on.

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, opened on first use in each process."""
        dataset = open_dataset(self.data)
        expected = self.__dict__.get("_expected")
        if expected is not None and expected != _identity(dataset):
            raise DataError(
                f"data={self.data!r} has (name, shape, n_classes, n_train, n_test) = {_identity(dataset)} here, but "
                f"{expected} where the problem comes from. Point LABKIT_DATA at the same data on every machine."
            )
        return dataset

    def train_indices(self) -> np.ndarray:
        """Indices to train on, in one fixed random order, without the score set; int64."""
        train, score = self._split
        if self._fold:
            return train.copy()
        return first("train_samples", self.train_samples, train, f" beside the {score.size} of the score set")

    def score_indices(self) -> np.ndarray:
        """Indices (split "train") of the score set, the same for all workers and runs; int64, ascending."""
        return self._split[1].copy()

    def test_indices(self) -> np.ndarray:
        """Indices (split "test") that the learning curve is measured on; int64, in one fixed random order."""
        order = shuffled(self.dataset.n_test, self.dataset.units_of("test"))
        return first("test_samples", self.test_samples, order, " in the test split")

    def units(self) -> np.ndarray | None:
        """Offsets in `train_indices` of the runs of samples that the data set reads together (row groups), int64 (U + 1,) from 0 on;
        None where each sample is read by itself. They are dealt out whole."""
        if self.dataset.units is None:
            return None
        unit = np.searchsorted(self.dataset.units, self.train_indices(), "right")
        return np.concatenate([[0], np.flatnonzero(np.diff(unit)) + 1, [len(unit)]])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """Classes of training samples, for stratified partitions; int64. DataError where samples have no class."""
        return self.dataset.labels("train")[indices]

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        labels = None if self.dataset.label is None or self.dataset.n_classes is None else self.dataset.labels("train")
        if self._fold is None:
            return hold_out(labels, self.dataset.n_train, self.score_samples, self.dataset.units)
        of_all, unit = self._to_fold
        train, held = splits.fold(None if labels is None else labels[of_all], unit, *self._fold)
        return of_all[train], np.sort(of_all[held])

    @property
    def _to_fold(self) -> tuple[np.ndarray, np.ndarray]:
        """The samples that folds are made of, in the order of `train_indices`, and what each is dealt out with: its unit, or itself."""
        units = self.dataset.units
        order = shuffled(self.dataset.n_train, units)
        of_all = first("train_samples", self.train_samples, order, " in the training split")
        return of_all, np.arange(len(of_all)) if units is None else np.searchsorted(units, of_all, "right")

    _fold: tuple[int, int, int] | None = None  # k, n and seed

    def fold(self, k: int, n: int, seed: int = 0) -> "Problem":
        """The same problem for fold k of n of a cross-validation: it trains on the others, and fold k is its score set.

            runs = [labkit.train(problem.fold(k, 5), lab, update="sgwu", name=f"fold-{k}").wait() for k in range(5)]

        The score on the fold is that by which `target`, `patience` and `run.model("best")` go, and of the final weights
        `run.problem().measure(run.model().network, run.problem().score_indices())`. The test set stays what it is.

        Parameters
        ----------
        k, n : 0 <= k < n, of at least two folds. Each sample of the training split, or of the first `train_samples` of it, is in one
            fold. The folds have as many samples, and as many of each class where there are labels, but for one. All of a fold
            is the score set, whatever `score_samples` is; a rule that weighs pushes measures it at each push. Samples that are
            read in units (row groups) are dealt out by whole units, and a large fold of these is read anew each time.
        seed : deals the samples out; the same for all k.

        Raises
        ------
        ValueError
            There is no such fold, or there are fewer samples than folds.
        ProblemError
            The problem chooses its samples itself.
        """
        n, seed = whole("n", n, 2, error=ValueError), whole("seed", seed, 0, SEEDS, error=ValueError)
        k = whole("k", k, 0, n - 1, error=ValueError)
        for name in ("train_indices", "score_indices"):
            if getattr(type(self), name) is not getattr(Problem, name):
                raise ProblemError(f"{self._title()} has {name}() of its own, so that it alone can make folds.")
        if (n_dealt := len(np.unique(self._to_fold[1]))) < n:
            what = "samples" if self.dataset.units is None else "units of samples that are read together"
            raise ValueError(f"n={n}: {n_dealt} {what} cannot fill so many folds.")
        return self.on(self.dataset)._folded((k, n, seed))

    def _folded(self, fold: tuple[int, int, int] | None) -> Self:
        for name in self._made_on_use() - {"dataset"}:  # of other samples, such as what a network begins from
            self.__dict__.pop(name, None)
        self._fold = fold
        return self

    # The settings: for the record, and on the way to a worker.

    def __repr__(self) -> str:
        try:
            return call_text(type(self).__name__, self._chosen())
        except Exception:  # its constructor has stored something else
            return f"{type(self).__name__}(...)"

    def _chosen(self) -> dict[str, Any]:
        """The settings that differ from their defaults, and the data by their name."""
        defaults: dict[str, Any] = {}
        for base in type(self).__mro__:
            if "__init__" in vars(base) and base is not object:
                for name, parameter in inspect.signature(base.__init__).parameters.items():
                    defaults.setdefault(name, parameter.default)
        settings = {name: value for name, value in self.config().items() if name not in ("kind", "fold")}
        if (data := self._opened()) is not None and "data" in settings:
            settings["data"] = data.name
        unset = (inspect.Parameter.empty, self)
        return {
            name: value
            for name, value in settings.items()
            if (default := defaults.get(name, self)) in unset or not _equal(plain(default) or None, value or None)
        }

    def _opened(self) -> Dataset | None:
        """Its data, where they were opened already."""
        return vars(self).get("dataset") or (self.data if isinstance(self.data, Dataset) else None)

    def _card(self) -> Card:
        data = self._opened()
        rows = settings_text({key: value for key, value in self._chosen().items() if key != "data"})
        about = {"data": vars(self).get("data")} if data is None else {"data": data.name, "samples of shape": str(data.shape)}
        about |= {} if data is None else {"training samples": data.n_train, "test samples": data.n_test}
        calls = {"labkit.train(problem, lab)": "trains it", "problem.check()": "tries it out on a few samples"}
        return Card(f"{type(self).__name__} (problem)", rows={**about, **rows}, calls=calls)

    def config(self) -> dict[str, Any]:
        """The settings as JSON can store them; `problem_from_config` makes the problem again."""
        given = {name: v for name, v in constructor_arguments(self).items() if not _equal(self.unwritten.get(name, self), v)}
        settings = {name: v.reference if isinstance(v, Dataset) else plain(v) for name, v in given.items()}
        if callable(self.augment):
            settings["augment"] = import_path(self.augment)
        if self._fold:
            settings["cross_validation"] = dict(zip(("fold", "of", "seed"), self._fold, strict=True))
        return {"kind": import_path(type(self)), **settings}

    def __getstate__(self) -> dict[str, Any]:
        made = self._made_on_use()
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        if "dataset" in self.__dict__:
            state["_expected"] = _identity(self.dataset)
        return state

    @classmethod
    def _made_on_use(cls) -> set[str]:
        """Names of what is made when it is first asked for; copies, also those in other processes, make it anew."""
        return {name for one in cls.__mro__ for name, value in vars(one).items() if isinstance(value, cached_property)}

    def _title(self) -> str:
        return f"problem {type(self).__name__}"


def draws(seed: int, worker: int, incarnation: int = 0) -> torch.Generator:
    """The generator on the CPU from which a worker seeds what is random in its batches."""
    stream = np.random.SeedSequence([seed, worker, incarnation, 1])
    return torch.Generator().manual_seed(int(stream.generate_state(1)[0]))


def noise(seed: int, worker: int, incarnation: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator on the worker's device from which a step may draw: `Clock.generator`."""
    stream = np.random.SeedSequence([seed, worker, incarnation, 2])
    return torch.Generator(device).manual_seed(int(stream.generate_state(1)[0]))


def problem_from_config(config: Mapping[str, Any]) -> Problem:
    """The problem whose `config()` this is; RunError where that cannot be, as for a model from a notebook cell."""
    settings = dict(config)
    kind, fold = settings.pop("kind", None), settings.pop("cross_validation", None)
    for name, value in config.items():
        if (lost := by_value(value)) is not None:
            raise RunError(
                f"{name} {lost!r} of this run was written in a notebook or a script, or is an object, and the record holds only its "
                f'name. Make the problem again and give it: labkit.load_run(..., problem=problem). Of a module, {name}="my_module:..." '
                "is in the record."
            )
    try:
        made = imported(str(kind))
        if not (isinstance(made, type) and issubclass(made, Problem)):
            raise RunError(f"{kind!r} in the record of this run is not a Problem.")
        problem = made(**settings)
        return problem.fold(fold["fold"], fold["of"], fold["seed"]) if fold else problem
    except (ProblemError, TypeError, ValueError) as error:
        raise RunError(f"the record of this run does not describe a problem that can be made here: {error}") from error


def _equal(default: Any, value: Any) -> bool:
    """Is it a default: of the same type, lists and tuples being one?"""
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return list(value) == list(default)
    return type(value) is type(default) and value == default


def _reference(data: Any, answers: str | None = None) -> str | Dataset:
    """What of `data` travels: a registered name, an absolute path (workers may run elsewhere), or a Dataset."""
    data = plain_scalar(data)
    is_recorded = isinstance(data, Mapping) and set(data) == {"import_path", "options"}
    roles = {answers: True} if answers and not isinstance(data, Dataset) and not is_recorded else {}
    if not isinstance(data, str | os.PathLike):
        return open_dataset(data, **roles)
    name, path = os.fspath(data), os.path.abspath(file_path("data", data))
    if name in data_names() or not os.path.exists(path):
        is_a_name = isinstance(data, str) and not {"/", "\\", "."} & set(name)  # a path may be there on the workers alone
        return open_dataset(name, **roles) if is_items_path(name) or (is_a_name and name not in data_names()) else name
    return path


def _forwards(error: BaseException) -> Iterator[tuple[nn.Module, list[torch.Tensor]]]:
    """The networks and layers that were at work when the error came, the innermost last, and the tensors that each was given."""
    trace = error.__traceback__
    while trace is not None:
        code, values = trace.tb_frame.f_code, trace.tb_frame.f_locals
        layer, *given = [values.get(argument) for argument in code.co_varnames[: code.co_argcount]] or [None]
        if code.co_name == "forward" and isinstance(layer, nn.Module):
            yield layer, [value for value in given if isinstance(value, torch.Tensor)]
        trace = trace.tb_next


def _is_of_code(error: Exception) -> bool:
    """Is it such as a misspelt name makes, and no other data would help? Not what comes of several inputs, or of labels that are not there."""
    if isinstance(error, TypeError):  # inside a network, which is given tensors
        codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
        return any(code.co_name == "forward" and is_own_code(code.co_filename) for code in codes)
    if isinstance(error, AttributeError):
        return error.obj is not None and not isinstance(error.obj, tuple | list | Mapping)
    return isinstance(error, NameError | ImportError | ZeroDivisionError)


def _meant(error: Exception) -> str:
    """The part of a module whose name is near to one that it does not have."""
    if not (isinstance(error, AttributeError) and isinstance(error.obj, nn.Module)):
        return ""
    public = [name for name in (*vars(error.obj), *dict(error.obj.named_children())) if not name.startswith("_")]
    return f".{near}" if (near := did_you_mean(error.name, public)) else ""


def _met(error: BaseException, shape: tuple[int, ...]) -> bool:
    """Did it come in a network or a layer that was given samples of this shape?"""
    innermost = [given for _, given in _forwards(error)][-1:]
    return any(tuple(one.shape[1:]) == tuple(shape) for given in innermost for one in given)


def _layer_of(error: BaseException) -> str:
    """Which layer was at work when the error came, and the shapes of what it was given; empty where it was no layer in a module."""
    names: dict[int, str] = {}  # by the outermost module
    found = ""
    for layer, given in _forwards(error):
        names = names or {id(one): name for name, one in layer.named_modules()}
        if name := names.get(id(layer)):
            shapes = ", ".join(str(tuple(value.shape)) for value in given)
            kind = type(layer).__name__ if [*layer.children()] else repr(layer)
            found = f"; in its layer {name!r}, {kind}, which was given {shapes or 'no tensor'}"
    return found


def _identity(dataset: Dataset) -> tuple[Any, ...]:
    return dataset.name, tuple(dataset.shape), dataset.n_classes, dataset.n_train, dataset.n_test


def _numbers_by_name(title: str, of: str, got: Any) -> Mapping[str, Any]:
    """What a method of a problem returned; ProblemError where it is not numbers by name."""
    if isinstance(got, Mapping):
        return got
    what = "nothing (is its return missing?)" if got is None else f"a {type(got).__name__}"
    raise ProblemError(
        f'{title}: {of} returned {what}. It must return numbers by name: {{"loss": loss.detach()}} from step(), '
        '{"loss": float, "score": float} from evaluate().'
    )
