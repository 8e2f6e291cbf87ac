"""What `Classifier` and `Regressor` share: one module, called on the inputs of a sample, and a loss of its outputs and the targets.

    outputs = module(x)                 of one input; module(a, b) of several, in the order of the fields
    step       rate of the moment -> loss -> backward, in `accumulate` parts -> gradients cut to `clip_norm` -> optimiser
    measure    loss, score and metrics over a whole set: what is no mean over samples is computed once, of all of them

A loss, an optimiser, a schedule and a metric are each a name, a name with settings ({"name": "huber", "delta": 2.0}), an import
path or a function; functions of a notebook cell travel by value, as models do.

Used as the base of `labkit.problems.classifier` and `labkit.problems.regressor`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from labkit.data.cache import cache_dir
from labkit.errors import ProblemError, calling, plain_scalar, real, whole
from labkit.imports import reference
from labkit.inner.engine import Engine, first_of
from labkit.inner.hooks import taken_off
from labkit.inner.inner import Inner
from labkit.models import check_model, describe, evaluating, make_model, seeded
from labkit.problems.losses import Loss
from labkit.problems.metrics import Meter, check_metrics, make_meters, mean, number, together
from labkit.problems.optimisers import check_optimiser, make_optimiser, title_of
from labkit.problems.problem import MEASURED, Clock, Metrics, Optimisers, Problem, noise
from labkit.problems.schedules import make_schedule
from labkit.problems.splits import batches

LOOKED_AT = 64  # samples on which `check` compares what a model gives with what its loss takes
ROUNDING, ROUNDING_16 = 1e-3, 0.05  # relative, between the gradients of a batch that is split and of one that is not


class Supervised(Problem):
    """A problem with one module, one loss and one optimiser; a subclass gives `n_outputs`, `fitted` and `scorer`."""

    unwritten: ClassVar = {**Problem.unwritten, "metrics": (), "clip_norm": None, "accumulate": 1, "inner": None}

    def __init__(
        self,
        model: str | Callable[..., nn.Module],
        data: Any,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        optimiser: Any,
        schedule: Any,
        model_args: Mapping[str, Any] | None,
        loss: Any,
        metrics: Any,
        clip_norm: float | None,
        accumulate: int,
        inner: Any,
        **common: Any,
    ) -> None:
        check_model(model)
        if model_args is not None and not isinstance(model_args, Mapping):
            raise TypeError(f"model_args={model_args!r} must be a dict, not {type(model_args).__name__}.")
        self.model, self.model_args = model, dict(model_args or {})
        self.lr = real("lr", lr, above=0)
        self.momentum = real("momentum", momentum, least=0, below=1)
        self.weight_decay = real("weight_decay", weight_decay, least=0)
        optimiser, schedule, loss = (plain_scalar(given) for given in (optimiser, schedule, loss))
        self.optimiser, self.schedule, self.loss, self.metrics = optimiser, schedule, loss, metrics
        self.clip_norm = None if clip_norm is None else real("clip_norm", clip_norm, above=0)
        self.accumulate = whole("accumulate", accumulate)
        self.inner = Inner.of(inner)
        check_optimiser(optimiser, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        make_schedule(schedule), Loss(loss), check_metrics(metrics)
        super().__init__(data, **common)

    # What a subclass gives.

    @property
    def n_outputs(self) -> Any:
        """What a model function is called with beside the shape."""
        raise NotImplementedError

    def fitted(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Both as the loss wants them; ProblemError where they do not fit each other."""
        raise NotImplementedError

    def scorer(self) -> Meter:
        """Measures the score, in [0, 1]."""
        raise NotImplementedError

    # What a worker drives.

    def build(self, seed: int) -> nn.Module:
        shapes = tuple(self.dataset.fields[name].shape for name in self.dataset.inputs)
        return make_model(self.model, self.dataset.shape if len(shapes) == 1 else shapes, self.n_outputs, self.model_args, seed)

    def optimisers(self, module: nn.Module) -> Optimisers:
        parameters = [p for p in module.parameters() if p.requires_grad]
        common = {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return (make_optimiser(self.optimiser, parameters, **common),)

    def step(self, module: nn.Module, batch: Any, optimisers: Optimisers, clock: Clock) -> Metrics:
        x, y = batch
        (optimiser,) = optimisers
        if self._schedule:
            factor = self._schedule(clock)
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimiser.zero_grad(set_to_none=True)
        metrics = {"loss": self.backward(module, x, y)}
        if self.clip_norm is not None:
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        with calling(self._optimiser_title):
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)  # so much less memory is taken until the next one
        return metrics

    def evaluate(self, module: nn.Module, batch: Any) -> dict[str, float]:
        """Loss and score of the batch; metrics are of a whole set: `measure`."""
        return self._measured(module, [batch], {})

    def measure(
        self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu", batch_size: int = MEASURED
    ) -> dict[str, float]:
        """Over all samples `indices` of `split`: "loss", "score" in [0, 1], and each of the metrics."""
        if self._evaluates_itself:
            return super().measure(module, indices, split, device, batch_size)
        loaded = (self.load(part, split, device) for part in batches(indices, batch_size))
        return self._measured(module, loaded, check_metrics(self.metrics))

    def each(self, module: nn.Module, indices: np.ndarray, split: str = "train", device: str = "cpu") -> dict[str, np.ndarray]:
        """Of each sample "loss" (n,), "predicted", and "label" or "target" where there is one; of a classifier also "probability"."""
        losses, outputs, targets = [], [], []
        for part in batches(indices, MEASURED):
            out, wanted = self._outputs_of(module, *self.load(part, split, device))
            losses += [self._loss(_one(out, at), _one(wanted, at)).item() for at in range(len(part))]
            outputs.append(out.cpu() if isinstance(out, torch.Tensor) else None)
            targets.append(wanted.cpu() if isinstance(wanted, torch.Tensor) and self.dataset.answers else None)
        found = {"loss": np.array(losses)}
        if targets[0] is not None:
            wanted, is_label = together(targets).numpy(), self.dataset.fields[self.dataset.answers[0]].role == "label"
            found = {"label": wanted.astype(np.int64), **found} if is_label else {"target": wanted, **found}
        return {**found, **self.said(together(outputs).numpy())} if outputs[0] is not None else found

    def said(self, outputs: np.ndarray) -> dict[str, np.ndarray]:
        """What is made of outputs, for `each`."""
        return {"predicted": self.predicted(outputs)}

    def check(self, seed: int = 0, scored: bool = True) -> None:
        for made in ("_loss", "_schedule", "_optimiser_title"):  # of a module that may have been loaded again
            self.__dict__.pop(made, None)
        super().check(seed, scored)
        module = self.new_module(seed)
        if not self._evaluates_itself:
            self._loss.check(*self._outputs_of(module, *self.load(self.train_indices()[:LOOKED_AT])))
        if self.inner is not None:
            self._check_step(module, seed)
            self._check_split(module)
        if self.metrics:
            if self._evaluates_itself:
                raise ProblemError(
                    f"{self._title()} has an evaluate() of its own: have it return the metrics, and leave metrics= out."
                )
            with calling(f"{self._title()}, measured on the score set,"):
                self._check_columns("metrics", self.measure(module, self.score_indices()))

    def config(self) -> dict[str, Any]:
        named = ("model", "optimiser", "schedule", "loss", "metrics")
        made = {name: reference(getattr(self, name)) if name in named else value for name, value in super().config().items()}
        return made if self.inner is None else {**made, "inner": self.inner.config()}

    def computed(self, module: nn.Module) -> str | None:
        engine = self._engines.get(module)
        return engine.done() or None if engine else None

    def compute_as(self, module: nn.Module, computed: str) -> None:
        if self.inner is not None:
            self._engine(module).repeat(computed)

    # How.

    @property
    def _evaluates_itself(self) -> bool:
        """Has a subclass an `evaluate` of its own?"""
        return type(self).evaluate is not Supervised.evaluate

    @cached_property
    def _loss(self) -> Loss:
        return Loss(self.loss)

    @cached_property
    def _schedule(self) -> Callable[[Clock], float] | None:
        return make_schedule(self.schedule)

    @cached_property
    def _optimiser_title(self) -> str:
        return title_of(self.optimiser)

    def loss_of(self, module: Callable[..., Any], x: Any, y: Any) -> torch.Tensor:
        """The loss of a batch by what `module` makes of x, in the precision of the problem."""
        with self.autocast(first_of(x).device):
            outputs = module(*x) if isinstance(x, tuple) else module(x)
            return self._loss(*self.fitted(_float(outputs), x if y is None else y))

    def backward(self, module: nn.Module, x: Any, y: Any) -> torch.Tensor:
        """Adds the gradients of the batch's loss to those on the parameters, and returns it, without a gradient of its own.

        A `step` of your own calls it in the place of `loss.backward()`: so `inner` and `accumulate` hold. The loss is computed in `accumulate`
        parts, each of which the inner layer may split further; a part has two samples at least (BatchNorm).
        """
        n = max(1, min(self.accumulate, len(first_of(x)) // 2))
        wrapped = self._wrapped(module)
        if self.inner is not None and wrapped and wrapped != [module]:
            raise ProblemError(
                f"{self._title()}: inner= computes the gradients of one network, and networks() gives others to average. Leave inner= or "
                "networks() out, or use another update than 'allreduce'."
            )
        loss = 0.0
        for at, (part, own, weight) in enumerate(self._parts(x, y, n), 1):
            if self.inner is not None:
                network = module.module if wrapped else module
                share = self._engine(network).gradients(network, part, partial(self._shares, part, own, weight))
                if wrapped and at == n:
                    average_gradients(module)
            else:
                with contextlib.ExitStack() as alone:  # the ranks, which may have fewer parts, meet in the last backward pass
                    for network in wrapped if at < n else ():
                        alone.enter_context(network.no_sync())
                    share = self._share(module, part, own, weight)
                    share.backward()
            loss = loss + share.detach()
        return loss

    def _parts(self, x: Any, y: Any, n: int) -> list[tuple[Any, Any, Any]]:
        """A batch in n parts, and the weight of the loss of each in that of the batch; None where it is all of it."""
        if n == 1:
            return [(x, y, None)]
        parts = list(zip(_cut(x, n), _cut(y, n), strict=True))
        counts = [self._loss.count(part if own is None else own) for part, own in parts]
        total = sum(counts)
        if isinstance(total, torch.Tensor):  # a batch may be ignored as a whole
            total = total.clamp(min=torch.finfo(torch.float32).tiny)
        return [(part, own, count / total) for (part, own), count in zip(parts, counts, strict=True)]

    def _share(self, module: nn.Module, x: Any, y: Any, *weights: Any) -> torch.Tensor:
        loss = self.loss_of(module, x, y)
        for weight in weights:
            loss = loss if weight is None else loss * weight
        return loss

    def _shares(self, x: Any, y: Any, weight: Any, module: Callable[..., Any], n: int) -> list[Callable[[], torch.Tensor]]:
        """What computes the loss of each of n parts, weighted by its share and by `weight`, from the outputs of `module`."""
        return [partial(self._share, module, part, own, share, weight) for part, own, share in self._parts(x, y, n)]

    def _wrapped(self, module: nn.Module) -> list[nn.Module]:
        """What of a module an all-reduce has wrapped; looked for once."""
        if module not in self._wrapped_names:
            found = [name for name, part in module.named_modules() if isinstance(part, DistributedDataParallel)]
            self._wrapped_names[module] = found  # by name, as a value must not hold its key
        return [module.get_submodule(name) for name in self._wrapped_names[module]]

    @cached_property
    def _wrapped_names(self) -> weakref.WeakKeyDictionary[nn.Module, list[str]]:
        return self.__dict__.setdefault("_wrapped_names", weakref.WeakKeyDictionary())  # the same for threads that come at once

    @cached_property
    def _engines(self) -> weakref.WeakKeyDictionary[nn.Module, Engine]:
        return self.__dict__.setdefault("_engines", weakref.WeakKeyDictionary())

    def _engine(self, module: nn.Module) -> Engine:
        if module not in self._engines:
            self._engines[module] = Engine(self.inner, cache_dir() / "inner.json", plain=self.precision == "float32")
        return self._engines[module]

    def _check_step(self, module: nn.Module, seed: int) -> None:
        """ProblemError where a step of the user's own goes past the inner layer."""
        if type(self).step is Supervised.step:
            return
        called: list[bool] = []
        tried = object.__new__(type(self))  # another thread may check, or train, this problem at the same time
        vars(tried).update(vars(self))
        tried.backward = lambda *batch: called.append(True) or self.backward(*batch)
        with seeded(seed):
            batch = self.load(self.train_indices()[: min(2, self.batch_size)])
            tried.step(module, batch, tried.optimisers(module), Clock(0, 1, 0.0, noise(seed, 0)))
        if not called:
            raise ProblemError(
                f"{self._title()}: {type(self).__name__} has a step() of its own, which inner= does not reach. Call self.backward(module, x, y) in "
                "it in the place of loss.backward(), or leave inner= out."
            )

    def _check_split(self, module: nn.Module) -> None:
        """ProblemError where the gradients of a batch that is split are others."""
        if self.inner.split in ("none", "intra-op"):
            return
        if self.inner.split == "rows" and self.precision != "float32":
            raise ProblemError(
                f"{self._title()}: Inner(split='rows') computes in float32, and precision={self.precision!r} was asked for."
            )
        x, y = self.load(self.train_indices()[: min(self.batch_size, LOOKED_AT)])
        module.train()
        try:
            difference = Engine(self.inner, plain=self.precision == "float32").check(module, x, partial(self._shares, x, y, None))
        except ProblemError as error:
            raise ProblemError(f"{self._title()}: {error}") from error
        if difference > (ROUNDING_16 if self.precision == "bfloat16" else ROUNDING):
            raise ProblemError(
                f"{self._title()}: the gradients of a batch that the inner layer has split differ by {difference:.2g} from those of the batch "
                "(relative). Its loss is no mean over samples, or what its forward() makes of a sample depends on the others, or on random "
                "numbers. Have a module that mixes samples computed whole, with Inner(whole=['its name']), or leave the step undivided, with "
                "Inner(split='none')."
            )

    def _measured(self, module: nn.Module, loaded: Iterable[Any], metrics: Mapping[str, Any]) -> dict[str, float]:
        losses, scorer, meters = [], self.scorer(), {}
        for x, y in loaded:
            meters = meters or make_meters(metrics, first_of(x).device, self._loss)
            outputs, targets = self._outputs_of(module, x, y)
            losses.append((self._loss(outputs, targets).item(), float(self._loss.count(targets))))
            scorer.update(outputs, targets)
            for name, meter in meters.items():
                with calling(f"metric {name!r}"):
                    meter.update(outputs, targets)
        if not losses:
            raise ProblemError(f"{self._title()} is measured on no samples. Give some to its score set and its test split.")
        columns = [*number("score", scorer.compute()).items()]
        for name, meter in meters.items():
            with calling(f"metric {name!r}"):
                columns += number(name, meter.compute()).items()
        if len(found := dict(columns)) < len(columns):
            twice = next(name for at, (name, _) in enumerate(columns) if name in dict(columns[:at]))
            raise ProblemError(f"two metrics give {twice!r}. Name them otherwise: metrics={{'name': metric}}.")
        return {"loss": mean(losses), **found}

    def _outputs_of(self, module: nn.Module, x: Any, y: Any) -> tuple[Any, Any]:
        """Outputs of a module that is evaluated, and targets, as the loss takes them."""
        with evaluating(module) as plain, self.autocast(first_of(x).device):
            outputs = plain(*x) if isinstance(x, tuple) else plain(x)
        return self.fitted(_float(outputs), x if y is None else y)

    def _title(self) -> str:
        return f"model {describe(self.model)}"


def _float(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, tuple):
        return tuple(map(_float, outputs))
    return {name: _float(part) for name, part in outputs.items()} if isinstance(outputs, Mapping) else outputs


def _one(tensors: Any, at: int) -> Any:
    """The sample at this place of a batch, as a batch."""
    if isinstance(tensors, tuple):
        return tuple(_one(part, at) for part in tensors)
    if isinstance(tensors, Mapping):
        return {name: _one(part, at) for name, part in tensors.items()}
    return tensors[at : at + 1]


def _cut(tensors: Any, n: int) -> list[Any]:
    """A batch in n parts."""
    if tensors is None:
        return [None] * n
    if isinstance(tensors, tuple):
        return list(zip(*(_cut(part, n) for part in tensors), strict=True))
    if isinstance(tensors, Mapping):
        return [dict(zip(tensors, parts, strict=True)) for parts in zip(*(_cut(part, n) for part in tensors.values()), strict=True)]
    # .data: autograd would take what a network changes of its part in place (a first ReLU, say) for a change of all parts
    return [part.data for part in tensors.tensor_split(n)]


def average_gradients(wrapped: DistributedDataParallel) -> None:
    """The gradients that are on the parameters become those that an all-reduce averages.

    They did not come from a backward pass through what DistributedDataParallel wraps; so they come from one through a sum, of which they
    are the gradients.
    """
    network = wrapped.module
    given = [(parameter, parameter.grad) for parameter in network.parameters() if parameter.grad is not None]
    for parameter, _ in given:
        parameter.grad = None
    wrapped._modules["module"] = _Sum(given)
    try:
        with taken_off([parameter for parameter, _ in given]):  # which have had these gradients
            wrapped().backward()
    finally:
        wrapped._modules["module"] = network


class _Sum(nn.Module):
    def __init__(self, given: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        super().__init__()
        self.__dict__["given"] = given

    def forward(self) -> torch.Tensor:
        return sum((parameter * gradient).sum() for parameter, gradient in self.given)
