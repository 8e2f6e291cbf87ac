"""Metrics: what is measured beside loss and score, over a whole set at once.

    "mae", "rmse", "r2", "accuracy"                                          names of `METRICS`
    a function                                                               f(outputs, targets) -> float, called once, on the CPU,
                                                                             with those of all samples
    an object with update, compute and reset, such as those of torchmetrics  updated batch by batch
    "torchmetrics:F1Score", {"name": "torchmetrics:F1Score", "task": ...}    made where it is needed; the record holds it whole

"accuracy" is what the score of a `Classifier` is: what the loss ignores, or is no class, does not count. A metric of the user's own gets
all outputs and targets, also those: it has to leave them out itself (`ignore_index=255` of torchmetrics; outputs at targets != 255).

torchmetrics is no dependency: it is imported where somebody names it. A metric of NaN stays NaN in the tables; who reads them is told.

Used by `labkit.problems.supervised`; what is a number, and its name, wherever a problem gives some.
"""

import copy
import numbers
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from labkit.data.columns import NO_LABEL
from labkit.errors import ProblemError, calling
from labkit.imports import check_settings, chosen
from labkit.problems.losses import Loss

MOST = 256  # numbers by name beside the loss, as the protocol of a run takes them
OF_A_CURVE = ("seconds", "samples", "version")  # its columns; "train_..." are what the steps of training returned
TAKEN = ("loss", "score", *OF_A_CURVE)


class Meter(Protocol):
    """What is measured over batches."""

    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> Any: ...


def mae(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).abs().mean()


def rmse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).square().mean().sqrt()


