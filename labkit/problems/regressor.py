"""`Regressor`: a network whose outputs are to be near numbers; by default it is trained with the mean squared error.

Used by users through `labkit.Regressor`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from labkit.errors import ProblemError
from labkit.names import named
from labkit.problems.losses import Loss
from labkit.problems.metrics import Meter
from labkit.problems.supervised import Supervised


class Regressor(Supervised):
    """A network whose outputs are to be near the targets of the data; without targets, near its own inputs (an autoencoder).

    Its score is 1 / (1 + E), where E is the squared error of all samples over that of their mean as the answer: 1 is perfect, and
    1/2 as good as the mean (with R^2 it is 1 / (2 - R^2)); it does not depend on the scale of the targets, and unlike R^2 it is
    above 0 for a network that has learnt nothing, so that rules that weigh pushes by their score can begin. Where outputs and
    targets are not of one shape (another loss, such as that of a distribution) it is (1 - loss / (1 + |loss|)) / 2.

    Outputs are given the shape of the targets where one is flat or has an axis of length 1 more, so that (n, 1) and (n,) are never
    spread over each other; where axes would change places they are refused.

    Parameters beside those of `Problem`
    ------------------------------------
    model : an import path "my_module:make_model", or a function. It is called as `f()`, `f(shape)` or `f(shape, n_outputs)`, by its
        number of required positional parameters, and with `model_args`; `n_outputs` are the numbers of a target, of several
        targets a dict of them by name, and `shape` is that of one sample, of several inputs a tuple of them. Or a module, as of
        `labkit.Classifier`.
    data : as of `Problem`; what is called y, label(s) or target(s) is a target, also where it is whole numbers.
    loss : "mse", "mae", "huber", "smooth-l1", "poisson-nll" or another of torch's by its name, with settings
        {"name": "huber", "delta": 2.0}, or a function (outputs, targets); of several targets it gets a dict of them by name. Score, metrics
        and `predict` take outputs as they are: with "poisson-nll" they are logarithms, unless it has {"log_input": False}.
    lr, momentum, weight_decay, optimiser, schedule, metrics, clip_norm, accumulate, inner : as of `labkit.Classifier`.

    A bad argument is a ValueError or TypeError at once; a model that does not fit the data a ProblemError in `check`.

    Examples
    --------
    >>> x = np.random.rand(200, 3).astype("float32")
    >>> sums = labkit.Regressor(lambda: torch.nn.Linear(3, 1), (x, x.sum(1, keepdims=True)), loss="huber", metrics=["mae"])
    >>> labkit.train(sums, lab, passes=1).wait().curve().columns.intersection(["score", "mae"]).tolist()
    ['score', 'mae']
    """

    answers: ClassVar = "target"

    @named
    def __init__(
        self,
        model: str | Callable[..., nn.Module],
        data: Any,
        *,
        loss: Any = "mse",
        metrics: Any = (),
        batch_size: int = 64,
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        optimiser: Any = "sgd",
        schedule: Any = "constant",
        clip_norm: float | None = None,
        accumulate: int = 1,
        model_args: Mapping[str, Any] | None = None,
        train_samples: int | None = None,
        test_samples: int | None = None,
        score_samples: int = 256,
        precision: str = "float32",
        channels_last: bool = False,
        augment: str | Callable[..., Any] | None = None,
        ema: float | None = None,
        inner: Any = None,
    ) -> None:
        super().__init__(
            model,
            data,
            loss=loss,
            metrics=metrics,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            optimiser=optimiser,
            schedule=schedule,
            clip_norm=clip_norm,
            accumulate=accumulate,
            model_args=model_args,
            train_samples=train_samples,
            test_samples=test_samples,
            score_samples=score_samples,
            precision=precision,
            channels_last=channels_last,
            augment=augment,
            ema=ema,
            inner=inner,
        )

    @property
    def n_outputs(self) -> int | dict[str, int]:
        fields = self.dataset.fields
        sizes = {name: _size(fields[name].shape) for name in self.dataset.answers or self.dataset.inputs}
        return sizes if len(sizes) > 1 else next(iter(sizes.values()))

    def fitted(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        named = not self._loss.is_own
        if isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor):
            if outputs.shape != targets.shape and _fits(outputs.shape, targets.shape):
                outputs = outputs.reshape(targets.shape)
            targets = targets.float() if named or targets.is_floating_point() else targets
        if named and (not isinstance(outputs, torch.Tensor) or getattr(targets, "shape", None) != outputs.shape):
            advice = ADVICE if self.dataset.answers else f"{NO_TARGET} {ADVICE}"
            raise ProblemError(f"{self._title()} gave {_shapes(outputs)} for targets of {_shapes(targets)}. {advice}")
        return outputs, targets

    def check(self, seed: int = 0, scored: bool = True) -> None:
        data, loss = self.dataset, Loss(self.loss)
        if loss.of_classes and data.answers and all(data.fields[name].shape == () for name in data.answers):
            raise ProblemError(
                f"{loss.title} is of classes, and a Regressor predicts numbers. Use loss='mse' or 'huber'; classes are predicted by "
                "labkit.Classifier(model, data, loss=...)."
            )
        super().check(seed, scored)

    def scorer(self) -> Meter:
        return _Explained(self._loss)

    def predicted(self, outputs: np.ndarray) -> np.ndarray:
        """The outputs, in the shape of the targets where they have as many numbers: (n,) of (n, 1)."""
        fields = [self.dataset.fields[name] for name in self.dataset.answers or self.dataset.inputs]
        expected = (len(outputs), *fields[0].shape)
        fits = len(fields) == 1 and None not in expected and _fits(outputs.shape, expected)
        return outputs.reshape(expected) if fits else outputs


ADVICE = "Change the last layer; for several targets, or outputs of another kind, give loss= a function (outputs, targets)."
NO_TARGET = "No field of the data is a target, so that outputs are compared with the inputs: name it, labkit.open_dataset(data, target=...)."


class _Explained:
    """1 / (1 + E): see `Regressor`."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.losses, self.errors, self.sums = loss, [], 0.0, []

    def update(self, outputs: Any, targets: Any) -> None:
        if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor) or outputs.shape != targets.shape:
            self.losses.append((self.loss(outputs, targets).item(), float(self.loss.count(targets))))
            return
        # Moments about the first batch's mean: numbers far from 0 keep their digits.
        y = targets.double()
        self.errors += (outputs.double() - y).square().sum().item()
        centre = y.mean(0)
        self.sums.append((len(y), centre, (y - centre).square().sum().item()))

    def compute(self) -> float:
        if self.losses:
            loss = sum(value * n for value, n in self.losses) / sum(n for _, n in self.losses)
            return 0.5 * (1 - loss / (1 + abs(loss)))
        n = sum(size for size, *_ in self.sums)
        centre = sum(size * own for size, own, _ in self.sums) / n
        spread = sum(within + size * (own - centre).square().sum().item() for size, own, within in self.sums)
        return spread / (spread + self.errors) if spread + self.errors else 1.0


def _fits(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Are these the same numbers in the same order: but for axes of length 1, or flat on one side? Not where axes change places."""
    long = [[n for n in axes[1:] if n != 1] for axes in (shape, other)]
    return shape[0] == other[0] and math.prod(shape) == math.prod(other) and (long[0] == long[1] or min(map(len, long)) <= 1)


def _size(shape: tuple[int | None, ...]) -> int:
    size = 1
    for length in shape:
        size *= length or 1
    return size


def _shapes(tensors: Any) -> str:
    if isinstance(tensors, torch.Tensor):
        return f"shape {tuple(tensors.shape)}"
    return f"a {type(tensors).__name__}" + (f" of {', '.join(map(str, tensors))}" if isinstance(tensors, Mapping) else "")