def r2(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The share of the variance that is explained; NaN for targets that are all the same."""
    return 1 - (outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum()


class Right:
    """The share of right answers, batch by batch, of those that its loss counts; NaN where that is none."""

    def __init__(self, loss: Loss) -> None:
        self.loss, self.found = loss, []

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        if outputs.numel() == targets.numel() and not self.loss.of_classes:  # yes or no
            right = (outputs.reshape(targets.shape) > self.loss.threshold) == (targets > 0.5)
        elif not targets.is_floating_point():
            right = outputs.argmax(1) == targets
            counted = (targets != self.loss.ignored) & (targets >= 0) & (targets < outputs.shape[1])
            if targets.dim() > 1 or self.loss.uneven or not counted.all():  # what is no class can be no right answer
                right = right[counted]
                return self.found.append((right.double().mean().item() if right.numel() else 0.0, right.numel()))
        else:  # a probability for each class
            right = outputs.argmax(1) == targets.argmax(1)
        self.found.append((right.float().mean().item(), len(targets)))

    def compute(self) -> float:
        return mean(self.found)


METRICS = {"mae": mae, "rmse": rmse, "r2": r2, "accuracy": Right}


def check_metrics(given: Any) -> dict[str, Any]:
    """The metrics by the names of their columns; ValueError or TypeError for what is none, or for a name that is taken."""
    if isinstance(given, Mapping) and "name" not in given:
        named = dict(given)
    else:
        listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        named = {}
        for one in listed:
            name = _column(one)
            if name in named:
                raise ValueError(f"two metrics are called {name!r}. Name them: metrics={{'name': metric, ...}}.")
            named[name] = one
    for name, one in named.items():
        if not _is_column(name, TAKEN):
            raise ValueError(f"a metric cannot be called {name!r}. Name it: metrics={{'name': metric}}.")
        made, settings = chosen("metrics", one, METRICS)
        if settings or isinstance(made, type):
            check_settings(f"metric {name!r}", made, settings, beside=("loss",) if made is Right else ())
    return named


def make_meters(named: Mapping[str, Any], device: torch.device | str, loss: Loss) -> dict[str, Meter]:
    """A fresh meter of each metric, of a problem with this loss."""
    made = {}
    for name, one in named.items():
        with calling(f"metric {name!r}"):
            made[name] = _meter(one, device, loss)
    return made


def mean(values: Sequence[tuple[float, float]]) -> float:
    """Of (value, weight); NaN where nothing has a weight."""
    total = sum(weight for _, weight in values)
    return float(sum(value * weight for value, weight in values if weight) / total) if total else float("nan")


def one_number(value: Any) -> float | None:
    """The number that `value` is, also as an array or a tensor with one; None for anything else, and for what no float can hold."""
    if (hasattr(value, "item") and getattr(value, "size", 0) == 1) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        return None


def check_names(of: str, names: Collection[Any], taken: Sequence[str] = ()) -> None:
    """ProblemError where a number cannot have one of these names as a column of tables and figures, or where they are too many."""
    for name in names:
        if not _is_column(name, taken):
            raise ProblemError(f"{of}: a number cannot be called {name!r}. Give another name, a text.")
    if len(names) > MOST:
        raise ProblemError(f"{of} gives {len(names)} numbers; {MOST} at most are recorded.")


def _is_column(name: Any, taken: Sequence[str]) -> bool:
    """Is it a text that tables, figures and files take, and that is no other column's?"""
    fits = isinstance(name, str) and name and name.isprintable() and "<" not in name
    return bool(fits) and name not in taken and not name.startswith("train_")


def number(name: str, value: Any) -> dict[str, float]:
    """What a metric gave, as columns: one number, or several by name; ProblemError for anything else."""
    if isinstance(value, Mapping):
        return {column: x for key, part in value.items() for column, x in number(f"{name}_{key}", part).items()}
    if (found := one_number(value)) is None:
        shape = tuple(getattr(value, "shape", ()))
        got = f"shape {shape}" if shape else f"a {type(value).__name__}"
        raise ProblemError(f"metric {name!r} gave {got}. A metric is one number, or a dict of them by name.")
    return {name: found}


class _Whole:
    """A function of all outputs and targets, collected on the CPU."""

    def __init__(self, function: Any) -> None:
        self.function, self.seen = function, []

    def update(self, outputs: Any, targets: Any) -> None:
        self.seen.append((_to_cpu(outputs), _to_cpu(targets)))

    def compute(self) -> Any:
        return self.function(*(_joined(parts) for parts in zip(*self.seen, strict=True)))


def _meter(one: Any, device: torch.device | str, loss: Loss) -> Meter:
    made, settings = chosen("metrics", one, METRICS)
    if made is Right:
        return Right(loss)
    if isinstance(made, type):
        made = made(**settings)
    elif settings:
        made = partial(made, **settings)
    if not hasattr(made, "update"):
        return _Whole(made)
    meter = copy.deepcopy(made)  # workers in threads share the problem
    meter.reset()
    return meter.to(device) if hasattr(meter, "to") else meter


def _column(one: Any) -> str:
    if isinstance(one, str) and one in METRICS:
        return one
    made, _ = chosen("metrics", one, METRICS)
    return getattr(made, "__name__", None) or getattr(getattr(made, "func", made), "__name__", None) or type(made).__name__


def _to_cpu(tensors: Any) -> Any:
    if isinstance(tensors, Mapping):
        return {name: _to_cpu(part) for name, part in tensors.items()}
    if isinstance(tensors, list | tuple):
        return tuple(_to_cpu(part) for part in tensors)
    return tensors.detach().cpu()


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(map(_joined, zip(*parts, strict=True)))
    return together(parts)


def together(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Batches (n, ...) as one. Where samples of some are shorter they are filled up behind their end, as within a batch: whole numbers
    with what is no label."""
    if len({part.shape[1:] for part in parts}) > 1:
        most = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts), strict=True)]
        fill = 0 if parts[0].is_floating_point() else NO_LABEL
        for at, part in enumerate(parts := list(parts)):
            room = [edge for n, length in zip(most, part.shape[1:], strict=True) for edge in (n - length, 0)]
            parts[at] = F.pad(part, room[::-1], value=fill)  # from the last axis on, before and behind
    return torch.cat(list(parts))
